"""The Null PyWorker: Vast Serverless starts and stops this GPU instance, and forwards nothing to it.

A reservation is one session of Vast's worker framework, at most one at a time. A dispatcher opens it and so gets the
whole instance; a consumer on the instance works, and tells the control server to renew or to release it. It ends also
when the dispatcher closes it, when nobody has renewed it for its lifetime, or when this process is asked to stop.

On a Vast instance: python null_worker.py. Anywhere else: python null_client.py --local
"""

import _thread
import asyncio
import concurrent.futures
import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import re
import resource
import signal
import socket
import socketserver
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler
from operator import attrgetter, itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import SplitResult, parse_qs, urljoin, urlsplit

import aiohttp
from aiohttp import web

PERFORMANCE = 100  # one session of cost 100 is one worker; 99.9 would make the autoscaler round up to one more
MAX_COST = 1_000_000  # the signature doesn't cover it, and sums of huge ones would overflow in the reports
MAX_BODY = 1 << 20  # bytes of a request, before and after decompression
MAX_VALUES = 10_000  # in a request: a million small ones would take a hundred times its memory
MAX_TEXT = 4096  # bytes of a string in a request
MAX_WAIT = 60  # seconds that a look or a consumer may wait for a change
HEALTH_CHECK = 10.0  # seconds between two looks at a consumer that was well, and for one to be answered
PORT_WAIT = 10.0  # seconds that a predecessor may hold the ports; its drain takes 8 at most
IDLE_CONNECTION = 10.0  # seconds of silence after which the control server drops a connection; for a body elsewhere
CALLBACK_WAIT = aiohttp.ClientTimeout(total=10)  # seconds for an on_close callback
CALLBACK_HEADER = "X-Null-Callback"  # by which the control server knows one: it may come late, and end the successor
RELEASE_WAIT = 15.0  # seconds
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)  # a host, and maybe its port
DRAIN = 7.0  # seconds from the signal to the exit, at most; Vast's supervisor kills after 10
log = logging.getLogger("null_worker")


class StartupError(Exception):
    """The worker can't start; the text is one line for a person."""


class Settings(NamedTuple):
    """Everything that the environment decides, checked."""

    control_port: int
    health_url: str | None = None  # of the consumer; None: the control server answers /health itself
    host: str | None = None  # to listen on; None: every interface, as Vast needs
    ports: tuple[int, int] = (3000, 3001)  # of the framework: WORKER_PORT, which the internet reaches; HTTP-only
    start_timeout: float = 1800.0  # seconds that the consumer may take to its first healthy answer
    unsecured: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Settings":
        """Raise StartupError for the first bad value, or for all of Vast's variables that are missing."""
        given = {"NULL_CONTROL_PORT": "18999", "BACKEND_START_TIMEOUT": "1800", "UNSECURED": "0", "WORKER_PORT": "3000"}
        given.update((name, value) for name, value in env.items() if value)

        def need(fine: object, name: str, wanted: str) -> None:
            if not fine:
                raise StartupError(f"{name} is {given[name]!r}, should be {wanted}")

        def port(name: str) -> int:
            need(re.fullmatch("[0-9]{1,5}", given[name]) and 1 <= int(given[name]) <= 65535, name, "a port, 1-65535")
            return int(given[name])

        control_port, worker_port = port("NULL_CONTROL_PORT"), port("WORKER_PORT")
        given.setdefault("WORKER_HTTP_PORT", str(worker_port + 1))
        if url := given.get("BACKEND_HEALTH_URL"):
            parts = http_url(url)
            need(parts, "BACKEND_HEALTH_URL", "an absolute http:// or https:// URL")
            own = parts and LOOPBACK.fullmatch(parts.netloc.rpartition("@")[2]) and (parts.port or 80) == control_port
            need(not own, "BACKEND_HEALTH_URL", "the consumer's own, not the control server's")
        timeout, unsecured = given["BACKEND_START_TIMEOUT"], given["UNSECURED"].lower()
        need(re.fullmatch(r"\d{1,7}(\.\d+)?", timeout) and float(timeout), "BACKEND_START_TIMEOUT", "seconds above 0")
        need(re.fullmatch("y|yes|t|true|on|1|n|no|f|false|off|0", unsecured), "UNSECURED", "true or false")
        mapped_port = f"VAST_TCP_PORT_{env.get('WORKER_PORT') or '<WORKER_PORT>'}"
        needed = ("CONTAINER_ID", "PUBLIC_IPADDR", "REPORT_ADDR", "WORKER_PORT", mapped_port)
        if missing := ", ".join(name for name in needed if not env.get(name)):
            off_vast = "to run it off Vast: python null_client.py --local"
            raise StartupError(f"not a Vast Serverless instance, {missing} not set; {off_vast}")
        need(re.fullmatch("[0-9]+", given["CONTAINER_ID"]), "CONTAINER_ID", "a number")
        port(mapped_port)
        ports = worker_port, port("WORKER_HTTP_PORT")
        need(ports[0] != ports[1], "WORKER_HTTP_PORT", "another port than WORKER_PORT")
        need(control_port not in ports, "NULL_CONTROL_PORT", "another port than WORKER_PORT and WORKER_HTTP_PORT")
        host = given["PUBLIC_IPADDR"] if LOOPBACK.fullmatch(given["PUBLIC_IPADDR"]) else None
        return cls(control_port, url, host, ports, float(timeout), unsecured in ("y", "yes", "t", "true", "on", "1"))


