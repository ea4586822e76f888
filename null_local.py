"""A stand-in for Vast on this machine: it starts real null workers on demand, and stops the idle ones.

Real are the SDK's client, the framework, the worker processes, HTTP, the RSA signatures that the workers verify and
the metrics that they report. Stood in for are the web API's endpoint list, the router, the key server, the report
address, and the scaling: route to a free worker; where there is none, start one; stop one that has been idle.

    async with LocalVast(max_workers=3, inactivity_timeout=10) as vast:
        async with vast.client() as client:
            endpoint = await client.get_endpoint(vast.endpoint_name)

With `tls=True` (it takes `pip install trustme`) the workers are reached over HTTPS, as on Vast.
"""

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import logging
import os
import runpy
import secrets
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15
from vastai import Serverless  # type: ignore[import-untyped]

OF_THE_INSTANCE = ("UNSECURED", "USE_SSL", "BACKEND_HEALTH_URL", "BACKEND_START_TIMEOUT")  # not for a worker here
WORKER = str(Path(__file__).with_name("null_worker.py"))
INSTANCE_CERTIFICATE = "/etc/instance.crt"  # where Vast puts it, and the framework looks for it
TICK = 0.1  # seconds between two looks at the processes
ATTENTIVE = 10.0  # seconds without a poll, after which a place is kept still, but holds up no free worker
PROMISE = 5.0  # seconds in which a routed request has to show up on its worker
STOP_GRACE = 9.0  # seconds from SIGTERM to SIGKILL; the worker's drain takes 8 at most
GIVE_UP = 3  # workers in a row that ended before they were ready
PREFIX = "null-local-"  # of the folder in the temporary directory, followed by the process's id

log = logging.getLogger("null_local")


_signing_key = functools.cache(RSA.generate)  # one for all in this process: it takes a moment


