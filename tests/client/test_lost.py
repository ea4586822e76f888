"""A worker that can't be reached: when it is given up, and when it isn't."""

import signal
import time

import pytest
from aiohttp import web

import null_reservation
from null_local import hold_port
from null_reservation import WorkerLost, reserve
from null_worker import LOOK
from tests.kit.reservation import endpoint_of, expiration, worker_at
from tests.kit.stub import stubbed, truth
from tests.kit.waiting import eventually
from tests.kit.worker import killed

pytestmark = pytest.mark.anyio


async def test_a_worker_that_freezes_for_less_than_its_time_to_live_is_not_given_up(vast):
    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=6) as reservation:
        worker = worker_at(vast, reservation.url)
        worker.process.send_signal(signal.SIGSTOP)
        try:
            await eventually(lambda: reservation.unreachable)
            assert not await reservation.ended(timeout=1)
        finally:
            worker.process.send_signal(signal.SIGCONT)
        await eventually(lambda: not reservation.unreachable)
        assert not await reservation.ended(timeout=4)
        assert await expiration(reservation) - time.time() < 1.5 * 6


@pytest.mark.parametrize(
    ("lifetime", "bound"),
    [
        (3, 15),
        (600, 40),
    ],  # by its time to live; by five refused looks, two seconds apart, long before that is over
)
async def test_a_worker_that_is_killed_is_lost(vast, lifetime, bound):
    async with endpoint_of(vast) as endpoint:
        start = time.monotonic()
        with pytest.raises(WorkerLost, match="can't be reached"):
            async with reserve(endpoint, lifetime=lifetime) as reservation:
                worker = worker_at(vast, reservation.url)
                await killed(worker)
                with hold_port(worker.port):
                    await reservation.ended()
        assert time.monotonic() - start < bound


async def test_another_server_at_the_workers_address_is_not_taken_for_it(vast):
    async with endpoint_of(vast) as endpoint:
        with pytest.raises(WorkerLost, match="HTTP 404"):
            async with reserve(endpoint, lifetime=3) as reservation:
                worker = worker_at(vast, reservation.url)
                await killed(worker)
                runner = web.AppRunner(web.Application(), shutdown_timeout=0.1)
                await runner.setup()
                try:
                    await web.TCPSite(runner, "127.0.0.1", worker.port, reuse_address=True).start()
                    await reservation.ended()
                finally:
                    await runner.cleanup()


async def test_looks_that_are_refused_now_and_then_are_no_end(monkeypatch):
    monkeypatch.setattr(null_reservation, "LOOK_PAUSE", 0.2)
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=60) as reservation:
        stub.waits = False
        for _ in range(3):  # two to four looks each; five in a row would be the end
            await eventually(lambda: stub.times(LOOK))
            stub.drop_connections()
            await stub.absent(0.7)
            assert reservation.unreachable
            await eventually(lambda: not reservation.unreachable, timeout=5)


async def test_a_worker_that_is_back_is_seen_at_once():
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=60) as reservation:
        await eventually(lambda: stub.times(LOOK))
        stub.fate = lambda route, _: (502, b"") if route == LOOK else None
        stub.drop_connections()
        await eventually(lambda: reservation.unreachable)
        stub.fate = truth
        await eventually(lambda: not reservation.unreachable, timeout=6)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_dispatcher_that_stood_still_does_not_take_its_worker_for_lost(handed_over):
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=1) as reservation:
        (session,) = stub.sessions.values()
        if handed_over:
            reservation.hand_over()
            session.expiration = time.time() + 60  # its consumer renews it
        await eventually(lambda: stub.times(LOOK))
        time.sleep(5)  # the user's own code
        assert await reservation.ended(timeout=4 if handed_over else 15) is not handed_over
