"""LocalVast with a record of what happened, and at its worst: it fails, lags and lies.

The truth is LocalVast's. What is wrong here is what was seen of Vast, or of networks.
"""

import asyncio
import contextlib
import itertools
import json
import math
import signal
import socket
import tempfile
import time
from collections import deque
from dataclasses import dataclass

from aiohttp import web

from null_local import WORKER, Instances, LocalVast, LocalWorker, Router, hold_port, worker_for
from tests.kit import tls as https

LONGEST_LAG = 15.0  # seconds of old lists that are kept
GHOSTS = itertools.count(1001)  # the numbers of workers that are on the list only


@dataclass(eq=False)
class Lie:
    """A row of the list of workers that says other than the truth, until it is over."""

    worker: int  # its number
    fields: dict
    ends_at: float
    is_ghost: bool = False  # there is no such worker: the row is this

    def end(self):
        self.ends_at = 0.0


def told(rows, lies):
    """The list with the lies in it."""
    listed = {row["id"]: dict(row) for row in rows}
    for lie in lies:
        if lie.is_ghost:
            listed[lie.worker] = lie.fields
        elif lie.worker in listed:
            listed[lie.worker].update(lie.fields)
    return list(listed.values())


def overbooked_worker(place, workers):
    """As `worker_for`, but where none is free a request gets an occupied one.

    Vast does so with a long max_queue_time.
    """
    workers = list(workers)
    ready = [worker for worker in workers if worker.state == "IDLE"]
    free = [worker for worker in ready if worker.free]
    return worker_for(place, workers) or next(iter(free or ready), None)


class FaultyRouter(Router):
    """The router, which keeps the record, and fails as its Vast says."""

    def __init__(self, vast, start_worker):
        super().__init__(vast, self._start_one_or_two)
        self.vast = vast
        self._start = start_worker
        vast.router = self

    def _start_one_or_two(self):
        started = [self._start()]
        if self.vast.hedged:
            started.append(self._start())
            self.vast.hedges.append(tuple(started))

    async def route(self, request):
        vast = self.vast
        vast.polls += 1
        if vast.failing_polls:
            return web.json_response(["out of order"], status=vast.failing_polls.pop(0))
        if not vast.gives_up:
            vast.failed_starts = 0
        answer = await super().route(request)
        if vast.forgetful and answer.status == 200:
            return _without_request_idx(answer)
        return answer

    def choose(self, place):
        workers = self.vast.workers.values()
        worker = (overbooked_worker if self.vast.overbooked else worker_for)(place, workers)
        if worker in self.vast.closed:
            # The router counts the request, which never arrives, for hours.
            worker.report["cur_load"] = 100.0
        return worker

    async def list_workers(self, request):
        if self.vast.failing_lists:
            status = self.vast.failing_lists.pop(0)
            return web.json_response({"error_msg": "out of order"}, status=status)
        return await super().list_workers(request)

    def listing(self):
        """What the list says now, or what it said `list_lag` seconds ago."""
        now, lag = time.monotonic(), self.vast.list_lag
        if lag:
            old = [rows for at, rows in self.vast.old_lists if at <= now - lag]
            oldest = [rows for _, rows in itertools.islice(self.vast.old_lists, 1)]
            return (old or oldest or [[]])[-1]
        return self.latest_listing()

    def latest_listing(self):
        return told(super().listing(), self.vast.lies())

    async def public_key(self, request):
        if not self.vast.publish_key:
            raise web.HTTPNotFound
        return await super().public_key(request)

    async def worker_status(self, request):
        answer = await super().worker_status(request)
        if answer.status == 200:
            self.vast.reports.append({**await request.json(), "received": time.monotonic()})
        await asyncio.sleep(self.vast.report_delay)
        return answer

    async def delete_requests(self, request):
        answer = await super().delete_requests(request)
        if answer.status == 200:
            message = await request.json()
            number = message["worker_id"]
            self.vast.ended += [{"worker_id": number, **each} for each in message["requests"]]
        return answer


def _without_request_idx(answer):
    """A waiting answer as some of Vast's are; a worker's has a signature, and stays."""
    body = json.loads(answer.text)
    if "signature" not in body:
        del body["request_idx"]
    return web.json_response(body)


class FaultyInstances(Instances):
    """The worker processes, which start late or not at all, and whose files all stay."""

    async def start_process(self, worker, environment, script):
        with contextlib.suppress(asyncio.TimeoutError):  # the delay is over
            await asyncio.wait_for(self.leaving.wait(), self._endpoint.start_delay)
        await super().start_process(worker, environment, script)

    async def run(self, worker, environment, script):
        if self._endpoint.failing_starts:
            self._endpoint.failing_starts -= 1
            raise OSError("the host has no room")
        return await super().run(worker, environment, script)

    def clear_up(self, worker):
        """Keep the log for who asks why it ended."""