class LocalClient(Serverless):  # type: ignore[misc]  # the SDK has no types
    """The SDK's client, which trusts `authority` (a file) in place of the root certificate that it would download."""

    def __init__(self, *arguments: Any, authority: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._context = ssl.create_default_context(cafile=authority)

    async def get_ssl_context(self) -> ssl.SSLContext:
        return self._context


@dataclass(eq=False)
class LocalWorker:
    """One worker process, and what it last reported."""

    number: int
    port: int
    http_port: int
    control_port: int
    folder: str
    scheme: str
    held: list[socket.socket]  # its ports, so that the system gives them to nobody else
    started_at: float = field(default_factory=time.time)
    process: asyncio.subprocess.Process | None = None
    report: dict[str, Any] = field(default_factory=dict)
    routed: int = 0  # requests that were sent here
    promised_to: int | None = None  # the request index that was last routed here and has not been seen yet
    promised_until: float = 0.0
    was_ready: bool = False
    stopping: bool = False
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.port, self.http_port, self.control_port

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def control_url(self) -> str:
        return f"http://127.0.0.1:{self.control_port}"

    @property
    def state(self) -> str:
        """One of the states that Vast documents."""
        if self.stopping:
            return "DESTROYING"
        if self.report.get("error_msg"):
            return "ERROR"
        return "IDLE" if self.report.get("max_perf") else "MODEL_LOADING"

    @property
    def free(self) -> bool:
        promised = self.promised_to is not None and time.monotonic() < self.promised_until
        return self.state == "IDLE" and not self.report["cur_load"] and not promised

    @property
    def log(self) -> Path:
        """What the process writes to standard output and error."""
        return Path(self.folder, "log")


class LocalVast:
    """Vast Serverless with one endpoint, on the loopback interface, for as long as the `async with` block lasts.

    `environment` is added to every worker's. The attributes below it make it misbehave, for tests.
    """

    endpoint_name = "local"

    def __init__(
        self,
        max_workers: int = 3,
        inactivity_timeout: float = 10.0,
        environment: dict[str, str] | None = None,
        control_port: int | None = 18999,
        on_event: Callable[[str], object] = log.info,
        tls: bool = False,
    ) -> None:
        """`inactivity_timeout` is in seconds. The first worker gets `control_port` where it is free, the others, and
        with None it too, one from the system. `on_event` is told in one line what happens to the workers."""
        self.max_workers, self.inactivity_timeout, self.tls = max_workers, inactivity_timeout, tls
        self.environment, self.control_port, self.on_event = environment or {}, control_port, on_event
        self.start_delay = 0.0  # seconds before a worker's process starts
        self.failing_polls: list[int] = []  # statuses with which the next polls are answered
        self.forgetful = False  # waiting answers lack the request_idx, as some of Vast's do
        self.report_delay = 0.0  # seconds until a worker's report is acknowledged
        self.overbooked = False  # route to occupied workers, as Vast does with a long max_queue_time
        self.publish_key = True  # False: the key server answers 404
        self.workers: dict[int, LocalWorker] = {}
        self._polled: dict[int, float] = {}  # request index to when
        self.waiting: dict[int, float] = {}  # request index to when its place is forgotten, first come first
        self.reports: list[dict[str, Any]] = []  # each worker_status, and when it was received (time.monotonic())
        self.ended: list[dict[str, Any]] = []  # each request that a worker said has ended
        self.polls = self.started = self.last_request = self._failures = 0
        self.api_key, self._master_token = secrets.token_hex(16), secrets.token_hex(16)
        self._key = _signing_key(2048)
        self._starting: set[asyncio.Task[None]] = set()
        self._leaving: asyncio.Event | None = None  # None: not entered

    async def __aenter__(self) -> "LocalVast":  # noqa: PYI034  typing.Self came with Python 3.11
        _sweep_folders()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)
        self.folder = self._folder.name
        if self.tls:
            self._issue_certificates()
        self._runner, self._port = await self._serve(0)
        self._leaving = asyncio.Event()
        self._scaling = asyncio.create_task(self._scale())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Carried through: a cancellation meanwhile takes effect after that."""
        leaving, cancelled = asyncio.create_task(self._leave()), None
        while not leaving.done():
            try:
                await asyncio.wait({leaving})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        leaving.result()

    async def _leave(self) -> None:
        self._need_entered().set()
        self._scaling.cancel()
        try:
            await asyncio.wait([*self._starting, self._scaling])
            for process in self._processes():
                _signal(process, signal.SIGTERM)
            if processes := self._processes():
                await asyncio.wait([asyncio.create_task(process.wait()) for process in processes], timeout=STOP_GRACE)
        finally:
            for process in self._processes():
                _signal(process, signal.SIGKILL)
            await asyncio.gather(*(process.wait() for process in self._processes()))
            _close(held for worker in self.workers.values() for held in worker.held)
            await self._runner.cleanup()
            self._folder.cleanup()
            self._leaving = None

    def _processes(self) -> list[asyncio.subprocess.Process]:
        return [worker.process for worker in self.workers.values() if worker.process is not None]

    def _issue_certificates(self) -> None:
        try:
            import trustme
        except ImportError:
            raise RuntimeError("LocalVast(tls=True) needs the package trustme: pip install trustme") from None
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.authority)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(self.certificate)

    @property
    def authority(self) -> str:
        """The file of the root certificate that the workers' own are issued by, for `curl --cacert`."""
        return os.path.join(self.folder, "root.crt")

    @property
    def certificate(self) -> str:
        return os.path.join(self.folder, "instance.pem")

    def _need_entered(self) -> asyncio.Event:
        if self._leaving is None:
            raise RuntimeError("LocalVast lives in its block: async with LocalVast() as vast")
        return self._leaving

    @property
    def url(self) -> str:
        self._need_entered()
        return f"http://127.0.0.1:{self._port}"

    def client(self, **options: Any) -> Serverless:
        """A client of the SDK that talks to this Vast only; the options are its own."""
        options = {"api_key": self.api_key, "autoscaler_url": self.url, "webserver_url": self.url, **options}
        return LocalClient(authority=self.authority if self.tls else None, **options)

    def sign(self, url: str) -> str:
        """The router's signature over a worker's URL."""
        message = json.dumps({"url": url}, indent=4, sort_keys=True)  # as the framework's __check_signature does
        return base64.b64encode(pkcs1_15.new(self._key).sign(SHA256.new(message.encode()))).decode()

    def auth_data(self, worker: LocalWorker, cost: float = 100, request_idx: int | None = None) -> dict[str, Any]:
        """The router's answer that sends a request to `worker`."""
        if request_idx is None:
            self.last_request = request_idx = self.last_request + 1
        worker.routed += 1
        answer = {"__request_id": str(uuid.uuid4()), "cost": cost, "endpoint": self.endpoint_name}
        answer |= {"reqnum": worker.routed, "request_idx": request_idx}
        return {**answer, "signature": self.sign(worker.url), "url": worker.url}

    def start_worker(self, environment: dict[str, str] | None = None, script: str = WORKER) -> LocalWorker:
        """Start one more worker process, whatever the load. It is ready when its `state` is IDLE."""
        self._need_entered()
        held = [hold_port() for _ in range(3)]
        port, http_port, control_port = (each.getsockname()[1] for each in held)
        if self.control_port and not any(self.control_port in worker.ports for worker in self.workers.values()):
            with contextlib.suppress(OSError):
                held.append(hold_port(self.control_port))
                control_port = self.control_port
        if sys.platform != "linux":  # where a server can't listen beside these
            _close(held)
        self.started += 1
        folder = os.path.join(self.folder, str(self.started))
        os.mkdir(folder)
        scheme = "https" if self.tls else "http"
        worker = LocalWorker(self.started, port, http_port, control_port, folder, scheme, held)
        self.workers[worker.number] = worker
        starting = asyncio.create_task(self._start(worker, environment or {}, script))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        return worker

    async def _start(self, worker: LocalWorker, environment: dict[str, str], script: str) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if name not in OF_THE_INSTANCE},
            "CONTAINER_ID": str(worker.number),
            "REPORT_ADDR": self.url,
            "MASTER_TOKEN": self._master_token,
            "PUBLIC_IPADDR": "127.0.0.1",
            "WORKER_PORT": str(worker.port),
            f"VAST_TCP_PORT_{worker.port}": str(worker.port),
            "WORKER_HTTP_PORT": str(worker.http_port),
            "NULL_CONTROL_PORT": str(worker.control_port),
            **({"USE_SSL": "true"} if self.tls else {}),
            **self.environment,
            **environment,
        }
        leaving = self._need_entered()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(leaving.wait(), self.start_delay)
        if leaving.is_set():
            return
        output = os.open(worker.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        program = (sys.executable, os.path.abspath(__file__), str(os.getpid()), script, self.certificate)
        try:
            worker.process = await asyncio.create_subprocess_exec(
                *program,
                cwd=worker.folder,  # the framework keeps a file in the working directory
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for the client alone
            )
            self.on_event(f"worker {worker.number} on {worker.url}, control {worker.control_url}")
        except OSError as error:
            self._gone(worker, f"can't be started: {error}")
        finally:
            os.close(output)

    def _gone(self, worker: LocalWorker, why: str) -> None:
        del self.workers[worker.number]
        _close(worker.held)
        self._failures = 0 if worker.was_ready else self._failures + 1
        self.on_event(f"worker {worker.number} {why}")

    async def _serve(self, port: int) -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/v0/endptjobs/", self._endpoints),
                web.get("/api/v0/endptjobs/1/", self._endpoints),
                web.post("/route/", self._route),
                web.post("/get_endpoint_workers/", self._list_workers),
                web.get("/pubkey/", self._public_key),
                web.post("/worker_status/", self._worker_status),
                web.post("/delete_requests/", self._delete_requests),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner, runner.addresses[0][1]

    async def _endpoints(self, request: web.Request) -> web.Response:
        if request.query.get("api_key") != self.api_key:
            return web.json_response({"error": "invalid API key"}, status=401)
        endpoint = {"id": 1, "endpoint_name": self.endpoint_name, "api_key": self.api_key, "user_id": 1}
        endpoint |= {"created_at": 0.0, "auto_delete_in_seconds": None}
        return web.json_response({"success": True, "results": [endpoint], "result": endpoint})  # the list, or the one

    async def _list_workers(self, _request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "id": worker.number,
                    "status": worker.state,
                    "cur_load": worker.report.get("cur_load", 0.0),
                    "new_load": worker.report.get("new_load", 0.0),
                    "perf": worker.report.get("max_perf", 0.0),
                    "reqs_working": worker.report.get("num_requests_working", 0),
                    "started_at": worker.started_at,
                }
                for worker in self.workers.values()
            ]
        )

    async def _public_key(self, _request: web.Request) -> web.Response:
        if not self.publish_key:
            raise web.HTTPNotFound
        return web.Response(text=self._key.public_key().export_key().decode())

    async def _route(self, request: web.Request) -> web.Response:
        self.polls += 1
        if self.failing_polls:
            return web.json_response(["out of order"], status=self.failing_polls.pop(0))
        query = await request.json()
        if query["api_key"] != self.api_key:
            return web.json_response({"error": "invalid API key"}, status=401)
        if query["endpoint"] != self.endpoint_name:
            return web.json_response({"error": f"no endpoint {query['endpoint']!r}"}, status=404)
        if self._failures >= GIVE_UP:
            return web.json_response({"error": f"{GIVE_UP} workers in a row failed to start"}, status=409)
        now, request_idx = time.monotonic(), query.get("request_idx")
        if not request_idx:
            self.last_request = request_idx = self.last_request + 1
        self.waiting[request_idx] = now + query.get("replay_timeout", 60.0)
        for other, forgotten_at in list(self.waiting.items()):
            if now > forgotten_at:
                del self.waiting[other]
        ready = [worker for worker in self.workers.values() if worker.state == "IDLE"]
        free = [worker for worker in ready if worker.free]
        self._polled[request_idx] = now
        before = itertools.takewhile(lambda other: other != request_idx, self.waiting)
        place = sum(now - self._polled[other] < ATTENTIVE for other in before)
        if place < len(free) or (self.overbooked and ready):
            worker = (free or ready)[0]
            worker.promised_to, worker.promised_until = request_idx, now + PROMISE
            del self.waiting[request_idx]
            return web.json_response(self.auth_data(worker, query["cost"], request_idx))
        coming = sum(worker.state == "MODEL_LOADING" for worker in self.workers.values())
        if place >= len(free) + coming and len(self.workers) < self.max_workers:
            self.start_worker()
        states = Counter(worker.state for worker in self.workers.values())
        answer = {"endpoint": self.endpoint_name, "status": ", ".join(f"{n} {state}" for state, n in states.items())}
        return web.json_response(answer if self.forgetful else {**answer, "request_idx": request_idx})

    async def _worker_status(self, request: web.Request) -> web.Response:
        report = await request.json()
        worker = self.workers.get(report["id"])
        if worker is None or report["mtoken"] != self._master_token:
            return web.json_response({"error": "unknown worker"}, status=403)
        self.reports.append({**report, "received": time.monotonic()})
        if not worker.was_ready and report["max_perf"] and not report["error_msg"]:
            worker.was_ready, self._failures = True, 0
            self.on_event(f"worker {worker.number} ready")
        if report["error_msg"] and not worker.report.get("error_msg"):
            self.on_event(f"worker {worker.number} reported an error: {report['error_msg']}")
        worker.report = report
        await asyncio.sleep(self.report_delay)
        if worker.promised_to in report["working_request_idxs"]:
            worker.promised_to = None
        return web.json_response({})

    async def _delete_requests(self, request: web.Request) -> web.Response:
        message = await request.json()
        worker = self.workers.get(message["worker_id"])
        if worker is None or message["mtoken"] != self._master_token:
            return web.json_response({"error": "unknown worker"}, status=403)
        for ended in message["requests"]:
            self.ended.append({"worker_id": worker.number, **ended})
            if ended["request_idx"] == worker.promised_to:
                worker.promised_to = None
        return web.json_response({})

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            for worker in list(self.workers.values()):
                if worker.process is None:
                    continue
                if not worker.free:
                    worker.idle_since = time.monotonic()
                idle = worker.free and time.monotonic() - worker.idle_since > self.inactivity_timeout
                if (status := worker.process.returncode) is not None:
                    self._gone(worker, f"ended, status {status}: {_last_line(worker.log)}")
                elif (idle or worker.state == "ERROR") and not worker.stopping:
                    self.on_event(f"worker {worker.number} stopping: {'idle' if idle else 'it reported an error'}")
                    worker.stopping = True
                    _signal(worker.process, signal.SIGTERM)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _last_line(path: Path) -> str:
    return (path.read_text(errors="replace").splitlines() or ["no output"])[-1]


