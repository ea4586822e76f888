"""The Null PyWorker: Vast Serverless starts and stops this GPU instance, and forwards nothing to it.

A reservation is one session of Vast's worker framework, at most one at a time. A dispatcher opens it through the SDK
and so gets the whole instance; a queue consumer on the instance does the work. The reservation ends when the consumer
says `curl -X POST http://127.0.0.1:18999/release`, when the dispatcher closes it, when its lifetime runs out, or when
this process is asked to stop.

On a Vast instance:     python null_worker.py
Anywhere else:          python null_client.py --local
"""

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import json
import logging
import math
import os
import re
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from operator import attrgetter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from aiohttp import web

PERFORMANCE = 100  # one session of cost 100 is one worker; 99.9 would make the autoscaler round up to one more
MAX_COST = 1_000_000  # the signature doesn't cover it, and sums of huge ones would overflow in the reports
MAX_BODY = 1 << 20  # bytes of a /session/create or /ping
IDLE_CONNECTION = 10.0  # seconds of silence after which the control server drops a connection
RELEASE_WAIT = 15.0  # seconds; the framework bounds a session's on_close callback at 10
DRAIN = 7.0  # seconds from the signal to the exit, at most; Vast's supervisor kills after 10

log = logging.getLogger("null_worker")


class StartupError(Exception):
    """The worker can't start; the text is one line for a person."""


@dataclass(frozen=True)
class Settings:
    """Everything that the environment decides, checked."""

    control_port: int
    health_url: str | None  # of the consumer; None: the control server answers /health itself
    host: str | None  # to listen on; None: every interface, as Vast needs

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Settings":
        """Raise StartupError for the first bad value, or for all of Vast's variables that are missing."""
        control_port = _port("NULL_CONTROL_PORT", env.get("NULL_CONTROL_PORT") or "18999")
        health_url = env.get("BACKEND_HEALTH_URL") or None
        if health_url is not None:
            if not is_http_url(health_url):
                raise _bad("BACKEND_HEALTH_URL", health_url, "an absolute http:// or https:// URL")
            if is_loopback(urlsplit(health_url).hostname) and _effective_port(health_url) == control_port:
                raise _bad("BACKEND_HEALTH_URL", health_url, "the consumer's own, not the control server's")
        unsecured = env.get("UNSECURED", "false")
        if unsecured.lower() not in ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"):
            raise _bad("UNSECURED", unsecured, "true or false")

        if env.get("WORKER_PORT"):
            worker_port = _port("WORKER_PORT", env["WORKER_PORT"])
        mapped_port = f"VAST_TCP_PORT_{env.get('WORKER_PORT') or '<WORKER_PORT>'}"
        needed = ("CONTAINER_ID", "PUBLIC_IPADDR", "REPORT_ADDR", "WORKER_PORT", mapped_port)
        if missing := [name for name in needed if not env.get(name)]:
            raise StartupError(
                f"not a Vast Serverless instance, {', '.join(missing)} not set; "
                "to run it off Vast: python null_client.py --local"
            )
        if not (env["CONTAINER_ID"].isascii() and env["CONTAINER_ID"].isdigit()):
            raise _bad("CONTAINER_ID", env["CONTAINER_ID"], "a number")
        _port(mapped_port, env[mapped_port])
        http_port = _port("WORKER_HTTP_PORT", env.get("WORKER_HTTP_PORT", str(worker_port + 1)))
        if http_port == worker_port:
            raise _bad("WORKER_HTTP_PORT", http_port, "another port than WORKER_PORT")
        if control_port in (worker_port, http_port):
            raise _bad("NULL_CONTROL_PORT", control_port, "another port than WORKER_PORT and WORKER_HTTP_PORT")
        return cls(control_port, health_url, env["PUBLIC_IPADDR"] if is_loopback(env["PUBLIC_IPADDR"]) else None)

    @property
    def control_url(self) -> str:
        return f"http://127.0.0.1:{self.control_port}"

    @property
    def callback_origin(self) -> tuple[str, int]:
        """URL and port that a relative `on_close_route` is joined to: the consumer's where it is known."""
        url = urlsplit(self.health_url or self.control_url)
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return f"{url.scheme}://{host}", _effective_port(url.geturl())


def _bad(name: str, value: object, wanted: str) -> StartupError:
    return StartupError(f"{name} is {str(value)!r}, should be {wanted}")


def _port(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 5 and 1 <= int(value) <= 65535):
        raise _bad(name, value, "a port, 1-65535")
    return int(value)


def is_http_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not re.search(r"\s", text)
    except ValueError:
        return False


def is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _names_loopback(host_header: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host_header}").hostname)
    except ValueError:
        return False


