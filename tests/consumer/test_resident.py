"""null_consumer.py --resident: COMMAND takes the reservations itself, and stays."""

import asyncio
import time

import pytest

from tests.kit.consumer import IGNORES, consumer, driver, held
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh, is_free, lease, release

pytestmark = pytest.mark.anyio

RESIDENT = """
import os
import time
from pathlib import Path

from null_consumer import reservations

assert "NULL_SESSION_ID" not in os.environ
print("loaded", flush=True)
for lease in reservations():
    with lease:
        print("began", lease.session_id, flush=True)
        while lease and not Path("empty").exists():
            time.sleep(0.05)
        print("ended", lease.session_id, flush=True)
print("done", flush=True)
"""


@pytest.fixture
def resident(tmp_path):
    script = tmp_path / "resident.py"
    script.write_text(RESIDENT)
    return ["python3", str(script)]


async def test_it_stays_through_five_reservations_and_loads_once(vast, worker, tmp_path, resident):
    async with consumer(worker, tmp_path, "--resident", command=resident) as running:
        await running.until_printed("loaded")  # before anybody has reserved
        for number in range(5):
            session_id = await create(vast, worker, lifetime=2)
            await running.until_printed(f"began {session_id}")
            if number == 0:  # renewed by itself
                start = time.monotonic()
                while time.monotonic() < start + 5:
                    assert await held(worker, session_id)
                    assert (await lease(worker))["time_to_live"] <= 2.01
                    await asyncio.sleep(0.05)
            if number % 2:  # the dispatcher ends it
                await release(worker, session_id)
            else:  # it has nothing more to do
                (tmp_path / "empty").touch()
            await running.until_printed(f"ended {session_id}")
            await eventually(lambda: is_free(worker))
            (tmp_path / "empty").unlink(missing_ok=True)
        session_id = await create(vast, worker)
        await running.until_printed(f"began {session_id}")
        running.signal()
        assert await running.status() == 143
        assert running.printed("loaded") == running.printed("done") == 1
        assert await is_free(worker)
        assert not running.said("failed")


async def test_the_end_of_a_lease_asks_nothing_of_it_and_nothing_is_renewed(vast, worker, tmp_path):
    line = "trap 'echo asked; exit 0' TERM; echo loaded; while :; do sleep 0.1; done"
    environment = {"NULL_RESIDENT": "true"}
    async with consumer(worker, tmp_path, command=line, **environment) as running:
        await running.until_printed("loaded")
        await create(vast, worker, lifetime=1)
        await eventually(lambda: is_free(worker))  # it has expired
        await asyncio.sleep(2)
        assert not running.printed("asked")
        session_id = await create(vast, worker)
        running.signal()
        assert await running.status() == 143
        assert running.printed("asked")
        assert running.said(f"released session={session_id}")  # what is open when it has ended


async def test_on_a_signal_it_has_the_grace(vast, worker, tmp_path):
    options = ("--resident", "--grace", "1")
    async with consumer(worker, tmp_path, *options, command=f"echo began; {IGNORES}") as running:
        await running.until_printed("began")
        running.signal()
        assert await running.status(10) == 143
        assert not running.alive()


@pytest.mark.parametrize("status", [0, 3])
async def test_one_that_ends_by_itself_has_failed(vast, worker, tmp_path, status):
    line = f"echo began; while ! test -e end; do sleep 0.05; done; rm end; exit {status}"
    async with consumer(worker, tmp_path, "--resident", command=line) as running:
        for pause in ("1", "2"):
            session_id = await create(vast, worker)
            await running.until_printed("began", int(pause))
            (tmp_path / "end").touch()
            await running.until_said(f"released session={session_id}")
            assert running.said()[-2].endswith(f"a pause of {pause} s")
        second = await create(vast, worker, lifetime=1.5)
        began = running.printed("began")
        await running.until_printed("began", began + 1)
        assert await held(worker, second)  # kept in the pause; then it is COMMAND's to renew


async def test_a_long_run_forgets_the_failures_and_short_ones_break_the_worker(vast, tmp_path):
    worker = await fresh(vast)
    line = "sleep $(cat seconds)"
    (tmp_path / "seconds").write_text("0.1")
    script = driver(tmp_path, "null_consumer.LONG_RUN = 2.0")
    options = ("--resident", "--broken-after", "6")
    async with consumer(worker, tmp_path, *options, command=line, script=script) as running:
        await eventually(lambda: len(running.said("failed")) == 2)
        (tmp_path / "seconds").write_text("2.2")
        await eventually(lambda: len(running.said("failed")) == 3)
        (tmp_path / "seconds").write_text("0.1")
        await running.until_said("the consumer failed 4 times")
        pauses = [
            line.rpartition("a pause of ")[2] for line in running.said("the consumer failed: ")
        ]
        assert pauses == ["1 s", "2 s", "1 s", "2 s", "4 s", "8 s"]
        await eventually(lambda: "the consumer failed" in worker.report["error_msg"])
    await eventually(lambda: worker.number not in vast.workers)
