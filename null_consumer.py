"""Run any queue's consumer on a Vast instance, and only while the instance is reserved.

    python null_consumer.py [options] -- COMMAND [ARG ...]        --help tells the options

It waits until somebody has reserved the null_worker.py of this instance, runs COMMAND, renews the
reservation meanwhile, and releases it when COMMAND and all that it has started have ended.
COMMAND needs to know nothing of Vast: `rq worker --burst jobs`, a script, a compiled binary.
It works until nothing waits, and exits with 0. null_worker.py starts this by itself where
NULL_CONSUMER names a COMMAND.

A consumer in Python that keeps its model loaded takes the reservations itself (--resident):

    from null_consumer import reservations

    for lease in reservations():
        with lease:
            while lease and (job := pull()):
                work(job)

The command needs Linux, and nothing but the standard library. It is one thread that waits for
everything at once, see turn(); for each run of COMMAND it forks a guard process, see guard().
"""

import argparse
import contextlib
import ctypes
import enum
import errno
import gc
import json
import math
import os
import re
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import quote

RENEW_EVERY = 1.0  # seconds: COMMAND is to be asked within 2 s of its reservation's end
ANSWER_WAIT = 5.0  # seconds for the control server to answer
RELEASE_WAIT = 20.0  # seconds for a release: the worker calls on_close first, which may take 15
SESSION_WAIT = 30.0  # seconds that the control server is to wait for a reservation
RETRY_EVERY = 1.0  # seconds between two tries to reach a worker that isn't there
LOCK_EVERY = 0.2  # seconds between two tries to take over from a predecessor
SIGNAL_ECHO = 1.0  # seconds in which the same signal may come twice and counts once
GLANCE = 0.2  # seconds between two looks at what can't wake a thread
LOOK_EVERY = 0.1  # seconds between two looks at the processes that are to end
KILL_WAIT = 10.0  # seconds after which a process that survives SIGKILL is given up
EMPTY_EVERY = 5.0  # seconds between two looks at the jobs that wait
EMPTY_WAIT = 20.0  # seconds for --empty's COMMAND
RERUN_EVERY = 1.0  # seconds from one start of COMMAND to the next under the same lease
IDLE_RUNS = 3  # in a row, after which as many jobs wait as before: a failure
LONGEST_PAUSE = 60.0  # seconds after a failure
BROKEN_RUNS = 3  # failed ones, at least, before the worker is called broken
LONG_RUN = 60.0  # seconds after which a resident COMMAND that ends was well before
HEARTBEAT_EVERY = 5.0  # seconds
HANGING = 75  # exit status of a process whose job hangs: EX_TEMPFAIL, "try again"
LONGEST_ANSWER = 1 << 16  # bytes
MOST_NAMED = 10  # processes in a line
LONGEST_LINE = 4096  # bytes: a pipe takes so many at once or none of them (PIPE_BUF)
PR_SET_CHILD_SUBREAPER = 36  # from <sys/prctl.h>
ENDING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
TRUE = ("y", "yes", "t", "true", "on", "1")  # as in null_worker.py
FALSE = ("n", "no", "f", "false", "off", "0")


# Settings


class SettingsError(Exception):
    """A setting is bad; the text is one line that names it, its value and what it should be."""


class Settings(NamedTuple):
    """What variables and flags decide, checked."""

    control_port: int = 18999
    grace: float = 30.0  # seconds from SIGTERM to SIGKILL
    empty: str | None = None  # a shell line that prints how many jobs wait
    resident: bool = False
    broken_after: float = 600.0  # seconds; 0: never

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], flags: Mapping[str, str] | None = None
    ) -> "Settings":
        """A flag (`--grace`) goes before its variable (`NULL_GRACE`). Raises SettingsError."""
        given = {name: text for name, text in environment.items() if text}
        given.update(flags or {})

        def text(variable: str, default: str) -> tuple[str, str]:
            flag = "--" + variable.removeprefix("NULL_").lower().replace("_", "-")
            name = flag if flag in given else variable
            return name, given.get(name, default)

        control_port = _port(*text("NULL_CONTROL_PORT", "18999"))
        grace = _seconds(*text("NULL_GRACE", "30"))
        resident = _boolean(*text("NULL_RESIDENT", "false"))
        broken_after = _seconds(*text("NULL_BROKEN_AFTER", "600"))
        name, empty = text("NULL_EMPTY", "")
        if empty and resident:
            raise SettingsError(f"{name} is {empty!r}, should not be set for a resident COMMAND")
        return cls(
            control_port=control_port,
            grace=grace,
            empty=empty or None,
            resident=resident,
            broken_after=broken_after,
        )