def _effective_port(url: str) -> int:
    return urlsplit(url).port or (443 if urlsplit(url).scheme == "https" else 80)


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # a bool is no number
    except OverflowError:  # an integer beyond the range of floats
        return False


def auth_problems(body: object) -> dict[str, str]:
    """What is wrong with the `auth_data` of a request's JSON body, by field; the fields are the router's answer."""
    if not isinstance(body, dict):
        return {"body": "must be an object"}
    auth = body.get("auth_data")
    if not isinstance(auth, dict):
        return {"auth_data": "must be an object"}
    problems = {
        f"auth_data.{name}": f"must be {'a string' if kind is str else 'an integer'}"
        for name, kind in (("endpoint", str), ("signature", str), ("url", str), ("reqnum", int), ("request_idx", int))
        if type(auth.get(name)) is not kind
    }
    if not _is_number(auth.get("cost")) or not 0 <= auth["cost"] <= MAX_COST:
        problems["auth_data.cost"] = f"must be a number from 0 to {MAX_COST}"
    return problems


def create_problems(body: object) -> dict[str, str]:
    """What is wrong with the JSON body of a `/session/create`, by field; empty when it may go to the framework."""
    problems = auth_problems(body)
    if "body" in problems:
        return problems
    payload = body.get("payload")
    if not isinstance(payload, dict):
        return problems | {"payload": "must be an object"}
    lifetime = payload.get("lifetime", 60.0)  # the framework's default
    if not _is_number(lifetime) or lifetime <= 0:
        problems["payload.lifetime"] = "must be a finite number of seconds above zero"
    route = payload.get("on_close_route")
    if route is not None and not (isinstance(route, str) and (route.startswith("/") or is_http_url(route))):
        problems["payload.on_close_route"] = "must be an http(s) URL or a path that begins with /"
    return problems


def ping_problems(body: object) -> dict[str, str]:
    """What is wrong with the JSON body of a `/ping`. One outside a session would be load without a reservation."""
    problems = auth_problems(body)
    if "body" not in problems and not isinstance(body.get("session_id"), str):
        problems["session_id"] = "must be a string"
    return problems


def release_answer(session_ids: list[str], fenced: bool, failures: list[str]) -> tuple[int, dict]:
    """Status and JSON of a `/release` that ended `session_ids`; `fenced` when it named the session to end."""
    if failures:
        return 500, {"released": True, "session_ids": session_ids, "reason": "; ".join(failures)}
    if session_ids:
        return 200, {"released": True, "session_ids": session_ids}
    return 200, {"released": False, "reason": "session ID is not active" if fenced else "no active session"}


