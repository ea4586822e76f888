"""hand_over(): the consumer holds the reservation from then on."""

import asyncio
import signal
import time

import pytest

import null_reservation
from null_reservation import reserve
from null_worker import END, LOOK, PING
from tests.kit.command import Command
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.stub import first, stubbed
from tests.kit.waiting import eventually
from tests.kit.worker import is_free, release, renew

pytestmark = pytest.mark.anyio

HAND_OVER = """
import asyncio, sys, null_local, null_reservation

async def main(url, key, name):
    async with null_local.LocalClient(key, autoscaler_url=url, webserver_url=url) as client:
        endpoint = await client.get_endpoint(name)
        async with null_reservation.reserve(endpoint, lifetime=3) as reservation:
            reservation.hand_over()
            print(reservation.session_id, reservation.url, flush=True)
            await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_reservation_that_was_handed_over_lives_as_long_as_its_consumer_renews_it(vast):
    async def raises():
        async with endpoint_of(vast) as endpoint:
            with pytest.raises(KeyError):
                async with reserve(endpoint, lifetime=3) as reservation:
                    reservation.hand_over()
                    raise KeyError
            return reservation.session_id, worker_at(vast, reservation.url)

    async def gets(number):
        async with Command(vast.url, vast.api_key, vast.endpoint_name, driver=HAND_OVER) as command:
            session_id, url = (await command.says(r"^(\S+) (http\S+)$")).groups()
            command.process.send_signal(number)
            await command.status()
            return session_id, worker_at(vast, url)

    async def outlives(dispatcher):
        session_id, worker = await dispatcher
        renewed_until = time.monotonic() + 3 + 5.5  # 5 to the next sweep
        while time.monotonic() < renewed_until:
            answer = (await renew(worker))[1]
            assert (answer["renewed"], answer["session_id"]) == (True, session_id), (
                dispatcher,
                answer,
            )
            await asyncio.sleep(0.3)
        await eventually(lambda: is_free(worker), timeout=3 + 8)

    await asyncio.gather(
        *(outlives(dies) for dies in (raises(), gets(signal.SIGTERM), gets(signal.SIGKILL)))
    )


async def test_a_handed_over_reservation_still_tells_of_its_end_and_can_be_closed(vast):
    async with endpoint_of(vast) as endpoint:
        async with reserve(endpoint, lifetime=60) as reservation:
            worker = worker_at(vast, reservation.url)
            reservation.hand_over()
            assert not await reservation.ended(timeout=0)
            await release(worker)
            assert await reservation.ended(timeout=8) is True
        async with reserve(endpoint, lifetime=60) as reservation:
            worker = worker_at(vast, reservation.url)
            reservation.hand_over()
            await reservation.close()
            assert await reservation.ended(timeout=0) is True
            assert await release(worker) == (
                200,
                {"released": False, "reason": "no active session"},
            )
        async with reserve(endpoint, lifetime=60) as reservation:
            reservation.hand_over()
        # The end of the block doesn't end it.
        assert (await release(worker_at(vast, reservation.url)))[1]["released"]


async def test_after_hand_over_no_keep_alive_comes_and_the_end_is_not_sent():
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint, lifetime=3) as reservation:
            await eventually(lambda: stub.times(PING))
            (session,) = stub.sessions.values()
            reservation.hand_over()
            pings, renewed_until = len(stub.times(PING)), time.monotonic() + 5
            while time.monotonic() < renewed_until:
                session.expiration = time.time() + 2
                assert not await reservation.ended(timeout=0.2)
            assert len(stub.times(PING)) == pings
            assert await reservation.ended(timeout=10) is True  # it expires
        async with reserve(endpoint) as reservation:
            reservation.hand_over()
        assert len(stub.left()) == 1 and not stub.times(END)


async def test_who_still_waits_for_a_handed_over_reservation_is_not_told_that_it_ended():
    async with stubbed() as (_, endpoint):
        async with reserve(endpoint) as reservation:
            waiter = asyncio.create_task(reservation.ended())
            reservation.hand_over()
        with pytest.raises(null_reservation.ReservationError):
            await asyncio.wait_for(waiter, 5)


async def test_a_handed_over_reservation_is_looked_at_in_measure_and_kept_while_it_is_renewed():
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=8) as reservation:
        (session,) = stub.sessions.values()
        reservation.hand_over()
        until = time.monotonic() + 8
        while time.monotonic() < until:
            session.expiration = time.time() + 3.5  # a late consumer's: less than half a lifetime
            assert not await reservation.ended(timeout=0.2)
        assert 3 <= len(stub.times(LOOK)) <= 6
        stub.fate = first((502, b""), route=LOOK)
        session.expiration = time.time() + 8
        await eventually(lambda: reservation.unreachable)
        assert not await reservation.ended(timeout=0.3)


@pytest.mark.parametrize("order", ["close at the end", "hand over while closing"])
async def test_closing_what_was_handed_over_is_not_undone_by_the_end_of_the_block(order):
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint) as reservation:
            if order == "close at the end":
                reservation.hand_over()
            closing = asyncio.create_task(reservation.close())
            await asyncio.sleep(0)
            reservation.hand_over()
        await closing
        assert stub.left() == []
