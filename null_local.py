"""A stand-in for Vast on this machine: it starts real null workers on demand, and stops idle ones.

Real are the SDK's client, the framework, the worker processes with their consumers, HTTP, the RSA
signatures that the workers verify, and the metrics that they report. Stood in for are the web
API's endpoint list, the router, the key server, the report address, and the scaling: route to a
free worker; where there is none, start one; stop one that has been idle.

    async with LocalVast(max_workers=3, inactivity_timeout=10) as vast:
        async with vast.client() as client:
            endpoint = await client.get_endpoint(vast.endpoint_name)

It may run for days: it keeps no record without end.

The parts, in this order: the client; one worker; the endpoint, which the others share; the
temporary folder; the scaling rule; the processes and their ports; the router's answers; and
LocalVast, which puts them together.
"""

import os
import sys

if __name__ == "__main__":
    # A queue.py beside this file, say, must not be taken for the standard library's.
    here = [os.path.dirname(path(__file__)) for path in (os.path.abspath, os.path.realpath)]
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) not in here] + here

import asyncio
import base64
import contextlib
import fcntl
import functools
import json
import logging
import re
import runpy
import secrets
import shutil
import signal
import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15
from vastai import Serverless  # type: ignore[import-untyped]

WORKER = str(Path(__file__).with_name("null_worker.py"))

# What a worker here doesn't get of the caller's environment: it describes some other instance.
OF_ANOTHER_INSTANCE = ("UNSECURED", "USE_SSL", "BACKEND_HEALTH_URL", "BACKEND_START_TIMEOUT")
# What it does get of the variables of this project. The others are for one worker, or one run.
OF_ANY_CONSUMER = (
    "NULL_CONSUMER",
    "NULL_GRACE",
    "NULL_EMPTY",
    "NULL_RESIDENT",
    "NULL_BROKEN_AFTER",
    "NULL_STOP_SIGNAL",
)

TICK = 0.1  # seconds between two looks at the processes
ATTENTIVE = 10.0  # seconds without a poll, after which a place is kept, but holds up no free worker
PROMISE = 5.0  # seconds in which a routed request has to show up on its worker
STOP_GRACE = 9.0  # seconds from SIGTERM to SIGKILL; the worker's drain takes 8 at most
TAIL = 1 << 16  # bytes of a file that are read at once
LARGEST_FILE = 64 << 20  # bytes of a file, above which it is emptied
LONGEST_LINE = 1000  # characters of a line that is quoted
QUOTED = 5  # last lines of what a consumer wrote that failed
KEPT = 20  # folders of workers whose consumer failed, at most; the oldest goes first
GIVE_UP = 3  # workers in a row that ended before they were ready
GIVEN_UP_FOR = 20.0  # seconds after the last of them, then another is tried: a disk was full, say
PREFIX = "null-vast-"  # of the folder in the temporary directory
KEPT_PREFIX = "null-consumers-"  # of the folder there that outlives this process

FAILED = re.compile("null_consumer: (COMMAND|the consumer) failed: ")

log = logging.getLogger("null_local")

_signing_key = functools.cache(RSA.generate)  # one for all in this process: it takes a moment


class LocalClient(Serverless):  # type: ignore[misc]  # the SDK has no types
    """The SDK's client, which would download Vast's root certificate."""

    async def get_ssl_context(self) -> ssl.SSLContext:
        """Trust nobody: everything here is plain HTTP."""
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def lines_of(text: bytes) -> list[str]:
    """The lines of a text, without empty ones, as they can be shown anywhere."""
    lines = []
    for line in text.decode(errors="replace").expandtabs().splitlines():
        if line.strip():
            # no escape sequence of a program's gets to the terminal
            printable = "".join(letter if letter.isprintable() else "?" for letter in line)
            lines.append(printable[:LONGEST_LINE])
    return lines


