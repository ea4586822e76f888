"""ended(): how, and how soon, the holder learns that the worker let go."""

import asyncio
import contextlib
import signal
import sys
import time

import pytest

from null_reservation import reserve
from null_worker import LOOK
from tests.kit.autoscaler import statuses
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.stub import stubbed
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, exit_status, fresh, release

pytestmark = pytest.mark.anyio


async def test_the_holder_learns_that_the_worker_let_go(vast):
    async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
        assert not await reservation.ended(timeout=0)
        await release(worker_at(vast, reservation.url))
        assert await asyncio.wait_for(reservation.ended(), 10) is True
    await eventually(lambda: statuses(vast) == ["Success"])


async def test_ended_is_true_for_everyone_before_beside_and_after_a_close():
    async with stubbed() as (_, endpoint):
        async with reserve(endpoint) as reservation:
            waiters = [asyncio.create_task(reservation.ended()) for _ in range(5)]
            waiters.append(asyncio.create_task(asyncio.wait_for(reservation.ended(), 10)))
            await asyncio.sleep(0.05)
            waiters[0].cancel()  # one that gives up takes nobody with it
            closing = [asyncio.create_task(reservation.close()) for _ in range(2)]
            assert await asyncio.gather(reservation.ended(), *waiters[1:], reservation.close()) == [
                True
            ] * 6 + [None]
            await asyncio.gather(*closing)
            assert await reservation.ended() is await reservation.ended(timeout=0) is True
            await reservation.close()
        assert await reservation.ended() is True
        await reservation.close()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
async def test_ended_in_a_task_group_beside_a_close():
    async with stubbed() as (stub, endpoint), reserve(endpoint) as reservation:
        async with asyncio.TaskGroup() as group:
            waiters = [group.create_task(reservation.ended()) for _ in range(3)]
            group.create_task(reservation.close())
        assert [waiter.result() for waiter in waiters] == [True] * 3
    assert stub.left() == []


async def test_the_holder_learns_of_a_release_at_once(vast):
    async def until_told(reservation):
        start = time.monotonic()
        await release(worker_at(vast, reservation.url))
        assert await reservation.ended() is True
        return time.monotonic() - start

    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(reserve(endpoint)) for _ in range(WORKERS)]
        await asyncio.sleep(2.5)  # past the first look, which may be a short one
        _, median, _ = sorted([await until_told(reservation) for reservation in held])
        assert median < 0.5  # one may meet a busy moment; a poll every 2 s would take 1 on average


async def test_a_release_is_told_at_once_ten_times_in_a_row():
    late = []
    async with stubbed() as (stub, endpoint):
        for _ in range(10):
            async with reserve(endpoint) as reservation:
                ended = asyncio.create_task(reservation.ended())
                looks = len(stub.times(LOOK))
                await eventually(lambda looks=looks: len(stub.times(LOOK)) > looks)
                start = time.monotonic()
                stub.sessions[reservation.session_id].over.set()
                assert await ended is True
                late.append(time.monotonic() - start)
    assert sorted(late)[5] < 0.5


async def test_a_worker_that_is_asked_to_stop_has_ended_and_is_not_lost(vast):
    worker = await fresh(vast)
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        reservations = [
            await stack.enter_async_context(reserve(endpoint)) for _ in range(len(vast.workers))
        ]
        (reservation,) = [each for each in reservations if each.url == worker.url]
        ended = asyncio.create_task(reservation.ended())
        await asyncio.sleep(0.5)
        worker.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(ended, 8) is True
        assert await exit_status(worker) == 0


async def test_a_worker_that_does_not_know_how_to_wait_is_looked_at_every_two_seconds():
    async with stubbed() as (stub, endpoint):
        stub.waits = False
        async with reserve(endpoint) as reservation:
            assert not await reservation.ended(timeout=5)
            assert 2 <= len(stub.times(LOOK)) <= 6
            stub.sessions[reservation.session_id].over.set()
            assert await reservation.ended(timeout=4)