def http_url(text: str) -> SplitResult | None:
    """The parts of an absolute http(s) URL; None for anything else."""
    with contextlib.suppress(ValueError):
        url = urlsplit(text)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0 and not re.search(r"\s", text):
            return url
    return None


class Field(NamedTuple):
    must_be: str
    accepts: Callable[[Any], bool]
    default: object = None  # stands for a field that is not there


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


TEXT = Field(
    f"a string of at most {MAX_TEXT} bytes",
    lambda value: isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) <= MAX_TEXT,
)
INTEGER = Field("an integer of 64 bits", lambda value: type(value) is int and -(1 << 63) <= value < 1 << 63)
COST = Field(f"a number from 0 to {MAX_COST}", lambda value: _is_number(value, 0, MAX_COST))
WAIT = Field(f"a number of seconds from 0 to {MAX_WAIT}", lambda value: _is_number(value, 0, MAX_WAIT), 0)
LIFETIME = Field("a finite number of seconds above 0", lambda value: _is_number(value, 1e-9, sys.float_info.max), 60.0)
CALLBACK = Field(
    "an http(s) URL or a path that begins with /",
    lambda value: value is None or (TEXT.accepts(value) and (value[:1] == "/" or http_url(value) is not None)),
)
OBJECT = Field("an object", lambda value: isinstance(value, dict))  # it may have other fields than those that are read
SIGNED = {"cost": COST, "endpoint": TEXT, "reqnum": INTEGER, "request_idx": INTEGER, "signature": TEXT, "url": TEXT}
AUTH_DATA = {"auth_data": OBJECT, **{f"auth_data.{name}": field for name, field in SIGNED.items()}}
HELD = {"session_id": TEXT, "session_auth": OBJECT}
CREATE, LOOK, END, PING, UPDATE = "/session/create", "/session/get", "/session/end", "/ping", "/pyworker/update"
ROUTES: dict[str, dict[str, Field]] = {
    CREATE: {**AUTH_DATA, "payload": OBJECT, "payload.lifetime": LIFETIME, "payload.on_close_route": CALLBACK},
    LOOK: {**HELD, "wait": WAIT},
    END: HELD,
    "/session/health": HELD,
    PING: {**AUTH_DATA, "payload": OBJECT, "session_id": TEXT},  # without a session it would be load
    UPDATE: {},
}


class Refusal(Exception):
    """A request doesn't get in. The arguments: the status and the JSON that it is answered."""


def problems(message: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, str]:
    """What is wrong with the fields of a request, by name; empty when nothing is."""
    found = {}
    for path, field in fields.items():
        parent, _, name = path.rpartition(".")
        holder = message.get(parent) if parent else message
        if isinstance(holder, dict) and not field.accepts(holder.get(name, field.default)):
            found[path] = f"must be {field.must_be}"
    return found


