"""The control server, as the consumer beside it and whoever else reaches it ask it."""

import asyncio
import json
import os
import time

import aiohttp
import pytest

from null_worker import CONTROL_ROUTES, Answer, NullWorker, Settings, control_request
from tests.kit.environment import ON_VAST
from tests.kit.http import on_the_wire, post, request
from tests.kit.worker import create, driver, fresh, killed, lease, lines_since

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("method", "path", "expected", "allow"),
    [
        ("GET", "/health", 200, None),
        ("HEAD", "/health", 200, None),
        ("GET", "/health?x=1", 200, None),
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/health", 405, "GET, HEAD"),
        ("GET", "/release", 405, "POST"),
        ("HEAD", "/release", 405, "POST"),
        ("PUT", "/release", 405, "POST"),
        ("OPTIONS", "/release", 405, "POST"),
        ("BREW", "/release", 405, "POST"),
        ("POST", "/release/", 404, None),
        ("POST", "/", 404, None),
        ("GET", "/session/create", 404, None),
        ("BREW", "/tea", 404, None),
        ("POST", "/broken", 400, None),
        ("GET", "/broken?reason=x", 405, "POST"),
    ],
)
async def test_the_control_server_answers_in_json_whatever_it_is_asked(
    worker, method, path, expected, allow
):
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, worker.control_url + path) as response,
    ):
        text = await response.read()
        assert (response.status, response.headers.get("Allow")) == (expected, allow)
        assert response.content_type == "application/json"
        if method == "HEAD":
            assert int(response.headers["Content-Length"]) > 0 and text == b""
        else:
            assert len(text) == int(response.headers["Content-Length"]) and json.loads(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:18999", 200),
        ("localhost", 200),
        ("LocalHost:1", 200),
        ("[::1]:18999", 200),
        ("127.8.8.8", 200),
        ("evil.example", 403),
        ("evil.example:18999", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("[", 403),
    ],
)
async def test_only_a_loopback_host_is_answered(vast, worker, host, expected):
    session_id = await create(vast, worker)
    headers = {"Host": host}
    status, _, _ = await request("GET", f"{worker.control_url}/health", headers=headers)
    assert status == expected
    status, answer = await post(f"{worker.control_url}/release", headers=headers)
    assert status == expected
    assert answer.get("session_ids") == ([session_id] if expected == 200 else None)
    assert ("error" in answer) == (expected == 403)


