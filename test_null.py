"""What the null worker, its client and LocalVast promise, proved on real processes over real HTTP.

The workers of the `vast` fixture are shared, and each test finds all of them free; a test that ends, breaks or
configures one starts its own. Seconds in assertions are bounds of the contract or generous; nothing here times speed.
"""

import asyncio
import base64
import contextlib
import datetime
import decimal
import fcntl
import functools
import gc
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15

with contextlib.suppress(ImportError):
    import redis.asyncio

import null_client
import null_local
import null_worker
from null_client import NotReserved, WorkerLost, keep_alive_due, poll_interval, reserve
from null_local import LocalClient, LocalVast, LocalWorker, hold_port
from null_worker import ROUTES as CHECKED
from null_worker import Answer, Settings, StartupError, control, problems

HERE = Path(__file__).parent
WORKERS = 3
ON_VAST = {
    "CONTAINER_ID": "1",
    "PUBLIC_IPADDR": "127.0.0.1",
    "REPORT_ADDR": "http://127.0.0.1:9",
    "WORKER_PORT": "3000",
    "VAST_TCP_PORT_3000": "3000",
}
BARE = {name: value for name, value in os.environ.items() if not re.match("VAST|NULL_|BACKEND_|LINES|COLUMNS", name)}

pytestmark = pytest.mark.anyio
for number in (signal.SIGINT, signal.SIGHUP):  # ignored in a run in the background, and so by all that it starts
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def shared_vast():
    async with LocalVast(max_workers=WORKERS, inactivity_timeout=3600, control_port=None) as vast:
        yield vast


@pytest.fixture
async def vast(shared_vast):
    """LocalVast with its workers ready and free, and an empty record."""
    await eventually(lambda: all(not w.process or w.process.returncode is None for w in shared_vast.workers.values()))
    for _ in range(WORKERS - len(shared_vast.workers)):
        shared_vast.start_worker()
    await eventually(lambda: all(worker.free for worker in shared_vast.workers.values()))
    for record in (shared_vast.reports, shared_vast.ended, shared_vast.failing_polls, shared_vast.waiting):
        record.clear()
    shared_vast.first_request = shared_vast.last_request + 1
    yield shared_vast
    shared_vast.overbooked, shared_vast.report_delay = False, 0.0
    for worker in list(shared_vast.workers.values()):
        with contextlib.suppress(aiohttp.ClientError, ValueError):  # it may be gone, and its port somebody else's
            await post(f"{worker.control_url}/release")


@pytest.fixture
def worker(vast):
    return next(iter(vast.workers.values()))


def installed(*needed):
    missing = [name for name in needed if not shutil.which(name) and not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


async def eventually(condition, timeout=60.0):
    """Wait for the condition to hold, and return what it gave. Who can't be asked has not said yes."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            try:
                result = await result
            except aiohttp.ClientError:
                result = None
        if result:
            return result
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


async def request(method, url, **options):
    """Status, headers and JSON of one request on a connection of its own."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.request(method, url, **options) as response:
        text = await response.text()
        return response.status, response.headers, json.loads(text) if text else None


async def post(url, **options):
    status, _, answer = await request("POST", url, **options)
    return status, answer


async def create(vast, worker, auth=None, lifetime=60, **payload):
    body = {"auth_data": auth or vast.auth_data(worker), "payload": {"lifetime": lifetime, **payload}}
    return await post(f"{worker.url}/session/create", json=body)


async def session(vast, worker, **payload):
    status, answer = await create(vast, worker, **payload)
    assert status == 201, (status, answer)
    return answer["session_id"]


async def release(worker, session_id=None):
    query = "" if session_id is None else f"?session_id={session_id}"
    return await post(f"{worker.control_url}/release{query}")


async def fresh(vast, environment=None, **options) -> LocalWorker:
    worker = vast.start_worker(environment, **options)
    await eventually(lambda: worker.state == "IDLE")
    return worker


async def exit_status(worker, timeout=20.0):
    return await asyncio.wait_for(worker.process.wait(), timeout)


def run(command, environment):
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=60, check=False)


def ended(vast):
    """What workers said of requests of this test; of an earlier one's they may still be telling."""
    return [request for request in vast.ended if request["request_idx"] >= getattr(vast, "first_request", 0)]


def statuses(vast):
    return [request["status"] for request in ended(vast)]


async def silence(vast):
    """Wait until the workers have told all of what was before, and forget it."""
    start = time.monotonic()
    await eventually(lambda: time.monotonic() - max([start, *(r["received"] for r in vast.reports)]) > 2.5)
    vast.reports.clear()


@contextlib.asynccontextmanager
async def server(*routes):
    """An HTTP server of the user's own, a consumer say; gives its origin."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def consumer_health(statuses):
    async def health(request):
        return web.Response(status=statuses[request.match_info["name"]])

    return web.get("/{name}", health)


class Callbacks:
    """The receiver of on_close callbacks, which can be made to hang."""

    def __init__(self, hang=False):
        self.bodies, self.answered, self.let_go = [], [], asyncio.Event()
        if not hang:
            self.let_go.set()
        self.route = web.post("/closed", self.receive)

    async def receive(self, request):
        self.bodies.append(await request.json())
        assert "X-Null-Callback" in request.headers
        await self.let_go.wait()
        self.answered.append(request.transport is not None and not request.transport.is_closing())
        return web.json_response({})


# null_worker.py: settings


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"NULL_CONTROL_PORT": "0"}, "NULL_CONTROL_PORT is '0', should be a port, 1-65535"),
        ({"NULL_CONTROL_PORT": "65536"}, "NULL_CONTROL_PORT is '65536', should be a port"),
        ({"NULL_CONTROL_PORT": "18 999"}, "NULL_CONTROL_PORT is '18 999', should be a port"),
        ({"NULL_CONTROL_PORT": "-1"}, "NULL_CONTROL_PORT is '-1', should be a port"),
        ({"NULL_CONTROL_PORT": "٣"}, "NULL_CONTROL_PORT is '٣', should be a port"),
        ({"NULL_CONTROL_PORT": "9" * 5000}, "should be a port"),
        ({"NULL_CONTROL_PORT": "3000"}, "NULL_CONTROL_PORT is '3000', should be another port than WORKER_PORT"),
        ({"NULL_CONTROL_PORT": "3001"}, "should be another port than WORKER_PORT and WORKER_HTTP_PORT"),
        ({"NULL_CONTROL_PORT": "4000", "WORKER_HTTP_PORT": "4000"}, "should be another port than WORKER_PORT"),
        ({"WORKER_HTTP_PORT": "3000"}, "WORKER_HTTP_PORT is '3000', should be another port than WORKER_PORT"),
        ({"WORKER_HTTP_PORT": "x"}, "WORKER_HTTP_PORT is 'x', should be a port"),
        ({"WORKER_PORT": "65535", "VAST_TCP_PORT_65535": "1"}, "WORKER_HTTP_PORT is '65536', should be a port"),
        ({"WORKER_PORT": "http"}, "WORKER_PORT is 'http', should be a port"),
        ({"VAST_TCP_PORT_3000": "no"}, "VAST_TCP_PORT_3000 is 'no', should be a port"),
        ({"CONTAINER_ID": "abc"}, "CONTAINER_ID is 'abc', should be a number"),
        ({"UNSECURED": "maybe"}, "UNSECURED is 'maybe', should be true or false"),
        ({"BACKEND_HEALTH_URL": "/health"}, "BACKEND_HEALTH_URL is '/health', should be an absolute http"),
        ({"BACKEND_HEALTH_URL": "ftp://a/h"}, "BACKEND_HEALTH_URL is 'ftp://a/h', should be an absolute http"),
        ({"BACKEND_HEALTH_URL": "http://"}, "BACKEND_HEALTH_URL is 'http://', should be an absolute http"),
        ({"BACKEND_HEALTH_URL": "http://[/h"}, "BACKEND_HEALTH_URL is 'http://[/h', should be an absolute http"),
        ({"BACKEND_HEALTH_URL": "http://a b/"}, "should be an absolute http"),
        ({"BACKEND_HEALTH_URL": "http://a:99999/"}, "should be an absolute http"),
        ({"BACKEND_HEALTH_URL": "http://localhost:18999/health"}, "the consumer's own, not the control server's"),
        ({"BACKEND_HEALTH_URL": "http://[::1]:77/", "NULL_CONTROL_PORT": "77"}, "not the control server's"),
        ({"BACKEND_HEALTH_URL": "http://127.0.0.1", "NULL_CONTROL_PORT": "80"}, "not the control server's"),
        ({"CONTAINER_ID": "", "REPORT_ADDR": ""}, "CONTAINER_ID, REPORT_ADDR not set"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_it_should_be(change, line):
    with pytest.raises(StartupError, match=re.escape(line)):
        Settings.from_environment({**ON_VAST, **change})


def test_good_settings_are_taken():
    assert Settings.from_environment(ON_VAST) == Settings(18999, None, "127.0.0.1", (3000, 3001), 1800.0, False)
    consumer = {**ON_VAST, "PUBLIC_IPADDR": "1.2.3.4", "BACKEND_HEALTH_URL": "https://u:p@[fd00::1]/h?x=1"}
    more = {"NULL_CONTROL_PORT": "", "UNSECURED": "True", "BACKEND_START_TIMEOUT": "2.5", "WORKER_HTTP_PORT": "4000"}
    settings = Settings(18999, "https://u:p@[fd00::1]/h?x=1", None, (3000, 4000), 2.5, True)
    assert Settings.from_environment(consumer | more) == settings
    assert Settings.from_environment(ON_VAST | {"UNSECURED": ""}).unsecured is False


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({**ON_VAST, "NULL_CONTROL_PORT": "99999"}, "NULL_CONTROL_PORT is '99999', should be a port, 1-65535"),
        (
            {},
            (
                "not a Vast Serverless instance, CONTAINER_ID, PUBLIC_IPADDR, REPORT_ADDR, WORKER_PORT, "
                "VAST_TCP_PORT_<WORKER_PORT> not set; to run it off Vast: python null_client.py --local"
            ),
        ),
    ],
)
def test_a_worker_that_cannot_start_says_so_in_one_line(environment, line):
    command = [sys.executable, HERE / "null_worker.py"]
    done = run(command, BARE | environment)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"null_worker: {line}\n", "")


# null_worker.py: reservations


async def test_the_sdk_reserves_and_the_autoscaler_is_told(vast):
    async with vast.client(max_poll_interval=1.0) as client:
        endpoint = await client.get_endpoint(vast.endpoint_name)
        reserved = await endpoint.session(cost=100, lifetime=60)
        await eventually(lambda: any(report["cur_load"] == 100 for report in vast.reports))
        await reserved.close()
        await eventually(lambda: vast.reports[-1]["cur_load"] == 0)
    await eventually(lambda: statuses(vast) == ["Success"])
    assert {report["max_perf"] for report in vast.reports} == {100.0}
    assert {report["cur_load"] for report in vast.reports} <= {0, 100}
    assert not any(report["rej_load"] or report["error_msg"] for report in vast.reports)


@pytest.mark.parametrize("by", ["release", "session/end", "HTTP-only session/end", "expiry"])
async def test_every_end_of_a_reservation_is_a_success(vast, worker, by):
    auth = vast.auth_data(worker)
    session_id = await session(vast, worker, auth=auth, lifetime=60 if by != "expiry" else 3)
    await eventually(lambda: worker.report["cur_load"] == 100)
    if by == "release":
        assert await release(worker) == (200, {"released": True, "session_ids": [session_id]})
    elif by != "expiry":
        port = worker.http_port if by.startswith("HTTP") else worker.port
        body = {"session_id": session_id, "session_auth": auth}
        assert (await post(f"http://127.0.0.1:{port}/session/end", json=body))[0] == 200
    await eventually(lambda: worker.report["cur_load"] == 0 and ended(vast))
    (request,) = ended(vast)
    assert (request["request_idx"], request["status"], request["success"]) == (auth["request_idx"], "Success", True)


async def test_one_session_at_a_time(vast, worker):
    first = await session(vast, worker)
    assert (await create(vast, worker))[0] == 429
    assert await release(worker, first) == (200, {"released": True, "session_ids": [first]})
    second = await session(vast, worker)
    assert second != first


async def test_of_many_creates_at_once_one_gets_in_and_of_many_releases_one_releases(vast, worker):
    got = await asyncio.gather(*(create(vast, worker) for _ in range(200)))
    assert sorted(status for status, _ in got) == [201] + [429] * 199
    answers = await asyncio.gather(*(release(worker) for _ in range(100)))
    assert all(status == 200 for status, _ in answers)
    assert [answer["released"] for _, answer in answers].count(True) == 1
    assert {answer.get("reason") for _, answer in answers} == {None, "no active session"}


async def test_a_late_consumer_cannot_release_its_successor(vast, worker):
    first = await session(vast, worker)
    await release(worker, first)
    second = await session(vast, worker)
    refused = (200, {"released": False, "reason": "session ID is not active"})
    assert await release(worker, first) == refused
    assert await release(worker, "") == refused  # a shell variable that isn't set
    assert (await post(f"{worker.control_url}/release?session={first}"))[0] == 400
    assert (await post(f"{worker.control_url}/release?session_id={first}&session_id={second}"))[0] == 400
    assert await release(worker, second) == (200, {"released": True, "session_ids": [second]})


async def test_a_ping_extends_the_session_and_adds_no_load(vast, worker):
    auth = vast.auth_data(worker)
    session_id = await session(vast, worker, auth=auth, lifetime=60)
    about = {"session_id": session_id, "session_auth": auth}
    before = (await post(f"{worker.url}/session/get", json=about))[1]["expiration"]
    await eventually(lambda: worker.report["cur_load"] == 100)
    vast.reports.clear()
    ping = {"auth_data": auth, "session_id": session_id, "payload": {}}
    assert await post(f"{worker.url}/ping", json=ping) == (200, {"result": {}})
    assert (await post(f"{worker.url}/session/get", json=about))[1]["expiration"] == before + 60
    report = await eventually(lambda: [report for report in vast.reports if report["id"] == worker.number])
    assert (report[0]["cur_load"], report[0]["new_load"], report[0]["cur_perf"]) == (100, 0, 0)
    # Outside its session, with the very signature that opened it, a ping would take the session's load away.
    assert (await post(f"{worker.url}/ping", json={"auth_data": auth, "payload": {}}))[0] == 422
    forged = {**ping, "auth_data": {**auth, "signature": ""}}
    assert (await post(f"{worker.url}/ping", json=forged))[0] == 401
    assert (await post(f"{worker.url}/session/get", json=about))[1]["expiration"] == before + 60


async def test_a_hung_callback_holds_up_nothing_but_its_own_release(vast, worker):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        session_id = await session(vast, worker, on_close_route=f"{origin}/closed", on_close_payload={"job": 7})
        await eventually(lambda: worker.report["cur_load"] == 100)
        start = time.monotonic()
        releasing = asyncio.ensure_future(release(worker))
        await eventually(lambda: callbacks.bodies)
        assert callbacks.bodies == [{"job": 7, "session_id": session_id}]
        assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
        successor = await session(vast, worker)
        await eventually(lambda: statuses(vast) == ["Success"])  # told while the callback still hangs
        assert not releasing.done()
        assert await releasing == (200, {"released": True, "session_ids": [session_id]})
        assert time.monotonic() - start < 13  # the framework's bound is 10
        assert max(report["cur_load"] for report in vast.reports) == 100
        assert await release(worker, successor) == (200, {"released": True, "session_ids": [successor]})
        callbacks.let_go.set()


async def test_a_hung_callback_does_not_hold_up_the_expiry_of_the_next_session(vast, worker):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        await session(vast, worker, lifetime=1, on_close_route=f"{origin}/closed")
        await eventually(lambda: callbacks.bodies)  # it has expired
        await session(vast, worker, lifetime=0.5)
        start = time.monotonic()
        await eventually(lambda: statuses(vast) == ["Success"] * 2)
        assert time.monotonic() - start < 0.5 + 5 + 4  # 5 to the next sweep; 4 for the report
        callbacks.let_go.set()


async def test_a_caller_that_hangs_up_leaves_neither_load_nor_callback_behind(vast, worker):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        auth = vast.auth_data(worker)
        session_id = await session(vast, worker, auth=auth, on_close_route=f"{origin}/closed")
        await eventually(lambda: worker.report["cur_load"] == 100)
        body = {"session_id": session_id, "session_auth": auth}
        ending = asyncio.ensure_future(post(f"{worker.url}/session/end", json=body))
        await eventually(lambda: callbacks.bodies)
        ending.cancel()
        await eventually(lambda: worker.report["cur_load"] == 0 and statuses(vast) == ["Success"])
        callbacks.let_go.set()
        assert await eventually(lambda: callbacks.answered) == [True]  # the callback was not dropped either


async def test_a_callback_is_told_and_nothing_more(vast, worker):
    """Its answer is neither followed nor read, and the control server takes none: it might end the successor."""

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
            await session(vast, worker, on_close_route=origin + route, on_close_payload=["x"])
            assert (await asyncio.wait_for(release(worker), 5))[0] == 200
        session_id = await session(vast, worker)
        late = {"X-Null-Callback": "1"}  # a header that each has
        assert (await post(f"{worker.control_url}/release", headers=late))[0] == 403
        assert (await release(worker, session_id))[1]["released"]
    assert seen == ["/redirect", "/huge"] and memory(worker, "VmRSS") - before < 20


async def test_a_callback_to_the_control_server_changes_nothing(vast, worker):
    logged = worker.log.stat().st_size
    await session(vast, worker, on_close_route="/release")
    assert (await release(worker))[1]["released"]
    assert "Traceback" not in lines_since(worker, logged)


async def test_a_relative_callback_goes_to_the_consumer(vast):
    callbacks = Callbacks()
    async with server(callbacks.route, consumer_health({"health": 200})) as origin:
        worker = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/health"})
        assert (await request("GET", f"{worker.control_url}/health"))[0] == 404
        session_id = await session(vast, worker, on_close_route="/closed")
        await release(worker)
        assert callbacks.bodies == [{"session_id": session_id}]
        worker.process.terminate()
        assert await exit_status(worker) == 0


async def test_a_metrics_step_that_raises_leaves_the_worker_free(vast, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import runpy\n"
        "from vastai.serverless.server.lib.metrics import Metrics\n"
        "def broken(self, request): raise RuntimeError('metrics are broken')\n"
        "Metrics._request_success = broken\n"
        f"runpy.run_path({str(HERE / 'null_worker.py')!r}, run_name='__main__')\n"
    )
    worker = await fresh(vast, script=str(script))
    session_id = await session(vast, worker)
    await eventually(lambda: worker.report["cur_load"] == 100)
    status, answer = await release(worker)
    assert status == 500 and "RuntimeError('metrics are broken')" in answer["reason"]
    assert (answer["released"], answer["session_ids"]) == (True, [session_id])
    await eventually(lambda: worker.report["cur_load"] == 0, timeout=30)
    await session(vast, worker)
    log = worker.log.read_text()
    assert "Traceback" in log and f"closing session={session_id} failed" in log
    worker.process.kill()
    await exit_status(worker)


# null_worker.py: the session guard

WRONG = {str: [None, 1, True, [], {}], int: [None, "1", 1.5, True, [], {}], float: [None, "1", True, [], {}]}
AUTH = {"cost": float, "endpoint": str, "reqnum": int, "request_idx": int, "signature": str, "url": str}
LIFETIMES = [None, "60", True, [], {}, 0, -1, -0.0, math.nan, math.inf, -math.inf, 10**400]
ROUTES = [1, True, [], {}, "", "closed", "ftp://host/x", "http://", "http://[", "http://a b", "javascript:alert(1)"]


RAW = [
    (422, b""),
    (422, b"not json"),
    (422, b"{"),
    (422, b"[]"),
    (422, b"null"),
    (422, b"0"),
    (422, b'"x"'),
    (422, b"\xff\xfe\xff"),
    (422, b'{"auth_data": "\xc3\x28"}'),
    (422, b"[" * 500_000),
    (422, b'{"auth_data":' * 50_000),
    (422, b'{"payload": {"lifetime": ' + b"9" * 5000 + b"}}"),
    (413, b" " * ((1 << 20) + 1)),
    (413, b'{"auth_data": "' + b"x" * (3 << 20)),
]


async def test_a_create_that_says_less_than_the_sdk_gets_in(vast, worker):
    body = {"auth_data": vast.auth_data(worker, cost=0) | {"more": 1}, "payload": {}}
    assert (await post(f"{worker.url}/session/create", json=body))[0] == 201


async def test_only_the_routers_signature_gets_in(vast, worker):
    await silence(vast)
    good = vast.auth_data(worker)
    signed = SHA256.new(json.dumps({"url": worker.url}, indent=4, sort_keys=True).encode())
    strangers = base64.b64encode(pkcs1_15.new(RSA.generate(2048)).sign(signed)).decode()
    for signature in ("", "garbage", "¡no base64!", "\ud800", strangers, vast.sign("http://other:1")):
        assert (await create(vast, worker, auth={**good, "signature": signature}))[0] == 401, signature
    assert (await create(vast, worker, auth={**good, "url": "http://other:1"}))[0] == 401
    await session(vast, worker, auth=good)
    assert "UNSECURED=true" in worker.log.read_text()
    await eventually(lambda: worker.report["cur_load"] == 100)
    assert sum(report["rej_load"] for report in vast.reports) == 0
    assert sum(report["new_load"] for report in vast.reports) <= 100


async def test_without_the_public_key_a_worker_is_not_ready_and_takes_no_session():
    async with LocalVast(control_port=None) as vast:
        vast.publish_key = False
        worker = vast.start_worker()
        await eventually(lambda: reachable(worker))
        status, answer = await create(vast, worker)
        assert (status, answer, worker.state) == (503, {"error": "no sessions now: starting up"}, "MODEL_LOADING")
        vast.publish_key = True
        await eventually(lambda: worker.state == "IDLE")
        await session(vast, worker)


async def created(vast, worker):
    status, _ = await create(vast, worker)
    assert status in (201, 429, 503)
    return status == 201


async def test_unsecured_lets_the_unsigned_in_but_not_the_malformed(vast):
    worker = await fresh(vast, {"UNSECURED": "true"})
    unsigned = {**vast.auth_data(worker), "signature": ""}
    assert (await create(vast, worker, auth=unsigned, lifetime=math.nan))[0] == 422
    assert (await create(vast, worker, auth={**unsigned, "signature": None}))[0] == 422
    await session(vast, worker, auth=unsigned)
    worker.process.kill()
    await exit_status(worker)


# null_worker.py: the control server


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
    ],
)
async def test_the_control_server_answers_in_json_whatever_it_is_asked(worker, method, path, expected, allow):
    async with aiohttp.ClientSession() as http, http.request(method, worker.control_url + path) as response:
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
    session_id = await session(vast, worker)
    assert (await request("GET", f"{worker.control_url}/health", headers={"Host": host}))[0] == expected
    status, answer = await post(f"{worker.control_url}/release", headers={"Host": host})
    assert status == expected and answer.get("session_ids") == ([session_id] if expected == 200 else None)


async def raw(worker, *parts):
    """What the control server sends back for bytes on the wire, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.control_port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()


