"""reserve(): answers that make no sense, from the router and from workers."""

import asyncio
import math
import time
from types import SimpleNamespace

import pytest

from null_reservation import NotReserved, WorkerLost, reserve
from null_worker import CREATE, END, LOOK, PING
from tests.kit.stub import GONE, ROUTE, first, stubbed
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio

NESTED = b"[" * 100_000 + b"]" * 100_000


ODD = {
    "no body": (200, b""),
    "null": (200, b"null"),
    "a list": (200, b"[]"),
    "text": (200, b'"session does not exist"'),
    "a number": (200, b"1"),
    "no field": (200, b"{}"),
    "other types": (
        200,
        {
            "expiration": "soon",
            "ended": 1,
            "session_id": 5,
            "url": 5,
            "request_idx": "a",
            "error": [],
        },
    ),
    "lists": (
        200,
        {"expiration": [], "ended": [True], "session_id": ["a"], "url": ["a"], "request_idx": {}},
    ),
    "true": (
        200,
        {"expiration": True, "ended": "true", "session_id": True, "url": True, "request_idx": True},
    ),
    "huge": (
        200,
        {
            "expiration": 10**400,
            "ended": 10**400,
            "session_id": 10**400,
            "url": 7,
            "request_idx": 10**400,
        },
    ),
    "too many digits": (200, b'{"expiration": 1%s, "ended": 1}' % (b"0" * 5000)),
    "infinite": (200, b'{"expiration": Infinity, "ended": NaN, "request_idx": -Infinity}'),
    "nested": (200, NESTED),
    "nested in a field": (200, b'{"expiration": %s}' % NESTED),
    "no UTF-8": (200, b'\xff{"ended": true}'),
    "over a MiB": (200, b" " * (1 << 21)),
    "HTML": (200, b"<html>session does not exist</html>"),
    "no content": (204, b""),
    "a redirect": (302, b""),
    "400 of a proxy": (400, b"<html>400 Bad Request</html>"),
    "400 in JSON": (400, {"error": "Bad Request"}),
    "400, error a list": (400, {"error": ["session does not exist"]}),
    "401": (401, b"Unauthorized"),
    "404": (404, GONE),
    "410 of a proxy": (410, b"<html>410 Gone</html>"),
    "410, nested": (410, NESTED),
    "502": (502, {"error": "session does not exist"}),
    "500": (500, GONE),
    "a word, with 200": (200, GONE),
}


async def test_a_worker_that_answers_nonsense_to_every_look_is_lost_when_its_time_to_live_is_over():
    async def look(name, odd):
        async with stubbed() as (stub, endpoint):
            with pytest.raises(WorkerLost, match="can't be reached"):
                opened_at = time.monotonic()
                stub.fate = lambda route, _: odd if route == LOOK else None
                async with reserve(endpoint, lifetime=4) as reservation:
                    await reservation.ended()
            assert 3.5 < time.monotonic() - opened_at < 30, name
            assert len(stub.times(LOOK)) < 15, name
            assert not stub.times(PING)

    await asyncio.gather(*(look(*odd) for odd in ODD.items()))


@pytest.mark.parametrize("status", [400, 410])
async def test_only_the_workers_own_word_is_an_end(status):
    words = [
        "session does not exist",
        "session abc is not active",
        "session already closed",
        "invalid session",
    ]

    async def look(word):
        async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=2) as reservation:
            stub.fate = lambda route, _: (status, {"error": word}) if route == LOOK else None
            assert await reservation.ended() is True

    await asyncio.gather(*(look(word) for word in words))


async def test_nonsense_for_a_while_is_waited_through_and_the_session_closed_at_the_end(
    caplog,
):
    async def meanwhile(name, odd):
        async with stubbed() as (stub, endpoint):
            async with reserve(endpoint, lifetime=8) as reservation:
                stub.fate = first(*[odd] * 2, route=LOOK)
                ended = asyncio.create_task(reservation.ended(timeout=6))
                await eventually(lambda: reservation.unreachable)
                await eventually(lambda: not reservation.unreachable)
                assert not await ended, name
                stub.fate = first(odd, route=END)
            assert (stub.left(), len(stub.times(END))) == ([], 2), name

    await asyncio.gather(*(meanwhile(*odd) for odd in ODD.items()))
    assert not [record for record in caplog.records if "not closed" in record.msg]


