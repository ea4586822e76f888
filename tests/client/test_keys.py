"""The endpoint's key, which Vast may change at any time."""

import asyncio
import contextlib
import re
import secrets

import pytest

import null_reservation
from null_reservation import Refused, reserve
from null_worker import CREATE
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.stub import ROUTE, stubbed
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, release

pytestmark = pytest.mark.anyio

WEB_API = "/api/v0/endptjobs/1/"
DAY = 86400


async def test_a_key_that_changes_between_two_reservations_is_fetched_anew(vast):
    async with endpoint_of(vast) as endpoint:
        async with reserve(endpoint):
            pass
        vast.endpoint_key = secrets.token_hex(16)
        troubles = []
        async with reserve(endpoint, on_trouble=troubles.append, wait=20):
            assert endpoint.api_key == vast.endpoint_key
    assert "the autoscaler refused the endpoint's key: HTTP 401" in troubles[0]


async def test_a_key_that_changes_while_a_reservation_waits_is_fetched_anew(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(reserve(endpoint)) for _ in range(WORKERS)]
        waiting = asyncio.create_task(stack.enter_async_context(reserve(endpoint)))
        vast.polls = 0
        await eventually(lambda: vast.polls > 1)
        for _ in range(2):
            vast.endpoint_key = secrets.token_hex(16)
            await eventually(lambda: endpoint.api_key == vast.endpoint_key)
            await asyncio.sleep(null_reservation.KEY_JUST_FETCHED)  # it was fetched just now
        assert not waiting.done()
        await release(worker_at(vast, held[0].url))
        assert (await asyncio.wait_for(waiting, 20)).url == held[0].url


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_that_another_key_does_not_end_is_final_after_a_few_requests(status):
    async with stubbed() as (stub, endpoint):
        stub.key = "another"  # the web API's
        stub.fate = lambda route, _: (status, b"no") if route == ROUTE else None
        with pytest.raises(Refused, match=f"the autoscaler refuses: HTTP {status} - no") as refused:
            await reserve(endpoint, wait=20).__aenter__()
        assert refused.value.status == status
        assert len(stub.times(ROUTE)) == 2  # with the old one and the new one
        assert len(stub.times(WEB_API)) == 1


async def test_a_web_api_that_fails_while_the_key_is_refused_is_asked_again():
    async with stubbed() as (stub, endpoint):
        stub.key = "another"
        troubles = []
        stub.fate = lambda route, _: (502, b"") if route == WEB_API and not troubles else None
        async with reserve(endpoint, on_trouble=troubles.append):
            pass
        key = "the autoscaler refuses: HTTP 401 .*; the endpoint's key can't be fetched anew"
        assert re.search(key, troubles[0])
        stub.key = "a third"
        stub.fate = lambda route, _: (502, b"") if route == WEB_API else None
        await asyncio.sleep(null_reservation.KEY_JUST_FETCHED)
        stub.asked.clear()
        with pytest.raises(Refused, match="HTTP 401"):
            await reserve(endpoint).__aenter__()
        assert len(stub.times(ROUTE)) == null_reservation.MAX_KEY_REFUSALS
        assert not stub.times(CREATE)


async def test_a_hundred_that_wait_fetch_a_changed_key_once():
    async with stubbed() as (stub, endpoint), contextlib.AsyncExitStack() as stack:
        stub.key = "another"
        many = (stack.enter_async_context(reserve(endpoint)) for _ in range(100))
        await asyncio.gather(*many)
        assert len(stub.times(WEB_API)) == 1


async def test_an_old_key_is_fetched_anew_and_used_where_no_other_can_be_had():
    async with stubbed() as (stub, endpoint):
        endpoint.last_refresh -= 3 * DAY
        stub.fate = lambda route, _: (502, b"") if route == WEB_API else None
        for _ in range(3):  # it isn't asked for at every poll
            async with reserve(endpoint):
                pass
        assert len(stub.times(WEB_API)) == 1
        assert endpoint.api_key == "key"
        endpoint.last_refresh -= 3 * DAY
        stub.fate = lambda *_: None
        stub.key = "another"
        async with reserve(endpoint):
            pass
        assert [message["api_key"] for message in stub.messages(ROUTE)] == ["key"] * 3 + ["another"]
