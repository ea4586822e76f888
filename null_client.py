"""Reserve null workers: `reserve()` for a dispatcher of your own, and a command to see an endpoint scale.

    python null_client.py --endpoint NAME            one reservation, held 180 s
    python null_client.py --endpoint NAME --demo     three, ramped up and down
    python null_client.py --local [--demo]           the same on this machine: no account, no GPU

Exit status: 0 all were held and released, by whichever side; 1 not reserved, lost, or unreachable; 2 usage or
settings; 128 and the number of a signal (130 after Ctrl-C), with every session closed.
"""

import os
import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C while the rest loads; run() takes over
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import math
import queue
import random
import re
import select
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeGuard

import aiohttp
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from vastai import Endpoint, Serverless, VastAI  # type: ignore[import-untyped]

LOOK = 30.0  # seconds that a look waits on the worker for the end of the session, at most
CHECK = 2.0  # seconds between two looks at a worker that doesn't know how to wait, or that can't be reached
REQUEST_TIMEOUT = 10.0  # seconds for one request, at most
REFUSALS = 5  # looks in a row at a port that refuses, after which the worker's process has ended
CLOSE_TIMEOUT = 3.0  # seconds in which a session has to be closed; on_close callbacks go on without us
CLOSING = 50  # sessions that are closed at the same time
FRONT = 16  # of those who wait for a worker, who poll every second
POLL_RATE = 30  # polls a second of all the others

JSON = dict[str, Any]  # an object of it
log = logging.getLogger("null_client")


class ReservationError(Exception):
    """What reserve() and a Reservation raise."""


class NotReserved(ReservationError):
    """No worker within the time, or the autoscaler or the worker refused."""


class WorkerLost(ReservationError):
    """The worker could not be reached until its time to live had run out, or nothing listens on its port any more."""


class _Answer(NamedTuple):
    status: int
    fields: JSON  # of its JSON object; empty where there is none
    text: str  # the beginning of it
    asked_at: float  # by time.monotonic()

    @property
    def says_gone(self) -> bool:
        """The worker's own word that it has no such session; a proxy in between says other things."""
        error = str(self.fields.get("error"))
        return self.status in (400, 410) and bool(re.search(r"^(invalid session$|session .*(not |already ))", error))

    def __str__(self) -> str:
        return f"HTTP {self.status} - {self.text}"


FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, RecursionError)


async def _post(http: aiohttp.ClientSession, url: str, body: object, timeout: float | None, **options: Any) -> _Answer:
    """One request. Raises FAILURES."""
    bound, asked_at = aiohttp.ClientTimeout(total=timeout), time.monotonic()
    async with http.post(url, json=body, timeout=bound, allow_redirects=False, **options) as response:
        content = b""
        while len(content) <= 1 << 20 and (chunk := await response.content.readany()):
            content += chunk  # one that is cut off is no JSON
    fields: object = None
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(content)
    text = " ".join(content[:300].decode(errors="replace").split())
    return _Answer(response.status, fields if isinstance(fields, dict) else {}, text, asked_at)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


class _Vast:
    """The SDK's names that it doesn't promise. Raises NotReserved where one is missing."""

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            self.name, self.api_key, client = endpoint.name, endpoint.api_key, endpoint.client
            self.url, self.session, self._tls = client.autoscaler_url, client._get_session, client.get_ssl_context
            self.is_open = client.is_open
        except AttributeError as error:
            raise NotReserved(f"this vastai-sdk is not known to work ({error}); 1.3 up to below 2 is") from error

    async def tls(self) -> Any:
        """The context that trusts Vast's workers. Raises FAILURES."""
        try:
            async with _Line.here().tls:  # the first one downloads the certificate, for all
                return await self._tls()
        except Exception as error:  # the SDK has no class for it
            raise aiohttp.ClientError(f"no certificate: {str(error) or type(error).__name__}") from error

    async def route(self, asked: dict[str, float], timeout: float) -> _Answer:
        """Ask the router for a worker. Raises FAILURES, or NotReserved."""
        if not self.is_open():  # the SDK would open it again
            raise NotReserved("the Serverless client is closed")
        await self.tls()
        body = {"endpoint": self.name, "api_key": self.api_key, **asked}
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return await _post(await self.session(), f"{self.url}/route/", body, timeout, headers=headers)


