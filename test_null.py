"""What the null worker, its client and LocalVast promise, proved on real processes over real HTTP.

The workers of the `vast` fixture are shared, and each test finds all of them free; a test that ends, breaks or
configures one starts its own. Seconds in assertions are bounds of the contract or generous; nothing here times speed.
"""

import asyncio
import contextlib
import gzip
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

import null_client
from null_client import NotReserved, WorkerLost, keep_alive_due, reserve
from null_local import LocalVast, LocalWorker
from null_worker import Settings, StartupError

HERE = Path(__file__).parent
WORKERS = 3
ON_VAST = {
    "CONTAINER_ID": "1",
    "PUBLIC_IPADDR": "127.0.0.1",
    "REPORT_ADDR": "http://127.0.0.1:9",
    "WORKER_PORT": "3000",
    "VAST_TCP_PORT_3000": "3000",
}
BARE = {name: value for name, value in os.environ.items() if not name.startswith(("VAST", "NULL_", "BACKEND_"))}

pytestmark = pytest.mark.anyio


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
    for record in (shared_vast.reports, shared_vast.ended, shared_vast.failing_polls, shared_vast._waiting):
        record.clear()
    shared_vast.first_request = shared_vast._last_request + 1
    yield shared_vast
    shared_vast.overbooked, shared_vast.report_delay = False, 0.0
    for worker in list(shared_vast.workers.values()):
        with contextlib.suppress(aiohttp.ClientError):
            await post(f"{worker.control_url}/release")


@pytest.fixture
def worker(vast):
    return next(iter(vast.workers.values()))