def _port(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise SettingsError(f"{name} is {text!r}, should be a port, 1-65535")
    return int(text)


def _seconds(name: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", text):
        raise SettingsError(f"{name} is {text!r}, should be a number of seconds, 0 or more")
    return float(text)


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise SettingsError(f"{name} is {text!r}, should be true or false")
    return text.lower() in TRUE


# What it says


def say(text: str) -> None:
    """Write a line to standard error, or drop it where that would have to wait for a reader."""
    line = f"null_consumer: {text}"
    with contextlib.suppress(OSError):
        _write_at_once(2, line.encode(errors="backslashreplace")[: LONGEST_LINE - 1] + b"\n")


def _write_at_once(descriptor: int, line: bytes) -> None:
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(kind):
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.send(line, socket.MSG_DONTWAIT)
        return
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        # O_NONBLOCK on the descriptor itself would be COMMAND's as well: it is opened once more.
        with contextlib.suppress(OSError):  # somebody else's pipe, as in a container without root
            again = os.open(
                f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            )
            try:
                os.write(again, line)
                return
            except BlockingIOError:
                return
            finally:
                os.close(again)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if poll.poll(0):
        os.write(descriptor, line)


# Waiting for everything at once


class Part(Protocol):
    """Something that goes on beside others, in steps that never wait."""

    @property
    def due(self) -> float:
        """When it has something to do of its own accord (time.monotonic())."""

    def descriptors(self) -> Mapping[int, int]:
        """What it waits for: file descriptors, and select.POLLIN or POLLOUT for each."""

    def step(self) -> None:
        """Do whatever can be done by now."""


def turn(parts: Sequence[Part], until: float = math.inf) -> None:
    """Wait until there is something to do for one of them, at most until then; let all do it."""
    poll = select.poll()
    for part in parts:
        until = min(until, part.due)
        for descriptor, events in part.descriptors().items():
            poll.register(descriptor, events)
    if until == math.inf:
        poll.poll()
    else:
        poll.poll(max(0, math.ceil((until - time.monotonic()) * 1000)))
    for part in parts:
        part.step()


def read_all(descriptor: int) -> bytes | None:
    """What can be read by now of one that doesn't block; None at its end.

    An end that comes right after some bytes is for the next call: these come first.
    """
    received = b""
    with contextlib.suppress(BlockingIOError):
        while some := os.read(descriptor, LONGEST_ANSWER):
            received += some
        return received or None
    return received


def close_all(descriptors: Collection[int]) -> None:
    """Those of them that were opened: -1 is none."""
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


# The control server


class Exchange:
    """One request to the control server. A Part: http.client would wait for the answer."""

    def __init__(self, port: int, method: str, target: str, timeout: float = ANSWER_WAIT) -> None:
        self.port = port
        self.sent_at = time.monotonic()
        self.due = self.sent_at + timeout
        self.done = False
        self.answer: dict[str, Any] = {}  # empty when there is none, and then:
        self.problem = ""
        self._unsent = (
            f"{method} {target} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\n\r\n"
        ).encode()
        self._received = b""
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket()
        except OSError as error:  # too many open files
            self.problem = str(error)
            self.close()
            return
        self._socket.setblocking(False)
        self._socket.connect_ex(("127.0.0.1", port))  # directly, whatever http_proxy says

    def descriptors(self) -> Mapping[int, int]:
        if self._socket is None:
            return {}
        return {self._socket.fileno(): select.POLLOUT if self._unsent else select.POLLIN}

    def step(self) -> None:
        if self._socket is None:
            return
        try:
            self._go_on(self._socket)
        except BlockingIOError:
            if time.monotonic() >= self.due:
                self.problem = f"no answer within {self.due - self.sent_at:g} s"
                self.close()
        except (OSError, ValueError) as error:
            self.problem = str(error)
            self.close()

    def _go_on(self, connection: socket.socket) -> None:
        while self._unsent:
            self._unsent = self._unsent[connection.send(self._unsent) :]
        while received := connection.recv(LONGEST_ANSWER):
            self._received += received
            if len(self._received) > LONGEST_ANSWER:
                raise ValueError(f"an answer of over {LONGEST_ANSWER} bytes")
        self.answer = parse_answer(self._received)
        self.close()

    def close(self) -> None:
        self.done = True
        self.due = math.inf
        if self._socket:
            self._socket.close()
            self._socket = None


def parse_answer(received: bytes) -> dict[str, Any]:
    """The JSON of an answer whose status is 200. Raises ValueError for anything else."""
    head, _, body = received.partition(b"\r\n\r\n")
    if not re.match(rb"HTTP/1\.[01] 200\b", head):
        raise ValueError(f"the worker answers {ascii(received[:200].decode(errors='replace'))}")
    answer = json.loads(body)
    if not isinstance(answer, dict) or not answer:
        raise ValueError("the worker's answer is no JSON object")
    return answer


def target_for(path: str, session_id: str | None) -> str:
    """A path of the control server that is about one session; None: about whichever is open."""
    if session_id is None:
        return path
    return f"{path}?session_id={quote(session_id, safe='')}"


# The guard: what a run of COMMAND is


class Order(enum.IntEnum):
    """What a guard is told to do with COMMAND. A later order only ever replaces a weaker one."""

    NONE = 0
    ASK = 1  # SIGTERM, and all the time it needs
    END = 2  # SIGTERM, and SIGKILL after the grace
    KILL = 3


def to_ask(command: int | None, children: Mapping[int, bool], asked: Collection[int]) -> list[int]:
    """Which processes are to get SIGTERM now.

    `command` is COMMAND's own process while it lives. `children` are the guard's: COMMAND, and
    those whose parents have ended; the value says whether standard input is a pipe. Such a one ends
    with its writer (`consumer | tee log`), whose job would be lost if it ended before it. Children
    of a consumer are never asked: they may be at work on the job that it is to finish.
    """
    if command is not None:
        return [] if command in asked else [command]
    return [pid for pid, has_pipe in children.items() if not has_pipe and pid not in asked]


class Family:
    """COMMAND, and all that it has started, as their parent sees them. A Part.

    The parent is a subreaper: a process whose own parent has ended becomes its child, whatever
    session it has made for itself. Only children are signalled: until it is reaped, a child's id
    can't be anybody else's. One that is killed leaves its children to us, and they are next.
    """

    def __init__(
        self,
        command: int | None,
        grace: float,
        wake: int | None = None,
        spared: Collection[int] = (),
    ) -> None:
        """`wake` is the descriptor that SIGCHLD makes readable. `spared` are other children."""
        self.status: int | None = None  # COMMAND's own, as in subprocess: negative for a signal
        self.left = True  # False once there is nothing more of it
        self.given_up = False  # what is left has survived SIGKILL
        self.due = math.inf
        self._command = command  # None: it has ended
        self._grace = grace
        self._wake = wake
        self._spared = spared
        self._order = Order.NONE
        self._asked: set[int] = set()
        self._kill_at = math.inf

    def descriptors(self) -> Mapping[int, int]:
        return {} if self._wake is None else {self._wake: select.POLLIN}

    def obey(self, order: Order) -> None:
        if order <= self._order:
            return
        self._order = order
        self.due = time.monotonic()
        if order == Order.END:
            self._kill_at = self.due + self._grace
        if order == Order.KILL:
            self._kill_at = self.due

    def step(self) -> None:
        if self._wake is not None:
            read_all(self._wake)
        self._reap()
        if not self.left or self._order == Order.NONE:
            return
        now = time.monotonic()
        if now < self._kill_at:
            children = {pid: _reads_a_pipe(pid) for pid in self.members()}
            for pid in to_ask(self._command, children, self._asked):
                self._asked.add(pid)
                _signal(pid, signal.SIGTERM)
        else:
            for pid in self.members():
                _signal(pid, signal.SIGKILL)
            self.given_up = now >= self._kill_at + KILL_WAIT
        self.due = now + LOOK_EVERY

    def members(self) -> list[int]:
        return [pid for pid in children_of_mine() if pid not in self._spared]

    def _reap(self) -> None:
        try:
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                pid, status = found
                self._asked.discard(pid)
                if pid == self._command:
                    self._command = None
                    self.status = os.waitstatus_to_exitcode(status)
            if self._spared:  # while they live, waitpid() doesn't tell that no child is left
                self.left = bool(self.members())
        except ChildProcessError:
            self.left = False


def children_of_mine() -> list[int]:
    """The processes whose parent is this one, which has one thread; zombies too."""
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]


def _reads_a_pipe(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/0").startswith("pipe:")
    except OSError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def become_subreaper() -> None:
    """Adopt whatever the processes under this one leave behind. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Program(NamedTuple):
    """What a guard starts."""

    command: Sequence[str]
    environment: Mapping[str, str]
    grace: float  # seconds
    output: int = 1  # file descriptors
    errors: int = 2

    def start(self) -> int:
        """Start it, and return its process id. Raises OSError."""
        ignored_by_python = [signal.SIGPIPE, signal.SIGXFSZ]
        return os.posix_spawnp(
            self.command[0],
            list(self.command),
            self.environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, self.output, 1),
                (os.POSIX_SPAWN_DUP2, self.errors, 2),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            ],
            setsid=True,  # whatever it signals its process group for is not for the guard
            setsigmask=[],
            setsigdef=[*ignored_by_python, *ENDING_SIGNALS],
        )


class Orders:
    """The guard's end of the pipe by which it is told what to do with a family. A Part."""

    due = math.inf

    def __init__(self, descriptor: int, family: Family) -> None:
        self._family = family
        self._open = {descriptor: select.POLLIN}

    def descriptors(self) -> Mapping[int, int]:
        return self._open

    def step(self) -> None:
        for descriptor in list(self._open):
            orders = read_all(descriptor)
            if orders is None:  # the wrapper has been killed
                orders = bytes([Order.END])
                self._open.clear()
            for order in orders:
                self._family.obey(Order(order))


def guard(program: Program, orders: int, reports: int, lock: int) -> None:
    """The life of a guard: start COMMAND, report what becomes of it, end it when told to.

    It is the parent of COMMAND, so that nothing which COMMAND has started can get away from it,
    and outlives a wrapper that is killed. `orders` is a pipe of bytes, each an Order. `reports` is
    a pipe of lines: see Run. While it holds `lock`, no successor starts a COMMAND.
    """
    os.setsid()  # a Ctrl-C in the terminal is for the wrapper alone
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it ends when nothing of COMMAND is left, not before
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _close_all_but({0, 1, 2, program.output, program.errors, orders, reports, lock})
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    become_subreaper()

    def report(line: str) -> None:
        with contextlib.suppress(OSError):  # the wrapper has been killed
            os.write(reports, f"{line}\n".encode(errors="replace"))

    try:
        command = program.start()
    except OSError as error:
        report(f"failed {error}")
        report("done")
        return
    report(f"started {command}")
    _let_go_of({0, 1, 2, program.output, program.errors})
    family = Family(command, program.grace, wake)
    _watch_over(family, orders, report)
    if family.given_up:
        report(f"stuck {_names(family.members())}")
    report("done")


def _watch_over(family: Family, orders: int, report: Callable[[str], None]) -> None:
    parts = (Orders(orders, family), family)
    tell_left_at = math.inf
    ended = False
    while family.left and not family.given_up:
        turn(parts, tell_left_at)
        if family.status is not None and not ended:
            ended = True
            report(f"ended {family.status}")
            tell_left_at = time.monotonic() + 1
        if family.left and time.monotonic() >= tell_left_at:
            report(f"left {_names(family.members())}")
            tell_left_at = math.inf


def _close_all_but(kept: Collection[int]) -> None:
    gc.disable()  # a file object of the wrapper's must not close its number a second time
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in kept:
            with contextlib.suppress(OSError):  # the folder's own
                os.close(descriptor)


def _let_go_of(descriptors: Collection[int]) -> None:
    """Point them to nowhere: whoever reads what COMMAND writes is to see its end."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def _names(pids: Collection[int]) -> str:
    """For a person: `12 (python3), 34 (tee)`."""
    names = []
    for pid in list(pids)[:MOST_NAMED]:
        name = ""
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        names.append(f"{pid} ({name})")
    if len(pids) > MOST_NAMED:
        names.append(f"{len(pids) - MOST_NAMED} more")
    return ", ".join(names)


class Run:
    """A run of COMMAND under a guard, as the wrapper sees it. A Part."""

    guards: ClassVar[set[int]] = set()  # of all runs: children, but not of a COMMAND's family

    def __init__(self, program: Program, lock: int) -> None:
        self.started_at = time.monotonic()
        self.order = Order.NONE
        self.process: int | None = None  # COMMAND's own, once it is started
        self.status: int | None = None  # of that, once it has ended
        self.ended = False  # whether that has ended, or never was
        self.failure = ""  # how it failed, if it did, and that was not our doing
        self.stuck = ""  # which of its processes have survived SIGKILL
        self.done = False  # nothing else of it is left
        self._grace = program.grace
        self._received = b""
        self._nothing_left = False
        self._orphans: Family | None = None  # COMMAND's family, when the guard has been killed
        self._reports = -1
        self._orders = -1
        self._guard = -1
        theirs = []
        try:
            self._reports, reports = os.pipe()
            theirs.append(reports)
            orders, self._orders = os.pipe()
            theirs.append(orders)
            os.set_blocking(self._reports, False)
            os.set_blocking(orders, False)
            self._guard = self._fork(program, orders, reports, lock)
        except OSError as error:
            self.failure = f"can't be started: {error}"
            self._close()
        finally:
            close_all(theirs)

    def _fork(self, program: Program, orders: int, reports: int, lock: int) -> int:
        # A signal that came before the guard ignores it would count as one to the wrapper.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    guard(program, orders, reports, lock)
                finally:
                    os._exit(0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.guards.add(pid)
        return pid

    @property
    def due(self) -> float:
        return self._orphans.due if self._orphans else math.inf

    def descriptors(self) -> Mapping[int, int]:
        return {} if self.done or self._orphans else {self._reports: select.POLLIN}

    def obey(self, order: Order) -> None:
        if order <= self.order:
            return
        self.order = order
        if self.done:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._orders, bytes([order]))
        if self._orphans:
            self._orphans.obey(order)

    def step(self) -> None:
        if self.done:
            return
        if self._orphans:
            self._orphans.step()
            if self._orphans.given_up:
                self.stuck = _names(self._orphans.members())
            if self._orphans.given_up or not self._orphans.left:
                self._close()
            return
        received = read_all(self._reports)
        self._received += received or b""
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._take(line.decode())
        if received is None:
            self._guard_has_ended()

    def _take(self, line: str) -> None:
        what, _, about = line.partition(" ")
        if what == "started":
            self.process = int(about)
            self.started_at = time.monotonic()
        elif what == "ended":
            self.ended = True
            self.status = int(about)
            if self.order == Order.NONE:
                self.failure = describe_failure(int(about))
        elif what == "failed":
            self.ended = True
            self.failure = f"can't be started: {about}"
        elif what == "left" and self.order == Order.NONE:
            say(f"COMMAND has ended, and what it has started goes on: {about}")
        elif what == "stuck":
            self.stuck = about
        elif what == "done":
            self._nothing_left = True

    def _guard_has_ended(self) -> None:
        if self._nothing_left:
            self._close()
            return
        self.failure = self.failure or "its guard was killed"
        command = None if self.ended else self.process
        self._orphans = Family(command, self._grace, spared=self.guards - {self._guard})
        self._orphans.obey(max(self.order, Order.END))

    def _close(self) -> None:
        self.done = True
        self.ended = True
        self.guards.discard(self._guard)
        close_all((self._orders, self._reports))
        if self._guard > 0:
            with contextlib.suppress(ChildProcessError):  # reaped with the orphans
                os.waitpid(self._guard, 0)


def describe_failure(status: int) -> str:
    """What a status says went wrong, as subprocess has it (negative for a signal); '' for 0."""
    if status == 0:
        return ""
    if status > 0:
        return f"status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"ended by signal {-status}"


# The lease


def ask_for_reservation(port: int) -> Exchange:
    """Its answer comes as soon as there is a reservation, or after 30 s without."""
    return Exchange(port, "GET", f"/session?wait={SESSION_WAIT:g}", SESSION_WAIT + ANSWER_WAIT)


class Renewal:
    """Keeps a reservation by renewing it each second, and knows when it is gone. A Part.

    Without an id it keeps whichever is open, and is never gone.
    """

    def __init__(
        self, port: int, session_id: str | None = None, time_to_live: float = math.inf
    ) -> None:
        self.session_id = session_id  # of the reservation that it keeps now
        self.gone = ""  # why, once it is
        self._port = port
        self._given_id = session_id
        self._next_at = time.monotonic()
        # One that has almost run out, or has and wasn't swept yet, may still be renewed.
        self._expires_at = self._next_at + max(time_to_live, 2 * RENEW_EVERY)
        self._exchange: Exchange | None = None

    @property
    def due(self) -> float:
        if self.gone:
            return math.inf
        if self._exchange:
            return min(self._exchange.due, self._expires_at)
        return min(self._next_at, self._expires_at)

    def descriptors(self) -> Mapping[int, int]:
        return self._exchange.descriptors() if self._exchange else {}

    def step(self) -> None:
        if self.gone:
            return
        now = time.monotonic()
        if self._exchange is None and now >= self._next_at:
            self._exchange = Exchange(self._port, "POST", target_for("/renew", self._given_id))
            self._next_at = now + RENEW_EVERY
        if self._exchange:
            self._exchange.step()
            if self._exchange.done:
                self._take(self._exchange)
                self._exchange = None
        if now >= self._expires_at and not self.gone:
            self._end("the worker was unreachable until it had expired")

    def _take(self, exchange: Exchange) -> None:
        renewed = exchange.answer.get("renewed")
        if renewed:
            time_to_live = float(exchange.answer.get("time_to_live", 0))
            self._next_at = exchange.sent_at + min(RENEW_EVERY, max(0.1, time_to_live / 3))
            if self._given_id is None:
                self.session_id = exchange.answer.get("session_id")
            else:
                self._expires_at = exchange.sent_at + time_to_live
        elif renewed is False and self._given_id is None:
            self.session_id = None
        elif renewed is False:
            self._end("the worker says that it has ended")

    def _end(self, why: str) -> None:
        self.gone = why
        self.close()

    def forget(self) -> None:
        """The reservation that it keeps is served now, or released."""
        self.session_id = None
        self.close()

    def close(self) -> None:
        if self._exchange:
            self._exchange.close()
            self._exchange = None


def renewal_of(asked: Exchange) -> Renewal | None:
    """Of the reservation that ask_for_reservation() has brought; None if it has brought none."""
    session_id = asked.answer.get("session_id")
    if session_id is None:
        return None
    return Renewal(asked.port, session_id, float(asked.answer.get("time_to_live", 0)))


# What follows from a run


class Failures(NamedTuple):
    """Those since the last success."""

    times: int = 0
    since: float = 0.0  # the first one's start

    def one_more(self, started_at: float) -> "Failures":
        return Failures(self.times + 1, self.since if self.times else started_at)

    @property
    def pause(self) -> float:
        """Seconds until COMMAND may run again: 0, 1, 2, 4, ... 60."""
        if self.times == 0:
            return 0.0
        return min(LONGEST_PAUSE, 2.0 ** min(self.times - 1, 10))

    def mean_broken(self, now: float, broken_after: float) -> bool:
        """Whether it's time to say that this instance can't do its work."""
        if broken_after == 0 or self.times < BROKEN_RUNS:
            return False
        return now - self.since >= broken_after


class Verdict(enum.Enum):
    """What comes after a run of COMMAND that ended with 0."""

    RELEASE = enum.auto()
    AGAIN = enum.auto()
    FAILED = enum.auto()


class Progress(NamedTuple):
    """Of the runs under one lease, by what waited after each."""

    waiting: int | None = None  # after the run before
    idle_runs: int = 0  # in a row, that left no fewer

    def after_run(self, waiting: int | None) -> tuple[Verdict, "Progress"]:
        """What comes next, where so many jobs wait now; None: nobody knows."""
        if not waiting:
            return Verdict.RELEASE, self
        if self.waiting is None or waiting < self.waiting:
            return Verdict.AGAIN, Progress(waiting)
        progress = Progress(waiting, self.idle_runs + 1)
        if progress.idle_runs >= IDLE_RUNS:
            return Verdict.FAILED, progress
        return Verdict.AGAIN, progress


def parse_waiting(output: str) -> int | None:
    """The jobs that wait, by what --empty's COMMAND prints: one number, or the first of two."""
    numbers = output.split()
    if len(numbers) not in (1, 2):
        return None
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in numbers):
        return None
    return int(numbers[0])


# --empty


class Look:
    """One run of --empty's COMMAND. A Part."""

    def __init__(self, line: str, environment: Mapping[str, str], lock: int) -> None:
        """Raises OSError."""
        self.waiting: int | None = None  # None: no valid answer, and then:
        self.problem = ""
        self._give_up_at = time.monotonic() + EMPTY_WAIT
        self._answered = False
        # Read when it has ended: what doesn't fit into a pipe is no number.
        self._output = -1
        self._errors = -1
        theirs = []
        try:
            self._output, output = os.pipe()
            theirs.append(output)
            self._errors, errors = os.pipe()
            theirs.append(errors)
            os.set_blocking(self._output, False)
            os.set_blocking(self._errors, False)
            self._run = Run(Program(["sh", "-c", line], environment, 0.0, output, errors), lock)
        except OSError:
            close_all((self._output, self._errors))
            raise
        finally:
            close_all(theirs)

    @property
    def done(self) -> bool:
        return self._run.done

    @property
    def due(self) -> float:
        return min(self._give_up_at, self._run.due)

    def descriptors(self) -> Mapping[int, int]:
        return self._run.descriptors()

    def step(self) -> None:
        self._run.step()
        if self._run.ended and not self._answered:
            self._take_answer()
        if time.monotonic() >= self._give_up_at:
            self.problem = f"takes over {EMPTY_WAIT:g} s"
            self.end()
        if self.done and self._output >= 0:
            os.close(self._output)
            os.close(self._errors)
            self._output = -1

    def end(self) -> None:
        """End it, and all that it has started, without waiting for an answer."""
        self._answered = True
        self._give_up_at = math.inf
        self._run.obey(Order.KILL)

    def _take_answer(self) -> None:
        output = (read_all(self._output) or b"").decode(errors="replace")
        errors = (read_all(self._errors) or b"").decode(errors="replace")
        if self._run.failure:
            self.problem = self._run.failure
        else:
            self.waiting = parse_waiting(output)
            if self.waiting is None:
                self.problem = f"prints {output[:100]!r}, and not one number or two"
        if self.problem and errors.strip():
            self.problem += f": {errors.strip().splitlines()[-1]}"
        self.end()


class Waiting:
    """How many jobs wait: looks every 5 s while COMMAND runs, and when it is told to. A Part."""

    def __init__(self, start_look: Callable[[], Look]) -> None:
        self.zeros = 0  # looks in a row, without those that got no answer
        self.latest: int | None = None  # of the last look; None: it got no valid answer
        self._start_look = start_look
        self._next_at = math.inf
        self._regularly = False
        self._look: Look | None = None
        self._problem_told = False

    @property
    def due(self) -> float:
        return self._look.due if self._look else self._next_at

    @property
    def busy(self) -> bool:
        return self._look is not None or self._next_at <= time.monotonic()

    def look_regularly(self) -> None:
        self.zeros = 0
        self._next_at = time.monotonic() + EMPTY_EVERY
        self._regularly = True

    def look_now(self) -> None:
        self._next_at = time.monotonic()
        self._regularly = False

    def stop(self) -> None:
        self._next_at = math.inf
        self._regularly = False
        if self._look:
            self._look.end()

    def descriptors(self) -> Mapping[int, int]:
        return self._look.descriptors() if self._look else {}

    def step(self) -> None:
        if self._look is None and time.monotonic() >= self._next_at:
            try:
                self._look = self._start_look()
            except OSError as error:
                self._take(None, f"can't be started: {error}")
        if self._look:
            self._look.step()
            if self._look.done:
                self._take(self._look.waiting, self._look.problem)
                self._look = None

    def _take(self, waiting: int | None, problem: str) -> None:
        """The answer of a look."""
        self._next_at = math.inf
        if self._regularly:
            self._next_at = time.monotonic() + EMPTY_EVERY
        self.latest = waiting
        if waiting == 0:
            self.zeros += 1
        elif waiting is not None:
            self.zeros = 0
        if problem and not self._problem_told:
            say(f"--empty's COMMAND changes nothing now: {problem}")
        self._problem_told = bool(problem)


# The loop


class Stop:
    """Whether it is time to end: a signal has come, or the worker is gone. A Part."""

    due = math.inf

    def __init__(self, worker_pipe: int | None = None) -> None:
        """`worker_pipe` comes to its end when the worker's process has ended.

        Raises SettingsError where it isn't open.
        """
        self.now = False
        self.at_once = False  # with a second signal
        self.worker_is_gone = False
        self.status = 0  # to exit with
        self._first_signal_at: float | None = None
        self._wake, woken = os.pipe()
        self._descriptors = {self._wake: select.POLLIN}
        os.set_blocking(self._wake, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in ENDING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        self._worker_pipe = worker_pipe
        if worker_pipe is not None:
            try:
                os.set_inheritable(worker_pipe, False)
                os.set_blocking(worker_pipe, False)
            except OSError as error:
                text = f"--worker-pipe is {worker_pipe}, should be an open pipe: {error}"
                raise SettingsError(text) from None
            self._descriptors[worker_pipe] = select.POLLIN

    def descriptors(self) -> Mapping[int, int]:
        return self._descriptors

    def step(self) -> None:
        for number in read_all(self._wake) or b"":
            self._take(signal.Signals(number))
        if self._worker_pipe in self._descriptors and read_all(self._worker_pipe) is None:
            del self._descriptors[self._worker_pipe]
            self.now = True
            self.worker_is_gone = True
            say("the worker has ended")

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_signal_at is None:
            self._first_signal_at = now
            self.now = True
            self.status = 128 + number
            say(f"{number.name}: ending")
        elif now - self._first_signal_at > SIGNAL_ECHO and not self.at_once:
            self.at_once = True
            say(f"{number.name} again: ending at once")


def environment_of_command(
    environment: Mapping[str, str], port: int, session_id: str | None
) -> dict[str, str]:
    """The environment that COMMAND gets, from our own."""
    changed = dict(environment)
    changed.pop("MASTER_TOKEN", None)  # by which the worker is known to Vast
    changed.pop("NULL_SESSION_ID", None)
    changed["NULL_CONTROL_URL"] = f"http://127.0.0.1:{port}"
    changed["NULL_CONTROL_PORT"] = str(port)
    if session_id is not None:
        changed["NULL_SESSION_ID"] = session_id
    paths = [os.path.dirname(os.path.abspath(__file__)), environment.get("PYTHONPATH")]
    changed["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return changed


class Consumer:
    """The life of the wrapper: wait, run COMMAND, release, pause where it failed, and again."""

    def __init__(self, settings: Settings, command: Sequence[str], stop: Stop) -> None:
        self._settings = settings
        self._port = settings.control_port
        self._command = command
        self._stop = stop
        self._failures = Failures()
        self._next = Renewal(self._port)  # keeps a reservation that has to wait to be served
        self._lock = -1

    def run(self) -> int:
        """Until a signal comes or the worker is gone. Returns the status to exit with."""
        with socket.socket(socket.AF_UNIX) as lock:
            self._lock = lock.fileno()
            self._wait_for_predecessor(lock)
            while not self._stop.now:
                if self._settings.resident:
                    self._run_resident()
                else:
                    self._wait_and_serve()
                self._pause()
        return self._stop.status

    def _turn(self, *parts: Part, until: float = math.inf) -> None:
        turn((self._stop, *parts), until)

    def _wait(self, *parts: Part, until: float) -> None:
        while time.monotonic() < until and not self._stop.now:
            self._turn(*parts, until=until)

    def _wait_for_predecessor(self, lock: socket.socket) -> None:
        """Until it has ended, and its guard, which may outlive it to end its COMMAND."""
        told = False
        while not self._stop.now:
            try:
                lock.bind(f"\0null_consumer:{self._port}")
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            if not told:
                say(f"waiting: another one serves the worker at port {self._port} still")
                told = True
            self._turn(self._next, until=time.monotonic() + LOCK_EVERY)

    def _pause(self) -> None:
        """After a failure. A reservation that comes meanwhile is kept, to be served then."""
        self._wait(self._next, until=time.monotonic() + self._failures.pause)
        if self._stop.now and self._next.session_id:
            self._release(self._next.session_id)
        self._next.forget()

    # COMMAND runs while there is a reservation

    def _wait_and_serve(self) -> None:
        lease = self._wait_for_reservation()
        if lease is None:
            return
        say(f"reserved session={lease.session_id}")
        self._serve(lease)
        if lease.gone:
            say(f"over session={lease.session_id}: {lease.gone}")
        else:
            self._release(lease.session_id)
        lease.close()

    def _wait_for_reservation(self) -> Renewal | None:
        """None when it is time to stop."""
        told = False
        while not self._stop.now:
            asked = ask_for_reservation(self._port)
            while not asked.done and not self._stop.now:
                self._turn(asked)
            asked.close()
            lease = renewal_of(asked)
            if lease and not self._stop.now:
                return lease
            if asked.problem and not told:
                say(f"waiting for the worker at 127.0.0.1:{self._port}: {asked.problem}")
                told = True
            # One that isn't there, or drains, answers at once.
            self._wait(until=asked.sent_at + RETRY_EVERY)
        return None

    def _serve(self, lease: Renewal) -> None:
        """Run COMMAND once; with --empty, for as long as jobs wait and it gets on with them."""
        environment = environment_of_command(os.environ, self._port, lease.session_id)
        waiting = None
        if self._settings.empty:
            line = self._settings.empty
            waiting = Waiting(lambda: Look(line, environment, self._lock))
        progress = Progress()
        verdict = Verdict.AGAIN
        while verdict is Verdict.AGAIN and not self._stop.now and not lease.gone:
            program = Program(self._command, environment, self._settings.grace)
            run = Run(program, self._lock)
            self._watch(run, lease, waiting)
            self._take_account(run)
            if run.failure or run.order != Order.NONE or waiting is None:
                return
            verdict, progress = progress.after_run(self._count(waiting, lease))
            if verdict is Verdict.FAILED:
                self._failed(run.started_at, f"{IDLE_RUNS} runs, and no fewer jobs wait")
            elif verdict is Verdict.AGAIN:
                self._wait(lease, until=run.started_at + RERUN_EVERY)

    def _watch(self, run: Run, lease: Renewal, waiting: Waiting | None) -> None:
        """Until nothing of it is left."""
        if waiting:
            waiting.look_regularly()
        while not run.done or (waiting and waiting.busy):
            run.obey(self._order(lease, waiting))
            if waiting and (run.ended or run.order != Order.NONE):
                waiting.stop()
            parts: list[Part] = [run, self._renewal_beside(lease)]
            if waiting:
                parts.append(waiting)
            self._turn(*parts)

    def _order(self, lease: Renewal | None = None, waiting: Waiting | None = None) -> Order:
        """What is to be done with COMMAND now."""
        if self._stop.at_once:
            return Order.KILL
        if self._stop.now or (lease and lease.gone):
            return Order.END
        if waiting and waiting.zeros >= 2:
            return Order.ASK
        return Order.NONE

    def _count(self, waiting: Waiting, lease: Renewal) -> int | None:
        """The jobs that wait now; None when nobody knows."""
        waiting.look_now()
        while waiting.busy:
            if self._stop.now or lease.gone:
                waiting.stop()
            self._turn(waiting, self._renewal_beside(lease))
        return waiting.latest

    def _renewal_beside(self, lease: Renewal) -> Renewal:
        """What is renewed meanwhile: the lease, and once that is gone whatever comes after it."""
        if lease.gone:
            return self._next
        return lease

    # COMMAND takes the reservations itself

    def _run_resident(self) -> None:
        environment = environment_of_command(os.environ, self._port, None)
        run = Run(Program(self._command, environment, self._settings.grace), self._lock)
        while not run.done:
            run.obey(self._order())
            self._turn(run)
        if time.monotonic() - run.started_at > LONG_RUN:
            self._failures = Failures()
        if run.order == Order.NONE and not run.failure:
            run.failure = "it ended by itself"
        self._take_account(run)
        self._release(None)

    # What follows

    def _take_account(self, run: Run) -> None:
        if run.stuck:
            self._report_broken(f"survives SIGKILL: {run.stuck}")
        if run.failure:
            self._failed(run.started_at, run.failure)
        elif run.status == 0:
            self._failures = Failures()

    def _failed(self, started_at: float, why: str) -> None:
        self._failures = self._failures.one_more(started_at)
        say(f"COMMAND failed: {why}; a pause of {self._failures.pause:g} s")
        now = time.monotonic()
        if self._failures.mean_broken(now, self._settings.broken_after):
            times = f"{self._failures.times} times in {now - self._failures.since:.0f} s"
            self._report_broken(f"the consumer failed {times}: {why}")

    def _report_broken(self, reason: str) -> None:
        say(f"reporting the worker as broken: {reason}")
        text = reason.encode(errors="replace")[:1000].decode(errors="ignore")
        self._post(f"/broken?reason={quote(text)}", ANSWER_WAIT)

    def _release(self, session_id: str | None) -> None:
        """None: whichever is open."""
        answer = self._post(target_for("/release", session_id), RELEASE_WAIT)
        for released in answer.get("session_ids", []):
            say(f"released session={released}")
            if released == self._next.session_id:
                self._next.forget()

    def _post(self, target: str, timeout: float) -> dict[str, Any]:
        """Tell the worker, and again for 5 s if need be. Its answer; empty if there is none."""
        give_up_at = time.monotonic() + ANSWER_WAIT
        while not self._stop.worker_is_gone:
            asked = Exchange(self._port, "POST", target, timeout)
            while not asked.done and not self._stop.worker_is_gone:
                if self._stop.at_once:
                    asked.due = min(asked.due, time.monotonic() + RETRY_EVERY)
                self._turn(asked, self._next)
            asked.close()
            if asked.answer:
                return asked.answer
            retry_at = time.monotonic() + RETRY_EVERY
            if self._stop.at_once or retry_at > give_up_at:
                say(f"the worker was not told {target.partition('?')[0]}: {asked.problem}")
                break
            while time.monotonic() < retry_at and not self._stop.at_once:
                self._turn(self._next, until=retry_at)
        return {}


# reservations()


class Lease:
    """A reservation that a consumer has taken itself. True as long as it is held and wanted."""

    def __init__(
        self, port: int, renewal: Renewal, limit: float | None, is_ending: Callable[[], bool]
    ) -> None:
        self.session_id = renewal.session_id
        self._limit = math.inf if limit is None else limit
        self._port = port
        self._renewal = renewal
        self._is_ending = is_ending
        self._closed = False
        self._looked_at = time.monotonic()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    def __bool__(self) -> bool:
        self._looked_at = time.monotonic()
        return not (self._closed or self._renewal.gone or self._is_ending())

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release it, if it is still there. Done at the end of the block."""
        if self._closed:
            return
        self._closed = True
        self._renewing.join()
        target = target_for("/release", self.session_id)
        give_up_at = time.monotonic() + ANSWER_WAIT
        while not self._renewal.gone:
            asked = Exchange(self._port, "POST", target, RELEASE_WAIT)
            finish(asked)
            if asked.answer:
                return
            if time.monotonic() > give_up_at:
                say(f"the worker was not told /release: {asked.problem}")
                return
            time.sleep(RETRY_EVERY)

    def _renew(self) -> None:
        while not self._closed:
            turn([self._renewal], time.monotonic() + GLANCE)
            if time.monotonic() - self._looked_at > self._limit:
                say(f"nobody has looked at the lease for {self._limit:g} s: the job hangs")
                os._exit(HANGING)
        self._renewal.close()

    @contextlib.contextmanager
    def heartbeat(
        self, function: Callable[[], object], every: float = HEARTBEAT_EVERY
    ) -> Iterator[None]:
        """Call it every so many seconds, in a thread, while the block lasts.

        One that raises is logged, and called again. It is no look at the lease, see reservations().
        """
        over = threading.Event()

        def beat() -> None:
            while not over.wait(every):
                try:
                    function()
                except Exception as error:  # noqa: BLE001  it may raise whatever it likes
                    say(f"heartbeat failed: {type(error).__name__}: {error}")

        beating = threading.Thread(target=beat, name="heartbeat", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join(every)


def finish(asked: Exchange, give_up: Callable[[], bool] = lambda: False) -> None:
    """Wait until it is done, or given up."""
    while not asked.done and not give_up():
        turn([asked], time.monotonic() + GLANCE)
    asked.close()


def reservations(limit: float | None = None) -> Iterator[Lease]:
    """Take one reservation after the other, until SIGTERM: for a consumer that stays (--resident).

    Each is renewed in a thread, and released at the end of its `with` block. It turns false once
    the reservation is gone, or after SIGTERM: then finish the job or give it back, and come to an
    end. `limit` is how many seconds may pass between two such looks at the lease. If more do, the
    job hangs: the process ends with status 75, for its supervisor to start it again.

    Of the main thread only: it handles SIGTERM for as long as it lasts. Raises SettingsError.
    """
    port = _port("NULL_CONTROL_PORT", os.environ.get("NULL_CONTROL_PORT") or "18999")
    signals: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))

    def is_ending() -> bool:
        return bool(signals)

    try:
        while not is_ending():
            asked = ask_for_reservation(port)
            finish(asked, is_ending)
            renewal = renewal_of(asked)
            if renewal and not is_ending():
                with Lease(port, renewal, limit, is_ending) as lease:
                    yield lease
            else:  # one that isn't there, or drains, answers at once
                time.sleep(max(0.0, asked.sent_at + RETRY_EVERY - time.monotonic()))
    finally:
        signal.signal(signal.SIGTERM, before)


# The command


class NotHere(Exception):
    """This system lacks something; the text is one line for a person."""


def check_system() -> None:
    """Raise NotHere where COMMAND's processes can't be watched over."""
    if sys.platform != "linux":
        raise NotHere(f"needs Linux, not {sys.platform}: it runs on the instance")
    try:
        become_subreaper()
    except OSError as error:
        raise NotHere(f"needs a Linux with child subreapers: {error}") from None
    try:
        children_of_mine()
    except OSError as error:
        raise NotHere(f"needs a Linux with /proc/PID/task/TID/children: {error}") from None


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Of the command line; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="null_consumer.py",
        usage="%(prog)s [options] -- COMMAND [ARG ...]",
        description="Run COMMAND while this instance's null_worker.py is reserved.",
        allow_abbrev=False,
    )
    parser.add_argument("--grace", metavar="S", help="seconds from SIGTERM to SIGKILL (30)")
    parser.add_argument(
        "--empty",
        metavar="COMMAND",
        help="a shell line that prints how many jobs wait: for consumers that never end by "
        "themselves, or after each job",
    )
    parser.add_argument(
        "--resident",
        action="store_const",
        const="true",
        help="COMMAND takes reservations itself, and stays",
    )
    parser.add_argument(
        "--broken-after",
        metavar="S",
        help="seconds of nothing but failures until the worker is reported as broken (600)",
    )
    parser.add_argument("--worker-pipe", metavar="FD", type=int, help=argparse.SUPPRESS)
    options = list(arguments)
    command: list[str] = []
    if "--" in options:
        command = options[options.index("--") + 1 :]
        options = options[: options.index("--")]
    parsed = parser.parse_args(options)
    if not command:
        parser.error("COMMAND is missing: null_consumer.py [options] -- COMMAND [ARG ...]")
    return parsed, command


def open_standard_streams() -> None:
    """Where they are closed: the next file that is opened would be taken for one of them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    open_standard_streams()
    options, command = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    flags = {
        "--grace": options.grace,
        "--empty": options.empty,
        "--resident": options.resident,
        "--broken-after": options.broken_after,
    }
    given = {name: text for name, text in flags.items() if text is not None}
    try:
        settings = Settings.from_environment(os.environ, given)
        check_system()
        stop = Stop(options.worker_pipe)
    except (SettingsError, NotHere) as error:
        print(f"null_consumer: {error}", file=sys.stderr)
        return 2
    return Consumer(settings, command, stop).run()


if __name__ == "__main__":
    sys.exit(main())
