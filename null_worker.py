"""The Null PyWorker: Vast Serverless starts and stops this instance, and forwards nothing to it.

A reservation is one session of Vast's worker framework, at most one at a time. A dispatcher opens
it and so gets the whole instance; a consumer on the instance works, and tells the control server to
renew or to release it. It ends also when the dispatcher closes it, when nobody has renewed it for
its lifetime, or when this process is asked to stop.

On a Vast instance: python null_worker.py. Anywhere else: python null_client.py --local
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  for them alone: they can read this file
    found = f"{sys.version_info[0]}.{sys.version_info[1]}, {sys.executable}"
    sys.stderr.write(f"null_worker: needs Python 3.10 or newer, and this is {found}\n")
    sys.exit(2)

import os

if __name__ == "__main__":
    # A queue.py beside this file, say, must not be taken for the standard library's.
    here = [os.path.dirname(path(__file__)) for path in (os.path.abspath, os.path.realpath)]
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) not in here] + here

import asyncio
import concurrent.futures
import contextlib
import enum
import errno
import importlib.metadata
import json
import logging
import operator
import queue
import re
import resource
import signal
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol
from urllib.parse import SplitResult, parse_qs, urljoin, urlsplit

try:
    import aiohttp
    from aiohttp import web
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(
        f"null_worker: {sys.executable} lacks what it needs ({error}): "
        "pip install -r requirements.txt\n"
    )
    sys.exit(2)

if TYPE_CHECKING:
    import null_consumer

log = logging.getLogger("null_worker")
door_log = logging.getLogger("null_worker.door")  # of what strangers do: at most a line a second


# The settings


class StartupError(Exception):
    """The worker can't start; the text is one line for a person."""


DEFAULTS = {
    "NULL_CONTROL_PORT": "18999",
    "BACKEND_START_TIMEOUT": "1800",
    "UNSECURED": "false",
    "WORKER_PORT": "3000",
}
TRUE = ("y", "yes", "t", "true", "on", "1")  # as the framework reads a switch
FALSE = ("n", "no", "f", "false", "off", "0")
# What NULL_CONSUMER needs, beside this file, or beside the one that a link stands for.
CONSUMER_FILES = ("null_consumer.py", "null_guard.py")
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)  # and a port


def http_url(text: str) -> SplitResult | None:
    """The parts of an absolute http(s) URL; None for anything else."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return None
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        return None
    if re.search(r"\s", text):
        return None
    return url


class _Environment:
    """The variables that are set, over the defaults. An empty one counts as not set."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.given = {name: value for name, value in env.items() if value}
        self.values = {**DEFAULTS, **self.given}

    def require(self, fine: object, name: str, wanted: str) -> None:
        """Raise StartupError, which says what the variable should be, unless it is fine."""
        if not fine:
            raise StartupError(f"{name} is {self.values[name]!r}, should be {wanted}")

    def port(self, name: str) -> int:
        text = self.values[name]
        is_port = re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= 65535
        self.require(is_port, name, "a port, 1-65535")
        return int(text)

    def seconds(self, name: str) -> float:
        text = self.values[name]
        is_positive = re.fullmatch(r"[0-9]{1,7}(\.[0-9]+)?", text) and float(text) > 0
        self.require(is_positive, name, "seconds above 0")
        return float(text)

    def switch(self, name: str) -> bool:
        text = self.values[name].lower()
        self.require(text in TRUE + FALSE, name, "true or false")
        return text in TRUE

    def health_url(self, name: str, control_port: int) -> str | None:
        """The consumer's health URL, which must not be answered by the control server itself."""
        text = self.values.get(name)
        if text is None:
            return None
        url = http_url(text)
        self.require(url, name, "an absolute http:// or https:// URL")
        assert url is not None
        host_and_port = url.netloc.rpartition("@")[2]
        if LOOPBACK.fullmatch(host_and_port):
            is_own = (url.port or 80) == control_port
            self.require(not is_own, name, "the consumer's own, not the control server's")
        return text

    def consumer(self, name: str) -> str | None:
        """The shell line that null_consumer.py is to run, whose own settings are checked too."""
        line = self.values.get(name)
        if line is None:
            return None
        self.require(line.strip(), name, "a shell line")
        folder = Path(__file__).resolve().parent
        for file in CONSUMER_FILES:
            is_there = (folder / file).exists() or Path(__file__).with_name(file).exists()
            self.require(is_there, name, f"unset where there is no {folder / file}")
        import null_consumer  # only now: the worker works when it was copied alone

        try:
            null_consumer.Settings.from_environment(self.values)
        except null_consumer.SettingsError as error:
            raise StartupError(str(error)) from error
        return line

    def require_instance(self) -> None:
        """Raise StartupError, which names all variables of a Vast instance that are missing."""
        mapped_port = f"VAST_TCP_PORT_{self.given.get('WORKER_PORT', '<WORKER_PORT>')}"
        needed = ("CONTAINER_ID", "PUBLIC_IPADDR", "REPORT_ADDR", "WORKER_PORT", mapped_port)
        missing = ", ".join(name for name in needed if name not in self.given)
        if missing:
            off_vast = "to run it off Vast: python null_client.py --local"
            raise StartupError(f"not a Vast Serverless instance, {missing} not set; {off_vast}")
        is_number = re.fullmatch("[0-9]+", self.values["CONTAINER_ID"])
        self.require(is_number, "CONTAINER_ID", "a number")
        self.port(mapped_port)