async def eventually(condition, timeout=30.0):
    """Wait for the condition to hold, and return what it gave."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


async def request(method, url, **options):
    """Status, headers and JSON of one request on a connection of its own."""
    timeout = aiohttp.ClientTimeout(total=30)
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
    await eventually(lambda: worker.state == "ready")
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
    assert Settings.from_environment(ON_VAST) == Settings(18999, None, "127.0.0.1")
    consumer = {**ON_VAST, "PUBLIC_IPADDR": "1.2.3.4", "BACKEND_HEALTH_URL": "https://u:p@[fd00::1]/h?x=1"}
    settings = Settings.from_environment({**consumer, "NULL_CONTROL_PORT": "", "UNSECURED": "True"})
    assert settings == Settings(18999, "https://u:p@[fd00::1]/h?x=1", None)
    assert settings.callback_origin == ("https://[fd00::1]", 443)
    assert Settings.from_environment(ON_VAST).callback_origin == ("http://127.0.0.1", 18999)


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


def test_an_unknown_sdk_is_refused_in_one_line():
    driver = (
        "import runpy, sys\n"
        "from vastai.serverless.server.lib.backend import Backend\n"
        "del Backend._Backend__close_session\n"
        f"runpy.run_path({str(HERE / 'null_worker.py')!r}, run_name='__main__')"
    )
    done = run([sys.executable, "-c", driver], BARE | ON_VAST)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("null_worker: ")]
    assert "_Backend__close_session" in line and "1.3 up to below 2" in line
    assert "Traceback" not in done.stderr


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
        assert time.monotonic() - start < 0.5 + 5 + 3  # 5 to the next sweep; 3 for the report
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
    assert status == 500 and "RuntimeError: metrics are broken" in answer["reason"]
    assert (answer["released"], answer["session_ids"]) == (True, [session_id])
    await eventually(lambda: worker.report["cur_load"] == 0, timeout=30)
    await session(vast, worker)
    log = worker.log.read_text()
    assert "Traceback" in log and f"closing session={session_id} failed" in log
    worker.process.kill()
    await exit_status(worker)


async def test_the_consumers_health_decides(vast):
    answer = {"well": 200, "sick": 503}
    async with server(consumer_health(answer)) as origin:
        sick = vast.start_worker({"BACKEND_HEALTH_URL": f"{origin}/sick"})
        well = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/well"})
        assert (await request("GET", f"{well.control_url}/health"))[0] == 404
        answer["well"] = 500
        await eventually(lambda: "Healthcheck failed with status: 500" in well.report["error_msg"], timeout=40)
        assert sick.state == "loading" and all(not r["max_perf"] for r in vast.reports if r["id"] == sick.number)
        sick.process.terminate()
        assert (await exit_status(sick), await exit_status(well)) == (0, 0)


async def test_a_taken_control_port_is_the_workers_error(vast):
    async with server() as origin:
        worker = vast.start_worker({"NULL_CONTROL_PORT": origin.rpartition(":")[2]})
        await eventually(lambda: worker.report.get("error_msg"))
        assert "Address already in use" in worker.report["error_msg"]
        assert await exit_status(worker) == 0


# null_worker.py: the session guard

WRONG = {str: [None, 1, True, [], {}], int: [None, "1", 1.5, True, [], {}], float: [None, "1", True, [], {}]}
AUTH = {"cost": float, "endpoint": str, "reqnum": int, "request_idx": int, "signature": str, "url": str}
LIFETIMES = [None, "60", True, [], {}, 0, -1, -0.0, math.nan, math.inf, -math.inf, 10**400]
ROUTES = [1, True, [], {}, "", "closed", "ftp://host/x", "http://", "http://[", "http://a b", "javascript:alert(1)"]


def malformed():
    """(what, change of the body) for every way to spoil one field."""
    for name, kind in AUTH.items():
        yield f"auth_data.{name}", lambda body, name=name: body["auth_data"].pop(name)
        for wrong in WRONG[kind]:
            yield f"auth_data.{name}", lambda body, name=name, wrong=wrong: body["auth_data"].update({name: wrong})
    for cost in (-1, -0.5, 1e308, math.nan, math.inf, -math.inf, 10**400):
        yield "auth_data.cost", lambda body, cost=cost: body["auth_data"].update(cost=cost)
    for name in ("auth_data", "payload"):
        yield name, lambda body, name=name: body.pop(name)
        for wrong in (None, 1, True, "x", []):
            yield name, lambda body, name=name, wrong=wrong: body.update({name: wrong})
    for lifetime in LIFETIMES:
        yield "payload.lifetime", lambda body, lifetime=lifetime: body["payload"].update(lifetime=lifetime)
    for route in ROUTES:
        yield "payload.on_close_route", lambda body, route=route: body["payload"].update(on_close_route=route)


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


async def test_no_malformed_create_gets_in_or_leaves_a_trace(vast, worker):
    url, count = f"{worker.url}/session/create", 0
    await silence(vast)

    async def refused(expected, named="", **options):
        nonlocal count
        count += 1
        status, answer = await post(url, **options)
        assert status == expected and named in json.dumps(answer), (named, str(options)[:200], status, answer)
        await session(vast, worker)  # at once
        assert (await release(worker))[1]["released"] is True

    for named, spoil in malformed():
        body = {"auth_data": vast.auth_data(worker), "payload": {"lifetime": 60}}
        spoil(body)
        await refused(422, f'"{named}"', json=body)
    for expected, raw in RAW:
        await refused(expected, data=raw)

        async def chunks(raw=raw):
            yield raw

        await refused(expected, data=chunks())  # without a Content-Length
    good = json.dumps({"auth_data": vast.auth_data(worker), "payload": {}}).encode()
    await refused(422, data=good, headers={"Content-Type": "application/json; charset=no-such"})
    await refused(422, data=good.decode().encode("utf-16"))
    await refused(422, data=b"not gzip", headers={"Content-Encoding": "gzip"})
    bomb = gzip.compress(b" " * (64 << 20))
    await refused(413, data=bomb, headers={"Content-Encoding": "gzip"})
    assert count > 100

    # Whatever they claimed, the autoscaler heard only of the sessions in between.
    await eventually(lambda: len(ended(vast)) == count)
    assert set(statuses(vast)) == {"Success"}
    assert not any(report["rej_load"] or report["error_msg"] for report in vast.reports)
    assert sum(report["new_load"] for report in vast.reports) <= 100 * count


async def test_a_create_that_says_less_than_the_sdk_gets_in(vast, worker):
    body = {"auth_data": vast.auth_data(worker, cost=0) | {"more": 1}, "payload": {}}
    assert (await post(f"{worker.url}/session/create", json=body))[0] == 201


async def test_only_the_routers_signature_gets_in(vast, worker):
    await silence(vast)
    good = vast.auth_data(worker)
    other = LocalVast()
    for signature in ("", "garbage", "¡no base64!", "\ud800", other.sign(worker.url), vast.sign("http://other:1")):
        assert (await create(vast, worker, auth={**good, "signature": signature}))[0] == 401, signature
    assert (await create(vast, worker, auth={**good, "url": "http://other:1"}))[0] == 401
    await session(vast, worker, auth=good)
    assert "UNSECURED=true" in worker.log.read_text()
    await eventually(lambda: worker.report["cur_load"] == 100)
    assert sum(report["rej_load"] for report in vast.reports) == 0
    assert sum(report["new_load"] for report in vast.reports) <= 100


async def test_before_the_public_key_is_there_creates_are_told_to_come_again():
    async with LocalVast(control_port=None) as vast:
        vast.publish_key = False
        worker = await fresh(vast)
        status, answer = await create(vast, worker)
        assert status == 503 and "public key" in answer["error"]
        vast.publish_key = True
        await eventually(lambda: created(vast, worker))


async def created(vast, worker):
    status, _ = await create(vast, worker)
    assert status in (201, 503)
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
        assert status == -signal.SIGTERM and seconds < 2
        callbacks.let_go.set()


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


def holder(vast, reservation):
    return next(worker for worker in list(vast.workers.values()) if worker.url == reservation.url)


async def expiration(reservation):
    """The worker's own word on when the session expires, in its clock, which here is ours."""
    about = {"session_id": reservation.session_id, "session_auth": reservation.auth_data}
    return (await post(f"{reservation.url}/session/get", json=about))[1]["expiration"]


