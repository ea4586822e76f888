"""Reserve one null worker: `reserve()`, and the `Reservation` that it hands out.

    async with reserve(endpoint) as session:
        ...  # session.session_id, session.url; the worker is yours

A reservation is a session of Vast's framework on a worker that forwards nothing. It is a lease: the
worker keeps it for `lifetime` seconds after the last keep-alive. Copied alone, this file works.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeGuard

import aiohttp

if TYPE_CHECKING:
    from vastai import Endpoint  # type: ignore[import-untyped]

__all__ = [
    "NotReserved",
    "Refused",
    "Reservation",
    "ReservationError",
    "UnreachableWorkers",
    "WorkerLost",
    "reserve",
]

LOOK_WAIT = 30.0  # seconds that a look may wait on the worker for the end of the session
LOOK_PAUSE = 2.0  # seconds between two looks, where the worker doesn't wait or can't be reached
REQUEST_TIMEOUT = 10.0  # seconds for one request
MAX_REFUSALS = 5  # refused connections in a row, after which the worker's process is gone
MAX_LIFETIME = 30 * 86400  # seconds; a worker refuses more

CLOSE_TIMEOUT = 3.0  # seconds in which a session has to be closed; its callback may take longer
CLOSE_TRY_TIMEOUT = 1.5  # seconds for one try to close it
MAX_PARALLEL_CLOSES = 50
EXPIRY_SWEEP = 5.0  # seconds between two looks of a worker for expired sessions

FRONT = 16  # the oldest requests: each polls the router once a second
POLL_RATE = 30  # polls a second of all other requests together
MAX_ANSWER = 1 << 20  # bytes that are read of an answer

MAX_KEY_AGE = 3 * 86400  # seconds after which an endpoint's key is fetched anew, as by the SDK
KEY_JUST_FETCHED = 5.0  # seconds for which a key that was just fetched isn't fetched again
MAX_KEY_REFUSALS = 3  # in a row

UNREACHABLE_FOR = 3600.0  # seconds for which a worker that nobody reached is remembered

JSON = dict[str, Any]  # a JSON object
log = logging.getLogger("null_reservation")


class ReservationError(Exception):
    """The base of what reserve() and a Reservation raise."""


class NotReserved(ReservationError):
    """No worker came within the time, or the autoscaler or the worker refused."""


class Refused(NotReserved):
    """The autoscaler refused, with an HTTP status of 4xx. 401 and 403 are about the key."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class WorkerLost(ReservationError):
    """The worker stayed unreachable until its time to live was over, or its process is gone."""


class _TryAgain(Exception):
    """A try to get a worker failed, and the next one may not. Its text is for a person."""


class _Answer(NamedTuple):
    """The answer to a request, or why none came."""

    status: int  # 0: no answer came
    fields: JSON  # the answer's JSON object; empty where the answer isn't one
    text: str  # the beginning of the answer, or why none came
    asked_at: float  # by time.monotonic()
    refused: bool = False  # nothing listens on that port

    @property
    def says_gone(self) -> bool:
        """Whether the worker itself says that it has no such session. A proxy says other things.

        The texts are those of serverless/server/lib/backend.py in vastai 1.9.1.
        """
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
    """Make one request, in `timeout` seconds at most. Never raises: see `_Answer.status`."""
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
                content += chunk  # a longer answer is cut off, and then isn't JSON
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
    """A task that only its owner can end: asyncio.run() cancels every task, clean-ups included.

    Time-outs of asyncio and aiohttp work by cancelling, so none of them works inside it.
    """

    def cancel(self, msg: object = None) -> bool:
        return False

    async def result_within(self, seconds: float) -> Any:
        """Return its result. End it after so many seconds, and return None.

        Only clean-ups call this, and nobody cancels them.
        """
        await asyncio.wait({self}, timeout=seconds)
        super().cancel()
        await asyncio.wait({self})
        if self.cancelled():
            return None
        return self.result()


