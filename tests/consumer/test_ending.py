"""null_consumer.py ends COMMAND: when its reservation is gone, and on a signal."""

import asyncio
import contextlib
import signal
import sys
import time

import pytest

from tests.kit.consumer import IGNORES, consumer, driver, held
from tests.kit.http import Callbacks, Refused, server
from tests.kit.waiting import catches, eventually
from tests.kit.worker import create, fresh, is_free, lease, release

pytestmark = pytest.mark.anyio

# Finishes its job when it is asked to, as RQ and Celery do, and says which process was asked.
FINISHING = """
import os, signal, subprocess, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: (asked.append(1), print("asked", flush=True)))
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("child asked", flush=True))
time.sleep(4)
time.sleep(1)
print("child done", flush=True)
'''])
print("began", flush=True)
child.wait()
while not asked:
    time.sleep(0.05)
print("job done", flush=True)
"""


@pytest.fixture
def finishing(tmp_path):
    script = tmp_path / "finishing.py"
    script.write_text(FINISHING)
    return f"python3 {script}"


async def test_a_reservation_that_is_gone_ends_all_of_command(vast, worker, tmp_path):
    # COMMAND, and a child of it in a session of its own, both ignoring SIGTERM.
    line = f"setsid sh -c '{IGNORES}' & echo began $NULL_SESSION_ID; {IGNORES}"
    async with consumer(worker, tmp_path, "--grace", "3", command=line) as running:
        first = await create(vast, worker)
        await running.until_printed(f"began {first}")
        await eventually(lambda: len(running.family()) >= 2)
        before = {process.pid for process in running.family()}
        await release(worker, first)
        gone_at = time.monotonic()
        second = await create(vast, worker, lifetime=2)
        while before & {process.pid for process in running.family()}:
            assert not running.printed(f"began {second}")
            assert (await lease(worker))["time_to_live"] > 0  # kept meanwhile
            assert time.monotonic() - gone_at < 3 + 4
            await asyncio.sleep(0.02)
        await running.until_printed(f"began {second}")
        assert time.monotonic() - gone_at > 3
        assert not running.said("failed")


async def test_a_worker_that_hangs_until_its_lease_has_run_out_ends_command(vast, tmp_path):
    worker = await fresh(vast)
    async with consumer(worker, tmp_path, command="echo began; exec sleep 60") as running:
        await create(vast, worker, lifetime=3)
        await running.until_printed("began")
        worker.process.send_signal(signal.SIGSTOP)
        try:
            stopped_at = time.monotonic()
            await running.until_said("unreachable until it had expired")
            assert time.monotonic() - stopped_at > 1.5
            await eventually(lambda: not running.family())
        finally:
            worker.process.send_signal(signal.SIGCONT)
        while running.printed("began") < 2:  # the next one, or the old one where it is there still
            with contextlib.suppress(Refused):
                await create(vast, worker)
        worker.process.kill()
        await worker.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_asks_command_alone_and_its_job_is_finished(
    vast, worker, tmp_path, finishing, number
):
    async with consumer(worker, tmp_path, command=f"exec {finishing}") as running:
        session_id = await create(vast, worker, lifetime=2)
        await running.until_printed("began")
        running.signal(number)
        await running.until_printed("asked")
        while not running.printed("job done"):
            assert await held(worker, session_id)
            await asyncio.sleep(0.05)
        assert await running.status() == 128 + number
        assert running.printed("child done") and not running.printed("child asked")
        assert running.said(f"released session={session_id}")
        assert await is_free(worker)


async def test_in_a_pipeline_the_consumer_is_asked_and_not_who_reads_it(
    vast, worker, tmp_path, finishing
):
    line = f"{finishing} | tee log; echo after"  # dash waits for it, and dies of SIGTERM
    async with consumer(worker, tmp_path, command=line) as running:
        session_id = await create(vast, worker, lifetime=2)
        await running.until_printed("began")
        running.signal()
        while not running.printed("job done"):
            assert await held(worker, session_id)
            await asyncio.sleep(0.05)
        assert await running.status() == 143
        assert running.said(f"released session={session_id}")
        written = (tmp_path / "log").read_text().splitlines()
        assert written == ["began", "asked", "child done", "job done"]


