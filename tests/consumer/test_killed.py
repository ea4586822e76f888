"""null_consumer.py is killed, or its guard or its worker is, or COMMAND can't be."""

import asyncio
import contextlib
import os
import shutil
import signal
import time

import psutil
import pytest

from tests.kit.consumer import IGNORES, consumer, driver, held
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh, release

pytestmark = pytest.mark.anyio

# COMMAND, a child of it, and one that is nobody's child and has a session of its own.
DOUBLE_FORKED = f"(setsid sh -c '{IGNORES}' &) ; sleep 60 & echo began; {IGNORES}"


async def test_killed_it_leaves_nothing_running_and_a_successor_waits_for_that(
    vast, worker, tmp_path
):
    async with (
        consumer(worker, tmp_path, "--grace", "4", command=DOUBLE_FORKED) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        session_id = await create(vast, worker, lifetime=2)
        await running.until_printed("began")
        await eventually(lambda: len(running.family()) >= 4)
        running.process.kill()
        killed_at = time.monotonic()
        line = "echo second; exec sleep 60"
        successor = await stack.enter_async_context(consumer(worker, tmp_path, command=line))
        while running.alive():
            assert not successor.printed("second")
            assert await held(worker, session_id)  # the successor renews it
            assert time.monotonic() - killed_at < 4 + 4
            await asyncio.sleep(0.05)
        assert time.monotonic() - killed_at > 3
        assert len(successor.said("another one serves the worker")) == 1
        await successor.until_printed("second")
        assert await held(worker, session_id)


async def test_killed_at_any_moment_it_leaves_nothing_running(vast, worker, tmp_path):
    await create(vast, worker)
    for milliseconds in range(0, 400, 40):
        line = f"setsid sh -c '{IGNORES}' & {IGNORES}"
        async with consumer(worker, tmp_path, "--grace", "0.3", command=line) as running:
            await running.until_said("reserved")
            await asyncio.sleep(milliseconds / 1000)
            running.process.kill()
            await eventually(lambda one=running: not one.alive(), 10)


async def test_a_successor_of_one_that_waits_leaves_the_reservation_to_it(vast, worker, tmp_path):
    async with (
        consumer(worker, tmp_path, command="echo first; sleep 3") as running,
        consumer(worker, tmp_path, command="echo second") as other,
    ):
        await eventually(lambda: running.said() or other.said())
        session_id = await create(vast, worker)
        await eventually(lambda: running.said("released") or other.said("released"))
        other.signal()
        assert await other.status(5) == 143
        assert running.printed("first") + other.printed("second") == 1
        assert not await held(worker, session_id)


async def test_its_guard_is_killed_and_command_is_ended_all_the_same(vast, worker, tmp_path):
    line = f"(setsid sh -c '{IGNORES}' &) ; echo began; {IGNORES}"
    async with consumer(worker, tmp_path, "--grace", "1", command=line) as running:
        first = await create(vast, worker, lifetime=2)
        await running.until_printed("began")
        await eventually(lambda: len(running.family()) >= 2)
        before = running.family()
        (guard,) = running.guards()
        guard.kill()
        await eventually(lambda: not any(process.is_running() for process in before), 10)
        await running.until_said("the consumer failed: its guard was killed")
        await running.until_said(f"released session={first}")
        await create(vast, worker)
        await running.until_printed("began", 2)


async def test_its_worker_is_gone_and_it_goes_too(vast, tmp_path):
    worker = await fresh(vast)
    reading, writing = os.pipe()  # whose write end only the worker holds
    line = f"setsid sh -c '{IGNORES}' & echo began; {IGNORES}"
    options = ("--grace", "1", "--worker-pipe", str(reading))
    async with consumer(worker, tmp_path, *options, command=line, pass_fds=[reading]) as running:
        await create(vast, worker, lifetime=60)
        await running.until_printed("began")
        for process in running.family():
            assert f"/{reading}" not in str(open_files(process))
        worker.process.kill()
        os.close(writing)
        assert await running.status(8) == 0
        assert running.said("the worker has ended")
        assert not running.alive()
    os.close(reading)
    await worker.process.wait()


def open_files(process):
    with contextlib.suppress(OSError):
        return [f"/{number}" for number in os.listdir(f"/proc/{process.pid}/fd")]
    return []


async def test_killed_together_with_its_worker_it_leaves_nothing_running(vast, tmp_path):
    worker = await fresh(vast)
    async with consumer(worker, tmp_path, "--grace", "1", command=DOUBLE_FORKED) as running:
        await create(vast, worker)
        await running.until_printed("began")
        worker.process.kill()
        running.process.kill()
        await eventually(lambda: not running.alive(), 8)
        await worker.process.wait()


may_give_up_the_right_to_kill = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv"
)


@may_give_up_the_right_to_kill
async def test_what_cannot_be_killed_is_reported_as_broken_then_released(vast, tmp_path):
    # It waits for a driver, say. Here it is another user's, and root without the right to kill.
    worker = await fresh(vast)
    without = ("setpriv", "--bounding-set", "-kill", "--inh-caps", "-kill")
    line = "echo began; exec setpriv --reuid 65534 --clear-groups sleep 60"
    script = driver(tmp_path, "import null_guard; null_guard.KILL_WAIT = 1")
    options = {"command": line, "script": script, "under": without}
    async with consumer(worker, tmp_path, "--grace", "0.5", **options) as running:
        session_id = await create(vast, worker)
        await running.until_printed("began")
        await eventually(lambda: any(p.name() == "sleep" for p in running.family()))
        running.signal()
        assert await running.status(15) == 143
        (said,) = running.said("reporting the worker as broken: survives SIGKILL")
        assert "(sleep)" in said
        assert running.said(f"released session={session_id}")
        (left,) = running.family()
        assert left.name() == "sleep"
        await eventually(lambda: "survives SIGKILL" in worker.report["error_msg"])
        with contextlib.suppress(psutil.NoSuchProcess):
            left.send_signal(signal.SIGKILL)
    await eventually(lambda: worker.number not in vast.workers)


async def test_zombies_and_orphans_of_a_command_that_is_done_hold_nothing_up(
    vast, worker, tmp_path
):
    # Its child ends and is never waited for, then it ends: all is over.
    script = "import os, time; os.fork() or os._exit(0); time.sleep(1); print('ended')"
    async with consumer(worker, tmp_path, command=["python3", "-c", script]) as running:
        session_id = await create(vast, worker)
        await running.until_said(f"released session={session_id}")
        assert not running.said("goes on")
        assert not await held(worker, session_id)
        assert (await release(worker))[1]["released"] is False
