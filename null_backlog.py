"""Follow a backlog: as many reserved workers as there are jobs, and why when there are fewer.

    await follow(endpoint, backlog, most)

`follow()` counts the jobs, looks at Vast's list of workers, and lets `decide()`, a pure function of
numbers, say how many workers to ask for. Each worker is handed over to its consumer at once, which
keeps it for as long as it finds jobs. Needs null_reservation.py beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from null_reservation import (
    Refused,
    Reservation,
    ReservationError,
    UnreachableWorkers,
    WorkerLost,
    reserve,
)

if TYPE_CHECKING:
    from vastai import Endpoint  # type: ignore[import-untyped]

__all__ = ["Jobs", "NotCounted", "Progress", "Stuck", "follow"]

LIST_LAG = 15.0  # seconds by which Vast's list of workers may be behind
LIST_KEPT = 60.0  # seconds for which the last list counts while no newer one comes
LIST_TIMEOUT = 10.0  # seconds for Vast's list
BACKLOG_TIMEOUT = 20.0  # seconds for the backlog to be counted

STUCK_AFTER = 3  # own reservations that have ended while nothing moved
GROWTH = 120.0  # seconds for which a number that grows may hide that jobs get done
WORKED_AFTER = 30.0  # seconds in hand after which a job counts as worked on
GHOST_AFTER = 600.0  # seconds without a job after which another's reservation doesn't count
STRANDED_AFTER = 60.0  # seconds
LONGEST_PAUSE = 60.0  # seconds between two requests that are likely to be in vain
LONGEST_RESCUE_PAUSE = 3600.0  # seconds between two workers for stranded jobs

IDLE_AFTER = 120.0  # seconds without a job after which a reserved worker is told
WAITING_AFTER = 600.0  # seconds without a new worker after which that is told
GIVE_UP_AFTER = 600.0  # seconds of one trouble after which `once` ends
NEVER_COUNTED_AFTER = 60.0  # seconds likewise, where the backlog was never counted

STUCK_TEXT = (
    f"{STUCK_AFTER} reservations have ended and no job has moved, so one is held at a time. "
    "Look at the consumers: do they run, and pull from the queue that is counted here?"
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


class Jobs(NamedTuple):
    """A backlog: the jobs that aren't done."""

    waiting: int  # where only one number is known, the jobs in hand too
    in_hand: int | None = None
    done: int | None = None  # ever done or put aside

    @property
    def total(self) -> int:
        return self.waiting + (self.in_hand or 0)


