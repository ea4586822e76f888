"""Reserve null workers: `reserve()` for a dispatcher of your own, and a command to see it work.

    python null_client.py --endpoint NAME            one reservation, held 180 s
    python null_client.py --endpoint NAME --demo     three, ramped up and down
    python null_client.py --endpoint NAME --backlog COMMAND --max N    as many as there are jobs
    python null_client.py --local ...                the same on this machine: no account, no GPU

Exit status: 0 all were held and released, by whichever side; 1 not reserved, lost, or unreachable,
or not all of the output could be written; 2 usage or settings; 128 and the number of a signal (130
after Ctrl-C), with every session closed.

With --backlog: 0 nothing was left to do (--once), 1 stuck or refused for ten minutes; after a
signal what waits is taken back, and what is reserved goes on with its consumers.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # A Ctrl-C while the rest loads shows no traceback; run() takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeGuard

import aiohttp

if TYPE_CHECKING:
    from types import FrameType

    from vastai import Endpoint  # type: ignore[import-untyped]

    from null_display import BacklogDisplay, Display, Screen

LOOK_WAIT = 30.0  # seconds that a look waits on the worker for the end of the session, at most
PAUSE = 2.0  # seconds between two looks at a worker that doesn't wait, or that can't be reached
REQUEST_TIMEOUT = 10.0  # seconds for one request, at most
REFUSALS = 5  # looks in a row at a port that refuses, after which the worker's process has ended
MAX_LIFETIME = 30 * 86400  # seconds; a worker refuses more

CLOSE_TIMEOUT = 3.0  # seconds in which a session has to be closed; callbacks go on without us
CLOSE_TRY = 1.5  # seconds for one try of it
CLOSING = 50  # sessions that are closed at the same time
SWEEP = 5.0  # seconds between two looks of a worker for sessions that have expired

FRONT = 16  # of those who wait for a worker, who poll every second
POLL_RATE = 30  # polls a second of all the others
MAX_ANSWER = 1 << 20  # bytes that are read of an answer

KEY_AGE = 3 * 86400  # seconds after which an endpoint's key is fetched anew, as by the SDK
KEY_FRESH = 5.0  # seconds for which a key that was just fetched isn't fetched again
KEY_TRIES = 3  # refusals of a key in a row, at most

LIST_LAG = 15.0  # seconds by which Vast's list of workers may be behind
LIST_KEPT = 60.0  # seconds for which the last list counts while no newer one comes
LIST_TIMEOUT = 10.0  # seconds for Vast's list
BACKLOG_TIMEOUT = 20.0  # seconds for the backlog to be counted
BACKLOG_OUTPUT = 4096  # bytes of it, at most
STUCK = 3  # reservations that have ended while nothing moved
STUCK_TEXT = (
    f"stuck: {STUCK} reservations have ended and no job has moved, so one is held at a time. "
    "Look at the consumers: do they run, and pull from the queue that is counted here?"
)
LONGEST_PAUSE = 60.0  # seconds between two requests that are likely to be in vain, at most
GIVE_UP = 600.0  # seconds of being stuck or refused after which `once` ends
HOLD_NOTHING = ("stopped", "stopping", "broken", "loading", "unknown")  # workers, on Vast's list

JSON = dict[str, Any]  # an object of it
log = logging.getLogger("null_client")


class ReservationError(Exception):
    """What reserve() and a Reservation raise."""


class NotReserved(ReservationError):
    """No worker within the time, or the autoscaler or the worker refused."""


class Refused(NotReserved):
    """The autoscaler refused, with an HTTP status of 4xx: 401 and 403 are about the key."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class WorkerLost(ReservationError):
    """Unreachable until the time to live had run out, or nothing listens on its port any more."""


class _TryAgain(Exception):
    """A try to get a worker has failed, in a way that may pass. Its text is for a person."""


class _Answer(NamedTuple):
    """What became of a request."""

    status: int  # 0: no answer came
    fields: JSON  # of its JSON object; empty where there is none
    text: str  # the beginning of it, or why there is none
    asked_at: float  # by time.monotonic()
    refused: bool = False  # nothing listens on that port

    @property
    def says_gone(self) -> bool:
        """The worker's own word that it has no such session; a proxy says other things."""
        error = str(self.fields.get("error"))
        words = re.search(r"^(invalid session$|session .*(not |already ))", error)
        return self.status in (400, 410) and words is not None

    def __str__(self) -> str:
        if self.status == 0:
            return self.text
        return f"HTTP {self.status} - {self.text}"


async def _request(
    http: aiohttp.ClientSession,
    method: str,
    url: str,
    timeout: float | None,
    **options: Any,
) -> _Answer:
    """One request, of `timeout` seconds at most. Never raises: no answer is an answer, too."""
    asked_at = time.monotonic()
    bound = aiohttp.ClientTimeout(total=timeout)
    content = b""
    try:
        async with http.request(
            method, url, timeout=bound, allow_redirects=False, **options
        ) as response:
            while len(content) <= MAX_ANSWER:
                chunk = await response.content.readany()
                if not chunk:
                    break
                content += chunk  # one that is cut off is no JSON
    except Exception as error:  # noqa: BLE001  whatever aiohttp raises, nobody answered
        refused = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED
        return _Answer(0, {}, str(error) or "timed out", asked_at, refused)
    fields: object = None
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(content)
    if not isinstance(fields, dict):
        fields = {}
    text = " ".join(content[:300].decode(errors="replace").split())
    return _Answer(response.status, fields, text, asked_at)


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e12


class _Undisturbed(asyncio.Task[Any]):
    """A task that only its owner ends: asyncio.run() cancels all that it finds, clean-ups too.

    No time-out of asyncio's or aiohttp's works inside it: they cancel.
    """

    def cancel(self, msg: object = None) -> bool:
        return False

    async def result_within(self, seconds: float) -> Any:
        """Its result; None when it had none within so long, and was ended.

        For clean-ups, which nobody cancels.
        """
        await asyncio.wait({self}, timeout=seconds)
        super().cancel()
        await asyncio.wait({self})
        if self.cancelled():
            return None
        return self.result()


async def _carry_through(task: _Undisturbed) -> None:
    """Await a clean-up that is bounded in time. A cancellation meanwhile takes effect after it."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


class _PerLoop:
    """What all reservations of one event loop share, while there are any."""

    _of: ClassVar[dict[asyncio.AbstractEventLoop, _PerLoop]] = {}

    def __init__(self) -> None:
        self.users = 0
        # Not the SDK's own session: that belongs to the loop in which its client was opened.
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self.certificate = asyncio.Lock()  # the first one downloads it, for all
        self.fetching_key = asyncio.Lock()
        self.key_fetched_at: dict[Endpoint, float] = {}
        self.closing = asyncio.Semaphore(CLOSING)
        self.waiting = 0
        self._front = asyncio.Semaphore(FRONT)
        self._pace = asyncio.Lock()

    @classmethod
    @contextlib.asynccontextmanager
    async def entered(cls) -> AsyncIterator[_PerLoop]:
        """The running loop's, for the length of the block."""
        loop = asyncio.get_running_loop()
        shared = cls._of.get(loop)
        if shared is None:
            shared = cls._of[loop] = cls()
        shared.users += 1
        try:
            yield shared
        finally:
            shared.users -= 1
            if shared.users == 0:
                del cls._of[loop]
                await _carry_through(_Undisturbed(shared.http.close()))

    @contextlib.contextmanager
    def place(self) -> Iterator[asyncio.Task[bool]]:
        """A place among those who wait, first come first served: it is done once it is in front."""
        self.waiting += 1
        place = asyncio.create_task(self._front.acquire())
        try:
            yield place
        finally:
            self.waiting -= 1
            if place.done() and not place.cancelled():
                # Who is next polls at once, so that is not to be before this one's next poll.
                asyncio.get_running_loop().call_later(1.0, self._front.release)
            place.cancel()

    async def turn(self, place: asyncio.Task[bool], seconds: float) -> None:
        """Wait until a poll may be made, so long at most: those behind share a rate."""
        if place.done():
            return
        slot = asyncio.create_task(self._slot())
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({place, slot}, timeout=seconds, return_when=first)
        finally:
            slot.cancel()

    async def _slot(self) -> None:
        """One after the other. Who has left takes no time of those who come after."""
        async with self._pace:
            await asyncio.sleep(1 / POLL_RATE)


