"""follow() at work, in this process: what it asks for, keeps, takes back, and says."""

import asyncio
import gc

import pytest

import null_backlog
import null_rule
from null_backlog import Stuck, follow
from tests.kit.following import following
from tests.kit.reservation import endpoint_of
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, create, is_free, lease, release

pytestmark = pytest.mark.anyio


async def sessions(vast):
    """Of all workers that are reserved."""
    leases = [await lease(worker) for worker in vast.workers.values()]
    return [each["session_id"] for each in leases if each["session_id"]]


async def test_what_is_reserved_is_kept_and_what_waits_is_taken_back_after_settle(vast):
    async with following(vast, WORKERS + 1, (9, 0), settle=1) as this:
        await eventually(lambda: this.numbers == (WORKERS, 1))
        assert this.progress.wanted == WORKERS + 1
        before = await sessions(vast)

        this.jobs = (0, 0)
        await eventually(lambda: this.numbers == (WORKERS, 0))
        await this.looks_twice()
        polls = vast.polls
        await asyncio.sleep(1.5)
        assert vast.polls == polls
        assert await sessions(vast) == before
        assert this.said == []


async def test_cancelled_it_leaves_what_is_reserved_and_takes_back_what_waits(vast):
    async with following(vast, WORKERS + 1, (9, 0)) as this:
        await eventually(lambda: this.numbers == (WORKERS, 1))
        before = await sessions(vast)
    assert this.task.cancelled()
    assert await sessions(vast) == before
    polls = vast.polls
    await asyncio.sleep(1.5)
    assert vast.polls == polls


async def test_cancelled_in_the_moment_in_which_the_backlog_fails_it_leaves_no_exception(vast):
    loop = asyncio.get_running_loop()
    unhandled = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context["message"]))
    failure = loop.create_future()

    async def backlog():
        return await failure

    async with endpoint_of(vast) as endpoint:
        following = asyncio.create_task(follow(endpoint, backlog, 1))
        await asyncio.sleep(0.1)
        failure.set_exception(KeyError("jobs"))
        await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following})
    assert following.cancelled()
    del following  # its traceback holds what has failed
    gc.collect()
    assert unhandled == []


async def test_one_that_has_ended_is_followed_by_the_next_within_a_second_or_so(vast):
    async with following(vast, most=1, jobs=(9, 0), every=60) as this:
        for place in range(3):
            this.jobs = (9 - place, 0)
            await eventually(lambda place=place: this.opened == place + 1, timeout=20)
            for worker in vast.workers.values():
                await release(worker)


BAD_ANSWERS = [
    "many",
    None,
    "",
    -3,
    (1, 2, 3, 4),
    (),
    1.5,
    True,
    (1, "2"),
    "hangs",
    KeyError("jobs"),
]


async def test_a_backlog_that_is_not_known_opens_nothing_takes_nothing_back_and_is_told_once(
    vast, monkeypatch
):
    monkeypatch.setattr(null_backlog, "BACKLOG_TIMEOUT", 0.2)
    async with following(vast, WORKERS + 2, (4, 0), settle=0.1) as this:
        await eventually(lambda: this.numbers == (WORKERS, 1))
        for answer in BAD_ANSWERS:
            this.said.clear()
            this.jobs = answer
            await eventually(lambda: this.said)
            await this.looks_twice()
            assert this.numbers == (WORKERS, 1), answer
            (line,) = this.said
            assert line.startswith("backlog: ") and "\n" not in line
            assert this.progress.troubles == {"backlog": line}
            this.jobs = (1, 3)
            await eventually(lambda: not this.progress.troubles)
            await eventually(lambda: this.progress.wanted == 4)


async def test_when_the_jobs_stay_where_they_are_it_holds_one_at_a_time_and_says_so(vast):
    async def let_go():
        """As a consumer does that finds no job."""
        while True:
            for worker in list(vast.workers.values()):
                if not await is_free(worker):
                    await release(worker)
            await asyncio.sleep(0.05)

    async with following(vast, jobs=(9, 0)) as this:
        letting_go = asyncio.create_task(let_go())
        try:
            await eventually(lambda: this.said)
            before = this.opened
            await asyncio.sleep(5)
            assert this.opened - before <= 4  # after 1, 2, 4 s; at once the next would be 20
        finally:
            letting_go.cancel()
        (line,) = this.said
        assert line.startswith("stuck: 3 reservations have ended and no job has moved")
        assert this.progress.troubles == {"stuck": line}

        this.jobs = (7, 1)
        await eventually(lambda: this.numbers == (WORKERS, 0))
        assert (this.progress.troubles, this.said) == ({}, [line, "stuck: over"])