class FaultyVast(LocalVast):
    """LocalVast, its record, and its faults. All faults are off at the start."""

    router_class = FaultyRouter
    instances_class = FaultyInstances

    def __init__(self, *arguments, tls=False, **options):
        """With `tls` (it takes trustme) workers are reached over HTTPS, as on Vast.

        All control ports are from the system, if `control_port` isn't given.
        """
        super().__init__(*arguments, **{"control_port": None, **options})
        self._tls = tls
        self._certificates = None
        self.router = None  # in the block
        self.closed = set()  # workers that nobody reaches, see closed_worker()
        self.begin_anew()

    def begin_anew(self):
        """Forget the record, and switch all faults off."""
        self.first_request = self.last_request + 1  # of those that are recorded from now on
        self.waiting.clear()
        for closed in list(self.closed):
            self.remove(closed)
        self.failed_starts = 0

        # The record
        self.reports = []  # each worker_status, with "received" (monotonic)
        self.ended = []  # each request that a worker said has ended
        self.polls = 0

        # The faults
        self.start_delay = 0.0  # seconds before a worker's process starts
        self.failing_starts = 0  # so many of the next workers can't be started
        self.gives_up = True  # answer 409 after three starts that failed, which Vast doesn't
        self.hedged = False  # start two workers for a request, and stop the one that is later
        self.failing_polls = []  # statuses with which the next polls are answered
        self.forgetful = False  # waiting answers lack the request_idx, as some of Vast's do
        self.overbooked = False  # route to occupied workers, as Vast with a long max_queue_time
        self.report_delay = 0.0  # seconds until a worker's report is acknowledged
        self.publish_key = True  # False: the key server answers 404
        self.failing_lists = []  # statuses with which the next lists are answered
        self.list_lag = 0.0  # seconds, at most LONGEST_LAG, by which the list is late

        self.hedges = []  # pairs of workers of which one is to go
        self.old_lists = deque()  # of (when, list), from LONGEST_LAG ago on
        self._lies = []

    async def __aenter__(self):
        async with contextlib.AsyncExitStack() as stack:
            if self._tls:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                self._certificates = https.Certificates(folder)
            await super().__aenter__()
            self._undo.push_async_exit(stack.pop_all())
        return self

    def start_worker(self, environment=None, script=None):
        """As LocalVast's, with more in its environment, and a script of the test's own."""
        environment = environment or {}
        if self._certificates is not None:
            environment = self._certificates.environment | environment
            script = script or https.SCRIPT
        worker = self._entered().start(environment, str(script or WORKER))
        if self._certificates is not None:
            worker.url = worker.url.replace("http:", "https:")
        return worker

    @property
    def authority(self):
        """The file of the root that has issued the workers' certificates."""
        return self._certificates.authority

    def client(self, **options):
        if self._certificates is None:
            return super().client(**options)
        ours = {"api_key": self.api_key, "authority": self.authority}
        ours |= {"autoscaler_url": self.url, "webserver_url": self.url}
        return https.TrustingClient(**(ours | options))

    # Lies

    def lies(self):
        """Those that are told now."""
        now = time.monotonic()
        self._lies = [lie for lie in self._lies if lie.ends_at > now]
        return self._lies

    def pretend(self, worker, seconds=math.inf, **fields):
        """Let the list say this of a worker for so long, or until `end()` of what is returned."""
        lie = Lie(worker.number, fields, time.monotonic() + seconds)
        self._lies.append(lie)
        return lie

    def ghost(self, seconds=math.inf, **fields):
        """Let the list show a worker that there isn't, with a load that nobody holds."""
        row = {"id": next(GHOSTS), "status": "IDLE", "cur_load": 100.0, "new_load": 0.0}
        row |= {"perf": 100.0, "reqs_working": 1, "started_at": time.time(), **fields}
        lie = Lie(row["id"], row, time.monotonic() + seconds, is_ghost=True)
        self._lies.append(lie)
        return lie

    def closed_worker(self, silent=False):
        """Add a worker that looks ready and free, whose host lets no connection through.

        The first request that is routed to it is on its load from then on, and it stays until
        `remove()`. Connections are refused at once; with `silent`, not answered at all.
        """
        held = [hold_port() for _ in range(3)]
        port, http_port, control_port = (each.getsockname()[1] for each in held)
        if silent:
            held += _deafen(held[0])
        self.started += 1
        worker = LocalWorker(
            number=self.started,
            port=port,
            http_port=http_port,
            control_port=control_port,
            folder="",
            url=f"http://127.0.0.1:{port}",
            held=held,
            report={"max_perf": 100.0, "cur_load": 0.0},
            was_ready=True,
        )
        self.workers[worker.number] = worker
        self.closed.add(worker)
        return worker

    def remove(self, closed):
        """Let a closed worker be gone."""
        self.closed.discard(closed)
        del self.workers[closed.number]
        for each in closed.held:
            each.close()

    async def rollout(self):
        """Replace the workers that there are, one after another, as an update on Vast does.

        A session that is open on one is ended with it.
        """
        for old in [worker for worker in self.workers.values() if worker.process is not None]:
            self.pretend(old, status="UPDATE_REBOOTING")
            old.send_signal(signal.SIGTERM)
            await old.process.wait()
            new = self.start_worker()
            lie = self.pretend(new, status="UPDATE_STARTING")
            while new.state != "IDLE":
                await asyncio.sleep(0.05)
            lie.end()
            self.pretend(new, seconds=3.0, status="UPDATE_READY")

    def look_around(self):
        super().look_around()
        for pair in list(self.hedges):
            if any(worker.was_ready for worker in pair):
                self.hedges.remove(pair)
                self._stop_the_later(pair)
        if self.list_lag:
            now = time.monotonic()
            self.old_lists.append((now, self.router.latest_listing()))
            while self.old_lists[0][0] < now - LONGEST_LAG - 1:
                self.old_lists.popleft()

    def _stop_the_later(self, pair):
        for worker in pair:
            if not worker.was_ready and worker.number in self.workers:
                worker.was_ready = True  # its start hasn't failed
                self.stop_worker(worker, "another was ready first")


def _deafen(held):
    """Let nobody connect to the port of a socket; connections that fill its queue."""
    held.listen(0)
    filling = []
    for _ in range(3):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(held.getsockname())
        filling.append(one)
    return filling