def _require_names(owner: object, *names: str) -> None:
    """Raises NotReserved for the first that is missing."""
    for name in names:
        if not hasattr(owner, name):
            raise NotReserved(
                f"this vastai-sdk is not known to work (no {name!r}); 1.3 up to below 2 is"
            )


class _Vast:
    """The SDK's names that it doesn't promise, under plain ones, and Vast's routes behind them.

    Raises NotReserved where a name is missing.
    """

    def __init__(self, endpoint: Endpoint, shared: _PerLoop) -> None:
        _require_names(endpoint, "client", "id", "name", "api_key", "data", "last_refresh")
        client = endpoint.client
        _require_names(client, "api_key", "autoscaler_url", "vast_web_url")
        _require_names(client, "get_ssl_context", "is_open")
        self._endpoint = endpoint
        self._client = client
        self._shared = shared
        self._refusals = 0  # of the endpoint's key, in a row

    async def tls(self) -> Any:
        """The context that trusts Vast's workers. Raises _TryAgain."""
        try:
            async with self._shared.certificate:
                return await self._client.get_ssl_context()
        except Exception as error:  # the SDK has no class for it
            raise _TryAgain(f"no certificate: {str(error) or type(error).__name__}") from error

    async def route(self, asked: JSON, timeout: float) -> _Answer:
        """Ask the router for a worker. Raises NotReserved, or _TryAgain."""
        if not self._client.is_open():
            raise NotReserved("the Serverless client is closed")
        await self._renew_old_key()
        key = self._endpoint.api_key
        answer = await _request(
            self._shared.http,
            "POST",
            f"{self._client.autoscaler_url}/route/",
            timeout,
            json={"endpoint": self._endpoint.name, "api_key": key, **asked},
            headers={"Authorization": f"Bearer {key}"},
            ssl=await self.tls(),
        )
        if answer.status == 0:
            raise _TryAgain(f"the autoscaler can't be reached: {answer}")
        if answer.status in (401, 403):
            await self._renew_refused_key(key, answer)
            raise _TryAgain(f"the autoscaler refused the endpoint's key: {answer}")
        self._refusals = 0
        return answer

    async def _renew_refused_key(self, key: str, answer: _Answer) -> None:
        """Vast may have changed the key. Raises Refused where that isn't so, or _TryAgain."""
        self._refusals += 1
        if self._refusals < KEY_TRIES:
            await self._fetch_key(key, f"the autoscaler refuses: {answer}; ")
        if self._refusals == KEY_TRIES or self._endpoint.api_key == key:
            raise Refused(f"the autoscaler refuses: {answer}", answer.status)

    async def _renew_old_key(self) -> None:
        """As the SDK does. The old one may still be good: it is used where no other can be had."""
        if time.time() < self._endpoint.last_refresh + KEY_AGE:
            return
        self._endpoint.last_refresh = time.time() - KEY_AGE + 60  # tried again in a minute
        with contextlib.suppress(_TryAgain):
            await self._fetch_key(self._endpoint.api_key)

    async def _fetch_key(self, old: str, trouble: str = "") -> None:
        """Fetch the endpoint's key, unless another reservation just has. Raises _TryAgain."""
        fetched_at = self._shared.key_fetched_at
        async with self._shared.fetching_key:
            just_fetched = time.monotonic() < fetched_at.get(self._endpoint, 0) + KEY_FRESH
            if just_fetched or self._endpoint.api_key != old:
                return
            answer = await _request(
                self._shared.http,
                "GET",
                f"{self._client.vast_web_url}/api/v0/endptjobs/{self._endpoint.id}/",
                REQUEST_TIMEOUT,
                params={"api_key": self._client.api_key},
                headers={"Authorization": f"Bearer {self._client.api_key}"},
                ssl=await self.tls(),
            )
            endpoint = answer.fields.get("result")
            key = endpoint.get("api_key") if isinstance(endpoint, dict) else None
            if answer.status != 200 or not isinstance(key, str):
                raise _TryAgain(f"{trouble}the endpoint's key can't be fetched anew: {answer}")
            fetched_at[self._endpoint] = time.monotonic()
            self._endpoint.data.api_key = key
            self._endpoint.last_refresh = time.time()


async def _end_session(http: aiohttp.ClientSession, url: str, session: JSON) -> bool:
    """Tell the worker to end a session, again and again for CLOSE_TIMEOUT; whether it is gone.

    For clean-ups, which nobody cancels.
    """
    deadline = time.monotonic() + CLOSE_TIMEOUT
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        asking = _Undisturbed(_request(http, "POST", f"{url}/session/end", None, json=session))
        answer = await asking.result_within(min(left, CLOSE_TRY))
        if answer is not None and (answer.says_gone or answer.fields.get("ended") is True):
            return True
        await asyncio.sleep(0.2)


def keep_alive_due(time_to_live: float, lifetime: float) -> float:
    """Seconds until the next keep-alive.

    One adds a lifetime to what is left, so it waits for the last half of one: the time to live then
    stays between half a lifetime and one and a half.
    """
    return time_to_live - lifetime / 2