async def test_garbage_on_the_control_port_is_answered_or_dropped_and_never_logged_as_a_crash(worker):
    logged = worker.log.stat().st_size
    assert b" 400 " in await raw(worker, b"garbage\r\n\r\n")
    assert b" 400 " in await raw(worker, b"GET / HTTP/x.y\r\n\r\n")
    assert b" 414 " in await raw(worker, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")
    assert b" 431 " in await raw(worker, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n")
    assert b" 403 " in await raw(worker, b"POST /release HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
    assert b" 404 " in await raw(worker, b"POST http://127.0.0.1/release HTTP/1.1\r\n\r\n")
    assert b" 200 " in await raw(worker, b"POST /release HTTP/1.0\r\n\r\n")
    for rubbish in (b"", b"\x00\xff" * 5000, b"\x16\x03\x01\x02\x00", b"GET"):
        await raw(worker, rubbish)
    _, writer = await asyncio.open_connection("127.0.0.1", worker.control_port)
    writer.write(b"POST /release HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf")
    writer.transport.abort()
    assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
    assert b"Traceback" not in worker.log.read_bytes()[logged:]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_any_size_is_read_and_ignored(vast, worker, chunked):
    session_id, size = await session(vast, worker), 8 << 20

    async def chunks():
        for _ in range(size >> 16):
            yield bytes(1 << 16)

    body = chunks() if chunked else bytes(size)
    assert await post(f"{worker.control_url}/release", data=body) == (
        200,
        {"released": True, "session_ids": [session_id]},
    )


async def test_idle_connections_hold_up_nothing_and_are_dropped(worker):
    start = time.monotonic()
    idle = [await asyncio.open_connection("127.0.0.1", worker.control_port) for _ in range(100)]
    assert (await request("GET", f"{worker.control_url}/health"))[0] == 200
    assert time.monotonic() - start < 8
    assert await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in idle)), 30) == [b""] * 100
    assert time.monotonic() - start > 9
    for _, writer in idle:
        writer.close()


# null_worker.py: the drain


async def drained(worker, number=signal.SIGTERM):
    """Exit status after a signal, and the seconds that it took."""
    start = time.monotonic()
    worker.process.send_signal(number)
    return await exit_status(worker), time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hang", [False, True])
async def test_a_signal_ends_the_open_session_well(vast, number, hang):
    callbacks = Callbacks(hang)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        url = f"{origin}/closed"
        session_id = await session(vast, worker, on_close_route=url, on_close_payload={"job": 1})
        draining = asyncio.ensure_future(drained(worker, number))
        await eventually(lambda: callbacks.bodies)
        if hang:
            assert (await create(vast, worker))[0] == 503
        assert callbacks.bodies == [{"job": 1, "session_id": session_id}]
        status, seconds = await draining
        assert status == 0 and seconds < 8
        assert statuses(vast) == ["Success"]
        callbacks.let_go.set()


async def test_the_autoscaler_hears_of_the_end_even_when_a_report_is_under_way(vast):
    worker = await fresh(vast)
    await session(vast, worker)
    vast.report_delay = 1.5
    await eventually(lambda: worker.report["cur_load"] == 100)  # received, but not acknowledged yet
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 8
    assert [report["cur_load"] for report in vast.reports if report["id"] == worker.number][-1] == 0


async def test_an_idle_worker_goes_at_once(vast):
    worker = await fresh(vast)
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 5
    assert ended(vast) == []


async def test_the_drain_takes_no_longer_when_the_autoscaler_is_gone(vast):
    async with server() as origin:
        nobody = origin
    worker = vast.start_worker({"REPORT_ADDR": nobody, "UNSECURED": "true"})
    await eventually(lambda: reachable(worker))
    await eventually(lambda: created(vast, worker))
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 8


async def reachable(worker):
    with contextlib.suppress(aiohttp.ClientError):
        return (await request("GET", f"{worker.control_url}/health"))[0] == 200


async def test_a_second_signal_ends_it_at_once(vast):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        await session(vast, worker, on_close_route=f"{origin}/closed")
        worker.process.terminate()
        await eventually(lambda: callbacks.bodies)
        status, seconds = await drained(worker)
        assert status == 128 + signal.SIGTERM and seconds < 5
        callbacks.let_go.set()


def driver(folder, *lines):
    """A script that changes null_worker, then runs it."""
    script = folder / "driver.py"
    head = ("import sys, time", f"sys.path.insert(0, {str(HERE)!r})", "import null_worker")
    script.write_text("\n".join((*head, *lines, "sys.exit(null_worker.main())")))
    return str(script)


async def killed(*workers):
    for worker in workers:
        worker.process.kill()
        await exit_status(worker)


# The door: every route of both ports

HELD = {"session_id": str, "session_auth": dict}
SIGNED = {"auth_data": dict, **{f"auth_data.{name}": kind for name, kind in AUTH.items()}, "payload": dict}
READS = {  # path to the fields that it reads
    "/session/create": {**SIGNED, "payload.lifetime": "lifetime", "payload.on_close_route": "route"},
    "/session/get": {**HELD, "wait": "wait"},
    "/session/end": HELD,
    "/session/health": HELD,
    "/ping": {**SIGNED, "session_id": str},
    "/pyworker/update": {},
}
DOORS = [("port", path) for path in READS] + [("http_port", "/session/end")]
SPOILT = {
    str: [*WRONG[str], "x" * 4097, "é" * 2049],
    int: [*WRONG[int], 10**30, 1 << 63, -(1 << 63) - 1, math.nan],
    float: [*WRONG[float], -1, -0.5, 1e308, 1_000_001, math.nan, math.inf, -math.inf, 10**400],
    dict: [None, 1, True, "x", []],
    "lifetime": LIFETIMES,
    "route": [*ROUTES, "/" + "x" * 4096],
    "wait": [None, "1", True, [], {}, -1, 60.5, 10**400, math.nan, math.inf],
}
REQUIRED = (str, int, float, dict)
QUADRATIC = b"dn32ga" + b"a" * 200_000  # to Python's punycode decoder


def good(vast, worker, path):
    auth = vast.auth_data(worker)
    if path in ("/session/create", "/ping"):
        return {"auth_data": auth, "payload": {}, **({"session_id": "x"} if path == "/ping" else {})}
    return {"session_id": "x", "session_auth": auth}


def malformed(path="/session/create"):
    """(what, change of the body) for every way to spoil one field that a route reads."""
    for named, kind in READS[path].items():
        *parents, name = named.split(".")

        def spoil(body, change, parents=parents):
            change(body[parents[0]] if parents else body)

        if kind in REQUIRED:
            yield named, functools.partial(spoil, change=lambda fields, name=name: fields.pop(name))
        for wrong in SPOILT[kind]:
            yield (
                named,
                functools.partial(spoil, change=lambda fields, name=name, wrong=wrong: fields.update({name: wrong})),
            )


@contextlib.asynccontextmanager
async def honest_requests(vast, worker):
    """Meanwhile an honest dispatcher reserves and its consumer releases, again and again, each time within 2 s."""
    over, seconds = asyncio.Event(), []

    async def go_on():
        while not over.is_set() or not seconds:
            start = time.monotonic()
            session_id = await session(vast, worker)
            assert await release(worker) == (200, {"released": True, "session_ids": [session_id]})
            seconds.append(time.monotonic() - start)

    going_on = asyncio.create_task(go_on())
    try:
        yield
    finally:
        over.set()
        await going_on
    assert max(seconds) < 8, max(seconds)  # 2 by the contract, on a machine that isn't full of tests


@pytest.mark.parametrize(("port", "path"), DOORS)
async def test_nothing_malformed_gets_in_anywhere_or_leaves_a_trace(vast, worker, port, path):
    url, logged = f"http://127.0.0.1:{getattr(worker, port)}{path}", worker.log.stat().st_size
    await silence(vast)
    async with honest_requests(vast, worker):

        async def refused(expected, named="", **options):
            if path == "/pyworker/update" and expected == 422 and "Content-Encoding" not in options.get("headers", {}):
                expected, named = 401, "unauthorized"  # it reads a header only
            status, answer = await post(url, **options)
            assert status == expected and named in json.dumps(answer), (named, str(options)[:200], status, answer)

        for named, spoil in malformed(path):
            body = good(vast, worker, path)
            spoil(body)
            await refused(422, f'"{named}"', json=body)
        for expected, raw in [
            *RAW,
            (422, b"[" * 300_000),
            (422, b"[" * 9_000),
            (422, b"9" * 5000),
            (422, b"1.5"),
            (422, b"true"),
        ]:
            named = "over 1048576" if expected == 413 else "fields"
            await refused(expected, named, data=raw)

            async def chunks(raw=raw):
                yield raw

            await refused(expected, named, data=chunks())  # without a Content-Length
        await refused(422, '"body"', data=json.dumps(good(vast, worker, path)).encode("utf-16"))
        for encoding in ("gzip", "deflate"):
            await refused(422, '"body"', data=b"not compressed", headers={"Content-Encoding": encoding})
        for charset in ("punycode", "base64", "idna", "no-such", "utf-16", '"'):
            kind = {"Content-Type": f"application/json; charset={charset}"}
            await refused(422, '"body"', data=QUADRATIC, headers=kind)
            if path == "/session/get":  # whatever it calls itself, UTF-8 is read
                await refused(
                    400, "does not exist", data=json.dumps({"session_id": "x", "session_auth": {}}), headers=kind
                )
    assert b"Traceback" not in worker.log.read_bytes()[logged:]
    await eventually(lambda: worker.report["cur_load"] == 0 and ended(vast))
    assert set(statuses(vast)) == {"Success"}
    assert not any(report["rej_load"] or report["error_msg"] for report in vast.reports)


@functools.cache
def bomb(encoding, size=400 << 20):
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    return b"".join([packer.compress(b" " * (1 << 20)) for _ in range(size >> 20)] + [packer.flush()])


def memory(worker, what):
    return int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{worker.process.pid}/status").read_text())[1]) >> 10


async def test_bombs_on_every_route_are_refused_in_little_memory(vast, worker):
    bombs = {encoding: bomb(encoding) for encoding in ("gzip", "deflate")}
    Path(f"/proc/{worker.process.pid}/clear_refs").write_text("5")  # forget the peak
    before = memory(worker, "VmRSS")
    async with honest_requests(vast, worker):
        for port, path in DOORS:
            url = f"http://127.0.0.1:{getattr(worker, port)}{path}"
            for encoding, data in bombs.items():
                assert (await post(url, data=data, headers={"Content-Encoding": encoding}))[0] == 413, (path, encoding)
    assert memory(worker, "VmHWM") - before < 48


async def test_what_is_inflated_is_only_what_is_read(vast, worker):
    """A path that isn't there takes no body; aiohttp would inflate one all the same, to throw it away."""
    before = cpu_seconds(worker)
    headers = {"Content-Encoding": "gzip"}
    for _ in range(5):
        assert (await statuses_of(worker, "/nope", data=bomb("gzip"), headers=headers))[0] == 404
    assert cpu_seconds(worker) - before < 1.5  # 5 times 0.9 otherwise
    good = gzip.compress(json.dumps({"session_id": "x", "session_auth": {}}).encode())
    assert (await post(f"{worker.url}/session/get", data=good, headers=headers))[0] == 400  # read, and no such session


async def statuses_of(worker, path, **options):
    async with aiohttp.ClientSession() as http, http.post(worker.url + path, **options) as response:
        return response.status, await response.text()


def cpu_seconds(worker):
    fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_body_that_does_not_come_is_not_waited_for(vast, tmp_path):
    worker = await fresh(vast, script=driver(tmp_path, "null_worker.IDLE_CONNECTION = 1"))
    head = b"POST /session/end HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(head)
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408 ")
    writer.close()
    await killed(worker)


async def test_many_small_values_are_refused_before_they_are_made(vast, worker):
    dense = b'{"session_id": "x", "session_auth": {"a": [%s]}}' % b",".join([b"{}"] * 20_000)
    assert (await post(f"{worker.url}/session/get", data=dense))[0] == 422


async def test_a_worker_may_open_as_many_files_as_it_is_allowed(vast):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
    try:
        worker = await fresh(vast)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert re.search(r"Max open files +(\d+) +\1 ", Path(f"/proc/{worker.process.pid}/limits").read_text())
    await killed(worker)


async def test_out_of_open_files_a_worker_stays_well_and_its_log_small(vast, tmp_path):
    async def health(_):
        response = web.Response()
        response.force_close()  # each check takes a connection of its own
        return response

    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    async with server(web.get("/health", health)) as origin:
        lines = (limit, "null_worker.HEALTH_CHECK = 0.5")
        worker = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/health"}, script=driver(tmp_path, *lines))
        logged = worker.log.stat().st_size
        idle = [await asyncio.open_connection("127.0.0.1", worker.port) for _ in range(150)]
        await eventually(lambda: "out of system resource" in lines_since(worker, logged))
        await asyncio.sleep(2.5)  # some health checks
        for _, writer in idle:
            writer.close()
        await eventually(lambda: created(vast, worker))
        assert worker.report["error_msg"] == "" and len(lines_since(worker, logged)) < 10_000
        assert "Traceback" not in lines_since(worker, logged)
    await killed(worker)


# The log

NASTY = (
    "x\nFORGED\rFORGED\r\nFORGED\x85FORGED\u2028FORGED\u2029FORGED\x0bFORGED\x0cFORGED\x1cFORGED\x1b[2K\x1b[1GFORGED"
)


async def on_the_wire(port, *parts):
    """What a port sends back for bytes on the wire, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 30)
        return b""
    finally:
        writer.close()


def lines_since(worker, logged):
    return worker.log.read_bytes()[logged:].decode(errors="replace")


WIRE = [
    b"garbage\r\n\r\n",
    b"GET / HTTP/x.y\r\n\r\n",
    b"POST /session/create HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"POST /session/create HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /session/get HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
    b"POST /session/get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n",
    b"POST /session/end HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8bxx",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Type: \xff\xfe; charset=\xff\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nExpect: the-unexpected\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nbad name: x\r\n\r\n",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nx: \x00\nFORGED\x85\r\n\r\n",
    b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"\x16\x03\x01\x02\x00" * 100,
    b"\x00\xff" * 5000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"FORGED\nFORGED\x85FORGED\x1b[2K\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    b"",
]


async def test_nothing_that_a_stranger_sends_starts_a_line_of_the_log(vast, worker):
    logged = worker.log.stat().st_size
    async with aiohttp.ClientSession() as http:
        for port, path in DOORS:
            url = f"http://127.0.0.1:{getattr(worker, port)}{path}"
            for named, kind in READS[path].items():
                body = good(vast, worker, path)
                *parents, name = named.split(".")
                (body[parents[0]] if parents else body)[name] = NASTY if kind != "route" else "/" + NASTY
                options = {
                    "params": {NASTY: NASTY},
                    "headers": {"User-Agent": "x\x85FORGED\u2028FORGED", "Authorization": "x\x85FORGED"},
                }
                async with http.post(url, json=body, **options) as response:
                    assert 200 <= response.status < 500
                    if response.status == 201:
                        assert (await release(worker))[1]["released"]
                # The log names a refused signature once a second only: let each of them be the one.
                if named.startswith("auth_data.") and kind is str:
                    await asyncio.sleep(1.05)
        for port in (worker.port, worker.http_port):
            for sent in WIRE:
                answer = await on_the_wire(port, sent)
                assert re.match(rb"HTTP/1.[01] 4\d\d |$", answer), (sent[:100], answer)
    log = lines_since(worker, logged)
    assert log.count("the signature does not verify") > 2 and "\x1b" not in log and "Traceback" not in log
    for line in log.splitlines():  # at \x85 and \u2028 too
        assert re.match(r"20\d\d-\d\d-\d\d \S+ (INFO|WARNING|ERROR) [a-z]", line), line


async def test_a_thousand_refused_requests_write_little(vast, worker):
    auth = {**vast.auth_data(worker), "signature": "x" * 4000}
    unsigned = {"auth_data": auth, "payload": {}, "session_id": NASTY}
    logged = worker.log.stat().st_size
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=20)) as http:

        async def refused(number):
            path, options, expected = [
                ("/session/create", {"json": unsigned}, 401),
                ("/ping", {"json": unsigned}, 401),
                ("/session/get", {"json": {"session_id": [NASTY]}}, 422),
                ("/session/end", {"data": b" " * (1 << 21)}, 413),
                (f"/{'x' * 5000}", {"json": {}}, 404),
                ("/session/end", {"json": {"session_id": NASTY * 9, "session_auth": {}}}, 400),
                ("/pyworker/update", {"headers": {"Authorization": "x" * 5000}}, 401),
                (None, WIRE[number // 10 % len(WIRE)], None),
                (None, WIRE[number // 10 % len(WIRE)], None),
                ("/session/health", {"data": b"[" * 10_000}, 422),
            ][number % 10]
            if path is None:
                assert not re.match(rb"HTTP/1.[01] [^4]", await on_the_wire(worker.port, options))
            else:
                async with http.post(worker.url + path, **options) as response:
                    assert response.status == expected

        await asyncio.gather(*map(refused, range(1000)))
    log = lines_since(worker, logged)
    assert 0 < len(log) < 100 << 10 and "Traceback" not in log


async def test_without_a_master_token_no_update_is_taken_and_an_empty_switch_is_unset(vast):
    worker = vast.start_worker({"MASTER_TOKEN": "", "UNSECURED": ""})
    await eventually(lambda: reachable(worker))
    await eventually(lambda: created(vast, worker))  # it is ready, though LocalVast takes no report without the token
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer "}, {"Authorization": "Bearer x"}):
        status, answer = await post(f"{worker.url}/pyworker/update", headers=headers)
        assert (status, answer) == (403, {"error": "MASTER_TOKEN is not set"})
    assert (await create(vast, worker, auth={**vast.auth_data(worker), "signature": ""}))[0] == 401
    await killed(worker)


# Ready, sick, restarted


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("503", "the health check answers 503"),
        ("204", "the health check answers 204"),
        ("hangs", "the health check does not answer within 1 s"),
        ("closes", "the health check fails: ServerDisconnectedError: Server disconnected"),
        ("resets", "the health check fails: ClientOSError: [Errno 104] Connection reset by peer"),
    ],
)
async def test_a_sick_consumer_is_reported_for_what_it_does_and_takes_no_session(vast, tmp_path, how, text):
    well, sick_at = asyncio.Event(), []
    well.set()

    async def health(request):
        if well.is_set():
            return web.Response()
        sick_at.append(time.monotonic())
        if how == "hangs":
            await well.wait()
        if how == "resets":
            linger = struct.pack("ii", 1, 0)
            request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if how in ("closes", "resets"):
            request.transport.abort()
        return web.Response(status=204 if how == "204" else 503)

    async with server(web.get("/health", health)) as origin:
        script = driver(tmp_path, "null_worker.HEALTH_CHECK = 1")
        worker = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/health"}, script=script)
        worker.stopping = True  # so that LocalVast doesn't stop it for its error
        well.clear()
        await eventually(lambda: worker.report["error_msg"])
        assert worker.report["error_msg"] == text and time.monotonic() - sick_at[0] < 8
        assert await create(vast, worker) == (503, {"error": "no sessions now: broken"})
        well.set()
        vast.reports.clear()
        await asyncio.sleep(2.2)  # two more looks, were there any
        assert await create(vast, worker) == (503, {"error": "no sessions now: broken"})
        worker.process.terminate()
        assert await exit_status(worker) == 0
    assert {report["error_msg"] for report in vast.reports if report["id"] == worker.number} <= {text}


@pytest.mark.parametrize(("seconds", "before"), [(0, "well"), (4, "503"), (4, "refuses"), (13, "refuses")])
async def test_a_worker_is_ready_within_two_seconds_of_its_consumer(vast, seconds, before):
    asked, answer = [], {"health": 503 if before == "503" else 200}

    async def health(_request):
        asked.append(time.monotonic())
        return web.Response(status=answer["health"])

    app, start, held = web.Application(), time.monotonic(), hold_port()
    port = held.getsockname()[1]
    app.add_routes([web.get("/health", health)])
    runner = web.AppRunner(app)
    await runner.setup()
    worker = vast.start_worker({"BACKEND_HEALTH_URL": f"http://127.0.0.1:{port}/health"})
    if before == "refuses":
        await asyncio.sleep(seconds)
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    held.close()
    if before == "503":
        await asyncio.sleep(seconds)
    answer["health"], well = 200, time.monotonic()
    assert not worker.report.get("max_perf") and well - start >= seconds
    await eventually(lambda: worker.state == "IDLE")
    since = well if seconds else asked[0]  # it takes longer to start than a consumer that is well at once
    assert time.monotonic() - since < 2 + 3  # 10 by the framework alone
    await session(vast, worker)
    await killed(worker)
    await runner.cleanup()


async def test_a_consumer_that_is_never_well_is_the_workers_error():
    async with server(consumer_health({"health": 503})) as origin, LocalVast(control_port=None) as vast:
        environment = {"BACKEND_HEALTH_URL": f"{origin}/health", "BACKEND_START_TIMEOUT": "2"}
        worker = vast.start_worker(environment)
        await eventually(lambda: worker.report.get("error_msg"))
        assert "within 2 s: the health check answers 503" in worker.report["error_msg"]
        assert not worker.report["max_perf"] and await exit_status(worker) == 0


def successor(vast, worker, **options):
    """A worker on another's ports, started at once."""
    heir = vast.start_worker(**options)
    heir.port, heir.http_port, heir.control_port = worker.ports  # its process starts one step of the loop later
    return heir


