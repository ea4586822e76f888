"""What null_client.py shows while it runs: live rows on a terminal, plain lines elsewhere, a chart.

A Display is told what becomes of each reservation, and says so. Nothing here asks Vast anything,
and nothing that a reader of standard output does, or doesn't do, holds up a keep-alive.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from null_backlog import Jobs, Progress
    from null_reservation import Reservation

STANDARD_OUTPUT = 1
CHUNK = 4096  # bytes; a pipe that is ready takes so many without blocking
MOST_TEXTS = 1000  # that wait for the reader; what comes then is lost
BAR_WIDTH = 16
CHART_WIDTH = 40

MOST_HISTORY = 2000  # moments that the chart of a backlog is drawn from
JOBS_HEIGHT = 5  # lines
RESERVED_HEIGHT = 3
BACKLOG_MARGIN = 17  # columns before its bars


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


class Output:
    """Standard output as the file that rich writes to.

    A thread of its own does the writing: a reader that is slow, stalled or gone holds nothing up.
    """

    def __init__(self, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in that thread when standard output has no reader left."""
        self.on_terminal = sys.stdout.isatty()
        self.encoding = sys.stdout.encoding
        self._on_broken_pipe = on_broken_pipe
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the last one
        self._lost = False  # something that was to be written
        self._progress_at = time.monotonic()
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def write(self, text: str) -> None:
        if self._texts.qsize() < MOST_TEXTS:
            self._texts.put(text)
        else:
            self._lost = True

    def flush(self) -> None:
        """The thread holds nothing back."""

    def finish(self) -> None:
        """Nothing more will be written."""
        self._progress_at = time.monotonic()
        self._texts.put(None)

    def join(self, seconds: float) -> None:
        """After finish(): wait until all is written, so long at most."""
        self._printer.join(seconds)

    @property
    def stalled_for(self) -> float:
        """Seconds since the reader took something."""
        return time.monotonic() - self._progress_at

    @property
    def finished(self) -> bool:
        return not self._printer.is_alive()

    @property
    def complete(self) -> bool:
        """Whether all that was to be written has been."""
        return self.finished and not self._lost

    def _print(self) -> None:
        try:
            while True:
                text = self._texts.get()
                if text is None:
                    return
                self._print_all(text.encode(self.encoding, "backslashreplace"))
        except BrokenPipeError:
            self._lost = True
            self._on_broken_pipe()
        except OSError:  # no space left, say
            self._lost = True

    def _print_all(self, data: bytes) -> None:
        while data:
            select.select([], [STANDARD_OUTPUT], [])
            with contextlib.suppress(BlockingIOError):  # somebody else has made it non-blocking
                written = os.write(STANDARD_OUTPUT, data[:CHUNK])
                data = data[written:]
                self._progress_at = time.monotonic()