async def test_a_reservation_is_kept_alive_and_never_beyond_one_and_a_half_lifetimes(vast):
    lifetime, left = 3.0, []
    await silence(vast)
    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=lifetime) as reservation:
        start = time.monotonic()
        while time.monotonic() - start < 5 * lifetime:
            left.append(await expiration(reservation) - time.time())
            assert abs(left[-1] - reservation.time_to_live) < 1
            assert not await reservation.ended(timeout=0.2)
    assert 0 < min(left) and max(left) < 1.5 * lifetime
    await eventually(lambda: statuses(vast) == ["Success"])
    assert sum(report["new_load"] for report in vast.reports) <= 100
    assert {report["cur_load"] for report in vast.reports} <= {0, 100}


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
        assert time.monotonic() - start < 5  # about 1 for the worker's report and 1 for the poll


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


async def test_a_failed_poll_does_not_lose_the_place(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        first, *_ = [await stack.enter_async_context(reserve(endpoint)) for _ in range(WORKERS)]
        early = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
        await eventually(lambda: len(vast._waiting) == 1)
        vast.failing_polls += [502, 429, 500, 200]
        await eventually(lambda: not vast.failing_polls)
        late = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
        await eventually(lambda: len(vast._waiting) == 2)
        await vast.absent(3)  # connection refused
        await release(holder(vast, first))
        await asyncio.wait({early, late}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert early.done() and early.result() and not late.done()
        late.cancel()
        await asyncio.wait({late})


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
    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=8) as reservation:
        worker = holder(vast, reservation)
        worker.process.send_signal(signal.SIGSTOP)
        try:
            await eventually(lambda: reservation.unreachable)
            assert not await reservation.ended(timeout=1)
        finally:
            worker.process.send_signal(signal.SIGCONT)
        await eventually(lambda: not reservation.unreachable)
        assert not await reservation.ended(timeout=8)
        assert await expiration(reservation) - time.time() < 1.5 * 8


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


# null_client.py: the command


class Command:
    """`null_client.py` in a process of its own, pointed at a LocalVast of the test instead of Vast."""

    DRIVER = (
        "import sys, null_client, null_local\n"
        "null_client.Serverless = lambda key, instance, **options: null_local.LocalClient(\n"
        "    key, autoscaler_url={url!r}, webserver_url={url!r}, **options)\n"
        "sys.exit(null_client.main(sys.argv[1:]))"
    )

    def __init__(self, *arguments, vast=None, environment=None, driver=None, reads=math.inf):
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
        self.process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.lines, self.errors, self._reads = [], [], reads
        self._output = [
            asyncio.ensure_future(asyncio.to_thread(self._read, pipe))
            for pipe in (self.process.stdout, self.process.stderr)
        ]

    def _read(self, pipe):
        lines = self.lines if pipe is self.process.stdout else self.errors
        for line in pipe:
            lines.append(line.decode().rstrip("\n"))
            if lines is self.lines and len(lines) >= self._reads:
                pipe.close()
                break

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.process.kill()
        await self.status()
        self.process.stdout.close(), self.process.stderr.close()

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


async def test_the_demo_ramps_up_and_down(vast):
    async with Command("--demo", "--interval", "2.5", "--plateau", "3", vast=vast) as command:
        assert await command.status() == 0
        assert command.errors == []
    await eventually(lambda: len(ended(vast)) == 3)
    assert statuses(vast) == ["Success"] * 3
    await eventually(lambda: reservations_over_time(vast) == [0, 1, 2, 3, 2, 1, 0], timeout=5)
    order = [line.split()[1] for line in command.lines if "released after" in line]
    assert order == ["#1", "#2", "#3"]
    requested, held, released = (
        [sum(map(int.__mul__, map(int, line[:8].split(":")), (3600, 60, 1))) for line in command.lines if what in line]
        for what in ("waiting for", "held after", "released after")
    )
    for earlier, later in [*itertools.pairwise(requested), (held[-1], released[0]), *itertools.pairwise(released)]:
        assert (later - earlier) % 86400 >= 2  # in whole seconds of a clock
    chart = command.lines[-4:]
    assert ". waiting  = held" in chart[0] and all(re.match(r"#\d +\.*=+ ", line) for line in chart[1:])
    assert all(line.isascii() and line.isprintable() and len(line) <= 100 for line in command.lines)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in command.lines[:-4])


