"""A stand-in for Vast on this machine: it starts real null workers on demand, and stops the idle ones.

Real are the SDK's client, the framework, the worker processes, HTTP, the RSA signatures that the workers verify and
the metrics that they report. Stood in for are the web API's endpoint list, the router, the key server, the report
address, and the scaling: route to a free worker; where there is none, start one; stop one that has been idle.

    async with LocalVast(max_workers=3, inactivity_timeout=10) as vast:
        async with vast.client() as client:
            endpoint = await client.get_endpoint(vast.endpoint_name)
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import runpy
import secrets
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web
from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15
from vastai import Serverless

OF_THE_INSTANCE = ("UNSECURED", "USE_SSL")  # not to be inherited by a worker: here every signature is verified
WORKER = str(Path(__file__).with_name("null_worker.py"))
TICK = 0.1  # seconds between two looks at the processes
POLL_FORGOTTEN = 15.0  # seconds after which a request that is not polled for has lost its place
PROMISE = 5.0  # seconds in which a routed request has to show up on its worker
STOP_GRACE = 9.0  # seconds from SIGTERM to SIGKILL; the worker's drain takes 8 at most
GIVE_UP = 3  # workers in a row that ended before they were ready

log = logging.getLogger("null_local")


class LocalClient(Serverless):
    """The SDK's client, without the download of Vast's root certificate."""

    async def get_ssl_context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return self._ssl_context


@dataclass(eq=False)
class LocalWorker:
    """One worker process, and what it last reported."""

    number: int
    port: int
    http_port: int
    control_port: int
    folder: str
    started_at: float = field(default_factory=time.time)
    process: asyncio.subprocess.Process | None = None
    report: dict = field(default_factory=dict)
    promised_to: int | None = None  # the request index that was last routed here and has not been seen yet
    promised_until: float = 0.0
    stopping: bool = False
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.port, self.http_port, self.control_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def control_url(self) -> str:
        return f"http://127.0.0.1:{self.control_port}"

    @property
    def state(self) -> str:
        if self.stopping:
            return "stopping"
        if self.report.get("error_msg"):
            return "error"
        return "ready" if self.report.get("max_perf") else "loading"

    @property
    def free(self) -> bool:
        promised = self.promised_to is not None and time.monotonic() < self.promised_until
        return self.state == "ready" and not self.report["cur_load"] and not promised

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
        on_event: Callable[[str], None] = log.info,
    ) -> None:
        """`inactivity_timeout` is in seconds. The first worker gets `control_port` where it is free, the others, and
        with None it too, one from the system. `on_event` is told in one line what happens to the workers."""
        self.max_workers, self.inactivity_timeout = max_workers, inactivity_timeout
        self.environment, self.control_port, self.on_event = environment or {}, control_port, on_event
        self.start_delay = 0.0  # seconds before a worker's process starts
        self.failing_polls: list[int] = []  # statuses with which the next polls are answered
        self.report_delay = 0.0  # seconds until a worker's report is acknowledged
        self.overbooked = False  # route to occupied workers, as Vast does with a long max_queue_time
        self.publish_key = True  # False: the key server answers 404
        self.workers: dict[int, LocalWorker] = {}
        self.reports: list[dict] = []  # each worker_status, and when it was received (time.monotonic())
        self.ended: list[dict] = []  # each request that a worker said has ended
        self.polls = 0
        self.api_key, self._master_token = secrets.token_hex(16), secrets.token_hex(16)
        self._key = RSA.generate(2048)
        self._waiting: dict[int, float] = {}  # request index to when it was last polled for, first come first
        self._last_request = self._last_worker = self._failures = 0
        self._starting: set[asyncio.Task[None]] = set()

    async def __aenter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="null-local-", ignore_cleanup_errors=True)
        self._runner, self._port = await self._serve(0)
        self._scaling = asyncio.create_task(self._scale())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._scaling, *self._starting):
            task.cancel()
        processes = [worker.process for worker in self.workers.values() if worker.process is not None]
        try:
            for process in processes:
                _signal(process, signal.SIGTERM)
            if processes:
                await asyncio.wait([asyncio.ensure_future(process.wait()) for process in processes], timeout=STOP_GRACE)
        finally:
            for process in processes:
                _signal(process, signal.SIGKILL)
            await asyncio.gather(*(process.wait() for process in processes))
            await self._runner.cleanup()
            self._folder.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def client(self, **options: object) -> Serverless:
        """A client of the SDK that talks to this Vast only; the options are its own."""
        options = {"api_key": self.api_key, "autoscaler_url": self.url, "webserver_url": self.url, **options}
        return LocalClient(**options)

    def sign(self, url: str) -> str:
        """The router's signature over a worker's URL."""
        message = json.dumps({"url": url}, indent=4, sort_keys=True)  # as the framework's __check_signature does
        return base64.b64encode(pkcs1_15.new(self._key).sign(SHA256.new(message.encode()))).decode()

    def auth_data(self, worker: LocalWorker, cost: float = 100, request_idx: int | None = None) -> dict:
        """The router's answer that sends a request to `worker`."""
        if request_idx is None:
            self._last_request = request_idx = self._last_request + 1
        answer = {"cost": cost, "endpoint": self.endpoint_name, "reqnum": request_idx, "request_idx": request_idx}
        return {**answer, "signature": self.sign(worker.url), "url": worker.url}

    def start_worker(self, environment: dict[str, str] | None = None, script: str = WORKER) -> LocalWorker:
        """Start one more worker process, whatever the load. It is ready when its `state` says so."""
        taken = {port for worker in self.workers.values() for port in worker.ports}
        ports = _free_ports(3, taken)
        if self.control_port and self.control_port not in taken and _is_free(self.control_port):
            ports[-1] = self.control_port
        self._last_worker += 1
        folder = os.path.join(self._folder.name, str(self._last_worker))
        os.mkdir(folder)
        worker = self.workers[self._last_worker] = LocalWorker(self._last_worker, *ports, folder)
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
            **self.environment,
            **environment,
        }
        await asyncio.sleep(self.start_delay)
        output = os.open(worker.log, os.O_WRONLY | os.O_CREAT)
        try:
            worker.process = await asyncio.create_subprocess_exec(
                *(sys.executable, os.path.abspath(__file__), script),
                cwd=worker.folder,  # the framework keeps a file in the working directory
                env=environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for the client alone
            )
        finally:
            os.close(output)
        self.on_event(f"worker {worker.number} on {worker.url}, control {worker.control_url}")

    async def absent(self, seconds: float) -> None:
        """Be gone from the network for so long, then back."""
        await self._runner.cleanup()
        await asyncio.sleep(seconds)
        self._runner, _ = await self._serve(self._port)

    async def _serve(self, port: int) -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/v0/endptjobs/", self._endpoints),
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
        return web.json_response({"success": True, "results": [endpoint]})

    async def _list_workers(self, _request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "id": worker.number,
                    "status": worker.state,
                    "cur_load": worker.report.get("cur_load", 0.0),
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
        now = time.monotonic()
        request_idx = query["request_idx"]
        if not request_idx:
            self._last_request = request_idx = self._last_request + 1
        self._waiting[request_idx] = now
        for other, polled in list(self._waiting.items()):
            if now - polled > POLL_FORGOTTEN:
                del self._waiting[other]
        ready = [worker for worker in self.workers.values() if worker.state == "ready"]
        free = [worker for worker in ready if worker.free]
        place = list(self._waiting).index(request_idx)
        if place < len(free) or (self.overbooked and ready):
            worker = (free or ready)[0]
            worker.promised_to, worker.promised_until = request_idx, now + PROMISE
            del self._waiting[request_idx]
            return web.json_response(self.auth_data(worker, query["cost"], request_idx))
        coming = sum(worker.state == "loading" for worker in self.workers.values())
        if place >= len(free) + coming and len(self.workers) < self.max_workers:
            self.start_worker()
        return web.json_response({"request_idx": request_idx, "status": "no worker is free"})

    async def _worker_status(self, request: web.Request) -> web.Response:
        report = await request.json()
        worker = self.workers.get(report["id"])
        if worker is None or report["mtoken"] != self._master_token:
            return web.json_response({"error": "unknown worker"}, status=403)
        self.reports.append({**report, "received": time.monotonic()})
        if worker.state == "loading" and report["max_perf"]:
            self._failures = 0
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
                idle = time.monotonic() - worker.idle_since > self.inactivity_timeout
                if (status := worker.process.returncode) is not None:
                    del self.workers[worker.number]
                    self._failures += worker.state == "loading"
                    self.on_event(f"worker {worker.number} ended, status {status}: {_last_line(worker.log)}")
                elif idle or worker.state == "error":
                    self.on_event(f"worker {worker.number} stopping: {'idle' if idle else 'it reported an error'}")
                    worker.stopping = True
                    _signal(worker.process, signal.SIGTERM)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _last_line(path: Path) -> str:
    return (path.read_text(errors="replace").splitlines() or ["no output"])[-1]


def _free_ports(count: int, taken: set[int]) -> list[int]:
    """Ports from the system that nobody else has been given here."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            if held.getsockname()[1] not in taken:
                ports.append(held.getsockname()[1])
        return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def run_tied_to_parent(script: str) -> None:
    """Run a script as the main program, in this process, and kill the process once its parent has gone.

    The parent holds the other end of standard input, which closes however the parent ends, by SIGKILL too.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.path.isfile(sys.argv[1]):
        sys.exit("null_local: LocalVast starts its workers with this; to try it: python null_client.py --local")
    run_tied_to_parent(sys.argv[1])
