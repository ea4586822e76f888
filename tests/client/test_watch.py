"""The COMMAND of --watch: it stays, and each line that it prints counts when it comes."""

import asyncio
import contextlib
import itertools
import os
import time

import psutil
import pytest

import null_backlog
import null_count
from null_backlog import Jobs, NotCounted
from null_count import restart_pause, watch_backlog
from tests.kit.following import following
from tests.kit.waiting import eventually
from tests.kit.worker import release

pytestmark = pytest.mark.anyio

ENDED = "it has ended, and --watch wants a command that stays"
NOT_NUMBERS = "not one to three whole numbers"
MANY = "i=0; while i=$((i+1)); do echo $((i % 2)) 0; sleep 0.001; done"


def with_mark(mark):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark and process.pid != os.getpid():
                found.append(process)
    return found


async def first_of(line, number):
    """What it gives first; a trouble as its text."""
    watch = watch_backlog(line)
    found = []
    try:
        async for answer in watch:
            found.append(str(answer) if isinstance(answer, NotCounted) else answer)
            if len(found) == number:
                return found
    finally:
        await watch.aclose()


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("echo 3; sleep 60", [Jobs(3)]),
        ("echo 3 4 5; sleep 0.3; echo 2 5 5; sleep 60", [Jobs(3, 4, 5), Jobs(2, 5, 5)]),
        ("printf '1\\n2\\n3\\n'; sleep 60", [Jobs(3)]),  # the last one counts
        ("printf '1 '; sleep 0.3; printf '2\\n'; sleep 60", [Jobs(1, 2)]),  # half a line
        ("echo 7; exit 3", [Jobs(7), "exit status 3"]),
        ("echo 7; echo no server >&2; exit 1", [Jobs(7), "exit status 1: no server"]),
        ("printf 7; exit 0", [ENDED]),  # half a line is none
        ("echo 7; kill -9 $$", [Jobs(7), "killed by signal 9"]),
        ("echo 7; exec >&-; sleep 60", [Jobs(7), "it has closed its standard output"]),
        ("echo 7; sleep 60 & exit 3", [Jobs(7), "exit status 3"]),  # one that it has left behind
        ("exec 2>&-; echo 7; sleep 60", [Jobs(7)]),
        ("printf 'many\\n7\\n-1\\n'; sleep 60", [f"it printed '-1', {NOT_NUMBERS}"]),
        ("echo; sleep 60", ["it printed nothing"]),
        ("no-such-program", ["exit status 127: sh: 1: no-such-program: not found"]),
    ],
)
async def test_each_line_is_a_count_and_what_is_none_is_said(line, given):
    assert await asyncio.wait_for(first_of(line, len(given)), 20) == given


async def test_one_that_prints_without_end_of_line_is_said_and_costs_no_memory():
    for answer in await asyncio.wait_for(first_of("tr '\\0' x </dev/zero", 3), 20):
        assert answer.startswith("it printed 'xxx") and len(answer) < 200


async def test_nothing_of_it_is_left(monkeypatch):
    mark = f"watched-{time.time()}"
    monkeypatch.setenv("MARK", mark)
    watch = watch_backlog("sleep 600 & echo 3; sleep 600")
    assert await anext(watch) == Jobs(3)
    assert len(with_mark(mark)) >= 2
    await watch.aclose()
    await eventually(lambda: not with_mark(mark))


async def test_one_that_ends_is_started_again():
    given = [Jobs(7), "exit status 1"]
    assert await asyncio.wait_for(first_of("echo 7; exit 1", 4), 20) == given * 2


@pytest.mark.parametrize("line", ["exit 3", "echo 7"])
@pytest.mark.parametrize(("stays", "starts"), [(60.0, [0, 1, 2]), (0.0, [0, 0, 0])])
async def test_the_pauses_get_longer_while_it_does_not_stay(line, stays, starts, monkeypatch):
    in_vain = []
    monkeypatch.setattr(null_count, "restart_pause", lambda number: in_vain.append(number) or 0.0)
    monkeypatch.setattr(null_count, "LONGEST_PAUSE", stays)
    await asyncio.wait_for(first_of(line, 4 if line == "exit 3" else 7), 20)
    assert in_vain == starts


