"""Keep-alives: one in a lifetime, in time, never piled up."""

import asyncio
import time

import pytest

from null_reservation import keep_alive_due, reserve
from null_worker import CREATE, LOOK, PING
from tests.kit.autoscaler import silence, statuses
from tests.kit.reservation import endpoint_of, expiration
from tests.kit.stub import GONE, first, stubbed
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("time_to_live", "lifetime", "due"),
    [(120, 120, 60), (180, 120, 120), (60, 120, 0), (10, 120, -50), (1, 1, 0.5)],
)
def test_a_keep_alive_waits_for_the_last_half_of_a_lifetime(time_to_live, lifetime, due):
    assert keep_alive_due(time_to_live, lifetime) == due


async def test_an_unruly_keep_alive_is_in_the_log_once_and_one_that_comes_too_late_is_not(caplog):
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=3):
        stub.fate = first((200, b"{}"), route=PING)
        await eventually(lambda: len(stub.times(PING)) >= 2)
        (record,) = caplog.records
        assert "keep-alive refused" in record.msg and "HTTP 200" in record.getMessage()
        stub.fate = first((410, GONE), route=PING)
        await eventually(lambda: len(stub.times(PING)) >= 4)
        assert len(caplog.records) == 1


async def test_the_time_to_live_counts_from_when_the_create_was_sent():
    async with stubbed() as (stub, endpoint):
        stub.fate = first(2.0, route=CREATE)
        async with reserve(endpoint, lifetime=8) as reservation:
            assert 5 < reservation.time_to_live <= 6.01
            await eventually(lambda: stub.times(LOOK))
            (session,) = stub.sessions.values()
            await eventually(lambda: stub.times(PING), timeout=8)
            assert session.expiration - time.time() < 1.5 * 8 + 1
            await asyncio.sleep(0.2)
            assert abs(session.expiration - time.time() - reservation.time_to_live) < 1


async def test_a_keep_alive_that_arrives_late_is_not_repeated(caplog):
    """The worker freezes with a keep-alive under way.

    It takes it up when it thaws, as it answers the next look.
    """
    lifetime = 6
    async with stubbed() as (stub, endpoint):
        thawed, frozen = asyncio.Event(), []

        async def freeze(route, _):
            if route == PING and not frozen:
                frozen.append(time.monotonic())
                asyncio.get_running_loop().call_later(2.2, thawed.set)
            if frozen and not thawed.is_set():
                await thawed.wait()
                await asyncio.sleep(0.1 * (route == PING))  # the look is answered just before

        stub.fate = freeze
        async with reserve(endpoint, lifetime=lifetime) as reservation:
            (session,) = stub.sessions.values()
            await eventually(lambda: reservation.unreachable)
            await eventually(lambda: not reservation.unreachable)
            await asyncio.sleep(0.5)
            assert session.expiration - time.time() < 1.5 * lifetime
            assert len(stub.times(PING)) == 1
        assert stub.left() == []


async def test_a_reservation_is_kept_alive_and_never_beyond_one_and_a_half_lifetimes(vast):
    lifetime, left = 4.0, []
    await silence(vast)

    async def agree():
        """The client's clock with the worker's.

        A keep-alive that is under way just then counts on one side only.
        """
        left.append(await expiration(reservation) - time.time())
        return abs(left[-1] - reservation.time_to_live) < 1

    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=lifetime) as reservation:
        start = time.monotonic()
        while time.monotonic() - start < 3 * lifetime:
            await eventually(agree, timeout=3)
            assert not await reservation.ended(timeout=0.2)
    # It began when the create was sent, a moment earlier.
    assert min(left) > 0 and max(left) < 1.5 * lifetime + 0.5
    await eventually(lambda: statuses(vast) == ["Success"])
    assert sum(report["new_load"] for report in vast.reports) <= 100
    assert {report["cur_load"] for report in vast.reports} <= {0, 100}