async def read(route: str, request: web.Request) -> dict[str, Any]:
    """The JSON of a request to one of ROUTES, bounded and checked; raises Refusal."""
    found = {"body": "must be a JSON object in UTF-8"}
    try:
        body = await asyncio.wait_for(request.clone(client_max_size=MAX_BODY).read(), IDLE_CONNECTION)
        if request.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate"):
            body = zlib.decompressobj(wbits=47).decompress(body, MAX_BODY + 1)  # either header
        if len(body) > MAX_BODY:
            raise Refusal(413, {"error": f"body over {MAX_BODY} bytes"})
        if route == UPDATE:  # the framework reads no more than a header
            return {}
        if sum(map(body.count, (b"{", b"[", b","))) > MAX_VALUES:
            raise ValueError
        message = json.loads(body.decode())  # UTF-8, whatever charset it names: some decoders take quadratic time
        if isinstance(message, dict) and not (found := problems(message, ROUTES[route])):
            return message
    except web.HTTPRequestEntityTooLarge:
        raise Refusal(413, {"error": f"body over {MAX_BODY} bytes"}) from None
    except asyncio.TimeoutError:
        raise Refusal(408, {"error": f"body not there within {IDLE_CONNECTION:g} s"}) from None
    except (web.RequestPayloadError, zlib.error, ValueError, RecursionError):
        pass
    raise Refusal(422, {"error": "invalid", "fields": found})


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    allow: str | None = None  # the methods, after a wrong one


METHODS = {"/health": ("GET", "HEAD"), "/session": ("GET",), "/release": ("POST",), "/renew": ("POST",)}


def control(obey: Callable[[str, str | None, float], Answer], health_stub: bool, method: str, target: str) -> Answer:
    """The answer to a request to the control server. `obey` takes what it wants: path, session id, seconds to wait."""
    path, _, query = target.partition("?")
    if path not in METHODS or (path == "/health" and not health_stub):
        return Answer(404, {"error": "not found"})
    if method not in METHODS[path]:
        return Answer(405, {"error": f"use {METHODS[path][0]}"}, ", ".join(METHODS[path]))
    if path == "/health":
        return Answer(200, {"status": "ok"})
    values, name = parse_qs(query, keep_blank_values=True), "wait" if path == "/session" else "session_id"
    given = values.pop(name, [])
    if values or len(given) > 1:  # a misspelt fence must not end somebody else's session
        return Answer(400, {"error": f"the only parameter is {name}, once"})
    if path != "/session":
        return obey(path, given[0] if given else None, 0.0)  # an empty id is an id that is not active
    wait = -1.0  # stands for what is no number
    with contextlib.suppress(ValueError):
        wait = float(given[0]) if given else 0.0
    return obey(path, None, wait) if WAIT.accepts(wait) else Answer(400, {"error": f"wait must be {WAIT.must_be}"})


class ControlServer(socketserver.ThreadingTCPServer):
    """A thread per connection: a slow release doesn't hold up `/health`. (http.server's own looks its host name up.)"""

    allow_reuse_address = True
    request_queue_size = 128
    answer: Callable[[str, str], Answer]  # to a method and a target

    def process_request(self, request: Any, client_address: Any) -> None:
        _thread.start_new_thread(self.process_request_thread, (request, client_address))  # Thread.start() waits for it

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("control connection failed: %r", sys.exc_info()[1])