class _Line:
    """Those who wait for a worker in this event loop, first come first: one pace for the polls of all."""

    _lines: ClassVar["weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line]"] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []  # in order; done once it has come to the front
        self.tls, self.closing, self._pace = asyncio.Lock(), asyncio.Semaphore(CLOSING), asyncio.Lock()

    @classmethod
    def here(cls) -> "_Line":
        return cls._lines.setdefault(asyncio.get_running_loop(), cls())

    def leave(self, ticket: "asyncio.Future[None]") -> None:
        self.waiting.remove(ticket)
        for moves_up in self.waiting[FRONT - 1 : FRONT]:
            if not moves_up.done():
                moves_up.set_result(None)

    async def turn(self, ticket: "asyncio.Future[None]", pause: float, deadline: float) -> None:
        """Wait until the next poll is due, in `pause` seconds or later."""
        interval = poll_interval(self.waiting.index(ticket), len(self.waiting))
        if pause:
            seconds = min(max(pause, interval) * random.uniform(0.8, 1.2), deadline - time.monotonic())
            await asyncio.wait({ticket}, timeout=seconds) if interval > pause else await asyncio.sleep(seconds)
        if not pause or interval > 1.0:  # those in front are few, but for those who have just come
            slot = asyncio.create_task(self._slot())
            try:
                await asyncio.wait({slot}, timeout=deadline - time.monotonic())
            finally:
                slot.cancel()

    async def _slot(self) -> None:
        """One after the other, first come first. Who has left takes no time of those who come after."""
        async with self._pace:
            await asyncio.sleep(1 / POLL_RATE)


def poll_interval(place: int, waiting: int) -> float:
    """Seconds between two polls of the one in that place, of so many who wait: those behind share a rate."""
    return 1.0 if place < FRONT else max(4.0, (waiting - FRONT) / POLL_RATE)


class _Undisturbed(asyncio.Task[Any]):
    """A task that only its owner ends: asyncio.run() cancels whatever it finds, a clean-up too. No time-out of
    asyncio's or aiohttp's works inside it: they cancel."""

    def cancel(self, msg: object = None) -> bool:
        return False

    async def settle(self, seconds: float) -> Any:
        """Its result; None when it had none within so long, and was ended. For clean-ups, which nobody cancels."""
        await asyncio.wait({self}, timeout=seconds)
        super().cancel()
        await asyncio.wait({self})
        return None if self.cancelled() else self.result()


