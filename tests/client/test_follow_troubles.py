"""follow() and what goes wrong on Vast: no job waits, nothing is held in silence, each is told."""

import asyncio
import itertools

import pytest

import null_backlog
import null_rule
from null_backlog import Stuck
from tests.kit.following import following
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, is_free, release

pytestmark = pytest.mark.anyio


async def let_go(vast):
    """As consumers do that find no job."""
    while True:
        for worker in list(vast.workers.values()):
            if not await is_free(worker):
                await release(worker)
        await asyncio.sleep(0.05)


@pytest.fixture
async def consumers_that_let_go(vast):
    letting_go = asyncio.create_task(let_go(vast))
    yield
    letting_go.cancel()
    await asyncio.wait({letting_go})


async def begins_and_is_over(this, name):
    """The trouble is told once, shown while it lasts, and told again when it is over."""
    await eventually(lambda: f"{name}: over" in this.said)
    assert name not in this.progress.troubles
    assert sum(line.startswith(f"{name}: ") for line in this.said) == 2


async def test_jobs_that_come_as_fast_as_they_are_pulled_get_their_workers(vast):
    async with following(vast, jobs=(1, 0)) as this:
        await eventually(lambda: this.numbers == (1, 0))
        this.jobs = (1, 1)  # one was pulled, and one has come
        await eventually(lambda: this.numbers == (2, 0))


async def test_a_queue_that_grows_keeps_its_workers(vast, consumers_that_let_go):
    counts = itertools.count(9, 30)  # more at each look: that hides the jobs that are done
    async with following(vast, jobs=lambda: next(counts)) as this:
        await eventually(lambda: this.opened > 30)
        assert this.said == []


async def test_with_a_third_number_growth_hides_nothing(vast, consumers_that_let_go):
    async with following(vast, jobs=(9, 0, 4)) as this:
        for more in range(1, 100):
            if "stuck" in this.progress.troubles:
                break
            this.jobs = (9 + 3 * more, 0, 4)
            await this.looks_twice()
        assert this.said[0].startswith("stuck: ")
        this.jobs = (500, 0, 5)
        await begins_and_is_over(this, "stuck")


async def test_a_load_that_nobody_holds_counts_no_more_after_a_while(vast, monkeypatch):
    monkeypatch.setattr(null_rule, "GHOST_AFTER", 3.0)
    monkeypatch.setattr(null_rule, "LIST_LAG", 1.0)
    ghost = vast.ghost()
    async with following(vast, most=1, jobs=(1, 0)) as this:
        await eventually(lambda: this.progress.others == 1)
        assert this.progress.asked == 0
        await eventually(lambda: this.numbers == (1, 0))
        assert this.said[0].startswith("ghost: 1 on Vast's list")
        this.jobs = (0, 1)
        ghost.end()
        await begins_and_is_over(this, "ghost")


async def test_a_worker_that_nobody_reaches_is_told_by_its_url_and_taken_for_nobodys(
    vast, monkeypatch
):
    monkeypatch.setattr(null_rule, "LIST_LAG", 1.0)
    vast.stop_worker(next(iter(vast.workers.values())), "by the test")
    await eventually(lambda: len(vast.workers) == WORKERS - 1)
    closed = vast.closed_worker()
    async with following(vast, jobs=(WORKERS, 0)) as this:
        await eventually(lambda: "unreachable" in this.progress.troubles)
        await eventually(lambda: this.numbers == (WORKERS - 1, 1))
        for _ in range(10):  # its load is on the list
            await this.looks_twice()
        (line,) = this.said
        assert line.startswith(f"unreachable: {closed.url} (tried 1 times)")
        assert (this.progress.others, this.numbers) == (0, (WORKERS - 1, 1))
        vast.remove(closed)
        await eventually(lambda: this.numbers == (WORKERS, 0))


async def test_jobs_in_hand_of_nobody_are_told_and_get_one_worker(vast, monkeypatch):
    monkeypatch.setattr(null_rule, "STRANDED_AFTER", 1.0)
    async with following(vast, jobs=(0, 2)) as this:
        await eventually(lambda: this.numbers == (1, 0))
        assert this.said[0].startswith("stranded: 2 in hand")
        await this.looks_twice()
        assert this.numbers == (1, 0)
        this.jobs = (1, 1)  # it has brought them back
        await begins_and_is_over(this, "stranded")


async def test_workers_that_are_reserved_while_there_is_no_job_are_told(vast, monkeypatch):
    monkeypatch.setattr(null_backlog, "IDLE_AFTER", 1.0)
    async with following(vast, jobs=(1, 0)) as this:
        await eventually(lambda: this.numbers == (1, 0))
        this.jobs = (0, 0)
        await eventually(lambda: "idle" in this.progress.troubles)
        assert this.numbers == (1, 0)
        for worker in list(vast.workers.values()):
            await release(worker)
        await begins_and_is_over(this, "idle")


async def test_a_worker_that_does_not_come_is_told_with_what_says_why(vast, monkeypatch):
    monkeypatch.setattr(null_backlog, "WAITING_AFTER", 1.0)
    async with following(vast, most=WORKERS + 1, jobs=(9, 0)) as this:
        await eventually(lambda: "waiting" in this.progress.troubles)
        assert "--diagnose" in this.progress.troubles["waiting"]
        assert this.progress.asked == 1
        for worker in list(vast.workers.values()):
            await release(worker)
        await begins_and_is_over(this, "waiting")


@pytest.mark.parametrize("status", ["PENDING", "UPDATE_REBOOTING", "UPDATE_STARTING", "somewhat"])
async def test_a_load_on_a_worker_in_such_a_state_is_nobodys(vast, status):
    worker = next(iter(vast.workers.values()))
    lie = vast.pretend(worker, status=status, cur_load=100)
    try:
        async with following(vast, most=1, jobs=(1, 0)) as this:
            await eventually(lambda: this.numbers == (1, 0))
            assert this.progress.others == 0
    finally:
        lie.end()


async def test_a_list_that_lags_opens_nothing_twice(vast, monkeypatch):
    vast.list_lag = 3.0
    try:
        async with following(vast, jobs=(2, 0)) as this:
            await eventually(lambda: this.numbers == (2, 0))
            this.jobs = (0, 2)
            for _ in range(8):
                await this.looks_twice()
            assert (this.opened, this.progress.others) == (2, 0)
    finally:
        vast.list_lag = 0.0


@pytest.mark.parametrize(
    ("bound", "jobs", "line"),
    [
        ("NEVER_COUNTED_AFTER", KeyError("jobs"), "backlog: 'jobs'"),
        ("GIVE_UP_AFTER", (0, 1), "stranded: 1 in hand"),
    ],
)
async def test_once_it_gives_up_with_what_has_gone_wrong(
    vast, monkeypatch, consumers_that_let_go, bound, jobs, line
):
    monkeypatch.setattr(null_backlog, bound, 1.0)
    monkeypatch.setattr(null_rule, "STRANDED_AFTER", 0.5)
    async with following(vast, jobs=jobs, once=True) as this:
        with pytest.raises(Stuck, match=f"given up: {line}"):
            await asyncio.wait_for(this.task, 30)