class Limits(NamedTuple):
    """What the caller of follow() has set."""

    most: int  # reservations
    jobs_per_worker: int = 1
    settle: float = 30.0  # seconds

    def workers_for(self, jobs: int) -> int:
        """Round up, exactly for numbers of any size."""
        return -(-jobs // self.jobs_per_worker)


class Snapshot(NamedTuple):
    """What follow() sees at one moment, in numbers. Times are in seconds, by one steady clock."""

    at: float
    jobs: Jobs | None  # None: not known
    listed: int | None  # reserved workers on Vast's list, whoever's they are; None: not known
    most_own: int = 0  # own reservations held at a time, from LIST_LAG before the list on
    own: Sequence[float] = ()  # when each own reservation that is held was opened
    last_opened: float = -math.inf  # when the latest own reservation was opened, held or not
    asked: int = 0  # own requests that wait for a worker
    ended: int = 0  # own reservations that have ended since the start
    unreachable: int = 0  # workers that the router has named and nobody reached
    refused_until: float | None = None  # while Vast refuses: when to ask again


Counts = tuple[tuple[float, int], ...]  # when, and how many


class Mark(NamedTuple):
    """A moment, and how things were then."""

    at: float
    jobs: int
    ended: int


class History(NamedTuple):
    """What the snapshots so far leave behind for the next one."""

    not_before: float | None = None  # when to ask for the first worker; None: no list has come yet
    others: Counts = ()  # reservations of others, for the last LIST_LAG
    jobless: Counts = ()  # reservations of others that had no job
    ghosts: int = 0  # reservations of others that had no job for GHOST_AFTER: they don't count
    wanted: Counts = ()  # workers, for the last `settle` seconds
    last_wanted: int = 0
    jobs: Jobs | None = None  # the last ones that were known
    pulled_at: float = -math.inf  # when a count last showed that jobs are pulled
    moved: Mark = Mark(-math.inf, 0, 0)  # when jobs last moved, or before the first end since
    stuck: bool = False
    stranded_since: float | None = None
    rescues: int = 0  # workers asked for since then
    none_since: float | None = None  # when the first of the latest counts found no job
    counts_of_none: int = 0


class Decision(NamedTuple):
    """What to do now."""

    wanted: int = 0  # workers in all
    others: int = 0  # reserved by others
    ask: int = 0  # for so many more
    take_back: int = 0  # so many requests, the latest ones


def decide(limits: Limits, history: History, now: Snapshot) -> tuple[History, Decision | None]:
    """Say how many workers to ask for or take back. None: not known, so do neither.

    The rule was tried in tests/simulation.py. Change it there first.
    """
    history = _note_list(history, now)
    history = history._replace(wanted=_since(now.at - limits.settle, history.wanted))
    if now.jobs is None or not history.others:
        return _note_gap(history, now), None
    history = _note_jobs(history, now, now.jobs)
    loading = sum(opened_at > history.pulled_at for opened_at in now.own)
    history = _note_ghosts(history, now, now.jobs, own_working=len(now.own) - loading)
    others = max(count for _, count in history.others) - history.ghosts
    reserved = len(now.own) + others
    history = _note_stranded(history, now, now.jobs, working=reserved - loading)
    wanted = _wanted(limits, history, now, now.jobs, working=reserved - loading)
    history = history._replace(wanted=(*history.wanted, (now.at, wanted)), last_wanted=wanted)
    ask = wanted - reserved - now.asked
    take_back = now.asked - max(0, max(count for _, count in history.wanted) - reserved)
    if history.stuck:
        ask = min(ask, _one_at_a_time(history, now))
        take_back = max(take_back, now.asked - 1)
    if history.not_before is None or now.at < history.not_before:
        ask = 0
    if now.refused_until is not None:
        ask = min(ask, 1 - now.asked) if now.at >= now.refused_until else 0
    if is_stranded(history, now.at):
        ask = min(ask, _rescue_is_due(history, now))
        history = history._replace(rescues=history.rescues + max(0, ask))
    return history, Decision(wanted, others, max(0, ask), max(0, take_back))


def _note_gap(history: History, now: Snapshot) -> History:
    """Let the last number of workers stand while the jobs, or the list, aren't known."""
    wanted = (*history.wanted, (now.at, history.last_wanted))
    return history._replace(wanted=wanted, none_since=None, counts_of_none=0)


def _wanted(limits: Limits, history: History, now: Snapshot, jobs: Jobs, working: int) -> int:
    """Return how many workers the jobs need that wait, or that reserved workers may have in hand.

    A worker that was just reserved may take minutes to load before it pulls: until then jobs in
    hand are somebody else's.
    """
    if is_stranded(history, now.at):
        return 1
    in_hand = min(jobs.in_hand or 0, limits.jobs_per_worker * working)
    return min(limits.most, limits.workers_for(jobs.waiting + in_hand))


def _one_at_a_time(history: History, now: Snapshot) -> int:
    """While stuck: one, and once it has ended the next, 1, 2, 4 ... 60 s after it was opened."""
    in_vain = now.ended - history.moved.ended - STUCK_AFTER
    due = now.last_opened + min(LONGEST_PAUSE, 2.0 ** min(max(0, in_vain), 9))
    if now.last_opened in now.own or now.at < due:
        return 0
    return 1 - now.asked


def _note_list(history: History, now: Snapshot) -> History:
    """Count the reservations of others: those on Vast's list that aren't ours.

    The list may lag. What we have just ended isn't somebody else's, and what it doesn't show yet
    isn't free. A worker that nobody reaches stays on the list with the load of requests that never
    arrived.
    """
    if now.listed is None:
        last = [each for each in history.others[-1:] if each[0] >= now.at - LIST_KEPT]
        return history._replace(others=_since(now.at - LIST_LAG, history.others) or tuple(last))
    newest = (now.at, max(0, now.listed - now.most_own - now.unreachable))
    not_before = history.not_before
    if not_before is None:  # the list may not show yet what a predecessor has just opened
        not_before = now.at + LIST_LAG if now.listed else now.at
    others = (*_since(now.at - LIST_LAG, history.others), newest)
    return history._replace(others=others, not_before=not_before)


def _note_jobs(history: History, now: Snapshot, jobs: Jobs) -> History:
    """See whether jobs are pulled, whether they move, and whether none is left.

    Stuck is when reservations end, one after the other, and no job gets done.
    """
    before = history.jobs
    none_since = None
    if jobs.total == 0:
        none_since = now.at if history.none_since is None else history.none_since
    history = history._replace(
        jobs=jobs,
        none_since=none_since,
        counts_of_none=history.counts_of_none + 1 if jobs.total == 0 else 0,
    )
    mark = Mark(now.at, jobs.total, now.ended)
    if before is None:
        return history._replace(pulled_at=now.at, moved=mark)
    if jobs.waiting < before.waiting or jobs.in_hand != before.in_hand:
        history = history._replace(pulled_at=now.at)
    ended = now.ended - history.moved.ended
    if ended == 0 or _moved(history, now, before, jobs):
        return history._replace(moved=mark, stuck=False)
    if jobs.done is None and now.at < max(history.moved.at, history.pulled_at) + GROWTH:
        # A queue that grows hides that jobs get done: each job that has come excuses one end.
        ended -= max(0, jobs.total - history.moved.jobs)
    return history._replace(stuck=ended >= STUCK_AFTER)


def _moved(history: History, now: Snapshot, before: Jobs, jobs: Jobs) -> bool:
    """Whether a job gets done, as far as the numbers tell."""
    if jobs.waiting == 0 or _latest_works(history, now, jobs):
        return True
    if jobs.done is not None and before.done is not None:
        return jobs.done > before.done
    return jobs.total < before.total


def _latest_works(history: History, now: Snapshot, jobs: Jobs) -> bool:
    """Whether the latest reservation is held, and has had a job in hand for WORKED_AFTER."""
    pulled_long_ago = now.last_opened < history.pulled_at < now.at - WORKED_AFTER
    return bool(jobs.in_hand) and now.last_opened in now.own and pulled_long_ago


def _note_ghosts(history: History, now: Snapshot, jobs: Jobs, own_working: int) -> History:
    """Find the reservations of others that have had no job for GHOST_AFTER.

    With one number nobody knows who has a job in hand: then all of them are jobless while no job
    moves.
    """
    if history.stuck:  # ours found nothing to do, so the jobs in hand may be theirs
        return history._replace(jobless=(), ghosts=0)
    others = max(count for _, count in history.others)
    working = max(0, (jobs.in_hand or 0) - own_working)
    if jobs.in_hand is None and history.pulled_at == now.at:
        working = others
    jobless = (*history.jobless, (now.at, max(0, others - working)))
    ghosts = min(history.ghosts, others)
    if jobless[0][0] <= now.at - GHOST_AFTER:
        ghosts = max(ghosts, min(count for _, count in jobless))
        jobless = _since(now.at - GHOST_AFTER, jobless)
    return history._replace(jobless=jobless, ghosts=ghosts)


def _note_stranded(history: History, now: Snapshot, jobs: Jobs, working: int) -> History:
    """See whether jobs are in hand that no reserved worker can have."""
    if jobs.waiting or not jobs.in_hand or working > 0:
        return history._replace(stranded_since=None, rescues=0)
    if history.stranded_since is None:
        return history._replace(stranded_since=now.at)
    return history


def is_stranded(history: History, at: float) -> bool:
    """Whether that has lasted: most systems give a dead worker's job back before that."""
    return history.stranded_since is not None and at >= history.stranded_since + STRANDED_AFTER


def _rescue_is_due(history: History, now: Snapshot) -> int:
    """One worker, the next 2, 4, 8 ... 60 min after it: some systems give back only to one."""
    pause = min(LONGEST_RESCUE_PAUSE, 60.0 * 2.0 ** min(history.rescues, 9))
    if history.rescues and now.at < now.last_opened + pause:
        return 0
    return 1 - now.asked - len(now.own)


def nothing_is_left(limits: Limits, history: History, at: float) -> bool:
    """Whether each count of the last `settle` seconds, two at least, found no job."""
    if history.none_since is None or history.counts_of_none < 2:
        return False
    return at - history.none_since >= limits.settle


def _since(moment: float, counts: Iterable[tuple[float, int]]) -> Counts:
    return tuple(count for count in counts if count[0] > moment)


class NotCounted(Exception):
    """The backlog isn't known. Its text says why."""


def as_jobs(answer: object) -> Jobs:
    """Take one to three whole numbers, not negative, for jobs. Raises NotCounted."""
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
    named = ", ".join(f"{url} ({times} tries)" for url, times in tries.items())
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
            self._pause = LONGEST_PAUSE
        self.until = now + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)

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
        self._counts = [(moment, before[-1] if before else 0), *_since(moment, self._counts)]
        return max(count for _, count in self._counts)


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

    `backlog` is asked every `every` seconds how many jobs aren't done. It answers with one number,
    or with two, waiting and in hand, or with three, the third being how many jobs were ever done
    or put aside. `most` is how many reservations there may be, `jobs_per_worker` for how many jobs
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
    follower = _Follower(
        endpoint, backlog, limits, once, reserve_one, unreachable, on_progress, on_trouble
    )
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
        self._idle_since: float | None = None
        self._leaving = False

    async def look(self) -> None:
        """See how things are, decide, and do it."""
        began_at = time.monotonic()
        jobs, listed = await asyncio.gather(self._count_jobs(), self._count_listed())
        now = Snapshot(
            at=time.monotonic(),
            jobs=jobs,
            listed=listed,
            most_own=self._own.most_since(began_at - LIST_LAG),
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
        """Wait for `every` seconds since the last look, or one when a reservation has ended."""
        ending = asyncio.ensure_future(self._own.some_end.wait())
        try:
            await asyncio.wait({ending}, timeout=began_at + every - time.monotonic())
        finally:
            ending.cancel()
        await asyncio.sleep(began_at + min(1.0, every) - time.monotonic())
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
        if self._tasks:
            await asyncio.wait(self._tasks)

    # What a look asks for

    async def _count_jobs(self) -> Jobs | None:
        try:
            jobs = as_jobs(await _within(BACKLOG_TIMEOUT, self._backlog()))
        except Exception as error:  # noqa: BLE001  whatever it was, the jobs aren't known, so not 0
            self._failed_counts += 1
            self._troubles.set("backlog", one_line(error))
            return None
        self._troubles.set("backlog", "")
        return jobs

    async def _count_listed(self) -> int | None:
        """Count the reserved workers on Vast's list."""
        try:
            workers = await _within(LIST_TIMEOUT, self._endpoint.get_workers())
        except Exception as error:  # noqa: BLE001  the SDK has no class for it
            self._no_list = one_line(error)
            return None
        if not workers and self._own.held:
            self._no_list = "it is empty, while workers are reserved"
            return None
        words = [worker_word(worker.status, worker.cur_load) for worker in workers]
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