async def _carry_through(work: Coroutine[Any, Any, object]) -> None:
    """Await a clean-up that is bounded in time to its end. A cancellation meanwhile takes effect after that."""
    task, cancelled = _Undisturbed(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


class Reservation:
    """A worker that is yours. Made by reserve(), which also closes it."""

    def __init__(self, http: aiohttp.ClientSession, auth_data: JSON, payload: JSON, created: _Answer) -> None:
        self.session_id: str = created.fields["session_id"]
        self.url: str = auth_data["url"]
        self.auth_data = auth_data  # the `session_auth` of the worker's own routes
        self.lifetime: float = payload["lifetime"]  # seconds
        self.unreachable = False
        self._http, self._handed_over, self._closing = http, False, False
        # The time to live began when the worker created the session, which with a slow answer may be long ago.
        self._expires: float = created.asked_at + self.lifetime
        expiration = created.fields.get("expiration")
        self._offset = self._expires - (expiration if _is_number(expiration) else time.time() + self.lifetime)
        self._most, self._not_before = self._expires, 0.0  # what keep-alives can have made of it; for the next one
        self._over: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep())

    @property
    def time_to_live(self) -> float:
        """Seconds until the worker frees itself, should nobody keep it alive any more."""
        return self._expires - time.monotonic()

    async def ended(self, timeout: float | None = None) -> bool:
        """Wait until the worker has let go: released on the instance, expired, restarted, or closed from here.

        False when `timeout` seconds have passed without that. Raises WorkerLost.
        """
        await asyncio.wait({self._over}, timeout=timeout)
        if self._over.done() and (error := self._over.result()):
            raise error
        return self._over.done()

    def hand_over(self) -> None:
        """From now on the consumer keeps the session alive, with `POST /renew`; the end of the block doesn't end it."""
        self._handed_over = True

    async def close(self) -> None:
        """End the session. Quiet when it is gone already; a warning in the log when the worker doesn't answer."""
        self._closing = True
        await _carry_through(self._close())

    async def _close(self) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        if self._over.done():
            return
        async with _Line.here().closing:
            deadline, asking = time.monotonic() + CLOSE_TIMEOUT, set[_Undisturbed]()
            while not self._over.done() and (left := deadline - time.monotonic()) > 0:
                asking.add(_Undisturbed(self._end_on_worker()))  # beside one that hangs: it may still be answered
                _, asking = await asyncio.wait(asking, timeout=min(left, 1.5), return_when=asyncio.FIRST_COMPLETED)
                if not self._over.done() and time.monotonic() < deadline:
                    await asyncio.sleep(0.2)
            for each in asking:
                await each.settle(0)
        if not self._over.done():
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + self.time_to_live + 5))
            log.warning("not closed session=%s: %s stays reserved until %s", self.session_id, self.url, until)
            self._end()

    async def _end_on_worker(self) -> None:
        with contextlib.suppress(Exception):  # whatever it was, it wasn't the worker's word
            answer = await self._ask("/session/end", None, session_auth=self.auth_data)
            if answer.says_gone or answer.fields.get("ended") is True:
                self._end()

    async def _leave(self) -> None:
        """The block has ended."""
        if self._handed_over and not self._closing:
            self._end(ReservationError("the block has ended, and the consumer holds the reservation"))
        await self._close()
        if isinstance(self._over.result(), WorkerLost):  # a keep-alive whose answer got lost may have kept it
            async with _Line.here().closing:
                await _Undisturbed(self._end_on_worker()).settle(CLOSE_TIMEOUT / 2)
        await self._http.close()

    def _end(self, error: BaseException | None = None) -> None:
        if not self._over.done():
            self._over.set_result(error)

    async def _keep(self) -> None:
        """Keep the session alive until the worker no longer has it, or is lost."""
        refusals, moment = 0, min(CHECK, self.lifetime / 8)
        timeout = max(1.0, min(REQUEST_TIMEOUT, self.lifetime / 4))
        while True:
            asked_at, pause = time.monotonic(), moment
            due = max(keep_alive_due(self.time_to_live, self.lifetime), self._not_before - asked_at)
            due = math.inf if self._handed_over else due
            try:
                if due <= 0.05 and not self.unreachable:
                    self._most, self._not_before = self._most + self.lifetime, asked_at + moment
                    ping = await self._ask("/ping", timeout, auth_data=self.auth_data, payload={})
                    pause = 0.0
                    if ping.status == 200 and "result" in ping.fields:
                        self._expires, self._not_before = self._expires + self.lifetime, asked_at + self.lifetime / 2
                    elif not ping.says_gone:  # gone, as the next look will say
                        log.warning("keep-alive refused session=%s: %s", self.session_id, ping)
                else:
                    wait = 0.0 if self.unreachable else max(0.0, min(LOOK, self.lifetime / 4, due))
                    look = await self._ask("/session/get", wait + timeout, session_auth=self.auth_data, wait=wait)
                    if look.says_gone:
                        return self._end()
                    if not (look.status == 200 and _is_number(expiration := look.fields.get("expiration"))):
                        raise aiohttp.ClientError(str(look))
                    # It lives, with no more than what keep-alives can have made of it, whatever the answer claims.
                    now, expires = time.monotonic(), expiration + self._offset
                    if expires > now - 6:  # the worker looks for expired ones every 5 s
                        self._expires = min(expires, now + 2 * self.lifetime if self._handed_over else self._most)
                    if self.unreachable:
                        self._not_before = now + moment  # a keep-alive of before may just be arriving
                    self.unreachable, refusals = False, 0
                    if now - asked_at >= min(wait, CHECK) / 2:  # it knows how to wait
                        pause = 0.0
            except Exception as error:  # noqa: BLE001  whatever it was, the worker didn't answer
                self.unreachable = True
                refusals = refusals + 1 if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED else 0
                # Not one whose time ran out only while this was asked: this process may have stood still.
                if self._expires <= asked_at or refusals == REFUSALS:
                    return self._end(WorkerLost(f"worker {self.url} can't be reached: {str(error) or 'timed out'}"))
            await asyncio.sleep(pause)

    async def _ask(self, route: str, timeout: float | None, **body: object) -> _Answer:
        return await _post(self._http, self.url + route, {**body, "session_id": self.session_id}, timeout)


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
    on_close_payload: dict[str, Any] | None = None,
    *,
    on_trouble: Callable[[str], object] = lambda _: None,
) -> AsyncIterator[Reservation]:
    """Reserve a worker of the endpoint for the length of the block, and keep the session alive meanwhile.

    `cost` is the load that the reservation reports; 100 is one worker. `lifetime` is how many seconds the worker keeps
    it without a keep-alive; a dispatcher that dies frees its worker within 1.5 lifetimes plus 5 s. `wait` is how many
    seconds to wait for a worker. When the session ends the worker POSTs `on_close_payload` to `on_close_route`, a URL
    or a path on the consumer. `on_trouble` is told why the last try to get a worker failed, and "" when one works
    again. Raises NotReserved, or TypeError for what JSON can't hold.
    """
    payload = {"lifetime": lifetime, "on_close_route": on_close_route, "on_close_payload": on_close_payload}
    try:
        json.dumps([cost, payload], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"not to be sent as JSON: {error}") from error
    reservation = await _open(_Vast(endpoint), cost, payload, wait, on_trouble)
    try:
        yield reservation
    finally:
        await _carry_through(reservation._leave())