class GrowingFile:
    """A file that others write to, and may remove."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0  # bytes that were given out

    def new_lines(self) -> list[str]:
        """The complete lines that were written since the last call, of at most `TAIL` bytes."""
        text = self._read_from(self._read, TAIL)
        complete = text.rfind(b"\n") + 1
        if not complete and len(text) == TAIL:
            complete = TAIL  # a line without an end
        self._read += complete
        return lines_of(text[:complete])

    def last_lines(self, most: int) -> list[str]:
        """The last lines of those that no call has given out, as far as `TAIL` bytes go."""
        size = self._size()
        text = self._read_from(max(self._read, size - TAIL), TAIL)
        self._read = size
        return lines_of(text)[-most:]

    def keep_small(self) -> None:
        """Empty it where it has grown large. Whoever appends to it goes on at its new end."""
        if self._size() > LARGEST_FILE:
            with contextlib.suppress(OSError):
                os.truncate(self.path, 0)
            self._read = 0

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def _read_from(self, position: int, most: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(position)
                return file.read(most)
        except OSError:
            return b""


class ConsumerNews:
    """What a worker's consumer says, and what it wrote when it has failed."""

    def __init__(self, log: Path, output: Path) -> None:
        self._log = GrowingFile(log)
        self._output = GrowingFile(output)
        self.has_failed = False

    def latest(self) -> list[str]:
        """What came since the last call, a line each."""
        news = []
        for line in self._log.new_lines():
            if line.startswith("null_consumer:"):
                news.append(f": {line}")
            if FAILED.match(line):
                self.has_failed = True
                news += [f" wrote: {wrote}" for wrote in self._output.last_lines(QUOTED)]
        self._log.keep_small()
        self._output.keep_small()
        return news


@dataclass(eq=False)
class LocalWorker:
    """One worker process, and what it last reported."""

    number: int
    port: int
    http_port: int
    control_port: int
    folder: str
    url: str
    held: list[socket.socket]  # its ports, so that the system gives them to nobody else
    started_at: float = field(default_factory=time.time)
    process: asyncio.subprocess.Process | None = None
    report: dict[str, Any] = field(default_factory=dict)
    routed: int = 0  # requests that were sent here
    promised_to: int | None = None  # the index of the request last routed here and not seen yet
    promised_until: float = 0.0
    was_ready: bool = False
    stopping: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    consumer: ConsumerNews | None = None

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.port, self.http_port, self.control_port

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
        if self.report.get("max_perf"):
            return "IDLE"
        return "MODEL_LOADING"

    @property
    def free(self) -> bool:
        """Whether a request that is routed here would find it without a reservation."""
        if self.state != "IDLE" or self.report["cur_load"]:
            return False
        return self.promised_to is None or time.monotonic() >= self.promised_until

    @property
    def log(self) -> Path:
        """What the process writes to standard output and error."""
        return Path(self.folder, "log")

    @property
    def output(self) -> Path:
        """What its consumer's COMMAND writes to standard output and error."""
        return Path(self.folder, "output")

    def last_line(self) -> str:
        """The last line of its log."""
        lines = GrowingFile(self.log).last_lines(1)
        if not lines:
            return "no output"
        return lines[0]

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it has a process that can take one."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def of_the_caller(environment: Mapping[str, str]) -> dict[str, str]:
    """What workers here get of the environment of whoever called."""
    passed = {}
    for name, value in environment.items():
        if name in OF_ANOTHER_INSTANCE:
            continue
        if name.startswith("NULL_") and name not in OF_ANY_CONSUMER:
            continue
        passed[name] = value
    return passed


def callers_place(environment: Mapping[str, str], output: Path) -> str:
    """Where null_consumer.py is to run COMMAND: as if the caller had typed it, see its NULL_PLACE.

    What COMMAND writes goes to the end of `output`. Raises OSError.
    """
    names = ("PATH", "VIRTUAL_ENV")  # without which the worker starts null_consumer.py
    place = {
        "folder": os.getcwd(),
        "environment": {name: environment[name] for name in names if name in environment},
        "output": str(output),
    }
    return json.dumps(place)


