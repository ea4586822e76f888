"""null_consumer.py --empty: consumers that never end by themselves, and those that end early."""

import asyncio
import time

import pytest

from tests.kit.consumer import IGNORES, consumer, driver, held
from tests.kit.waiting import eventually
from tests.kit.worker import create, release

pytestmark = pytest.mark.anyio


@pytest.fixture
def quick(tmp_path):
    """Little time between two looks at what waits, and a second for each."""
    return driver(tmp_path, "null_consumer.EMPTY_EVERY, null_consumer.EMPTY_WAIT = 0.2, 1.0")


def looks(folder):
    """How many times COMMAND has been run that adds a line to this file."""
    path = folder / "looks"
    return len(path.read_text()) if path.exists() else 0


async def looked(folder, times):
    before = looks(folder)
    await eventually(lambda: looks(folder) >= before + times)


async def test_one_that_never_ends_is_asked_when_nothing_waits_and_gets_all_its_time(
    vast, worker, tmp_path, quick
):
    (tmp_path / "waiting").write_text("2")
    # It has a job in hand when it is asked, and that takes longer than the grace.
    asked = "echo asked; sleep 4; echo job done; exit 0"
    line = f"trap '{asked}' TERM; echo began; while :; do sleep 0.1; done"
    options = ("--grace", "1", "--empty", "cat waiting; echo >> looks")
    async with consumer(worker, tmp_path, *options, command=line, script=quick) as running:
        session_id = await create(vast, worker, lifetime=3)
        await running.until_printed("began")
        await looked(tmp_path, 3)
        assert not running.printed("asked")
        before = looks(tmp_path)
        (tmp_path / "waiting").write_text("0\n1\n")  # nothing waits, one is in hand
        await running.until_printed("asked")
        assert looks(tmp_path) >= before + 2
        await running.until_said(f"released session={session_id}")
        assert running.printed("job done")
        assert not running.said("failed")


async def test_a_look_that_fails_is_no_zero_and_told_once(vast, worker, tmp_path, quick):
    line = "echo began; exec sleep 60"
    (tmp_path / "empty.sh").write_text("echo no such queue >&2; exit 1")
    options = ("--empty", "echo >> looks; . ./empty.sh")

    async with consumer(worker, tmp_path, *options, command=line, script=quick) as running:
        session_id = await create(vast, worker)
        await looked(tmp_path, 4)
        for script in ("echo many", "echo", "echo -3", "echo 1 2 3 4", "sleep 60", "exec yes"):
            (tmp_path / "empty.sh").write_text(script)
            await looked(tmp_path, 3)
        (line,) = running.said("NULL_EMPTY")
        assert line.endswith("status 1: no such queue")
        assert await held(worker, session_id)
        (tmp_path / "empty.sh").write_text("echo 1")
        await looked(tmp_path, 3)
        (tmp_path / "empty.sh").write_text("echo many")
        await eventually(lambda: len(running.said("NULL_EMPTY")) == 2)
        assert running.said("NULL_EMPTY")[1].endswith("prints 'many\\n', and not one number or two")
        (tmp_path / "empty.sh").write_text("echo 0")
        await running.until_said(f"released session={session_id}")


async def test_one_that_ends_early_is_run_again_while_jobs_wait(vast, worker, tmp_path):
    (tmp_path / "waiting").write_text("3")
    line = "date +%s.%N >> starts; echo $(($(cat waiting) - 1)) > waiting"
    async with consumer(worker, tmp_path, "--empty", "cat waiting", command=line) as running:
        session_id = await create(vast, worker, lifetime=3)
        await running.until_said(f"released session={session_id}")
        assert len(running.said("reserved")) == 1
        starts = [float(start) for start in (tmp_path / "starts").read_text().split()]
        assert len(starts) == 3
        assert starts[1] - starts[0] > 0.8
        assert starts[2] - starts[1] > 0.8


async def test_runs_that_get_on_with_nothing_are_a_failure(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, "--empty", "echo 5", command="echo began") as running:
        session_id = await create(vast, worker, lifetime=3)
        await running.until_said(f"released session={session_id}")
        assert running.printed("began") == 4  # once, and three times again
        (line,) = running.said("failed")
        assert line == "the consumer failed: 3 runs, and no fewer jobs wait; a pause of 1 s"


@pytest.mark.parametrize("answer", ["0", "many"])
async def test_one_that_ends_when_nothing_waits_or_nobody_knows_is_released(
    vast, worker, tmp_path, answer
):
    options = ("--empty", f"echo {answer}")
    async with consumer(worker, tmp_path, *options, command="echo began") as running:
        session_id = await create(vast, worker)
        await running.until_said(f"released session={session_id}")
        assert running.printed("began") == 1
        assert not running.said("failed")


async def test_a_hanging_look_holds_up_neither_renewals_nor_the_end(vast, worker, tmp_path, quick):
    line = f"echo $NULL_SESSION_ID; {IGNORES}"
    look = f"setsid sh -c '{IGNORES}' & {IGNORES}"
    options = ("--empty", look, "--grace", "1")
    script = driver(tmp_path, "null_consumer.EMPTY_EVERY = 1.0")
    async with consumer(worker, tmp_path, *options, command=line, script=script) as running:
        first = await create(vast, worker, lifetime=2)
        await running.until_printed(first)
        await eventually(lambda: len(running.guards()) == 2)
        start = time.monotonic()
        while time.monotonic() < start + 4:
            assert await held(worker, first)
            await asyncio.sleep(0.1)
        before = {process.pid for process in running.family()}
        await release(worker, first)
        await eventually(lambda: not before & {one.pid for one in running.family()}, 5)
        second = await create(vast, worker, lifetime=2)
        await running.until_printed(second)
        await eventually(lambda: len(running.guards()) == 2)
        running.process.kill()
        await eventually(lambda: not running.alive(), 5)


async def test_the_variable_does_what_the_flag_does(vast, worker, tmp_path):
    environment = {"NULL_EMPTY": "cat waiting", "NULL_GRACE": "2"}
    (tmp_path / "waiting").write_text("2")
    line = "echo $(($(cat waiting) - 1)) > waiting; echo began"
    async with consumer(worker, tmp_path, command=line, **environment) as running:
        session_id = await create(vast, worker)
        await running.until_said(f"released session={session_id}")
        assert running.printed("began") == 2