async def test_a_worker_that_lets_go_is_marked_and_the_demo_goes_on(vast):
    async with Command("--demo", "--interval", "1", "--plateau", "4", vast=vast) as command:
        await command.says("#3 held")
        url = command.said(r"#2 held .*, (http\S+)")[1]
        await release(next(worker for worker in list(vast.workers.values()) if worker.url == url))
        assert await command.says("#2 let go")
        assert not command.said("#1 released")
        assert await command.status() == 0
    assert command.said(r"#2 let go after .*: the worker let go")
    assert command.said("#1 released") and command.said("#3 released") and not command.said("#2 released")
    await eventually(lambda: statuses(vast) == ["Success"] * 3)


async def test_holding_ends_when_the_worker_lets_go(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        url = (await eventually(lambda: command.said(r"held .*, (http\S+)")))[1]
        status, answer = await release(next(worker for worker in list(vast.workers.values()) if worker.url == url))
        assert status == 200 and answer["released"]
        assert await command.status() == 0
    assert command.said("the worker let go") and command.errors == []


async def test_a_lost_worker_is_status_1(vast):
    async with Command("--hold", "inf", "--lifetime", "2", vast=vast) as command:
        url = (await eventually(lambda: command.said(r"held .*, (http\S+)")))[1]
        worker = next(worker for worker in list(vast.workers.values()) if worker.url == url)
        worker.process.kill()
        await exit_status(worker)
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
        assert time.monotonic() - start < 5  # 3 for the sessions
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


async def test_a_second_signal_ends_the_client_at_once(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        url = (await eventually(lambda: command.said(r"held .*, (http\S+)")))[1]
        worker = next(worker for worker in list(vast.workers.values()) if worker.url == url)
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
    async with LocalVast(max_workers=2, inactivity_timeout=3, control_port=None) as vast:
        async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
            assert not vast.workers
            waiting = [asyncio.ensure_future(stack.enter_async_context(reserve(endpoint, wait=30))) for _ in range(3)]
            await eventually(lambda: sum(task.done() for task in waiting) == 2)
            assert len(vast.workers) == 2
            one, two = {task.result().url for task in waiting if task.done()}
            await release(next(worker for worker in list(vast.workers.values()) if worker.url == one))
            await asyncio.wait(waiting)
            assert {task.result().url for task in waiting} == {one, two} and vast._last_worker == 2
        await eventually(lambda: not vast.workers)


async def test_a_slow_start_is_waited_for_and_shown():
    async with LocalVast(control_port=None) as vast:
        vast.start_delay = 2
        async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
            opening = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
            await eventually(lambda: vast.workers)
            assert [worker.status for worker in await endpoint.get_workers()] == ["loading"]
            await asyncio.wait_for(opening, 30)
            assert [worker.status for worker in await endpoint.get_workers()] == ["ready"]
            opening.result()


async def test_workers_that_cannot_start_end_the_wait(tmp_path):
    events = []
    async with LocalVast(control_port=None, environment={"CONTAINER_ID": "x"}, on_event=events.append) as vast:
        with pytest.raises(NotReserved, match="HTTP 409.*3 workers in a row failed to start"):
            async with endpoint_of(vast) as endpoint, reserve(endpoint):
                pass
    assert any("CONTAINER_ID is 'x', should be a number" in event for event in events)


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


# README.md


def readme(*, holding):
    """The one code block of the README that holds this text."""
    blocks = re.findall(r"^```(?:sh|python)\n(.*?)^```", (HERE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if holding in block]
    return block


def installed(*commands):
    return pytest.mark.skipif(not all(map(shutil.which, commands)), reason=f"needs {' and '.join(commands)}")


async def connected(port):
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True


@installed("curl", "jq")
async def test_the_readmes_raw_http_reserves_keeps_and_ends(vast):
    environment = {"AUTOSCALER": vast.url, "VAST_ENDPOINT": vast.endpoint_name, "ENDPOINT_KEY": vast.api_key}
    block = readme(holding="/session/create")
    done = await asyncio.to_thread(run, ["sh", "-euc", block], BARE | environment)
    ping, get, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert (ping, get["lifetime"], end["ended"]) == ({"result": {}}, 120, True) and done.stderr == ""
    assert get["expiration"] > time.time() + 230
    await eventually(lambda: statuses(vast) == ["Success"])


@installed("redis-server", "redis-cli", "jq")
@pytest.mark.parametrize("language", ["sh", "python"])
async def test_the_readmes_dispatcher_and_consumer_work_through_redis(vast, tmp_path, language):
    if importlib.util.find_spec("redis") is None:
        pytest.skip("needs pip install redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    redis = f"redis://127.0.0.1:{port}"
    async with contextlib.AsyncExitStack() as stack:

        async def start(*command, **environment):
            environment = (
                BARE | {"PYTHONPATH": str(HERE), "REDIS_URL": redis, "PUBLIC_IPADDR": "127.0.0.1"} | environment
            )
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            stack.callback(lambda: process.returncode is None and process.kill())
            return process

        await start("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "")
        await eventually(lambda: connected(port))
        consumer = readme(holding=f"consumer.{language[:2]}")
        for worker in list(vast.workers.values()):
            await start(
                *(("sh", "-c") if language == "sh" else (sys.executable, "-c")),
                consumer,
                WORKER_PORT=str(worker.port),
                NULL_CONTROL_PORT=str(worker.control_port),
                **{f"VAST_TCP_PORT_{worker.port}": str(worker.port)},
            )
        (tmp_path / "dispatcher.py").write_text(
            "import vastai, null_local\n"
            "vastai.Serverless = lambda key, **options: null_local.LocalClient("
            f"key, autoscaler_url={vast.url!r}, webserver_url={vast.url!r}, **options)\n" + readme(holding="rpush")
        )
        dispatcher = await start(
            sys.executable, "dispatcher.py", VAST_API_KEY=vast.api_key, VAST_ENDPOINT=vast.endpoint_name
        )
        output, _ = await asyncio.wait_for(dispatcher.communicate(), 60)
        assert sorted(output.decode().splitlines()) == [f"worker released: task {n}" for n in range(3)]
    await eventually(lambda: statuses(vast) == ["Success"] * 3)


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