async def _open(vast: _Vast, cost: float, payload: JSON, wait: float, tell: Callable[[str], object]) -> Reservation:
    """Ask the router, create, held. Every step is cancelled with the caller, but for a create: see _create()."""
    deadline, trouble, failures, pause = time.monotonic() + wait, "", 0, 0.0
    place: float = 0
    line, ticket = _Line.here(), asyncio.get_running_loop().create_future()
    line.waiting.append(ticket)
    try:
        while True:
            await line.turn(ticket, pause, deadline)
            if (left := deadline - time.monotonic()) <= 0:
                raise NotReserved(f"no worker within {wait:g} s" + (trouble and f"; at last: {trouble}"))
            try:
                replay_timeout = max(60, len(line.waiting) / 10)  # or a long line would lose its places
                asked = {"cost": cost, "request_idx": place, "replay_timeout": replay_timeout}
                answer = await vast.route(asked, min(REQUEST_TIMEOUT, left))
                if 400 <= answer.status < 500 and answer.status not in (408, 429):
                    raise NotReserved(f"the autoscaler refuses: {answer}")
                if answer.status != 200 or not answer.fields:
                    raise aiohttp.ClientError(f"the autoscaler answers {answer}")
                if _is_number(index := answer.fields.get("request_idx")) and index:
                    place = index  # an answer may lack it: a new request would be additional load
                if answer.fields.get("url") is not None:
                    return await _create(vast, answer.fields, payload)
                trouble, failures, pause = "", 0, 1.0
            except FAILURES as error:
                trouble, failures = str(error) or "the autoscaler does not answer", failures + 1
                pause = min(0.5 * 2**failures, 5.0)
            tell(trouble)
    finally:
        line.leave(ticket)