def _date(moment: float) -> str:
    """Of a time by time.time(), for a person."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


class Reservation:
    """A worker that is yours. Made by reserve(), which also closes it."""

    def __init__(
        self,
        shared: _PerLoop,
        http: aiohttp.ClientSession,
        auth_data: JSON,
        lifetime: float,
        created: _Answer,
    ) -> None:
        self.session_id: str = created.fields["session_id"]
        self.url: str = auth_data["url"]
        self.auth_data = auth_data  # the `session_auth` of the worker's own routes
        self.lifetime = lifetime  # seconds
        self.unreachable = False
        self._shared = shared
        self._http = http
        self._moment = min(PAUSE, lifetime / 8)  # seconds between two tries of anything
        self._timeout = max(1.0, min(REQUEST_TIMEOUT, lifetime / 4))
        # The time to live began when the worker created the session: with a slow answer, long ago.
        self._expires = created.asked_at + lifetime
        self._clocks_differ_by = self._expires - created.fields["expiration"]
        self._no_keep_alive_before = 0.0
        self._refusals = 0  # of its port, in a row
        self._worker_waits = True  # with the answer to a look, for as long as it is asked to
        self._handed_over = False
        self._closing: _Undisturbed | None = None
        self._open = True  # the worker still has it, as far as we know
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: BaseException | None = None  # what ended() raises once it has ended
        self._keeper = asyncio.create_task(self._keep())
        self._keeper.add_done_callback(self._keeper_is_done)

    @property
    def time_to_live(self) -> float:
        """Seconds until the worker frees itself, should nobody keep it alive any more."""
        return self._expires - time.monotonic()

    async def ended(self, timeout: float | None = None) -> bool:
        """Wait until the worker has let go: released, expired, restarted, or closed from here.

        False when `timeout` seconds have passed without that. Raises WorkerLost.
        """
        await asyncio.wait({self._ended}, timeout=timeout)
        if not self._ended.done():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def hand_over(self) -> None:
        """From now on the consumer keeps the session alive, with `POST /renew`.

        The end of the block doesn't end it.
        """
        self._handed_over = True

    async def close(self) -> None:
        """End the session. Quiet when it is gone already.

        A warning in the log when the worker doesn't answer.
        """
        await _carry_through(self._begin_closing())

    async def _keep(self) -> None:
        """Keep the session alive, and look at it, until the worker has it no more or is lost."""
        while self._open:
            due = self._keep_alive_due()
            if due <= 0.05 and not self.unreachable:  # a look before it would have no time to wait
                await self._ping()
            else:
                await self._look(due)
            if self.unreachable or not self._worker_waits:
                await asyncio.sleep(self._moment)

    def _keep_alive_due(self) -> float:
        """Seconds until the next keep-alive."""
        if self._handed_over:
            return math.inf
        not_before = self._no_keep_alive_before - time.monotonic()
        return max(keep_alive_due(self.time_to_live, self.lifetime), not_before)

    async def _ping(self) -> None:
        """A keep-alive. It adds a lifetime; one that may have done so isn't repeated at once."""
        asked_at = time.monotonic()
        self._no_keep_alive_before = asked_at + self._moment
        ping = await self._ask("/ping", self._timeout, auth_data=self.auth_data, payload={})
        if ping.status == 0:
            self._not_answered(ping)
        elif ping.status == 200 and "result" in ping.fields:
            self._expires += self.lifetime
            self._no_keep_alive_before = asked_at + self.lifetime / 2
        elif not ping.says_gone:  # gone, as the next look will say
            log.warning("keep-alive refused session=%s: %s", self.session_id, ping)

    async def _look(self, keep_alive_due: float) -> None:
        """Ask for the session. The worker answers when it has ended, or a keep-alive is due."""
        wait = 0.0
        if not self.unreachable:
            wait = max(0.0, min(LOOK_WAIT, self.lifetime / 4, keep_alive_due))
        timeout = wait + self._timeout
        look = await self._ask("/session/get", timeout, session_auth=self.auth_data, wait=wait)
        now = time.monotonic()
        expiration = look.fields.get("expiration")
        if look.says_gone:
            self._gone()
        elif look.status == 200 and _is_number(expiration):
            # One that answers at once, while nothing has happened, doesn't wait.
            self._worker_waits = now - look.asked_at >= min(wait, PAUSE) / 2
            self._expires = expiration + self._clocks_differ_by
            self._refusals = 0
            if self.unreachable:
                self.unreachable = False
                # A keep-alive that wasn't answered may just be arriving.
                self._no_keep_alive_before = now + self._moment
        else:
            self._not_answered(look)

    def _not_answered(self, answer: _Answer) -> None:
        self.unreachable = True
        self._refusals = self._refusals + 1 if answer.refused else 0
        # Not one whose time ran out while this was asked: this process may have stood still.
        if self._expires <= answer.asked_at or self._refusals == REFUSALS:
            self._gone(WorkerLost(f"worker {self.url} can't be reached: {answer}"))

    def _keeper_is_done(self, keeper: asyncio.Task[None]) -> None:
        """Whoever waits for the end must not wait for ever, should the keeper have failed."""
        if not keeper.cancelled() and keeper.exception() is not None:
            self._set_ended(keeper.exception())

    def _gone(self, failure: BaseException | None = None) -> None:
        """The worker has it no more; or, with a failure, there is nobody to ask."""
        self._open = False
        self._set_ended(failure)

    def _set_ended(self, failure: BaseException | None) -> None:
        """Whoever waits in ended() is told."""
        if not self._ended.done():
            self._failure = failure
            self._ended.set_result(None)

    async def _leave(self) -> None:
        """The block has ended."""
        if self._handed_over and self._closing is None:
            await self._stop_keeping()
            why = "the block has ended, and the consumer holds the session"
            self._set_ended(ReservationError(why))
        else:
            await asyncio.wait({self._begin_closing()})
        await self._http.close()

    def _begin_closing(self) -> _Undisturbed:
        """Once, whoever asks for it."""
        if self._closing is None:
            self._closing = _Undisturbed(self._close())
        return self._closing

    async def _close(self) -> None:
        await self._stop_keeping()
        if not self._open:
            return
        async with self._shared.closing:
            session = {"session_id": self.session_id, "session_auth": self.auth_data}
            closed = await _end_session(self._http, self.url, session)
        if not closed:
            until = _date(time.time() + self.time_to_live + SWEEP)
            stays = f"{self.url} stays reserved until {until}"
            log.warning("not closed session=%s: %s", self.session_id, stays)
        self._gone()

    async def _stop_keeping(self) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})

    async def _ask(self, route: str, timeout: float, **body: object) -> _Answer:
        body["session_id"] = self.session_id
        return await _request(self._http, "POST", self.url + route, timeout, json=body)


def poll_pause(failures: int) -> float:
    """Seconds until the next poll, after so many failures in a row: 1, 1, 2, 4, 5, 5 ..."""
    doublings = min(max(0, failures - 1), 3)
    return min(2.0**doublings, 5.0)