class LocalEndpoint:
    """The one endpoint: its limits, keys and workers, and who waits for one.

    The parts below share it.
    """

    endpoint_name = "local"

    def __init__(
        self,
        max_workers: int,
        inactivity_timeout: float,
        on_event: Callable[[str], object],
    ) -> None:
        self.max_workers = max_workers
        self.inactivity_timeout = inactivity_timeout
        self.on_event = on_event

        self.api_key = secrets.token_hex(16)  # the account's, for the web API
        self.endpoint_key = secrets.token_hex(16)  # the endpoint's own, for the router
        self.master_token = secrets.token_hex(16)  # by which workers' reports are known
        self.signing_key = _signing_key(1024)  # short: nothing is protected by it but a stand-in

        self.workers: dict[int, LocalWorker] = {}
        self.waiting: dict[int, float] = {}  # request index to when its place is lost, in order
        self.polled_at: dict[int, float] = {}  # request index to when it was last asked for
        self.started = 0  # workers in all
        self.last_request = 0  # the highest request index
        self.failed_starts = 0  # since a worker was last ready
        self.last_failure = ""  # why the latest of them failed
        self.given_up_until = 0.0

    def tell(self, text: str) -> None:
        """Tell `on_event`. One that raises is not to end the scaling."""
        try:
            self.on_event(text)
        except Exception:
            log.exception("on_event raised")

    def sign(self, url: str) -> str:
        """The router's signature over a worker's URL."""
        # exactly as the framework's __check_signature puts it together
        message = json.dumps({"url": url}, indent=4, sort_keys=True)
        signature = pkcs1_15.new(self.signing_key).sign(SHA256.new(message.encode()))
        return base64.b64encode(signature).decode()

    def next_request(self) -> int:
        """A request index that nobody had."""
        self.last_request += 1
        return self.last_request

    def auth_data(
        self, worker: LocalWorker, cost: float = 100, request_idx: int | None = None
    ) -> dict[str, Any]:
        """The router's answer that sends a request to `worker`."""
        if request_idx is None:
            request_idx = self.next_request()
        worker.routed += 1
        return {
            "__request_id": str(uuid.uuid4()),
            "cost": cost,
            "endpoint": self.endpoint_name,
            "reqnum": worker.routed,
            "request_idx": request_idx,
            "signature": self.sign(worker.url),
            "url": worker.url,
        }


