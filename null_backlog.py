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
import os
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from null_reservation import Refused, Reservation, ReservationError, WorkerLost, reserve

if TYPE_CHECKING:
    from vastai import Endpoint  # type: ignore[import-untyped]

__all__ = ["Jobs", "NotCounted", "Progress", "Stuck", "follow"]

LIST_LAG = 15.0  # seconds by which Vast's list of workers may be behind
LIST_KEPT = 60.0  # seconds for which the last list counts while no newer one comes
LIST_TIMEOUT = 10.0  # seconds for Vast's list
BACKLOG_TIMEOUT = 20.0  # seconds for the backlog to be counted
MAX_OUTPUT = 4096  # bytes of what a backlog command prints
STUCK_AFTER = 3  # reservations that have ended while nothing moved
STUCK_TEXT = (
    f"stuck: {STUCK_AFTER} reservations have ended and no job has moved, so one is held at a time. "
    "Look at the consumers: do they run, and pull from the queue that is counted here?"
)
LONGEST_PAUSE = 60.0  # seconds between two requests that are likely to be in vain
GIVE_UP_AFTER = 600.0  # seconds of being stuck or refused after which `once` ends
HOLD_NOTHING = ("stopped", "stopping", "broken", "loading", "unknown")  # workers, on Vast's list

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
    if course.stuck_since is None and look.ended - course.ended_before >= STUCK_AFTER:
        return course._replace(stuck_since=look.at)
    return course


def _since(moment: float, notes: Iterable[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    return tuple(note for note in notes if note[0] > moment)


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
    if len(words) > 3 or not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        printed = f"{' '.join(words)!r:.60}"
        raise NotCounted(f"it printed {printed}, not one to three whole numbers{said}")
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
        errors = (errors + _read(process.stderr)).rstrip()[-MAX_OUTPUT:]
        if len(output) > MAX_OUTPUT:
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


class OwnReservations:
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
        self._held = OwnReservations()
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
            if since is not None and now - since >= GIVE_UP_AFTER:
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
