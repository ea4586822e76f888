"""Follow a backlog: as many reserved workers as there are jobs, and why when there are fewer.

    await follow(endpoint, backlog, most)

`follow()` counts the jobs, looks at Vast's list of workers, and lets null_rule.py say how many
workers to ask for. Each worker is handed over to its consumer at once, which keeps it for as long
as it finds jobs. Needs null_reservation.py and null_rule.py beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import null_rule
from null_reservation import (
    Refused,
    Reservation,
    ReservationError,
    UnreachableWorkers,
    WorkerLost,
    reserve,
)
from null_rule import (
    Decision,
    History,
    Jobs,
    Limits,
    Snapshot,
    decide,
    is_stranded,
    nothing_is_left,
)

if TYPE_CHECKING:
    from vastai import Endpoint  # type: ignore[import-untyped]

__all__ = ["TROUBLES", "Jobs", "NotCounted", "Progress", "Stuck", "follow"]

LIST_TIMEOUT = 10.0  # seconds for Vast's list
BACKLOG_TIMEOUT = 20.0  # seconds for the backlog to be counted
WATCH_PAUSE = 0.1  # seconds between two readings of a backlog that tells its changes
WATCH_LAG = 1.0  # seconds by which what it told last may be behind

IDLE_AFTER = 120.0  # seconds without a job after which a reserved worker is told
WAITING_AFTER = 600.0  # seconds without a new worker after which that is told
GIVE_UP_AFTER = 600.0  # seconds of one trouble after which `once` ends
NEVER_COUNTED_AFTER = 60.0  # seconds likewise, where the backlog was never counted

# What can go wrong, by the name that is told. docs/operating.md says what to do about each.
TROUBLES = (
    "backlog",  # not counted
    "refused",  # by Vast
    "vast",  # the router, or the list of workers, doesn't answer
    "unreachable",  # workers that the router names and nobody reaches
    "ghost",  # a load on Vast's list that nobody holds
    "stuck",  # reservations end and no job moves
    "stranded",  # jobs are in hand, and no reserved worker can have them
    "idle",  # workers are reserved, and there is no job
    "waiting",  # no worker comes
)
STUCK_TEXT = (
    f"{null_rule.STUCK_AFTER} reservations have ended and no job has moved, so one is held at a "
    "time. Look at the consumers: do they run, and pull from the queue that is counted here?"
)
STRANDED_TEXT = (
    "{} in hand, and no reserved worker can have them. Who held them is probably gone; one worker "
    "is asked for now and then, as many queues give such jobs back only to a running worker"
)
GHOST_TEXT = (
    "{} on Vast's list with load, and for ten minutes without a job. Nobody seems to hold it, so "
    "it doesn't count. Look at the endpoint's workers: can they be reached?"
)
IDLE_TEXT = (
    "workers are reserved, and for two minutes there has been no job. "
    "Look at the consumers: do they end when nothing waits?"
)
WAITING_TEXT = "no worker has come for ten minutes. Run null_client.py --diagnose: it says why"

# What a person would call a worker, by Vast's word for its state.
WORDS = {
    "created": "loading",
    "creating": "loading",
    "destroying": "stopping",
    "error": "broken",
    "errored": "broken",
    "inactive": "stopped",
    "loading": "loading",
    "model_loading": "loading",
    "pending": "loading",
    "rebooting": "loading",
    "starting": "loading",
    "stopped": "stopped",
    "unavail": "broken",
    "update_rebooting": "loading",
    "update_starting": "loading",
}

log = logging.getLogger("null_backlog")


class NotCounted(Exception):
    """The backlog isn't known. Its text says why."""


def as_jobs(answer: object) -> Jobs:
    """Take one to three whole numbers, not negative, for jobs. Raises NotCounted."""
    if isinstance(answer, NotCounted):
        raise answer
    numbers = list(answer) if isinstance(answer, (tuple, list)) else [answer]
    while numbers[1:] and numbers[-1] is None:  # Jobs(7)
        numbers.pop()
    whole = [each for each in numbers if isinstance(each, int) and not isinstance(each, bool)]
    if len(numbers) not in (1, 2, 3) or len(whole) != len(numbers) or min(whole) < 0:
        raise NotCounted(f"{one_line(repr(answer)):.80} is not one to three whole numbers")
    return Jobs(*whole)