class _Request:
    """One request for a worker, from the first poll of the router to a session on a worker."""

    def __init__(self, vast: _Vast, shared: _PerLoop, cost: float, payload: JSON) -> None:
        self._vast = vast
        self._shared = shared
        self._cost = cost
        self._payload = payload
        self._index: float = 0  # the router's number for it, by which it keeps its place
        self._unreached: Counter[str] = Counter()  # workers that were named, by URL
        self._unreached_worker = ""  # what happened to the last one

    async def wait(self, seconds: float, on_trouble: Callable[[str], object]) -> Reservation:
        """Ask the router, create, held. All but a create is cancelled with the caller."""
        deadline = time.monotonic() + seconds
        trouble = ""
        failures = 0  # in a row
        pause = 0.0
        with self._shared.place() as place:
            while True:
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                await self._shared.turn(place, deadline - time.monotonic())
                left = deadline - time.monotonic()
                if left <= 0:
                    at_last = f"; at last: {trouble}" if trouble else ""
                    raise NotReserved(f"no worker within {seconds:g} s{at_last}")
                try:
                    auth_data = await self._poll(min(REQUEST_TIMEOUT, left))
                    if auth_data is not None:
                        return await self._create(auth_data)
                    failures = 0
                    trouble = self._unreached_worker
                except _TryAgain as error:
                    failures += 1
                    trouble = str(error)
                pause = poll_pause(failures) * random.uniform(0.8, 1.2)
                on_trouble(trouble)

    async def _poll(self, timeout: float) -> JSON | None:
        """The router's word on which worker to ask, if any. Raises _TryAgain, NotReserved."""
        # Long enough for those behind a long line, who poll seldom, to keep their places.
        replay_timeout = max(60.0, 3 * self._shared.waiting / POLL_RATE)
        asked = {"cost": self._cost, "request_idx": self._index, "replay_timeout": replay_timeout}
        answer = await self._vast.route(asked, timeout)
        if 400 <= answer.status < 500 and answer.status not in (408, 429):
            raise Refused(f"the autoscaler refuses: {answer}", answer.status)
        if answer.status != 200 or not answer.fields:
            raise _TryAgain(f"the autoscaler answers {answer}")
        index = answer.fields.get("request_idx")
        if _is_number(index) and index:  # an answer may lack it: a new request would be more load
            self._index = index
        url = answer.fields.get("url")
        if url is None:
            return None
        if not isinstance(url, str):
            raise _TryAgain(f"the autoscaler answers {answer}")
        return answer.fields

    async def _create(self, auth_data: JSON) -> Reservation:
        """Open a session on the worker that the router has named. Raises _TryAgain, NotReserved.

        Cancelled, it waits for the answer all the same and ends the session: nobody else would know
        of it.
        """
        url = auth_data["url"]
        http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=await self._vast.tls()),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        body = {"auth_data": auth_data, "payload": self._payload}
        creating = _Undisturbed(
            _request(http, "POST", f"{url}/session/create", None, json=body),
        )
        try:
            await asyncio.wait({creating}, timeout=REQUEST_TIMEOUT)
            if creating.done():
                created = creating.result()
            else:
                created = _Answer(0, {}, "timed out", time.monotonic())
            self._check_created(url, created)
        except BaseException:
            discarding = _Undisturbed(self._discard(http, auth_data, creating))
            await _carry_through(discarding)
            raise
        return Reservation(self._shared, http, auth_data, self._payload["lifetime"], created)

    def _check_created(self, url: str, created: _Answer) -> None:
        """Raises _TryAgain or NotReserved where the answer to a create is no session."""
        if created.status == 0:
            self._unreached[url] += 1
            times = f"try {self._unreached[url]}"
            self._unreached_worker = f"worker {url} can't be reached, {times}: {created}"
            raise _TryAgain(self._unreached_worker)
        if created.status in (401, 413, 422) and "error" in created.fields:
            raise NotReserved(f"{url} refuses: {created}")
        named = isinstance(created.fields.get("session_id"), str)
        if not (created.status == 201 and named and _is_number(created.fields.get("expiration"))):
            raise _TryAgain(f"{url} answers {created}")

    async def _discard(
        self,
        http: aiohttp.ClientSession,
        auth_data: JSON,
        creating: _Undisturbed,
    ) -> None:
        """Nobody wants the session any more that may have been created."""
        url = auth_data["url"]
        created = await creating.result_within(CLOSE_TIMEOUT - 0.5)
        if created is None:
            until = _date(time.time() + self._payload["lifetime"] + SWEEP)
            log.warning("no answer to a create: %s may stay reserved until %s", url, until)
        elif isinstance(created.fields.get("session_id"), str):
            session = {"session_id": created.fields["session_id"], "session_auth": auth_data}
            async with self._shared.closing:
                await _end_session(http, url, session)
        await http.close()


def _check_lifetime(lifetime: object) -> None:
    if isinstance(lifetime, bool) or not isinstance(lifetime, (int, float)):
        raise TypeError(f"lifetime is {lifetime!r}: it should be a number of seconds")
    if not 0 < lifetime <= MAX_LIFETIME:  # nor is NaN
        bounds = f"over 0 and at most {MAX_LIFETIME} seconds (30 days)"
        raise ValueError(f"lifetime is {lifetime!r}: it should be {bounds}")


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
    """Reserve a worker of the endpoint for the length of the block, and keep the session alive.

    `cost` is the load that the reservation reports; 100 is one worker. `lifetime` is how many
    seconds the worker keeps it without a keep-alive, 30 days at most; a dispatcher that dies frees
    its worker within 1.5 lifetimes plus 5 s. `wait` is how many seconds to wait for a worker. When
    the session ends the worker POSTs `on_close_payload` to `on_close_route`, a URL or a path on the
    consumer. `on_trouble` is told why the last try to get a worker failed, and "" when there is no
    trouble any more; what it raises comes out of here.

    Raises NotReserved; Refused, one of these, where the autoscaler refuses; ValueError for a
    lifetime out of bounds; TypeError for what JSON can't hold.
    """
    payload = {
        "lifetime": lifetime,
        "on_close_route": on_close_route,
        "on_close_payload": on_close_payload,
    }
    _check_lifetime(lifetime)
    try:
        json.dumps([cost, payload], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"not to be sent as JSON: {error}") from error
    async with _PerLoop.entered() as shared:
        request = _Request(_Vast(endpoint, shared), shared, cost, payload)
        reservation = await request.wait(wait, on_trouble)
        try:
            yield reservation
        finally:
            await _carry_through(_Undisturbed(reservation._leave()))


class Jobs(NamedTuple):
    """A backlog: the jobs that aren't done."""

    waiting: int  # where only one number is known, those in hand too
    in_hand: int | None = None

    @property
    def total(self) -> int:
        return self.waiting + (self.in_hand or 0)


