"""What null_client.py shows while it runs: live rows on a terminal, plain lines elsewhere, a chart.

A display is told what happens, and shows it. It asks Vast nothing. Whatever goes wrong here, and
whoever reads standard output slowly or not at all, no keep-alive is late and no status changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import queue
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from null_backlog import Jobs, Progress
    from null_reservation import Reservation

STANDARD_OUTPUT = 1
CHUNK = 4096  # bytes; a pipe that is ready takes so many without blocking
MAX_UNREAD = 1000  # texts that wait for the reader; what comes then is lost
REFRESH_PAUSE = 0.25  # seconds between two frames

BAR_WIDTH = 16  # columns
CHART_WIDTH = 40
MIN_CHART_WIDTH = 10  # in less room there is no chart
NAME_WIDTH = 9  # columns before the bars of a chart of reservations
BACKLOG_MARGIN = 17  # columns before the bars of a chart of a backlog
JOBS_HEIGHT = 5  # lines
RESERVED_HEIGHT = 3
MAX_HISTORY = 2000  # moments that the chart of a backlog is drawn from
NO_WORKER_AFTER = 10.0  # seconds; a job that has just been done may still be counted as in hand

GOOD = "green"
DOUBTFUL = "yellow"
BAD = "bold red"
STYLES = {"held": GOOD, "released": GOOD, "let go": DOUBTFUL, "lost": BAD, "not reserved": BAD}

P = ParamSpec("P")
log = logging.getLogger("null_display")


def harmless(show: Callable[P, None]) -> Callable[P, None]:
    """Log what showing something raises: it must not decide what is reserved, or the status."""

    @functools.wraps(show)
    def shown(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            show(*args, **kwargs)
        except Exception:
            log.debug("not shown", exc_info=True)

    return shown


# Standard output, and what is live on it


class Output:
    """Standard output as the file that rich writes to.

    A thread writes, so that a reader that is slow, stalled or gone holds nothing up.
    """

    def __init__(self, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in that thread when standard output has no reader left."""
        self.encoding = sys.stdout.encoding
        self.error: OSError | None = None  # why not everything could be written
        self._on_broken_pipe = on_broken_pipe
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the last one
        self._writer = threading.Thread(target=self._write_all, daemon=True)
        self._writer.start()

    def isatty(self) -> bool:
        return sys.stdout.isatty()

    def write(self, text: str) -> None:
        if self._texts.qsize() < MAX_UNREAD:
            self._texts.put(text)

    def flush(self) -> None:
        """Do nothing: the thread holds nothing back."""

    @property
    def has_unread(self) -> bool:
        """Whether the reader is behind."""
        return not self._texts.empty()

    def finish(self) -> None:
        """Say that nothing more will be written."""
        self._texts.put(None)

    @property
    def finished(self) -> bool:
        return not self._writer.is_alive()

    def join(self, seconds: float) -> None:
        """Wait until all is written, after finish(), for at most so many seconds."""
        self._writer.join(seconds)

    def _write_all(self) -> None:
        try:
            while (text := self._texts.get()) is not None:
                self._write_now(text.encode(self.encoding, "backslashreplace"))
        except BrokenPipeError as error:
            self.error = error
            self._on_broken_pipe()
        except OSError as error:  # no space left, for example
            self.error = error

    def _write_now(self, data: bytes) -> None:
        while data:
            select.select([], [STANDARD_OUTPUT], [])
            with contextlib.suppress(BlockingIOError):  # somebody else has made it non-blocking
                written = os.write(STANDARD_OUTPUT, data[:CHUNK])
                data = data[written:]