def one_line(text: object) -> str:
    """For a person: printable, one line, and not long."""
    text = str(text) or repr(text)  # an exception may have nothing to say
    printable = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(printable.split())[:300]


def worker_word(status: str, load: float) -> str:
    """Return what a person would call a worker: reserved, free, loading, stopped or broken.

    `status` is Vast's word for it: `idle` for every worker that is loaded, reserved or not, and
    `update_ready` for one that waits for its update and may be busy. In no other state can a
    worker be reserved, whatever its load: that is an old one. A word that isn't known stays.
    """
    status = status.lower()
    if status in ("idle", "update_ready"):
        return "reserved" if load > 0 else "free"
    return WORDS.get(status, status)


def unreachable_text(tries: Mapping[str, int]) -> str:
    """Say which workers nobody reached, and how often each was tried in the last hour."""
    if not tries:
        return ""
    named = ", ".join(f"{url} (tried {times} times)" for url, times in tries.items())
    return f"{named}. Does the host keep its ports closed? Then destroy the instance"


class _Waiting(NamedTuple):
    """A request that waits for a worker."""

    since: float
    trouble: str = ""  # why the last try failed


class _Refusals:
    """Refusals by Vast, one after the other: the pauses between the requests get longer."""

    def __init__(self) -> None:
        self.until: float | None = None  # when to ask again; None: Vast doesn't refuse
        self._pause = 1.0

    def note(self, error: Exception) -> None:
        now = time.monotonic()
        if self.until is not None and now < self.until:
            return  # one of several requests that were made at once
        if isinstance(error, Refused) and error.status in (401, 403):
            self._pause = null_rule.LONGEST_PAUSE
        self.until = now + self._pause
        self._pause = min(null_rule.LONGEST_PAUSE, 2 * self._pause)

    def are_over(self) -> None:
        self.until = None
        self._pause = 1.0