async def test_restarted_three_times_with_a_session_open_it_is_ready_each_time(vast, tmp_path):
    callbacks = Callbacks(hang=True)
    script = driver(tmp_path, "assert null_worker.PORT_WAIT >= null_worker.DRAIN + 2", "null_worker.DRAIN = 3")
    async with server(callbacks.route) as origin:
        worker = await fresh(vast, script=script)
        for _ in range(3):
            await session(vast, worker, on_close_route=f"{origin}/closed")
            worker.process.terminate()
            heir = successor(vast, worker, script=script)
            await eventually(lambda heir=heir: heir.state == "IDLE")
            assert worker.process.returncode == 0
            worker = heir
        await session(vast, worker)
        callbacks.let_go.set()
        await killed(worker)
    assert len(callbacks.bodies) == 3 and not any(report["error_msg"] for report in vast.reports)


async def test_a_killed_worker_is_ready_again_on_its_ports(vast):
    worker = await fresh(vast)
    await session(vast, worker)
    worker.process.kill()
    heir = successor(vast, worker)
    await eventually(lambda: heir.state == "IDLE")
    assert heir.url == worker.url and not heir.report["error_msg"]
    await session(vast, heir)
    await killed(heir)


async def test_a_port_that_stays_taken_is_the_workers_error(tmp_path):
    script = driver(tmp_path, "null_worker.PORT_WAIT = 1")
    async with LocalVast(control_port=None) as vast, contextlib.AsyncExitStack() as stack:
        workers = []
        for name in ("port", "http_port", "control_port"):
            origin = await stack.enter_async_context(server())
            workers.append(vast.start_worker(script=script))
            setattr(workers[-1], name, int(origin.rpartition(":")[2]))
        for worker in workers:
            await eventually(lambda worker=worker: worker.report.get("error_msg"))
            assert "address already in use" in worker.report["error_msg"].lower()
            assert await exit_status(worker) == 0


# The drain


async def test_whatever_hangs_the_drain_ends_in_time_and_says_what_was_not_done(tmp_path):
    blocking = driver(tmp_path, "async def block(**_): time.sleep(60)", "null_worker._pong = block")
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin, LocalVast(control_port=None) as vast:
        blocked = vast.start_worker(script=blocking)
        workers = [blocked, deserted, mute] = [blocked, vast.start_worker(), vast.start_worker()]
        for worker in workers:
            await eventually(lambda worker=worker: worker.state == "IDLE")
        auth = vast.auth_data(blocked)
        session_id = await session(vast, blocked, auth=auth)
        left_open = await session(vast, deserted, on_close_route=f"{origin}/closed")
        await session(vast, mute)
        await eventually(lambda: all(worker.report["cur_load"] == 100 for worker in workers))
        vast.report_delay = 30
        ping = {"auth_data": auth, "session_id": session_id, "payload": {}}
        pinging = asyncio.create_task(post(f"{blocked.url}/ping", json=ping))
        look = {"session_id": session_id, "session_auth": auth}

        async def is_blocked():
            try:
                await asyncio.wait_for(post(f"{blocked.url}/session/get", json=look), 1)
            except asyncio.TimeoutError:
                return True

        await eventually(is_blocked)
        for status, seconds in await asyncio.gather(*map(drained, workers)):
            assert status == 0 and seconds < 8
        for worker, undone in (
            (blocked, "anything: the event loop is blocked"),
            (deserted, f"the on_close callbacks of session={left_open}"),
            (mute, "the last report to the autoscaler"),
        ):
            assert worker.log.read_text().splitlines()[-1].endswith(f"not done: {undone}")
        callbacks.let_go.set()
        await asyncio.gather(pinging, return_exceptions=True)


async def catches(process, number):
    """Wait until a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status")
    await eventually(lambda: int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_during_the_start_ends_it_soon_without_a_traceback(tmp_path, number):
    async def ended_after(delay):
        held = [hold_port() for _ in range(3)]
        port, http_port, control_port = (each.getsockname()[1] for each in held)
        environment = BARE | ON_VAST | {"WORKER_PORT": str(port), f"VAST_TCP_PORT_{port}": "1"}
        environment |= {"WORKER_HTTP_PORT": str(http_port), "NULL_CONTROL_PORT": str(control_port)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, HERE / "null_worker.py", env=environment, cwd=tmp_path, stderr=subprocess.PIPE
        )
        try:
            if number == signal.SIGINT:  # until then Python says KeyboardInterrupt
                await catches(process, signal.SIGTERM)
            await asyncio.sleep(delay)
            with contextlib.suppress(ProcessLookupError):  # the status will say why
                process.send_signal(number)
            start = time.monotonic()
            _, errors = await asyncio.wait_for(process.communicate(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            for each in held:
                each.close()
        return delay, process.returncode, time.monotonic() - start, errors.decode()

    for delay, status, seconds, errors in await asyncio.gather(*map(ended_after, (0.05, 0.3, 0.8, 1.5, 2.5))):
        assert status in (0, -number) and "Traceback" not in errors and seconds < 30, (delay, status, seconds, errors)


async def test_a_drain_waits_for_a_session_that_is_just_closing(vast):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        await session(vast, worker, on_close_route=f"{origin}/closed")
        releasing = asyncio.create_task(release(worker))
        await eventually(lambda: callbacks.bodies)
        await eventually(lambda: statuses(vast) == ["Success"] and worker.report["cur_load"] == 0)  # all told
        draining = asyncio.create_task(drained(worker))
        await eventually(lambda: "draining" in worker.log.read_text())
        assert (await create(vast, worker))[0] == 503
        await asyncio.sleep(1)
        assert worker.process.returncode is None
        callbacks.let_go.set()
        status, seconds = await draining
        assert status == 0 and seconds < 6 and callbacks.answered == [True]
        assert "not done" not in worker.log.read_text()
        await asyncio.gather(releasing, return_exceptions=True)


# Reservations


async def test_a_stale_benchmark_is_not_believed(vast):
    worker = vast.start_worker()
    Path(worker.folder, ".has_benchmark").write_text("99.9\n")  # before its process starts
    await eventually(lambda: worker.state == "IDLE")
    assert worker.report["max_perf"] == 100
    await killed(worker)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_creator_that_is_gone_leaves_the_worker_free(vast, worker, reset):
    auth = vast.auth_data(worker)
    body = json.dumps({"auth_data": auth, "payload": {"lifetime": 600}}).encode()
    worker.process.send_signal(signal.SIGSTOP)
    try:
        creator = socket.create_connection(("127.0.0.1", worker.port))
        creator.sendall(b"POST /session/create HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if reset:
            creator.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        creator.close()
    finally:
        worker.process.send_signal(signal.SIGCONT)

    async def is_free():  # for a moment it may not have heard of the reset yet
        return (await create(vast, worker))[0] == 201

    await eventually(is_free)
    assert (await release(worker))[1]["released"]
    assert (await request("GET", f"{worker.control_url}/session"))[2] == {"session_id": None}
    await eventually(lambda: worker.report["cur_load"] == 0)


async def test_what_happens_while_a_report_is_under_way_is_in_the_next(vast, worker):
    await silence(vast)
    vast.report_delay, count, rejected = 0.3, 1200, 0
    async with aiohttp.ClientSession() as http:
        for number in range(count):
            body = {"auth_data": vast.auth_data(worker), "payload": {"lifetime": 60}}
            async with http.post(f"{worker.url}/session/create", json=body) as response:
                assert response.status == 201
            if number % 10 == 0:
                async with http.post(f"{worker.url}/session/create", json=body) as response:
                    assert response.status == 429
                    rejected += 1
            async with http.post(f"{worker.control_url}/release") as response:
                assert (await response.json())["released"]

    def told(what):
        return sum(report[what] for report in vast.reports if report["id"] == worker.number)

    def sums():
        return told("new_load"), told("cur_perf"), told("rej_load")

    await eventually(lambda: sums() == (100 * count, 100 * count, 100 * rejected), timeout=8)
    await silence(vast)
    assert sums() == (0, 0, 0)  # and nothing twice


# The SDK's names

BACKEND = "vastai.serverless.server.lib.backend"
METRICS = "vastai.serverless.server.lib.metrics"
TYPES = "vastai.serverless.server.lib.data_types"
PRIVATE = [  # what the worker uses of the SDK: module, class or "", name
    *(("vastai", "", name) for name in ("BenchmarkConfig", "HandlerConfig", "Worker", "WorkerConfig")),
    *((BACKEND, "", name) for name in ("AuthData", "log", "BENCHMARK_INDICATOR_FILE")),
    (METRICS, "", "METRICS_UPDATE_INTERVAL"),
    *(("vastai.serverless.server.worker", "Worker", name) for name in ("backend", "routes", "run_async")),
    *(
        (BACKEND, "Backend", f"_Backend__{name}")
        for name in ("check_signature", "close_session", "run_session_on_close")
    ),
    *((BACKEND, "Backend", f"session_{name}_handler") for name in ("create", "get", "end", "health")),
    *((BACKEND, "Backend", name) for name in ("pyworker_update_handler", "backend_errored", "metrics")),
    *((BACKEND, "Backend", name) for name in ("mtoken", "unsecured", "_pubkey", "sessions", "session_metrics")),
    *((BACKEND, "Backend", name) for name in ("model_server_url",)),
    *((METRICS, "Metrics", name) for name in ("_request_success", "_request_end")),
    *((METRICS, "Metrics", name) for name in ("update_pending", "model_metrics")),
    *(
        (TYPES, "ModelMetrics", f"workload_{name}")
        for name in ("served", "received", "cancelled", "errored", "rejected")
    ),
    *(
        (TYPES, "ModelMetrics", name)
        for name in ("empty", "requests_deleting", "error_msg", "workload_processing", "reset")
    ),
    *((TYPES, "Session", name) for name in ("session_id", "lifetime", "expiration")),
    (TYPES, "AuthData", "from_json_msg"),
    *(
        ("vastai.serverless.server.worker", "HandlerConfig", name)
        for name in ("allow_parallel_requests", "workload_calculator")
    ),
    *(("version", "", version) for version in ("1.2.2", "2.0.0", "0.9", "unknown")),
]
WITHOUT = """
import importlib, importlib.metadata, json, os, signal, sys
sys.path.insert(0, HERE)
import null_worker
from vastai.serverless.server import worker

def remove(module, owner, name):
    if module == "version":
        importlib.metadata.version = lambda _: name
        return
    module = importlib.import_module(module)
    if not owner:
        return delattr(module, name)
    owner = getattr(module, owner)
    if name in vars(owner):
        delattr(owner, name)
    getattr(owner, "__dataclass_fields__", {}).pop(name, None)
    init = owner.__init__
    def shorn(self, *given, **named):
        if name in named:
            raise TypeError(f"unexpected argument {name!r}")
        init(self, *given, **named)
        vars(self).pop(name, None)
    owner.__init__ = shorn

children = []
for number, what in enumerate(json.load(sys.stdin)):
    if not (child := os.fork()):
        output = os.open(str(number), os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        remove(*what)
        signal.alarm(12)  # it is running, which it should not
        os._exit(null_worker.main())
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_every_private_name_of_the_sdk_is_checked_at_the_start(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"HERE = {str(HERE)!r}\n{WITHOUT}"],
        input=json.dumps(PRIVATE),
        env=BARE | ON_VAST,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    installed, wrong = importlib.metadata.version("vastai"), {}
    for number, (what, status) in enumerate(zip(PRIVATE, done.stdout.split(), strict=True)):
        version = what[2] if what[0] == "version" else installed
        lines = (tmp_path / str(number)).read_text().splitlines()
        said = len(lines) == 1 and lines[0].startswith(f"null_worker: vastai-sdk {version} is not known to work")
        if status != "2" or not said:
            wrong[what] = status, lines[-1:]
    assert not wrong


# The lease


async def lease(worker, query=""):
    status, _, answer = await request("GET", f"{worker.control_url}/session{query}")
    assert status == 200
    return answer


async def renew(worker, session_id=None):
    return await post(f"{worker.control_url}/renew{'' if session_id is None else f'?session_id={session_id}'}")


async def test_renewals_leave_one_lifetime_and_only_the_named_sessions(vast, worker):
    assert await renew(worker) == (200, {"renewed": False, "reason": "no active session"})
    stale = await session(vast, worker)
    await release(worker, stale)
    session_id = await session(vast, worker, lifetime=60)
    for _ in range(10):
        status, answer = await renew(worker, session_id)
        assert (status, answer["renewed"], answer["session_id"]) == (200, True, session_id)
        assert 59.9 < answer["time_to_live"] <= 60.01
    before = (await lease(worker))["time_to_live"]
    for other in (stale, ""):
        assert await renew(worker, other) == (200, {"renewed": False, "reason": "session ID is not active"})
    assert (await lease(worker))["time_to_live"] < before
    assert 59.9 < (await renew(worker))[1]["time_to_live"] <= 60.01


@pytest.mark.parametrize("query", ["?id=x", "?session_id=x&session_id=y", "?session_id=x&more=1", "?wait=1"])
@pytest.mark.parametrize("path", ["/renew", "/release"])
async def test_a_misspelt_fence_renews_and_ends_nothing(vast, worker, path, query):
    session_id = await session(vast, worker)
    before = (await lease(worker))["time_to_live"]
    assert await post(f"{worker.control_url}{path}{query}") == (
        400,
        {"error": "the only parameter is session_id, once"},
    )
    assert (await lease(worker))["session_id"] == session_id and (await lease(worker))["time_to_live"] < before


async def test_a_session_lives_as_long_as_it_is_renewed_and_a_ping_is_not_undone(vast):
    renewed, left, pinged = vast.workers.values()
    start, lifetime, auth = time.monotonic(), 4, vast.auth_data(pinged)
    session_id = await session(vast, renewed, lifetime=lifetime)
    await session(vast, left, lifetime=lifetime)
    extended = await session(vast, pinged, auth=auth, lifetime=lifetime)
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
    assert await lease(worker, "?wait=1.5") == {"session_id": None} and 1.4 < time.monotonic() - start < 10
    session_id = await session(vast, worker, lifetime=60)
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
    session_id = await session(vast, worker)
    start = time.monotonic()
    assert {answer["session_id"] for answer in await asyncio.gather(*waiting)} == {session_id}
    assert time.monotonic() - start < 5  # 1 by the contract, on a machine that isn't full of tests
    assert await release(worker) == (200, {"released": True, "session_ids": [session_id]})
    waiting = [asyncio.create_task(lease(worker, "?wait=5")) for _ in range(100)]
    async with honest_requests(vast, worker):
        await eventually(lambda: all(task.done() for task in waiting))
    await asyncio.gather(*waiting)


HANDS_ON = Answer(299, {})


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/health", 200),
        ("GET", "/session", ("/session", None, 0.0)),
        ("GET", "/session?wait=0", ("/session", None, 0.0)),
        ("GET", "/session?wait=60", ("/session", None, 60.0)),
        ("GET", "/session?wait=2.5", ("/session", None, 2.5)),
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
        ("POST", "/renew", ("/renew", None, 0.0)),
        ("POST", "/renew?session_id=a%20b", ("/renew", "a b", 0.0)),
        ("POST", "/release?session_id=", ("/release", "", 0.0)),
        ("POST", "/release?session_id=x&session_id=x", 400),
        ("POST", "/release?wait=1", 400),
        ("GET", "/session/", 404),
        ("GET", "", 404),
    ],
)
def test_what_a_request_to_the_control_server_asks_for(method, target, expected):
    asked = []
    answer = control(lambda *wanted: asked.append(wanted) or HANDS_ON, True, method, target)
    if isinstance(expected, tuple):
        assert (asked, answer) == ([expected], HANDS_ON)
    else:
        assert (asked, answer.status) == ([], expected) and answer.body
        assert bool(answer.allow) == (expected == 405)
    if target == "/health":
        assert control(None, False, method, target).status == 404


AUTH_OK = {"cost": 1e6, "endpoint": "é" * 2048, "reqnum": -(1 << 63), "request_idx": (1 << 63) - 1, "signature": ""}
CREATE_OK = {"auth_data": {**AUTH_OK, "url": "", "more": [1]}, "payload": {}}