async def _carry_through(task: _Undisturbed) -> None:
    """Await a clean-up that is bounded in time. A cancellation takes effect after it."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


async def _close(http: aiohttp.ClientSession) -> None:
    """Close the session also where asyncio.run() cancels a part of that.

    aiohttp 3.14 waits for the connections in a task of its own. When that is cancelled, it doesn't
    come to close the resolver, whose thread would then live as long as the process.
    """
    connector = http.connector
    try:
        await http.close()
    except asyncio.CancelledError:
        if connector is not None:
            await connector.close()


class _PerLoop:
    """What the reservations of one event loop share, for as long as there are any."""

    _of: ClassVar[dict[asyncio.AbstractEventLoop, _PerLoop]] = {}

    def __init__(self) -> None:
        self.users = 0
        # The SDK's own session belongs to the event loop in which its client was opened.
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self.certificate = asyncio.Lock()  # the first one downloads it for all
        self.fetching_key = asyncio.Lock()
        self.key_fetched_at: dict[Endpoint, float] = {}
        self.closing = asyncio.Semaphore(MAX_PARALLEL_CLOSES)
        self.line: list[_Request] = []  # those that wait for a worker, the oldest first

    @classmethod
    @contextlib.asynccontextmanager
    async def entered(cls) -> AsyncIterator[_PerLoop]:
        """Give the running loop's, for the length of the block."""
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
                await _carry_through(_Undisturbed(_close(shared.http)))

    @contextlib.contextmanager
    def in_line(self, request: _Request) -> Iterator[None]:
        """Keep a place for the request, for the length of the block."""
        self.line.append(request)
        try:
            yield
        finally:
            self.line.remove(request)

    def first_pause(self, request: _Request) -> float:
        """Seconds until the request's first poll: a crowd doesn't ask in one moment."""
        place = self.line.index(request)
        return 0.0 if place < FRONT else place / POLL_RATE

    def pause(self, request: _Request) -> float:
        """Seconds between two polls of the request: all but the oldest share a rate."""
        if self.line.index(request) < FRONT:
            return 1.0
        return max(1.0, len(self.line) / POLL_RATE)


def _require_names(owner: object, *names: str) -> None:
    """Raise NotReserved for the first name that is missing."""
    for name in names:
        if not hasattr(owner, name):
            raise NotReserved(
                f"this vastai-sdk is not known to work (no {name!r}); 1.3 up to below 2 is"
            )


class _Vast:
    """The SDK's private names under plain ones, and the routes of Vast behind them.

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
        """Give the TLS context that trusts Vast's workers. Raises _TryAgain."""
        try:
            async with self._shared.certificate:
                return await self._client.get_ssl_context()
        except Exception as error:  # the SDK has no class for it
            raise _TryAgain(f"no certificate: {str(error) or type(error).__name__}") from error

    async def route(self, asked: JSON, timeout: float) -> _Answer:
        """Ask the router for a worker. Raises NotReserved or _TryAgain."""
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
        """Fetch the key anew, since Vast may have changed it. Raises Refused where it is the same.

        Raises _TryAgain where the key can't be fetched.
        """
        self._refusals += 1
        if self._refusals < MAX_KEY_REFUSALS:
            await self._fetch_key(key, f"the autoscaler refuses: {answer}; ")
        if self._refusals == MAX_KEY_REFUSALS or self._endpoint.api_key == key:
            raise Refused(f"the autoscaler refuses: {answer}", answer.status)

    async def _renew_old_key(self) -> None:
        """Fetch an old key anew, as the SDK does. Without a new key the old one is used."""
        if time.time() < self._endpoint.last_refresh + MAX_KEY_AGE:
            return
        self._endpoint.last_refresh = time.time() - MAX_KEY_AGE + 60  # tried again in a minute
        with contextlib.suppress(_TryAgain):
            await self._fetch_key(self._endpoint.api_key)

    async def _fetch_key(self, old: str, trouble: str = "") -> None:
        """Fetch the endpoint's key, unless another reservation just did. Raises _TryAgain."""
        fetched_at = self._shared.key_fetched_at
        async with self._shared.fetching_key:
            just_fetched = time.monotonic() < fetched_at.get(self._endpoint, 0) + KEY_JUST_FETCHED
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
    """Tell the worker to end a session, for up to CLOSE_TIMEOUT. Return whether it is gone.

    Only clean-ups call this, and nobody cancels them.
    """
    deadline = time.monotonic() + CLOSE_TIMEOUT
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        asking = _Undisturbed(_request(http, "POST", f"{url}/session/end", None, json=session))
        answer = await asking.result_within(min(left, CLOSE_TRY_TIMEOUT))
        if answer is not None and (answer.says_gone or answer.fields.get("ended") is True):
            return True
        await asyncio.sleep(0.2)