async def _create(vast: _Vast, auth_data: JSON, payload: JSON) -> Reservation:
    """Open a session on the worker that the router has named. Raises FAILURES, or NotReserved. Cancelled, it waits for
    the answer all the same and ends the session: nobody else would know of it."""
    url = auth_data["url"]
    connector = aiohttp.TCPConnector(ssl=await vast.tls())
    http = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def ask() -> _Answer | Exception:
        try:
            return await _post(http, f"{url}/session/create", {"auth_data": auth_data, "payload": payload}, None)
        except FAILURES as error:
            return error  # asyncio.run() reports every task that it finds and that fails, awaited or not

    creating = _Undisturbed(ask())

    async def discard() -> None:
        late = await creating.settle(CLOSE_TIMEOUT - 0.5)
        if late is None:
            log.warning("no answer to a create: %s may stay reserved for %g s", url, payload["lifetime"])
        elif isinstance(late, _Answer) and isinstance(late.fields.get("session_id"), str):
            await Reservation(http, auth_data, payload, late)._close()
        await http.close()

    try:
        await asyncio.wait({creating}, timeout=REQUEST_TIMEOUT)
        created = creating.result() if creating.done() else aiohttp.ClientError(f"{url} does not answer")
        if isinstance(created, Exception):
            raise created
        if created.status in (401, 413, 422) and "error" in created.fields:
            raise NotReserved(f"{url} refuses: {created}")
        if created.status != 201 or not isinstance(created.fields.get("session_id"), str):
            raise aiohttp.ClientError(f"{url} answers {created}")
    except BaseException:
        await _carry_through(discard())
        raise
    return Reservation(http, auth_data, payload, created)


class Waiting(NamedTuple):
    asked_at: float  # by time.monotonic(), as the others
    trouble: str = ""  # why the last try failed


class Held(NamedTuple):
    asked_at: float
    held_at: float
    session: Reservation
    until: float | None = None  # when it is to be released, once that is known


class Ended(NamedTuple):
    asked_at: float
    held_at: float | None
    ended_at: float
    how: str  # released, let go, lost, not reserved
    reason: str


State = Waiting | Held | Ended | None  # of one reservation of the command; None: not yet begun