class ControlHandler(BaseHTTPRequestHandler):
    server: ControlServer
    timeout = IDLE_CONNECTION
    default_request_version = "HTTP/1.0"  # garbage gets a status line too
    error_content_type = "application/json"
    error_message_format = '{"error": "%(explain)s"}\n'
    wbufsize = -1  # headers and body in one packet: two would meet Nagle's algorithm and a delayed acknowledgement

    def parse_request(self) -> bool:
        """Answer at once, whatever the method; http.server would look for a function for each."""
        if not super().parse_request():
            return False
        # By DNS rebinding a web page gets here, but not its Host.
        if CALLBACK_HEADER in self.headers or not all(map(LOOPBACK.fullmatch, self.headers.get_all("Host", []))):
            answer = Answer(403, {"error": "an on_close callback, or a Host that is not loopback"})
        else:
            answer = self.server.answer(self.command, self.path)
        text = json.dumps(answer.body).encode() + b"\n"
        self.send_response_only(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if answer.allow:
            self.send_header("Allow", answer.allow)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
        return False  # there is nothing left to do

    def finish(self) -> None:
        """Read the request's body, however long, after the answer: unread bytes would reset the client's connection."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass

    def log_message(self, *_: object) -> None:
        pass


class Framework:
    """The SDK's worker under ordinary names: the only place that uses names which the SDK doesn't promise."""

    def __init__(self, settings: Settings, life: "NullWorker") -> None:
        """`life` answers each request and ends each session. Raises StartupError where the SDK isn't known to work."""
        os.environ.update(UNSECURED=str(settings.unsecured), WORKER_HTTP_PORT=str(settings.ports[1]))  # '' is an error
        version = "of an unknown version"
        try:
            version = importlib.metadata.version("vastai")
            if not (1, 3) <= tuple(map(int, version.split(".")[:2])) < (2,):
                raise ImportError("too old, or too new")
            from vastai import BenchmarkConfig, HandlerConfig, Worker, WorkerConfig  # type: ignore[import-untyped]
            from vastai.serverless.server import lib  # type: ignore[import-untyped]

            options = {"allow_parallel_requests": True, "workload_calculator": lambda _: 0.0}  # a ping is not load
            ping = HandlerConfig(PING, benchmark_config=BenchmarkConfig(), remote_function=_pong, **options)
            config = WorkerConfig("http://127.0.0.1", 9, handlers=[ping], max_sessions=1, lifecycle=life.lifecycle())
            worker = Worker(config)  # which asks nothing of the model server that this names
            self._backend, self._metrics = backend, metrics = worker.backend, worker.backend.metrics
            parse, verify = lib.backend.AuthData.from_json_msg, backend._Backend__check_signature
            self.verifies: Callable[[dict[str, Any]], bool] = lambda auth_data: verify(parse(auth_data))
            self._close = backend._Backend__close_session
            names = {route: route[1:].replace("/", "_") + "_handler" for route in ROUTES if route != PING}
            self._handlers = {route: getattr(backend, name) for route, name in names.items()}
            self._handlers[PING] = worker.routes[0].handler
            self.run: Callable[..., Awaitable[None]] = worker.run_async
            self.benchmark_file = Path(lib.backend.BENCHMARK_INDICATOR_FILE)
            self.has_master_token = bool(backend.mtoken)
            metrics.model_metrics = _exact_counters(type(metrics.model_metrics), metrics)
            lib.metrics.METRICS_UPDATE_INTERVAL /= 2  # seconds; the framework's 1 is half of the 2 that ready may take
            lib.backend.log.disabled = True  # it prints the whole of what it refuses; its errors are reported anyway
            # Used later, where a missing one would be found too late.
            attrgetter("_pubkey", "unsecured", "sessions", "session_metrics", "backend_errored")(backend)
            attrgetter("update_pending", "_request_success", "_request_end", "model_metrics.requests_deleting")(metrics)
            attrgetter("_Backend__run_session_on_close", "metrics.model_metrics.workload_processing")(backend)
            fields = lib.backend.Session.__dataclass_fields__
            itemgetter("session_id", "lifetime", "expiration", "on_close_route", "on_close_payload")(fields)
        except (ImportError, AttributeError, TypeError, ValueError, LookupError) as error:
            raise StartupError(f"vastai-sdk {version} is not known to work ({error}); 1.3 up to below 2 is") from error

        self.error: str | None = None  # what was reported to the autoscaler as the worker's error; it stays
        logging.getLogger().setLevel(logging.INFO)  # Worker() sets DEBUG, and prints whatever callers send
        # read() inflates, bounded; an access log would have a line per request, with the keys in its query.
        web.AppRunner = partial(web.AppRunner, auto_decompress=False, access_log=None)  # type: ignore[misc, assignment]
        backend.backend_errored = self.report_error
        backend._Backend__run_session_on_close = life.ended
        backend._Backend__close_session = life.close
        for route, name in names.items():  # which the framework binds to its web server only in run()
            setattr(backend, name, partial(life.door, route))
        worker.routes = [web.post(PING, partial(life.door, PING))]

    def has_key(self) -> bool:
        """Whether signatures can be verified, or need not be."""
        return self._backend.unsecured or self._backend._pubkey is not None

    def has_told_all(self) -> bool:
        return not (self._metrics.update_pending or self._metrics.model_metrics.requests_deleting)

    def session(self, session_id: str | None = None) -> Any | None:
        """The open session if it has that id, or whichever is open. The SDK's: session_id, lifetime, expiration."""
        return next((s for s in self._backend.sessions.values() if session_id in (None, s.session_id)), None)

    async def handle(self, route: str, message: dict[str, Any], request: web.Request) -> web.Response:
        """The framework's own answer to a request. `message` is its JSON: what was checked is what is used."""

        async def json() -> dict[str, Any]:
            return message

        seen = SimpleNamespace(json=json, headers=request.headers, transport=request.transport)
        return await self._handlers[route](seen)  # type: ignore[no-any-return]

    async def end(self, session_id: str) -> bool:
        """Count a session as a success, remove it and call its on_close callback. False: there is none of that id."""
        try:  # the framework alone counts after the callback, and so reports the load for up to 10 s too long
            if request := self._backend.session_metrics.pop(session_id, None):
                self._metrics._request_end(request)  # first: it must be done even if the other raises
                self._metrics._request_success(request)
        finally:
            closed = await self._close(session_id)
        return bool(closed)

    def report_error(self, text: str) -> None:
        self.error = self._metrics.model_metrics.error_msg = text or "an unknown error"  # an empty one means none
        self.report_soon()
        log.error("reported as broken: %s", self.error)

    def report_soon(self) -> None:
        self._metrics.update_pending = True


async def _pong(**_payload: object) -> dict[str, object]:
    return {}


def _exact_counters(base: Any, metrics: Any) -> Any:
    """The framework's counters, which it zeroes after a report: here what came meanwhile is kept for the next one."""
    counted = [f"workload_{kind}" for kind in ("served", "received", "cancelled", "errored", "rejected")]
    state = attrgetter(*counted, "cur_load", "max_throughput", "error_msg")

    class Counters(base):  # type: ignore[misc]  # the SDK has no types
        @property
        def workload_processing(self) -> float:  # read once, when a report is written
            self.told = state(self)
            return float(super().workload_processing)

        def reset(self) -> None:
            metrics.update_pending = state(self) != self.told
            for name, value in zip(counted, self.told):
                setattr(self, name, getattr(self, name) - value)

    attrgetter("reset")(base)
    return Counters.empty()


class NullWorker:
    """The life of the worker: ready, reserved, sick, draining. Every decision about reservations is made here."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stage: Literal["starting up", "ready", "draining"] = "starting up"
        self.undone = "anything: the event loop is blocked"  # of the drain
        self._calling: set[object] = set()  # the tasks that wait for an on_close callback
        self.framework = Framework(settings, self)

    @contextlib.asynccontextmanager
    async def lifecycle(self) -> AsyncIterator[None]:
        """Entered by the framework, which reports an exception from here to the autoscaler as the worker's error."""
        self.framework.benchmark_file.write_text(f"{PERFORMANCE}\n")  # or it would time a handler that does nothing
        server = ControlServer(("127.0.0.1", self.settings.control_port), ControlHandler)  # for as long as the process
        server.answer = partial(control, self._obey_from_thread, self.settings.health_url is None)
        threading.Thread(target=server.serve_forever, name="control", daemon=True).start()
        log.info("control server port=%d", self.settings.control_port)
        self._watching = asyncio.create_task(self._watch_health())
        await self._until(lambda: self.stage == "ready")
        self.framework.report_soon()  # the framework marks the worker as loaded next, and would tell it 10 s later
        yield

    async def _watch_health(self) -> None:
        """Ask every second until all is well for the first time, then every ten, until there is an error."""
        deadline = time.monotonic() + self.settings.start_timeout
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HEALTH_CHECK)) as http:
            while not self.framework.error and self.stage != "draining":
                problem = ""
                try:
                    if self.settings.health_url:
                        async with http.get(self.settings.health_url) as answer:
                            problem = f"the health check answers {answer.status}" if answer.status != 200 else ""
                except asyncio.TimeoutError:
                    problem = f"the health check does not answer within {HEALTH_CHECK:g} s"
                except (aiohttp.ClientError, OSError) as error:
                    if self.stage != "ready" or getattr(error, "errno", 0) != errno.EMFILE:  # strangers may have all
                        problem = f"the health check fails: {type(error).__name__}: {error}"
                if problem and self.stage == "ready":
                    self.framework.report_error(problem)
                elif problem and self.stage == "starting up" and time.monotonic() > deadline:
                    self.framework.report_error(f"not well within {self.settings.start_timeout:g} s: {problem}")
                elif not problem and self.stage == "starting up" and self.framework.has_key():
                    self.stage = "ready"
                await asyncio.sleep(HEALTH_CHECK if self.stage == "ready" else 1 if problem else 0.1)

    async def door(self, route: str, request: web.Request) -> web.StreamResponse:
        """Answer any request that reaches the framework's ports."""
        try:
            message = await read(route, request)
            if route == UPDATE and not self.framework.has_master_token:
                raise Refusal(403, {"error": "MASTER_TOKEN is not set"})
            if route == CREATE and (self.stage != "ready" or self.framework.error):
                raise Refusal(503, {"error": f"no sessions now: {'broken' if self.framework.error else self.stage}"})
            if route in (CREATE, PING) and not self.framework.verifies(message["auth_data"]):
                text = "refused %s from=%s: the signature does not verify; UNSECURED=true would accept anyone's"
                log.warning(text, route, request.remote)
                raise Refusal(401, {"error": "signature does not verify"})
        except Refusal as refusal:
            return web.json_response(refusal.args[1], status=refusal.args[0])
        response = await self.framework.handle(route, message, request)
        if route == LOOK and response.status == 200 and message.get("wait"):
            await self._until(lambda: not self.framework.session(message["session_id"]), message["wait"])
            return await self.framework.handle(route, message, request)
        if route == CREATE and response.status == 201:
            session_id = json.loads(response.text or "")["session_id"]
            try:  # a creator that is gone before the 201 can be written leaves no session behind
                for _ in range(5):  # turns of the event loop, in which it hears of that, closes, and cancels this
                    await asyncio.sleep(0)
                await response.prepare(request)
                await response.write_eof()
            except (ConnectionError, asyncio.CancelledError):
                await self.close(session_id)
                raise
            log.info("reserved session=%s", session_id)
        return response

    async def close(self, session_id: str) -> bool:
        """See Framework.end(), but don't wait longer than a second for the callback."""
        # In a task: the framework drops the rest when its caller hangs up, and reports the load for ever.
        ending = asyncio.create_task(self.framework.end(session_id))
        await asyncio.wait({ending}, timeout=1)
        return ending.result() if ending.done() else True

    async def ended(self, session: Any) -> None:
        """A session is gone: call on_close. The framework would follow redirects, and read answers, in any charset."""
        log.info("ended session=%s", session.session_id)
        if session.on_close_route:
            payload = session.on_close_payload
            if not isinstance(payload, dict):
                payload = {} if payload is None else {"payload": payload}
            url = urljoin(self.settings.health_url or "", session.on_close_route)  # a path is one on the consumer
            self._calling.add(task := asyncio.current_task())
            with contextlib.suppress(Exception):
                async with aiohttp.ClientSession(timeout=CALLBACK_WAIT, headers={CALLBACK_HEADER: "1"}) as http:
                    await http.post(url, json={"session_id": session.session_id, **payload}, allow_redirects=False)
            self._calling.discard(task)

    async def _until(self, condition: Callable[[], object], seconds: float = float("inf")) -> None:
        """Wait for a condition, at most that long. It is looked at 20 times a second."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def _obey_from_thread(self, path: str, session_id: str | None, wait: float) -> Answer:
        future = asyncio.run_coroutine_threadsafe(self.obey(path, session_id, wait), self._loop)
        try:
            return future.result(RELEASE_WAIT + wait)
        except concurrent.futures.TimeoutError:
            return Answer(504, {"reason": f"{path} took over {RELEASE_WAIT:g} s, and goes on"})

    async def obey(self, path: str, session_id: str | None = None, wait: float = 0.0) -> Answer:
        """Do what the consumer wants: see METHODS."""
        if path == "/session":
            await self._until(lambda: self.framework.session() or self.stage == "draining", wait)
        session = self.framework.session(session_id)
        if session and path == "/renew":
            session.expiration = max(session.expiration, time.time() + session.lifetime)
        lease = session and {"session_id": session.session_id, "time_to_live": session.expiration - time.time()}
        if path == "/session":
            return Answer(200, lease or {"session_id": None})
        if lease and path == "/renew":
            return Answer(200, {"renewed": True, **lease})
        answer = {"released": True, "session_ids": [session and session.session_id]}
        try:
            if session and await self.framework.end(session.session_id):
                return Answer(200, answer)
        except Exception as error:
            log.exception("closing session=%s failed; the worker is free", session and session.session_id)
            return Answer(500, {**answer, "reason": f"closing failed, the worker is free: {error!r}"})
        reason = "no active session" if session_id is None else "session ID is not active"
        return Answer(200, {"renewed" if path == "/renew" else "released": False, "reason": reason})

    async def serve(self, signals: socket.socket) -> None:
        """Wait for the ports, which a predecessor holds while it drains. Then run for good: see _drain()."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._obey_signals, args=(signals,), name="signals", daemon=True).start()
        deadline = time.monotonic() + PORT_WAIT
        for port in (*self.settings.ports, self.settings.control_port):
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    (await self._loop.create_server(asyncio.Protocol, self.settings.host, port)).close()
                    break
                await asyncio.sleep(0.1)
        await self.framework.run(host=self.settings.host)

    def _obey_signals(self, signals: socket.socket) -> None:
        """In a thread of its own: whatever hangs, the event loop included, the process ends in time."""
        signals.recv(1)
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop)
        signals.settimeout(DRAIN)
        try:
            os._exit(128 + signals.recv(1)[0])
        except TimeoutError:
            threading.Timer(0.5, os._exit, (0,)).start()  # in case that the log hangs too
            log.error("the drain took over %g s, not done: %s", DRAIN, self.undone)
            os._exit(0)

    async def _drain(self) -> None:
        """Take no new session, end the open one, and see that the autoscaler knows."""
        self.stage, session = "draining", self.framework.session()
        self.undone = f"the on_close callbacks of session={session and session.session_id}"
        log.info("draining: %s", self.undone)
        await self.obey("/release")
        await self._until(lambda: not self._calling)
        self.undone = "the last report to the autoscaler"
        log.info("draining: %s", self.undone)
        await self._until(self.framework.has_told_all)
        await asyncio.sleep(0.2)  # until those who wait are answered
        os._exit(0)


class OneLine(logging.Filter):
    """A record is one line of ASCII: nothing that a stranger sent can forge one. Of what they cause one a second."""

    told: ClassVar[dict[str, float]] = {}  # when, by logger: strangers' hide nobody else's

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"[^ -~]", lambda match: ascii(match[0])[1:-1], record.getMessage()), ()
        if record.levelno == logging.WARNING or record.name == "asyncio":  # a bad signature; no file is left to open
            if time.monotonic() - self.told.get(record.name, -1.0) < 1:
                return False
            record.exc_info, self.told[record.name] = None, time.monotonic()
        return True


def main() -> int:
    signals, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())  # written by the C handler, however busy Python is
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger().handlers[0].addFilter(OneLine())
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # a traceback per malformed request
    with contextlib.suppress(ValueError, OSError):  # every connection, a stranger's too, is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        worker = NullWorker(Settings.from_environment(os.environ))
    except StartupError as error:
        print(f"null_worker: {error}", file=sys.stderr)
        return 2
    asyncio.run(worker.serve(signals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
