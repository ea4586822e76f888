"""The pace of polls, however many wait."""

import asyncio
import itertools
import time
from collections import Counter

import pytest

from null_reservation import failure_pause, reserve
from tests.kit.stub import ROUTE, first, stubbed
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio


async def test_polls_keep_their_pace_however_many_wait():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        start = time.monotonic()
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(300)]
        await asyncio.sleep(10.5)  # 6 for the first poll of each
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        polls = [when - start for when in stub.times(ROUTE)]
        late = Counter(
            q["request_idx"]
            for when, route, q in stub.asked
            if route == ROUTE and when > start + 6.5
        )
    for second in range(7):
        assert sum(second <= when < second + 4 for when in polls) <= 4 * 60
    assert sum(6.5 <= when < 10.5 for when in polls) >= 4 * 10
    assert sum(3 <= times <= 6 for times in late.values()) == 16  # those in front, every second


async def test_those_in_front_poll_every_second_also_while_a_crowd_arrives():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(300)]
        await asyncio.sleep(5)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        polls = Counter(
            query["request_idx"] for query in stub.messages(ROUTE) if query["request_idx"]
        )
        assert sum(times >= 3 for times in polls.values()) >= 16, polls
        assert len(stub.times(ROUTE)) <= 5 * 60


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


async def test_those_behind_move_up_soon_when_those_in_front_leave():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(200)]
        await eventually(
            lambda: sum(query["request_idx"] == 0 for query in stub.messages(ROUTE)) == 200
        )
        for task in waiting[:16]:
            task.cancel()
        await asyncio.wait(waiting[:16])
        await asyncio.sleep(8)  # the others poll every 6 s
        stub.asked.clear()
        await asyncio.sleep(4)
        polls = Counter(query["request_idx"] for query in stub.messages(ROUTE))
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
    assert sum(times >= 3 for times in polls.values()) == 16, polls


async def test_after_a_429_of_the_router_polls_back_off_and_not_in_lockstep():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(15)]
        await eventually(lambda: len(stub.times(ROUTE)) == 15)
        stub.fate = lambda route, _: (429, b"") if route == ROUTE else None
        await asyncio.sleep(5.4)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
    polls = [
        [when for when, route, q in stub.asked if route == ROUTE and q["request_idx"] == n]
        for n in range(1, 16)
    ]
    gaps = [[after - before for before, after in itertools.pairwise(times)] for times in polls]
    # After 1 s and 2 s; the first poll had no index yet.
    assert {len(times) for times in gaps} == {2}, gaps
    assert min(gap[1] for gap in gaps) > 1.5
    assert max(gap[0] for gap in gaps) - min(gap[0] for gap in gaps) > 0.12