class Screen:
    """What a person sees: live rows on a terminal, and lines with the time of day.

    The event loop's thread draws all of it. Two threads would leave a frame behind: a line and
    rich's own refresh each move the cursor up by the height of the last frame, and rich holds no
    lock from there until the new frame is written (rich 15, Live.process_renderables).
    """

    def __init__(self, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in another thread when standard output has no reader left."""
        self.output = Output(on_broken_pipe)
        self._console = Console(
            file=self.output,  # type: ignore[arg-type]
            force_terminal=self.output.isatty(),
            highlight=False,
        )
        self.has_rows = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, get_renderable=self._render, auto_refresh=False)
        self._refreshing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Screen:
        if self.has_rows:
            self._live.start()
            self._refreshing = asyncio.create_task(self._keep_refreshing())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    @harmless
    def stop(self) -> None:
        """Leave the rows as they are: from here on there are only lines."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            self._refreshing = None
            self._live.stop()

    async def _keep_refreshing(self) -> None:
        while True:
            self._refresh()
            await asyncio.sleep(REFRESH_PAUSE)

    @harmless
    def _refresh(self) -> None:
        if not self.output.has_unread:  # a reader that is behind needs no more frames
            self._live.refresh()

    @harmless
    def say(self, line: str, style: str = "") -> None:
        """Show a line with the time of day."""
        moment = time.strftime("%H:%M:%S")
        if self.has_rows:
            row = Table.grid(padding=(0, 1))  # breaks lines between words, beside the time
            row.add_row(moment, Text(line, style, overflow="fold"))
            self._console.print(row)
        else:
            self._console.print(Text(f"{moment} {line}"), soft_wrap=True)

    def _show_lines(self, lines: Iterable[Text]) -> None:
        for line in lines:
            self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        """Return what is live."""
        raise NotImplementedError


# Single reservations


class Waiting(NamedTuple):
    asked_at: float  # by time.monotonic(), like all times below
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


class Display(Screen):
    """What a person sees of single reservations: a row for each on a terminal, lines elsewhere."""

    def __init__(self, rows: int, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in another thread when standard output has no reader left."""
        self.rows: dict[str, State] = {f"#{place + 1}": None for place in range(rows)}
        self.workers = ""  # the endpoint's, by state
        self.running: list[tuple[float, int]] = []  # when there were how many of them
        super().__init__(on_broken_pipe)

    # What becomes of a reservation

    def waits(self, name: str) -> None:
        self.rows[name] = Waiting(time.monotonic())
        self.say(f"{name} waiting for a worker")

    def has_trouble(self, name: str, trouble: str) -> None:
        """Show why the last try failed; `trouble` is empty when it didn't."""
        before = self.rows[name]
        if not isinstance(before, Waiting):
            return
        self.rows[name] = Waiting(before.asked_at, trouble)
        if trouble and trouble != before.trouble and not self.has_rows:
            self.say(f"{name} still waiting: {trouble}")

    def holds(self, name: str, session: Reservation) -> None:
        before = self.rows[name]
        now = time.monotonic()
        asked_at = before.asked_at if before else now
        self.rows[name] = Held(asked_at, now, session)
        where = address(session.url)
        if not self.has_rows:  # a log is searched for these
            where = f"session {session.session_id}, {session.url}"
        self.say(f"{name} held after {now - asked_at:.1f} s: {where}", GOOD)

    def holds_until(self, name: str, until: float) -> None:
        state = self.rows[name]
        if isinstance(state, Held):
            self.rows[name] = state._replace(until=until)

    def ended(self, name: str, how: str, reason: str = "") -> None:
        """Show that it has ended; `how` is released, let go, lost or not reserved."""
        before = self.rows[name]
        now = time.monotonic()
        held_at = before.held_at if isinstance(before, Held) else None
        asked_at = before.asked_at if before else now
        self.rows[name] = Ended(asked_at, held_at, now, how, reason)
        line = f"{name} {how}"
        if held_at is not None:
            line += f" after {now - held_at:.1f} s"
        if reason:
            line += f": {reason}"
        self.say(line, STYLES[how])

    @harmless
    def has_workers(self, words: list[str]) -> None:
        """Show the endpoint's workers, in a word each: reserved, free, loading, stopped, broken."""
        workers = count(words)
        if workers != self.workers and not self.has_rows:
            self.say(f"workers: {workers}")
        self.workers = workers
        running = len(words) - words.count("stopped")
        self.running.append((time.monotonic(), running))

    # What has become of all reservations

    @property
    def held(self) -> list[str]:
        return [name for name, state in self.rows.items() if isinstance(state, Held)]

    @property
    def ends(self) -> list[tuple[str, Ended]]:
        return [(name, state) for name, state in self.rows.items() if isinstance(state, Ended)]

    @property
    def all_settled(self) -> bool:
        """Whether none is planned or waiting any more."""
        return len(self.held) + len(self.ends) == len(self.rows)

    @property
    def all_ended(self) -> bool:
        return len(self.ends) == len(self.rows)

    @harmless
    def show_chart(self) -> None:
        """Show the chart, as the last thing. There is none on a terminal without room for it."""
        self.stop()
        width = CHART_WIDTH
        if self.has_rows:
            longest = max(len(summary(end)) for _, end in self.ends)
            width = min(width, self._console.width - NAME_WIDTH - longest - 3)
        if width >= MIN_CHART_WIDTH:
            self._show_lines(chart(self.ends, self.running, width))

    def _render(self) -> Group:
        now = time.monotonic()
        drawn = [(name, *describe(state, now)) for name, state in self.rows.items()]
        room = self._console.height - 3
        if len(drawn) > room:
            room = max(0, room - 1)  # a line for the rest
        table = Table.grid(padding=(0, 2))
        for _ in range(3):  # what is long stands in the last column
            table.add_column(no_wrap=True)
        for columns in drawn[:room]:
            table.add_row(*columns)
        lines = []
        rest = [str(columns[1]) for columns in drawn[room:]]
        if rest:
            lines.append(f"and {len(rest)} more: {count(rest)}")
        if self.workers:
            lines.append(f"workers: {self.workers}")
        return Group(table, *map(one_line, lines))


def one_line(text: str, style: str = "") -> Text:
    """Return text that is cut off at the terminal's edge."""
    return Text(text, style, overflow="ellipsis", no_wrap=True)


def count(names: Iterable[str]) -> str:
    """Return how many there are of each: `2 free, 1 loading`."""
    counts = sorted(Counter(names).items())
    return ", ".join(f"{number} {name}" for name, number in counts) or "none"


def address(url: str) -> str:
    """Return the part of a worker's URL by which a person tells it from others."""
    return url.partition("://")[2] or url


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def describe(state: State, now: float) -> tuple[Text, str, str | ProgressBar, Text]:
    """Return a row's columns: the state, the time in it, the progress, and what else to know."""
    if state is None:
        return Text("planned"), "", "", one_line("")
    if isinstance(state, Waiting):
        return Text("waiting"), clock(now - state.asked_at), "", one_line(state.trouble, DOUBTFUL)
    if isinstance(state, Held):
        return Text("held", GOOD), clock(now - state.held_at), progress(state, now), holder(state)
    began_at = state.asked_at if state.held_at is None else state.held_at
    style = STYLES[state.how]
    lasted = clock(state.ended_at - began_at)
    return Text(state.how, style), lasted, "", one_line(state.reason, style)


def progress(held: Held, now: float) -> str | ProgressBar:
    """Return how much of the time is over for which a reservation is to be held."""
    if held.until is None:
        return "until all are held"
    if math.isinf(held.until):
        return "until released"
    total = held.until - held.held_at
    return ProgressBar(total, min(now - held.held_at, total), width=BAR_WIDTH)


def holder(held: Held) -> Text:
    """Return where it is held, or that nothing is heard from there."""
    if held.session.unreachable:
        left = max(0, held.session.time_to_live)
        return one_line(f"not answering, given up in {left:.0f} s", DOUBTFUL)
    return one_line(f"on {address(held.session.url)}", "dim")


def summary(end: Ended) -> str:
    """Return how a reservation went, in words: `waited 2 s, held 6 s, released`."""
    held_at = end.ended_at if end.held_at is None else end.held_at
    words = [f"waited {held_at - end.asked_at:.0f} s"]
    if end.held_at is not None:
        words.append(f"held {end.ended_at - end.held_at:.0f} s")
    return ", ".join([*words, end.how])


def chart(
    rows: list[tuple[str, Ended]],
    workers: list[tuple[float, int]],
    width: int = CHART_WIDTH,
) -> list[Text]:
    """Return one line per reservation over a common time axis, and how many workers there were.

    A line has dots while the reservation waited and = while it was held; an x ends one that failed.
    `workers` says when there were how many.
    """
    first = min(end.asked_at for _, end in rows)
    last = max([end.ended_at for _, end in rows] + [moment for moment, _ in workers])
    scale = width / max(last - first, 0.001)  # columns in a second

    def column(moment: float) -> int:
        return round((moment - first) * scale)

    axis = f"{'0 s':<{width - 8}}{f'{last - first:.0f} s':>8}"
    lines = [Text(f"{'':<{NAME_WIDTH}}{axis}  . waiting  = held")]
    for name, end in rows:
        held_at = end.ended_at if end.held_at is None else end.held_at
        bar = " " * column(end.asked_at)
        bar += "." * (column(held_at) - column(end.asked_at))
        bar += "=" * (column(end.ended_at) - column(held_at))
        style = STYLES[end.how]
        if style == BAD:
            bar = bar[: width - 1] + "x"
        lines.append(Text(f"{name:<{NAME_WIDTH}}{bar:<{width}}  ").append(summary(end), style))
    if workers:
        line = workers_line(workers, first, scale, width)
        lines.append(Text(f"{'workers':<{NAME_WIDTH}}{line}"))
    return lines


def workers_line(workers: list[tuple[float, int]], first: float, scale: float, width: int) -> str:
    """Return a digit for each column of the chart: how many there were then, + for ten and more."""
    counts = [" "] * width
    for moment, number in workers:
        place = int((moment - first) * scale)
        place = max(0, min(width - 1, place))
        digit = str(number) if number < 10 else "+"
        counts[place:] = [digit] * (width - place)
    return "".join(counts)


# A backlog


class BacklogDisplay(Screen):
    """What a person sees of a backlog and of the workers reserved for it."""

    def __init__(self, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in another thread when standard output has no reader left."""
        self._progress: Progress | None = None
        self._progress_at = 0.0
        self._workers = "none"  # the endpoint's, by what they do
        self._asked_since: float | None = None
        self._unworked_since: float | None = None  # jobs are in hand, and no worker is reserved
        self._history: list[tuple[float, int, int]] = []  # when, how many jobs, how many reserved
        super().__init__(on_broken_pipe)

    @harmless
    def has_progressed(self, progress: Progress) -> None:
        before = self._progress
        now = time.monotonic()
        self._progress = progress
        self._progress_at = now
        changed = before is None or backlog_line(progress) != backlog_line(before)
        if changed and not self.has_rows:
            self.say(backlog_line(progress))
        self._asked_since = begin(self._asked_since, progress.asked > 0, now)
        self._unworked_since = begin(self._unworked_since, jobs_without_worker(progress) > 0, now)
        self._remember(progress)

    def has_trouble(self, line: str) -> None:
        """Show a line of follow()'s: that something goes wrong, or that this is over."""
        self.say(line, GOOD if line.endswith(": over") else BAD)

    @harmless
    def has_workers(self, words: list[str]) -> None:
        """Show the endpoint's workers, in a word each: reserved, free, loading, stopped, broken."""
        workers = count(words)
        if workers != self._workers and not self.has_rows:
            self.say(f"workers: {workers}")
        self._workers = workers

    def _remember(self, progress: Progress) -> None:
        """Note a moment for the chart. What lasts for weeks is noted in less detail."""
        if progress.jobs is None:
            return
        reserved = progress.own + progress.others
        self._history.append((time.monotonic(), progress.jobs.total, reserved))
        if len(self._history) > MAX_HISTORY:
            del self._history[1::2]

    @harmless
    def show_end(self) -> None:
        """Show how much was reserved and, on a terminal with room for it, jobs over workers."""
        self.stop()
        now = time.monotonic()
        width = min(CHART_WIDTH, self._console.width - BACKLOG_MARGIN - 1)
        if self.has_rows and self._history and width >= MIN_CHART_WIDTH:
            self._show_lines(map(Text, backlog_chart(self._history, now, width)))
        if self._progress is not None:
            in_all = reserved_seconds(self._progress, now - self._progress_at)
            self.say(f"reserved in all: {gpu_time(in_all)}")

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        if self._progress is not None:
            now = time.monotonic()
            lasted = Lasted(
                progress=now - self._progress_at,
                asked=0.0 if self._asked_since is None else now - self._asked_since,
                unworked=0.0 if self._unworked_since is None else now - self._unworked_since,
            )
            for name, text, style in backlog_rows(self._progress, self._workers, lasted):
                table.add_row(name, Text(text, style, overflow="fold"))
        return Group(table)


class Lasted(NamedTuple):
    """For how many seconds it has been so."""

    progress: float = 0.0  # as it was told last
    asked: float = 0.0  # something is asked for
    unworked: float = 0.0  # jobs are in hand, and no worker is reserved


def begin(since: float | None, is_so: bool, now: float) -> float | None:
    """Return since when it has been so, from when it was so before."""
    if not is_so:
        return None
    return now if since is None else since


def jobs_without_worker(progress: Progress) -> int:
    """Return how many jobs are in hand, where no worker is reserved that could have them."""
    if progress.jobs is None or progress.own or progress.others:
        return 0
    return progress.jobs.in_hand or 0


def backlog_rows(progress: Progress, workers: str, lasted: Lasted) -> list[tuple[str, str, str]]:
    """Return the live rows: a name, a text, and its style.

    `workers` are the endpoint's, by what they do.
    """
    reserved = progress.own + progress.others
    asked = str(progress.asked)
    if progress.asked:
        asked += f", waiting {clock(lasted.asked)}"
    rows = [("jobs", jobs_in_full(progress.jobs), "")]
    unworked = jobs_without_worker(progress)
    if unworked and lasted.unworked >= NO_WORKER_AFTER:
        has = "1 job in hand has" if unworked == 1 else f"{unworked} jobs in hand have"
        rows.append(("", f"{has} no worker", DOUBTFUL))
    rows += [
        ("wanted", str(progress.wanted), ""),
        ("reserved", f"{reserved}{by_others(progress)}", GOOD if reserved else ""),
        ("asked for", asked, ""),
        ("workers", workers, BAD if "broken" in workers else ""),
        ("so far", f"{gpu_time(reserved_seconds(progress, lasted.progress))} reserved", ""),
    ]
    if progress.ends_in is not None:
        left = max(0.0, progress.ends_in - lasted.progress)
        rows.append(("ending", f"in {left:.0f} s unless a job comes", GOOD))
    for name, line in progress.troubles.items():
        rows.append((name, line.removeprefix(f"{name}: "), BAD))
    return rows


def reserved_seconds(progress: Progress, age: float) -> float:
    """Return for how long workers were reserved in all, `age` seconds after it was told."""
    return progress.reserved_seconds + progress.own * age


def gpu_time(seconds: float) -> str:
    """Return the time of reserved workers as a person would say it."""
    if seconds < 3600:
        return f"{seconds / 60:.1f} GPU-minutes"
    return f"{seconds / 3600:.1f} GPU-hours"


def jobs_text(jobs: Jobs | None) -> str:
    if jobs is None:
        return "not known"
    if jobs.in_hand is None:
        return f"{jobs.waiting} to do"
    return f"{jobs.waiting} waiting, {jobs.in_hand} in hand"


def jobs_in_full(jobs: Jobs | None) -> str:
    """Return all three numbers. The third changes too often for a line each."""
    text = jobs_text(jobs)
    return text if jobs is None or jobs.done is None else f"{text}, {jobs.done} done"


def by_others(progress: Progress) -> str:
    return f" ({progress.others} by others)" if progress.others else ""


def backlog_line(progress: Progress) -> str:
    """Return the numbers in a line: `jobs: 7 to do; 3 wanted, 2 reserved, 1 asked for`."""
    reserved = f"{progress.own + progress.others} reserved{by_others(progress)}"
    numbers = f"{progress.wanted} wanted, {reserved}, {progress.asked} asked for"
    return f"jobs: {jobs_text(progress.jobs)}; {numbers}"


def backlog_chart(history: list[tuple[float, int, int]], end: float, width: int) -> list[str]:
    """Return jobs over reserved workers, on one time axis.

    `history` says when there were how many jobs and how many reserved.
    """
    begin = history[0][0]
    scale = width / max(end - begin, 0.001)  # columns in a second
    jobs = [0] * width
    reserved = [0] * width

    def column(moment: float) -> int:
        return min(width - 1, int((moment - begin) * scale))

    ends = [*(moment for moment, _, _ in history[1:]), end]  # each lasts until the next one
    for (moment, jobs_then, reserved_then), until in zip(history, ends, strict=True):
        for place in range(column(moment), column(until) + 1):
            jobs[place] = max(jobs[place], jobs_then)
            reserved[place] = max(reserved[place], reserved_then)
    axis = f"{'0 s':<{width - 8}}{f'{end - begin:.0f} s':>8}"
    lines = [*bars("jobs", jobs, JOBS_HEIGHT), *bars("reserved", reserved, RESERVED_HEIGHT)]
    return [*lines, " " * BACKLOG_MARGIN + axis]


def bars(name: str, numbers: list[int], height: int) -> list[str]:
    """Return a bar chart, at most so many lines high, with its highest number at the top."""
    highest = max(1, *numbers)
    height = min(height, highest)
    lines = []
    for level in range(height, 0, -1):  # a column reaches a level if it is above the one below
        filled = ["#" if number * height > (level - 1) * highest else " " for number in numbers]
        label = f"{name:<9}{highest:>6}" if level == height else ""
        lines.append(f"{label:<{BACKLOG_MARGIN - 1}}|{''.join(filled)}".rstrip())
    return lines