def _tell_not_closed(session_id: str, url: str, time_to_live: float) -> None:
    until = _date(time.time() + time_to_live + EXPIRY_SWEEP)
    log.warning("not closed session=%s: %s stays reserved until %s", session_id, url, until)


def keep_alive_due(time_to_live: float, lifetime: float) -> float:
    """Return the seconds until the next keep-alive.

    A keep-alive adds a whole lifetime to what is left. It comes when half a lifetime is left, so
    the time to live stays between half a lifetime and one and a half.
    """
    return time_to_live - lifetime / 2


def _date(moment: float) -> str:
    """Write a moment of time.time() for a person."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


class Reservation:
    """A worker that is yours. reserve() makes it and closes it."""

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
        self._retry_pause = min(LOOK_PAUSE, lifetime / 8)  # seconds
        self._timeout = max(1.0, min(REQUEST_TIMEOUT, lifetime / 4))
        # The worker's clock began when it created the session, perhaps long before its answer came.
        self._expires = created.asked_at + lifetime
        self._clocks_differ_by = self._expires - created.fields["expiration"]
        self._no_keep_alive_before = 0.0
        self._refusals = 0  # refused connections in a row
        self._worker_waits = True  # it answers a look only when the session ends or `wait` is over
        self._handed_over = False
        self._closing: _Undisturbed | None = None
        self._open = True  # as far as we know
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: BaseException | None = None  # what ended() raises once it has ended
        self._keeper = asyncio.create_task(self._keep())
        self._keeper.add_done_callback(self._keeper_is_done)

    @property
    def time_to_live(self) -> float:
        """Seconds until the worker frees itself, if nobody keeps the session alive."""
        return self._expires - time.monotonic()

    async def ended(self, timeout: float | None = None) -> bool:
        """Wait until the worker has let go: released, expired, restarted, or closed from here.

        Return False when that hasn't happened within `timeout` seconds. Raises WorkerLost.
        """
        await asyncio.wait({self._ended}, timeout=timeout)
        if not self._ended.done():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def hand_over(self) -> None:
        """Leave the session to the consumer, which keeps it alive with `POST /renew`.

        The end of the block then doesn't end the session.
        """
        self._handed_over = True

    async def close(self) -> None:
        """End the session. Do nothing when it is gone already.

        Where the worker doesn't answer, the log says until when it stays reserved.
        """
        await _carry_through(self._begin_closing())

    async def _keep(self) -> None:
        """Keep the session alive and look at it, until it has ended or its worker is lost."""
        while self._open:
            due = self._keep_alive_due()
            if due <= 0.05 and not self.unreachable:  # no time is left for a look that waits
                await self._ping()
            else:
                await self._look(due)
            if self.unreachable or not self._worker_waits:
                await asyncio.sleep(self._retry_pause)

    def _keep_alive_due(self) -> float:
        """Return the seconds until the next keep-alive."""
        if self._handed_over:
            return math.inf
        not_before = self._no_keep_alive_before - time.monotonic()
        return max(keep_alive_due(self.time_to_live, self.lifetime), not_before)

    async def _ping(self) -> None:
        """Send a keep-alive. One that may have added its lifetime isn't repeated at once."""
        asked_at = time.monotonic()
        self._no_keep_alive_before = asked_at + self._retry_pause
        ping = await self._ask("/ping", self._timeout, auth_data=self.auth_data, payload={})
        if ping.status == 0:
            self._not_answered(ping)
        elif ping.status == 200 and "result" in ping.fields:
            self._expires += self.lifetime
            self._no_keep_alive_before = asked_at + self.lifetime / 2
        elif not ping.says_gone:  # if it is gone, the next look says so
            log.warning("keep-alive refused session=%s: %s", self.session_id, ping)

    async def _look(self, keep_alive_due: float) -> None:
        """Ask for the session. The worker answers when it ends, or when a keep-alive is due."""
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
            # An older worker doesn't know `wait`, and answers at once.
            self._worker_waits = now - look.asked_at >= min(wait, LOOK_PAUSE) / 2
            self._expires = expiration + self._clocks_differ_by
            self._refusals = 0
            if self.unreachable:
                self.unreachable = False
                # A keep-alive that got no answer may be arriving just now.
                self._no_keep_alive_before = now + self._retry_pause
        else:
            self._not_answered(look)

    def _not_answered(self, answer: _Answer) -> None:
        self.unreachable = True
        self._refusals = self._refusals + 1 if answer.refused else 0
        # Judge by the time of asking: this process may have stood still since then.
        if self._expires <= answer.asked_at or self._refusals == MAX_REFUSALS:
            self._gone(WorkerLost(f"worker {self.url} can't be reached: {answer}"))

    def _keeper_is_done(self, keeper: asyncio.Task[None]) -> None:
        """Tell whoever waits for the end, should the keeper have failed."""
        if not keeper.cancelled() and keeper.exception() is not None:
            self._set_ended(keeper.exception())

    def _gone(self, failure: BaseException | None = None) -> None:
        """Note that the worker has no such session any more, or that it can't be asked."""
        self._open = False
        self._set_ended(failure)

    def _set_ended(self, failure: BaseException | None) -> None:
        """Wake whoever waits in ended()."""
        if not self._ended.done():
            self._failure = failure
            self._ended.set_result(None)

    async def _leave(self) -> None:
        """Close the session at the end of the block, unless it was handed over."""
        if self._handed_over and self._closing is None:
            await self._stop_keeping()
            why = "the block has ended, and the consumer holds the session"
            self._set_ended(ReservationError(why))
        else:
            await asyncio.wait({self._begin_closing()})
        await _close(self._http)

    def _begin_closing(self) -> _Undisturbed:
        """Close the session once, however many ask for it."""
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
            _tell_not_closed(self.session_id, self.url, self.time_to_live)
        self._gone()

    async def _stop_keeping(self) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})

    async def _ask(self, route: str, timeout: float, **body: object) -> _Answer:
        body["session_id"] = self.session_id
        return await _request(self._http, "POST", self.url + route, timeout, json=body)