def hold_port(port: int = 0) -> socket.socket:
    """A socket on a port of the loopback interface, one from the system if it isn't named. Raises OSError.

    While it is open the system gives the port to nobody, and whoever connects to it is refused. On Linux a server may
    listen on it all the same.
    """
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", port))
    except OSError:
        held.close()
        raise
    return held


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _sweep_folders() -> None:
    """Remove the folders of LocalVasts whose process was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        with contextlib.suppress(ValueError, OverflowError, PermissionError):
            try:
                os.kill(int(folder.name.removeprefix(PREFIX).partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


def run_tied_to_parent(parent: int, script: str, certificate: str) -> None:
    """Run a script as the main program, in this process, and kill the process once its parent has gone.

    `certificate` is a file that stands in for the one that Vast puts on every instance.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    load = ssl.SSLContext.load_cert_chain

    def load_cert_chain(
        context: ssl.SSLContext, certfile: str, keyfile: str | None = None, password: Any = None
    ) -> None:
        if certfile == INSTANCE_CERTIFICATE:
            certfile, keyfile = certificate, None
        load(context, certfile, keyfile, password)

    ssl.SSLContext.load_cert_chain = load_cert_chain  # type: ignore[method-assign, assignment]
    threading.Thread(target=watch, daemon=True).start()
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) != 4 or not os.path.isfile(sys.argv[2]):
        sys.exit("null_local: LocalVast starts its workers with this; to try it: python null_client.py --local")
    run_tied_to_parent(int(sys.argv[1]), sys.argv[2], sys.argv[3])