class Settings(NamedTuple):
    """Everything that the environment decides, checked."""

    control_port: int
    health_url: str | None = None  # of the consumer; None: the control server answers /health
    host: str | None = None  # to listen on; None: every interface, as Vast needs
    # Of the framework: WORKER_PORT, which the internet reaches, and the HTTP-only one.
    ports: tuple[int, int] = (3000, 3001)
    start_timeout: float = 1800.0  # seconds that the consumer may take to its first healthy answer
    unsecured: bool = False  # whether unsigned requests are accepted
    consumer: str | None = None  # a shell line for null_consumer.py; None: somebody else starts one

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Settings":
        """Raise StartupError for the first bad value, or for all missing variables of Vast's."""
        environment = _Environment(env)
        control_port = environment.port("NULL_CONTROL_PORT")
        worker_port = environment.port("WORKER_PORT")
        environment.values.setdefault("WORKER_HTTP_PORT", str(worker_port + 1))
        health_url = environment.health_url("BACKEND_HEALTH_URL", control_port)
        start_timeout = environment.seconds("BACKEND_START_TIMEOUT")
        unsecured = environment.switch("UNSECURED")
        consumer = environment.consumer("NULL_CONSUMER")
        environment.require_instance()
        http_port = environment.port("WORKER_HTTP_PORT")
        is_other = http_port != worker_port
        environment.require(is_other, "WORKER_HTTP_PORT", "another port than WORKER_PORT")
        is_other = control_port not in (worker_port, http_port)
        wanted = "another port than WORKER_PORT and WORKER_HTTP_PORT"
        environment.require(is_other, "NULL_CONTROL_PORT", wanted)
        host = None
        if LOOPBACK.fullmatch(environment.values["PUBLIC_IPADDR"]):
            host = environment.values["PUBLIC_IPADDR"]
        return cls(
            control_port=control_port,
            health_url=health_url,
            host=host,
            ports=(worker_port, http_port),
            start_timeout=start_timeout,
            unsecured=unsecured,
            consumer=consumer,
        )


# The door: what requests to the framework's ports must be like

MAX_BODY = 1 << 20  # bytes of a request, before and after decompression
MAX_VALUES = 10_000  # in a request: a million small ones would take a hundred times its memory
MAX_TEXT = 4096  # bytes of a string in a request
MAX_COST = 1_000_000  # the signature doesn't cover it; sums of huge ones would overflow in reports
MAX_LIFETIME = 30 * 24 * 3600  # seconds
MAX_WAIT = 60  # seconds that a look or a consumer may wait for a change
BODY_WAIT = 10.0  # seconds that a body may take to arrive


class Field(NamedTuple):
    """What a field of a request must be, in words and as a test."""

    must_be: str
    accepts: Callable[[Any], bool]
    default: object = None  # stands for a field that is not there


def _is_number(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return low <= value <= high


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) <= MAX_TEXT