class UnreachableWorkers:
    """Workers that the router named and nobody could reach, by URL, for an hour.

    Their hosts keep the port closed, for example. Share one object between reservations, and it
    counts the tries of all of them.
    """

    def __init__(self) -> None:
        self._tries: dict[str, list[float]] = {}  # by time.monotonic(), by URL

    def add(self, url: str) -> int:
        """Note a worker that can't be reached. Return how often that was so in the last hour."""
        self._tries.setdefault(url, []).append(time.monotonic())
        return self.counts()[url]

    def remove(self, url: str) -> None:
        """Forget a worker that has answered, whatever its answer was."""
        self._tries.pop(url, None)

    def counts(self) -> dict[str, int]:
        """Return how often each worker was tried in the last hour."""
        recent = time.monotonic() - UNREACHABLE_FOR
        for url, tries in list(self._tries.items()):
            self._tries[url] = [tried_at for tried_at in tries if tried_at > recent]
            if not self._tries[url]:
                del self._tries[url]
        return {url: len(tries) for url, tries in self._tries.items()}


def failure_pause(failures: int) -> float:
    """Return the seconds until the next poll, after so many failures in a row: 1, 1, 2, 4, 5 ..."""
    doublings = min(max(0, failures - 1), 3)
    return min(2.0**doublings, 5.0)


