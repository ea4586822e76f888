"""`--backlog` with examples/files, where dispatchers, workers and consumers die or do nothing."""

import asyncio
import contextlib
import fcntl
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.kit.command import Command
from tests.kit.environment import HERE
from tests.kit.example import Example, kill
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import lease

pytestmark = pytest.mark.anyio


@pytest.fixture
def files(tmp_path):
    return Example("files", JOBS=str(tmp_path / "jobs"))


def reservations(run):
    return re.findall(r"null_consumer: reserved session=(\S+)", run.said())


async def reserved(vast):
    """The sessions of all workers, at this moment."""
    leases = await asyncio.gather(
        *(lease(worker) for worker in list(vast.workers.values()) if worker.was_ready),
        return_exceptions=True,
    )
    return {each["session_id"] for each in leases if isinstance(each, dict) and each["session_id"]}


class Watch:
    """How many are reserved at once, at most, and which there were."""

    def __init__(self, vast):
        self.sessions = set()
        self.most = 0
        self._task = asyncio.create_task(self._watch(vast))

    async def _watch(self, vast):
        while True:
            now = await reserved(vast)
            self.sessions |= now
            self.most = max(self.most, len(now))
            await asyncio.sleep(0.1)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.wait({self._task})


@pytest.mark.long
async def test_a_dispatcher_that_is_killed_again_and_again_reserves_nothing_twice(files):
    files.put(400, 1)
    folder = HERE / "examples" / "files"
    options = ("--backlog", f"{folder}/backlog", "--max", "2", "--every", "1")
    consumer = {"NULL_CONSUMER": f"{folder}/consumer", "JOBS": files.environment["JOBS"]}

    async def dispatch(vast, signum):
        """Start one, which finds jobs and reservations, and end it 4 s later."""
        async with Command(*options, vast=vast, environment=consumer) as command:
            assert await command.says("jobs: ")
            await eventually(lambda: two_are_reserved(vast))
            await asyncio.sleep(4)
            command.process.send_signal(signum)
            return await command.status(10)

    async def two_are_reserved(vast):
        return len(await reserved(vast)) == 2

    async with FaultyVast(4, 30, consumer, control_port=None) as vast, Watch(vast) as watch:
        assert await dispatch(vast, signal.SIGKILL) == -signal.SIGKILL
        assert await dispatch(vast, signal.SIGKILL) == -signal.SIGKILL
        assert await dispatch(vast, signal.SIGTERM) == 128 + signal.SIGTERM
        # What is reserved goes on without a dispatcher.
        assert await two_are_reserved(vast)
        withdraw_those_that_wait(files)
        await eventually(lambda: files.backlog()[:2] == (0, 0))
        await eventually(lambda: not any(w.report["cur_load"] for w in vast.workers.values()))
    assert (watch.most, len(watch.sessions)) == (2, 2)
    results = files.results()
    assert len(results) > 10
    assert all(" try 1 " in line for line in results)


def withdraw_those_that_wait(files):
    for path in Path(files.environment["JOBS"]).glob("*.job"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open() as job:
            fcntl.flock(job, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@pytest.mark.long
def test_whatever_dies_all_jobs_are_done_with_one_reservation_more_for_each(files, tmp_path):
    files.put(36, 0.7)
    with files.command(tmp_path, "--max", "3", "--settle", "3", "--every", "1", "--once") as run:
        run.until(lambda: len(run.consumers()) == 3)
        session_id = run.kill_consumer()
        run.until(lambda: session_id not in run.consumers() and len(run.consumers()) == 3)
        (victim, _, _) = wrappers(run)
        kill(victim)
        run.until(lambda: victim not in wrappers(run) and len(wrappers(run)) == 3)
        run.until(lambda: len(run.consumers()) == 3)
        kill(run.workers()[0])
        assert run.status() == 0
        assert len(reservations(run)) <= 6
        assert files.processes() == []
    results = files.results()
    assert len(results) == 36
    assert len([line for line in results if " try 1 " not in line]) <= 3


def wrappers(run):
    """The null_consumer.py of each worker: a child of it, as the guard is not."""
    workers = {worker.pid for worker in run.workers()}
    found = []
    for process in run.example.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() in workers:
                found.append(process)
    return found


@pytest.mark.long
def test_consumers_that_leave_the_jobs_where_they_are_cost_one_worker_until_mended(files, tmp_path):
    files.put(6, 0.1)
    mended = tmp_path / "mended"
    consumer = f"[ ! -e {mended} ] || exec examples/files/consumer"
    options = ("--max", "3", "--settle", "3", "--every", "1", "--once")
    with files.command(tmp_path, *options, NULL_CONSUMER=consumer) as run:
        run.until(lambda: "stuck: 3 reservations have ended and no job has moved" in run.said())
        before = len(reservations(run))
        time.sleep(10)
        assert before + 1 <= len(reservations(run)) <= before + 4  # after 1, 2, 4, 8 s
        assert run.said().count("stuck: ") == 1
        mended.touch()
        assert run.status() == 0
    assert len(files.results()) == 6


def test_with_local_all_ends_with_the_command(files, tmp_path):
    files.put(9, 60)
    with files.command(tmp_path, "--max", "3") as run:
        run.until(lambda: len(run.consumers()) == 3)
        run.process.send_signal(signal.SIGTERM)
        assert run.status(30) == 128 + signal.SIGTERM
        run.example.until(lambda: files.processes() == [])
    assert files.backlog() == (9, 0, 0)


def test_with_local_all_ends_with_the_command_even_when_it_is_killed(files, tmp_path):
    files.put(9, 60)
    with files.command(tmp_path, "--max", "3", NULL_GRACE="1") as run:
        run.until(lambda: len(run.consumers()) == 3)
        run.process.kill()
        run.process.wait()
        run.example.until(lambda: files.processes() == [], timeout=40)
    assert files.backlog() == (9, 0, 0)