class Folder:
    """A folder in the temporary directory that is locked while it lives.

    The lock tells others that it is in use. The number of a process would not: that of one in
    another container with the same temporary directory looks dead.
    """

    def __init__(self) -> None:
        self.path = ""
        self._locked: int | None = None  # the folder's descriptor

    def __enter__(self) -> "Folder":
        self._sweep()
        while self._locked is None:
            self.path = os.path.abspath(tempfile.mkdtemp(prefix=PREFIX))
            self._lock()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def keep(self) -> bool:
        """Make it anew where somebody has removed it; whether that was needed. Raises OSError."""
        if self._locked is not None and os.path.isdir(self.path):
            return False
        self._unlock()
        while self._locked is None:
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._lock()
        return True

    def _lock(self) -> None:
        """Lock it, unless another has just found it without a lock, and swept it."""
        try:
            self._locked = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        fcntl.flock(self._locked, fcntl.LOCK_EX)
        if not os.path.isdir(self.path):
            self._unlock()

    def _unlock(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    @staticmethod
    def _sweep() -> None:
        """Remove those whose process was killed."""
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # not ours to open, or in use
                left = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(left)


def place_of(
    request_idx: int, waiting: Iterable[int], polled_at: Mapping[int, float], now: float
) -> int:
    """How many come before this request; only those that were asked for lately count."""
    place = 0
    for other in waiting:
        if other == request_idx:
            break
        if now - polled_at[other] < ATTENTIVE:
            place += 1
    return place


def worker_for(place: int, workers: Iterable[LocalWorker]) -> LocalWorker | None:
    """The worker for a request with so many before it, or None: it has to wait."""
    free = [worker for worker in workers if worker.free]
    if place < len(free):
        return free[0]
    return None


def another_is_needed(place: int, workers: Iterable[LocalWorker], max_workers: int) -> bool:
    """Whether a request with so many before it calls for one worker more."""
    workers = list(workers)
    free = sum(worker.free for worker in workers)
    loading = sum(worker.state == "MODEL_LOADING" for worker in workers)
    return place >= free + loading and len(workers) < max_workers


def why_to_stop(worker: LocalWorker, inactivity_timeout: float, now: float) -> str | None:
    """Why a worker is to be stopped now, or None: it stays."""
    if worker.state == "ERROR":
        return "it reported an error"
    if worker.free and now - worker.idle_since > inactivity_timeout:
        return "idle"
    return None


def hold_port(port: int = 0) -> socket.socket:
    """A socket on a port of the loopback interface, one from the system if it isn't named.

    While it is open the system gives the port to nobody, and whoever connects to it is refused.
    On Linux a server may listen on it all the same. Raises OSError.
    """
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", port))
    except OSError:
        held.close()
        raise
    return held


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close each of them."""
    for each in sockets:
        each.close()


def hold_alone(port: int) -> list[socket.socket]:
    """Sockets that hold this port for one LocalVast of the machine. Raises OSError.

    One alone doesn't on Linux: two may hold a port, as long as nobody listens on it.
    """
    held = [hold_port(port)]
    if sys.platform == "linux":
        claim = socket.socket(socket.AF_UNIX)
        held.append(claim)
        try:
            claim.bind(f"\0null_local port {port}")  # in the abstract: it leaves no file
        except OSError:
            close_all(held)
            raise
    return held


class Instances:
    """The worker processes of one endpoint, in one folder."""

    def __init__(
        self,
        endpoint: LocalEndpoint,
        folder: Folder,
        report_address: str,
        environment: dict[str, str],
        control_port: int | None,
    ) -> None:
        self._endpoint = endpoint
        self._folder = folder
        self._report_address = report_address
        self._environment = environment
        self._control_port = control_port
        self._starting: set[asyncio.Task[None]] = set()
        self.leaving = asyncio.Event()
        self._kept_in = ""  # made for the first folder that is kept
        self._kept: deque[str] = deque()  # folders, the oldest first

    def start(self, environment: dict[str, str], script: str) -> LocalWorker:
        """Start one, with this environment besides; its process may come later, or never."""
        endpoint = self._endpoint
        held, ports = self._hold_ports()
        endpoint.started += 1
        worker = LocalWorker(
            number=endpoint.started,
            port=ports[0],
            http_port=ports[1],
            control_port=ports[2],
            folder=os.path.join(self._folder.path, str(endpoint.started)),
            url=f"http://127.0.0.1:{ports[0]}",
            held=held,
        )
        endpoint.workers[worker.number] = worker
        starting = asyncio.create_task(self.start_process(worker, environment, script))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        return worker

    def _hold_ports(self) -> tuple[list[socket.socket], list[int]]:
        """Sockets that hold three ports, and these: the worker's, the HTTP-only, the control."""
        held = [hold_port() for _ in range(3)]
        ports = [each.getsockname()[1] for each in held]
        taken = {port for worker in self._endpoint.workers.values() for port in worker.ports}
        if self._control_port and self._control_port not in taken:
            with contextlib.suppress(OSError):
                held += hold_alone(self._control_port)
                ports[2] = self._control_port
        if sys.platform != "linux":  # where a server can't listen beside these
            close_all(held)
        return held, ports

    async def start_process(
        self, worker: LocalWorker, environment: dict[str, str], script: str
    ) -> None:
        """Start its process, unless all are being ended, and tell what came of it."""
        if self.leaving.is_set():
            return
        try:
            worker.process = await self.run(worker, environment, script)
        except (OSError, ValueError) as error:  # ValueError: a NUL in its environment
            self._forget(worker, f"can't be started: {error}")
            return
        self._endpoint.tell(f"worker {worker.number} on {worker.url}, control {worker.control_url}")
        if worker.consumer is not None:
            self._endpoint.tell(f"worker {worker.number}: its consumer writes to {worker.output}")

    async def run(
        self, worker: LocalWorker, environment: dict[str, str], script: str
    ) -> asyncio.subprocess.Process:
        """Start its process. Raises OSError."""
        self.keep_folder()
        os.makedirs(worker.folder, exist_ok=True)
        program = (sys.executable, os.path.abspath(__file__), str(os.getpid()), script)
        environment = self._environment_of(worker, environment)
        if environment.get("NULL_CONSUMER"):
            worker.consumer = ConsumerNews(worker.log, worker.output)
        output = os.open(worker.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            return await asyncio.create_subprocess_exec(
                *program,
                cwd=worker.folder,  # the framework keeps a file in the working directory
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for the client alone
            )
        finally:
            os.close(output)

    def _environment_of(self, worker: LocalWorker, besides: dict[str, str]) -> dict[str, str]:
        """What Vast would set on an instance, on top of the caller's own environment."""
        environment = of_the_caller(os.environ)
        environment |= {
            "CONTAINER_ID": str(worker.number),
            "REPORT_ADDR": self._report_address,
            "MASTER_TOKEN": self._endpoint.master_token,
            "PUBLIC_IPADDR": "127.0.0.1",
            "WORKER_PORT": str(worker.port),
            f"VAST_TCP_PORT_{worker.port}": str(worker.port),
            "WORKER_HTTP_PORT": str(worker.http_port),
            "NULL_CONTROL_PORT": str(worker.control_port),
        }
        environment |= self._environment
        environment |= besides
        if environment.get("NULL_CONSUMER"):
            environment["NULL_PLACE"] = callers_place(environment, worker.output)
        return environment

    def keep_folder(self) -> None:
        """Make the folder anew if somebody has removed it: starts need it, and consumers' output.

        Raises OSError.
        """
        if self._folder.keep():
            for worker in self._endpoint.workers.values():
                os.makedirs(worker.folder, exist_ok=True)

    def tell_news(self, worker: LocalWorker) -> None:
        """Tell what its consumer said since the last call."""
        if worker.consumer is not None:
            for news in worker.consumer.latest():
                self._endpoint.tell(f"worker {worker.number}{news}")

    def bury(self, worker: LocalWorker) -> bool:
        """Tell the worker's news. Return whether its process has ended; it is then forgotten."""
        self.tell_news(worker)
        if worker.process is None or worker.process.returncode is None:
            return False
        status = worker.process.returncode
        if status == 0:
            self._forget(worker, "ended, status 0")
        else:
            self._forget(worker, f"ended, status {status}: {worker.last_line()}")
        return True

    def _forget(self, worker: LocalWorker, why: str) -> None:
        del self._endpoint.workers[worker.number]
        close_all(worker.held)
        if not worker.was_ready:
            self._endpoint.failed_starts += 1
            self._endpoint.last_failure = worker.report.get("error_msg") or why
            self._endpoint.given_up_until = time.monotonic() + GIVEN_UP_FOR
        self._endpoint.tell(f"worker {worker.number} {why}")
        self.clear_up(worker)

    def clear_up(self, worker: LocalWorker) -> None:
        """Remove the folder of a worker that has ended, or keep it where its consumer failed."""
        if worker.consumer is not None and worker.consumer.has_failed:
            with contextlib.suppress(OSError):
                self._keep(worker)
        shutil.rmtree(worker.folder, ignore_errors=True)

    def _keep(self, worker: LocalWorker) -> None:
        """Move the worker's folder to where it outlives this process. Raises OSError."""
        if not os.path.isdir(self._kept_in):
            self._kept_in = os.path.abspath(tempfile.mkdtemp(prefix=KEPT_PREFIX))
        kept = os.path.join(self._kept_in, str(worker.number))
        os.rename(worker.folder, kept)
        self._endpoint.tell(f"worker {worker.number}: what its consumer wrote is kept in {kept}")
        self._kept.append(kept)
        if len(self._kept) > KEPT:
            shutil.rmtree(self._kept.popleft(), ignore_errors=True)

    async def stop(self) -> None:
        """End all: by SIGTERM, and after `STOP_GRACE` by SIGKILL."""
        self.leaving.set()
        workers = self._endpoint.workers.values()
        try:
            if self._starting:
                await asyncio.wait(self._starting)
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            await self._wait_for_all(STOP_GRACE)
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGKILL)
            await self._wait_for_all(None)
            for worker in workers:
                close_all(worker.held)
                self.tell_news(worker)
                self.clear_up(worker)

    async def _wait_for_all(self, timeout: float | None) -> None:
        ends = [
            asyncio.ensure_future(worker.process.wait())
            for worker in self._endpoint.workers.values()
            if worker.process is not None
        ]
        if ends:
            await asyncio.wait(ends, timeout=timeout)


class Router:
    """What Vast's servers answer, to clients and to workers, all at one address."""

    def __init__(self, endpoint: LocalEndpoint, start_worker: Callable[[], object]) -> None:
        self._endpoint = endpoint
        self._start_worker = start_worker

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/v0/endptjobs/", self.endpoints),
            web.get("/api/v0/endptjobs/1/", self.endpoints),
            web.post("/route/", self.route),
            web.post("/get_endpoint_workers/", self.list_workers),
            web.get("/pubkey/", self.public_key),
            web.post("/worker_status/", self.worker_status),
            web.post("/delete_requests/", self.delete_requests),
        ]

    # To clients

    async def endpoints(self, request: web.Request) -> web.Response:
        """The web API: the list of endpoints, and the one by its id."""
        if key_of(request, request.query) != self._endpoint.api_key:
            return refusal(401, "invalid API key")
        endpoint = {
            "id": 1,
            "endpoint_name": self._endpoint.endpoint_name,
            "api_key": self._endpoint.endpoint_key,
            "user_id": 1,
            "created_at": 0.0,
            "auto_delete_in_seconds": None,
        }
        return web.json_response({"success": True, "results": [endpoint], "result": endpoint})

    async def list_workers(self, request: web.Request) -> web.Response:
        """The endpoint's workers."""
        keys = (self._endpoint.api_key, self._endpoint.endpoint_key)
        if key_of(request, await request.json()) not in keys:
            return refusal(401, "invalid API key")
        return web.json_response(self.listing())

    def listing(self) -> list[dict[str, Any]]:
        """What Vast's list of the endpoint's workers says."""
        return [
            {
                "id": worker.number,
                "status": worker.state,
                "cur_load": worker.report.get("cur_load", 0.0),
                "new_load": worker.report.get("new_load", 0.0),
                "perf": worker.report.get("max_perf", 0.0),
                "reqs_working": worker.report.get("num_requests_working", 0),
                "started_at": worker.started_at,
            }
            for worker in self._endpoint.workers.values()
        ]

    async def route(self, request: web.Request) -> web.Response:
        """One poll for a worker: the worker, or to wait."""
        endpoint = self._endpoint
        query = await request.json()
        if key_of(request, query) != endpoint.endpoint_key:
            return refusal(401, "invalid API key")
        if query["endpoint"] != endpoint.endpoint_name:
            return refusal(404, f"no endpoint {query['endpoint']!r}")
        given_up = endpoint.failed_starts >= GIVE_UP
        if given_up and time.monotonic() < endpoint.given_up_until:
            why = f"{GIVE_UP} workers in a row failed to start; the last one"
            return refusal(409, f"{why}: {endpoint.last_failure}")

        request_idx = query.get("request_idx") or endpoint.next_request()
        now = time.monotonic()
        self._keep_place(request_idx, now, query.get("replay_timeout", 60.0))
        place = place_of(request_idx, endpoint.waiting, endpoint.polled_at, now)
        worker = self.choose(place)
        if worker is not None:
            worker.promised_to = request_idx
            worker.promised_until = now + PROMISE
            self._give_up_place(request_idx)
            return web.json_response(endpoint.auth_data(worker, query["cost"], request_idx))
        if another_is_needed(place, endpoint.workers.values(), endpoint.max_workers):
            self._start_worker()
        return self._waiting_answer(request_idx)

    def choose(self, place: int) -> LocalWorker | None:
        """The worker for a request with so many before it, or None."""
        return worker_for(place, self._endpoint.workers.values())

    def _keep_place(self, request_idx: int, now: float, replay_timeout: float) -> None:
        """Keep this one's place from now on, and drop those that were not kept."""
        self._endpoint.waiting[request_idx] = now + replay_timeout
        self._endpoint.polled_at[request_idx] = now
        for other, lost_at in list(self._endpoint.waiting.items()):
            if now > lost_at:
                self._give_up_place(other)

    def _give_up_place(self, request_idx: int) -> None:
        del self._endpoint.waiting[request_idx]
        del self._endpoint.polled_at[request_idx]

    def _waiting_answer(self, request_idx: int) -> web.Response:
        states = Counter(worker.state for worker in self._endpoint.workers.values())
        answer = {
            "endpoint": self._endpoint.endpoint_name,
            "request_idx": request_idx,
            "status": ", ".join(f"{number} {state}" for state, number in states.items()),
        }
        return web.json_response(answer)

    # To workers

    async def public_key(self, _request: web.Request) -> web.Response:
        """The key server: by what the workers verify the router's signature."""
        return web.Response(text=self._endpoint.signing_key.public_key().export_key().decode())

    async def worker_status(self, request: web.Request) -> web.Response:
        """A worker's report."""
        endpoint = self._endpoint
        report = await request.json()
        worker = endpoint.workers.get(report["id"])
        if worker is None or report["mtoken"] != endpoint.master_token:
            return refusal(403, "unknown worker")
        if not worker.was_ready and report["max_perf"] and not report["error_msg"]:
            worker.was_ready = True
            endpoint.failed_starts = 0
            endpoint.tell(f"worker {worker.number} ready")
        if report["error_msg"] and not worker.report.get("error_msg"):
            endpoint.tell(f"worker {worker.number} reported an error: {report['error_msg']}")
        worker.report = report
        if worker.promised_to in report["working_request_idxs"]:
            worker.promised_to = None
        return web.json_response({})

    async def delete_requests(self, request: web.Request) -> web.Response:
        """A worker says which requests have ended, and how."""
        message = await request.json()
        worker = self._endpoint.workers.get(message["worker_id"])
        if worker is None or message["mtoken"] != self._endpoint.master_token:
            return refusal(403, "unknown worker")
        for ended in message["requests"]:
            if ended["request_idx"] == worker.promised_to:
                worker.promised_to = None
        return web.json_response({})


