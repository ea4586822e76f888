"""Reserve null workers: `reserve()` for a dispatcher of your own, and a command to see an endpoint scale.

    python null_client.py --endpoint NAME            one reservation, held 180 s
    python null_client.py --endpoint NAME --demo     three, ramped up and down
    python null_client.py --local [--demo]           the same on this machine: no account, no GPU

Exit status: 0 all were held and released, by whichever side; 1 not reserved, lost, or unreachable; 2 usage or
settings; 130 or 143 after Ctrl-C or SIGTERM, with every session closed.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C while the rest loads; run() takes over

import argparse
import asyncio
import contextlib
import errno
import logging
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field

import aiohttp
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from vastai import Endpoint, Serverless, VastAI

CHECK = 2.0  # seconds between two looks at a held session, at most
REQUEST_TIMEOUT = 10.0  # seconds for one request to a worker, at most
REFUSALS = 5  # looks in a row at a port that refuses, after which the worker's process has ended
CLOSE_TIMEOUT = 3.0  # seconds in which a session has to be closed; on_close callbacks go on without us
MAX_POLL = 1.0  # seconds between two polls for a worker; the SDK's own cap is 5

log = logging.getLogger("null_client")


class ReservationError(Exception):
    """What reserve() and a Reservation raise."""


class NotReserved(ReservationError):
    """No worker within the time, or the autoscaler or the worker refused."""


class WorkerLost(ReservationError):
    """The worker could not be reached until its time to live had run out, or nothing listens on its port any more."""


class Reservation:
    """A worker that is yours. Made by reserve(), which also closes it."""

    def __init__(self, session, took: float, http: aiohttp.ClientSession) -> None:
        self.session_id: str = session.session_id
        self.url: str = session.url
        self.auth_data: dict = session.auth_data  # the `session_auth` of the worker's own routes
        self.lifetime: float = session.lifetime
        self.unreachable = False
        self._http = http
        # The time to live began when the worker created the session, which with a slow answer may be long ago.
        self._expires = time.monotonic() + self.lifetime - (took if took > 1 else 0)
        self._offset = self._expires - session.expiration  # the worker's clock to ours
        self._keeper = asyncio.create_task(self._keep())

    @property
    def time_to_live(self) -> float:
        """Seconds until the worker frees itself, should no keep-alive reach it any more."""
        return self._expires - time.monotonic()

    async def ended(self, timeout: float | None = None) -> bool:
        """Wait until the worker has let go: released on the instance, expired, or restarted.

        False when `timeout` seconds have passed without that. Raises WorkerLost.
        """
        done, _ = await asyncio.wait({self._keeper}, timeout=timeout)
        if done:
            self._keeper.result()
        return bool(done)

    async def _keep(self) -> None:
        """Keep the session alive; return when the worker no longer has it."""
        refusals = 0
        while True:
            timeout = max(1.0, min(REQUEST_TIMEOUT, self.lifetime / 4))
            try:
                status, answer = await self._ask("/session/get", timeout, session_auth=self.auth_data)
                if status == 400:  # there is no such session
                    return
                self._expires, refusals = answer["expiration"] + self._offset, 0
                if self.unreachable:  # a keep-alive of before may just be arriving: look again before the next
                    self.unreachable = False
                elif keep_alive_due(self.time_to_live, self.lifetime) <= 0:
                    status, _ = await self._ask("/ping", timeout, auth_data=self.auth_data, payload={})
                    if status == 200:
                        self._expires += self.lifetime
                    elif status != 410:  # gone, as the next look will say
                        log.warning("keep-alive refused session=%s status=%s", self.session_id, status)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, LookupError, TypeError) as error:
                self.unreachable = True
                refused = isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.ECONNREFUSED
                refusals = refusals + 1 if refused else 0
                if self.time_to_live <= 0 or refusals == REFUSALS:
                    raise WorkerLost(f"worker {self.url} can't be reached: {error or 'timed out'}") from error
            pause, due = min(CHECK, self.lifetime / 8), keep_alive_due(self.time_to_live, self.lifetime)
            await asyncio.sleep(min(pause, due) if due > 0 else pause)

    async def _ask(self, route: str, timeout: float, **body: object) -> tuple[int, dict]:
        body["session_id"] = self.session_id
        bound = aiohttp.ClientTimeout(total=timeout)
        async with self._http.post(self.url + route, json=body, timeout=bound) as response:
            if response.status not in (200, 400, 401, 410):  # or it isn't the worker that answers there
                raise aiohttp.ClientError(f"HTTP {response.status}")
            return response.status, await response.json(content_type=None) if response.ok else {}

    async def close(self) -> None:
        """End the session. Quiet when it is gone already; a warning in the log when the worker doesn't answer."""
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        if not self._keeper.cancelled():
            self._keeper.exception()  # let go, or lost: either way there is nothing left to end
            return
        try:
            await asyncio.wait_for(self._end(), CLOSE_TIMEOUT)
        except asyncio.TimeoutError:
            log.warning("not closed session=%s, its worker is free in %.0f s", self.session_id, self.time_to_live + 5)

    async def _end(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
                await self._ask("/session/end", CLOSE_TIMEOUT / 2, session_auth=self.auth_data)
                return
            await asyncio.sleep(0.2)


def keep_alive_due(time_to_live: float, lifetime: float) -> float:
    """Seconds until the next keep-alive. One adds a lifetime to what is left, so it waits for the last half of one:
    the time to live then stays between half a lifetime and one and a half."""
    return time_to_live - lifetime / 2


@contextlib.asynccontextmanager
async def reserve(
    endpoint: Endpoint,
    cost: float = 100,
    lifetime: float = 120,
    wait: float = 1800,
    on_close_route: str | None = None,
    on_close_payload: dict | None = None,
) -> AsyncIterator[Reservation]:
    """Reserve a worker of the endpoint for the length of the block, and keep the session alive meanwhile.

    `cost` is the load that the reservation reports; 100 is one worker. `lifetime` is how many seconds the worker keeps
    it without a keep-alive; a dispatcher that dies frees its worker within 1.5 lifetimes plus 5 s. `wait` is how many
    seconds to wait for a worker. When the session ends the worker POSTs `on_close_payload` to `on_close_route`, a URL
    or a path on the consumer. Raises NotReserved.
    """
    connector = aiohttp.TCPConnector(ssl=await endpoint.client.get_ssl_context())
    async with aiohttp.ClientSession(connector=connector) as http:
        options = {"on_close_route": on_close_route, "on_close_payload": on_close_payload}
        patient = _PatientEndpoint(endpoint)
        session = await _open(patient, wait, cost=cost, lifetime=lifetime, **options)
        reservation = Reservation(session, time.monotonic() - patient.create_sent_at, http)
        try:
            yield reservation
        finally:
            await _carry_through(reservation.close())


async def _carry_through(cleanup: Coroutine) -> None:
    """Await a clean-up that is bounded in time to its end. A cancellation meanwhile takes effect after that."""
    task, cancelled = asyncio.ensure_future(cleanup), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


class _PatientEndpoint(Endpoint):
    """The SDK's endpoint, which keeps its place in the queue when a poll fails. The SDK itself gives up there."""

    def __init__(self, endpoint: Endpoint) -> None:
        vars(self).update(vars(endpoint))
        self.create_sent_at: float | None = None  # when a worker was found and asked for a session, by time.monotonic()

    async def _route(self, *args: object, **kwargs: object):
        if self.create_sent_at:  # the worker didn't take it; the SDK asks again at once when it can't be reached
            await asyncio.sleep(MAX_POLL / 2)
        self.create_sent_at = None
        pause = MAX_POLL / 2
        while True:
            try:
                route = await super()._route(*args, **kwargs)
                self.create_sent_at = time.monotonic() if route.status == "READY" else None
                return route
            except (RuntimeError, AttributeError) as error:  # AttributeError: an answer that is no JSON object
                if re.search(r"endpoint: HTTP 4(?!08|29)", str(error)):
                    raise
                log.info("poll failed, asking again: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)


async def _open(endpoint: _PatientEndpoint, wait: float, **options: object):
    opening, taken = asyncio.ensure_future(endpoint.session(**options)), False
    try:
        done, _ = await asyncio.wait({opening}, timeout=wait)
        if not done:
            raise NotReserved(f"no worker within {wait:g} s")
        taken = True
    finally:
        if not taken:
            await _carry_through(_abandon(opening, endpoint))
    try:
        return opening.result()
    except Exception as error:
        raise NotReserved(f"{error}") from error


async def _abandon(opening: asyncio.Future, endpoint: _PatientEndpoint) -> None:
    """Stop waiting for a session. One that a worker is just creating is waited for a moment, and closed."""
    if endpoint.create_sent_at:
        await asyncio.wait({opening}, timeout=CLOSE_TIMEOUT - 0.5)
        if not opening.done():
            log.warning("a session may have been created; its worker frees itself when the lifetime is over")
    opening.cancel()
    await asyncio.wait({opening})
    if not opening.cancelled() and opening.exception() is None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(opening.result().close(), CLOSE_TIMEOUT / 2)


@dataclass
class Row:
    """One reservation of the command, from the request to its end. Times are time.monotonic()."""

    name: str
    state: str = "planned"  # waiting, held, released, let go, lost, not reserved
    requested_at: float = 0.0
    held_at: float | None = None
    ended_at: float | None = None
    until: float | None = None  # when it is to be released, once that is known
    session: Reservation | None = None
    reason: str = ""
    release: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # held, or ended without

    @property
    def waiting_time(self) -> float:
        return (self.held_at or self.ended_at or time.monotonic()) - self.requested_at

    @property
    def holding_time(self) -> float:
        return (self.ended_at or time.monotonic()) - self.held_at if self.held_at else 0.0

    def end(self, state: str, reason: str = "") -> None:
        self.state, self.reason, self.ended_at = state, " ".join(reason.split()), time.monotonic()
        self.settled.set()


class Display:
    """What a person sees: live rows on a terminal, plain lines with times elsewhere."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.workers = ""  # of the endpoint, by state
        self.console = Console(highlight=False)
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> None:
        if self.console.is_terminal:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        if self.console.is_terminal:
            self.console.print(Text(line), soft_wrap=True)
        else:
            try:
                print(line, flush=True)
            except BrokenPipeError:  # nobody reads any more: end as by any other signal
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                signal.raise_signal(signal.SIGTERM)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        for row in self.rows:
            detail: object = Text(row.reason or (row.session.url if row.session else ""), overflow="ellipsis")
            bar: object = ""
            if row.state == "held":
                if row.session.unreachable:
                    detail = Text(f"not answering, given up in {max(0, row.session.time_to_live):.0f} s")
                if row.until is not None and math.isfinite(row.until):
                    total = max(row.until - row.held_at, 0.001)
                    bar = ProgressBar(total=total, completed=min(now - row.held_at, total), width=16)
                else:
                    bar = "until released" if row.until else "until all are held"
            since = row.waiting_time if row.state in ("waiting", "not reserved") else row.holding_time
            clock = "" if row.state == "planned" else f"{int(since) // 60}:{int(since) % 60:02}"
            table.add_row(row.name, row.state, clock, bar, detail)
        return Group(table, Text(f"workers: {self.workers}", overflow="ellipsis") if self.workers else Text(""))


async def occupy(row: Row, endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Reserve a worker, hold it until `row.release` is set or it has ended otherwise, and note what happened."""
    row.state, row.requested_at = "waiting", time.monotonic()
    display.say(f"{row.name} waiting for a worker")
    try:
        async with reserve(endpoint, args.cost, args.lifetime, args.wait) as row.session:
            row.state, row.held_at = "held", time.monotonic()
            row.settled.set()
            display.say(
                f"{row.name} held after {row.waiting_time:.1f} s: session {row.session.session_id}, {row.session.url}"
            )
            ended, release = asyncio.ensure_future(row.session.ended()), asyncio.ensure_future(row.release.wait())
            try:
                await asyncio.wait({ended, release}, return_when=asyncio.FIRST_COMPLETED)
                let_go = ended.done() and ended.result()
            finally:
                ended.cancel(), release.cancel()
        row.end("let go" if let_go else "released", "the worker let go" if let_go else "")
    except Exception as error:  # noqa: BLE001  whatever it was, this one has ended and the others go on
        row.end("lost" if row.held_at else "not reserved", str(error) or repr(error))
    except asyncio.CancelledError:
        row.end("released" if row.held_at else "not reserved", "interrupted")
        raise
    finally:
        held = f" after {row.holding_time:.1f} s" if row.held_at else ""
        display.say(f"{row.name} {row.state}{held}" + f": {row.reason}" * bool(row.reason))


async def ramp(rows: list[Row], endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Ramp up, hold all from the moment the last one is held, ramp down, the oldest first. A single one is a ramp too."""
    plateau, occupying = args.plateau if args.demo else args.hold, []
    watching = asyncio.ensure_future(watch_workers(endpoint, display) if args.demo else asyncio.sleep(0))
    try:
        for row in rows:
            if occupying:
                await asyncio.sleep(args.interval)
            occupying.append(asyncio.ensure_future(occupy(row, endpoint, args, display)))
        for row in rows:
            await row.settled.wait()
        for place, row in enumerate(row for row in rows if row.state == "held"):
            row.until = time.monotonic() + plateau + place * args.interval
        await asyncio.wait(occupying, timeout=None if math.isinf(plateau) else plateau)
        for row, task in zip(rows, occupying):
            if row.state == "held":
                row.release.set()
                await task
                if any(row.state == "held" for row in rows):
                    await asyncio.wait(occupying, timeout=args.interval)
    finally:
        for task in (watching, *occupying):
            task.cancel()
        await asyncio.wait({watching, *occupying})


async def watch_workers(endpoint: Endpoint, display: Display) -> None:
    while True:
        with contextlib.suppress(Exception):  # a display only; the reservations have their own eyes
            states = Counter(worker.status for worker in await endpoint.get_workers())
            seen = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
            if seen != display.workers and not display.console.is_terminal:
                display.say(f"workers: {seen}")
            display.workers = seen
        await asyncio.sleep(CHECK)


def chart(rows: list[Row], width: int = 40) -> list[str]:
    """One line per reservation over a common time axis: dots while waiting, equals signs while held."""
    first, last = min(row.requested_at for row in rows), max(row.ended_at for row in rows)
    scale = width / max(last - first, 0.001)

    def column(moment: float) -> int:
        return round((moment - first) * scale)

    lines = [f"{'':<4}{'0 s':<{width - 8}}{f'{last - first:.0f} s':>8}  . waiting  = held"]
    for row in rows:
        start, end = column(row.requested_at), column(row.ended_at)
        held = column(row.held_at) if row.held_at else end
        bar = " " * start + "." * (held - start) + "=" * (end - held)
        lines.append(f"{row.name:<4}{bar:<{width}}  {row.waiting_time:.0f} s, {row.holding_time:.0f} s, {row.state}")
    return lines


class UsageError(Exception):
    """One line for a person, and exit status 2."""


def number(minimum: float, maximum: float, whole: bool = False, endless: bool = False) -> Callable[[str], float]:
    """An argparse type: a number within the bounds; `inf` only if `endless`."""

    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * whole}number") from None
        if not (minimum <= value <= maximum or (endless and value == math.inf)):
            raise argparse.ArgumentTypeError(f"{text} is not within {minimum:g} and {maximum:g}{', or inf' * endless}")
        return value

    return convert


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="null_client.py", description="Reserve workers of a Vast endpoint.")
    option, seconds = parser.add_argument, number(0.1, 7 * 86400)
    option("--endpoint", metavar="NAME", default=os.environ.get("VAST_ENDPOINT"), help="default: $VAST_ENDPOINT")
    instances = ("prod", "alpha", "candidate", "local")
    instance = os.environ.get("VAST_INSTANCE", "prod")
    option("--instance", default=instance, help=f"{', '.join(instances)}; default: $VAST_INSTANCE or prod")
    option("--local", action="store_true", help="run against a stand-in for Vast on this machine")
    endless = number(0.1, 7 * 86400, endless=True)
    option("--hold", metavar="S", type=endless, default=180, help="seconds to hold, or inf (default: 180)")
    option("--demo", action="store_true", help="several reservations, ramped up and down")
    option("--interval", metavar="S", type=seconds, default=30, help="demo: seconds between two steps (default: 30)")
    option("--plateau", metavar="S", type=seconds, default=300, help="demo: seconds with all held (default: 300)")
    option("--count", metavar="N", type=number(1, 100, whole=True), default=3, help="demo: how many (default: 3)")
    option("--cost", metavar="N", type=number(1, 1e6, whole=True), default=100, help="load of one (default: 100)")
    lifetime = number(1, 86400)
    option("--lifetime", metavar="S", type=lifetime, default=120, help="seconds without a keep-alive (default: 120)")
    option("--wait", metavar="S", type=seconds, default=1800, help="seconds to wait for a worker (default: 1800)")
    args = parser.parse_args(arguments)
    if args.instance not in instances:
        parser.error(f"argument --instance: {args.instance!r} is none of {', '.join(instances)}")
    if not (args.local or args.endpoint):
        parser.error("argument --endpoint: needed, or $VAST_ENDPOINT, or --local")
    return args


@contextlib.asynccontextmanager
async def connect(args: argparse.Namespace, display: Display) -> AsyncIterator[Endpoint]:
    """The endpoint on Vast, or on a LocalVast for the length of the block."""
    async with contextlib.AsyncExitStack() as stack:
        if args.local:
            try:
                from null_local import LocalVast
            except ImportError as error:
                raise UsageError(f"--local needs null_local.py beside this file: {error}") from error
            vast = LocalVast(max_workers=args.count if args.demo else 1, on_event=display.say)
            await stack.enter_async_context(vast)
            client, name = vast.client(max_poll_interval=MAX_POLL), vast.endpoint_name
        else:
            try:
                key = VastAI().client.api_key  # from the environment, or where `vastai set api-key` saved it
            except RuntimeError:
                raise UsageError("no API key: set VAST_API_KEY, or save one with: vastai set api-key KEY") from None
            client = Serverless(key, instance=args.instance, max_poll_interval=MAX_POLL)
            name = args.endpoint
        await stack.enter_async_context(client)
        endpoints = {endpoint.name: endpoint for endpoint in await client.get_endpoints()}
        if name not in endpoints:
            raise UsageError(f"no endpoint {name!r}; there are: {', '.join(sorted(endpoints)) or 'none'}")
        yield endpoints[name]


async def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status. After a signal every session is closed first; a second one ends it at once."""
    caught: list[int] = []
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    rows = [Row(f"#{place + 1}") for place in range(args.count if args.demo else 1)]

    def interrupt(signum: int) -> None:
        caught.append(signum)
        display.say("interrupted, closing")
        for again in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(again)
            signal.signal(again, lambda *_: (display.console.show_cursor(), os._exit(128 + signum)))
        task.cancel()

    display = Display(rows)
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, interrupt, signum)
    try:
        with display:
            display.say("connecting")
            async with connect(args, display) as endpoint:
                await ramp(rows, endpoint, args, display)
    except asyncio.CancelledError:
        if not caught:
            raise
        return 128 + caught[0]
    if args.demo:
        print("\n".join(chart(rows)))
    return 0 if all(row.state in ("released", "let go") for row in rows) else 1


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # what Vast answers may not be in the terminal's encoding
    try:
        return asyncio.run(run(args))
    except UsageError as error:
        print(f"null_client: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001  a person gets a line, whatever went wrong on the way to Vast
        print(f"null_client: {error}".replace("\n", " "), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