@pytest.mark.parametrize(
    ("path", "message", "found"),
    [
        ("/session/create", CREATE_OK, []),
        ("/session/create", {**CREATE_OK, "payload": {"lifetime": 1e-3, "on_close_route": None, "x": 1}}, []),
        ("/session/create", {**CREATE_OK, "payload": {"on_close_route": "https://a/b"}}, []),
        ("/session/create", {}, ["auth_data", "payload"]),
        ("/session/create", {"auth_data": {}, "payload": []}, [*(f"auth_data.{name}" for name in AUTH), "payload"]),
        (
            "/session/create",
            {**CREATE_OK, "payload": {"lifetime": 0, "on_close_route": "x"}},
            ["payload.lifetime", "payload.on_close_route"],
        ),
        ("/session/get", {"session_id": "", "session_auth": {}}, []),
        ("/session/get", {"session_id": "", "session_auth": {}, "wait": 60}, []),
        (
            "/session/get",
            {"session_id": "x" * 4097, "session_auth": [], "wait": 61},
            ["session_id", "session_auth", "wait"],
        ),
        ("/session/end", {"session_id": "\ud800" * 1366, "session_auth": {}}, ["session_id"]),
        ("/session/end", {"session_id": "\ud800" * 1365, "session_auth": {}, "wait": "x"}, []),
        ("/ping", CREATE_OK, ["session_id"]),
        ("/ping", {**CREATE_OK, "session_id": "x"}, []),
        ("/pyworker/update", {}, []),
    ],
)
def test_what_is_wrong_with_a_request_is_named(path, message, found):
    assert sorted(problems(message, CHECKED[path])) == sorted(found)


# Looks that wait


async def test_a_look_that_waits_is_answered_when_the_session_has_ended(vast, worker):
    auth = vast.auth_data(worker)
    session_id = await session(vast, worker, auth=auth)
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
    assert (status, answer) == (400, {"error": "session does not exist"}) and time.monotonic() - start < 8
    status, seconds, _ = await look(wait=30)
    assert status == 400 and seconds < 8


@pytest.mark.parametrize("hang", [False, True])
async def test_a_look_that_waits_is_told_of_the_end_when_the_worker_is_stopped(vast, hang):
    callbacks = Callbacks(hang)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        auth = vast.auth_data(worker)
        session_id = await session(vast, worker, auth=auth, on_close_route=f"{origin}/closed")
        look = {"session_id": session_id, "session_auth": auth, "wait": 30}
        looking = [asyncio.create_task(post(f"{worker.url}/session/get", json=look)) for _ in range(10)]
        waiting = asyncio.create_task(post(f"{worker.url}/session/get", json={**look, "wait": 0.5}))
        assert (await waiting)[0] == 200
        start = time.monotonic()
        worker.process.terminate()
        assert [status for status, _ in await asyncio.gather(*looking)] == [400] * 10
        assert time.monotonic() - start < 5
        callbacks.let_go.set()
        assert await exit_status(worker) == 0


async def test_a_release_that_takes_too_long_says_so_and_the_worker_is_free(vast, tmp_path):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast, script=driver(tmp_path, "null_worker.RELEASE_WAIT = 1"))
        assert await lease(worker, "?wait=2.5") == {"session_id": None}  # it may wait as long as it asked for
        await session(vast, worker, on_close_route=f"{origin}/closed")
        status, answer = await release(worker)
        assert status == 504 and re.search("/release took over 1 s", answer["reason"])
        await session(vast, worker)
        callbacks.let_go.set()
        await eventually(lambda: callbacks.answered == [True])
        await killed(worker)


# null_client.py: reserve()


@pytest.mark.parametrize(
    ("time_to_live", "lifetime", "due"), [(120, 120, 60), (180, 120, 120), (60, 120, 0), (10, 120, -50), (1, 1, 0.5)]
)
def test_a_keep_alive_waits_for_the_last_half_of_a_lifetime(time_to_live, lifetime, due):
    assert keep_alive_due(time_to_live, lifetime) == due


@contextlib.asynccontextmanager
async def endpoint_of(vast, **options):
    async with vast.client(max_poll_interval=1.0, **options) as client:
        yield await client.get_endpoint(vast.endpoint_name)


def worker_at(vast, url):
    return next(worker for worker in list(vast.workers.values()) if worker.url == url)


def holder(vast, reservation):
    return worker_at(vast, reservation.url)


async def expiration(reservation):
    """The worker's own word on when the session expires, in its clock, which here is ours."""
    about = {"session_id": reservation.session_id, "session_auth": reservation.auth_data}
    return (await post(f"{reservation.url}/session/get", json=about))[1]["expiration"]


async def test_the_holder_learns_that_the_worker_let_go(vast):
    async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
        assert not await reservation.ended(timeout=0)
        await release(holder(vast, reservation))
        assert await asyncio.wait_for(reservation.ended(), 10) is True
    await eventually(lambda: statuses(vast) == ["Success"])


@pytest.mark.parametrize("how", ["end", "exception", "cancelled", "cancelled twice"])
async def test_a_session_is_closed_however_the_block_ends(vast, how, caplog):
    async def hold(endpoint, held):
        async with reserve(endpoint, on_close_payload={"job": 1}) as reservation:
            held.set_result(holder(vast, reservation))
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
        assert holding.cancelled() or isinstance(holding.exception(), KeyError) == (how == "exception")
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})
    assert not caplog.records


async def test_a_session_that_is_just_being_created_is_not_left_behind(vast):
    for worker in list(vast.workers.values())[1:]:
        await session(vast, worker)
        await eventually(lambda worker=worker: worker.report["cur_load"] == 100)
    (worker,) = [worker for worker in list(vast.workers.values()) if worker.free]
    async with endpoint_of(vast) as endpoint:
        worker.process.send_signal(signal.SIGSTOP)
        opening = asyncio.ensure_future(reserve(endpoint).__aenter__())
        await eventually(lambda: worker.promised_to)  # routed; its create is on the way to the frozen worker
        await asyncio.sleep(0.3)
        opening.cancel()
        asyncio.get_running_loop().call_later(0.1, worker.process.send_signal, signal.SIGCONT)
        await asyncio.wait({opening})
        assert opening.cancelled()
        await eventually(lambda: statuses(vast) == ["Success"])
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


async def test_a_reservation_that_waits_gets_the_worker_that_becomes_free(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        first, *_ = [await stack.enter_async_context(reserve(endpoint)) for _ in range(WORKERS)]
        vast.polls = 0
        waiting = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
        await eventually(lambda: vast.polls > 3)
        assert not waiting.done()
        start = time.monotonic()
        await release(holder(vast, first))
        assert (await asyncio.wait_for(waiting, 20)).url == first.url
        assert time.monotonic() - start < 10  # about 1 for the worker's report and 1 for the poll


async def test_a_reservation_waits_through_429(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(reserve(endpoint))
        await eventually(lambda: all(worker.report["cur_load"] == 100 for worker in list(vast.workers.values())))
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


async def test_a_worker_that_freezes_for_less_than_its_time_to_live_is_not_given_up(vast):
    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=6) as reservation:
        worker = holder(vast, reservation)
        worker.process.send_signal(signal.SIGSTOP)
        try:
            await eventually(lambda: reservation.unreachable)
            assert not await reservation.ended(timeout=1)
        finally:
            worker.process.send_signal(signal.SIGCONT)
        await eventually(lambda: not reservation.unreachable)
        assert not await reservation.ended(timeout=4)
        assert await expiration(reservation) - time.time() < 1.5 * 6


@pytest.mark.parametrize(
    ("lifetime", "bound"),
    [(3, 15), (600, 40)],  # by its time to live; by five refused looks, two seconds apart, long before that is over
)
async def test_a_worker_that_is_killed_is_lost(vast, lifetime, bound):
    async with endpoint_of(vast) as endpoint:
        start = time.monotonic()
        with pytest.raises(WorkerLost, match="can't be reached"):
            async with reserve(endpoint, lifetime=lifetime) as reservation:
                worker = holder(vast, reservation)
                worker.process.kill()
                await exit_status(worker)
                with hold_port(worker.port):
                    await reservation.ended()
        assert time.monotonic() - start < bound


async def test_another_server_at_the_workers_address_is_not_taken_for_it(vast):
    async with endpoint_of(vast) as endpoint:
        with pytest.raises(WorkerLost, match="HTTP 404"):
            async with reserve(endpoint, lifetime=3) as reservation:
                worker = holder(vast, reservation)
                worker.process.kill()
                await exit_status(worker)
                runner = web.AppRunner(web.Application(), shutdown_timeout=0.1)
                await runner.setup()
                try:
                    await web.TCPSite(runner, "127.0.0.1", worker.port, reuse_address=True).start()
                    await reservation.ended()
                finally:
                    await runner.cleanup()


ROUTE, CREATE, LOOK, PING, END = "/route/", "/session/create", "/session/get", "/ping", "/session/end"
GONE = {"error": "session does not exist"}


class Stub:
    """The web API, the router and any number of workers on one port, which are slow, wrong and absent on demand.

    `fate` decides what becomes of a request: None, the truth; an answer (status, body); "reset", dropped; "lost", dropped
    after it took effect; a number, the truth, told so many seconds after it took effect. It may be a coroutine function.
    """

    def __init__(self):
        self.fate = lambda route, message: None
        self.free, self.waits = True, True  # a worker is; the workers know `wait`
        self.sessions, self.asked, self.numbers = {}, [], itertools.count(1)
        self._connections, self._server = set(), None

    async def __aenter__(self):
        await self.listen()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def listen(self, port=0):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, backlog=512)

    async def absent(self, seconds):
        port = int(self.url.rpartition(":")[2])
        self._server.close()
        with hold_port(port):
            await asyncio.sleep(seconds)
            await self.listen(port)

    def times(self, route):
        return [when for when, asked, _ in self.asked if asked == route]

    def said(self, route):
        return [message for _, asked, message in self.asked if asked == route]

    def left(self):
        """Sessions that a worker could still be told to close: not those whose only mention got lost here."""
        now = time.time()
        return [session for session in self.sessions.values() if not session.over.is_set() and session.expiration > now]

    async def _connected(self, reader, writer):
        self._connections.add(task := asyncio.current_task())
        task.add_done_callback(self._connections.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = re.search(r"content-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b"{}"
                answer = await self._answer(head.split()[1].partition("?")[0], json.loads(body))
                if answer is None:
                    break
                text = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (answer[0], len(text)) + text)
        writer.transport.abort()

    async def _answer(self, path, message):
        route = re.sub(r"^/w\d+", "", path)
        self.asked.append((time.monotonic(), route, message))
        fate = self.fate(route, message)
        fate = await fate if asyncio.iscoroutine(fate) else fate
        if isinstance(fate, tuple) or fate == "reset":
            return fate if fate != "reset" else None
        status, answer = await self._truth(route, message)
        if fate == "lost":
            if route == CREATE:
                del self.sessions[answer["session_id"]]
            return None
        await asyncio.sleep(fate or 0)
        return status, answer

    async def _truth(self, route, message):
        if route.startswith("/api/"):
            one = {"id": 1, "endpoint_name": "stub", "api_key": "key", "user_id": 1, "created_at": 0.0}
            return 200, {"success": True, "results": [one], "result": one}
        if route == ROUTE:
            auth = {"request_idx": message["request_idx"] or next(self.numbers)}
            if not self.free:
                return 200, {**auth, "status": "no worker is free"}
            worker = f"{self.url}/w{next(self.numbers)}"
            auth |= {"cost": message["cost"], "endpoint": "stub", "reqnum": 1, "signature": "", "url": worker}
            return 200, auth
        if route == CREATE:
            name, lifetime = f"s{next(self.numbers)}", message["payload"]["lifetime"]
            new = SimpleNamespace(name=name, lifetime=lifetime, expiration=time.time() + lifetime, over=asyncio.Event())
            self.sessions[name] = new
            return 201, {"session_id": name, "expiration": new.expiration}
        if "session_id" not in message:  # a worker of another test, whose autoscaler had this port
            return 404, {}
        session = self.sessions.get(message["session_id"])
        if session is not None and route == LOOK and self.waits:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(session.over.wait(), message.get("wait", 0))
        if session is None or session.over.is_set() or session.expiration < time.time():
            return 410 if route == PING else 400, GONE
        if route == END:
            session.over.set()
        session.expiration += session.lifetime * (route == PING)
        return 200, {END: {"ended": True}, PING: {"result": {}}, LOOK: {"expiration": session.expiration}}[route]


@contextlib.asynccontextmanager
async def stubbed():
    async with Stub() as stub, LocalClient("key", autoscaler_url=stub.url, webserver_url=stub.url) as client:
        yield stub, await client.get_endpoint("stub")


def first(*fates, route, then=None):
    """A fate: the first requests to a route get these, one each."""
    fates = list(fates)
    return lambda asked, _: (fates.pop(0) if fates else then) if asked == route else None


# 1. No session, task, file or exception left


class Storm:
    """Reservations in an event loop of their own, cancelled up to three times, closed by others, held or abandoned."""

    def __init__(self, seed, count, url, key="key", name="stub", seconds=4.0, lifetimes=(2, 60)):
        self.dice, self.count, self.url, self.key, self.name = random.Random(seed), count, url, key, name
        self.seconds, self.lifetimes = seconds, lifetimes
        self.held, self.complaints, self.unexpected, self.tasks_left = 0, [], [], set()

    async def one(self, endpoint):
        dice = self.dice
        await asyncio.sleep(dice.uniform(0, self.seconds / 2))
        with contextlib.suppress(NotReserved, WorkerLost, KeyError):
            async with reserve(endpoint, lifetime=dice.choice(self.lifetimes), wait=self.seconds) as reservation:
                self.held += 1
                how = dice.choice(["at once", "hold", "close", "closed by others", "waiters", "raise"])
                if how == "raise":
                    raise KeyError
                if how == "close":
                    await reservation.close()
                if how == "closed by others":
                    others = [asyncio.create_task(reservation.close()) for _ in range(2)]
                    await reservation.ended()
                    await asyncio.wait(others)
                if how == "waiters":
                    await asyncio.gather(*(reservation.ended(timeout=dice.uniform(0, 0.5)) for _ in range(3)))
                if how == "hold":
                    await asyncio.sleep(dice.uniform(0, self.seconds))

    async def disturb(self, task):
        await asyncio.sleep(self.dice.uniform(0, self.seconds))
        for _ in range(self.dice.randrange(4)):
            task.cancel()
            await asyncio.sleep(self.dice.choice([0, 0, 0.01, self.dice.uniform(0, 0.5)]))

    async def blow(self, to_the_end):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        client, opened = LocalClient(self.key, autoscaler_url=self.url, webserver_url=self.url), loop.create_future()
        tasks = []

        async def connect():  # as long as somebody needs the connection, also while asyncio.run() ends
            async with client:
                opened.set_result(await client.get_endpoint(self.name))
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
                await asyncio.wait(tasks)

        connection = asyncio.create_task(connect())
        endpoint = await opened
        tasks += [asyncio.create_task(self.one(endpoint)) for _ in range(self.count)]
        disturbing = [asyncio.create_task(self.disturb(task)) for task in tasks]
        if not to_the_end:
            await asyncio.sleep(self.seconds / 2)
            return
        await asyncio.wait([*tasks, *disturbing])
        connection.cancel()
        await asyncio.wait({connection})
        self.unexpected += [task.exception() for task in tasks if not task.cancelled() and task.exception()]
        self.tasks_left = asyncio.all_tasks() - {asyncio.current_task()}

    async def pass_over(self, to_the_end=True):
        await asyncio.to_thread(asyncio.run, self.blow(to_the_end))
        gc.collect()
        assert (self.complaints, self.unexpected, self.tasks_left) == ([], [], set())


def open_files(port):
    """The event loops of this process, and the connections to a port of it. (Workers come and go with theirs.)"""
    loops = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            loops += os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]"
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [(local, remote) for _, local, remote, state, *rest in sockets if state != "0A" and rest[5] != "0"]
    return loops + sum(f"{end.rpartition(':')[2]}" == f"{port:04X}" for pair in ends for end in pair)


async def test_a_thousand_reservations_in_a_storm_leave_nothing_behind(caplog):
    dice = random.Random(11)

    async def fate(route, _):
        await asyncio.sleep(dice.choice([0, 0, 0.01, 0.1, dice.uniform(0, 0.5)]))
        # Nine in a row, the tries that closing has, don't fail.
        return dice.choice([None] * (6 if route == CREATE else 24) + [(429, b""), (503, b"no"), "reset", "lost"])

    async with Stub() as stub:
        port = int(stub.url.rpartition(":")[2])
        files = open_files(port)
        storms = [Storm(seed, 200, stub.url) for seed in range(5)]

        stub.fate = lambda route, message: None if route.startswith("/api/") else fate(route, message)
        await asyncio.gather(*(storm.pass_over(to_the_end=storm is not storms[0]) for storm in storms))
        told = set(
            re.findall(r"not closed session=(\w+)", caplog.text)
        )  # 3 s of bad luck, which a busy machine lengthens
        assert {session.name for session in stub.left()} <= told and len(told) < 10
        assert sum(storm.held for storm in storms) > 50
        await eventually(lambda: open_files(port) <= files)


async def test_real_workers_are_all_free_after_a_storm(vast):
    vast.overbooked = True
    storms = [Storm(seed, 100, vast.url, vast.api_key, vast.endpoint_name, lifetimes=(60,)) for seed in (1, 2)]
    await asyncio.gather(storms[0].pass_over(), storms[1].pass_over(to_the_end=False))
    assert storms[0].held
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


# 2. After a cancellation


CUT_SHORT = {
    "a poll": (ROUTE, 0.6),
    "a create": (CREATE, 0.6),
    "a create that finds the worker occupied": (CREATE, (429, {})),
    "a create that finds it draining": (CREATE, (503, {"error": "draining"})),
    "a create that gets a proxy's page": (CREATE, (502, b"<html>")),
    "a create that is dropped": (CREATE, "reset"),
}


@pytest.mark.parametrize("times", [1, 3])
async def test_after_a_cancellation_nothing_more_is_asked_for_and_nothing_untrue_is_said(times, caplog):
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
            assert (len(stub.times(ROUTE)), len(stub.times(CREATE))) == (1, int(cut_route == CREATE))
            assert stub.left() == []

    again = [(CREATE, (429, {}))] * 2
    await asyncio.gather(*(cut_short(*cut) for cut in [*CUT_SHORT.values(), *again]))
    assert not caplog.records


# 3. Odd answers


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
        {"expiration": "soon", "ended": 1, "session_id": 5, "url": 5, "request_idx": "a", "error": []},
    ),
    "lists": (200, {"expiration": [], "ended": [True], "session_id": ["a"], "url": ["a"], "request_idx": {}}),
    "true": (200, {"expiration": True, "ended": "true", "session_id": True, "url": True, "request_idx": True}),
    "huge": (200, {"expiration": 10**400, "ended": 10**400, "session_id": 10**400, "url": 7, "request_idx": 10**400}),
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
                async with reserve(endpoint, lifetime=2) as reservation:
                    held_at = time.monotonic()
                    stub.fate = lambda route, _: odd if route == LOOK else None
                    await reservation.ended()
            assert 1.5 < time.monotonic() - held_at < 10, name
            assert len(stub.times(LOOK)) < 15, name
            assert not stub.times(PING)

    await asyncio.gather(*(look(*odd) for odd in ODD.items()))


@pytest.mark.parametrize("status", [400, 410])
async def test_only_the_workers_own_word_is_an_end(status):
    words = ["session does not exist", "session abc is not active", "session already closed", "invalid session"]

    async def look(word):
        async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=2) as reservation:
            stub.fate = lambda route, _: (status, {"error": word}) if route == LOOK else None
            assert await reservation.ended() is True

    await asyncio.gather(*(look(word) for word in words))


async def test_nonsense_for_a_while_is_waited_through_and_the_session_closed_at_the_end_of_the_block(caplog):
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
            assert await reservation.ended(timeout=30) is True, name  # it expired: the worker's own word
            assert 1 <= len(stub.times(PING)) <= 12 and len(stub.times(LOOK)) < 30, name

    await asyncio.gather(*(ping(*odd) for odd in ODD.items()))


async def test_nonsense_from_the_router_is_waited_through_and_told():
    urls = ["", "nonsense", "http://[", "http://127.0.0.1:99999", "file:///etc/passwd", "http://\ud800", "http://"]
    cases = {**{f"URL {url!a}": (200, {"url": url}) for url in urls}, **{n: o for n, o in ODD.items() if o[0] == 200}}
    cases |= {str(status): (status, b"<html>not now</html>") for status in (302, 408, 429, 500, 502, 503)}

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
        stub.fate = first((status, b"<h1>nested</h1>" if status == 410 else {"error": "no credit"}), route=ROUTE)
        with pytest.raises(NotReserved, match=f"HTTP {status} - .*(no credit|<h1>nested)"):
            await reserve(endpoint).__aenter__()
        assert len(stub.times(ROUTE)) == 1 and not stub.times(CREATE)