class Framework:
    """The SDK's worker, and the only place that uses names which the SDK doesn't promise.

    Raises StartupError where one of them is missing.
    """

    def __init__(self, settings: Settings, lifecycle: contextlib.AbstractAsyncContextManager) -> None:
        try:
            from vastai.serverless.server.lib import backend as backend_module
            from vastai.serverless.server.lib.data_types import AuthData
            from vastai.serverless.server.worker import BenchmarkConfig, HandlerConfig, Worker, WorkerConfig

            model_server_url, model_server_port = settings.callback_origin
            ping = HandlerConfig(
                route="/ping",
                allow_parallel_requests=True,
                max_queue_time=None,
                remote_function=_pong,
                workload_calculator=lambda _payload: 0.0,  # a keep-alive is not load
                benchmark_config=BenchmarkConfig(generator=dict, runs=1, concurrency=1, do_warmup=False),
            )
            self._worker = Worker(
                WorkerConfig(
                    model_server_url=model_server_url,
                    model_server_port=model_server_port,
                    model_healthcheck_url=settings.health_url or f"{settings.control_url}/health",
                    handlers=[ping],
                    max_sessions=1,
                    lifecycle=lifecycle,
                )
            )
            self._backend = backend = self._worker.backend
            self._metrics = backend.metrics
            self._benchmark = Path(backend_module.BENCHMARK_INDICATOR_FILE)
            self._auth_data = AuthData
            self._send_report = self._metrics._Metrics__send_metrics_and_reset
            self._verify = backend._Backend__check_signature
            self._close_session = backend._Backend__close_session
            create = backend.session_create_handler
            (ping_route,) = self._worker.routes
            # Used later, where a missing one would be found too late.
            attrgetter("_pubkey", "unsecured", "sessions", "session_metrics")(backend)
            attrgetter("_request_success", "_request_end", "update_pending", "aclose")(self._metrics)
            attrgetter("requests_deleting")(self._metrics.model_metrics)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise StartupError(f"this vastai-sdk is not known to work ({error}); 1.3 up to below 2 is") from error
        self.accepting = False
        self._closing: set[asyncio.Task[bool]] = set()
        self._changes = 0  # of the load that is to be reported
        self._metrics._Metrics__send_metrics_and_reset = self._report
        # Every end of a session goes through close(): release, /session/end, and the sweep of the expired ones. The
        # sweep must not wait for a slow callback, and the dispatcher need not.
        backend._Backend__close_session = partial(self.close, patience=1.0)
        # The framework binds its routes to the web server only in run().
        backend.session_create_handler = self._guarded(create, create_problems)
        self._worker.routes = [web.post("/ping", self._guarded(ping_route.handler, ping_problems))]

    async def run(self, host: str | None) -> None:
        await self._worker.run_async(host=host)

    def pin_performance(self) -> None:
        """Stand in for the benchmark, which would time a handler that does nothing. A file found there isn't ours."""
        self._benchmark.write_text(f"{PERFORMANCE}\n")

    async def close(self, session_id: str, patience: float | None = None) -> bool:
        """End a session as a success. False if there is none of that id; raises what the framework's metrics raise.

        Wait `patience` seconds at most for its on_close callback; None: as long as the framework does. Once begun it is
        carried through, even when the request that asked for it is cancelled: the framework would drop the rest there,
        and report the load of a session that is gone for ever.
        """
        closing = asyncio.ensure_future(self._close(session_id))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        done, _ = await asyncio.wait({closing}, timeout=patience)
        return closing.result() if done else True

    async def _close(self, session_id: str) -> bool:
        # Counted before the framework's own close, which first waits for the on_close callback: for up to 10 s the
        # session would be gone and its load still reported, on top of its successor's.
        request = self._backend.session_metrics.pop(session_id, None)
        try:
            if request is not None:
                log.info("ended session=%s request_idx=%s", session_id, request.request_idx)
                try:
                    self._metrics._request_success(request)
                finally:
                    self._metrics._request_end(request)
                    self._metrics.update_pending = True
                    self._changes += 1
        finally:
            closed = await self._close_session(session_id)
        return closed

    async def _report(self) -> None:
        # The framework forgets a change that comes while a report is under way, and would tell it 10 s later.
        before = self._changes
        await self._send_report()
        if self._changes != before:
            self._metrics.update_pending = True

    async def release(self, session_id: str | None = None) -> tuple[int, dict]:
        """End that session, or whichever is open; status and JSON as `/release` answers them."""
        ended, failures = [], []
        for candidate in list(self._backend.sessions) if session_id is None else [session_id]:
            try:
                if not await self.close(candidate):
                    continue
            except Exception as error:
                log.exception("closing session=%s failed; the worker is free", candidate)
                failures.append(f"closing failed, the worker is free: {type(error).__name__}: {error}")
            ended.append(candidate)
        return release_answer(ended, session_id is not None, failures)

    async def drain(self) -> None:
        """Take no new session, end the open one, and see that the autoscaler knows."""
        self.accepting = False
        log.info("draining sessions=%s, waiting for on_close callbacks", list(self._backend.sessions))
        await asyncio.wait({asyncio.ensure_future(self.release()), *self._closing})
        log.info("waiting for the autoscaler to take the last report")
        while self._metrics.update_pending or self._metrics.model_metrics.requests_deleting:
            await asyncio.sleep(0.05)
        await self._metrics.aclose()
        if "session" in vars(self._backend):  # a cached_property: there once it was used
            await self._backend.session.close()

    def _guarded(self, handler: Callable, problems_of: Callable[[object], dict[str, str]]) -> Callable:
        """Put a check of every field, and the signature rule of the framework's other routes, before `handler`."""

        async def guard(request: web.Request) -> web.StreamResponse:
            try:
                body = await request.clone(client_max_size=MAX_BODY).json()
            except web.HTTPRequestEntityTooLarge:
                return _refusal(413, f"body over {MAX_BODY} bytes")
            except (ValueError, LookupError, RecursionError, web.RequestPayloadError):
                return _refusal(422, "body is not JSON")
            if problems := problems_of(body):
                return _refusal(422, "invalid fields", fields=problems)
            if not self.accepting:
                return _refusal(503, "no sessions now: starting up or draining")
            if not self._backend.unsecured and self._backend._pubkey is None:
                return _refusal(503, "no sessions yet: the public key has not arrived")
            if not self._verify(self._auth_data.from_json_msg(body["auth_data"])):
                log.warning(
                    "refused %s from=%s: the signature does not verify; UNSECURED=true would accept it, and anyone's",
                    request.path,
                    request.remote,
                )
                return _refusal(401, "signature does not verify")
            response = await handler(_Checked(body, request.transport))
            if response.status == 201:
                log.info("reserved %s", response.text)
                self._changes += 1
            return response

        return guard