async def test_one_that_has_closed_its_standard_error_is_not_asked_again_and_again(monkeypatch):
    waits = []
    wait = null_count._readable

    async def noted(pipes, seconds):
        waits.append(seconds)
        await wait(pipes, seconds)

    monkeypatch.setattr(null_count, "_readable", noted)
    watch = watch_backlog("exec 2>&-; echo 7; sleep 60")
    assert await anext(watch) == Jobs(7)
    next_one = asyncio.create_task(anext(watch))
    await asyncio.wait({next_one}, timeout=1.5)
    next_one.cancel()
    await asyncio.wait({next_one})
    assert len(waits) < 10


def test_the_pauses_double_up_to_a_minute():
    pauses = [restart_pause(in_vain) for in_vain in (0, 1, 2, 3, 4, 5, 6, 7, 10**9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_change_is_looked_at_at_once(vast):
    turn = asyncio.Event()

    async def watched():
        yield 0, 0
        await turn.wait()
        yield 1, 0
        await asyncio.Event().wait()

    async with following(vast, every=60, backlog=watched()) as this:
        await eventually(lambda: this.progress.jobs == Jobs(0, 0))
        turn.set()
        await eventually(lambda: this.numbers == (1, 0), timeout=20)  # 60 by --every


@contextlib.asynccontextmanager
async def one_that_has_ended(vast, then):
    """A watch that tells of one job, a reservation for it that has ended, and what is told then."""
    turn = asyncio.Event()

    async def watched():
        yield 1, 0
        await turn.wait()
        yield then
        await asyncio.Event().wait()

    async with following(vast, every=60, backlog=watched()) as this:
        await eventually(lambda: this.numbers == (1, 0))
        await asyncio.sleep(1.2)  # the last look is so long ago that the next may come at once
        for worker in vast.workers.values():
            await release(worker)
        await eventually(lambda: this.progress.own == 0)
        yield this, turn


async def test_a_watch_gets_a_second_to_tell_what_a_consumer_did_before_its_end(vast):
    async with one_that_has_ended(vast, then=(0, 0)) as (this, turn):
        await asyncio.sleep(0.3)
        turn.set()
        await eventually(lambda: this.progress.jobs == Jobs(0, 0))
        assert (this.numbers, this.opened) == ((0, 0), 1)


async def test_a_watch_that_tells_nothing_after_an_end_is_believed_that_the_job_waits(vast):
    async with one_that_has_ended(vast, then=None) as (this, _):
        await eventually(lambda: this.opened == 2, timeout=20)  # 60 by --every


async def test_a_thousand_changes_a_second_are_ten_looks(vast):
    async with following(vast, every=60, backlog=watch_backlog(MANY)) as this:
        await eventually(lambda: this.progress.jobs)
        before, start = this.told, time.monotonic()
        await asyncio.sleep(3)
        looks = this.told - before
    assert 3 <= looks <= 10 * (time.monotonic() - start) + 2


async def test_one_that_is_silent_or_ends_opens_nothing_and_is_told(vast, monkeypatch):
    monkeypatch.setattr(null_backlog, "BACKLOG_TIMEOUT", 1.0)

    async def silent():
        yield 0, 0
        await asyncio.Event().wait()

    async with following(vast, backlog=silent()) as this:
        await eventually(lambda: this.said == ["backlog: no count for 1 s"])

    async def ends():
        yield 0, 0

    async with following(vast, backlog=ends()) as this:
        await eventually(lambda: this.said == ["backlog: the watch has ended"])

    async def raises():
        yield 0, 0
        raise KeyError("jobs")

    async with following(vast, backlog=raises()) as this:
        await eventually(lambda: this.said == ["backlog: 'jobs'"])


async def test_an_answer_that_is_no_number_is_told_until_the_next_one(vast):
    answers = itertools.cycle([[(1, 0)], [NotCounted("no server")]])
    turn = asyncio.Event()

    async def watched():
        for answer in answers:
            yield answer[0]
            await turn.wait()
            turn.clear()

    async with following(vast, backlog=watched()) as this:
        await eventually(lambda: this.numbers == (1, 0))
        turn.set()
        await eventually(lambda: this.said == ["backlog: no server"])
        turn.set()
        await eventually(lambda: this.said == ["backlog: no server", "backlog: over"])
