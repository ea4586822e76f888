"""The on_close callbacks of a session."""

import asyncio
import contextlib
import re
import time

import pytest
from aiohttp import web

from tests.kit.autoscaler import statuses
from tests.kit.http import Callbacks, consumer_health, post, request, server
from tests.kit.waiting import eventually
from tests.kit.worker import (
    create,
    driver,
    exit_status,
    fresh,
    killed,
    lease,
    lines_since,
    memory,
    release,
    until,
)

pytestmark = pytest.mark.anyio


async def test_a_hung_callback_holds_up_nothing_but_its_own_release(vast, worker):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        session_id = await create(
            vast, worker, on_close_route=f"{origin}/closed", on_close_payload={"job": 7}
        )
        await until(worker, lambda: worker.report["cur_load"] == 100)
        start = time.monotonic()
        releasing = asyncio.ensure_future(release(worker))
        await eventually(lambda: callbacks.bodies)
        assert callbacks.bodies == [{"job": 7, "session_id": session_id}]
        assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
        successor = await create(vast, worker)
        # Told while the callback still hangs.
        await eventually(lambda: statuses(vast) == ["Success"])
        assert not releasing.done()
        assert await releasing == (200, {"released": True, "session_ids": [session_id]})
        assert time.monotonic() - start < 13  # the framework's bound is 10
        assert max(report["cur_load"] for report in vast.reports) == 100
        assert await release(worker, successor) == (
            200,
            {"released": True, "session_ids": [successor]},
        )
        callbacks.let_go.set()


async def test_a_hung_callback_does_not_hold_up_the_expiry_of_the_next_session(vast, worker):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        await create(vast, worker, lifetime=1, on_close_route=f"{origin}/closed")
        await eventually(lambda: callbacks.bodies)  # it has expired
        await create(vast, worker, lifetime=0.5)
        start = time.monotonic()
        await eventually(lambda: statuses(vast) == ["Success"] * 2)
        assert time.monotonic() - start < 0.5 + 5 + 4  # 5 to the next sweep; 4 for the report
        callbacks.let_go.set()


async def test_a_caller_that_hangs_up_leaves_neither_load_nor_callback_behind(vast, worker):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        auth = vast.auth_data(worker)
        session_id = await create(vast, worker, auth=auth, on_close_route=f"{origin}/closed")
        await until(worker, lambda: worker.report["cur_load"] == 100)
        body = {"session_id": session_id, "session_auth": auth}
        ending = asyncio.ensure_future(post(f"{worker.url}/session/end", json=body))
        await eventually(lambda: callbacks.bodies)
        ending.cancel()
        await until(
            worker, lambda: worker.report["cur_load"] == 0 and statuses(vast) == ["Success"]
        )
        callbacks.let_go.set()
        # The callback was not dropped either.
        assert await eventually(lambda: callbacks.answered) == [True]


async def test_a_callback_is_told_and_nothing_more(vast, worker):
    """Its answer is neither followed nor read, and the control server takes none.

    It might end the successor.
    """

    async def redirect(request):
        seen.append(request.path)
        raise web.HTTPTemporaryRedirect("/followed")

    async def huge(request):
        seen.append(request.path)
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=punycode"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                await response.write(b"dn32ga" + b"a" * (1 << 20))
        return response

    seen, before = [], memory(worker, "VmRSS")
    async with server(
        web.post("/redirect", redirect), web.post("/huge", huge), web.post("/followed", redirect)
    ) as origin:
        for route in ("/redirect", "/huge"):
            await create(vast, worker, on_close_route=origin + route, on_close_payload=["x"])
            assert (await asyncio.wait_for(release(worker), 5))[0] == 200
        session_id = await create(vast, worker)
        late = {"X-Null-Callback": "1"}  # a header that each has
        assert (await post(f"{worker.control_url}/release", headers=late))[0] == 403
        assert (await release(worker, session_id))[1]["released"]
    assert seen == ["/redirect", "/huge"] and memory(worker, "VmRSS") - before < 20


async def test_a_callback_to_the_control_server_changes_nothing(vast, worker):
    logged = worker.log.stat().st_size
    await create(vast, worker, on_close_route="/release")
    assert (await release(worker))[1]["released"]
    assert "Traceback" not in lines_since(worker, logged)


async def test_a_relative_callback_goes_to_the_consumer(vast):
    callbacks = Callbacks()
    async with server(callbacks.route, consumer_health({"health": 200})) as origin:
        worker = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/health"})
        assert (await request("GET", f"{worker.control_url}/health"))[0] == 404
        session_id = await create(vast, worker, on_close_route="/closed")
        await release(worker)
        assert callbacks.bodies == [{"session_id": session_id}]
        worker.process.terminate()
        assert await exit_status(worker) == 0


async def test_a_release_that_takes_too_long_says_so_and_the_worker_is_free(vast, tmp_path):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast, script=driver(tmp_path, "null_worker.CONTROL_WAIT = 1"))
        # It may wait as long as it asked for.
        assert await lease(worker, "?wait=2.5") == {"session_id": None}
        await create(vast, worker, on_close_route=f"{origin}/closed")
        status, answer = await release(worker)
        assert status == 504 and re.search("/release took over 1 s", answer["reason"])
        await create(vast, worker)
        callbacks.let_go.set()
        await eventually(lambda: callbacks.answered == [True])
        await killed(worker)