class Display:
    """What a person sees: live rows on a terminal, plain lines with times elsewhere. It is the file that rich writes
    to, and a thread of its own writes standard output: one that is slow, full or gone holds nothing up."""

    def __init__(self, rows: int, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in that thread when nobody reads standard output any more."""
        self._on_broken_pipe = on_broken_pipe
        self.rows: dict[str, State] = {f"#{place + 1}": None for place in range(rows)}
        self.workers = ""  # the endpoint's, by state
        self.seen: list[tuple[float, int]] = []  # when, and how many of them
        self.on_terminal, self.encoding = sys.stdout.isatty(), sys.stdout.encoding  # Live puts itself in that place
        self._console = Console(file=self, force_terminal=self.on_terminal, highlight=False)  # type: ignore[arg-type]
        self.live = Live(console=self._console, get_renderable=self._render, transient=not self.on_terminal)
        self._texts: queue.Queue[str | None] = queue.Queue(1000)
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def say(self, line: str) -> None:
        self._console.print(Text(f"{time.strftime('%H:%M:%S')} {line}"), soft_wrap=True)

    def write(self, text: str | None) -> None:
        """None: nothing comes any more."""
        with contextlib.suppress(queue.Full):
            self._texts.put_nowait(text)

    def flush(self) -> None:
        """The thread holds nothing back."""

    def close(self) -> None:
        self.write(None)
        self._printer.join(1)

    def _print(self) -> None:
        try:
            while (text := self._texts.get()) is not None:
                data = text.encode(self.encoding, "backslashreplace")
                while data:
                    select.select([], [1], [])
                    with contextlib.suppress(BlockingIOError):  # somebody else has made it so
                        data = data[os.write(1, data) :]
        except BrokenPipeError:
            self._on_broken_pipe()
        except OSError:
            pass

    def _render(self) -> Group:
        table, room = Table.grid(padding=(0, 2)), self._console.height - 3
        drawn = [[name, *describe(state, time.monotonic())] for name, state in self.rows.items()]
        shown = len(drawn) if len(drawn) <= room else max(0, room - 1)
        for columns in drawn[:shown]:
            table.add_row(*columns)
        rest = [str(columns[1]) for columns in drawn[shown:]]
        lines = [f"and {len(rest)} more: {count(rest)}"] if rest else []
        lines += [f"workers: {self.workers}"] if self.workers else []
        return Group(table, *(Text(line, overflow="crop", no_wrap=True) for line in lines))


def count(names: Iterable[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(Counter(names).items())) or "none"


def describe(state: State, now: float) -> list[str | ProgressBar | Text]:
    """The columns of a live row: the state, the time in it, the progress, and what else there is to know."""
    label, seconds, detail = "planned", 0.0, ""
    bar: str | ProgressBar = ""
    if isinstance(state, Waiting):
        label, seconds, detail = "waiting", now - state.asked_at, state.trouble
    elif isinstance(state, Ended):
        label, seconds, detail = state.how, state.ended_at - (state.held_at or state.asked_at), state.reason
    elif isinstance(state, Held):
        label, seconds, detail = "held", now - state.held_at, state.session.url
        if state.session.unreachable:
            detail = f"not answering, given up in {max(0, state.session.time_to_live):.0f} s"
        bar = "until released" if state.until else "until all are held"
        if state.until and math.isfinite(state.until):
            bar = ProgressBar(state.until - state.held_at, min(seconds, state.until - state.held_at), width=16)
    clock = f"{int(seconds) // 60}:{int(seconds) % 60:02}" if state else ""
    return [label, clock, bar, Text(detail, overflow="crop", no_wrap=True)]


async def occupy(name: str, endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Reserve a worker, hold it until cancelled or until it has ended otherwise, and note what happened."""
    asked_at, held_at, how, reason = time.monotonic(), None, "not reserved", ""
    display.rows[name] = Waiting(asked_at)
    display.say(f"{name} waiting for a worker")

    def on_trouble(trouble: str) -> None:
        if trouble and display.rows[name] != Waiting(asked_at, trouble) and not display.on_terminal:
            display.say(f"{name} still waiting: {trouble}")
        display.rows[name] = Waiting(asked_at, trouble)

    try:
        async with reserve(endpoint, args.cost, args.lifetime, args.wait, on_trouble=on_trouble) as session:
            held_at, how = time.monotonic(), "released"
            display.rows[name] = Held(asked_at, held_at, session)
            display.say(f"{name} held after {held_at - asked_at:.1f} s: session {session.session_id}, {session.url}")
            try:
                await session.ended()
                how, reason = "let go", "the worker let go"
            except WorkerLost as error:  # noted at once: the end of the block takes a while, and may be cancelled
                how, reason = "lost", str(error)
    except Exception as error:  # noqa: BLE001  whatever it was, this one has ended and the others go on
        how, reason = "lost" if held_at else "not reserved", " ".join((str(error) or repr(error)).split())
    finally:
        ended_at = time.monotonic()
        display.rows[name] = Ended(asked_at, held_at, ended_at, how, reason)
        held = f" after {ended_at - held_at:.1f} s" if held_at else ""
        display.say(f"{name} {how}{held}{reason and f': {reason}'}")


async def ramp(endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Ramp up, hold all from the moment the last one is held, ramp down, the oldest first. One alone is a ramp too."""
    rows, plateau = display.rows, args.plateau if args.demo else args.hold
    occupying: list[asyncio.Task[None]] = []
    watching = [asyncio.create_task(watch_workers(endpoint, display))] if args.demo else []
    try:
        for name in rows:
            if occupying:
                await asyncio.sleep(args.interval)
            occupying.append(asyncio.create_task(occupy(name, endpoint, args, display)))
        while not all(isinstance(state, (Held, Ended)) for state in rows.values()):
            await asyncio.sleep(0.1)
        until = time.monotonic() + plateau
        for name, state in rows.items():
            if isinstance(state, Held):
                rows[name], until = state._replace(until=until), until + args.interval
        await asyncio.wait(occupying, timeout=None if math.isinf(plateau) else plateau)
        for name, task in zip(rows, occupying):
            if isinstance(rows[name], Held):
                task.cancel()
                await asyncio.wait(occupying, timeout=args.interval)
        if watching:  # the endpoint scale back down
            display.say("watching the workers go")
            await asyncio.wait(watching, timeout=15 if args.local else 60)
    finally:
        for task in (*watching, *occupying):
            task.cancel()
        await asyncio.wait((*watching, *occupying))


async def watch_workers(endpoint: Endpoint, display: Display) -> None:
    """Note how many workers there are, until there is none any more."""
    while True:
        with contextlib.suppress(Exception):  # a display only; the reservations have their own eyes
            states = [worker.status.lower() for worker in await endpoint.get_workers()]
            running, seen = sum(state not in ("stopped", "inactive") for state in states), count(states)
            if seen != display.workers and not display.on_terminal:
                display.say(f"workers: {seen}")
            display.workers = seen
            display.seen.append((time.monotonic(), running))
            if not running and all(isinstance(state, Ended) for state in display.rows.values()):
                return
        await asyncio.sleep(CHECK / 2)


def chart(rows: list[tuple[str, Ended]], workers: list[tuple[float, int]], width: int = 40) -> list[str]:
    """One line per reservation over a common time axis: dots while waiting, equals signs while held; and under them how
    many workers there were."""
    first = min(end.asked_at for _, end in rows)
    last = max([end.ended_at for _, end in rows] + [moment for moment, _ in workers])
    scale = width / max(last - first, 0.001)
    lines = [f"{'':<9}{'0 s':<{width - 8}}{f'{last - first:.0f} s':>8}  . waiting  = held"]
    for name, end in rows:
        held_at = end.ended_at if end.held_at is None else end.held_at
        asked, held, ended = (round((moment - first) * scale) for moment in (end.asked_at, held_at, end.ended_at))
        bar = " " * asked + "." * (held - asked) + "=" * (ended - held)
        times = f"{held_at - end.asked_at:.0f} s, {end.ended_at - held_at:.0f} s, {end.how}"
        lines.append(f"{name:<9}{bar:<{width}}  {times}")
    counts = [" "] * width
    for moment, number in workers:
        place = max(0, min(width - 1, int((moment - first) * scale)))
        counts[place:] = [str(number) if number < 10 else "+"] * (width - place)
    return [*lines, f"{'workers':<9}{''.join(counts)}"] if workers else lines


def number(least: float, most: float, text: str, whole: bool = False, endless: bool = False) -> float:
    """What argparse is to take for a number: one within the bounds; `inf` only if `endless`."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole number' if whole else 'number'}") from None
    if not (least <= value <= most or (endless and value == math.inf)):
        raise argparse.ArgumentTypeError(f"{text} is not within {least:g} and {most:g}")
    return value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="null_client.py", description="Reserve workers of a Vast endpoint.")
    option, week, instances = parser.add_argument, 7 * 86400, "prod, alpha, candidate, local"
    option("--endpoint", metavar="NAME", default=os.environ.get("VAST_ENDPOINT"), help="default: $VAST_ENDPOINT")
    instance = os.environ.get("VAST_INSTANCE") or "prod"
    option("--instance", default=instance, help=f"{instances}; default: $VAST_INSTANCE or prod")
    option("--local", action="store_true", help="run against a stand-in for Vast on this machine")
    option("--demo", action="store_true", help="several reservations, ramped up and down")
    for flag, kind, default, text in (
        ("--hold", partial(number, 0.1, week, endless=True), 180, "seconds to hold, or inf"),
        ("--interval", partial(number, 0.1, week), 30, "demo: seconds between two steps"),
        ("--plateau", partial(number, 0.1, week), 300, "demo: seconds with all held"),
        ("--count", partial(number, 1, 100, whole=True), 3, "demo: how many"),
        ("--cost", partial(number, 1, 1e6, whole=True), 100, "load of one; 100 is one worker"),
        ("--lifetime", partial(number, 1, 86400), 120, "seconds without a keep-alive"),
        ("--wait", partial(number, 0.1, week), 1800, "seconds to wait for a worker"),
    ):
        option(flag, metavar="N", type=kind, default=default, help=f"{text} (default: {default})")
    args = parser.parse_args(arguments)
    if args.instance not in instances.split(", "):
        parser.error(f"argument --instance: {args.instance!r} is none of {instances}")
    if not (args.local or args.endpoint):
        parser.error("argument --endpoint: needed, or $VAST_ENDPOINT, or --local")
    return args