def key_of(request: web.Request, named: Mapping[str, Any]) -> object:
    """The API key of a request: where it is named, or else the one in its Bearer header."""
    if "api_key" in named:
        return named["api_key"]
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def refusal(status: int, error: str) -> web.Response:
    """An answer that says what is wrong."""
    return web.json_response({"error": error}, status=status)


async def carry_through(work: Coroutine[Any, Any, None]) -> None:
    """Await it to its end; a cancellation meanwhile takes effect after that."""
    task = asyncio.ensure_future(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


@contextlib.asynccontextmanager
async def served(routes: list[web.RouteDef]) -> AsyncIterator[str]:
    """Serve them on the loopback interface; gives the origin."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    try:
        await runner.setup()
        # cancelled in the middle, asyncio would leave a socket open
        await carry_through(web.TCPSite(runner, "127.0.0.1", 0).start())
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class LocalVast(LocalEndpoint):
    """Vast Serverless with one endpoint, on the loopback interface, for an `async with` block.

    `environment` is added to every worker's.
    """

    # What it is made of. Tests have a subclass that keeps a record and has faults.
    router_class = Router
    instances_class = Instances

    def __init__(
        self,
        max_workers: int = 3,
        inactivity_timeout: float = 10.0,
        environment: dict[str, str] | None = None,
        control_port: int | None = 18999,
        on_event: Callable[[str], object] = log.info,
    ) -> None:
        """`inactivity_timeout` is in seconds.

        The first worker gets `control_port` where it is free. All others get a port from the
        system, and with None the first one does. `on_event` is told in one line what happens to
        the workers.
        """
        super().__init__(max_workers, inactivity_timeout, on_event)
        self.environment = environment or {}
        self.control_port = control_port
        self.folder = ""  # of the workers, in the block
        self._origin = ""
        self._instances: Instances | None = None  # None: not entered
        self._undo = contextlib.AsyncExitStack()  # of what entering did

    async def __aenter__(self) -> "LocalVast":
        async with contextlib.AsyncExitStack() as stack:  # undone if a step fails or is cancelled
            folder = stack.enter_context(Folder())
            router = self.router_class(self, self.start_worker)
            self._origin = await stack.enter_async_context(served(router.routes()))
            self.folder = folder.path
            self._instances = self.instances_class(
                self, folder, self._origin, self.environment, self.control_port
            )
            if not (of_the_caller(os.environ) | self.environment).get("NULL_CONSUMER"):
                self.tell("NULL_CONSUMER is not set: nothing will run on the workers")
            stack.push_async_callback(self._stop, asyncio.create_task(self._scale()))
            self._undo = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Carried through: a cancellation meanwhile takes effect after that."""
        try:
            await carry_through(self._undo.aclose())
        finally:
            self._instances = None

    async def _stop(self, scaling: asyncio.Task[None]) -> None:
        scaling.cancel()
        await asyncio.wait({scaling})
        stopping = asyncio.ensure_future(self._entered().stop())
        while not stopping.done():
            await asyncio.wait({stopping}, timeout=TICK)
            for worker in self.workers.values():
                self._entered().tell_news(worker)
        stopping.result()

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            with contextlib.suppress(OSError):  # the next start says what is wrong
                self._entered().keep_folder()
            self.look_around()

    def look_around(self) -> None:
        """Forget the workers that have ended, and ask those to end that aren't needed."""
        for worker in list(self.workers.values()):
            if worker.process is not None and not self._entered().bury(worker):
                self._stop_if_idle(worker)

    def _stop_if_idle(self, worker: LocalWorker) -> None:
        now = time.monotonic()
        if not worker.free:
            worker.idle_since = now
        why = why_to_stop(worker, self.inactivity_timeout, now)
        if why is not None:
            self.stop_worker(worker, why)

    def stop_worker(self, worker: LocalWorker, why: str) -> None:
        """Ask a worker to end."""
        self.tell(f"worker {worker.number} stopping: {why}")
        worker.stopping = True
        worker.send_signal(signal.SIGTERM)

    def _entered(self) -> Instances:
        if self._instances is None:
            raise RuntimeError("LocalVast lives in its block: async with LocalVast() as vast")
        return self._instances

    @property
    def url(self) -> str:
        """Of the router, the web API, the key server and the report address alike."""
        self._entered()
        return self._origin

    def client(self, **options: Any) -> Serverless:
        """A client of the SDK that talks to this Vast only; the options are its own."""
        defaults = {
            "api_key": self.api_key,
            "autoscaler_url": self.url,
            "webserver_url": self.url,
        }
        return LocalClient(**(defaults | options))

    def start_worker(self) -> LocalWorker:
        """Start one more worker, whatever the load. It is ready when its `state` is IDLE."""
        return self._entered().start({}, WORKER)


def kill_when_orphaned(parent: int) -> None:
    """Wait until the parent has gone, then kill this process."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def run_tied_to_parent(parent: int, script: str) -> None:
    """Run a script as the main program, in this process, which dies with its parent."""
    threading.Thread(target=kill_when_orphaned, args=(parent,), daemon=True).start()
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.path.isfile(sys.argv[2]):
        sys.exit(
            "null_local: LocalVast starts its workers with this; "
            "to try it: python null_client.py --local"
        )
    run_tied_to_parent(int(sys.argv[1]), sys.argv[2])