async def test_a_second_signal_ends_it_at_once_and_an_echo_does_not(vast, worker, tmp_path):
    line = f"setsid sh -c '{IGNORES}' & echo began; {IGNORES}"
    async with consumer(worker, tmp_path, command=line) as running:
        session_id = await create(vast, worker)
        await running.until_printed("began")
        running.signal()
        await asyncio.sleep(0.2)
        running.signal()
        await asyncio.sleep(1.2)
        assert running.family()
        assert await held(worker, session_id)
        running.signal(signal.SIGINT)
        assert await running.status(10) == 143
        assert running.said("no time is left: the consumer is killed now")
        assert running.said(f"released session={session_id}")
        assert not running.alive()


async def test_after_the_grace_it_is_killed_and_released(vast, worker, tmp_path):
    line = f"setsid sh -c '{IGNORES}' & echo began; {IGNORES}"
    async with consumer(worker, tmp_path, "--grace", "1.5", command=line) as running:
        session_id = await create(vast, worker, lifetime=2)
        await running.until_printed("began")
        asked_at = time.monotonic()
        running.signal()
        assert await running.status(15) == 143
        assert time.monotonic() - asked_at > 1.5
        assert running.said(f"released session={session_id}")
        assert not running.alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_while_it_waits_for_a_reservation(vast, worker, tmp_path, number):
    async with consumer(worker, tmp_path, command="echo began") as running:
        await catches(running.process, signal.SIGTERM)  # of SIGINT Python has a handler of its own
        running.signal(number)
        assert await running.status(5) == 128 + number
        session_id = await create(vast, worker)
        assert await held(worker, session_id)
        assert not running.printed("began")


async def test_signals_that_its_parent_has_blocked_are_its_own(vast, worker, tmp_path):
    changed = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    changed += "signal.pthread_sigmask(signal.SIG_BLOCK, [1, 2, 15]); "
    changed += "os.execv(sys.executable, sys.argv[1:])"
    under = (sys.executable, "-c", changed)
    line = "trap 'echo asked; exit 3' TERM; echo began; while :; do sleep 0.1; done"
    async with consumer(worker, tmp_path, command=line, under=under) as running:
        await create(vast, worker)
        await running.until_printed("began")
        running.signal()
        assert await running.status() == 143
        assert running.printed("asked") == 1 and not running.said("killed")


async def test_a_signal_in_a_pause_releases_what_was_kept(vast, worker, tmp_path):
    line = "echo $NULL_SESSION_ID; exit 1"
    script = driver(tmp_path, "null_consumer.Failures.pause = 60.0")
    async with consumer(worker, tmp_path, command=line, script=script) as running:
        await create(vast, worker)
        await running.until_said("released")
        second = await create(vast, worker, lifetime=2)
        await asyncio.sleep(3)
        assert await held(worker, second)
        running.signal()
        assert await running.status(10) == 143
        assert running.said(f"released session={second}")
        assert not running.printed(second)


async def test_a_second_signal_waits_for_no_release(vast, worker, tmp_path):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        async with consumer(worker, tmp_path, command="echo began; exec sleep 60") as running:
            await create(vast, worker, on_close_route=f"{origin}/closed")
            await running.until_printed("began")
            running.signal()
            await eventually(lambda: callbacks.bodies)
            await asyncio.sleep(1)
            running.signal()
            assert await running.status(5) == 143
            assert running.said("was not told /release")
        callbacks.let_go.set()


async def test_many_generations_are_ended_and_none_is_missed(vast, worker, tmp_path):
    # Each leaves two behind in sessions of their own, then ends: eight generations at once.
    script = tmp_path / "breed.sh"
    script.write_text(
        'trap "" TERM; n=$1; [ $n -gt 0 ] && { setsid sh "$0" $((n - 1)) & setsid sh "$0" '
        "$((n - 2)) & }; exec sleep 60\n"
    )
    async with consumer(worker, tmp_path, "--grace", "0.5", command=f"sh {script} 7") as running:
        session_id = await create(vast, worker)
        await eventually(lambda: len(running.family()) >= 50)
        await release(worker, session_id)
        await eventually(lambda: not running.family(), 8)
        await eventually(lambda: not running.guards())