async def test_garbage_on_the_control_port_is_answered_or_dropped_and_never_logged_as_a_crash(
    worker,
):
    port = worker.control_port
    logged = worker.log.stat().st_size
    assert b" 400 " in await on_the_wire(port, b"garbage\r\n\r\n")
    assert b" 400 " in await on_the_wire(port, b"GET / HTTP/x.y\r\n\r\n")
    assert b" 414 " in await on_the_wire(port, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")
    assert b" 431 " in await on_the_wire(port, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n")
    two_hosts = b"POST /release HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"
    assert b" 403 " in await on_the_wire(port, two_hosts)
    assert b" 404 " in await on_the_wire(port, b"POST http://127.0.0.1/release HTTP/1.1\r\n\r\n")
    assert b" 200 " in await on_the_wire(port, b"POST /release HTTP/1.0\r\n\r\n")
    for rubbish in (b"", b"\x00\xff" * 5000, b"\x16\x03\x01\x02\x00", b"GET"):
        await on_the_wire(port, rubbish)
    _, writer = await asyncio.open_connection("127.0.0.1", worker.control_port)
    writer.write(b"POST /release HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf")
    writer.transport.abort()
    assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
    assert "Traceback" not in lines_since(worker, logged)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_any_size_is_read_and_ignored(vast, worker, chunked):
    session_id, size = await create(vast, worker), 8 << 20

    async def chunks():
        for _ in range(size >> 16):
            yield bytes(1 << 16)

    body = chunks() if chunked else bytes(size)
    assert await post(f"{worker.control_url}/release", data=body) == (
        200,
        {"released": True, "session_ids": [session_id]},
    )


async def test_an_answer_ends_before_the_one_who_asked_closes(worker):
    """null_consumer.py reads to the end of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.control_port)
    writer.write(b"GET /health HTTP/1.0\r\n\r\n")
    assert b" 200 " in await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_idle_connections_hold_up_nothing_and_are_dropped(worker):
    start = time.monotonic()
    idle = [await asyncio.open_connection("127.0.0.1", worker.control_port) for _ in range(100)]
    assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
    assert time.monotonic() - start < 8
    dropped = asyncio.gather(*(reader.read() for reader, _ in idle))
    assert await asyncio.wait_for(dropped, 30) == [b""] * 100
    assert time.monotonic() - start > 9
    for _, writer in idle:
        writer.close()


HANDS_ON = Answer(299, {})


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/health", ("/health", None)),
        ("GET", "/session", ("/session", 0.0)),
        ("GET", "/session?wait=0", ("/session", 0.0)),
        ("GET", "/session?wait=60", ("/session", 60.0)),
        ("GET", "/session?wait=2.5", ("/session", 2.5)),
        *(
            ("GET", f"/session?wait={wait}", 400)
            for wait in ("", "-1", "-0.1", "60.1", "61", "nan", "inf", "-inf", "x")
        ),
        *(
            ("GET", f"/session?{query}", 400)
            for query in ("wait=1&wait=1", "session_id=x", "wait=1&x=1", "Wait=1", "wait")
        ),
        ("POST", "/session", 405),
        ("GET", "/renew", 405),
        ("POST", "/renew", ("/renew", None)),
        ("POST", "/renew?session_id=a%20b", ("/renew", "a b")),
        ("POST", "/release?session_id=", ("/release", "")),
        ("POST", "/release?session_id=x&session_id=x", 400),
        ("POST", "/release?wait=1", 400),
        ("GET", "/broken?reason=x", 405),
        ("POST", "/broken?reason=no%20GPU", ("/broken", "no GPU")),
        ("POST", "/broken?reason=" + "x" * 1024, ("/broken", "x" * 1024)),
        *(
            ("POST", f"/broken{query}", 400)
            for query in (
                "",
                "?reason",
                "?reason=",
                "?reason=%20",
                "?reason=" + "x" * 1025,
                "?reason=" + "%C3%A9" * 513,
            )
        ),
        ("POST", "/broken?reason=x&reason=y", 400),
        ("POST", "/broken?reason=x&session_id=y", 400),
        ("GET", "/session/", 404),
        ("GET", "", 404),
    ],
)
def test_what_a_request_to_the_control_server_asks_for(method, target, expected):
    asked = []

    def function_of(path):
        return lambda value: asked.append((path, value)) or HANDS_ON

    answer = control_request({path: function_of(path) for path in CONTROL_ROUTES}, method, target)
    if isinstance(expected, tuple):
        assert (asked, answer) == ([expected], HANDS_ON)
    else:
        assert (asked, answer.status, list(answer.body)) == ([], expected, ["error"])
        assert bool(answer.allow) == (expected == 405)


@pytest.mark.parametrize("path", CONTROL_ROUTES)
def test_a_route_of_the_control_server_without_a_function_is_not_found(path):
    for method in CONTROL_ROUTES[path].methods:
        assert control_request({}, method, f"{path}?reason=x").status == 404


async def test_no_route_but_release_ends_a_session(vast, tmp_path):
    """Nor does one that is in the table and has no function: it is not found."""
    unwritten = "/has-no-function"
    add = f'null_worker.CONTROL_ROUTES["{unwritten}"] = null_worker.CONTROL_ROUTES["/release"]'
    worker = await fresh(vast, script=driver(tmp_path, add))
    session_id = await create(vast, worker)
    values = {"wait": 0, "session_id": session_id, "reason": "none"}
    for path, route in {**CONTROL_ROUTES, unwritten: CONTROL_ROUTES["/release"]}.items():
        if path == "/release":
            continue
        name = route.parameter and route.parameter.name
        query = f"?{name}={values[name]}" if name else ""
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            expected = 200 if method in route.methods else 405
            if path == unwritten:
                expected = 404
            status, _, _ = await request(method, f"{worker.control_url}{path}{query}")
            assert status == expected, (method, path)
        assert (await lease(worker))["session_id"] == session_id, path
    await killed(worker)


def test_each_route_has_a_function(monkeypatch):
    monkeypatch.setattr(os, "environ", {**ON_VAST})
    settings = Settings.from_environment(ON_VAST)
    assert set(NullWorker(settings, 1024).control_functions()) == set(CONTROL_ROUTES)
