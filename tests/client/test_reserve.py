"""reserve(): asking for a worker, waiting for it, and what ends the wait."""

import asyncio
import contextlib
import datetime
import decimal
import math
import re
import shutil
import subprocess
import sys
import time

import aiohttp
import pytest

from null_reservation import NotReserved, reserve
from null_worker import CREATE
from tests.kit.autoscaler import statuses
from tests.kit.environment import BARE, HERE
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.stub import ROUTE, first, stubbed, truth
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, release

pytestmark = pytest.mark.anyio


async def test_a_reservation_that_waits_gets_the_worker_that_becomes_free(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        first, *_ = [await stack.enter_async_context(reserve(endpoint)) for _ in range(WORKERS)]
        vast.polls = 0
        waiting = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
        await eventually(lambda: vast.polls > 3)
        assert not waiting.done()
        start = time.monotonic()
        await release(worker_at(vast, first.url))
        assert (await asyncio.wait_for(waiting, 20)).url == first.url
        assert time.monotonic() - start < 10  # about 1 for the worker's report and 1 for the poll


async def test_a_reservation_waits_through_429(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(reserve(endpoint))
        await eventually(
            lambda: all(worker.report["cur_load"] == 100 for worker in list(vast.workers.values()))
        )
        vast.overbooked = True
        waiting = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
        await eventually(lambda: "Rejected" in statuses(vast))
        assert not waiting.done()
        await asyncio.gather(*(release(worker) for worker in list(vast.workers.values())))
        await asyncio.wait_for(waiting, 20)


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_a_refusal_by_the_autoscaler_ends_the_wait(vast, status):
    vast.failing_polls += [status]
    async with endpoint_of(vast) as endpoint:
        with pytest.raises(NotReserved, match=f"HTTP {status}.*out of order"):
            async with reserve(endpoint):
                pass


async def test_the_wait_is_bounded(vast):
    vast.failing_polls += [502] * 100
    async with endpoint_of(vast) as endpoint:
        start = time.monotonic()
        with pytest.raises(NotReserved, match=r"no worker within 1.5 s"):
            async with reserve(endpoint, wait=1.5):
                pass
        assert time.monotonic() - start < 6


async def test_an_autoscaler_and_a_web_api_that_fail_for_a_while_do_not_end_the_wait():
    async def wait_through(days):
        troubles, fates = [], [502, 500, 503]
        async with stubbed() as (stub, endpoint):
            endpoint.last_refresh -= days * 86400  # the SDK fetches it again from the third day on
            stub.free = False

            def fail(route, _):
                if route.startswith("/api/"):
                    return 500, b"<html>"
                if fates and route == ROUTE:
                    return fates.pop(0), b"<html>out of order</html>"
                return None

            stub.fate = fail
            async with contextlib.AsyncExitStack() as stack:
                waiting = asyncio.create_task(
                    stack.enter_async_context(reserve(endpoint, on_trouble=troubles.append))
                )
                await eventually(lambda: len(stub.times(ROUTE)) >= 2)
                await stub.absent(2)  # connection refused
                await eventually(lambda: troubles and troubles[-1] == "")
                stub.free = True
                assert (await waiting).session_id in stub.sessions
        assert re.search("HTTP 502.*out of order", troubles[0])
        assert any(re.search("HTTP 50[03]|[Cc]onnect", trouble) for trouble in troubles[1:])

    await asyncio.gather(*map(wait_through, [0, 4, 8]))


async def test_the_last_failure_is_in_the_exception():
    async with stubbed() as (stub, endpoint):
        stub.fate = lambda route, _: (502, b"<html>out of order</html>") if route == ROUTE else None
        with pytest.raises(
            NotReserved, match=r"no worker within 1.5 s; at last: .*HTTP 502.*out of order"
        ):
            await reserve(endpoint, wait=1.5).__aenter__()
        stub.fate = lambda route, _: (429, {"error": "occupied"}) if route == CREATE else None
        with pytest.raises(
            NotReserved, match=r"no worker within 1.5 s; at last: .*HTTP 429.*occupied"
        ):
            await reserve(endpoint, wait=1.5).__aenter__()
        stub.fate, stub.free = truth, False
        with pytest.raises(NotReserved, match=r"no worker within 1.5 s$"):
            await reserve(endpoint, wait=1.5).__aenter__()


CIRCULAR = {}


CIRCULAR["itself"] = CIRCULAR


DEEP = []


for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "unsendable",
    [
        *(
            {"on_close_payload": {"job": value}}
            for value in (decimal.Decimal(1), datetime.datetime.min, math.nan)
        ),
        *(
            {"on_close_payload": {"job": value}}
            for value in ({1}, b"x", CIRCULAR, math.inf, object())
        ),
        *({"on_close_payload": value} for value in (CIRCULAR, {(1, 2): 3})),
        {"cost": decimal.Decimal(100)},
        {"cost": math.nan},
        {"on_close_route": b"/closed"},
    ],
    ids=lambda unsendable: repr(unsendable)[:40],
)
async def test_what_cannot_be_sent_is_a_type_error_at_once(unsendable):
    async with stubbed() as (stub, endpoint):
        with pytest.raises(TypeError, match="not to be sent as JSON"):
            await reserve(endpoint, **unsendable).__aenter__()
        assert not stub.times(ROUTE)


@pytest.mark.parametrize(
    ("lifetime", "error"),
    [
        *((value, ValueError) for value in (0, -1, 30 * 86400 + 1, 1e18, math.inf, math.nan)),
        *((value, TypeError) for value in (None, "60", True, decimal.Decimal(60))),
    ],
)
async def test_a_lifetime_out_of_bounds_is_refused_before_anything_is_asked(lifetime, error):
    async with stubbed() as (stub, endpoint):
        with pytest.raises(error, match=f"lifetime is {re.escape(repr(lifetime))}: it should be"):
            await reserve(endpoint, lifetime=lifetime).__aenter__()
        assert not stub.times(ROUTE)
        async with reserve(endpoint, lifetime=30 * 86400):
            pass


async def test_what_is_nested_too_deep_is_a_type_error_at_once():
    async with stubbed() as (stub, endpoint):
        with pytest.raises(TypeError, match="not to be sent as JSON"):
            await reserve(endpoint, on_close_payload={"job": DEEP}).__aenter__()
        assert not stub.times(ROUTE)


async def test_a_closed_client_asks_for_nothing_more():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = asyncio.create_task(reserve(endpoint).__aenter__())
        await eventually(lambda: stub.times(ROUTE))
        await endpoint.client.close()
        with pytest.raises(NotReserved, match="the Serverless client is closed"):
            await asyncio.wait_for(waiting, 5)


async def test_a_certificate_is_asked_for_by_one_at_a_time_and_again_when_it_can_not_be_had():
    async with stubbed() as (stub, endpoint):
        asked, troubles, fails, load = [], [], iter([True, True]), endpoint.client.get_ssl_context

        async def get_ssl_context():
            asked.append(1)
            assert len(asked) == 1, "two at a time"
            await asyncio.sleep(0.05)
            asked.pop()
            if next(fails, False):
                raise RuntimeError("no route")
            return await load()

        endpoint.client.get_ssl_context = get_ssl_context
        async with contextlib.AsyncExitStack() as stack:
            many = (reserve(endpoint, on_trouble=troubles.append, wait=10) for _ in range(5))
            await asyncio.gather(*map(stack.enter_async_context, many))
        assert [trouble for trouble in troubles if trouble] == [
            "no certificate: no route"
        ] * 2 and stub.left() == []


@pytest.mark.parametrize("status", [401, 413, 422])
async def test_a_refusal_by_the_worker_ends_the_wait(status):
    async with stubbed() as (stub, endpoint):
        stub.fate = first((status, {"error": "invalid"}), route=CREATE)
        with pytest.raises(NotReserved, match=f"refuses: HTTP {status} .*invalid"):
            await reserve(endpoint, wait=5).__aenter__()
        assert len(stub.times(CREATE)) == 1


async def test_the_wait_ends_in_time_whatever_the_router_does():
    async def ends(fate):
        async with stubbed() as (stub, endpoint):
            stub.fate = lambda route, _: fate if route == ROUTE else None
            start = time.monotonic()
            with pytest.raises(NotReserved, match="no worker within 1.2 s; at last: "):
                await reserve(endpoint, wait=1.2).__aenter__()
            assert 1.1 < time.monotonic() - start < 4.5, fate

    await asyncio.gather(ends(5.0), ends((502, b"")))


async def test_what_the_caller_asks_for_reaches_the_router_and_the_worker():
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint, 250, 77, on_close_route="/done", on_close_payload={"job": 7}):
            pass
        (query,), (message,) = stub.messages(ROUTE), stub.messages(CREATE)
    assert (query["cost"], query["endpoint"], query["api_key"]) == (250, "stub", "key")
    assert message["payload"] == {
        "lifetime": 77,
        "on_close_route": "/done",
        "on_close_payload": {"job": 7},
    }
    assert message["auth_data"]["cost"] == 250