class Limits(NamedTuple):
    """What the caller of follow() has set."""

    most: int  # reservations
    jobs_per_worker: int = 1
    settle: float = 30.0  # seconds

    def workers_for(self, jobs: int) -> int:
        """Rounded up; exact for numbers of any size."""
        return -(-jobs // self.jobs_per_worker)


class Look(NamedTuple):
    """What follow() sees at one moment, in numbers. Times are in seconds, by one steady clock."""

    at: float
    jobs: Jobs | None  # None: not known
    listed: int | None  # reserved workers on Vast's list, whoever's they are; None: not known
    most_own: int = 0  # own ones held at a time, from LIST_LAG before the list on
    own: Sequence[float] = ()  # when each own one that is held was opened
    last_opened: float = -math.inf  # when the latest own one was opened, held or not
    asked: int = 0  # own requests that wait for a worker
    ended: int = 0  # own reservations that have ended since the start
    refused_until: float | None = None  # while Vast refuses: when to ask again


class Course(NamedTuple):
    """What the looks so far leave behind for the next one."""

    not_before: float | None = None  # when to ask for the first one; None: no list has come yet
    others: tuple[tuple[float, int], ...] = ()  # when, and how many others had reserved
    totals: tuple[tuple[float, int], ...] = ()  # when, and how many jobs there were
    jobs: Jobs | None = None  # the last ones that were known
    fell_at: float = -math.inf  # when fewer were waiting than at the look before
    ended_before: int = 0  # own ones that had ended when something last moved
    stuck_since: float | None = None
    pause: float = 1.0  # seconds from the last one to the next, while stuck
    none_since: float | None = None  # when the first of the latest looks found no job
    looks_at_none: int = 0


class Decision(NamedTuple):
    """What to do now."""

    wanted: int = 0  # workers, in all
    others: int = 0  # reserved by others
    ask: int = 0  # for so many more
    take_back: int = 0  # so many requests, the latest ones


def decide(limits: Limits, course: Course, look: Look) -> tuple[Course, Decision | None]:
    """How many workers to ask for or take back, by numbers alone. None: not known, do neither."""
    course = _note_jobs(limits, _note_list(course, look), look)
    if look.jobs is None or not course.others:
        return course, None
    others = max(reserved for _, reserved in course.others)
    reserved = len(look.own) + others
    wanted = min(limits.most, limits.workers_for(look.jobs.total))
    most_wanted = min(limits.most, limits.workers_for(max(total for _, total in course.totals)))
    ask = min(wanted - reserved - look.asked, _for_those_waiting(limits, course, look, look.jobs))
    if course.not_before is None or look.at < course.not_before:
        ask = 0
    if look.refused_until is not None:
        ask = min(ask, 1 - look.asked) if look.at >= look.refused_until else 0
    take_back = look.asked - max(0, most_wanted - reserved)
    if course.stuck_since is not None:
        course, ask = _one_at_a_time(course, course.stuck_since, look, ask)
        take_back = max(take_back, look.asked - 1)
    return course, Decision(wanted, others, max(0, ask), max(0, take_back))


def nothing_is_left(limits: Limits, course: Course, at: float) -> bool:
    """Whether each look of the last `settle` seconds, two at least, found no job."""
    if course.none_since is None or course.looks_at_none < 2:
        return False
    return at - course.none_since >= limits.settle


def _for_those_waiting(limits: Limits, course: Course, look: Look, jobs: Jobs) -> int:
    """How many more the waiting jobs need. One that was opened since fewer were waiting last may be
    loading for minutes before it pulls a job: it isn't to be opened twice."""
    loading = sum(opened_at > course.fell_at for opened_at in look.own)
    return limits.workers_for(jobs.waiting) - look.asked - loading


def _one_at_a_time(course: Course, stuck_since: float, look: Look, ask: int) -> tuple[Course, int]:
    """While stuck: one, and the next after a pause that doubles."""
    due = max(stuck_since, look.last_opened) + course.pause
    ask = min(ask, 1 - look.asked - len(look.own))
    if ask <= 0 or look.at < due:
        return course, 0
    return course._replace(pause=min(LONGEST_PAUSE, 2 * course.pause)), ask


def _note_list(course: Course, look: Look) -> Course:
    """Reserved by others is what the list shows beyond our own. It may lag: what we have just ended
    is not somebody else's, nor is what it doesn't show yet free."""
    if look.listed is None:
        last = [each for each in course.others[-1:] if each[0] >= look.at - LIST_KEPT]
        return course._replace(others=_since(look.at - LIST_LAG, course.others) or tuple(last))
    newest = (look.at, max(0, look.listed - look.most_own))
    not_before = course.not_before
    if not_before is None:  # what a predecessor has just opened may not be on the list yet
        not_before = look.at + LIST_LAG if look.listed else look.at
    others = (*_since(look.at - LIST_LAG, course.others), newest)
    return course._replace(others=others, not_before=not_before)


def _note_jobs(limits: Limits, course: Course, look: Look) -> Course:
    jobs = course.jobs  # the last number stands until there is a new one
    none_since = None
    looks_at_none = 0
    if look.jobs is not None:
        course = _note_movement(course, look, look.jobs)
        jobs = look.jobs
        if jobs.total == 0:
            none_since = look.at if course.none_since is None else course.none_since
            looks_at_none = course.looks_at_none + 1
    totals = _since(look.at - limits.settle, course.totals)
    if jobs is not None:
        totals = (*totals, (look.at, jobs.total))
    return course._replace(
        jobs=jobs, totals=totals, none_since=none_since, looks_at_none=looks_at_none
    )


def _note_movement(course: Course, look: Look, jobs: Jobs) -> Course:
    """Stuck is when reservations end, one after the other, and the jobs stay as they are."""
    before = course.jobs or jobs
    fell = jobs.waiting < before.waiting
    if fell:
        course = course._replace(fell_at=look.at)
    if fell or jobs.waiting == 0 or jobs.in_hand != before.in_hand:
        return course._replace(ended_before=look.ended, stuck_since=None, pause=1.0)
    if course.stuck_since is None and look.ended - course.ended_before >= STUCK:
        return course._replace(stuck_since=look.at)
    return course


def _since(moment: float, notes: Iterable[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    return tuple(note for note in notes if note[0] > moment)


class NotCounted(Exception):
    """The backlog isn't known. Its text says why."""


def as_jobs(answer: object) -> Jobs:
    """One or two whole numbers, not negative. Raises NotCounted."""
    numbers = list(answer) if isinstance(answer, (tuple, list)) else [answer]
    if numbers[1:] == [None]:  # Jobs(7)
        numbers = numbers[:1]
    whole = [each for each in numbers if isinstance(each, int) and not isinstance(each, bool)]
    if len(numbers) not in (1, 2) or len(whole) != len(numbers) or min(whole) < 0:
        raise NotCounted(f"{one_line(repr(answer)):.80} is not one or two whole numbers")
    return Jobs(*whole)


async def run_backlog(line: str) -> Jobs:
    """What a shell line prints. Raises NotCounted.

    It runs in a session of its own, without a terminal, and nothing of it is left running.
    """
    process = subprocess.Popen(
        ["sh", "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = await _read_to_end(process)
    finally:
        _end_group(process)
    last = (errors.decode(errors="replace").split("\n") or [""])[-1]
    said = f": {one_line(last)}" if last else ""
    if process.returncode:
        ended = f"exit status {process.returncode}"
        if process.returncode < 0:
            ended = f"killed by signal {-process.returncode}"
        raise NotCounted(ended + said)
    words = output.decode(errors="replace").split()
    if not words:
        raise NotCounted(f"it printed nothing{said}")
    if len(words) > 2 or not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        raise NotCounted(f"it printed {' '.join(words)!r:.60}, not one or two whole numbers{said}")
    return Jobs(*map(int, words))


async def _read_to_end(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What it writes to standard output, and the end of what it writes to standard error.

    Until it ends, not until these are closed: something that it has left running may hold them.
    """
    assert process.stdout and process.stderr
    for pipe in (process.stdout, process.stderr):
        os.set_blocking(pipe.fileno(), False)
    output = errors = b""
    while True:
        ended = process.poll() is not None
        output += _read(process.stdout)
        errors = (errors + _read(process.stderr)).rstrip()[-BACKLOG_OUTPUT:]
        if len(output) > BACKLOG_OUTPUT:
            raise NotCounted("it prints without end")
        if ended:
            return output, errors
        await asyncio.sleep(0.02)


def _read(pipe: IO[bytes]) -> bytes:
    """What is there now: 64 KiB at most, as a pipe holds."""
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), 1 << 16)
    return b""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in a driver
        process.wait(1)


def one_line(text: object) -> str:
    """For a person: printable, one line, and not long."""
    text = str(text) or repr(text)  # an exception may have nothing to say
    printable = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(printable.split())[:300]


def worker_word(status: str, load: float) -> str:
    """What a person would call a worker: reserved, free, loading, stopped or broken.

    `status` is Vast's word for it: `idle` for every one that is loaded, reserved or not. One that
    isn't known stays as it is.
    """
    status = status.lower()
    if status in ("stopped", "inactive"):
        return "stopped"
    if status in ("error", "errored", "unavail"):
        return "broken"
    if status in ("created", "creating", "loading", "model_loading", "rebooting", "starting"):
        return "loading"
    if status == "destroying":
        return "stopping"
    if status != "idle":
        return status
    return "reserved" if load > 0 else "free"


class _Refusals:
    """Vast's, one after the other: the pauses between the requests get longer."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.until: float | None = None  # when to ask again; None: it doesn't refuse
        self._pause = 1.0

    def note(self, error: Exception) -> None:
        now = time.monotonic()
        if self.until is not None and now < self.until:
            return  # one of several that were asked for at once
        if self.since is None:
            self.since = now
        if isinstance(error, Refused) and error.status in (401, 403):
            self._pause = LONGEST_PAUSE
        self.until = now + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    def are_over(self) -> None:
        self.since = None
        self.until = None
        self._pause = 1.0


class _Troubles:
    """What goes wrong now, by kind. Each is told once, until it has been over."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._texts: dict[str, str] = {}

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts.values())

    def set(self, kind: str, text: str) -> None:
        """`text` is empty when there is none, or none any more."""
        if not text:
            self._texts.pop(kind, None)
            return
        is_new = kind not in self._texts
        self._texts[kind] = text
        if is_new:
            self._tell(text)


class _Held:
    """The own reservations."""

    def __init__(self) -> None:
        self.own: dict[asyncio.Task[None], float] = {}  # when each was opened
        self.last_opened = -math.inf
        self.ended = 0
        self.some_end = asyncio.Event()
        self._counts: list[tuple[float, int]] = []  # when, and how many were held from then on

    @contextlib.contextmanager
    def holding(self, task: asyncio.Task[None]) -> Iterator[None]:
        self.last_opened = time.monotonic()
        self.own[task] = self.last_opened
        self._counts.append((time.monotonic(), len(self.own)))
        try:
            yield
        finally:
            del self.own[task]
            self.ended += 1
            self._counts.append((time.monotonic(), len(self.own)))
            self.some_end.set()

    def most_since(self, moment: float) -> int:
        """How many were held at a time, from then on."""
        before = [count for at, count in self._counts if at <= moment]
        self._counts = [(moment, before[-1] if before else 0), *_since(moment, self._counts)]
        return max(count for _, count in self._counts)


async def _within(seconds: float, work: Awaitable[object]) -> Any:
    """Its result. Raises NotCounted when there is none within so many seconds."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise NotCounted(f"no answer within {seconds:g} s")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=1)  # it ends what it has started
        if task.done() and not task.cancelled():
            task.exception()  # where we were cancelled nobody else asks for it


class Progress(NamedTuple):
    """How follow() gets on."""

    jobs: Jobs | None = None  # the last ones that were known
    wanted: int = 0  # workers
    own: int = 0  # reservations that are held
    others: int = 0  # reserved by others
    asked: int = 0  # requests that wait for a worker
    troubles: tuple[str, ...] = ()  # what goes wrong


class Stuck(ReservationError):
    """follow() with `once`: for ten minutes nothing has moved, or Vast has refused."""


async def follow(
    endpoint: Endpoint,
    backlog: Callable[[], Awaitable[object]],
    most: int,
    *,
    jobs_per_worker: int = 1,
    every: float = 5.0,
    settle: float = 30.0,
    once: bool = False,
    cost: float = 100,
    lifetime: float = 120,
    on_progress: Callable[[Progress], object] = lambda _: None,
    on_trouble: Callable[[str], object] = log.warning,
) -> None:
    """Reserve as many workers as there are jobs for, and hand each over to its consumer at once.

    `backlog` is asked every `every` seconds how many jobs aren't done: it answers with one number,
    or with a pair, those that wait and those in hand. `most` is how many reservations there may be,
    `jobs_per_worker` for how many jobs one worker is enough. A request that still waits is taken
    back when there have been too many for `settle` seconds. `cost` and `lifetime` are reserve()'s.

    Runs until it is cancelled: what waits is then taken back, what is reserved goes on. With `once`
    it returns when nothing is left to do and nothing is reserved, and raises Stuck after ten
    minutes in which nothing moved, or Vast refused. `on_progress` is told of each change, and
    `on_trouble`, once and in a line, what goes wrong.
    """
    limits = Limits(most, jobs_per_worker, settle)
    reserve_one = partial(reserve, endpoint, cost, lifetime, math.inf)
    follower = _Follower(endpoint, backlog, limits, reserve_one, on_progress, on_trouble)
    try:
        while True:
            began_at = time.monotonic()
            await follower.look()
            if once and follower.is_over():
                return
            await follower.until_next_look(began_at, every)
    finally:
        await follower.leave()


class _Follower:
    """follow() at work: what it holds, and what it knows."""

    def __init__(
        self,
        endpoint: Endpoint,
        backlog: Callable[[], Awaitable[object]],
        limits: Limits,
        reserve_one: Callable[..., contextlib.AbstractAsyncContextManager[Reservation]],
        on_progress: Callable[[Progress], object],
        on_trouble: Callable[[str], object],
    ) -> None:
        self._endpoint = endpoint
        self._backlog = backlog
        self._limits = limits
        self._reserve_one = reserve_one
        self._on_progress = on_progress
        self._troubles = _Troubles(on_trouble)
        self._refusals = _Refusals()
        self._held = _Held()
        self._requests: dict[asyncio.Task[None], str] = {}  # the oldest first, with their troubles
        self._tasks: set[asyncio.Task[None]] = set()  # of all, those that are taken back included
        self._course = Course()
        self._decision = Decision()
        self._list_trouble = ""  # why there is no newer one
        self._leaving = False

    async def look(self) -> None:
        """See how things are, decide, and do it."""
        began_at = time.monotonic()
        jobs, listed = await asyncio.gather(self._count_jobs(), self._count_listed())
        look = Look(
            at=time.monotonic(),
            jobs=jobs,
            listed=listed,
            most_own=self._held.most_since(began_at - LIST_LAG),
            own=tuple(self._held.own.values()),
            last_opened=self._held.last_opened,
            asked=len(self._requests),
            ended=self._held.ended,
            refused_until=self._refusals.until,
        )
        self._course, decision = decide(self._limits, self._course, look)
        if decision is not None:
            self._decision = decision
            self._take_back(decision.take_back)
            self._ask(decision.ask)
        self._note_lasting_troubles()
        self._show()

    async def until_next_look(self, began_at: float, every: float) -> None:
        """`every` seconds after the last one; a second after it when a reservation has ended."""
        ending = asyncio.ensure_future(self._held.some_end.wait())
        try:
            await asyncio.wait({ending}, timeout=began_at + every - time.monotonic())
        finally:
            ending.cancel()
        await asyncio.sleep(began_at + min(1.0, every) - time.monotonic())
        self._held.some_end.clear()

    def is_over(self) -> bool:
        """Nothing is left to do, and nothing reserved. Raises Stuck."""
        now = time.monotonic()
        for since in (self._course.stuck_since, self._refusals.since):
            if since is not None and now - since >= GIVE_UP:
                raise Stuck("given up after 10 minutes: " + "; ".join(self._troubles.texts))
        if self._requests or self._held.own or self._decision.others:
            return False
        return nothing_is_left(self._limits, self._course, now)

    async def leave(self) -> None:
        """Take back what waits. What is reserved goes on without us."""
        self._leaving = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # What a look asks for

    async def _count_jobs(self) -> Jobs | None:
        try:
            jobs = as_jobs(await _within(BACKLOG_TIMEOUT, self._backlog()))
        except Exception as error:  # noqa: BLE001  whatever it was, the number isn't known, so not 0
            self._troubles.set("jobs", f"backlog: {one_line(error)}")
            return None
        self._troubles.set("jobs", "")
        return jobs

    async def _count_listed(self) -> int | None:
        """How many reserved workers Vast's list shows."""
        try:
            workers = await _within(LIST_TIMEOUT, self._endpoint.get_workers())
        except Exception as error:  # noqa: BLE001  the SDK has no class for it
            self._list_trouble = one_line(error)
            return None
        if not workers and self._held.own:
            self._list_trouble = "it is empty, while workers are reserved"
            return None
        reserved = 0
        for worker in workers:
            word = worker_word(worker.status, worker.cur_load)
            if worker.cur_load > 0 and word not in HOLD_NOTHING:
                reserved += 1
        return reserved

    # What is done about it

    def _ask(self, number: int) -> None:
        for _ in range(number):
            task = asyncio.create_task(self._reserve_and_hand_over())
            self._requests[task] = ""
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _take_back(self, number: int) -> None:
        """The latest ones: the others keep their places."""
        for task in list(self._requests)[len(self._requests) - number :]:
            del self._requests[task]
            task.cancel()

    async def _reserve_and_hand_over(self) -> None:
        """A request, and the reservation that comes of it, until it ends."""
        task = asyncio.current_task()
        assert task is not None
        try:
            on_trouble = partial(self._note_answer, task)
            async with self._reserve_one(on_trouble=on_trouble) as session:
                session.hand_over()
                self._requests.pop(task, None)
                self._refusals.are_over()
                with self._held.holding(task):
                    self._show()
                    await session.ended()
        except WorkerLost:
            pass  # it has ended, like any other
        except Exception as error:  # noqa: BLE001  whatever it was, the others go on
            self._refusals.note(error)
            self._troubles.set("refusal", f"not reserved: {one_line(error)}")
        finally:
            self._requests.pop(task, None)
            self._show()

    def _note_answer(self, task: asyncio.Task[None], trouble: str) -> None:
        """To a request that waits: `trouble` is empty when there is none."""
        if task in self._requests:
            self._requests[task] = trouble
        if not trouble:
            self._refusals.are_over()

    # What a person is told

    def _note_lasting_troubles(self) -> None:
        waiting = next(filter(None, self._requests.values()), "")
        self._troubles.set("waiting", waiting and f"still waiting: {one_line(waiting)}")
        unknown = "" if self._course.others else self._list_trouble
        self._troubles.set("list", unknown and f"backlog: no list of workers from Vast: {unknown}")
        stuck = self._course.stuck_since is not None
        self._troubles.set("stuck", STUCK_TEXT if stuck else "")
        if self._refusals.since is None:
            self._troubles.set("refusal", "")

    def _show(self) -> None:
        if self._leaving:
            return
        self._on_progress(
            Progress(
                jobs=self._course.jobs,
                wanted=self._decision.wanted,
                own=len(self._held.own),
                others=self._decision.others,
                asked=len(self._requests),
                troubles=self._troubles.texts,
            )
        )


async def follow_backlog(
    endpoint: Endpoint, args: argparse.Namespace, display: BacklogDisplay
) -> None:
    await follow(
        endpoint,
        partial(run_backlog, args.backlog),
        args.max,
        jobs_per_worker=args.jobs_per_worker,
        every=args.every,
        settle=args.settle,
        once=args.once,
        cost=args.cost,
        lifetime=args.lifetime,
        on_progress=display.has_progressed,
        on_trouble=display.say,
    )


async def occupy(name: str, endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Reserve a worker, hold it until cancelled or until it has ended otherwise, and say so."""
    display.waits(name)
    how = "not reserved"
    reason = ""
    on_trouble = partial(display.has_trouble, name)
    try:
        async with reserve(
            endpoint, args.cost, args.lifetime, args.wait, on_trouble=on_trouble
        ) as session:
            display.holds(name, session)
            how = "released"
            try:
                await session.ended()
                how = "let go"
                reason = "the worker let go"
            except WorkerLost as error:  # noted before the end of the block, which may be cancelled
                how = "lost"
                reason = str(error)
    except Exception as error:  # noqa: BLE001  this one has ended, and the others go on
        if how != "not reserved":
            how = "lost"
        reason = " ".join((str(error) or repr(error)).split())
    finally:
        display.ended(name, how, reason)


async def ramp(endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Ramp up, hold all, ramp down, the oldest first. One alone is a ramp, too."""
    occupying: dict[str, asyncio.Task[None]] = {}
    watching = set[asyncio.Task[None]]()
    if args.demo:
        watching.add(asyncio.create_task(watch_workers(endpoint, display)))
    try:
        for name in display.rows:
            if occupying:
                await asyncio.sleep(args.interval)
            occupying[name] = asyncio.create_task(occupy(name, endpoint, args, display))
        while not display.all_settled:
            await asyncio.sleep(0.1)
        plateau = args.plateau if args.demo else args.hold
        for place, name in enumerate(display.held):
            display.holds_until(name, time.monotonic() + plateau + place * args.interval)
        timeout = None if math.isinf(plateau) else plateau
        await asyncio.wait(occupying.values(), timeout=timeout)
        await ramp_down(occupying, args.interval, display)
        if watching:  # the endpoint scale back down
            display.say("watching the workers go")
            await asyncio.wait(watching, timeout=15 if args.local else 60)
    finally:
        tasks = {*watching, *occupying.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def ramp_down(
    occupying: dict[str, asyncio.Task[None]],
    interval: float,
    display: Display,
) -> None:
    """Release those that are still held, one each `interval` seconds, until all have ended."""
    for name, task in occupying.items():
        if name in display.held:
            task.cancel()
            await asyncio.wait(occupying.values(), timeout=interval)


async def watch_workers(endpoint: Endpoint, display: Display) -> None:
    """Show what the workers do, until none runs any more."""
    while True:
        with contextlib.suppress(Exception):  # a display only; the reservations ask for themselves
            words = await workers_in_words(endpoint)
            display.has_workers(words)
            if display.all_ended and words.count("stopped") == len(words):
                return
        await asyncio.sleep(1.0)


async def keep_showing_workers(
    endpoint: Endpoint, display: BacklogDisplay, interval: float
) -> None:
    """Show what the workers do, each `interval` seconds."""
    while True:
        with contextlib.suppress(Exception):  # a display only; follow() asks for itself
            display.has_workers(await workers_in_words(endpoint))
        await asyncio.sleep(interval)


async def workers_in_words(endpoint: Endpoint) -> list[str]:
    """What each of the endpoint's workers does. Raises what the SDK raises."""
    workers = await endpoint.get_workers()
    return [worker_word(worker.status, worker.cur_load) for worker in workers]


def number(
    least: float,
    most: float,
    text: str,
    whole: bool = False,
    endless: bool = False,
) -> float:
    """What argparse is to take for a number: one within the bounds; `inf` only if `endless`."""
    kind: type[int | float] = int if whole else float
    try:
        value = kind(text)
    except ValueError:
        wanted = "whole number" if whole else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}") from None
    if endless and value == math.inf:
        return value
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not within {least:g} and {most:g}")
    return value


INSTANCES = "prod, alpha, candidate, local"
WEEK = 7 * 86400


# Flags that would change nothing without another one: `--max 20` alone reserves one worker.
ONLY_WITH = {
    "demo": ("interval", "plateau", "count"),
    "backlog": ("max", "jobs_per_worker", "every", "settle", "once"),
}
NOT_WITH = {"demo": ("hold",), "backlog": ("hold", "wait")}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="null_client.py", description="Reserve workers of a Vast endpoint."
    )
    parser.add_argument(
        "--endpoint",
        metavar="NAME",
        default=os.environ.get("VAST_ENDPOINT"),
        help="default: $VAST_ENDPOINT",
    )
    parser.add_argument(
        "--instance",
        default=os.environ.get("VAST_INSTANCE") or "prod",
        help=f"{INSTANCES}; default: $VAST_INSTANCE or prod",
    )
    parser.add_argument(
        "--local", action="store_true", help="run against a stand-in for Vast on this machine"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--demo", action="store_true", help="several reservations, ramped up and down"
    )
    kinds.add_argument(
        "--backlog", metavar="COMMAND", help="a shell line that prints how many jobs aren't done"
    )
    parser.add_argument(
        "--once", action="store_true", help="backlog: end when no job is left and nothing reserved"
    )
    seconds = partial(number, 0.1, WEEK)
    whole = partial(number, 1, 1e9, whole=True)
    for flag, kind, default, text in (
        ("--hold", partial(seconds, endless=True), 180, "seconds to hold, or inf"),
        ("--interval", seconds, 30, "demo: seconds between two steps"),
        ("--plateau", seconds, 300, "demo: seconds with all held"),
        ("--count", partial(number, 1, 100, whole=True), 3, "demo: how many"),
        ("--max", partial(number, 1, 10_000, whole=True), None, "backlog: reservations at most"),
        ("--jobs-per-worker", whole, 1, "backlog: jobs for which one worker is enough"),
        ("--every", seconds, 5, "backlog: seconds between two looks"),
        ("--settle", seconds, 30, "backlog: seconds of too many, until a request is taken back"),
        ("--cost", partial(number, 1, 1e6, whole=True), 100, "load of one; 100 is one worker"),
        ("--lifetime", partial(number, 1, 86400), 120, "seconds without a keep-alive"),
        ("--wait", seconds, 1800, "seconds to wait for a worker; backlog: for ever"),
    ):
        if default is not None:
            text += f" (default: {default})"
        parser.add_argument(flag, metavar="N", type=kind, default=default, help=text)
    args = parser.parse_args(arguments)
    if args.instance not in INSTANCES.split(", "):
        parser.error(f"argument --instance: {args.instance!r} is none of {INSTANCES}")
    if not (args.local or args.endpoint):
        parser.error("argument --endpoint: needed, or $VAST_ENDPOINT, or --local")
    if args.backlog is not None and args.max is None:
        parser.error("argument --max: needed with --backlog: how many reservations at most")
    # Attributes that are there are not given their defaults: those that are left are not given.
    none = argparse.Namespace(**dict.fromkeys(vars(args)))
    in_vain = flag_in_vain(parser.parse_args(arguments, none))
    if in_vain:
        parser.error(in_vain)
    return args


def flag_in_vain(given: argparse.Namespace) -> str:
    """What is wrong with a flag that would change nothing; empty when there is none."""
    flags = {name for name, value in vars(given).items() if value is not None}
    for mode in ("demo", "backlog"):
        for name in ONLY_WITH[mode] if mode not in flags else NOT_WITH[mode]:
            if name in flags:
                word = "not" if mode in flags else "only"
                return f"argument --{name.replace('_', '-')}: {word} with --{mode}"
    return ""


async def connect(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    most: int,
    display: Screen,
) -> Endpoint:
    """The endpoint on Vast, or on a LocalVast of `most` workers for the life of the stack."""
    if args.local:
        vast = await stack.enter_async_context(local_vast(most, display))
        client = vast.client()
        name = vast.endpoint_name
    else:
        client = vast_client(args.instance)
        name = args.endpoint
    await stack.enter_async_context(client)
    endpoints = {endpoint.name: endpoint for endpoint in await client.get_endpoints()}
    if name not in endpoints:
        known = ", ".join(endpoints) or "none"
        raise argparse.ArgumentError(None, f"no endpoint {name!r}; there are: {known}")
    return endpoints[name]


def local_vast(max_workers: int, display: Screen) -> Any:
    try:
        from null_local import LocalVast
    except ImportError as error:
        text = f"--local needs null_local.py beside this file: {error}"
        raise argparse.ArgumentError(None, text) from error
    return LocalVast(max_workers, inactivity_timeout=3, on_event=display.say)


def vast_client(instance: str) -> Any:
    from vastai import Serverless, VastAI

    try:
        # From the environment, or where `vastai set api-key` saved it.
        key = VastAI().client.api_key
    except RuntimeError:
        text = "no API key: set VAST_API_KEY, or: vastai set api-key KEY"
        raise argparse.ArgumentError(None, text) from None
    return Serverless(key, instance=instance)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """The first signal ends the command with every session closed, a later one at once."""

    # A process group and whoever passes signals on send the same one twice within milliseconds.
    SAME = 1.0  # seconds

    def __init__(self, on_first: Callable[[], object]) -> None:
        """`on_first` is called in the event loop."""
        self.signum: int | None = None  # the first one
        self._on_first = on_first
        self._caught_at = 0.0
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Interruption:
        # SIGHUP: the terminal is gone. One that is ignored on purpose (nohup) stays so.
        self._before = {
            signum: signal.getsignal(signum)
            for signum in SIGNALS
            if signal.getsignal(signum) != signal.SIG_IGN
        }
        for signum in self._before:
            # Not the event loop's handlers: a second signal counts also while the loop is busy.
            signal.signal(signum, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        if self.signum is not None:  # still of use until the end, see main()
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def nobody_reads(self) -> None:
        """Standard output has no reader left: as a signal, but never a second one.

        Ctrl-C ends the reader of a pipe, too.
        """
        if self.signum is None:
            self._begin(signal.SIGTERM)

    def _catch(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self._begin(signum)
        elif time.monotonic() - self._caught_at >= self.SAME:
            os._exit(128 + self.signum)

    def _begin(self, signum: int) -> None:
        self.signum = signum
        self._caught_at = time.monotonic()
        self._loop.call_soon_threadsafe(self._on_first)


PATIENCE = 10.0  # seconds without progress, after which a reader of the output reads no more


async def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from null_display import BacklogDisplay, Display

    command = asyncio.current_task()

    def close_all() -> None:
        """On the first signal, when the display below is there."""
        if command is not None:
            command.cancel()
        display.live.stop()  # a second signal leaves the terminal as it finds it
        display.say(interrupted(args))

    interruption = Interruption(close_all)
    display: Screen
    attempt: Callable[[], Awaitable[int]]
    if args.backlog is None:
        display = Display(args.count if args.demo else 1, interruption.nobody_reads)
        attempt = partial(attempt_reservations, args, display)
    else:
        display = BacklogDisplay(interruption.nobody_reads)
        attempt = partial(attempt_backlog, args, display)
    with interruption:
        try:
            with display.live:
                display.say("connecting")
                status = await attempt()
            display.output.finish()
            while not display.output.finished and display.output.stalled_for < PATIENCE:
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            if interruption.signum is None:
                raise
            status = 128 + interruption.signum
        finally:
            display.output.finish()
            display.output.join(1.0)
    if status == 0 and not display.output.complete:
        raise OSError("not all of the output could be written")
    return status


def interrupted(args: argparse.Namespace) -> str:
    if args.backlog is None or args.local:
        return "interrupted, closing"
    return "interrupted: what waits is taken back, what is reserved goes on"


async def attempt_reservations(args: argparse.Namespace, display: Display) -> int:
    """Reserve, hold and release, shown on the way; the exit status."""
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await connect(stack, args, len(display.rows), display)
        await ramp(endpoint, args, display)
    if args.demo:
        display.show_chart()
    if all(end.how in ("released", "let go") for _, end in display.ends):
        return 0
    return 1


async def attempt_backlog(args: argparse.Namespace, display: BacklogDisplay) -> int:
    """Follow the backlog, shown on the way; the exit status. Raises Stuck."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            endpoint = await connect(stack, args, args.max, display)
            interval = 1.0 if args.local else args.every
            showing = asyncio.create_task(keep_showing_workers(endpoint, display, interval))
            stack.callback(showing.cancel)
            await follow_backlog(endpoint, args, display)
    finally:
        display.show_chart()
    return 0


def hold_standard_files() -> None:
    """Where standard output or error is closed: nothing that is opened later takes its place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def main(arguments: list[str] | None = None) -> int:
    hold_standard_files()
    try:
        status = asyncio.run(run(parse_arguments(arguments)))
    except ModuleNotFoundError as error:
        print(
            f"null_client: the command needs {error.name}, beside this file",
            file=sys.stderr,
        )
        return 2
    except Exception as error:  # noqa: BLE001  a person gets a line, whatever went wrong
        print(f"null_client: {error}".replace("\n", " "), file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1
    if status > 128:
        # All is closed. The same signal may still come, and Python gives up handlers as it ends.
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
    return status


if __name__ == "__main__":
    sys.exit(main())