class Screen:
    """What a person sees: something live on a terminal, and lines with times."""

    def __init__(self, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in another thread when standard output has no reader left."""
        self.output = Output(on_broken_pipe)
        self._console = Console(
            file=self.output,  # type: ignore[arg-type]
            force_terminal=self.output.on_terminal,
            highlight=False,
        )
        self.live = Live(
            console=self._console,
            get_renderable=self._render,
            transient=not self.output.on_terminal,
        )

    def say(self, line: str) -> None:
        """A line for the log."""
        moment = time.strftime("%H:%M:%S")
        if self.output.on_terminal:
            row = Table.grid(padding=(0, 1))  # breaks lines between words, beside the time
            row.add_row(moment, Text(line, overflow="fold"))
            self._console.print(row)
        else:
            self._console.print(Text(f"{moment} {line}"), soft_wrap=True)

    def _render(self) -> Group:
        """What is live."""
        raise NotImplementedError


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
        """`trouble` is empty when there is none any more."""
        before = self.rows[name]
        if not isinstance(before, Waiting):
            return
        self.rows[name] = Waiting(before.asked_at, trouble)
        if trouble and trouble != before.trouble and not self.output.on_terminal:
            self.say(f"{name} still waiting: {trouble}")

    def holds(self, name: str, session: Reservation) -> None:
        before = self.rows[name]
        now = time.monotonic()
        asked_at = before.asked_at if before else now
        self.rows[name] = Held(asked_at, now, session)
        held = f"{name} held after {now - asked_at:.1f} s"
        self.say(f"{held}: session {session.session_id}, {session.url}")

    def holds_until(self, name: str, until: float) -> None:
        state = self.rows[name]
        if isinstance(state, Held):
            self.rows[name] = state._replace(until=until)

    def ended(self, name: str, how: str, reason: str = "") -> None:
        """`how`: released, let go, lost or not reserved."""
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
        self.say(line)

    def has_workers(self, words: list[str]) -> None:
        """The endpoint's workers, in a word each: reserved, free, loading, stopped, broken."""
        workers = count(words)
        if workers != self.workers and not self.output.on_terminal:
            self.say(f"workers: {workers}")
        self.workers = workers
        running = len(words) - words.count("stopped")
        self.running.append((time.monotonic(), running))

    # What has become of them

    @property
    def held(self) -> list[str]:
        return [name for name, state in self.rows.items() if isinstance(state, Held)]

    @property
    def ends(self) -> list[tuple[str, Ended]]:
        return [(name, state) for name, state in self.rows.items() if isinstance(state, Ended)]

    @property
    def all_settled(self) -> bool:
        """None is planned or waiting any more."""
        return len(self.held) + len(self.ends) == len(self.rows)

    @property
    def all_ended(self) -> bool:
        return len(self.ends) == len(self.rows)

    def show_chart(self) -> None:
        self.live.stop()
        self.output.write("\n".join(chart(self.ends, self.running)) + "\n")

    def _render(self) -> Group:
        now = time.monotonic()
        drawn = [[name, *describe(state, now)] for name, state in self.rows.items()]
        room = self._console.height - 3
        if len(drawn) > room:
            room = max(0, room - 1)  # a line for the rest
        table = Table.grid(padding=(0, 2))
        for columns in drawn[:room]:
            table.add_row(*columns)
        lines = []
        rest = [str(columns[1]) for columns in drawn[room:]]
        if rest:
            lines.append(f"and {len(rest)} more: {count(rest)}")
        if self.workers:
            lines.append(f"workers: {self.workers}")
        return Group(table, *map(one_line, lines))


class BacklogDisplay(Screen):
    """What a person sees of a backlog and of the workers reserved for it."""

    def __init__(self, on_broken_pipe: Callable[[], object]) -> None:
        """`on_broken_pipe` is called in another thread when standard output has no reader left."""
        self._progress: Progress | None = None
        self._workers = "none"  # the endpoint's, by what they do
        self._asked_since: float | None = None
        self._history: list[tuple[float, int, int]] = []  # when, how many jobs, how many reserved
        super().__init__(on_broken_pipe)

    def has_progressed(self, progress: Progress) -> None:
        before = self._progress
        self._progress = progress
        changed = before is None or backlog_line(progress) != backlog_line(before)
        if changed and not self.output.on_terminal:
            self.say(backlog_line(progress))
        if not progress.asked:
            self._asked_since = None
        elif self._asked_since is None:
            self._asked_since = time.monotonic()
        self._remember(progress)

    def has_workers(self, words: list[str]) -> None:
        """The endpoint's workers, in a word each: reserved, free, loading, stopped, broken."""
        workers = count(words)
        if workers != self._workers and not self.output.on_terminal:
            self.say(f"workers: {workers}")
        self._workers = workers

    def _remember(self, progress: Progress) -> None:
        """For the chart. What lasts for weeks is remembered in less detail."""
        if progress.jobs is None:
            return
        reserved = progress.own + progress.others
        self._history.append((time.monotonic(), progress.jobs.total, reserved))
        if len(self._history) > MOST_HISTORY:
            del self._history[1::2]

    def show_chart(self) -> None:
        """On a terminal: jobs over workers."""
        self.live.stop()
        if self.output.on_terminal and self._history:
            width = min(CHART_WIDTH, self._console.width - BACKLOG_MARGIN - 1)
            lines = backlog_chart(self._history, time.monotonic(), width)
            self.output.write("\n".join(lines) + "\n")

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in self._rows():
            table.add_row(name, Text(text, overflow="fold"))
        return Group(table)

    def _rows(self) -> list[tuple[str, str]]:
        progress = self._progress
        if progress is None:
            return []
        asked = str(progress.asked)
        if self._asked_since is not None:
            asked += f", waiting {clock(time.monotonic() - self._asked_since)}"
        rows = [
            ("jobs", jobs_text(progress.jobs)),
            ("wanted", str(progress.wanted)),
            ("reserved", f"{progress.own + progress.others}{by_others(progress)}"),
            ("asked for", asked),
            ("workers", self._workers),
        ]
        return rows + [("trouble", text) for text in progress.troubles.values()]


def one_line(text: str) -> Text:
    """Text that is cut off at the terminal's edge."""
    return Text(text, overflow="crop", no_wrap=True)


def count(names: Iterable[str]) -> str:
    """How many there are of each: `2 idle, 1 loading`."""
    counts = sorted(Counter(names).items())
    return ", ".join(f"{number} {name}" for name, number in counts) or "none"


def describe(state: State, now: float) -> list[str | ProgressBar | Text]:
    """The columns of a live row: the state, the time in it, the progress, what else is to know."""
    if state is None:
        return ["planned", "", "", one_line("")]
    if isinstance(state, Waiting):
        return ["waiting", clock(now - state.asked_at), "", one_line(state.trouble)]
    if isinstance(state, Held):
        return ["held", clock(now - state.held_at), progress(state, now), one_line(holder(state))]
    began_at = state.asked_at if state.held_at is None else state.held_at
    return [state.how, clock(state.ended_at - began_at), "", one_line(state.reason)]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def progress(held: Held, now: float) -> str | ProgressBar:
    """How much of the time that a reservation is to be held is over."""
    if held.until is None:
        return "until all are held"
    if math.isinf(held.until):
        return "until released"
    total = held.until - held.held_at
    return ProgressBar(total, min(now - held.held_at, total), width=BAR_WIDTH)


def holder(held: Held) -> str:
    """Where it is held, or that nothing is heard from there."""
    if held.session.unreachable:
        return f"not answering, given up in {max(0, held.session.time_to_live):.0f} s"
    return held.session.url


def chart(
    rows: list[tuple[str, Ended]],
    workers: list[tuple[float, int]],
    width: int = CHART_WIDTH,
) -> list[str]:
    """One line per reservation over a common time axis: dots while waiting, = while held.

    Under them how many workers there were, by `workers`: when there were how many.
    """
    first = min(end.asked_at for _, end in rows)
    last = max([end.ended_at for _, end in rows] + [moment for moment, _ in workers])
    scale = width / max(last - first, 0.001)  # columns in a second

    def column(moment: float) -> int:
        return round((moment - first) * scale)

    lines = [f"{'':<9}{'0 s':<{width - 8}}{f'{last - first:.0f} s':>8}  . waiting  = held"]
    for name, end in rows:
        held_at = end.ended_at if end.held_at is None else end.held_at
        bar = " " * column(end.asked_at)
        bar += "." * (column(held_at) - column(end.asked_at))
        bar += "=" * (column(end.ended_at) - column(held_at))
        times = f"{held_at - end.asked_at:.0f} s, {end.ended_at - held_at:.0f} s, {end.how}"
        lines.append(f"{name:<9}{bar:<{width}}  {times}")
    if workers:
        lines.append(f"{'workers':<9}{workers_line(workers, first, scale, width)}")
    return lines


def workers_line(workers: list[tuple[float, int]], first: float, scale: float, width: int) -> str:
    """A digit for each column of the chart: how many there were then, + for ten and more."""
    counts = [" "] * width
    for moment, number in workers:
        place = int((moment - first) * scale)
        place = max(0, min(width - 1, place))
        digit = str(number) if number < 10 else "+"
        counts[place:] = [digit] * (width - place)
    return "".join(counts)


def jobs_text(jobs: Jobs | None) -> str:
    if jobs is None:
        return "not known"
    if jobs.in_hand is None:
        return f"{jobs.waiting} to do"
    return f"{jobs.waiting} waiting, {jobs.in_hand} in hand"


def by_others(progress: Progress) -> str:
    return f" ({progress.others} by others)" if progress.others else ""


def backlog_line(progress: Progress) -> str:
    """All numbers in a line: `jobs: 12 waiting, 3 in hand; 3 wanted, 2 reserved, 1 asked for`."""
    reserved = f"{progress.own + progress.others} reserved{by_others(progress)}"
    numbers = f"{progress.wanted} wanted, {reserved}, {progress.asked} asked for"
    return f"jobs: {jobs_text(progress.jobs)}; {numbers}"


def backlog_chart(history: list[tuple[float, int, int]], end: float, width: int) -> list[str]:
    """Jobs over reserved workers, on one time axis; `history`: when there were how many of them."""
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
    """A bar chart, so many lines high at most, with its highest number at the top."""
    highest = max(1, *numbers)
    height = min(height, highest)
    lines = []
    for level in range(height, 0, -1):  # a column reaches a level if it is above the one below
        filled = ["#" if number * height > (level - 1) * highest else " " for number in numbers]
        label = f"{name:<9}{highest:>6}" if level == height else ""
        lines.append(f"{label:<{BACKLOG_MARGIN - 1}}|{''.join(filled)}".rstrip())
    return lines