async def test_refused_it_asks_again_later_and_says_so_once(vast):
    vast.failing_polls.extend([404] * WORKERS + [404])
    async with following(vast, jobs=(9, 0)) as this:
        await eventually(lambda: this.said)
        await asyncio.sleep(0.8)
        assert len(vast.failing_polls) == 1  # the next try comes after a second, of one alone
        await eventually(lambda: this.numbers == (WORKERS, 0))
        line, over = this.said
        assert over == "refused: over"
        assert line.startswith("refused: the autoscaler refuses: HTTP 404")
        await eventually(lambda: not this.progress.troubles)


async def test_others_reservations_count_and_none_is_opened_while_the_list_may_lag(
    vast, monkeypatch
):
    monkeypatch.setattr(null_rule, "LIST_LAG", 3.0)
    predecessors = next(iter(vast.workers.values()))
    session_id = await create(vast, predecessors)
    await eventually(lambda: predecessors.report["cur_load"])
    async with following(vast, jobs=(9, 0)) as this:
        began = asyncio.get_running_loop().time()
        await eventually(lambda: this.progress.asked or this.progress.own)
        assert asyncio.get_running_loop().time() - began >= 2.9
        await eventually(lambda: this.numbers == (WORKERS - 1, 0))
        await this.looks_twice()
        assert this.progress.others == 1

        await release(predecessors, session_id)
        await eventually(lambda: this.numbers == (WORKERS, 0))
        assert this.progress.others == 0


async def test_a_list_that_fails_or_is_empty_is_replaced_by_the_last_one_for_a_while(
    vast, monkeypatch
):
    monkeypatch.setattr(null_rule, "LIST_KEPT", 1.0)
    monkeypatch.setattr(null_rule, "LIST_LAG", 0.5)

    async def fails():
        raise RuntimeError("HTTP 500")

    async def is_empty():
        return []

    async with following(vast, jobs=(1, 0)) as this:
        works = this.endpoint.get_workers
        await eventually(lambda: this.numbers == (1, 0))
        for listing, text in ((fails, "HTTP 500"), (is_empty, "it is empty")):
            this.said.clear()
            this.endpoint.get_workers = listing
            await this.looks_twice()
            assert this.said == []
            await eventually(lambda: this.said)
            assert this.said[0].startswith(f"vast: no list of workers: {text}")
            this.jobs = (2, 1)
            await this.looks_twice()
            assert (this.numbers, len(this.said)) == ((1, 0), 1)
            this.jobs = (0, 1)
            this.endpoint.get_workers = works
            await eventually(lambda: not this.progress.troubles)


async def test_once_it_returns_when_nothing_was_left_for_settle_seconds(vast):
    async with following(vast, jobs=(1, 0), once=True, settle=1) as this:
        await eventually(lambda: this.numbers == (1, 0))
        this.jobs = (0, 0)
        await asyncio.sleep(2)
        assert not this.task.done()  # one is reserved
        for worker in vast.workers.values():
            await release(worker)
        await asyncio.wait_for(this.task, 20)


async def test_once_it_gives_up_when_it_is_refused_for_long(vast, monkeypatch):
    monkeypatch.setattr(null_backlog, "GIVE_UP_AFTER", 1.0)
    vast.failing_polls.extend([404] * 99)
    async with following(vast, jobs=(1, 0), once=True) as this:
        with pytest.raises(Stuck, match="given up: refused: the autoscaler"):
            await asyncio.wait_for(this.task, 20)


async def test_no_task_of_a_look_is_left(vast):
    """A dispatcher looks each 5 s for months."""
    async with following(vast, every=0.05) as this:
        await this.looks_twice()
        before = len(asyncio.all_tasks())
        for _ in range(5):
            await this.looks_twice()
        assert len(asyncio.all_tasks()) < before + 8