class _Request:
    """One request for a worker, from the first poll of the router to a session on a worker."""

    def __init__(
        self,
        vast: _Vast,
        shared: _PerLoop,
        cost: float,
        payload: JSON,
        unreachable: UnreachableWorkers,
    ) -> None:
        self._vast = vast
        self._shared = shared
        self._cost = cost
        self._payload = payload
        self._unreachable = unreachable
        self._index: float = 0  # the router's number for the request, by which it keeps its place
        self._unreached = ""  # what happened to the last worker that couldn't be reached

    async def wait(self, seconds: float, on_trouble: Callable[[str], object]) -> Reservation:
        """Ask the router, create, held. Everything but a create is cancelled with the caller."""
        deadline = time.monotonic() + seconds
        trouble = ""
        failures = 0  # in a row
        with self._shared.in_line(self):
            pause = self._shared.first_pause(self)
            while True:
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                left = deadline - time.monotonic()
                if left <= 0:
                    at_last = f"; at last: {trouble}" if trouble else ""
                    raise NotReserved(f"no worker within {seconds:g} s{at_last}")
                try:
                    auth_data = await self._poll(min(REQUEST_TIMEOUT, left))
                    if auth_data is not None:
                        return await self._create(auth_data)
                    failures = 0
                    trouble = self._unreached
                except _TryAgain as error:
                    failures += 1
                    trouble = str(error)
                pause = max(self._shared.pause(self), failure_pause(failures))
                pause *= random.uniform(0.8, 1.2)
                on_trouble(trouble)

    async def _poll(self, timeout: float) -> JSON | None:
        """Ask the router which worker to go to; None: none yet. Raises _TryAgain, NotReserved."""
        # A request keeps its place for so long without a poll. In a long line polls are rare.
        replay_timeout = max(60.0, 3 * self._shared.pause(self))
        asked = {"cost": self._cost, "request_idx": self._index, "replay_timeout": replay_timeout}
        answer = await self._vast.route(asked, timeout)
        if 400 <= answer.status < 500 and answer.status not in (408, 429):
            raise Refused(f"the autoscaler refuses: {answer}", answer.status)
        if answer.status != 200 or not answer.fields:
            raise _TryAgain(f"the autoscaler answers {answer}")
        index = answer.fields.get("request_idx")
        if _is_number(index) and index:  # an answer may lack it; a new number would be more load
            self._index = index
        url = answer.fields.get("url")
        if url is None:
            return None
        if not isinstance(url, str):
            raise _TryAgain(f"the autoscaler answers {answer}")
        return answer.fields

    async def _create(self, auth_data: JSON) -> Reservation:
        """Open a session on the worker that the router has named. Raises _TryAgain, NotReserved.

        When it is cancelled, it waits for the answer all the same and ends the session, since
        nobody else would know of that session.
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
        """Raise _TryAgain or NotReserved where the answer to a create is no session."""
        if created.status == 0:
            times = f"try {self._unreachable.add(url)}"
            self._unreached = f"worker {url} can't be reached, {times}: {created}"
            raise _TryAgain(self._unreached)
        self._unreachable.remove(url)
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
        """End the session that may have been created, since nobody wants it any more."""
        url = auth_data["url"]
        created = await creating.result_within(CLOSE_TIMEOUT - 0.5)
        if created is None:
            until = _date(time.time() + self._payload["lifetime"] + EXPIRY_SWEEP)
            log.warning("no answer to a create: %s may stay reserved until %s", url, until)
        elif isinstance(created.fields.get("session_id"), str):
            session_id = created.fields["session_id"]
            session = {"session_id": session_id, "session_auth": auth_data}
            async with self._shared.closing:
                closed = await _end_session(http, url, session)
            if not closed:
                _tell_not_closed(session_id, url, self._payload["lifetime"])
        await _close(http)


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
    unreachable: UnreachableWorkers | None = None,
) -> AsyncIterator[Reservation]:
    """Reserve a worker of the endpoint for the length of the block, and keep the session alive.

    `cost` is the load that the reservation reports; 100 is one worker. `lifetime` is how many
    seconds the worker keeps the session without a keep-alive, at most 30 days; the worker of a
    dispatcher that dies is free again within 1.5 lifetimes plus 5 s. `wait` is how many seconds to
    wait for a worker. When the session ends, the worker POSTs `on_close_payload` to
    `on_close_route`, a URL or a path on the consumer. `on_trouble` is told why the last try to get
    a worker failed, and "" when the trouble is over; what it raises comes out of here. Pass one
    `unreachable` to several calls, and it remembers for all of them which workers nobody reached.

    Raises NotReserved; Refused, which is one, where the autoscaler refuses; ValueError for a
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
        vast = _Vast(endpoint, shared)
        request = _Request(vast, shared, cost, payload, unreachable or UnreachableWorkers())
        reservation = await request.wait(wait, on_trouble)
        try:
            yield reservation
        finally:
            await _carry_through(_Undisturbed(reservation._leave()))
