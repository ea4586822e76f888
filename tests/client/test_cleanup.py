"""reserve(): no session is left behind, however its block ends."""

import asyncio
import contextlib
import re
import signal
import time

import pytest

import null_reservation
from null_reservation import reserve
from null_worker import CREATE, END
from tests.kit.autoscaler import statuses
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.stub import ROUTE, first, stubbed
from tests.kit.waiting import eventually
from tests.kit.worker import create, release, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("how", ["end", "exception", "cancelled", "cancelled twice"])
async def test_a_session_is_closed_however_the_block_ends(vast, how, caplog):
    async def hold(endpoint, held):
        async with reserve(endpoint, on_close_payload={"job": 1}) as reservation:
            held.set_result(worker_at(vast, reservation.url))
            if how == "exception":
                raise KeyError("job")
            if "cancel" in how:
                await asyncio.sleep(3600)

    async with endpoint_of(vast) as endpoint:
        held = asyncio.get_running_loop().create_future()
        holding = asyncio.ensure_future(hold(endpoint, held))
        worker = await held
        if "cancel" in how:
            holding.cancel()
        if "twice" in how:
            await asyncio.sleep(0)
            holding.cancel()
        await asyncio.wait({holding})
        assert holding.cancelled() or isinstance(holding.exception(), KeyError) == (
            how == "exception"
        )
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})
    assert not caplog.records


async def test_a_session_that_is_just_being_created_is_not_left_behind(vast):
    for worker in list(vast.workers.values())[1:]:
        await create(vast, worker)
        await until(worker, lambda worker=worker: worker.report["cur_load"] == 100)
    (worker,) = [worker for worker in list(vast.workers.values()) if worker.free]
    async with endpoint_of(vast) as endpoint:
        worker.process.send_signal(signal.SIGSTOP)
        opening = asyncio.ensure_future(reserve(endpoint).__aenter__())
        # Routed; its create is on the way to the frozen worker.
        await eventually(lambda: worker.promised_to)
        await asyncio.sleep(0.3)
        opening.cancel()
        asyncio.get_running_loop().call_later(0.1, worker.process.send_signal, signal.SIGCONT)
        await asyncio.wait({opening})
        assert opening.cancelled()
        await eventually(lambda: statuses(vast) == ["Success"])
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


CUT_SHORT = {
    "a poll": (ROUTE, 0.6),
    "a create": (CREATE, 0.6),
    "a create that finds the worker occupied": (CREATE, (429, {})),
    "a create that finds it draining": (CREATE, (503, {"error": "draining"})),
    "a create that gets a proxy's page": (CREATE, (502, b"<html>")),
    "a create that is dropped": (CREATE, "reset"),
}


@pytest.mark.parametrize("times", [1, 3])
async def test_after_a_cancellation_nothing_more_is_asked_for_and_nothing_untrue_is_said(
    times, caplog
):
    async def cut_short(cut_route, fate):
        async with stubbed() as (stub, endpoint):

            async def slow(route, _):
                if route != cut_route:
                    return None
                if not isinstance(fate, float):
                    await asyncio.sleep(0.6)
                return fate

            stub.fate = slow
            opening = asyncio.create_task(reserve(endpoint).__aenter__())
            await eventually(lambda: stub.times(cut_route))
            for _ in range(times):
                opening.cancel()
                await asyncio.sleep(0.05)
            await asyncio.wait({opening}, timeout=5)
            assert opening.cancelled()
            await asyncio.sleep(2.5)  # a poll would come after a second
            assert (len(stub.times(ROUTE)), len(stub.times(CREATE))) == (
                1,
                int(cut_route == CREATE),
            )
            assert stub.left() == []

    again = [(CREATE, (429, {}))] * 2
    await asyncio.gather(*(cut_short(*cut) for cut in [*CUT_SHORT.values(), *again]))
    assert not caplog.records


async def test_a_create_whose_answer_came_while_the_dispatcher_stood_still_leaves_no_session(
    monkeypatch,
):
    monkeypatch.setattr(null_reservation, "REQUEST_TIMEOUT", 1.0)
    async with stubbed() as (stub, endpoint):

        async def stand_still(route, _):
            if route == CREATE and len(stub.times(CREATE)) == 1:
                asyncio.get_running_loop().call_later(0.05, time.sleep, 1.5)
                return 0.1
            return None

        stub.fate = stand_still
        async with reserve(endpoint):
            assert len(stub.left()) == 1


async def test_closing_is_retried(caplog):
    fates = [(503, {"error": "busy"}), "reset", "lost", (400, b"<html>"), (200, b"")]
    async with stubbed() as (stub, endpoint):
        stub.fate = first(*fates[:2], fates[3], fates[4], route=END)
        async with reserve(endpoint):
            pass
        assert (len(stub.times(END)), stub.left()) == (5, [])
        stub.fate = first("lost", route=END)
        async with reserve(endpoint):
            pass
        assert (len(stub.times(END)), stub.left()) == (7, [])
    assert not caplog.records


async def test_closing_that_hangs_is_asked_again(caplog):
    async def hang(route, _):
        if route == END and len(stub.times(END)) == 1:
            await asyncio.sleep(60)

    async with stubbed() as (stub, endpoint):
        stub.fate = hang
        async with reserve(endpoint):
            pass
        assert (len(stub.times(END)), stub.left()) == (2, [])
    assert not caplog.records


async def test_a_session_that_cannot_be_closed_is_told_with_the_time_until_when_it_stays(caplog):
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint, lifetime=60) as reservation:
            stub.fate = lambda route, _: (503, {"error": "busy"}) if route == END else None
            start = time.monotonic()
        assert time.monotonic() - start < 5 and len(stub.times(END)) < 20
        assert await reservation.ended(timeout=0) is True
    told_until(caplog, reservation.session_id, reservation.url)


def told_until(caplog, session_id, url):
    """The log says of a session with 60 s to live until when it stays."""
    (record,) = caplog.records
    text = record.getMessage()
    until = re.search(r"until (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)$", text)
    left = time.mktime(time.strptime(until[1], "%Y-%m-%d %H:%M:%S")) - time.time()
    assert f"session={session_id}:" in text and url in text
    assert 30 <= left <= 66


async def test_so_is_one_whose_opening_was_cancelled(caplog):
    async with stubbed() as (stub, endpoint):
        stub.fate = lambda route, _: {CREATE: 0.5, END: (503, {"error": "busy"})}.get(route)
        opening = asyncio.create_task(reserve(endpoint, lifetime=60).__aenter__())
        (session,) = await eventually(stub.left)
        opening.cancel()
        await asyncio.wait({opening})
        assert opening.cancelled() and stub.left() == [session]
    told_until(caplog, session.name, stub.url)


async def test_only_so_many_are_closed_at_a_time_and_none_is_left(caplog, monkeypatch):
    closing, most = set(), 0
    assert null_reservation.MAX_PARALLEL_CLOSES == 50
    monkeypatch.setattr(null_reservation, "MAX_PARALLEL_CLOSES", 10)

    async def slow(route, message):
        nonlocal most
        if route == END:
            closing.add(message["session_id"])
            most = max(most, len(closing))
            await asyncio.sleep(1.1)  # the third wave ends after the first one's bound of 3 s
            closing.discard(message["session_id"])

    async with stubbed() as (stub, endpoint), contextlib.AsyncExitStack() as stack:
        stub.fate = slow
        reservations = await asyncio.gather(
            *(stack.enter_async_context(reserve(endpoint)) for _ in range(24))
        )
        await asyncio.gather(*(reservation.close() for reservation in reservations))
        assert stub.left() == []
        assert most == 10
    assert not caplog.records
