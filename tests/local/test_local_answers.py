"""LocalVast: its answers, and its workers' certificates."""

import asyncio
import contextlib
import time

import aiohttp
import pytest

import null_local
from null_reservation import reserve
from tests.kit.autoscaler import statuses
from tests.kit.environment import installed
from tests.kit.http import on_the_wire, post, request
from tests.kit.malformed import WIRE
from tests.kit.reservation import endpoint_of
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, create, lines_since, ready, release, until

pytestmark = pytest.mark.anyio


async def test_a_request_that_is_no_longer_polled_for_keeps_its_place_and_holds_up_no_worker(
    vast, monkeypatch
):
    monkeypatch.setattr(null_local, "ATTENTIVE", 1.5)
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(reserve(endpoint))
        given_up = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(WORKERS)]
        await eventually(lambda: len(vast.waiting) == WORKERS)
        for task in given_up:
            task.cancel()
        await asyncio.wait(given_up)
        await asyncio.gather(*(release(worker) for worker in vast.workers.values()))
        await asyncio.wait_for(stack.enter_async_context(reserve(endpoint)), 15)
        assert len(vast.waiting) == WORKERS  # they may come back, for a minute


async def test_its_answers_look_like_vasts():
    async with FaultyVast(max_workers=1, control_port=None) as vast, vast.client() as client:
        (endpoint,) = await client.get_endpoints()
        assert (await client.fetch_endpoint(endpoint.id)).config.endpoint_name == vast.endpoint_name
        query = {
            "endpoint": vast.endpoint_name,
            "api_key": vast.endpoint_key,
            "cost": 100,
            "replay_timeout": 0.5,
        }

        async def route(request_idx):
            return (await post(f"{vast.url}/route/", json={**query, "request_idx": request_idx}))[1]

        assert await route(0) == {
            "endpoint": "local",
            "request_idx": 1,
            "status": "1 MODEL_LOADING",
        }
        vast.forgetful = True
        assert await route(1) == {"endpoint": "local", "status": "1 MODEL_LOADING"}
        vast.forgetful = False
        (worker,) = vast.workers.values()
        await ready(worker)
        routed = await route(1)
        names = ["__request_id", "cost", "endpoint", "reqnum", "request_idx", "signature", "url"]
        assert sorted(routed) == names and (routed["reqnum"], routed["request_idx"]) == (1, 1)
        await create(vast, worker, auth=routed)
        await until(worker, lambda: worker.report["cur_load"] == 100)
        assert (await route(0))["request_idx"] == 2
        # Its place is kept for half a second.
        await eventually(lambda: time.monotonic() > vast.waiting[2])
        assert (await route(0))["request_idx"] == 3
        await release(worker)
        await until(worker, lambda: worker.free)
        again = await route(3)
        # 2 is forgotten, and the number is the worker's own.
        assert (again["url"], again["reqnum"]) == (worker.url, 2)
        (seen,) = await endpoint.get_workers()
        assert (seen.id, seen.status, seen.cur_load, seen.perf) == (worker.number, "IDLE", 0, 100)


async def test_the_router_takes_the_endpoints_key_and_the_web_api_the_accounts():
    async with FaultyVast(max_workers=1, control_port=None) as vast, vast.client() as client:

        async def route(key=None, bearer=None):
            query = {"endpoint": vast.endpoint_name, "cost": 100}
            if key:
                query["api_key"] = key
            headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
            return (await post(f"{vast.url}/route/", json=query, headers=headers))[0]

        first = vast.endpoint_key
        assert (await client.get_endpoint(vast.endpoint_name)).api_key == first != vast.api_key
        assert [await route(first), await route(bearer=first), await route(first, "x")] == [200] * 3
        assert [await route(), await route("x", first), await route(vast.api_key)] == [401] * 3
        vast.endpoint_key = "another"
        assert [await route(first), await route("another")] == [401, 200]
        (endpoint,) = await client.get_endpoints()
        assert endpoint.api_key == "another"
        assert len(await endpoint.get_workers()) == 1
        (status, _, _) = await request("GET", f"{vast.url}/api/v0/endptjobs/?api_key=another")
        assert status == 401
        listing = {"id": 1, "api_key": "x"}
        assert (await post(f"{vast.url}/get_endpoint_workers/", json=listing))[0] == 401


@installed("trustme")
async def test_over_https_a_reservation_is_held_kept_handed_over_and_released():
    async with FaultyVast(max_workers=1, control_port=None, tls=True) as vast:
        async with endpoint_of(vast) as endpoint:
            async with reserve(endpoint, lifetime=3) as reservation:
                assert reservation.url.startswith("https://")
                # Kept alive: 5 to the next sweep.
                assert not await reservation.ended(timeout=3 + 5.5)
                reservation.hand_over()
            (worker,) = vast.workers.values()
            assert (await post(f"{worker.control_url}/renew"))[1][
                "session_id"
            ] == reservation.session_id
            await release(worker)
            async with reserve(endpoint) as reservation:
                await release(worker, reservation.session_id)
                assert await reservation.ended(timeout=5)
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await http.post(f"{worker.url}/session/get")
        logged = worker.log.stat().st_size
        for sent in WIRE:
            await on_the_wire(worker.port, sent)
        assert "Traceback" not in lines_since(worker, logged)
    assert statuses(vast) == ["Success"] * 2
