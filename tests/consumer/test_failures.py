"""null_consumer.py when COMMAND fails: pauses, and a worker that is reported as broken."""

import asyncio
import contextlib
import time

import psutil
import pytest

from tests.kit.consumer import consumer, driver, held
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh

pytestmark = pytest.mark.anyio


async def serve(vast, worker, running, times):
    """So many reservations, one after the other."""
    for _ in range(times):
        session_id = await create(vast, worker)
        await running.until_said(f"released session={session_id}")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["sh", "-c", "exit 3"], "status 3"),
        (["sh", "-c", "kill -9 $$"], "ended by SIGKILL"),
        (["/nowhere/to/be found"], "can't be started: [Errno 2] No such file or directory"),
        (["/etc/passwd"], "can't be started: [Errno 13] Permission denied"),
    ],
)
async def test_a_failure_is_told_released_and_paused_after(vast, worker, tmp_path, command, why):
    async with consumer(worker, tmp_path, command=command) as running:
        await serve(vast, worker, running, 2)
        first, second = running.said("the consumer failed: ")
        assert first.startswith(f"the consumer failed: {why}") and first.endswith("a pause of 1 s")
        assert second.endswith("a pause of 2 s")


async def test_a_reservation_that_comes_in_the_pause_is_kept_and_served(vast, worker, tmp_path):
    line = "echo $NULL_SESSION_ID; test -e mended"
    script = driver(tmp_path, "null_consumer.Failures.pause = 4.0")
    async with consumer(worker, tmp_path, command=line, script=script) as running:
        await serve(vast, worker, running, 1)
        (tmp_path / "mended").touch()
        second = await create(vast, worker, lifetime=1.5)
        begun_at = time.monotonic()
        await asyncio.sleep(2.5)
        assert await held(worker, second)
        assert not running.printed(second)
        await running.until_said(f"released session={second}")
        assert running.printed(second) and time.monotonic() - begun_at > 3


async def test_a_success_forgets_the_failures(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, command="test -e mended") as running:
        await serve(vast, worker, running, 2)
        (tmp_path / "mended").touch()
        await serve(vast, worker, running, 1)
        (tmp_path / "mended").unlink()
        await serve(vast, worker, running, 1)
        pauses = [line.rpartition("; ")[2] for line in running.said("the consumer failed: ")]
        assert pauses == ["a pause of 1 s", "a pause of 2 s", "a pause of 1 s"]


async def test_what_was_our_doing_is_no_failure(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, command="trap 'exit 9' TERM; sleep 60 & wait") as running:
        session_id = await create(vast, worker)
        await eventually(lambda: len(running.family()) == 2)
        running.signal()
        assert await running.status() == 143
        assert running.said(f"released session={session_id}")
        assert not running.said("failed")


async def test_nothing_but_failures_for_so_long_is_a_broken_worker(vast, tmp_path):
    worker = await fresh(vast)
    options = ("--broken-after", "4")
    async with consumer(worker, tmp_path, *options, command="exit 3") as running:
        await serve(vast, worker, running, 2)
        assert worker.report["error_msg"] == ""
        await asyncio.sleep(4)
        await serve(vast, worker, running, 1)
        (reason,) = running.said("reporting the worker as broken")
        assert "the consumer failed 3 times in" in reason and reason.endswith("status 3")
        lines = running.said()
        assert lines.index(reason) < len(lines) - 1  # before it was released
        assert lines[-1].startswith("released")
        await eventually(lambda: "the consumer failed 3 times" in worker.report["error_msg"])
        assert await create(vast, worker, expected=503)
    await eventually(lambda: worker.number not in vast.workers)


async def test_it_goes_on_when_for_a_moment_nothing_can_be_opened(vast, worker, tmp_path):
    line = "until test -e enough; do sleep 0.1; done"
    async with consumer(worker, tmp_path, command=line) as running:
        session_id = await create(vast, worker)
        await eventually(running.family)
        with nothing_can_be_opened(running):
            await asyncio.sleep(2.5)
        assert await held(worker, session_id)
        (tmp_path / "enough").touch()
        await running.until_said(f"released session={session_id}")
        assert not running.said("failed")


async def test_that_nothing_can_be_opened_is_a_failure_like_any_other(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, command="true") as running:
        await serve(vast, worker, running, 1)
        await asyncio.sleep(0.5)  # it waits for the next one
        with nothing_can_be_opened(running):
            session_id = await create(vast, worker)
            await running.until_said("the consumer failed: can't be started: [Errno 24]")
        await running.until_said(f"released session={session_id}")
        await serve(vast, worker, running, 1)


async def test_a_look_at_the_jobs_that_cannot_be_started_changes_nothing(vast, worker, tmp_path):
    script = driver(
        tmp_path,
        "import errno, os",
        "fork, calls, wrapper = os.fork, [], os.getpid()",
        "def fork_once():",
        "    calls.append(1)",
        "    if len(calls) == 3 and os.getpid() == wrapper:  # a trial, COMMAND, the look",
        "        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))",
        "    return fork()",
        "os.fork = fork_once",
    )
    options = ("--empty", "echo 0")
    async with consumer(worker, tmp_path, *options, command="true", script=script) as running:
        await serve(vast, worker, running, 1)
        (line,) = running.said("NULL_EMPTY changes nothing now")
        assert "can't be started: [Errno 11]" in line
        await serve(vast, worker, running, 1)


async def test_nor_does_one_for_which_nothing_can_be_opened(vast, worker, tmp_path):
    line = "until test -e enough; do sleep 0.1; done"
    async with consumer(worker, tmp_path, "--empty", "echo 0", command=line) as running:
        session_id = await create(vast, worker)
        await eventually(running.family)
        with nothing_can_be_opened(running):
            (tmp_path / "enough").touch()
            await running.until_said("NULL_EMPTY changes nothing now: can't be started")
        await running.until_said(f"released session={session_id}")


@contextlib.contextmanager
def nothing_can_be_opened(running):
    """For the wrapper, as when the machine's table of files is full."""
    wrapper = psutil.Process(running.process.pid)
    before = wrapper.rlimit(psutil.RLIMIT_NOFILE)
    wrapper.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        wrapper.rlimit(psutil.RLIMIT_NOFILE, before)


async def test_0_seconds_of_failures_are_no_broken_worker(vast, worker, tmp_path):
    script = driver(tmp_path, "null_consumer.Failures.pause = 0.0")
    options = ("--broken-after", "0")
    async with consumer(worker, tmp_path, *options, command="exit 3", script=script) as running:
        await serve(vast, worker, running, 5)
        assert not running.said("broken")