async def test_nonsense_from_a_worker_that_is_asked_for_a_session_is_waited_through():
    cases = {name: (201 if odd[0] == 200 else odd[0], odd[1]) for name, odd in ODD.items() if name != "401"}
    cases |= {"200 for a 201": (200, {"session_id": 7}), "proxy's 422": (422, b"<html>"), "401": (401, b"<html>")}

    async def ask(name, odd):
        async with stubbed() as (stub, endpoint):
            stub.fate = first(odd, route=CREATE)
            async with reserve(endpoint, wait=20) as reservation:
                assert reservation.session_id in stub.sessions, name
            assert stub.left() == [] and len(stub.times(CREATE)) == 2, name

    await asyncio.gather(*(ask(*case) for case in cases.items()))


async def test_what_the_create_claims_of_its_expiration_is_not_believed():
    async def claim(claimed):
        async with stubbed() as (stub, endpoint):
            session = SimpleNamespace(lifetime=4, expiration=time.time() + 4, over=asyncio.Event())
            stub.sessions["s"] = session
            stub.fate = first((201, {"session_id": "s", "expiration": claimed}), route=CREATE)
            async with reserve(endpoint, lifetime=4) as reservation:
                assert 2 < reservation.time_to_live <= 4, claimed
                assert not await reservation.ended(timeout=5), claimed
                assert session.expiration - time.time() < 2 * 4, claimed
                assert 1 <= len(stub.times(PING)) <= 2 and len(stub.times(LOOK)) < 20, claimed
            assert stub.left() == [], claimed

    await asyncio.gather(*map(claim, [None, "soon", True, [], 10**400, math.inf, 1e11, 0, -1e11]))


async def test_a_lost_worker_that_is_back_at_the_end_of_the_block_is_told_to_close():
    """A keep-alive had its effect, but the answers to it and to all that followed got lost."""
    async with stubbed() as (stub, endpoint):
        with pytest.raises(WorkerLost):
            async with reserve(endpoint, lifetime=4) as reservation:
                (session,) = stub.sessions.values()
                stub.fate = lambda route, _: "lost" if route == PING else (502, b"<html>") if stub.times(PING) else None
                try:
                    await reservation.ended()
                finally:
                    assert session.expiration - time.time() > 2
                    stub.fate = first(route="")
        assert stub.left() == []


# 4. ended()


async def test_ended_is_true_for_everyone_before_beside_and_after_a_close():
    async with stubbed() as (_, endpoint):
        async with reserve(endpoint) as reservation:
            waiters = [asyncio.create_task(reservation.ended()) for _ in range(5)]
            waiters.append(asyncio.create_task(asyncio.wait_for(reservation.ended(), 10)))
            await asyncio.sleep(0.05)
            waiters[0].cancel()  # one that gives up takes nobody with it
            closing = [asyncio.create_task(reservation.close()) for _ in range(2)]
            assert await asyncio.gather(reservation.ended(), *waiters[1:], reservation.close()) == [True] * 6 + [None]
            await asyncio.gather(*closing)
            assert await reservation.ended() is await reservation.ended(timeout=0) is True
            await reservation.close()
        assert await reservation.ended() is True
        await reservation.close()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
async def test_ended_in_a_task_group_beside_a_close():
    async with stubbed() as (stub, endpoint), reserve(endpoint) as reservation:
        async with asyncio.TaskGroup() as group:
            waiters = [group.create_task(reservation.ended()) for _ in range(3)]
            group.create_task(reservation.close())
        assert [waiter.result() for waiter in waiters] == [True] * 3
    assert stub.left() == []


# 5. Failures while waiting


async def test_an_autoscaler_and_a_web_api_that_fail_for_a_while_do_not_end_the_wait():
    async def wait_through(days):
        troubles, fates = [], [502, 500, 503]
        async with stubbed() as (stub, endpoint):
            endpoint.last_refresh -= days * 86400  # the SDK fetches it again from the third day on
            stub.free = False

            def fail(route, _):
                if route.startswith("/api/"):
                    return 500, b"<html>"
                return (fates.pop(0), b"<html>out of order</html>") if fates and route == ROUTE else None

            stub.fate = fail
            async with contextlib.AsyncExitStack() as stack:
                waiting = asyncio.create_task(stack.enter_async_context(reserve(endpoint, on_trouble=troubles.append)))
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
        with pytest.raises(NotReserved, match=r"no worker within 1.5 s; at last: .*HTTP 502.*out of order"):
            await reserve(endpoint, wait=1.5).__aenter__()
        stub.fate = lambda route, _: (429, {"error": "occupied"}) if route == CREATE else None
        with pytest.raises(NotReserved, match=r"no worker within 1.5 s; at last: .*HTTP 429.*occupied"):
            await reserve(endpoint, wait=1.5).__aenter__()
        stub.fate, stub.free = first(route=""), False
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
        *({"on_close_payload": {"job": value}} for value in (decimal.Decimal(1), datetime.datetime.min, math.nan)),
        *({"on_close_payload": {"job": value}} for value in ({1}, b"x", CIRCULAR, math.inf, object())),
        *({"on_close_payload": value} for value in (CIRCULAR, {(1, 2): 3})),
        {"cost": decimal.Decimal(100)},
        {"cost": math.nan},
        {"lifetime": decimal.Decimal(60)},
        {"lifetime": math.inf},
        {"on_close_route": b"/closed"},
    ],
    ids=lambda unsendable: repr(unsendable)[:40],
)
async def test_what_cannot_be_sent_is_a_type_error_at_once(unsendable):
    async with stubbed() as (stub, endpoint):
        with pytest.raises(TypeError, match="not to be sent as JSON"):
            await reserve(endpoint, **unsendable).__aenter__()
        assert not stub.times(ROUTE)


async def test_what_is_nested_too_deep_is_a_type_error_at_once():
    async with stubbed() as (stub, endpoint):
        with pytest.raises(TypeError, match="not to be sent as JSON"):
            await reserve(endpoint, on_close_payload={"job": DEEP}).__aenter__()
        assert not stub.times(ROUTE)


@pytest.mark.parametrize("name", ["_get_session", "autoscaler_url", "get_ssl_context", "client", "name", "api_key"])
async def test_a_name_that_the_sdk_no_longer_has_is_noticed_before_anything_is_asked_for(name):
    async with stubbed() as (stub, endpoint):
        client = SimpleNamespace(
            **{each: getattr(endpoint.client, each) for each in ("_get_session", "autoscaler_url", "get_ssl_context")}
        )
        known = SimpleNamespace(name=endpoint.name, api_key=endpoint.api_key, client=client)
        delattr(known if hasattr(known, name) else client, name)
        with pytest.raises(NotReserved, match=f"vastai-sdk is not known to work .*{name}"):
            await reserve(known, wait=2).__aenter__()
        assert not stub.times(ROUTE)


# 6. hand_over()


