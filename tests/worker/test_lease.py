"""The lease: seen and renewed by the consumer, looked at by the dispatcher."""

import asyncio
import time

import pytest

from tests.kit.http import Callbacks, post, request, server
from tests.kit.waiting import eventually
from tests.kit.worker import (
    create,
    exit_status,
    fresh,
    honest_requests,
    lease,
    release,
    renew,
    thread_count,
)

pytestmark = pytest.mark.anyio


async def test_renewals_leave_one_lifetime_and_only_the_named_sessions(vast, worker):
    assert await renew(worker) == (200, {"renewed": False, "reason": "no active session"})
    stale = await create(vast, worker)
    await release(worker, stale)
    session_id = await create(vast, worker, lifetime=60)
    for _ in range(10):
        status, answer = await renew(worker, session_id)
        assert (status, answer["renewed"], answer["session_id"]) == (200, True, session_id)
        assert 59.9 < answer["time_to_live"] <= 60.01
    before = (await lease(worker))["time_to_live"]
    for other in (stale, ""):
        assert await renew(worker, other) == (
            200,
            {"renewed": False, "reason": "session ID is not active"},
        )
    assert (await lease(worker))["time_to_live"] < before
    assert 59.9 < (await renew(worker))[1]["time_to_live"] <= 60.01


@pytest.mark.parametrize(
    "query", ["?id=x", "?session_id=x&session_id=y", "?session_id=x&more=1", "?wait=1"]
)
@pytest.mark.parametrize("path", ["/renew", "/release"])
async def test_a_misspelt_fence_renews_and_ends_nothing(vast, worker, path, query):
    session_id = await create(vast, worker)
    before = (await lease(worker))["time_to_live"]
    status, answer = await post(f"{worker.control_url}{path}{query}")
    assert (status, answer) == (400, {"error": "the only parameter is session_id, once"})
    after = await lease(worker)
    assert after["session_id"] == session_id
    assert after["time_to_live"] < before


async def test_a_session_lives_as_long_as_it_is_renewed_and_a_ping_is_not_undone(vast):
    renewed, left, pinged = vast.workers.values()
    start, lifetime, auth = time.monotonic(), 4, vast.auth_data(pinged)
    session_id = await create(vast, renewed, lifetime=lifetime)
    await create(vast, left, lifetime=lifetime)
    extended = await create(vast, pinged, auth=auth, lifetime=lifetime)
    ping = {"auth_data": auth, "session_id": extended, "payload": {}}
    for _ in range(3):
        assert (await post(f"{pinged.url}/ping", json=ping))[0] == 200
    assert 3.5 * lifetime < (await renew(pinged))[1]["time_to_live"] <= 4 * lifetime
    freed = None
    while time.monotonic() - start < 12:
        assert (await renew(renewed))[1]["session_id"] == session_id
        if not freed and (await lease(left))["session_id"] is None:
            freed = time.monotonic() - start
        await asyncio.sleep(1)
    assert lifetime <= freed < lifetime + 6
    assert 0 < (await lease(renewed))["time_to_live"] <= lifetime
    assert (await lease(pinged))["session_id"] == extended


async def test_a_consumer_sees_its_reservation(vast, worker):
    assert await lease(worker) == {"session_id": None}
    start = time.monotonic()
    assert await lease(worker, "?wait=1.5") == {"session_id": None}
    assert 1.4 < time.monotonic() - start < 10
    session_id = await create(vast, worker, lifetime=60)
    for query in ("", "?wait=0", "?wait=30"):  # at once
        seen = await lease(worker, query)
        assert seen == {"session_id": session_id, "time_to_live": seen["time_to_live"]}
        assert 59 < seen["time_to_live"] <= 60
    await release(worker)
    assert await lease(worker) == {"session_id": None}


async def test_a_hundred_waiting_consumers_hold_up_nothing_and_are_all_told(vast, worker):
    waiting = [asyncio.create_task(lease(worker, "?wait=30")) for _ in range(100)]
    await eventually(lambda: thread_count(worker) >= 100)  # a thread for each, and few others
    start = time.monotonic()
    assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
    assert (await release(worker))[1] == {"released": False, "reason": "no active session"}
    assert time.monotonic() - start < 10 and not any(task.done() for task in waiting)
    session_id = await create(vast, worker)
    start = time.monotonic()
    assert {answer["session_id"] for answer in await asyncio.gather(*waiting)} == {session_id}
    assert time.monotonic() - start < 5  # 1 by the contract, on a machine that isn't full of tests
    assert await release(worker) == (200, {"released": True, "session_ids": [session_id]})
    waiting = [asyncio.create_task(lease(worker, "?wait=5")) for _ in range(100)]
    async with honest_requests(vast, worker):
        await eventually(lambda: all(task.done() for task in waiting))
    await asyncio.gather(*waiting)


async def test_a_look_that_waits_is_answered_when_the_session_has_ended(vast, worker):
    auth = vast.auth_data(worker)
    session_id = await create(vast, worker, auth=auth)
    about, url = {"session_id": session_id, "session_auth": auth}, f"{worker.url}/session/get"

    async def look(**options):
        start = time.monotonic()
        status, answer = await post(url, json={**about, **options})
        return status, time.monotonic() - start, answer

    status, seconds, answer = await look(wait=1.5)
    assert status == 200 and 1.4 < seconds < 10 and answer["session_id"] == session_id
    status, seconds, _ = await look(wait=20, session_auth={**auth, "reqnum": 0})
    assert status == 401 and seconds < 8
    waiting = asyncio.create_task(look(wait=30))
    assert (await look(wait=1))[0] == 200 and not waiting.done()  # so the other one is waiting
    start = time.monotonic()
    await release(worker)
    status, _, answer = await waiting
    assert (status, answer) == (
        400,
        {"error": "session does not exist"},
    ) and time.monotonic() - start < 8
    status, seconds, _ = await look(wait=30)
    assert status == 400 and seconds < 8


@pytest.mark.parametrize("hang", [False, True])
async def test_a_look_that_waits_is_told_of_the_end_when_the_worker_is_stopped(vast, hang):
    callbacks = Callbacks(hang)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        auth = vast.auth_data(worker)
        session_id = await create(vast, worker, auth=auth, on_close_route=f"{origin}/closed")
        look = {"session_id": session_id, "session_auth": auth, "wait": 30}
        looking = [
            asyncio.create_task(post(f"{worker.url}/session/get", json=look)) for _ in range(10)
        ]
        waiting = asyncio.create_task(post(f"{worker.url}/session/get", json={**look, "wait": 0.5}))
        assert (await waiting)[0] == 200
        start = time.monotonic()
        worker.process.terminate()
        assert [status for status, _ in await asyncio.gather(*looking)] == [400] * 10
        assert time.monotonic() - start < 5
        callbacks.let_go.set()
        assert await exit_status(worker) == 0