def _is_integer(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_callback(value: Any) -> bool:
    if value is None:
        return True
    return _is_text(value) and (value.startswith("/") or http_url(value) is not None)


TEXT = Field(f"a string of at most {MAX_TEXT} bytes", _is_text)
INTEGER = Field("an integer of 64 bits", _is_integer)
COST = Field(f"a number from 0 to {MAX_COST}", lambda value: _is_number(value, 0, MAX_COST))
WAIT = Field(
    f"a number of seconds from 0 to {MAX_WAIT}",
    lambda value: _is_number(value, 0, MAX_WAIT),
    default=0,
)
LIFETIME = Field(
    f"a number of seconds above 0, at most {MAX_LIFETIME} (30 days)",
    lambda value: _is_number(value, 1e-9, MAX_LIFETIME),
    default=60.0,
)
CALLBACK = Field("an http(s) URL or a path that begins with /", _is_callback)
OBJECT = Field("an object", lambda value: isinstance(value, dict))  # with further fields, if it has
ANYTHING = Field("any JSON", lambda _: True)  # is handed on, and not looked at

AUTH_DATA = {
    "auth_data": OBJECT,
    "auth_data.cost": COST,
    "auth_data.endpoint": TEXT,
    "auth_data.reqnum": INTEGER,
    "auth_data.request_idx": INTEGER,
    "auth_data.signature": TEXT,
    "auth_data.url": TEXT,
}
SESSION = {"session_id": TEXT, "session_auth": OBJECT}

CREATE = "/session/create"
LOOK = "/session/get"
END = "/session/end"
HEALTH = "/session/health"
PING = "/ping"
UPDATE = "/pyworker/update"
# Each route of the framework, and the fields that are read of its requests.
ROUTES: dict[str, dict[str, Field]] = {
    CREATE: {
        **AUTH_DATA,
        "payload": OBJECT,
        "payload.lifetime": LIFETIME,
        "payload.on_close_route": CALLBACK,
        "payload.on_close_payload": ANYTHING,
    },
    LOOK: {**SESSION, "wait": WAIT},
    END: SESSION,
    HEALTH: SESSION,
    PING: {**AUTH_DATA, "payload": OBJECT, "session_id": TEXT},  # without a session it'd be load
    UPDATE: {},  # the framework reads no more than a header
}


class Refusal(Exception):
    """A request doesn't get in."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        super().__init__(status, answer)
        self.status = status
        self.answer = answer


def _invalid(found: dict[str, str]) -> Refusal:
    return Refusal(422, {"error": "invalid", "fields": found})


def problems(message: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, str]:
    """What is wrong with the fields of a request, by name; empty when nothing is."""
    found = {}
    for path, field in fields.items():
        parent, _, name = path.rpartition(".")
        holder = message.get(parent) if parent else message
        if not isinstance(holder, dict):
            continue  # the parent is a field itself, and named
        if not field.accepts(holder.get(name, field.default)):
            found[path] = f"must be {field.must_be}"
    return found


def parse(body: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The message in the body of a request, checked; raises Refusal."""
    message = None
    if body.count(b"{") + body.count(b"[") + body.count(b",") <= MAX_VALUES:
        with contextlib.suppress(ValueError, RecursionError):
            # UTF-8, whatever charset it names: some decoders take quadratic time.
            message = json.loads(body.decode())
    if not isinstance(message, dict):
        raise _invalid({"body": "must be a JSON object in UTF-8"})
    found = problems(message, fields)
    if found:
        raise _invalid(found)
    return message


async def read_body(request: web.Request) -> bytes:
    """The body of a request, inflated, and bounded in size and time; raises Refusal."""
    too_large = Refusal(413, {"error": f"body over {MAX_BODY} bytes"})
    unreadable = _invalid({"body": "must be readable"})
    try:
        bounded = request.clone(client_max_size=MAX_BODY)
        body = await asyncio.wait_for(bounded.read(), BODY_WAIT)
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except asyncio.TimeoutError:
        raise Refusal(408, {"error": f"body not there within {BODY_WAIT:g} s"}) from None
    except web.RequestPayloadError:
        raise unreadable from None
    if request.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate"):
        try:
            either_header = zlib.decompressobj(wbits=47)
            body = either_header.decompress(body, MAX_BODY + 1)
        except zlib.error:
            raise unreadable from None
    if len(body) > MAX_BODY:
        raise too_large
    return body


# The control server: what the consumer asks for, and how it is answered

IDLE_CONNECTION = 10.0  # seconds of silence after which the control server drops a connection
MAX_REASON = 1024  # bytes
CALLBACK_HEADER = "X-Null-Callback"  # marks an on_close callback


class Answer(NamedTuple):
    """What the control server answers."""

    status: int
    body: dict[str, Any]
    allow: str | None = None  # the methods, after a wrong one


def _parse_wait(text: str | None) -> float:
    if text is None:
        return 0.0
    seconds = float(text)
    if not WAIT.accepts(seconds):
        raise ValueError
    return seconds


def _parse_session_id(text: str | None) -> str | None:
    return text  # an empty id, of a shell variable that isn't set, is one that is not active


def _parse_reason(text: str | None) -> str:
    if text is None or not text.strip() or len(text.encode()) > MAX_REASON:
        raise ValueError
    return text


class Parameter(NamedTuple):
    """The one parameter that the query of a route may have."""

    name: str
    must_be: str
    parse: Callable[[str | None], Any]  # None: it isn't given. ValueError: it isn't what it must be


class ControlRoute(NamedTuple):
    """A route of the control server."""

    methods: tuple[str, ...]
    parameter: Parameter | None = None  # None: the query is ignored


SESSION_ID = Parameter("session_id", "an id", _parse_session_id)
CONTROL_ROUTES = {
    "/health": ControlRoute(("GET", "HEAD")),
    "/session": ControlRoute(("GET",), Parameter("wait", WAIT.must_be, _parse_wait)),
    "/renew": ControlRoute(("POST",), SESSION_ID),
    "/release": ControlRoute(("POST",), SESSION_ID),
    "/broken": ControlRoute(
        ("POST",),
        Parameter("reason", f"a text of at most {MAX_REASON} bytes, not empty", _parse_reason),
    ),
}
ControlFunction = Callable[[Any], Answer]  # what a route does, given its parameter


def parse_query(query: str, parameter: Parameter) -> Any:
    """The parameter's value. Raise Refusal for a wrong one, another one, or more than one."""
    values = parse_qs(query, keep_blank_values=True)
    texts = values.pop(parameter.name, [None])
    if values or len(texts) > 1:  # a misspelt session_id must not end somebody else's session
        raise Refusal(400, {"error": f"the only parameter is {parameter.name}, once"})
    try:
        return parameter.parse(texts[0])
    except ValueError:
        raise Refusal(400, {"error": f"{parameter.name} must be {parameter.must_be}"}) from None


def control_request(functions: Mapping[str, ControlFunction], method: str, target: str) -> Answer:
    """The answer to a request to the control server. `functions` has what each path does."""
    path, _, query = target.partition("?")
    route = CONTROL_ROUTES.get(path)
    function = functions.get(path)  # /health has none where the consumer answers its own
    if route is None or function is None:
        return Answer(404, {"error": "not found"})
    if method not in route.methods:
        return Answer(405, {"error": f"use {route.methods[0]}"}, ", ".join(route.methods))
    if route.parameter is None:
        return function(None)
    try:
        value = parse_query(query, route.parameter)
    except Refusal as refusal:
        return Answer(refusal.status, refusal.answer)
    return function(value)


class ControlServer(socketserver.ThreadingTCPServer):
    """A thread per connection, so that a release that waits doesn't hold up `/health`."""

    # Not http.server's ThreadingHTTPServer, which looks up the name of this host.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, functions: Mapping[str, ControlFunction]) -> None:
        """Bind to the port, on loopback only; raises OSError where it is taken."""
        super().__init__(("127.0.0.1", port), ControlHandler)
        self.functions = functions

    def start(self) -> None:
        """Serve in a thread for as long as the process lives."""
        threading.Thread(target=self.serve_forever, name="control", daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("control connection failed: %r", sys.exc_info()[1])


class ControlHandler(BaseHTTPRequestHandler):
    """The HTTP around control_request()."""

    server: ControlServer
    timeout = IDLE_CONNECTION
    default_request_version = "HTTP/1.0"  # garbage gets a status line too
    error_content_type = "application/json"
    error_message_format = '{"error": "%(explain)s"}\n'
    # Headers and body in one packet: two would meet Nagle's algorithm and delayed acknowledgements.
    wbufsize = -1

    def parse_request(self) -> bool:
        """Read the request, and answer it here: http.server looks for a function per method."""
        if super().parse_request():
            self._send(self._answer())
        return False  # nothing is left to do

    def _answer(self) -> Answer:
        if CALLBACK_HEADER in self.headers:  # it may come late, and would end the next session
            return Answer(403, {"error": "an on_close callback changes nothing here"})
        for host in self.headers.get_all("Host", []):
            if not LOOPBACK.fullmatch(host):  # a web page that got here by DNS rebinding
                return Answer(403, {"error": "the Host is not loopback"})
        return control_request(self.server.functions, self.command, self.path)

    def _send(self, answer: Answer) -> None:
        text = json.dumps(answer.body).encode() + b"\n"
        self.send_response_only(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if answer.allow:
            self.send_header("Allow", answer.allow)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def finish(self) -> None:
        """Read the request's body after the answer: unread bytes would reset the connection."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass

    def log_message(self, *_: object) -> None:
        pass


# The framework: Vast's SDK

KEY_TIMEOUT = 10.0  # seconds for the key server to answer
KEY_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, LookupError)
SDK_ERRORS = (ImportError, AttributeError, TypeError, ValueError, LookupError)


class Hooks(Protocol):
    """What the framework asks the worker for."""

    def lifecycle(self) -> AbstractAsyncContextManager[None]:
        """Entered at the start. The worker is loaded as soon as that is done."""

    async def handle_public_request(self, route: str, request: web.Request) -> web.StreamResponse:
        """Answer a request to one of ROUTES."""

    async def close(self, session_id: str) -> bool:
        """End a session, when it has expired or its dispatcher wants it."""

    async def session_ended(self, session: Any) -> None:
        """A session is gone."""

    def report_broken(self, reason: str) -> None:
        """The framework has failed."""


class Framework:
    """The SDK's worker under ordinary names, with no decision of ours.

    The only place that uses names which the SDK doesn't promise. All are looked for at the start.
    """

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        """Raise StartupError where the SDK isn't known to work."""
        # What was checked is what the framework reads: to it, an empty one is an error.
        os.environ["UNSECURED"] = str(settings.unsecured)
        os.environ["WORKER_HTTP_PORT"] = str(settings.ports[1])
        self._shift = 0  # seconds, see handle()
        version = "of an unknown version"
        try:
            version = importlib.metadata.version("vastai")
            self._check_version(version)
            self._build(hooks)
            self._check_names()
            self._take_names()
            self._patch(hooks)
        except SDK_ERRORS as error:
            text = f"vastai-sdk {version} is not known to work ({error}); 1.3 up to below 2 is"
            raise StartupError(text) from error

    def _check_version(self, version: str) -> None:
        major_and_minor = tuple(map(int, version.split(".")[:2]))
        if not (1, 3) <= major_and_minor < (2,):
            raise ImportError("too old, or too new")

    def _build(self, hooks: Hooks) -> None:
        from vastai import (  # type: ignore[import-untyped]
            BenchmarkConfig,
            HandlerConfig,
            Worker,
            WorkerConfig,
        )
        from vastai.serverless.server import lib  # type: ignore[import-untyped]

        ping = HandlerConfig(
            PING,
            benchmark_config=BenchmarkConfig(),  # there must be one
            remote_function=_pong,
            allow_parallel_requests=True,
            workload_calculator=lambda _: 0.0,  # a ping is not load
        )
        config = WorkerConfig(
            "http://127.0.0.1",  # of a model server, which is asked nothing
            9,
            handlers=[ping],
            max_sessions=1,
            lifecycle=hooks.lifecycle(),
        )
        self._lib = lib
        self._steady_clock()
        self._worker = Worker(config)
        self._backend = self._worker.backend
        self._metrics = self._backend.metrics

    def _steady_clock(self) -> None:
        """Let the framework's reports and leases go by a clock that nobody can set."""
        self._offset = time.time() - time.monotonic()
        steady = SimpleNamespace(**{**vars(time), "time": self.now})
        for module in (self._lib.backend, self._lib.metrics, self._lib.data_types):
            _require_names(module, "time.time")
            module.time = steady

    def _check_names(self) -> None:
        """Look for names that are used later, where a missing one would be found too late."""
        backend_module = self._lib.backend
        _require_names(
            self._backend,
            "_pubkey",
            "_fetch_pubkey",
            "report_addr",
            "unsecured",
            "sessions",
            "session_metrics",
            "mtoken",
            "backend_errored",
            "_Backend__check_signature",
            "_Backend__close_session",
            "_Backend__run_session_on_close",
        )
        _require_names(self._metrics, "update_pending", "_request_success", "_request_end")
        _require_names(
            self._metrics.model_metrics,
            "error_msg",
            "requests_deleting",
            "workload_processing",
            "reset",
        )
        _require_names(backend_module, "log", "BENCHMARK_INDICATOR_FILE")
        _require_names(backend_module, "AuthData.from_json_msg", "RSA.import_key")
        fields = backend_module.Session.__dataclass_fields__
        for name in ("session_id", "lifetime", "expiration", "on_close_route", "on_close_payload"):
            operator.itemgetter(name)(fields)

    def _take_names(self) -> None:
        """Keep the framework's own functions, before _patch() puts ours in their places."""
        self._handlers = {PING: self._worker.routes[0].handler}
        for route in ROUTES:
            if route != PING:
                self._handlers[route] = getattr(self._backend, _handler_name(route))
        self._close = self._backend._Backend__close_session
        self.run: Callable[..., Awaitable[None]] = self._worker.run_async
        self.benchmark_file = Path(self._lib.backend.BENCHMARK_INDICATOR_FILE)
        self.has_master_token = bool(self._backend.mtoken)

    def _patch(self, hooks: Hooks) -> None:
        self._backend.backend_errored = hooks.report_broken
        self._backend._fetch_pubkey = _fetch_nothing  # it gives up for good after 15 s
        self._backend._Backend__run_session_on_close = hooks.session_ended
        self._backend._Backend__close_session = hooks.close
        self._metrics.model_metrics = _exact_counters(self._metrics)
        self._patch_log()
        self._patch_web(hooks)

    def _patch_log(self) -> None:
        # Worker() sets DEBUG, at which the framework logs what callers send.
        logging.getLogger().setLevel(logging.INFO)
        # It logs the whole of what it refuses; its errors are reported to the autoscaler anyway.
        self._lib.backend.log.disabled = True

    def _patch_web(self, hooks: Hooks) -> None:
        # The door inflates bodies itself, bounded. An access log would have a line per request,
        # with the keys in its query.
        web.AppRunner = partial(  # type: ignore[misc, assignment]
            web.AppRunner, auto_decompress=False, access_log=None
        )
        # The framework binds its handlers to its web server only in run(), by these names.
        for route in ROUTES:
            if route != PING:
                handler = partial(hooks.handle_public_request, route)
                setattr(self._backend, _handler_name(route), handler)
        self._worker.routes = [web.post(PING, partial(hooks.handle_public_request, PING))]

    def now(self) -> float:
        """Seconds since 1970, by the wall clock as it was at the start, and steady since."""
        return time.monotonic() + self._offset

    def verifies(self, auth_data: dict[str, Any]) -> bool:
        """Whether the router's signature is right, or none is needed."""
        parsed = self._lib.backend.AuthData.from_json_msg(auth_data)
        return bool(self._backend._Backend__check_signature(parsed))

    async def fetch_key(self) -> None:
        """Ask the key server for what signatures are verified with. Raises KEY_ERRORS."""
        url = self._backend.report_addr.rstrip("/") + "/pubkey/"
        timeout = aiohttp.ClientTimeout(total=KEY_TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url) as answer:
            answer.raise_for_status()
            text = await answer.text()
        self._backend._pubkey = self._lib.backend.RSA.import_key(text)

    def has_told_all(self) -> bool:
        """Whether the autoscaler knows all that has happened."""
        return not (self._metrics.update_pending or self._metrics.model_metrics.requests_deleting)

    def session(self, session_id: str | None = None) -> Any | None:
        """The open session if it has that id, or whichever is open.

        It is the SDK's, with session_id, lifetime (seconds) and expiration (see now()).
        """
        for session in self._backend.sessions.values():
            if session_id is None or session.session_id == session_id:
                return session
        return None

    async def handle(
        self, route: str, message: dict[str, Any], request: web.Request
    ) -> web.Response:
        """The framework's own answer to a request. `message` is its JSON, which was checked.

        The expiration that it tells is by the wall clock as it was when the session was opened:
        later settings of the clock change neither that, nor what a renewal adds to it.
        """

        async def json() -> dict[str, Any]:
            return message

        checked = SimpleNamespace(json=json, headers=request.headers, transport=request.transport)
        response: web.Response = await self._handlers[route](checked)
        if route == CREATE and response.status == 201:
            self._shift = round(time.time() - self.now())
        if self._shift and response.status in (200, 201) and route in (CREATE, LOOK):
            return _shifted(response, self._shift)
        return response

    async def end(self, session_id: str) -> bool:
        """Count a session as a success, remove it and call its on_close callback.

        False: there is none of that id. Raises what the counting raises, with the session removed.
        """
        # The framework alone counts after the callback, and reports the load for up to 10 s more.
        try:
            counted = self._backend.session_metrics.pop(session_id, None)
            if counted:
                self._metrics._request_end(counted)  # first: it must be done if the other raises
                self._metrics._request_success(counted)
        finally:
            closed = await self._close(session_id)
        return bool(closed)

    def report_error(self, text: str) -> None:
        """Tell the autoscaler that the worker is broken. An empty text would mean that it isn't."""
        self._metrics.model_metrics.error_msg = text
        self.report_soon()

    def report_soon(self) -> None:
        """Report at the next tick, within a second, instead of within ten."""
        self._metrics.update_pending = True


async def _fetch_nothing() -> None:
    pass


async def _pong(**_payload: object) -> dict[str, object]:
    return {}


def _shifted(response: web.Response, seconds: int) -> web.Response:
    """The same answer with a later expiration."""
    answer = json.loads(response.text or "")
    answer["expiration"] += seconds
    return web.json_response(answer, status=response.status)


def _handler_name(route: str) -> str:
    return route[1:].replace("/", "_") + "_handler"


def _require_names(owner: object, *names: str) -> None:
    """Raise AttributeError for the first name, dotted ones too, that the owner doesn't have."""
    for name in names:
        operator.attrgetter(name)(owner)


def _exact_counters(metrics: Any) -> Any:
    """The framework's counters, but what comes while a report is under way isn't lost.

    The framework sets them to zero after a report: here only what the report said is taken away.
    """
    base: Any = type(metrics.model_metrics)
    counted = (
        "workload_served",
        "workload_received",
        "workload_cancelled",
        "workload_errored",
        "workload_rejected",
    )

    def state(counters: Any) -> dict[str, Any]:
        names = (*counted, "cur_load", "max_throughput", "error_msg")
        return {name: getattr(counters, name) for name in names}

    class Counters(base):  # type: ignore[misc]  # the SDK has no types
        @property
        def workload_processing(self) -> float:
            """Read by the framework once for each report, when it is written."""
            self.reported = state(self)
            return float(super().workload_processing)

        def reset(self) -> None:
            """Called by the framework when a report has been delivered."""
            metrics.update_pending = state(self) != self.reported
            for name in counted:
                setattr(self, name, getattr(self, name) - self.reported[name])

    return Counters.empty()


# The log

STANDARD_ERROR = 2
LOG_LINES = 1000  # that may wait to be written
LOG_FLUSH = 0.5  # seconds for what waits, at the end


class OneLineFormatter(logging.Formatter):
    """A record is one line of ASCII: nothing that a stranger sent can start a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return re.sub(r"[^ -~]", _escaped, super().formatMessage(record))


def _escaped(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


class OneASecond(logging.Filter):
    """For a logger whose lines strangers cause, as many as they like: one a second is enough."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0  # when a line may come, by the monotonic clock

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1
        return True


class BackgroundHandler(logging.Handler):
    """Writes in a thread of its own. What can't be written is lost, and holds up nobody."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is the open file to write to."""
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(LOG_LINES)
        self._lost = 0
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1

    def _write_lines(self) -> None:
        while True:
            line = self._lines.get()
            if self._lost:
                line = f"({self._lost} lines of the log are lost here)\n{line}"
                self._lost = 0
            rest = line.encode() + b"\n"
            with contextlib.suppress(OSError):
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            self._lines.task_done()

    def flush(self) -> None:
        """Wait until all is written, but not for long. Called by logging.shutdown()."""
        deadline = time.monotonic() + LOG_FLUSH
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


def set_up_log() -> None:
    """Log to standard error; what strangers cause, one line a second."""
    handler = BackgroundHandler(STANDARD_ERROR)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    # The SDK gives this logger a handler that writes at once, past ours, unless it has one.
    logging.getLogger("vastai").handlers[:] = [logging.NullHandler()]
    logging.getLogger("vastai").propagate = True
    door_log.addFilter(OneASecond())
    logging.getLogger("asyncio").addFilter(OneASecond())  # no file is left to open, and the like
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # malformed requests


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In one line: with its traceback, strangers could fill the disk."""
    logging.getLogger("asyncio").error("%s: %r", context["message"], context.get("exception"))


def end_process(status: int) -> NoReturn:
    """Whatever other threads do."""
    logging.shutdown()
    os._exit(status)


# The consumer that the worker starts, where NULL_CONSUMER names one: see ConsumerProcess there


def environment_of_consumer(env: Mapping[str, str], control_port: int) -> dict[str, str]:
    """The worker's environment, but its token, and the virtual environment that it runs in.

    Vast's bootstrap makes one for the worker; the consumer's `python` is the instance's own.
    """
    changed = {name: value for name, value in env.items() if name != "MASTER_TOKEN"}
    changed["NULL_CONTROL_PORT"] = str(control_port)
    if sys.prefix == sys.base_prefix:  # the worker runs in none
        return changed
    ours = os.path.realpath(sys.prefix)
    if os.path.realpath(env.get("VIRTUAL_ENV", "")) == ours:
        changed.pop("VIRTUAL_ENV", None)
        changed.pop("VIRTUAL_ENV_PROMPT", None)
    if "PATH" in env:
        folders = env["PATH"].split(os.pathsep)
        others = [each for each in folders if os.path.realpath(each) != os.path.join(ours, "bin")]
        changed["PATH"] = os.pathsep.join(others)
    return changed


# The worker

PERFORMANCE = 100  # one session of cost 100 is one worker; 99.9 would be rounded up to one more
PORT_WAIT = 10.0  # seconds that a predecessor may hold the ports; it drains for 8 at most
HEALTH_INTERVAL = 10.0  # seconds between two looks at a consumer that was well
HEALTH_TIMEOUT = 10.0  # seconds for a look to be answered
START_INTERVAL = 1.0  # seconds between two looks at a consumer that is still starting
# Vast's base image makes this file when the provisioning script has failed, and starts the worker
# all the same.
PROVISIONING_FAILED = Path("/.provisioning_failed")
PROVISIONING_LOG = "/var/log/portal/provisioning.log"
KEY_INTERVAL = 3.0  # seconds between two requests to a key server that is away
CALLBACK_TIMEOUT = 10.0  # seconds for an on_close callback
CONTROL_WAIT = 15.0  # seconds after which a request to the control server is answered with 504
# Seconds from the signal until what is not done is left: the log takes LOG_FLUSH more, so that all
# is over within 8. Vast's supervisor kills after 10.
DRAIN = 7.0
SIGNAL_ECHO = 1.0  # seconds in which one signal may come twice: from a wrapper, and its group


class Stage(enum.Enum):
    """Where a worker is in its life."""

    STARTING = "starting up"
    READY = "ready"
    BROKEN = "broken"  # it takes no session any more, and has reported why, or is about to
    DRAINING = "draining"


async def wait_until(condition: Callable[[], object], seconds: float = float("inf")) -> None:
    """Wait for a condition, at most that long. It is looked at 20 times a second."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)


class NullWorker:
    """The life of the worker. Every decision about reservations is made here."""

    def __init__(self, settings: Settings, open_files: int) -> None:
        """Raise StartupError where the SDK isn't known to work.

        `open_files` is the limit that this process was started with; a consumer gets it too.
        """
        self.settings = settings
        self._open_files = open_files
        self.stage = Stage.STARTING
        self.broken_reason: str | None = None  # the first one stays
        self.undone = "anything: the event loop is blocked"  # of the drain
        self._callbacks: set[object] = set()  # the tasks that wait for an on_close callback
        self._change = asyncio.Event()  # set when a session begins or ends, and then replaced
        self._consumer: null_consumer.ConsumerProcess | None = None  # that we started ourselves
        self.framework = Framework(settings, self)

    # Starting

    async def serve(self, signals: socket.socket) -> None:
        """Run for good, until a signal: see obey_signals()."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_loop_error)
        threading.Thread(
            target=self.obey_signals, args=(signals,), name="signals", daemon=True
        ).start()
        await self._wait_for_ports()
        await self.framework.run(host=self.settings.host)

    async def _wait_for_ports(self) -> None:
        """Wait for the ports, which a predecessor may hold while it drains.

        When one stays taken, the framework fails to bind it, and reports that.
        """
        deadline = time.monotonic() + PORT_WAIT
        for port in (*self.settings.ports, self.settings.control_port):
            while time.monotonic() < deadline:
                if await self._is_free(port):
                    break
                await asyncio.sleep(0.1)

    async def _is_free(self, port: int) -> bool:
        try:
            server = await self._loop.create_server(asyncio.Protocol, self.settings.host, port)
        except OSError:
            return False
        server.close()
        return True

    @contextlib.asynccontextmanager
    async def lifecycle(self) -> AsyncIterator[None]:
        """Entered by the framework, which reports an exception from here as the worker's error."""
        # Or the framework would time a handler that does nothing.
        self.framework.benchmark_file.write_text(f"{PERFORMANCE}\n")
        ControlServer(self.settings.control_port, self.control_functions()).start()
        log.info("control server port=%d", self.settings.control_port)
        self._start_consumer()
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            await self._become_ready(http)
            await wait_until(lambda: self.stage is Stage.READY)  # never, if it is broken by now
            # Kept: the event loop alone would let it be collected.
            self._watching = asyncio.create_task(self._watch_health(http))
            # The framework marks the worker as loaded next, and would tell that up to 10 s later.
            self.framework.report_soon()
            yield

    def _start_consumer(self) -> None:
        if self.settings.consumer is None or self.stage is Stage.DRAINING:
            return
        import null_consumer  # only now: the worker works when it was copied alone

        worker = null_consumer.OfWorker(
            tell=log.info,
            keep=lambda: asyncio.run_coroutine_threadsafe(self.renew(None), self._loop),
            report_broken=lambda reason: self._loop.call_soon_threadsafe(
                self.report_broken, reason
            ),
            open_files=self._open_files,
        )
        environment = environment_of_consumer(os.environ, self.settings.control_port)
        self._consumer = null_consumer.ConsumerProcess(self.settings.consumer, environment, worker)
        self._consumer.start()

    # Well or sick

    async def _become_ready(self, http: aiohttp.ClientSession) -> None:
        """Wait for all that a reservation needs: the public key, and a consumer that is well."""
        deadline = time.monotonic() + self.settings.start_timeout
        if PROVISIONING_FAILED.exists():
            self.report_broken(f"provisioning has failed: see {PROVISIONING_LOG} on the instance")
            return
        if not self.settings.unsecured:
            await self._wait_for_no(self._key_problem, KEY_INTERVAL, deadline)
        await self._wait_for_no(partial(self._health_problem, http), START_INTERVAL, deadline)
        if self.stage is Stage.STARTING:
            self.stage = Stage.READY

    async def _wait_for_no(
        self, look: Callable[[], Awaitable[str]], interval: float, deadline: float
    ) -> None:
        """Look until there is no problem. One that is there at the deadline is the worker's."""
        while self.stage is Stage.STARTING:
            problem = await look()
            if not problem:
                return
            if time.monotonic() > deadline:
                timeout = self.settings.start_timeout
                self.report_broken(f"not well within {timeout:g} s: {problem}")
                return
            await asyncio.sleep(interval)

    async def _key_problem(self) -> str:
        """Why signatures can't be verified yet; empty when they can."""
        try:
            await self.framework.fetch_key()
        except KEY_ERRORS as error:
            return f"no public key: {type(error).__name__}: {error}"
        return ""

    async def _watch_health(self, http: aiohttp.ClientSession) -> None:
        """Look at a consumer that was well, until it isn't."""
        while self.stage is Stage.READY:
            await asyncio.sleep(HEALTH_INTERVAL)
            problem = await self._health_problem(http)
            if problem and self.stage is Stage.READY:
                self.report_broken(problem)

    async def _health_problem(self, http: aiohttp.ClientSession) -> str:
        """What is wrong with the consumer; empty when it is well, or has no health to ask for."""
        if self.settings.health_url is None:
            return ""
        try:
            async with http.get(self.settings.health_url) as answer:
                if answer.status != 200:
                    return f"the health check answers {answer.status}"
        except asyncio.TimeoutError:
            return f"the health check does not answer within {HEALTH_TIMEOUT:g} s"
        except (aiohttp.ClientError, OSError) as error:
            if self.stage is Stage.READY and getattr(error, "errno", 0) == errno.EMFILE:
                return ""  # out of open files: strangers' connections, not the consumer's fault
            return f"the health check fails: {type(error).__name__}: {error}"
        return ""

    def report_broken(self, reason: str) -> None:
        """Take no session from now on, and tell the autoscaler why."""
        self._set_broken(reason)
        self._report_reason()

    def _set_broken(self, reason: str) -> None:
        if self.stage is not Stage.DRAINING:
            self.stage = Stage.BROKEN
        if self.broken_reason is None:
            self.broken_reason = reason or "an unknown error"
            log.error("broken: %s", self.broken_reason)

    def _report_reason(self) -> None:
        if self.broken_reason is not None:
            self.framework.report_error(self.broken_reason)

    # Reserved

    async def handle_public_request(self, route: str, request: web.Request) -> web.StreamResponse:
        """Answer any request that reaches the framework's ports."""
        try:
            body = await read_body(request)
            message = {} if route == UPDATE else parse(body, ROUTES[route])
            self._admit(route, message, request.remote)
        except Refusal as refusal:
            return web.json_response(refusal.answer, status=refusal.status)
        response = await self.framework.handle(route, message, request)
        if route == LOOK and response.status == 200 and message.get("wait"):
            # Open still: the answer is the framework's, once the session has ended or time is up.
            session_id = message["session_id"]
            await self._until(lambda: not self.framework.session(session_id), message["wait"])
            return await self.framework.handle(route, message, request)
        if route == CREATE and response.status == 201:
            await self._hand_out(response, request)
        return response

    def _admit(self, route: str, message: dict[str, Any], caller: str | None) -> None:
        """Raise Refusal for a request that doesn't get in now, or from this caller."""
        if route == UPDATE and not self.framework.has_master_token:
            raise Refusal(403, {"error": "MASTER_TOKEN is not set"})
        if route == CREATE and self.stage is not Stage.READY:
            raise Refusal(503, {"error": f"no sessions now: {self.stage.value}"})
        if route in (CREATE, PING) and not self.framework.verifies(message["auth_data"]):
            text = "refused %s from=%s: %s; UNSECURED=true would accept anyone's"
            door_log.warning(text, route, caller, "the signature does not verify")
            raise Refusal(401, {"error": "signature does not verify"})

    async def _hand_out(self, response: web.Response, request: web.Request) -> None:
        """Write the answer to a create. A creator that is gone by then leaves no session behind."""
        session_id = json.loads(response.text or "")["session_id"]
        try:
            # Turns of the event loop in which it hears of that, closes, and cancels this.
            for _ in range(5):
                await asyncio.sleep(0)
            await response.prepare(request)
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            await self.close(session_id)
            raise
        log.info("reserved session=%s", session_id)
        self._sessions_changed()

    def _sessions_changed(self) -> None:
        """Wake those who wait for a session to begin, or to end."""
        self._change.set()
        self._change = asyncio.Event()

    async def _until(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for a condition on the sessions, at most that long."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            change = asyncio.ensure_future(self._change.wait())
            try:
                await asyncio.wait({change}, timeout=deadline - time.monotonic())
            finally:
                change.cancel()

    async def close(self, session_id: str) -> bool:
        """See Framework.end(), but don't wait longer than a second for the callback."""
        # In a task: what calls this may be cancelled, and the load would be reported for ever.
        ending = asyncio.create_task(self.framework.end(session_id))
        await asyncio.wait({ending}, timeout=1)
        if ending.done():
            return ending.result()
        return True

    async def session_ended(self, session: Any) -> None:
        """A session is gone: call its on_close_route."""
        log.info("ended session=%s", session.session_id)
        self._sessions_changed()
        self._report_reason()
        if session.on_close_route:
            task = asyncio.current_task()
            self._callbacks.add(task)
            await self._call_back(session)
            self._callbacks.discard(task)

    async def _call_back(self, session: Any) -> None:
        """As the framework does, which would follow redirects, and read answers of any size."""
        payload = session.on_close_payload
        if payload is None:
            payload = {}
        elif not isinstance(payload, dict):
            payload = {"payload": payload}
        body = {"session_id": session.session_id, **payload}
        # A path is one on the consumer.
        url = urljoin(self.settings.health_url or "", session.on_close_route)
        timeout = aiohttp.ClientTimeout(total=CALLBACK_TIMEOUT)
        with contextlib.suppress(Exception):
            async with aiohttp.ClientSession(timeout=timeout) as http:
                headers = {CALLBACK_HEADER: "1"}
                async with http.post(url, json=body, headers=headers, allow_redirects=False):
                    pass  # its answer isn't read

    # What the consumer asks for

    def control_functions(self) -> dict[str, ControlFunction]:
        """What each route of the control server does; called in the threads of its connections."""

        def in_loop(
            path: str, function: Callable[[Any], Coroutine[Any, Any, Answer]]
        ) -> ControlFunction:
            return lambda value: self._run_in_loop(path, function(value))

        functions = {
            "/session": lambda wait: self._run_in_loop("/session", self.show_session(wait), wait),
            "/renew": in_loop("/renew", self.renew),
            "/release": in_loop("/release", self.release),
            "/broken": in_loop("/broken", self.take_broken),
        }
        if self.settings.health_url is None:
            functions["/health"] = self.health_stub
        return functions

    def _run_in_loop(
        self, path: str, coroutine: Coroutine[Any, Any, Answer], wait: float = 0.0
    ) -> Answer:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(CONTROL_WAIT + wait)
        except concurrent.futures.TimeoutError:
            return Answer(504, {"reason": f"{path} took over {CONTROL_WAIT:g} s, and goes on"})

    def health_stub(self, _: None) -> Answer:
        """The health of a consumer that has none of its own. It touches no event loop."""
        if self.broken_reason is None:
            return Answer(200, {"status": "ok"})
        return Answer(503, {"status": "broken", "reason": self.broken_reason})

    async def show_session(self, wait: float) -> Answer:
        """The open session, as soon as there is one, at the latest after `wait` seconds."""
        await self._until(self.framework.session, wait)
        session = self.framework.session()
        if session is None:
            return Answer(200, {"session_id": None})
        return Answer(200, self._lease(session))

    async def renew(self, session_id: str | None) -> Answer:
        """Let the session live for at least a lifetime from now."""
        session = self.framework.session(session_id)
        if session is None:
            return _not_active("renewed", session_id)
        at_least = self.framework.now() + session.lifetime
        session.expiration = max(session.expiration, at_least)
        return Answer(200, {"renewed": True, **self._lease(session)})

    async def release(self, session_id: str | None) -> Answer:
        """End the session."""
        session = self.framework.session(session_id)
        if session is None:
            return _not_active("released", session_id)
        answer = {"released": True, "session_ids": [session.session_id]}
        try:
            ended = await self.framework.end(session.session_id)
        except Exception as error:
            log.exception("closing session=%s failed; the worker is free", session.session_id)
            reason = f"closing failed, the worker is free: {error!r}"
            return Answer(500, {**answer, "reason": reason})
        if not ended:  # somebody else has, meanwhile
            return _not_active("released", session_id)
        return Answer(200, answer)

    def _lease(self, session: Any) -> dict[str, Any]:
        time_to_live = session.expiration - self.framework.now()
        return {"session_id": session.session_id, "time_to_live": time_to_live}

    async def take_broken(self, reason: str) -> Answer:
        """Take no session from now on, and report why as soon as none is open."""
        self._set_broken(reason)
        if self.framework.session() is None:
            self._report_reason()
        return Answer(200, {"broken": True})

    # Draining

    def obey_signals(self, signals: socket.socket) -> None:
        """Drain after the first signal; end at once after another one.

        In a thread of its own: whatever hangs, the event loop included, the process ends in time.
        """
        signals.recv(1)
        first_at = time.monotonic()
        deadline = first_at + DRAIN
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop)
        while time.monotonic() < deadline:
            signals.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(TimeoutError):
                (number,) = signals.recv(1)
                if time.monotonic() > first_at + SIGNAL_ECHO:
                    end_process(128 + number)
        log.error("the drain took over %g s, not done: %s", DRAIN, self.undone)
        end_process(0)

    async def _drain(self) -> None:
        """Take no new session, end the open one, and see that the autoscaler knows."""
        self.stage = Stage.DRAINING
        if self._consumer is not None:  # before the session: no job runs on a worker that is free
            self._next_step("the end of null_consumer.py")
            await asyncio.to_thread(self._consumer.end)
        session = self.framework.session()
        session_id = None if session is None else session.session_id
        self._next_step(f"the on_close callbacks of session={session_id}")
        await self.release(None)
        await wait_until(lambda: not self._callbacks)
        self._next_step("the last report to the autoscaler")
        await wait_until(self.framework.has_told_all)
        await asyncio.sleep(0.2)  # until those who wait are answered
        end_process(0)

    def _next_step(self, step: str) -> None:
        self.undone = step
        log.info("draining: %s", step)


def _not_active(what: str, session_id: str | None) -> Answer:
    reason = "session ID is not active"
    if session_id is None:
        reason = "no active session"
    return Answer(200, {what: False, "reason": reason})


# The process


def raise_open_files() -> int:
    """Every connection, a stranger's too, is an open file. Returns the limit until now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def open_closed_streams() -> None:
    """Open the standard streams that were closed by whoever has started this process.

    The next file that is opened would be taken for one of them; and the SDK reads sys.stdout.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def catch_signals() -> socket.socket:
    """A socket that gets a byte, the signal's number, for each signal that asks to end."""
    signals, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())  # written by the C handler, however busy Python is
    wake.detach()  # it stays open for as long as the process lives
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        is_ignored = signal.getsignal(number) is signal.SIG_IGN
        if number == signal.SIGHUP and is_ignored:  # nohup: it shall outlive its terminal
            continue
        signal.signal(number, lambda *_: None)
    # Whatever they are to who has started this process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return signals


def main() -> int:
    """Run the worker, and return the exit status."""
    open_closed_streams()
    signals = catch_signals()
    set_up_log()
    open_files = raise_open_files()
    try:
        worker = NullWorker(Settings.from_environment(os.environ), open_files)
    except StartupError as error:
        print(f"null_worker: {error}", file=sys.stderr)
        return 2
    asyncio.run(worker.serve(signals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