HAND_OVER = """
import asyncio, sys, null_client, null_local

async def main(url, key, name):
    async with null_local.LocalClient(key, autoscaler_url=url, webserver_url=url) as client:
        async with null_client.reserve(await client.get_endpoint(name), lifetime=3) as reservation:
            reservation.hand_over()
            print(reservation.session_id, reservation.url, flush=True)
            await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_reservation_that_was_handed_over_lives_as_long_as_its_consumer_renews_it(vast):
    async def raises():
        async with endpoint_of(vast) as endpoint:
            with pytest.raises(KeyError):
                async with reserve(endpoint, lifetime=3) as reservation:
                    reservation.hand_over()
                    raise KeyError
            return reservation.session_id, holder(vast, reservation)

    async def gets(number):
        async with Command(vast.url, vast.api_key, vast.endpoint_name, driver=HAND_OVER) as command:
            session_id, url = (await command.says(r"^(\S+) (http\S+)$")) and command.lines[0].split()
            command.process.send_signal(number)
            await command.status()
            return session_id, holder(vast, SimpleNamespace(url=url))

    async def outlives(dispatcher):
        session_id, worker = await dispatcher
        renewed_until = time.monotonic() + 3 + 5.5  # 5 to the next sweep
        while time.monotonic() < renewed_until:
            answer = (await renew(worker))[1]
            assert (answer["renewed"], answer["session_id"]) == (True, session_id), (dispatcher, answer)
            await asyncio.sleep(0.3)
        free = f"{worker.control_url}/session"
        await eventually(lambda: is_free(free), timeout=3 + 8)

    async def is_free(url):
        return (await request("GET", url))[2]["session_id"] is None

    await asyncio.gather(*(outlives(dies) for dies in (raises(), gets(signal.SIGTERM), gets(signal.SIGKILL))))


async def test_a_handed_over_reservation_still_tells_of_its_end_and_can_be_closed(vast):
    async with endpoint_of(vast) as endpoint:
        async with reserve(endpoint, lifetime=60) as reservation:
            worker = holder(vast, reservation)
            reservation.hand_over()
            assert not await reservation.ended(timeout=0)
            await release(worker)
            assert await reservation.ended(timeout=8) is True
        async with reserve(endpoint, lifetime=60) as reservation:
            worker = holder(vast, reservation)
            reservation.hand_over()
            await reservation.close()
            assert await reservation.ended(timeout=0) is True
            assert await release(worker) == (200, {"released": False, "reason": "no active session"})
        async with reserve(endpoint, lifetime=60) as reservation:
            reservation.hand_over()
        assert (await release(holder(vast, reservation)))[1]["released"]  # the end of the block doesn't end it


async def test_after_hand_over_no_keep_alive_comes_and_the_end_is_not_sent():
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint, lifetime=3) as reservation:
            await eventually(lambda: stub.times(PING))
            (session,) = stub.sessions.values()
            reservation.hand_over()
            pings, renewed_until = len(stub.times(PING)), time.monotonic() + 5
            while time.monotonic() < renewed_until:
                session.expiration = time.time() + 2
                assert not await reservation.ended(timeout=0.2)
            assert len(stub.times(PING)) == pings
            assert await reservation.ended(timeout=10) is True  # it expires
        async with reserve(endpoint) as reservation:
            reservation.hand_over()
        assert len(stub.left()) == 1 and not stub.times(END)


async def test_who_still_waits_for_a_handed_over_reservation_is_not_told_that_it_ended():
    async with stubbed() as (_, endpoint):
        async with reserve(endpoint) as reservation:
            waiter = asyncio.create_task(reservation.ended())
            reservation.hand_over()
        with pytest.raises(null_client.ReservationError):
            await asyncio.wait_for(waiter, 5)


# 7. How soon ended() tells


async def test_the_holder_learns_of_a_release_at_once(vast):
    async def until_told(reservation):
        start = time.monotonic()
        await release(holder(vast, reservation))
        assert await reservation.ended() is True
        return time.monotonic() - start

    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(reserve(endpoint)) for _ in range(WORKERS)]
        await asyncio.sleep(2.5)  # past the first look, which may be a short one
        _, median, _ = sorted([await until_told(reservation) for reservation in held])
        assert median < 0.5  # one may meet a busy moment; a poll every 2 s would take 1 on average


async def test_a_release_is_told_at_once_ten_times_in_a_row():
    late = []
    async with stubbed() as (stub, endpoint):
        for _ in range(10):
            async with reserve(endpoint) as reservation:
                ended = asyncio.create_task(reservation.ended())
                looks = len(stub.times(LOOK))
                await eventually(lambda looks=looks: len(stub.times(LOOK)) > looks)
                start = time.monotonic()
                stub.sessions[reservation.session_id].over.set()
                assert await ended is True
                late.append(time.monotonic() - start)
    assert sorted(late)[5] < 0.5


async def test_a_worker_that_is_asked_to_stop_has_ended_and_is_not_lost(vast):
    worker = await fresh(vast)
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        reservations = [await stack.enter_async_context(reserve(endpoint)) for _ in range(len(vast.workers))]
        (reservation,) = [each for each in reservations if each.url == worker.url]
        ended = asyncio.create_task(reservation.ended())
        await asyncio.sleep(0.5)
        worker.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(ended, 8) is True
        assert await exit_status(worker) == 0


async def test_a_worker_that_does_not_know_how_to_wait_is_looked_at_every_two_seconds():
    async with stubbed() as (stub, endpoint):
        stub.waits = False
        async with reserve(endpoint) as reservation:
            assert not await reservation.ended(timeout=5)
            assert 2 <= len(stub.times(LOOK)) <= 6
            stub.sessions[reservation.session_id].over.set()
            assert await reservation.ended(timeout=4)


# 8. Pace


async def test_polls_keep_their_pace_however_many_wait():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        start = time.monotonic()
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(300)]
        await asyncio.sleep(10.5)  # 6 for the first poll of each
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        polls = [when - start for when in stub.times(ROUTE)]
        late = Counter(q["request_idx"] for when, route, q in stub.asked if route == ROUTE and when > start + 6.5)
    for second in range(7):
        assert sum(second <= when < second + 4 for when in polls) <= 4 * 60
    assert sum(6.5 <= when < 10.5 for when in polls) >= 4 * 10
    assert sum(3 <= times <= 6 for times in late.values()) == 16  # those in front, every second


async def test_those_in_front_poll_every_second_also_while_a_crowd_arrives():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(300)]
        await asyncio.sleep(5)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        polls = Counter(query["request_idx"] for query in stub.said(ROUTE) if query["request_idx"])
        assert sum(times >= 3 for times in polls.values()) >= 16, polls
        assert len(stub.times(ROUTE)) <= 5 * 60


@pytest.mark.parametrize("wait", [1, 60])
async def test_those_who_have_left_take_no_time_of_those_who_come_after(wait):
    async with stubbed() as (stub, endpoint):
        stub.free = False
        left = [asyncio.create_task(reserve(endpoint, wait=wait).__aenter__()) for _ in range(400)]
        await asyncio.sleep(1)
        if wait == 60:
            for task in left:
                task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        stub.free, start = True, time.monotonic()
        async with reserve(endpoint):
            assert time.monotonic() - start < 5  # 12 were each of them waited for


@pytest.mark.parametrize("waiting", [1, 2, 16, 17, 50, 100, 300, 1000, 5000, 100_000])
def test_those_in_front_poll_every_second_and_all_together_within_the_rate(waiting):
    intervals = [poll_interval(place, waiting) for place in range(waiting)]
    assert set(intervals[:16]) == {1.0} and intervals == sorted(intervals)
    assert sum(1 / (0.8 * interval) for interval in intervals) <= 60  # with all the jitter there is
    assert max(intervals) >= 4.0 or waiting <= 16
    assert null_client.LOOK <= 60  # or the worker refuses it


async def test_a_request_keeps_its_place_by_what_it_says_to_the_router():
    """By its index, also when an answer lacks it, and by asking for a replay time beyond its interval."""
    async with stubbed() as (stub, endpoint):
        stub.free = False
        forgetful = first(None, route=ROUTE, then=(200, {"status": "wait"}))
        stub.fate = forgetful
        waiting = asyncio.create_task(reserve(endpoint).__aenter__())
        await eventually(lambda: len(stub.times(ROUTE)) == 2)
        stub.fate = first((502, b""), (429, b""), route=ROUTE, then=(200, {"request_idx": None}))
        await eventually(lambda: len(stub.times(ROUTE)) == 5)
        waiting.cancel()
        await asyncio.wait({waiting})
        queries = stub.said(ROUTE)
    assert repr([query["request_idx"] for query in queries]) == "[0, 1, 1, 1, 1]"  # whole numbers, as the SDK's
    assert all(query["replay_timeout"] >= 60 for query in queries)


async def test_those_behind_move_up_at_once_when_those_in_front_leave():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(40)]
        await eventually(lambda: sum(query["request_idx"] == 0 for query in stub.said(ROUTE)) == 40)
        for task in waiting[:16]:
            task.cancel()
        await asyncio.wait(waiting[:16])
        polls = len(stub.times(ROUTE))
        await asyncio.sleep(1.6)  # where they were, they would poll again after 3.2 s at the earliest
        assert 16 <= len(stub.times(ROUTE)) - polls <= 3 * 16
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_after_a_429_of_the_router_polls_back_off_and_not_in_lockstep():
    async with stubbed() as (stub, endpoint):
        stub.free = False
        waiting = [asyncio.create_task(reserve(endpoint).__aenter__()) for _ in range(15)]
        await eventually(lambda: len(stub.times(ROUTE)) == 15)
        stub.fate = lambda route, _: (429, b"") if route == ROUTE else None
        await asyncio.sleep(5.4)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
    polls = [[when for when, route, q in stub.asked if route == ROUTE and q["request_idx"] == n] for n in range(1, 16)]
    gaps = [[after - before for before, after in itertools.pairwise(times)] for times in polls]
    assert {len(times) for times in gaps} == {2}, gaps  # after 1 s and 2 s; the first poll had no index yet
    assert min(gap[1] for gap in gaps) > 1.5
    assert max(gap[0] for gap in gaps) - min(gap[0] for gap in gaps) > 0.12


async def test_looks_that_are_refused_now_and_then_are_no_end(monkeypatch):
    monkeypatch.setattr(null_client, "CHECK", 0.2)
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=60) as reservation:
        stub.waits = False
        for _ in range(3):  # two to four looks each; five in a row would be the end
            await eventually(lambda: stub.times(LOOK))
            for connection in list(stub._connections):
                connection.cancel()
            await stub.absent(0.7)
            assert reservation.unreachable
            await eventually(lambda: not reservation.unreachable, timeout=5)


async def test_a_worker_that_is_back_is_seen_at_once():
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=60) as reservation:
        await eventually(lambda: stub.times(LOOK))
        stub.fate = lambda route, _: (502, b"") if route == LOOK else None
        for connection in list(stub._connections):
            connection.cancel()
        await eventually(lambda: reservation.unreachable)
        stub.fate = lambda route, _: None
        await eventually(lambda: not reservation.unreachable, timeout=6)


async def test_a_handed_over_reservation_is_looked_at_in_measure_and_not_given_up_while_it_is_renewed():
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=8) as reservation:
        (session,) = stub.sessions.values()
        reservation.hand_over()
        until = time.monotonic() + 8
        while time.monotonic() < until:
            session.expiration = time.time() + 3.5  # a late consumer's: less than half a lifetime
            assert not await reservation.ended(timeout=0.2)
        assert 3 <= len(stub.times(LOOK)) <= 6
        stub.fate = first((502, b""), route=LOOK)
        session.expiration = time.time() + 8
        await eventually(lambda: reservation.unreachable)
        assert not await reservation.ended(timeout=0.3)


async def test_an_unruly_keep_alive_is_in_the_log_once_and_one_that_comes_too_late_is_not(caplog):
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=3):
        stub.fate = first((200, b"{}"), route=PING)
        await eventually(lambda: len(stub.times(PING)) >= 2)
        (record,) = caplog.records
        assert "keep-alive refused" in record.msg and "HTTP 200" in record.getMessage()
        stub.fate = first((410, GONE), route=PING)
        await eventually(lambda: len(stub.times(PING)) >= 4)
        assert len(caplog.records) == 1


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_dispatcher_that_stood_still_does_not_take_its_worker_for_lost(handed_over):
    async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=1) as reservation:
        (session,) = stub.sessions.values()
        if handed_over:
            reservation.hand_over()
            session.expiration = time.time() + 60  # its consumer renews it
        await eventually(lambda: stub.times(LOOK))
        time.sleep(5)  # noqa: ASYNC251  the user's own code
        assert await reservation.ended(timeout=4 if handed_over else 15) is not handed_over


@pytest.mark.parametrize("order", ["close at the end", "hand over while closing"])
async def test_closing_what_was_handed_over_is_not_undone_by_the_end_of_the_block(order):
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint) as reservation:
            if order == "close at the end":
                reservation.hand_over()
            closing = asyncio.create_task(reservation.close())
            await asyncio.sleep(0)
            reservation.hand_over()
        await closing
        assert stub.left() == []


async def test_a_create_whose_answer_came_while_the_dispatcher_stood_still_leaves_no_session(monkeypatch):
    monkeypatch.setattr(null_client, "REQUEST_TIMEOUT", 1.0)
    async with stubbed() as (stub, endpoint):

        async def stand_still(route, _):
            if route == CREATE and len(stub.times(CREATE)) == 1:
                asyncio.get_running_loop().call_later(0.05, time.sleep, 1.5)
                return 0.1

        stub.fate = stand_still
        async with reserve(endpoint):
            assert len(stub.left()) == 1


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
        assert [trouble for trouble in troubles if trouble] == ["no certificate: no route"] * 2 and stub.left() == []


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


# 9. What is passed on, and the time to live


async def test_what_the_caller_asks_for_reaches_the_router_and_the_worker():
    async with stubbed() as (stub, endpoint):
        async with reserve(endpoint, 250, 77, on_close_route="/done", on_close_payload={"job": 7}):
            pass
        (query,), (message,) = stub.said(ROUTE), stub.said(CREATE)
    assert (query["cost"], query["endpoint"], query["api_key"]) == (250, "stub", "key")
    assert message["payload"] == {"lifetime": 77, "on_close_route": "/done", "on_close_payload": {"job": 7}}
    assert message["auth_data"]["cost"] == 250


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
    """The worker freezes with a keep-alive under way, and takes it up when it thaws, as it answers the next look."""
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


async def test_whatever_a_look_claims_there_is_one_keep_alive_in_a_lifetime():
    async def claim(name, claimed):
        async with stubbed() as (stub, endpoint), reserve(endpoint, lifetime=2) as reservation:
            (session,) = stub.sessions.values()
            at_first = session.expiration
            stub.fate = lambda route, _: (200, {"expiration": claimed(at_first)}) if route == LOOK else None
            assert not await reservation.ended(timeout=7), name
            assert 2 <= len(stub.times(PING)) <= 7 and len(stub.times(LOOK)) < 60, name
            assert 0 < session.expiration - time.time() < 10 and reservation.time_to_live <= 4, name

    claims = {"far": lambda _: 1e11, "farther each time": lambda _: time.time() + 1e9, "long past": lambda _: 1.0}
    claims["the first one, as from a cache"] = lambda at_first: at_first
    await asyncio.gather(*(claim(*each) for each in claims.items()))


# 10. Closing


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
    (record,) = caplog.records
    hours, minutes, seconds = map(int, re.search(r"until (\d\d):(\d\d):(\d\d)$", record.getMessage()).groups())
    assert reservation.session_id in record.getMessage() and reservation.url in record.getMessage()
    now = time.localtime()
    left = (hours - now.tm_hour) * 3600 + (minutes - now.tm_min) * 60 + seconds - now.tm_sec
    assert 50 <= left % 86400 <= 66


async def test_only_so_many_are_closed_at_a_time_and_none_is_left(caplog, monkeypatch):
    closing, most = set(), 0
    assert null_client.CLOSING == 50
    monkeypatch.setattr(null_client._Line.here(), "closing", asyncio.Semaphore(10))

    async def slow(route, message):
        nonlocal most
        if route == END:
            closing.add(message["session_id"])
            most = max(most, len(closing))
            await asyncio.sleep(1.3)  # the third wave ends after the first one's bound of 3 s
            closing.discard(message["session_id"])

    async with stubbed() as (stub, endpoint), contextlib.AsyncExitStack() as stack:
        stub.fate = slow
        reservations = await asyncio.gather(*(stack.enter_async_context(reserve(endpoint)) for _ in range(24)))
        await asyncio.gather(*(reservation.close() for reservation in reservations))
        assert stub.left() == []
        assert most == 10
    assert not caplog.records


# 11. In place of the test of that name


async def test_a_reservation_is_kept_alive_and_never_beyond_one_and_a_half_lifetimes(vast):
    lifetime, left = 4.0, []
    await silence(vast)

    async def agree():
        """The client's clock with the worker's; a keep-alive that is under way just then counts on one side only."""
        left.append(await expiration(reservation) - time.time())
        return abs(left[-1] - reservation.time_to_live) < 1

    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=lifetime) as reservation:
        start = time.monotonic()
        while time.monotonic() - start < 3 * lifetime:
            await eventually(agree, timeout=3)
            assert not await reservation.ended(timeout=0.2)
    assert 0 < min(left) and max(left) < 1.5 * lifetime + 0.5  # it began when the create was sent, a moment earlier
    await eventually(lambda: statuses(vast) == ["Success"])
    assert sum(report["new_load"] for report in vast.reports) <= 100
    assert {report["cur_load"] for report in vast.reports} <= {0, 100}


# null_client.py: the command


class Command:
    """`null_client.py` in a process of its own, pointed at a LocalVast of the test instead of Vast."""

    DRIVER = (
        "import sys, null_client, null_local\n"
        "null_client.Serverless = lambda key, instance, **options: null_local.LocalClient(\n"
        "    key, autoscaler_url={url!r}, webserver_url={url!r}, **options)\n"
        "sys.exit(null_client.main(sys.argv[1:]))"
    )

    def __init__(self, *arguments, vast=None, environment=None, driver=None, reads=math.inf, output="pipe"):
        """`output` is "pipe", "full" (no space left), "stalled" (a pipe that nobody empties), "closed", or the size of a
        terminal: (columns, lines)."""
        environment = (
            BARE
            | {"PYTHONPATH": str(HERE), "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
            | (environment or {})
        )
        command = [HERE / "null_client.py"]
        if vast or driver:
            command = ["-c", driver or self.DRIVER.format(url=vast.url)]
        if vast:
            environment = {"VAST_API_KEY": vast.api_key, "VAST_ENDPOINT": vast.endpoint_name} | environment
        command = [sys.executable, *map(str, command), *arguments]
        if output == "closed":
            command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        self._unread, self.terminal, stdout = None, None, subprocess.PIPE
        if output == "full":
            stdout = os.open("/dev/full", os.O_WRONLY)
        elif output == "stalled":
            self._unread, stdout = os.pipe()
            os.set_blocking(stdout, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(stdout, b"x" * 4096)
            os.set_blocking(stdout, True)
        elif isinstance(output, tuple):
            master, stdout = pty.openpty()
            fcntl.ioctl(stdout, termios.TIOCSWINSZ, struct.pack("HHHH", output[1], output[0], 0, 0))
            self.terminal = os.fdopen(master, "rb", buffering=0)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if stdout is not subprocess.PIPE:
            os.close(stdout)
        self.lines, self.errors, self._reads = [], [], reads
        pipes = [self.terminal or self.process.stdout, self.process.stderr]
        self._output = [asyncio.ensure_future(asyncio.to_thread(self._read, pipe)) for pipe in pipes if pipe]

    def _read(self, pipe):
        lines = self.errors if pipe is self.process.stderr else self.lines
        with contextlib.suppress(OSError):  # EIO: the other side of a terminal is closed
            for line in pipe:
                lines.append(line.decode().rstrip("\r\n"))
                if lines is self.lines and len(lines) >= self._reads:
                    pipe.close()
                    break

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.process.kill()
        await self.status()
        for pipe in filter(None, (self.process.stdout, self.process.stderr, self.terminal)):
            pipe.close()
        if self._unread is not None:
            os.close(self._unread)

    async def status(self, timeout=60):
        status = await asyncio.to_thread(self.process.wait, timeout)
        await asyncio.gather(*self._output)
        return status

    def said(self, pattern):
        return re.search(pattern, "\n".join(self.lines))

    async def says(self, pattern, timeout=40):
        return await eventually(lambda: self.said(pattern) or self.process.poll() is not None, timeout) is not True


def reservations_over_time(vast):
    """How many reservations the workers reported, each time that it changed."""
    load, steps = {}, [0]
    for report in vast.reports:
        load[report["id"]] = report["cur_load"]
        held = sum(value >= 100 for value in load.values())
        if held != steps[-1]:
            steps.append(held)
    return steps


@pytest.fixture
async def small_vast():
    """A LocalVast of its own, which scales back down."""
    async with LocalVast(inactivity_timeout=4, control_port=None) as vast:
        yield vast


async def test_the_demo_ramps_up_and_down_and_watches_the_workers_go(small_vast):
    vast = small_vast
    async with Command("--demo", "--interval", "2.5", "--plateau", "3", vast=vast) as command:
        assert await command.status() == 0
        assert command.errors == [] and not vast.workers
    assert statuses(vast) == ["Success"] * 3
    assert reservations_over_time(vast) == [0, 1, 2, 3, 2, 1, 0]
    order = [line.split()[1] for line in command.lines if "released after" in line]
    assert order == ["#1", "#2", "#3"]
    requested, held, released = (
        [sum(map(int.__mul__, map(int, line[:8].split(":")), (3600, 60, 1))) for line in command.lines if what in line]
        for what in ("waiting for", "held after", "released after")
    )
    for earlier, later in [*itertools.pairwise(requested), (held[-1], released[0]), *itertools.pairwise(released)]:
        assert (later - earlier) % 86400 >= 2  # in whole seconds of a clock
    *lines, axis, first, second, third, workers = command.lines
    assert ". waiting  = held" in axis and all(re.match(r"#\d +\.*=+ ", line) for line in (first, second, third))
    assert re.fullmatch(r"workers {2}[ 0]*1+2*3+[12]*0", workers.rstrip()) and len(workers) == len("workers  ") + 40
    assert all(line.isascii() and line.isprintable() and len(line) <= 100 for line in command.lines)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    said = [line.partition("workers: ")[2] for line in lines if "workers: " in line]
    assert said[0] == said[-1] == "none" and "3 idle" in said and any("model_loading" in states for states in said)


async def test_a_worker_that_lets_go_is_marked_and_the_demo_goes_on(small_vast):
    vast = small_vast
    async with Command("--demo", "--interval", "1", "--plateau", "4", vast=vast) as command:
        for name in ("#1", "#3", "#2"):  # the plateau begins with the last one
            assert await command.says(f"{name} held")
        url = command.said(r"#2 held .*, (http\S+)")[1]
        await release(worker_at(vast, url))
        assert await command.says("#2 let go")
        assert not command.said("#1 released")
        assert await command.status() == 0
    assert command.said(r"#2 let go after .*: the worker let go")
    assert command.said("#1 released") and command.said("#3 released") and not command.said("#2 released")
    assert statuses(vast) == ["Success"] * 3


def ended_row(asked_at, held_at, ended_at, how="released"):
    return null_client.Ended(asked_at, held_at, ended_at, how, "")


@pytest.mark.parametrize(
    ("rows", "workers", "lines"),
    [
        (
            [("#1", ended_row(0, 2, 8)), ("#2", ended_row(2, 4, 10)), ("#3", ended_row(4, None, 10, "not reserved"))],
            [(0, 0), (1, 1), (4, 12), (10, 0)],
            [
                "         0 s             10 s  . waiting  = held",
                "#1       ....============      2 s, 6 s, released",
                "#2           ....============  2 s, 6 s, released",
                "#3               ............  6 s, 0 s, not reserved",
                "workers  00111111+++++++++++0",
            ],
        ),
        (  # over in no time, and no worker seen
            [("#1", ended_row(5, 5, 5))],
            [],
            ["         0 s              0 s  . waiting  = held", f"#1       {'':20}  0 s, 0 s, released"],
        ),
        (  # the watch over the workers goes on after the last one
            [("#1", ended_row(0, 0, 5))],
            [(0, 1), (10, 0)],
            [
                "         0 s             10 s  . waiting  = held",
                f"#1       {'=' * 10:20}  0 s, 5 s, released",
                "workers  11111111111111111110",
            ],
        ),
    ],
)
def test_the_chart(rows, workers, lines):
    assert null_client.chart(rows, workers, width=20) == lines


class Gauge:
    """What a row shows of a reservation."""

    url, unreachable, time_to_live = "http://w", False, 7.0


class Lost(Gauge):
    unreachable = True


@pytest.mark.parametrize(
    ("state", "label", "clock", "bar", "detail"),
    [
        (None, "planned", "", "", ""),
        (null_client.Waiting(40.0), "waiting", "1:00", "", ""),
        (null_client.Waiting(99.5, "HTTP 502"), "waiting", "0:00", "", "HTTP 502"),
        (null_client.Held(0.0, 40.0, Gauge()), "held", "1:00", "until all are held", "http://w"),
        (null_client.Held(0.0, 40.0, Gauge(), math.inf), "held", "1:00", "until released", "http://w"),
        (null_client.Held(0.0, 40.0, Gauge(), 140.0), "held", "1:00", (60, 100), "http://w"),
        (null_client.Held(0.0, 40.0, Gauge(), 90.0), "held", "1:00", (50, 50), "http://w"),
        (null_client.Held(0.0, 99.0, Lost()), "held", "0:01", "until all are held", "not answering, given up in 7 s"),
        (null_client.Ended(0.0, 10.0, 75.0, "lost", "gone"), "lost", "1:05", "", "gone"),
        (null_client.Ended(0.0, None, 5.0, "not reserved", "no"), "not reserved", "0:05", "", "no"),
    ],
)
def test_a_row_of_every_state_can_be_drawn(state, label, clock, bar, detail):
    *columns, last, text = null_client.describe(state, now=100.0)
    shown = last if isinstance(last, str) else (last.completed, last.total)
    assert (columns, shown, text.plain) == ([label, clock], bar, detail)


async def test_on_a_terminal_there_are_rows_with_bars_and_the_workers(small_vast):
    arguments = ("--demo", "--count", "2", "--interval", "0.5", "--plateau", "2")
    async with Command(*arguments, vast=small_vast, output=(100, 20)) as command:
        assert await command.status() == 0
    screen = "\n".join(command.lines)
    for pattern in ("#1 +waiting +0:0", r"#2 +held +0:0\d +\S*━\S* +http://127", r"workers: 2 idle", "workers: none"):
        assert re.search(pattern, screen), pattern
    assert "\x1b[?25h" in screen  # the cursor is shown again
    assert command.errors == [] and re.match(r"workers  [ \d]+$", command.lines[-1])


async def test_thirty_reservations_fit_on_twelve_lines(vast):
    async with Command("--demo", "--count", "30", "--interval", "0.1", vast=vast, output=(80, 12)) as command:
        assert await command.says(r"and 22 more: .*\d+ waiting")
        command.process.send_signal(signal.SIGINT)
        assert await command.status() == 130
    frames = re.split(r"(?:\x1b\[\d*[AK]|\r)+", "\n".join(command.lines))
    rows = [len(re.findall(r"^#\d+ +(?:planned|waiting|held)", frame, re.MULTILINE)) for frame in frames]
    assert max(rows) == 8 and command.errors == []


@pytest.mark.parametrize(
    ("environment", "output"), [({"PYTHONIOENCODING": "ascii"}, (80, 12)), ({"FORCE_COLOR": "1"}, "pipe")]
)
async def test_an_ascii_terminal_and_a_pipe_that_wants_colour_are_told_in_plain_text(vast, environment, output):
    async with Command("--hold", "1", vast=vast, environment=environment, output=output) as command:
        assert await command.status() == 0
    text = "\n".join(command.lines)
    assert text.isascii() and re.search("#1 (held|released) after", text) and command.errors == []
    assert ("\x1b" in text) == (output != "pipe")


async def stage_of(vast, command, stage):
    if stage == "waiting":
        await eventually(lambda: vast.polls > 1)
    else:
        await eventually(lambda: any(worker.report["cur_load"] for worker in vast.workers.values()))
    assert command.process.poll() is None


@pytest.mark.parametrize("stage", ["waiting", "held"])
@pytest.mark.parametrize("output", ["full", "stalled", (80, 12)])
@pytest.mark.parametrize("demo", [[], ["--demo", "--interval", "0.3"]])
async def test_a_signal_ends_the_command_also_when_it_cannot_print(vast, output, stage, demo):
    number = signal.SIGTERM if demo else signal.SIGINT
    taken = [await session(vast, worker) for worker in vast.workers.values()] if stage == "waiting" else []
    if taken:
        await eventually(lambda: all(worker.report["cur_load"] for worker in vast.workers.values()))
    vast.polls, reads = 0, 1 if isinstance(output, tuple) else 0  # a terminal that is gone after its first line
    async with Command("--hold", "inf", *demo, vast=vast, output=output, reads=reads) as command:
        await stage_of(vast, command, stage)
        command.process.send_signal(number)
        assert await command.status(timeout=15) == 128 + number
    assert command.errors == []
    left = [answer["released"] for _, answer in [await release(worker) for worker in vast.workers.values()]]
    assert left == [bool(taken)] * WORKERS


def control_port_of_child(pid):
    """Of the worker process that a command has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found = re.search(rb"NULL_CONTROL_PORT=(\d+)", stat.with_name("environ").read_bytes())
                return int(found[1]) if found else None


async def test_the_command_works_without_a_standard_output():
    async with Command("--local", "--hold", "inf", output="closed") as command:
        port = await eventually(lambda: control_port_of_child(command.process.pid))
        await eventually(lambda: connected(port))
        status, _, answer = await request("GET", f"http://127.0.0.1:{port}/session?wait=30")
        assert status == 200 and answer["session_id"]
        command.process.send_signal(signal.SIGINT)
        assert await command.status(timeout=20) == 130
    assert command.errors == []


async def test_a_terminal_that_is_gone_ends_the_command_with_its_session_closed(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        await command.says("#1 held")
        command.process.send_signal(signal.SIGHUP)
        assert await command.status() == 128 + signal.SIGHUP
    assert [(await release(worker))[1]["released"] for worker in vast.workers.values()] == [False] * WORKERS


async def test_a_reader_that_stalls_holds_up_no_keep_alive(vast):
    async with Command("--hold", "inf", "--lifetime", "1", vast=vast, output="stalled") as command:
        worker = await eventually(lambda: next((w for w in vast.workers.values() if w.report["cur_load"]), None))
        start, first = time.time(), (await request("GET", f"{worker.control_url}/session"))[2]["session_id"]

        async def kept_for_five_lifetimes():
            _, _, now = await request("GET", f"{worker.control_url}/session")
            assert now["session_id"] == first
            return time.time() + now["time_to_live"] > start + 5

        await eventually(kept_for_five_lifetimes)
        command.process.send_signal(signal.SIGTERM)
        assert await command.status() == 143


async def test_cost_and_instance_are_passed_on(vast):
    driver = (
        "import sys, null_client, null_local\n"
        "def client(key, instance):\n"
        "    print(f'instance {instance}', flush=True)\n"
        f"    return null_local.LocalClient(key, autoscaler_url={vast.url!r}, webserver_url={vast.url!r})\n"
        "null_client.Serverless = client\n"
        "sys.exit(null_client.main(sys.argv[1:]))"
    )
    arguments = ("--cost", "250", "--instance", "alpha", "--hold", "inf")
    async with Command(*arguments, vast=vast, driver=driver) as command:
        await eventually(lambda: any(worker.report["cur_load"] == 250 for worker in vast.workers.values()))
        assert command.said("instance alpha")
        command.process.terminate()
        assert await command.status() == 143


async def test_why_the_last_poll_failed_is_on_the_screen_and_in_the_end(vast):
    vast.failing_polls += [502] * 100
    async with Command("--wait", "3", vast=vast) as command:
        assert await command.status() == 1
    assert command.said("#1 still waiting: the autoscaler answers HTTP 502 - .*out of order")
    assert command.said("#1 not reserved: no worker within 3 s; at last: the autoscaler answers HTTP 502")


async def test_holding_ends_when_the_worker_lets_go(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        url = (await eventually(lambda: command.said(r"held .*, (http\S+)")))[1]
        status, answer = await release(worker_at(vast, url))
        assert status == 200 and answer["released"]
        assert await command.status() == 0
    assert command.said("the worker let go") and command.errors == []


async def test_a_lost_worker_is_status_1(vast):
    async with Command("--hold", "inf", "--lifetime", "2", vast=vast) as command:
        url = (await eventually(lambda: command.said(r"held .*, (http\S+)")))[1]
        worker = worker_at(vast, url)
        worker.process.kill()
        await exit_status(worker)
        with hold_port(worker.port):
            assert await command.status() == 1
    assert command.said("#1 lost after .*can't be reached") and command.errors == []


async def test_no_worker_in_time_is_status_1(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(reserve(endpoint))
        async with Command("--wait", "1", vast=vast) as command:
            assert await command.status() == 1
    assert command.said("#1 not reserved: no worker within 1 s") and command.errors == []


async def test_a_refusal_is_status_1_and_one_line(vast):
    vast.failing_polls += [401]
    async with Command(vast=vast) as command:
        assert await command.status() == 1
    assert command.said("#1 not reserved: .*HTTP 401.*out of order") and command.errors == []


async def test_a_client_that_is_killed_frees_its_worker(vast):
    async with Command("--hold", "inf", "--lifetime", "2", vast=vast) as command:
        await command.says("#1 held")
        await eventually(lambda: reservations_over_time(vast) == [0, 1])
        command.process.kill()
        killed = time.monotonic()
        await eventually(lambda: statuses(vast) == ["Success"])
        assert time.monotonic() - killed < 1.5 * 2 + 5 + 3  # 3 for the report


STAGES = [  # what was said last, interval, plateau
    ("connecting", 2, 60),
    ("waiting for a worker", 2, 60),
    ("#1 held", 60, 60),
    ("#3 held", 0.3, 60),
    ("#1 released after", 2, 0.5),
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("stage", "interval", "plateau"), STAGES)
async def test_a_signal_closes_every_session_at_any_stage(vast, stage, interval, plateau, number):
    waiting = "waiting" in stage
    if waiting:
        held = [await session(vast, worker) for worker in list(vast.workers.values())]
        await eventually(lambda: all(worker.report["cur_load"] for worker in list(vast.workers.values())))
    async with Command("--demo", "--interval", str(interval), "--plateau", str(plateau), vast=vast) as command:
        await command.says(stage)
        command.process.send_signal(number)
        start = time.monotonic()
        assert await command.status() == 128 + number
        assert time.monotonic() - start < 8  # 3 for the sessions
    assert command.errors == []
    if waiting:
        held = [answer["released"] for _, answer in [await release(worker) for worker in list(vast.workers.values())]]
        assert held == [True] * WORKERS
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})
    assert set(statuses(vast)) <= {"Success"}


async def test_a_reader_that_goes_away_ends_the_command_with_its_session_closed(vast):
    async with Command("--hold", "inf", vast=vast, reads=1) as command:
        assert await command.status() == 143
    assert command.lines[0].endswith("connecting") and command.errors == []
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_that_ends_the_reader_of_the_output_too_closes_the_session(vast, number):
    """`null_client.py | tee` and Ctrl-C."""
    command = [sys.executable, "-c", Command.DRIVER.format(url=vast.url), "--hold", "inf"]
    environment = BARE | {"PYTHONPATH": str(HERE), "VAST_API_KEY": vast.api_key, "VAST_ENDPOINT": vast.endpoint_name}
    unread, output = os.pipe()
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=output)
    os.close(output)
    while b"held after" not in await asyncio.to_thread(os.read, unread, 65536):
        pass
    process.send_signal(signal.SIGSTOP)  # so that it sees both at once
    os.close(unread)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    assert await process.wait() == 128 + number
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


