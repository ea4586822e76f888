"""One client in several event loops, one after the other: asyncio.run() for each job."""

import asyncio

import pytest

from null_local import LocalClient
from null_reservation import reserve
from tests.kit.stub import stubbed

pytestmark = pytest.mark.anyio


async def job(stub, endpoint):
    async with reserve(endpoint, wait=20) as reservation:
        assert reservation.session_id in stub.sessions
        assert not await reservation.ended(timeout=0.1)


async def in_a_loop_of_its_own(work):
    return await asyncio.to_thread(asyncio.run, work)


async def test_an_endpoint_may_be_used_in_one_event_loop_after_the_other(caplog):
    async with stubbed() as (stub, _):
        client = LocalClient("key", autoscaler_url=stub.url, webserver_url=stub.url)
        endpoint = await in_a_loop_of_its_own(client.get_endpoint("stub"))
        await in_a_loop_of_its_own(job(stub, endpoint))
        stub.key = "another"  # that it is fetched anew works there too
        await in_a_loop_of_its_own(job(stub, endpoint))
        await job(stub, endpoint)
        assert stub.left() == [] and len(stub.sessions) == 3
    assert not [record for record in caplog.records if record.name == "null_reservation"]


async def test_an_endpoint_may_be_used_in_several_event_loops_at_once():
    async with stubbed() as (stub, endpoint):
        jobs = [in_a_loop_of_its_own(job(stub, endpoint)) for _ in range(3)]
        await asyncio.gather(job(stub, endpoint), *jobs)
        assert stub.left() == [] and len(stub.sessions) == 4