async def connect(stack: contextlib.AsyncExitStack, args: argparse.Namespace, display: Display) -> Endpoint:
    """The endpoint on Vast, or on a LocalVast for the life of the stack."""
    if args.local:
        try:
            from null_local import LocalVast
        except ImportError as error:
            raise argparse.ArgumentError(None, f"--local needs null_local.py beside this file: {error}") from error
        vast = await stack.enter_async_context(LocalVast(len(display.rows), inactivity_timeout=3, on_event=display.say))
        client, name = vast.client(), vast.endpoint_name
    else:
        try:
            key = VastAI().client.api_key  # from the environment, or where `vastai set api-key` saved it
        except RuntimeError:
            raise argparse.ArgumentError(None, "no API key: set VAST_API_KEY, or: vastai set api-key KEY") from None
        client, name = Serverless(key, instance=args.instance), args.endpoint
    await stack.enter_async_context(client)
    endpoints = {endpoint.name: endpoint for endpoint in await client.get_endpoints()}
    if name not in endpoints:
        raise argparse.ArgumentError(None, f"no endpoint {name!r}; there are: {', '.join(endpoints) or 'none'}")
    return endpoints[name]


async def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status. After a signal every session is closed first; a second one ends it at once."""
    caught: list[int] = []
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    display = Display(args.count if args.demo else 1, lambda: loop.call_soon_threadsafe(interrupt, signal.SIGTERM))
    # SIGHUP: the terminal is gone. One that is ignored on purpose (nohup) stays so.
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]

    def interrupt(signum: int) -> None:
        if caught:  # Ctrl-C has ended the reader of a pipe too: that is no second signal
            return
        caught.append(signum)
        if task:
            task.cancel()
        for again in signals:
            loop.remove_signal_handler(again)
            signal.signal(again, lambda *_: os._exit(128 + signum))
        display.live.stop()  # a second signal leaves the terminal as it finds it
        display.say("interrupted, closing")

    for signum in signals:
        loop.add_signal_handler(signum, interrupt, signum)
    with contextlib.closing(display), display.live:
        display.say("connecting")
        try:
            async with contextlib.AsyncExitStack() as stack:
                await ramp(await connect(stack, args, display), args, display)
        except asyncio.CancelledError:
            if not caught:
                raise
            return 128 + caught[0]
        ends = [(name, state) for name, state in display.rows.items() if isinstance(state, Ended)]
        if args.demo:
            display.live.stop()
            display.write("\n".join(chart(ends, display.seen)) + "\n")
    return 0 if all(end.how in ("released", "let go") for _, end in ends) else 1


def main(arguments: list[str] | None = None) -> int:
    try:
        return asyncio.run(run(parse_arguments(arguments)))
    except Exception as error:  # noqa: BLE001  a person gets a line, whatever went wrong on the way to Vast
        print(f"null_client: {error}".replace("\n", " "), file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


if __name__ == "__main__":
    sys.exit(main())