async def test_a_worker_that_is_lost_stays_so_when_its_row_is_released_meanwhile():
    async with stubbed() as (stub, endpoint):
        display = null_client.Display(1, lambda: None)
        args = SimpleNamespace(cost=100, lifetime=4, wait=10)
        holding = asyncio.create_task(null_client.occupy("#1", endpoint, args, display))
        held = await eventually(lambda: isinstance(display.rows["#1"], null_client.Held) and display.rows["#1"])
        stub.fate = lambda route, _: 30 if route == END else (502, b"")
        with pytest.raises(WorkerLost):
            await held.session.ended()
        await eventually(lambda: stub.times(END))  # it is told once more
        holding.cancel()
        await asyncio.wait({holding})
        assert (display.rows["#1"].how, display.rows["#1"].held_at) == ("lost", held.held_at)
        display.close()


async def test_a_second_signal_ends_the_client_at_once(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        url = (await eventually(lambda: command.said(r"held .*, (http\S+)")))[1]
        worker = worker_at(vast, url)
        worker.process.send_signal(signal.SIGSTOP)  # the session can't be closed
        try:
            command.process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.5)
            assert command.process.poll() is None
            command.process.send_signal(signal.SIGINT)
            assert await command.status(timeout=2) == 130
        finally:
            worker.process.send_signal(signal.SIGCONT)
    assert command.errors == []


def test_the_command_has_the_defaults_of_its_help(monkeypatch):
    for name in ("VAST_ENDPOINT", "VAST_INSTANCE"):
        monkeypatch.delenv(name, raising=False)
    expected = {"endpoint": None, "instance": "prod", "local": True, "demo": False, "hold": 180, "interval": 30}
    expected |= {"plateau": 300, "count": 3, "cost": 100, "lifetime": 120, "wait": 1800}
    assert vars(null_client.parse_arguments(["--local"])) == expected
    monkeypatch.setenv("VAST_ENDPOINT", "mine")
    monkeypatch.setenv("VAST_INSTANCE", "alpha")
    args = null_client.parse_arguments([])
    assert (args.endpoint, args.instance) == ("mine", "alpha")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument --endpoint: needed, or $VAST_ENDPOINT, or --local"),
        (["--local", "--hold", "-1"], "argument --hold: -1 is not within"),
        (["--local", "--hold", "nan"], "argument --hold: nan is not within"),
        (["--local", "--hold", "1e9"], "argument --hold: 1e9 is not within"),
        (["--local", "--interval", "0"], "argument --interval: 0 is not within"),
        (["--local", "--plateau", "inf"], "argument --plateau: inf is not within"),
        (["--local", "--count", "0"], "argument --count: 0 is not within"),
        (["--local", "--count", "2.5"], "argument --count: '2.5' is not a whole number"),
        (["--local", "--cost", "-100"], "argument --cost: -100 is not within"),
        (["--local", "--cost", "much"], "argument --cost: 'much' is not a whole number"),
        (["--local", "--lifetime", "0.5"], "argument --lifetime: 0.5 is not within"),
        (["--local", "--lifetime", "inf"], "argument --lifetime: inf is not within"),
        (["--local", "--wait=-inf"], "argument --wait: -inf is not within"),
        (["--endpoint", "x", "--instance", "moon"], "argument --instance: 'moon' is none of prod, alpha"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("VAST_ENDPOINT", raising=False)
    with pytest.raises(SystemExit) as exit:
        null_client.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_client_that_was_copied_alone_says_what_its_stand_in_needs(tmp_path):
    shutil.copy(HERE / "null_client.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_client.py", "--local"], BARE)
    assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (2, 1, 1)
    assert done.stderr.startswith("null_client: --local needs null_local.py beside this file: ")


async def test_without_an_api_key_one_line_says_both_ways_to_give_one():
    async with Command("--endpoint", "x") as command:
        assert await command.status() == 2
    (line,) = command.errors
    assert "VAST_API_KEY" in line and "vastai set api-key" in line


async def test_the_saved_api_key_is_used_and_an_unknown_endpoint_is_told_from_the_known(vast, tmp_path):
    (tmp_path / "vastai").mkdir()
    (tmp_path / "vastai" / "vast_api_key").write_text(vast.api_key)
    saved = {"XDG_CONFIG_HOME": str(tmp_path), "VAST_API_KEY": ""}
    async with Command("--endpoint", "typo", vast=vast, environment=saved) as command:
        assert await command.status() == 2
    assert command.errors == ["null_client: no endpoint 'typo'; there are: local"]


async def test_a_wrong_api_key_is_one_line(vast):
    async with Command(vast=vast, environment={"VAST_API_KEY": "wrong"}) as command:
        assert await command.status() == 1
    (line,) = command.errors
    assert line.startswith("null_client: ") and "401" in line


# README.md


