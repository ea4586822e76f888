"""The pace of polls, however many wait."""

import asyncio
import contextlib
import itertools
import math
import time
from collections import Counter

import pytest

import null_reservation
from null_reservation import failure_pause, reserve
from tests.kit.stub import ROUTE, first, stubbed
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio


FRONT = 16  # so many poll every second, all others together 30 times a second


@contextlib.asynccontextmanager
async def crowd(endpoint, count):
    """So many who wait for a worker."""
    waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(count)]
    try:
        yield waiting
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


def polls_of_each(stub, since=0.0):
    """How often each request was polled for; the first poll of each has no index yet."""
    return Counter(
        query["request_idx"]
        for when, route, query in stub.asked
        if route == ROUTE and when > since and query["request_idx"]
    )


async def until_the_front_has_polled(stub, times, since=0.0):
    """Wait for so many polls of each of those in front; how often each request was polled then.

    Whatever else the machine does: the others wait for the same event loop.
    """

    def has_polled():
        return sum(polls >= times for polls in polls_of_each(stub, since).values()) >= FRONT

    await eventually(has_polled)
    return polls_of_each(stub, since)


async def test_polls_keep_their_pace_however_many_wait():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        start = time.monotonic()
        async with crowd(endpoint, 300):
            # 10 s for the first poll of each
            await eventually(lambda: len(stub.times(ROUTE)) - polls_of_each(stub).total() == 300)
            late = await until_the_front_has_polled(stub, 4, since=time.monotonic())
        polls = [when - start for when in stub.times(ROUTE)]
    for second in range(math.ceil(max(polls)) - 3):
        assert sum(second <= when < second + 4 for when in polls) <= 4 * 60
    assert sum(times >= 4 for times in late.values()) == FRONT, late
    assert len(late) >= FRONT + 40  # of the others some did, too


async def test_those_in_front_poll_every_second_also_while_a_crowd_arrives():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        async with crowd(endpoint, 900):  # it takes 30 s to arrive
            polls = await until_the_front_has_polled(stub, 3)
            assert sum(times >= 3 for times in polls.values()) == FRONT, polls
            assert len(stub.times(ROUTE)) - polls.total() < 900  # the crowd still arrives


@pytest.mark.parametrize("wait", [1, 60])
async def test_those_who_have_left_take_no_time_of_those_who_come_after(wait):
    async with stubbed() as (stub, endpoint):
        stub.free = False
        left = [asyncio.create_task(reserve(endpoint, wait=wait).__aenter__()) for _ in range(400)]
        await asyncio.sleep(1)
        if wait == 60:
            for task in left:
                task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        stub.free, start = True, time.monotonic()
        async with reserve(endpoint):
            assert time.monotonic() - start < 5  # 12 were each of them waited for


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 5), (5, 5), (10**6, 5)]
)
def test_polls_back_off_while_they_fail(failures, seconds):
    assert failure_pause(failures) == seconds


async def test_a_request_keeps_its_place_by_what_it_says_to_the_router():
    """By its index, also when an answer lacks it, and by a replay time beyond its interval."""
    async with stubbed() as (stub, endpoint):
        stub.free = False
        forgetful = first(None, route=ROUTE, then=(200, {"status": "wait"}))
        stub.fate = forgetful
        waiting = asyncio.create_task(reserve(endpoint).__aenter__())
        await eventually(lambda: len(stub.times(ROUTE)) == 2)
        stub.fate = first((502, b""), (429, b""), route=ROUTE, then=(200, {"request_idx": None}))
        await eventually(lambda: len(stub.times(ROUTE)) == 5)
        waiting.cancel()
        await asyncio.wait({waiting})
        queries = stub.messages(ROUTE)
    # Whole numbers, as the SDK's.
    assert repr([query["request_idx"] for query in queries]) == "[0, 1, 1, 1, 1]"
    assert all(query["replay_timeout"] >= 60 for query in queries)


async def test_whose_polls_are_rare_asks_for_its_place_to_be_kept_for_three_of_them(monkeypatch):
    monkeypatch.setattr(null_reservation, "FRONT", 0)
    monkeypatch.setattr(null_reservation, "POLL_RATE", 0.01)
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = asyncio.create_task(reserve(endpoint).__aenter__())
        await eventually(lambda: stub.messages(ROUTE))
        waiting.cancel()
        await asyncio.wait({waiting})
        assert stub.messages(ROUTE)[0]["replay_timeout"] == 300


async def test_a_wait_that_is_over_before_the_next_poll_ends_then(monkeypatch):
    monkeypatch.setattr(null_reservation, "FRONT", 0)
    monkeypatch.setattr(null_reservation, "POLL_RATE", 0.01)  # a poll in 100 s
    async with stubbed() as (stub, endpoint):
        stub.free = False
        with pytest.raises(null_reservation.NotReserved):
            await asyncio.wait_for(reserve(endpoint, wait=0.5).__aenter__(), 20)
        assert len(stub.times(ROUTE)) == 1


async def test_those_behind_move_up_soon_when_those_in_front_leave():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        async with crowd(endpoint, 200) as waiting:
            await eventually(lambda: len(stub.times(ROUTE)) - polls_of_each(stub).total() == 200)
            for task in waiting[:FRONT]:
                task.cancel()
            await asyncio.wait(waiting[:FRONT])
            # The others poll every 6 s, and so know within that time that they have moved up.
            left = time.monotonic()
            await eventually(
                lambda: polls_of_each(stub, since=left).keys() >= {*range(FRONT + 1, 200)}
            )
            polls = await until_the_front_has_polled(stub, 3, since=time.monotonic())
    assert sum(times >= 3 for times in polls.values()) == FRONT, polls


async def test_after_a_429_of_the_router_polls_back_off_and_not_in_lockstep():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        async with crowd(endpoint, 15):
            await eventually(lambda: len(stub.times(ROUTE)) == 15)
            stub.fate = lambda route, _: (429, b"") if route == ROUTE else None
            await eventually(
                lambda: len(polls_of_each(stub)) == 15 and min(polls_of_each(stub).values()) >= 3
            )
    polls = [
        [when for when, route, q in stub.asked if route == ROUTE and q["request_idx"] == n]
        for n in range(1, 16)
    ]
    gaps = [[after - before for before, after in itertools.pairwise(times)] for times in polls]
    # 1 s and 2 s; the first poll had no index yet.
    assert min(gap[1] for gap in gaps) > 1.5
    assert max(gap[0] for gap in gaps) - min(gap[0] for gap in gaps) > 0.12
