"""null_consumer.reservations(): for consumers in Python that keep what they have loaded."""

import asyncio
import contextlib
import signal
import sys
import time

import pytest

from tests.kit.consumer import held
from tests.kit.environment import BARE, HERE
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh, is_free, lease, release

pytestmark = pytest.mark.anyio


class Program:
    """A consumer's own program, which runs on no wrapper."""

    def __init__(self, process, log):
        self.process = process
        self.output = log.read_text

    async def until_printed(self, text):
        await eventually(lambda: text in self.output(), epitaph=self._epitaph)

    def _epitaph(self):
        if self.process.returncode is None:
            return None
        return f"it ended with status {self.process.returncode}: {self.output()}"

    async def status(self):
        return await asyncio.wait_for(self.process.wait(), 30)


@contextlib.asynccontextmanager
async def program(worker, folder, body, **environment):
    script = folder / "program.py"
    head = "import os, time\nfrom pathlib import Path\nfrom null_consumer import reservations\n"
    script.write_text(head + body)
    log = folder / "program.log"
    variables = {**BARE, "NULL_CONTROL_PORT": str(worker.control_port), "PYTHONPATH": str(HERE)}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", script),
            cwd=folder,
            env={**variables, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        yield Program(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_the_job_in_hand_is_finished_after_sigterm(vast, worker, tmp_path):
    body = """
for lease in reservations():
    with lease:
        while lease:
            print("began", lease.session_id)
            time.sleep(3)
            print("job done")
print("done")
"""
    async with program(worker, tmp_path, body) as running:
        session_id = await create(vast, worker, lifetime=2)
        await running.until_printed(f"began {session_id}")
        running.process.send_signal(signal.SIGTERM)
        while "job done" not in running.output():
            assert await held(worker, session_id)
            await asyncio.sleep(0.05)
        assert await running.status() == 0
        assert running.output() == f"began {session_id}\njob done\ndone\n"
        assert await is_free(worker)


async def test_sigterm_ends_the_wait_for_the_next_one(vast, worker, tmp_path):
    body = "print('began')\nfor lease in reservations():\n    print('taken')\nprint('done')\n"
    async with program(worker, tmp_path, body) as running:
        await running.until_printed("began")
        await asyncio.sleep(1)
        running.process.send_signal(signal.SIGTERM)
        assert await running.status() == 0
        assert running.output() == "began\ndone\n"


async def test_a_lease_turns_false_when_it_is_gone_and_the_next_one_is_taken(
    vast, worker, tmp_path
):
    body = """
for lease in reservations():
    with lease:
        print("taken", lease.session_id)
        while lease:
            time.sleep(0.01)
        print("gone", lease.session_id)
    assert not lease
"""
    async with program(worker, tmp_path, body) as running:
        for _ in range(2):
            session_id = await create(vast, worker)
            await running.until_printed(f"taken {session_id}")
            await asyncio.sleep(1.5)
            assert f"gone {session_id}" not in running.output()
            await release(worker, session_id)
            await running.until_printed(f"gone {session_id}")


async def test_it_is_released_at_the_end_of_the_block_whatever_ends_that(vast, worker, tmp_path):
    body = """
import signal
for number, lease in enumerate(reservations()):
    try:
        with lease:
            print("taken", lease.session_id)
            if number == 0:
                raise ValueError
            if number == 1:
                continue
    except ValueError:
        continue
    if number == 2:
        break
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
for lease in reservations():
    print("without a block", lease.session_id)
"""
    async with program(worker, tmp_path, body) as running:
        for text in ("taken", "taken", "taken", "without a block"):
            session_id = await create(vast, worker)
            await running.until_printed(f"{text} {session_id}")
            await eventually(lambda: is_free(worker))


async def test_a_heartbeat_is_called_every_so_often_and_one_that_raises_is_logged(
    vast, worker, tmp_path
):
    body = """
calls = []
def extend():
    calls.append(time.monotonic())
    if len(calls) == 2:
        raise RuntimeError("no such message")
for lease in reservations():
    with lease:
        with lease.heartbeat(extend, every=0.5):
            time.sleep(2.4)
        assert len(calls) in (3, 4), calls
        assert min(after - before for before, after in zip(calls, calls[1:])) > 0.4
        time.sleep(1)
        assert len(calls) in (3, 4), calls
        print("as wanted")
"""
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker)
        await running.until_printed("as wanted")
        line = "null_consumer: heartbeat failed: RuntimeError: no such message\n"
        assert running.output().count(line) == 1


async def test_a_job_that_hangs_ends_the_process_with_75(vast, worker, tmp_path):
    body = """
for lease in reservations(limit=2):
    with lease:
        for _ in range(4):
            assert lease
            time.sleep(1)
        print("began")
        with lease.heartbeat(lambda: print("beat"), every=0.5):
            time.sleep(60)
"""
    async with program(worker, tmp_path, body) as running:
        session_id = await create(vast, worker, lifetime=2)
        await running.until_printed("began")
        began_at = time.monotonic()
        assert await running.status() == 75
        assert time.monotonic() - began_at < 10
        assert "beat" in running.output()
        assert "nobody has looked at the lease for 2 s: the job hangs" in running.output()
        assert await held(worker, session_id)  # it lasts for as long as a supervisor may need


async def test_it_is_renewed_in_a_thread_and_without_a_proxy(vast, worker, tmp_path):
    body = """
for lease in reservations():
    with lease:
        time.sleep(5)
        print("slept", bool(lease))
"""
    async with program(worker, tmp_path, body, http_proxy="http://127.0.0.1:9") as running:
        session_id = await create(vast, worker, lifetime=2)
        while "slept True" not in running.output():
            got = await lease(worker)
            assert got["session_id"] == session_id and got["time_to_live"] <= 2.01
            await asyncio.sleep(0.05)
        await eventually(lambda: is_free(worker))


async def test_a_worker_that_is_gone_is_waited_for(vast, tmp_path):
    worker = await fresh(vast)
    body = """
for lease in reservations():
    with lease:
        print("taken")
        while lease:
            time.sleep(0.05)
        print("gone")
print("done")
"""
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker, lifetime=2)
        await running.until_printed("taken")
        worker.process.kill()
        await running.until_printed("gone")
        await asyncio.sleep(2)
        assert running.process.returncode is None
        running.process.send_signal(signal.SIGTERM)
        assert await running.status() == 0
        assert running.output() == "taken\ngone\ndone\n"
    await worker.process.wait()