def readme(*, holding):
    """The one code block of the README that holds this text."""
    blocks = re.findall(r"^```(?:sh|python)\n(.*?)^```", (HERE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if holding in block]
    return block


async def connected(port):
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True


recipes = installed("redis", "trustme", "redis-server", "redis-cli", "jq", "curl", "setpriv")

# What the reader brings. Each start of a job is noted. A `first` hangs the first time that it is started; a `long`
# takes longer than a reservation lasts that nobody renews, and its worker after that.
WORK_SH = """#!/bin/sh
id=$(printf %s "$1" | jq .id) || exit 1
task=$(printf %s "$1" | jq -r .task)
redis-cli -u "$REDIS_URL" RPUSH started "$id" >/dev/null
case "$task" in
fail) exit 1 ;;
hang) exec sleep 100 ;;
long) sleep 11 ;;
together) while [ "$(redis-cli -u "$REDIS_URL" EXISTS apart)" = 1 ]; do sleep 0.1; done ;;
some) sleep 2 ;;
first) [ -z "$(redis-cli -u "$REDIS_URL" SET pid $$ NX)" ] || exec sleep 100 ;;
esac
sleep 0.4
printf %s "did $id"
"""
WORK_PY = """
import os, time, redis
queue = redis.Redis.from_url(os.environ["REDIS_URL"])
def work(job):
    queue.rpush("started", job["id"])
    if job["task"] == "fail":
        raise ValueError("no")
    if job["task"] == "hang" or (job["task"] == "first" and queue.set("pid", os.getpid(), nx=True)):
        time.sleep(100)
    while job["task"] == "together" and queue.exists("apart"):
        time.sleep(0.1)
    time.sleep({"long": 11, "some": 2}.get(job["task"], 0.4))
    return f"did {job['id']}"
"""


RECIPES = {
    "consumer.sh": "# consumer.sh: ./work",
    "consumer.py": "# consumer.py",
    "dispatcher.py": "# dispatcher.py",
    "own_worker.py": "async def run_alone",
    "own_consumer.sh": "# own_consumer.sh",
    "raw.sh": "place=0 id=",
}


def recipe(name, **constants):
    """A recipe as printed, but for the values of constants."""
    text = readme(holding=RECIPES[name])
    for constant, value in constants.items():
        if found := re.search(rf"^([A-Z, ]*\b{constant}\b[A-Z, ]*) = ([\d, ]+?)(?=  #|$)", text, re.MULTILINE):
            values = dict(zip(found[1].split(", "), found[2].split(", "), strict=True)) | {constant: str(value)}
            text = text.replace(found[0], f"{', '.join(values)} = {', '.join(values.values())}")
        else:
            text, changed = re.subn(rf"\b{constant.lower()}=\d+", f"{constant.lower()}={value}", text)
            assert changed == 1, constant
    return text


class Farm:
    """Redis, LocalVast, and beside each worker the consumer, which goes with it and is started again by itself."""

    def __init__(self, folder, language=None, tls=False, limit=60, max_workers=3, idle=1.5):
        """Without a language no consumers are run."""
        self.folder, self.language, self.limit = folder, language, limit
        self.vast = LocalVast(max_workers=max_workers, inactivity_timeout=idle, control_port=None, tls=tls)
        self.processes, self.consumers, self.most, self.supervise, self.stack = (
            [],
            {},
            0,
            True,
            contextlib.AsyncExitStack(),
        )

    async def start(self, *command, **environment):
        environment = BARE | {"PYTHONPATH": str(HERE), "REDIS_URL": self.url} | environment
        log = (self.folder / "log").open("ab")
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self.processes.append(process)
        return process

    async def start_redis(self):
        server = None
        while server is None or server.returncode is not None:  # somebody else was given the port meanwhile
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url = f"redis://127.0.0.1:{port}"
            server = await self.start("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "")
            await eventually(lambda server=server, port=port: server.returncode is not None or answers_ping(port))
        self.redis = server

    async def start_dispatcher(self, autoscaler=None):
        self.dispatcher = await self.start(
            sys.executable,
            "dispatcher.py",
            AUTOSCALER=autoscaler or self.vast.url,
            VAST_API_KEY=self.vast.api_key,
            VAST_ENDPOINT=self.vast.endpoint_name,
        )

    async def kill(self, process):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def run_consumers(self):
        while self.language:
            workers = {number: worker for number, worker in self.vast.workers.items() if worker.process}
            for number, (consumer, worker) in list(self.consumers.items()):
                if worker.process.returncode is not None:
                    await self.kill(consumer)  # the instance is gone
                    del self.consumers[number]
            for number, worker in workers.items():
                consumer, _ = self.consumers.get(number, (None, None))
                if worker.process.returncode is None and (
                    consumer is None or (self.supervise and consumer.returncode is not None)
                ):
                    command = ("sh", "consumer.sh") if self.language == "sh" else (sys.executable, "consumer.py")
                    self.consumers[number] = (
                        await self.start(*command, NULL_CONTROL_PORT=str(worker.control_port)),
                        worker,
                    )
            self.most = max(self.most, self.reserved)
            await asyncio.sleep(0.05)

    async def __aenter__(self):
        for consumer in ("consumer.sh", "consumer.py"):
            (self.folder / consumer).write_text(recipe(consumer, LEASE=4, BEAT=1, LIMIT=self.limit))
        (self.folder / "work").write_text(WORK_SH)
        (self.folder / "work").chmod(0o755)
        (self.folder / "work.py").write_text(WORK_PY)
        await self.stack.__aenter__()
        self.stack.push_async_callback(self.end)
        await self.stack.enter_async_context(self.vast)
        vast, authority = self.vast, self.vast.authority if self.vast.tls else None
        client = (
            "import os, vastai, null_local\n"
            "vastai.Serverless = lambda key, **options: null_local.LocalClient(key, authority="
            f"{authority!r}, webserver_url={vast.url!r}, autoscaler_url=os.environ['AUTOSCALER'], **options)\n"
        )
        (self.folder / "dispatcher.py").write_text(client + recipe("dispatcher.py", BOUND=3, LIFETIME=4))
        await self.start_redis()
        self.queue = redis.asyncio.from_url(self.url, decode_responses=True)
        self.stack.push_async_callback(self.queue.aclose)
        running = asyncio.create_task(self.run_consumers())
        self.stack.push_async_callback(asyncio.wait, {running}, timeout=5)
        self.stack.callback(running.cancel)
        return self

    async def __aexit__(self, *error):
        if error[0]:
            print(self.log[-6000:])
        await self.stack.aclose()

    async def end(self):
        for process in self.processes:
            await self.kill(process)

    async def put(self, *jobs):
        await self.queue.rpush("jobs", *(job if isinstance(job, str) else json.dumps(job) for job in jobs))

    async def put_until_all_work(self, *some):
        """Put these after three that end only once as many workers are reserved."""
        await self.queue.set("apart", 1)
        await self.put(*({"id": n, "task": "together"} for n in range(3)), *some)
        await eventually(lambda: self.most == 3)
        await self.queue.delete("apart")

    async def held_by(self, job_id):
        """The number of the worker whose consumer has this job in hand."""
        async for key in self.queue.scan_iter("working:*"):
            if any(json.loads(job)["id"] == job_id for job in await self.queue.lrange(key, 0, -1)):
                for number, (_, worker) in self.consumers.items():
                    if (await request("GET", f"{worker.control_url}/session"))[2]["session_id"] == key.split(":")[1]:
                        return number
        return None

    async def started(self):
        return Counter(map(int, await self.queue.lrange("started", 0, -1)))

    async def settled(self, results, failed=()):
        """Wait until all is done: nothing is left in Redis but what is to be there, and no worker."""

        await eventually(lambda: self.has(results), timeout=40)
        await eventually(lambda: not self.vast.workers)
        assert sorted(await self.queue.lrange("failed", 0, -1)) == sorted(failed)
        await eventually(self.no_other_keys)
        expected = {str(n): f"did {n}" for n in range(results)}
        assert await self.queue.hgetall("results") == expected

    async def has(self, results):
        return await self.queue.hlen("results") == results

    async def no_lease(self):
        return not await self.queue.keys("lease:*")

    @property
    def reserved(self):
        return sum(bool(worker.report.get("cur_load")) for worker in self.vast.workers.values())

    @property
    def log(self):
        return (self.folder / "log").read_text()

    async def work_is_gone(self):
        return not Path(f"/proc/{await self.queue.get('pid')}").exists()

    async def no_other_keys(self):
        return {*await self.queue.keys("*")} <= {"results", "started", "failed", "pid"}


async def answers_ping(port):
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PING\r\n")
        try:
            return await asyncio.wait_for(reader.readline(), 1) == b"+PONG\r\n"
        finally:
            writer.close()


JOBS = 30
ONE_OR_BOTH = ["sh", "py"] if os.environ.get("BOTH_LANGUAGES") else []


def jobs(**special):
    return [{"id": n, "task": special.get(f"job_{n}", "any")} for n in range(JOBS)]


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_thirty_jobs_are_done_once_by_workers_that_come_and_go(tmp_path, language):
    async with Farm(tmp_path, language, tls=True, idle=3) as farm:
        await farm.start_dispatcher()
        await farm.put_until_all_work(*jobs(job_3="long")[3:])
        await eventually(lambda: farm.has(results=JOBS))
        await eventually(lambda: not farm.reserved, timeout=4)  # released, where an expiry takes longer
        await farm.settled(JOBS)
        assert await farm.started() == dict.fromkeys(range(JOBS), 1)
        assert farm.most == 3 and farm.vast.started == 3
        assert farm.dispatcher.returncode is None and "Traceback" not in farm.log


@recipes
@pytest.mark.parametrize("language", ONE_OR_BOTH or ["py"])
async def test_a_dispatcher_that_is_killed_and_started_again_changes_nothing(tmp_path, language):
    async with Farm(tmp_path, language) as farm:
        await farm.start_dispatcher()
        await farm.put_until_all_work(*jobs()[3:])
        await farm.kill(farm.dispatcher)
        await farm.put(*({"id": JOBS + n, "task": "any"} for n in range(10)))
        bad = [{"error_msg": "not now"}] * 3  # Vast's list may be empty at first

        async def forward(asked):
            if asked.path == "/get_endpoint_workers/" and bad:
                return web.json_response(bad.pop())
            status, _, answer = await request("POST", farm.vast.url + asked.path, json=await asked.json())
            return web.json_response(answer, status=status)

        async with server(web.post("/{path:.*}", forward)) as autoscaler:
            await farm.start_dispatcher(autoscaler)
            await farm.settled(JOBS + 10)
        assert await farm.started() == dict.fromkeys(range(JOBS + 10), 1)
        assert not bad and farm.vast.last_request == 3  # it asked for none that was reserved already


@recipes
async def test_the_dispatcher_takes_back_what_it_asks_for_and_never_what_works(tmp_path):
    async with Farm(tmp_path, "py", max_workers=1) as farm:
        await farm.start_dispatcher()
        await farm.put(*({"id": n, "task": "any"} for n in range(4)), {"id": 4, "task": "some"})
        await eventually(lambda: farm.has(results=5))
        assert farm.vast.last_request == 3  # the others' places go unpolled
        await farm.settled(5)
        assert await farm.started() == dict.fromkeys(range(5), 1)
        assert len(farm.vast.ended) == 1


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_a_consumer_pulls_only_while_it_is_reserved(tmp_path, language):
    async with Farm(tmp_path, language, max_workers=1, idle=60) as farm:
        worker = await fresh(farm.vast)
        await farm.put(*({"id": n, "task": "some"} for n in range(3)))
        first = await session(farm.vast, worker)
        await eventually(farm.started)
        assert (await release(worker))[1]["released"]
        stale = await request("POST", f"{worker.control_url}/renew?session_id={first}")
        assert stale[2] == {"renewed": False, "reason": "session ID is not active"}
        await eventually(lambda: farm.has(results=1))
        await eventually(farm.no_lease)  # it knows
        assert await farm.started() == {0: 1} and await farm.queue.llen("jobs") == 2
        await session(farm.vast, worker)
        await eventually(lambda: farm.has(results=3))
        await eventually(farm.no_lease)
        assert (await release(worker))[1] == {"released": False, "reason": "no active session"}


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_a_consumer_that_loses_redis_releases(tmp_path, language):
    async with Farm(tmp_path, language, max_workers=1, idle=60) as farm:
        worker = await fresh(farm.vast)
        await farm.put({"id": 0, "task": "some"})
        await session(farm.vast, worker)
        await eventually(farm.started)
        await farm.kill(farm.redis)
        await eventually(lambda: is_free(f"{worker.control_url}/session"), timeout=20)


@recipes
@pytest.mark.parametrize("language", ONE_OR_BOTH or ["py"])
async def test_the_job_of_a_worker_that_is_killed_runs_again(tmp_path, language):
    async with Farm(tmp_path, language) as farm:
        await farm.start_dispatcher()
        await farm.put(*jobs(job_7="first"))
        number = await eventually(lambda: farm.held_by(7))
        await eventually(lambda: farm.queue.get("pid"))
        await farm.kill(farm.vast.workers[number].process)
        await farm.settled(JOBS)
        assert await farm.started() == {**dict.fromkeys(range(JOBS), 1), 7: 2}


@recipes
@pytest.mark.parametrize(
    ("language", "back"),
    [("sh", "at once"), ("py", "later"), *((other, back) for other, back in zip(ONE_OR_BOTH, ["later", "at once"]))],
)
async def test_the_job_of_a_consumer_that_is_killed_runs_again(tmp_path, language, back):
    async with Farm(tmp_path, language) as farm:
        await farm.start_dispatcher()
        await farm.put(*jobs(job_7="first"))
        number = await eventually(lambda: farm.held_by(7))
        await eventually(lambda: farm.queue.get("pid"))
        consumer, worker = farm.consumers[number]
        farm.supervise = back == "at once"
        await farm.kill(consumer)
        if language == "sh":
            await eventually(farm.work_is_gone)
        if back == "later":
            about = f"{worker.control_url}/session"
            await eventually(lambda: is_free(about), timeout=15)  # nobody renews it any more
            farm.supervise = True
        await farm.settled(JOBS)
        assert ("put back" in farm.log) == (back == "later")  # it finds what its predecessor had in hand by itself
        assert await farm.started() == {**dict.fromkeys(range(JOBS), 1), 7: 2}


@recipes
@pytest.mark.parametrize("consumed", [True, False])
async def test_a_job_that_needs_a_reservation_of_its_own_gets_it_or_is_taken_back(tmp_path, consumed):
    async with Farm(tmp_path, max_workers=1) as farm:
        names = {"json": json, "reserve": reserve}
        exec(recipe("own_worker.py"), names)  # noqa: S102
        job = {"id": 0, "task": "any"}
        async with farm.vast.client() as client:
            endpoint = await client.get_endpoint(farm.vast.endpoint_name)
            running = asyncio.create_task(names["run_alone"](job, endpoint, farm.queue))
            own = await eventually(lambda: farm.queue.keys("jobs:*"))
            (worker,) = farm.vast.workers.values()
            assert own == [f"jobs:127.0.0.1:{worker.port}"]
            if consumed:
                port = {"WORKER_PORT": str(worker.port), f"VAST_TCP_PORT_{worker.port}": str(worker.port)}
                control = {"NULL_CONTROL_PORT": str(worker.control_port), "PUBLIC_IPADDR": "127.0.0.1"}
                await farm.start("sh", "-c", recipe("own_consumer.sh"), **port, **control)
            else:
                assert (await request("POST", f"{worker.control_url}/release"))[0] == 200
            assert await asyncio.wait_for(running, 20) == ("did 0" if consumed else None)
        assert not await farm.queue.keys("jobs*")


async def is_free(url):
    with contextlib.suppress(aiohttp.ClientError):
        return (await request("GET", url))[2]["session_id"] is None
    return True  # free for so long that it was stopped


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_a_job_that_keeps_failing_goes_aside_and_so_does_one_that_hangs(tmp_path, language):
    async with Farm(tmp_path, language, limit=2, max_workers=1) as farm:
        await farm.start_dispatcher()
        fails, hangs = {"id": 1, "task": "fail"}, {"id": 2, "task": "hang"}
        await farm.put(fails, "no JSON", hangs, {"id": 0, "task": 'it\'s \\ "5" % $HOME\n'})
        await farm.settled(1, failed=[json.dumps(fails), "no JSON", json.dumps(hangs)])
        started = await farm.started()
        assert (started[0], started[1], started[2]) == (1, 3, 3)


class Crooked:
    """A router in front of LocalVast's: after the first answer it misbehaves, then passes everything through."""

    def __init__(self, vast):
        self.vast, self.places = vast, []
        self.answers = [
            web.Response(text="<html>please log in</html>", content_type="text/html"),
            web.Response(status=502, text="bad gateway"),
            web.json_response({"endpoint": "local", "status": "loading"}),
            web.json_response({"error_msg": "try again"}),
            web.json_response(["?"]),
            web.json_response({"request_idx": 0}),
            web.json_response({"request_idx": "x", "url": None}),
            web.Response(status=500, text='{"request_idx": 77, "url": "http://127.0.0.1:1"}'),
        ]

    async def route(self, asked):
        query = await asked.json()
        self.places.append(query["request_idx"])
        if len(self.places) > 1 and self.answers:
            return self.answers.pop(0)
        status, _, answer = await request("POST", f"{self.vast.url}/route/", json=query)
        return web.json_response(answer, status=status)


@recipes
async def test_the_raw_http_recipe_keeps_its_place_whatever_it_is_answered(tmp_path):
    async with LocalVast(max_workers=1, inactivity_timeout=30, control_port=None, tls=True) as vast:
        crooked = Crooked(vast)
        async with server(web.post("/route/", crooked.route)) as url:
            environment = {"AUTOSCALER": url, "VAST_ENDPOINT": vast.endpoint_name, "ENDPOINT_KEY": vast.api_key}
            script = (
                recipe("raw.sh")
                .replace("|| sleep 4", "|| sleep 0.2")
                .replace("sleep 1\n", "sleep 0.2\n")
                .replace(": 20'", ": 1'")
            )
            log = (tmp_path / "log").open("ab")
            process = await asyncio.create_subprocess_exec(
                "sh",
                "-euc",
                script,
                env=BARE | environment | {"VAST_CA": vast.authority},
                stdout=subprocess.PIPE,
                stderr=log,
            )
            try:
                worker = await eventually(lambda: next((w for w in vast.workers.values() if w.state == "IDLE"), None))
                # Another one's, whom the router doesn't know of: 429 for the first creates.
                async with aiohttp.ClientSession() as http, vast.client() as client:
                    tls = await client.get_ssl_context()
                    body = {"auth_data": vast.auth_data(worker), "payload": {"lifetime": 60}}
                    async with http.post(f"{worker.url}/session/create", json=body, ssl=tls) as answer:
                        assert answer.status == 201
                    vast.overbooked = True
                    routed = worker.routed
                    await eventually(lambda: worker.routed >= routed + 2)
                    vast.overbooked = False
                    assert (await request("POST", f"{worker.control_url}/release"))[0] == 200
                output, _ = await asyncio.wait_for(process.communicate(), 30)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                log.close()
        errors = (tmp_path / "log").read_text()
        assert process.returncode == 0, errors
        decoder, text, answers = json.JSONDecoder(), output.decode(), []
        while text:
            answer, end = decoder.raw_decode(text)
            answers.append(answer)
            text = text[end:].lstrip()
        ping, look, end = answers
        assert ping == {"result": {}} and look["lifetime"] == 120 and end["ended"] is True
        assert not crooked.answers and "502" in errors and "429" in errors
        first, *later = crooked.places
        assert first == 0 and set(later) == {1}  # one request to the router, which kept its place
        await eventually(lambda: [e["status"] for e in vast.ended if e["request_idx"] == 1][-1:] == ["Success"])


async def test_the_readmes_reserve_needs_nothing_but_null_client(vast, tmp_path):
    shutil.copy(HERE / "null_client.py", tmp_path)
    program = (
        "import asyncio, ssl, sys\n"
        "from vastai import Serverless\n"
        "from null_client import reserve\n"
        "class Client(Serverless):\n"
        "    async def get_ssl_context(self): return ssl.create_default_context()\n"
        "async def main():\n"
        f"    async with Client({vast.api_key!r}, autoscaler_url={vast.url!r}, webserver_url={vast.url!r}) as client:\n"
        "        async with reserve(await client.get_endpoint('local')) as session:\n"
        "            print(session.session_id, session.url)\n"
        "asyncio.run(main())\n"
    )
    environment = BARE | {"PYTHONPATH": str(tmp_path)}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.split()[1] in [worker.url for worker in list(vast.workers.values())]
    await eventually(lambda: statuses(vast) == ["Success"])


# null_local.py


def control_urls(command):
    return re.findall(r"control (http\S+)", "\n".join(command.lines))


async def gone(url):
    """Whether nothing listens there any more: each worker's control server lives as long as its process."""
    try:
        await request("GET", f"{url}/health")
    except aiohttp.ClientError:
        return True


@pytest.mark.parametrize("how", ["end", "SIGINT", "SIGTERM", "SIGKILL"])
async def test_a_local_run_leaves_no_worker_behind_however_it_ends(how):
    async with Command("--local", "--hold", "1" if how == "end" else "inf") as command:
        await command.says("#1 held")
        url = control_urls(command)[-1]  # of the one that is held
        assert command.errors == [] and not await gone(url)
        if how == "SIGINT":
            os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        elif how != "end":
            command.process.send_signal(signal.Signals[how])
        expected = {"end": 0, "SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[how]
        assert await command.status() == expected
        await eventually(lambda: gone(url), timeout=10)


async def test_localvast_stops_its_workers_after_an_exception():
    with pytest.raises(KeyError):
        async with LocalVast(control_port=None) as vast:
            worker = await fresh(vast)
            raise KeyError("job")
    assert worker.process.returncode == 0


async def test_workers_start_on_demand_up_to_the_most_and_stop_when_idle():
    async with LocalVast(max_workers=2, inactivity_timeout=4, control_port=None) as vast:
        async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
            assert not vast.workers
            waiting = [asyncio.ensure_future(stack.enter_async_context(reserve(endpoint, wait=30))) for _ in range(3)]
            await eventually(lambda: sum(task.done() for task in waiting) == 2)
            assert len(vast.workers) == 2
            one, two = {task.result().url for task in waiting if task.done()}
            await release(worker_at(vast, one))
            await asyncio.wait(waiting)
            assert {task.result().url for task in waiting} == {one, two} and vast.started == 2
        await eventually(lambda: not vast.workers)


async def test_a_slow_start_is_waited_for_and_shown():
    async with LocalVast(control_port=None) as vast:
        vast.start_delay = 2
        async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
            opening = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
            await eventually(lambda: vast.workers)
            assert [worker.status for worker in await endpoint.get_workers()] == ["MODEL_LOADING"]
            await asyncio.wait_for(opening, 30)
            assert [worker.status for worker in await endpoint.get_workers()] == ["IDLE"]
            opening.result()


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CONTAINER_ID": "x"}, "CONTAINER_ID is 'x', should be a number"),
        ({"BACKEND_HEALTH_URL": "http://127.0.0.1:9/", "BACKEND_START_TIMEOUT": "0.1"}, "not well within 0.1 s"),
        ({"TOO_LONG": "x" * (1 << 20)}, "can't be started: .*Argument list too long"),
    ],
)
async def test_workers_that_cannot_start_end_the_wait(environment, why):
    events = []
    async with LocalVast(control_port=None, environment=environment, on_event=events.append) as vast:
        with pytest.raises(NotReserved, match="HTTP 409.*3 workers in a row failed to start"):
            async with endpoint_of(vast) as endpoint, reserve(endpoint):
                pass
    assert len([event for event in events if re.search(why, event)]) >= 3


async def test_an_idle_worker_is_stopped_at_once_where_it_is_to_be_and_a_loading_one_is_not():
    events = []
    async with LocalVast(inactivity_timeout=0, control_port=None, on_event=events.append) as vast:
        vast.start_worker()
        await eventually(lambda: not vast.workers)
    assert [re.match(r"worker 1 (on|ready|stopping: idle|ended, status 0)", event)[1] for event in events] == [
        "on",
        "ready",
        "stopping: idle",
        "ended, status 0",
    ]


def processes_of(folder):
    """The workers of the LocalVast with that folder, which is named in their arguments."""
    found = []
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in arguments.read_bytes():
                found.append(arguments.parent.name)
    return found


async def test_leaving_waits_for_the_starts_that_are_under_way():
    for delay in (0, 0.01, 60):
        async with LocalVast(control_port=None) as vast:
            vast.start_delay = delay
            for _ in range(3):
                vast.start_worker()
            await asyncio.sleep(delay % 1)
        assert processes_of(vast.folder) == [] and not Path(vast.folder).exists()


async def test_leaving_is_carried_through_a_cancellation_at_any_step():
    folders = []

    async def hold():
        async with LocalVast(control_port=None) as vast:
            folders.append(vast.folder)
            vast.start_worker()
            await asyncio.sleep(3600)

    for steps in range(3):
        holding = asyncio.create_task(hold())
        await eventually(lambda number=steps + 1: len(folders) == number and processes_of(folders[-1]))
        for _ in range(2):
            holding.cancel()
            for _ in range(steps):
                await asyncio.sleep(0)
        await asyncio.wait({holding})
        assert holding.cancelled() and processes_of(folders[-1]) == [] and not Path(folders[-1]).exists()


def test_a_localvast_outside_of_its_block_says_so_in_a_line():
    for use in (LocalVast.client, LocalVast.start_worker, lambda vast: vast.url):
        with pytest.raises(RuntimeError, match=r"^LocalVast lives in its block: async with LocalVast\(\) as vast$"):
            use(LocalVast())


FORKING = (
    "import asyncio, os, sys, time\n"
    "from null_local import LocalVast\n"
    "async def main():\n"
    "    async with LocalVast(control_port=None) as vast:\n"
    "        worker = vast.start_worker()\n"
    "        while worker.state != 'IDLE': await asyncio.sleep(0.05)\n"
    "        if not (child := os.fork()): os.close(1), time.sleep(60), os._exit(0)\n"
    "        print(vast.folder, worker.process.pid, child, flush=True)\n"
    "        await asyncio.sleep(60)\n"
    "asyncio.run(main())\n"
)


async def test_a_killed_localvast_leaves_no_worker_though_a_child_of_it_lives_and_its_folder_to_the_next():
    environment = BARE | {"PYTHONPATH": str(HERE)}
    command = (sys.executable, "-c", FORKING)
    program = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    somebody_elses = Path(tempfile.gettempdir(), f"{null_local.PREFIX}{'9' * 30}-x")  # no number of a process
    try:
        somebody_elses.mkdir(exist_ok=True)
        folder, worker, child = (await program.stdout.readline()).decode().split()
        assert processes_of(folder) == [worker]
        program.kill()
        await program.wait()
        await eventually(lambda: processes_of(folder) == [], timeout=5)
        os.kill(int(child), signal.SIGKILL)
        async with LocalVast(control_port=None):
            assert not Path(folder).exists() and somebody_elses.exists()
    finally:
        somebody_elses.rmdir()
        with contextlib.suppress(ProcessLookupError):
            program.kill()


async def test_a_request_that_is_no_longer_polled_for_keeps_its_place_and_holds_up_no_worker(vast, monkeypatch):
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
    async with LocalVast(max_workers=1, control_port=None) as vast, vast.client() as client:
        (endpoint,) = await client.get_endpoints()
        assert (await client.fetch_endpoint(endpoint.id)).config.endpoint_name == vast.endpoint_name
        query = {"endpoint": vast.endpoint_name, "api_key": vast.api_key, "cost": 100, "replay_timeout": 0.5}

        async def route(request_idx):
            return (await post(f"{vast.url}/route/", json={**query, "request_idx": request_idx}))[1]

        assert await route(0) == {"endpoint": "local", "request_idx": 1, "status": "1 MODEL_LOADING"}
        vast.forgetful = True
        assert await route(1) == {"endpoint": "local", "status": "1 MODEL_LOADING"}
        vast.forgetful = False
        (worker,) = vast.workers.values()
        await eventually(lambda: worker.state == "IDLE")
        ready = await route(1)
        names = ["__request_id", "cost", "endpoint", "reqnum", "request_idx", "signature", "url"]
        assert sorted(ready) == names and (ready["reqnum"], ready["request_idx"]) == (1, 1)
        await session(vast, worker, auth=ready)
        await eventually(lambda: worker.report["cur_load"] == 100)
        assert (await route(0))["request_idx"] == 2
        await eventually(lambda: time.monotonic() > vast.waiting[2])  # its place is kept for half a second
        assert (await route(0))["request_idx"] == 3
        await release(worker)
        await eventually(lambda: worker.free)
        again = await route(3)
        assert (again["url"], again["reqnum"]) == (worker.url, 2)  # 2 is forgotten, and the number is the worker's own
        (seen,) = await endpoint.get_workers()
        assert (seen.id, seen.status, seen.cur_load, seen.perf) == (worker.number, "IDLE", 0, 100)


@installed("trustme")
async def test_over_https_a_reservation_is_held_kept_handed_over_and_released():
    async with LocalVast(max_workers=1, control_port=None, tls=True) as vast:
        async with endpoint_of(vast) as endpoint:
            async with reserve(endpoint, lifetime=3) as reservation:
                assert reservation.url.startswith("https://")
                assert not await reservation.ended(timeout=3 + 5.5)  # kept alive: 5 to the next sweep
                reservation.hand_over()
            (worker,) = vast.workers.values()
            assert (await post(f"{worker.control_url}/renew"))[1]["session_id"] == reservation.session_id
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
        assert b"Traceback" not in worker.log.read_bytes()[logged:]
    assert statuses(vast) == ["Success"] * 2


def test_what_strangers_cause_in_the_log_hides_nobody_elses():
    filter_, shown = null_worker.OneLine(), []
    for name, level in [("null_worker", 30), ("asyncio", 40), ("null_worker", 30), ("vastai", 30), ("null_worker", 40)]:
        record = logging.LogRecord(name, level, "", 0, "a\nb", (), None)
        shown.append(filter_.filter(record) and record.msg)
    assert shown == ["a\\nb", "a\\nb", False, "a\\nb", "a\\nb"]


# Vast's bootstrap


@pytest.mark.parametrize("module", ["workers.null.worker", "workers.null.client"])
def test_the_modules_for_vasts_bootstrap_run(module):
    done = run([sys.executable, "-m", module], BARE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "not a Vast Serverless instance" in done.stderr or "argument --endpoint" in done.stderr


async def test_the_module_is_a_worker_that_can_be_reserved_and_released(tmp_path):
    shutil.copytree(HERE / "workers", tmp_path / "workers")
    shutil.copy(HERE / "null_worker.py", tmp_path)
    script = tmp_path / "as_python_m_does.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "sys.path[0] = os.getcwd()\n"
        "runpy.run_module('workers.null.worker', run_name='__main__')\n"
    )
    async with LocalVast(control_port=None, max_workers=1) as vast:
        worker = await fresh(vast, script=str(script))
        async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
            assert reservation.url == worker.url
            await release(worker)
            assert await reservation.ended(timeout=10)
        await eventually(lambda: statuses(vast) == ["Success"])
    assert (tmp_path / ".has_benchmark").read_text() == "100\n"


# All of it at once


async def test_chaos_keeps_the_invariants(vast):
    """Random requests against two workers, then: never two sessions on one, each ended once, as a success."""
    dice = random.Random(7)
    pair = list(vast.workers.values())[:2]
    current = {worker: None for worker in pair}  # the session that is known to be open, if its end isn't
    opened, deadline = [], time.monotonic() + 15
    threads = {worker: thread_count(worker) for worker in pair}
    logged = {worker: worker.log.stat().st_size for worker in pair}

    async def act(worker):
        auth = vast.auth_data(worker)
        action = dice.choice(["create", "create", "ping", "release", "fenced", "end", "malformed", "unsigned", "short"])
        known = current[worker]
        if action in ("create", "short"):
            status, answer = await create(vast, worker, auth, lifetime=60 if action == "create" else 0.2)
            assert status in (201, 429)
            if status == 201:
                assert known is None or known["short"], "two sessions on one worker"
                opened.append(auth["request_idx"])
                current[worker] = {"id": answer["session_id"], "auth": auth, "short": action == "short"}
        elif action == "malformed":
            named, spoil = dice.choice(list(malformed()))
            body = {"auth_data": auth, "payload": {"lifetime": 60}}
            spoil(body)
            assert (await post(f"{worker.url}/session/create", json=body))[0] == 422, named
        elif action == "unsigned":
            assert (await create(vast, worker, {**auth, "signature": ""}))[0] == 401
        elif action == "release":
            status, answer = await release(worker)
            assert status == 200 and (answer["released"] == (known is not None) or known["short"])
            current[worker] = None
        elif known is not None:
            about = {"session_id": known["id"], "session_auth": known["auth"]}
            if action == "ping":
                ping = {"auth_data": known["auth"], "session_id": known["id"], "payload": {}}
                assert (await post(f"{worker.url}/ping", json=ping))[0] == 200 or known["short"]
            elif action == "fenced":
                _, answer = await release(worker, known["id"])
                assert answer["released"] or known["short"]
                current[worker] = None
            elif action == "end":
                assert (await post(f"{worker.url}/session/end", json=about))[0] == 200 or known["short"]
                current[worker] = None

    async def storm(worker):
        for _ in range(200):
            if time.monotonic() < deadline:
                await act(worker)

    await asyncio.gather(*(storm(worker) for worker in pair))
    for worker in pair:
        await release(worker)
    assert len(opened) > 20
    await eventually(lambda: len(ended(vast)) >= len(opened) + statuses(vast).count("Rejected"))
    ends = [request for request in ended(vast) if request["status"] != "Rejected"]  # a 429, as the framework tells it
    assert sorted(request["request_idx"] for request in ends) == sorted(opened)
    assert {request["status"] for request in ends} == {"Success"}
    for worker in pair:
        await eventually(lambda worker=worker: worker.report["cur_load"] == 0)
        await session(vast, worker)
        await eventually(lambda worker=worker: thread_count(worker) <= threads[worker] + 1)
        assert b"Traceback" not in worker.log.read_bytes()[logged[worker] :]


def thread_count(worker):
    status = Path(f"/proc/{worker.process.pid}/status")
    return int(re.search(r"Threads:\s+(\d+)", status.read_text())[1]) if status.exists() else 0