@dataclass(frozen=True, eq=False)
class _Checked:
    """What the framework's handlers take of a request. The body is parsed once: what was checked is what is used."""

    body: dict
    transport: asyncio.Transport | None

    async def json(self) -> dict:
        return self.body


def _refusal(status: int, error: str, **more: object) -> web.Response:
    return web.json_response({"error": error, **more}, status=status)


async def _pong(**_payload: object) -> dict:
    return {}


class ControlServer(socketserver.ThreadingTCPServer):
    """What the consumer on the instance talks to. A thread per connection: a slow release doesn't hold up `/health`.

    Not http.server's own server class, which looks its host name up in the DNS when it binds.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, health_stub: bool, release: Callable[[str | None], tuple[int, dict]]) -> None:
        """Bind to 127.0.0.1, or raise OSError. `release` takes a session id or None, and gives status and JSON."""
        self.health_stub, self.release = health_stub, release
        super().__init__(("127.0.0.1", port), ControlHandler)

    def answer(self, method: str, target: str) -> tuple[int, dict, dict]:
        """Status, JSON and extra headers."""
        path, _, query = target.partition("?")
        if path == "/health" and self.health_stub:
            if method in ("GET", "HEAD"):
                return 200, {"status": "ok"}, {}
            return 405, {"error": "use GET"}, {"Allow": "GET, HEAD"}
        if path == "/release":
            if method != "POST":
                return 405, {"error": "use POST"}, {"Allow": "POST"}
            parameters = parse_qs(query, keep_blank_values=True)  # an empty id is an id that is not active
            session_ids = parameters.pop("session_id", [None])
            if parameters or len(session_ids) > 1:  # a misspelt fence must not end somebody else's session
                return 400, {"error": "the only parameter is session_id, once"}, {}
            return *self.release(session_ids[0]), {}
        return 404, {"error": "not found"}, {}

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("control connection failed: %r", sys.exc_info()[1])


class ControlHandler(BaseHTTPRequestHandler):
    server: ControlServer
    timeout = IDLE_CONNECTION
    default_request_version = "HTTP/1.0"  # garbage gets a status line too
    wbufsize = -1  # headers and body in one packet: two would meet Nagle's algorithm and a delayed acknowledgement

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("do_"):  # http.server looks for a method per HTTP method; wrong ones get their answer too
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        if all(map(_names_loopback, self.headers.get_all("Host", []))):
            self._reply(*self.server.answer(self.command, self.path))
        else:
            self._reply(403, {"error": "Host is not loopback"}, {})

    def _reply(self, status: int, answer: dict, headers: dict) -> None:
        text = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = True
        self._reply(code, {"error": message or HTTPStatus(code).phrase}, {})

    def finish(self) -> None:
        """Read the request's body, however long, after the answer: unread bytes would reset the client's connection."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass

    def log_message(self, *_: object) -> None:
        pass


class NullWorker:
    """The life of the worker: startup, reservations, drain."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.framework = Framework(settings, self.lifecycle())
        self.stopping = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifecycle(self) -> AsyncIterator[None]:
        """Entered by the framework, which reports an exception from here to the autoscaler as the worker's error."""
        self.framework.pin_performance()
        loop = asyncio.get_running_loop()

        def release(session_id: str | None) -> tuple[int, dict]:
            future = asyncio.run_coroutine_threadsafe(self.framework.release(session_id), loop)
            try:
                return future.result(RELEASE_WAIT)
            except concurrent.futures.TimeoutError:
                return 504, {"reason": f"closing took over {RELEASE_WAIT:g} s and goes on; the worker is free"}

        with ControlServer(self.settings.control_port, self.settings.health_url is None, release) as server:
            threading.Thread(target=server.serve_forever, name="control", daemon=True).start()
            log.info("control server url=%s", self.settings.control_url)
            self.framework.accepting = not self.stopping.is_set()
            try:
                yield
            finally:
                await asyncio.to_thread(server.shutdown)

    async def serve(self) -> None:
        """Run until a SIGTERM or SIGINT, then drain. A second signal ends the process at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        serving = asyncio.ensure_future(self.framework.run(self.settings.host))
        stopping = asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await self.framework.drain()
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # Whatever hangs, a callback, the autoscaler or a name lookup in a thread, the process ends in time.
        watchdog = threading.Timer(DRAIN, os._exit, (0,))
        watchdog.daemon = True
        watchdog.start()
        self.stopping.set()


def main() -> int:
    try:
        worker = NullWorker(Settings.from_environment(os.environ))
    except StartupError as error:
        print(f"null_worker: {error}", file=sys.stderr)
        return 2
    asyncio.run(worker.serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