async def test_reserve_works_from_a_copy_of_its_file_alone(vast, tmp_path):
    shutil.copy(HERE / "null_reservation.py", tmp_path)
    program = (
        "import asyncio, ssl, sys\n"
        "from vastai import Serverless\n"
        "from null_reservation import reserve\n"
        "class Client(Serverless):\n"
        "    async def get_ssl_context(self): return ssl.create_default_context()\n"
        "async def main():\n"
        f"    urls = dict(autoscaler_url={vast.url!r}, webserver_url={vast.url!r})\n"
        f"    async with Client({vast.api_key!r}, **urls) as client:\n"
        "        async with reserve(await client.get_endpoint('local')) as session:\n"
        "            print(session.session_id, session.url)\n"
        "asyncio.run(main())\n"
    )
    environment = BARE | {"PYTHONPATH": str(tmp_path)}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.split()[1] in [worker.url for worker in list(vast.workers.values())]
    await eventually(lambda: statuses(vast) == ["Success"])


@pytest.mark.parametrize("bug", [OSError, ValueError, asyncio.TimeoutError, aiohttp.ClientError])
@pytest.mark.parametrize("route", [ROUTE, CREATE])
async def test_what_on_trouble_raises_comes_out_and_is_no_trouble_of_vasts(route, bug):
    def on_trouble(trouble):
        raise bug("of the caller")

    async with stubbed() as (stub, endpoint):
        stub.fate = first((502, b"<html>"), route=route)
        with pytest.raises(bug, match="of the caller"):
            async with reserve(endpoint, wait=10, on_trouble=on_trouble):
                pass
        assert len(stub.times(ROUTE)) == 1
        assert stub.left() == []