class _Troubles:
    """What goes wrong now, by name. Each trouble is told when it begins and when it is over."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._lines: dict[str, str] = {}
        self._since: dict[str, float] = {}

    @property
    def lines(self) -> dict[str, str]:
        return dict(self._lines)

    def set(self, name: str, text: str) -> None:
        """`text` is empty when there is no such trouble, or not any more."""
        is_new = name not in self._lines
        if text:
            self._lines[name] = f"{name}: {text}"
        if text and is_new:
            self._since[name] = time.monotonic()
            self._tell(self._lines[name])
        if not text and not is_new:
            del self._lines[name], self._since[name]
            self._tell(f"{name}: over")

    def lasting(self, seconds: float, names: Iterable[str]) -> list[str]:
        """Return the lines of the troubles of these names that have lasted for so long."""
        until = time.monotonic() - seconds
        return [self._lines[name] for name in names if self._since.get(name, math.inf) <= until]


class OwnReservations:
    """The reservations of this dispatcher that are held, and how many there were."""

    def __init__(self) -> None:
        self.held: dict[asyncio.Task[None], float] = {}  # when each was opened
        self.opened = 0
        self.ended = 0
        self.last_opened = -math.inf
        self.some_end = asyncio.Event()
        self._seconds = 0.0  # of those that have ended
        self._counts: list[tuple[float, int]] = []  # when, and how many were held from then on

    @contextlib.contextmanager
    def holding(self, task: asyncio.Task[None]) -> Iterator[None]:
        self.opened += 1
        self.last_opened = opened_at = time.monotonic()
        self.held[task] = opened_at
        self._counts.append((opened_at, len(self.held)))
        try:
            yield
        finally:
            now = time.monotonic()
            del self.held[task]
            self.ended += 1
            self._seconds += now - opened_at
            self._counts.append((now, len(self.held)))
            self.some_end.set()

    @property
    def seconds(self) -> float:
        """For how long workers were reserved, all reservations together."""
        now = time.monotonic()
        return self._seconds + sum(now - opened_at for opened_at in self.held.values())

    def most_since(self, moment: float) -> int:
        """Return how many were held at a time from then on."""
        before = [count for at, count in self._counts if at <= moment]
        self._counts = [
            (moment, before[-1] if before else 0),
            *(count for count in self._counts if count[0] > moment),
        ]
        return max(count for _, count in self._counts)


class _Asked:
    """A backlog that is a function: it is called at each look."""

    lag = 0.0  # seconds by which an answer may be behind

    def __init__(self, function: Callable[[], Awaitable[object]]) -> None:
        self.changed = asyncio.Event()  # never
        self._function = function

    async def count(self) -> Jobs:
        """Call the function. Raises NotCounted, and what the function raises."""
        return as_jobs(await _within(BACKLOG_TIMEOUT, self._function()))

    async def close(self) -> None:
        """Nothing is open between two looks."""


class _Watched:
    """A backlog that is an async iterator: its latest answer counts."""

    lag = WATCH_LAG

    def __init__(self, answers: AsyncIterable[object]) -> None:
        self.changed = asyncio.Event()  # a look may see something new
        self._answer: object = NotCounted("no count yet")
        self._answered_at = time.monotonic()
        self._any = asyncio.Event()
        self._watching = asyncio.create_task(self._watch(answers))

    async def count(self) -> Jobs:
        """Take the latest answer. Raises NotCounted."""
        self.changed.clear()
        await _within(BACKLOG_TIMEOUT, self._any.wait())
        if time.monotonic() - self._answered_at > BACKLOG_TIMEOUT and not self._watching.done():
            raise NotCounted(f"no count for {BACKLOG_TIMEOUT:g} s")
        return as_jobs(self._answer)

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.wait({self._watching})

    async def _watch(self, answers: AsyncIterable[object]) -> None:
        try:
            async for answer in answers:
                self._note(answer)
                await asyncio.sleep(WATCH_PAUSE)
            self._note(NotCounted("the watch has ended"))
        except Exception as error:  # noqa: BLE001  whatever it was, the jobs aren't known
            self._note(error if isinstance(error, NotCounted) else NotCounted(one_line(error)))
        finally:
            if isinstance(answers, AsyncGenerator):
                await answers.aclose()  # it ends what it has started

    def _note(self, answer: object) -> None:
        self._answer = answer
        self._answered_at = time.monotonic()
        self._any.set()
        self.changed.set()


async def _within(seconds: float, work: Awaitable[object]) -> Any:
    """Return its result. Raises NotCounted when there is none within so many seconds."""
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
    troubles: Mapping[str, str] = {}  # what goes wrong: a line by name, which begins with the name
    opened: int = 0  # own reservations since the start
    waited: float = 0.0  # seconds from asking for the latest of them until it was opened
    reserved_seconds: float = 0.0  # of own reservations since the start
    failed_counts: int = 0  # since the start
    ends_in: float | None = None  # seconds until `once` ends, when nothing is left


class Stuck(ReservationError):
    """follow() with `once`: a trouble has lasted for so long that no job will be done."""


async def follow(
    endpoint: Endpoint,
    backlog: Callable[[], Awaitable[object]] | AsyncIterable[object],
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

    `backlog` is asked every `every` seconds how many jobs aren't done. It answers with one number,
    or with two, waiting and in hand, or with three, the third being how many jobs were ever done
    or put aside. In the place of the function `backlog` may be an async iterator that gives such an
    answer whenever the numbers change, and at least each 20 s; a NotCounted is an answer as well.
    `most` is how many reservations there may be, `jobs_per_worker` for how many jobs
    one worker is enough. A request that still waits is taken back when there have been too many for
    `settle` seconds. `cost` and `lifetime` are those of reserve().

    Runs until it is cancelled: requests that wait are then taken back, and reserved workers go on.
    With `once` it returns when nothing is left to do and nothing is reserved. `on_progress` is told
    of each change. `on_trouble` is told in a line when something goes wrong, and when that is over.

    Raises Stuck, only with `once`: after ten minutes in which nothing moved, or Vast refused, or
    nobody could count; after one minute where the backlog was never counted.
    """
    limits = Limits(most, jobs_per_worker, settle)
    unreachable = UnreachableWorkers()
    reserve_one = partial(reserve, endpoint, cost, lifetime, math.inf, unreachable=unreachable)
    counted = _Asked(backlog) if callable(backlog) else _Watched(backlog)
    follower = _Follower(
        endpoint, counted, limits, once, reserve_one, unreachable, on_progress, on_trouble
    )
    try:
        while True:
            began_at = time.monotonic()
            await follower.look(every)
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
        backlog: _Asked | _Watched,
        limits: Limits,
        once: bool,
        reserve_one: Callable[..., contextlib.AbstractAsyncContextManager[Reservation]],
        unreachable: UnreachableWorkers,
        on_progress: Callable[[Progress], object],
        on_trouble: Callable[[str], object],
    ) -> None:
        self._endpoint = endpoint
        self._backlog = backlog
        self._limits = limits
        self._once = once
        self._reserve_one = reserve_one
        self._unreachable = unreachable
        self._on_progress = on_progress
        self._troubles = _Troubles(on_trouble)
        self._refusals = _Refusals()
        self._own = OwnReservations()
        self._requests: dict[asyncio.Task[None], _Waiting] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()  # all, those that are taken back included
        self._history = History()
        self._decision = Decision()
        self._began_at = time.monotonic()
        self._waited = 0.0
        self._failed_counts = 0
        self._no_list = ""  # why there is no newer list
        self._listed_at = -math.inf
        self._idle_since: float | None = None
        self._leaving = False

    async def look(self, every: float) -> None:
        """See how things are, decide, and do it. Vast's list is asked for once in `every` seconds.

        Or after a second, where reservations have ended: the last list counts meanwhile.
        """
        began_at = time.monotonic()
        if began_at - self._listed_at >= min(1.0, every):
            jobs, listed = await asyncio.gather(self._count_jobs(), self._count_listed())
        else:
            jobs, listed = await self._count_jobs(), None
        now = Snapshot(
            at=time.monotonic(),
            jobs=jobs,
            listed=listed,
            most_own=self._own.most_since(began_at - null_rule.LIST_LAG),
            own=tuple(self._own.held.values()),
            last_opened=self._own.last_opened,
            asked=len(self._requests),
            ended=self._own.ended,
            unreachable=len(self._unreachable.counts()),
            refused_until=self._refusals.until,
        )
        self._history, decision = decide(self._limits, self._history, now)
        if decision is not None:
            self._decision = decision
            self._take_back(decision.take_back)
            self._ask(decision.ask)
        self._note_troubles(now)
        self._show()

    async def until_next_look(self, began_at: float, every: float) -> None:
        """Wait for `every` seconds since the last look.

        Not for so long when the backlog tells a change, or a reservation has ended: then a second.
        A backlog that tells its changes may not have told yet what a consumer did before its end.
        """
        some_end = asyncio.ensure_future(self._own.some_end.wait())
        change = asyncio.ensure_future(self._backlog.changed.wait())
        try:
            await asyncio.wait(
                {some_end, change},
                timeout=began_at + every - time.monotonic(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if some_end.done() and not change.done():
                await asyncio.wait({change}, timeout=self._backlog.lag)
            pause = WATCH_PAUSE if change.done() else 1.0
        finally:
            some_end.cancel()
            change.cancel()
        await asyncio.sleep(began_at + min(pause, every) - time.monotonic())
        self._own.some_end.clear()

    def is_over(self) -> bool:
        """Whether nothing is left to do, and nothing is reserved. Raises Stuck."""
        never_counted = self._history.jobs is None
        bound = NEVER_COUNTED_AFTER if never_counted else GIVE_UP_AFTER
        lasting = self._troubles.lasting(bound, ["backlog"])
        lasting += self._troubles.lasting(GIVE_UP_AFTER, ["refused", "stuck", "stranded", "vast"])
        if lasting:
            raise Stuck("given up: " + "; ".join(lasting))
        return self._ends_in() == 0

    async def leave(self) -> None:
        """Take back what waits. What is reserved goes on without us."""
        self._leaving = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._backlog.close(), *self._tasks, return_exceptions=True)

    # What a look asks for

    async def _count_jobs(self) -> Jobs | None:
        try:
            jobs = await self._backlog.count()
        except Exception as error:  # noqa: BLE001  whatever it was, the jobs aren't known, so not 0
            self._failed_counts += 1
            self._troubles.set("backlog", one_line(error))
            return None
        self._troubles.set("backlog", "")
        return jobs

    async def _count_listed(self) -> int | None:
        """Count the reserved workers on Vast's list."""
        self._listed_at = time.monotonic()
        try:
            workers = await _within(LIST_TIMEOUT, self._endpoint.get_workers())
        except Exception as error:  # noqa: BLE001  the SDK has no class for it
            self._no_list = one_line(error)
            return None
        if not workers and self._own.held:
            self._no_list = "it is empty, while workers are reserved"
            return None
        words = [worker_word(worker.status, worker.cur_load) for worker in workers]
        self._no_list = ""
        return words.count("reserved")

    # What is done about it

    def _ask(self, number: int) -> None:
        for _ in range(number):
            task = asyncio.create_task(self._reserve_and_hand_over())
            self._requests[task] = _Waiting(time.monotonic())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _take_back(self, number: int) -> None:
        """Take back the latest requests: the others keep their places."""
        for task in list(self._requests)[len(self._requests) - number :]:
            del self._requests[task]
            task.cancel()

    async def _reserve_and_hand_over(self) -> None:
        """Hold a request, and the reservation that comes of it, until it ends."""
        task = asyncio.current_task()
        assert task is not None
        try:
            on_trouble = partial(self._note_answer, task)
            async with self._reserve_one(on_trouble=on_trouble) as session:
                session.hand_over()
                request = self._requests.pop(task, None)
                if request is not None:
                    self._waited = time.monotonic() - request.since
                self._refusals.are_over()
                with self._own.holding(task):
                    self._show()
                    await session.ended()
        except WorkerLost:
            pass  # it has ended, like any other
        except Exception as error:  # noqa: BLE001  whatever it was, the others go on
            self._refusals.note(error)
            self._troubles.set("refused", one_line(error))
        finally:
            self._requests.pop(task, None)
            self._show()

    def _note_answer(self, task: asyncio.Task[None], trouble: str) -> None:
        """Note what the router answered to a request; `trouble` is empty when all is well."""
        if task in self._requests:
            self._requests[task] = self._requests[task]._replace(trouble=trouble)
        if not trouble:
            self._refusals.are_over()

    # What a person is told

    def _note_troubles(self, now: Snapshot) -> None:
        """Tell what goes wrong, in a line that says what to look at."""
        history = self._history
        stranded = is_stranded(history, now.at)
        in_hand = (history.jobs.in_hand or 0) if history.jobs else 0
        for name, text in {
            "refused": None if self._refusals.until is not None else "",
            "vast": self._vast_is_silent(),
            "unreachable": unreachable_text(self._unreachable.counts()),
            "ghost": GHOST_TEXT.format(history.ghosts) if history.ghosts else "",
            "stuck": STUCK_TEXT if history.stuck else "",
            "stranded": STRANDED_TEXT.format(in_hand) if stranded else "",
            "idle": IDLE_TEXT if self._is_idle(now) else "",
            "waiting": WAITING_TEXT if self._waits_in_vain(now) else "",
        }.items():
            if text is not None:
                self._troubles.set(name, text)

    def _vast_is_silent(self) -> str:
        """Say what is wrong with the list of workers, or with the router."""
        if not self._history.others:
            return f"no list of workers: {self._no_list}" if self._no_list else ""
        named = self._unreachable.counts()
        for request in self._requests.values():
            if request.trouble and not any(url in request.trouble for url in named):
                return f"no worker yet: {one_line(request.trouble)}"
        return ""

    def _is_idle(self, now: Snapshot) -> bool:
        """Whether workers are reserved while there is no job, and that for IDLE_AFTER."""
        reserved = len(now.own) + self._decision.others
        if now.jobs is None or now.jobs.total > 0 or reserved == 0:
            self._idle_since = None
            return False
        if self._idle_since is None:
            self._idle_since = now.at
        return now.at - self._idle_since >= IDLE_AFTER

    def _waits_in_vain(self, now: Snapshot) -> bool:
        """Whether requests wait, and no worker has come for WAITING_AFTER."""
        oldest = min((request.since for request in self._requests.values()), default=math.inf)
        return now.at - max(oldest, self._own.last_opened) >= WAITING_AFTER

    def _ends_in(self) -> float | None:
        """Seconds until `once` ends. None while there is something to do, or reserved."""
        history = self._history
        if self._requests or self._own.held or self._decision.others or history.none_since is None:
            return None
        if nothing_is_left(self._limits, history, time.monotonic()):
            return 0.0
        return max(0.1, history.none_since + self._limits.settle - time.monotonic())

    def _show(self) -> None:
        if self._leaving:
            return
        self._on_progress(
            Progress(
                jobs=self._history.jobs,
                wanted=self._decision.wanted,
                own=len(self._own.held),
                others=self._decision.others,
                asked=len(self._requests),
                troubles=self._troubles.lines,
                opened=self._own.opened,
                waited=self._waited,
                reserved_seconds=self._own.seconds,
                failed_counts=self._failed_counts,
                ends_in=self._ends_in() if self._once else None,
            )
        )