async def test_a_keep_alive_that_gets_nonsense_is_repeated_in_measure():
    async def ping(name, odd):
        async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=8) as reservation:
            stub.fate = lambda route, _: odd if route == PING else None
            # It expired: the worker's own word.
            assert await reservation.ended(timeout=30) is True, name
            assert 1 <= len(stub.times(PING)) <= 12 and len(stub.times(LOOK)) < 30, name

    await asyncio.gather(*(ping(*odd) for odd in ODD.items()))


async def test_nonsense_from_the_router_is_waited_through_and_told():
    urls = [
        "",
        "nonsense",
        "http://[",
        "http://127.0.0.1:99999",
        "file:///etc/passwd",
        "http://\ud800",
        "http://",
    ]
    cases = {
        **{f"URL {url!a}": (200, {"url": url}) for url in urls},
        **{n: o for n, o in ODD.items() if o[0] == 200},
    }
    cases |= {
        str(status): (status, b"<html>not now</html>") for status in (302, 408, 429, 500, 502, 503)
    }

    async def poll(name, odd):
        troubles = []
        async with stubbed() as (stub, endpoint):
            stub.fate = first(odd, route=ROUTE)
            async with reserve(endpoint, on_trouble=troubles.append, wait=20):
                pass
            assert stub.left() == [] and 2 <= len(stub.times(ROUTE)) <= 3, name
            if odd[0] != 200:
                assert f"HTTP {odd[0]}" in troubles[0] and "not now" in troubles[0]

    await asyncio.gather(*(poll(*case) for case in cases.items()))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 422])
async def test_a_refusal_by_the_router_carries_its_text_and_is_not_repeated(status):
    async with stubbed() as (stub, endpoint):
        stub.fate = first(
            (status, b"<h1>nested</h1>" if status == 410 else {"error": "no credit"}), route=ROUTE
        )
        with pytest.raises(NotReserved, match=f"HTTP {status} - .*(no credit|<h1>nested)"):
            await reserve(endpoint).__aenter__()
        assert len(stub.times(ROUTE)) == 1 and not stub.times(CREATE)


async def test_nonsense_from_a_worker_that_is_asked_for_a_session_is_waited_through():
    cases = {
        name: (201 if odd[0] == 200 else odd[0], odd[1])
        for name, odd in ODD.items()
        if name != "401"
    }
    cases |= {
        "200 for a 201": (200, {"session_id": 7}),
        "proxy's 422": (422, b"<html>"),
        "401": (401, b"<html>"),
    }

    async def ask(name, odd):
        async with stubbed() as (stub, endpoint):
            stub.fate = first(odd, route=CREATE)
            async with reserve(endpoint, wait=20) as reservation:
                assert reservation.session_id in stub.sessions, name
            assert stub.left() == [] and len(stub.times(CREATE)) == 2, name

    await asyncio.gather(*(ask(*case) for case in cases.items()))


async def test_a_session_that_does_not_say_when_it_expires_is_ended_and_another_asked_for():
    async def claim(claimed):
        async with stubbed() as (stub, endpoint):
            session = SimpleNamespace(lifetime=4, expiration=time.time() + 4, over=asyncio.Event())
            stub.sessions["s"] = session
            stub.fate = first((201, {"session_id": "s", "expiration": claimed}), route=CREATE)
            async with reserve(endpoint, lifetime=4) as reservation:
                assert reservation.session_id != "s", claimed
                assert session.over.is_set(), claimed
            assert stub.left() == [], claimed

    await asyncio.gather(*map(claim, [None, "soon", True, [], 10**400, math.inf]))
