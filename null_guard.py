"""One run of a consumer's command: start it, ask it to end, see that nothing of it is left.

For null_consumer.py, which imports this file and needs it beside itself. A run has a guard, a
forked process that is the parent of COMMAND. Nothing that COMMAND starts can get away from its
guard, and the guard outlives a null_consumer.py that is killed.

Who is asked to end, and when, is decided by choose(), from a table of COMMAND's processes. Nobody
is asked twice: a second SIGTERM makes most consumers drop their job. Linux, standard library only.
"""

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
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

LOOK_EVERY = 0.1  # seconds between two looks at the processes that are to end
PATIENT_LOOK_EVERY = 0.5  # the same, for processes that take longer than PATIENT_AFTER
PATIENT_AFTER = 10.0  # seconds
TAKE_WAIT = 0.5  # seconds for a process to take a signal, or to end of it
PIPE_WAIT = 1.0  # seconds for a process to read what is left in its pipe, and to end by itself
DRAIN_GRACE = 4.0  # seconds that a worker which drains leaves to its consumer
KILL_WAIT = 10.0  # seconds after which a process that survives SIGKILL is given up
LONGEST_READ = 1 << 16  # bytes
MOST_NAMED = 10  # processes in a line
GUARD_NAME = "null_guard"  # of the guard's process, in ps
PR_SET_NAME = 15  # from <sys/prctl.h>
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


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
    """Wait until there is something to do for a part, at most until then; let all parts do it."""
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
    """Return what can be read by now of a descriptor that doesn't block; None at its end.

    When the end comes right after some bytes, this call returns the bytes and the next one None.
    """
    received = b""
    with contextlib.suppress(BlockingIOError):
        while some := os.read(descriptor, LONGEST_READ):
            received += some
        return received or None
    return received


def close_all(descriptors: Collection[int]) -> None:
    """Close those that were opened: -1 stands for none."""
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


# The processes of COMMAND


class Attitude(enum.Enum):
    """What a process does with the stop signal."""

    ENDS = enum.auto()  # the default stands: it ends, and tells nobody
    CATCHES = enum.auto()  # it has a handler, and may pass the signal on
    BLOCKS = enum.auto()  # it waits for the signal in its own way, or doesn't want it now
    IGNORES = enum.auto()  # it tells nobody


Identity = tuple[int, int]  # a process id may be used again; with the time of its start it is one


class Process(NamedTuple):
    """A process under COMMAND, or COMMAND's own, as it was at one look."""

    pid: int
    parent: int  # 0: the process that looks. COMMAND, and orphans of COMMAND
    started: int  # in ticks since the machine was started
    name: str = ""
    attitude: Attitude = Attitude.ENDS
    pending: bool = False  # the stop signal was sent, and waits until it isn't blocked any more
    reads: str = ""  # the pipe that is its standard input
    writes: frozenset[str] = frozenset()  # the pipes that it could write to
    has_terminal: bool = False  # one of its own, so that it gets SIGHUP when that is closed

    @property
    def identity(self) -> Identity:
        return self.pid, self.started


Table = Mapping[int, Process]  # by process id


def name_all(table: Table, command: int | None) -> str:
    """Name processes for a person, COMMAND's own first: `12 (python3), 34 (tee)`."""
    in_order = sorted(table.values(), key=lambda one: (one.pid != command, one.started))
    names = [f"{process.pid} ({process.name})" for process in in_order]
    if len(names) > MOST_NAMED:
        names[MOST_NAMED:] = [f"{len(names) - MOST_NAMED} more"]
    return ", ".join(names)


# Who is asked to end: decisions, without a look at any process


class Asked(NamedTuple):
    """A process that we have asked."""

    at: float  # time.monotonic()
    attitude: Attitude  # by what we know of it now
    under: frozenset[Identity] = frozenset()  # what was under it when it was asked

    @property
    def may_have_told(self) -> bool:
        """Whether what was under it counts as asked."""
        return self.attitude in (Attitude.CATCHES, Attitude.BLOCKS)


class History(NamedTuple):
    """What has been done until now, and what we know from earlier looks."""

    asked: Mapping[Identity, Asked] = {}
    before: Mapping[Identity, Process] = {}  # at the first look: many change when they are asked
    without_writer: Mapping[Identity, float] = {}  # since when nobody writes to its pipe any more

    def is_deaf(self, process: Process) -> bool:
        """Whether it will neither end nor tell anybody."""
        asked = self.asked.get(process.identity)
        if asked:
            return asked.attitude is Attitude.IGNORES
        before = self.before.get(process.identity, process)
        return before.attitude is process.attitude is Attitude.IGNORES

    def counts_as_asked(self, process: Process) -> bool:
        """Whether somebody above it that we have asked may have told it, or the kernel has."""
        if self.before.get(process.identity, process).has_terminal and not process.has_terminal:
            return True
        return any(
            process.identity in asked.under for asked in self.asked.values() if asked.may_have_told
        )


class Choice(NamedTuple):
    """What is to become of those that may be asked and were not."""

    now: list[Process]
    later: list[Process] = []
    spared: list[Process] = []  # they end with whoever writes to their standard input


def choose(
    table: Table, command: int | None, history: History, now: float, late: bool = False
) -> Choice:
    """Choose who is asked to end now. `command` is COMMAND's own process, None when it has ended.

    COMMAND's own process is asked, and when it has ended its orphans; never the children of a
    process that takes the signal, which may be at work on the job that it is to finish. The
    children of a deaf process are asked in its place. Of several the youngest is asked first: a
    server that the consumer needs was started before it. `late` is half of the grace later: whoever
    may have been told, and others that had to wait, are asked then.
    """
    own = table.get(command) if command else None
    if own and not history.is_deaf(own):
        return Choice([] if own.identity in history.asked else [own])
    those = _who_can_be_told(own, table, history) if own else []
    if late or not those:
        for process in table.values():
            if process.parent == 0 and process is not own:
                those += _who_can_be_told(process, table, history)
    choice = Choice([], [], [])
    unasked = [process for process in those if process.identity not in history.asked]
    for process in sorted(unasked, key=lambda one: one.identity[::-1], reverse=True):
        waits = len(unasked) < len(those) or choice.now
        if _ends_with_writer(process, table, history, now):
            choice.spared.append(process)
        elif not late and (waits or history.counts_as_asked(process)):
            choice.later.append(process)
        else:
            choice.now.append(process)
    return choice


def _who_can_be_told(process: Process, table: Table, history: History) -> list[Process]:
    """The process itself, or where it is deaf whoever can be told under it."""
    if not history.is_deaf(process):
        return [process]
    found = []
    for child in table.values():
        if child.parent == process.pid:
            found += _who_can_be_told(child, table, history)
    return found


def _has_writer(process: Process, table: Table) -> bool:
    others = (other for other in table.values() if other is not process)
    return any(process.reads in other.writes for other in others)


def _ends_with_writer(process: Process, table: Table, history: History, now: float) -> bool:
    """Whether it will end by itself, at the end of its standard input (`consumer | tee log`)."""
    if not process.reads:
        return False
    since = history.without_writer.get(process.identity, now)
    return _has_writer(process, table) or now < since + PIPE_WAIT


def learn(
    history: History, table: Table, ended: Mapping[int, int], number: int, now: float
) -> History:
    """Add what a look tells. `ended` has the statuses of children that have ended since.

    The status is as in subprocess: negative for a signal.
    """
    before = history.before or {each.identity: each for each in table.values()}
    asked = {
        identity: each._replace(
            attitude=_attitude_by_now(identity, each, table, ended, number, now)
        )
        for identity, each in history.asked.items()
    }
    without_writer = {
        process.identity: history.without_writer.get(process.identity, now)
        for process in table.values()
        if process.reads and not _has_writer(process, table)
    }
    return History(asked, before, without_writer)


def _attitude_by_now(
    identity: Identity,
    asked: Asked,
    table: Table,
    ended: Mapping[int, int],
    number: int,
    now: float,
) -> Attitude:
    """What a process that was asked has turned out to do with the signal."""
    pid, _ = identity
    process = table.get(pid)
    if process and process.identity == identity:
        if now < asked.at + TAKE_WAIT:
            return asked.attitude
        if process.pending:  # else it is one that the machine hasn't let run yet
            return Attitude.IGNORES if process.attitude is Attitude.BLOCKS else asked.attitude
        # sigtimedwait() shows as neither blocked nor caught: who lives on has taken the signal.
        return Attitude.CATCHES
    if asked.attitude is Attitude.ENDS and ended.get(pid, -number) != -number:
        return Attitude.CATCHES
    return asked.attitude


def note_asked(history: History, process: Process, table: Table, now: float) -> History:
    """Add that a process has been asked."""
    under = frozenset(_identities_under(process.pid, table))
    asked = Asked(now, process.attitude, under)
    return history._replace(asked={**history.asked, process.identity: asked})


def _identities_under(pid: int, table: Table) -> list[Identity]:
    found = []
    for process in table.values():
        if process.parent == pid:
            found += [process.identity, *_identities_under(process.pid, table)]
    return found


# The processes, as /proc tells of them


def _read(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()


def children_of(pid: int) -> list[int]:
    """List the processes whose parent it is, zombies too. Raises OSError when it has ended."""
    children: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            children += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    return children


def read_family(parent: int, stop: int, spared: Collection[int] = ()) -> dict[int, Process]:
    """Read all that lives under a process, but its children that are spared.

    `stop` is the number of the stop signal.
    """
    found = {}
    left = [(pid, 0) for pid in children_of(parent) if pid not in spared]
    while left:
        pid, parent = left.pop()
        with contextlib.suppress(OSError):  # it has ended meanwhile
            process = _read_process(pid, parent, stop)
            if process:
                found[pid] = process
                left += [(child, pid) for child in children_of(pid)]
    if any(process.reads for process in found.values()):
        for pid, process in found.items():
            found[pid] = process._replace(writes=_pipes_written_by(pid))
    return found


def _read_process(pid: int, parent: int, stop: int) -> Process | None:
    """None: it has ended, and is a zombie."""
    name, _, rest = _read(f"/proc/{pid}/stat").partition("(")[2].rpartition(")")
    fields = rest.split()  # from the third one of proc(5) on
    if fields[0] in "ZX" and int(fields[17]) <= 1:  # of one thread: the first one may end alone
        return None
    status = dict(re.findall(r"^(\w+):\s*(.*)$", _read(f"/proc/{pid}/status"), re.MULTILINE))

    def has(mask: str) -> bool:
        return bool(int(status[mask], 16) >> (stop - 1) & 1)

    attitude = Attitude.ENDS
    if has("SigIgn"):
        attitude = Attitude.IGNORES
    elif has("SigBlk"):  # by its first thread
        attitude = Attitude.BLOCKS
    elif has("SigCgt"):
        attitude = Attitude.CATCHES
    elif status.get("NSpid", "").split()[1:][-1:] == ["1"]:
        attitude = Attitude.IGNORES  # the first process of a container: no default ends it
    standard_input = ""
    with contextlib.suppress(OSError):
        standard_input = os.readlink(f"/proc/{pid}/fd/0")
    return Process(
        pid=pid,
        parent=parent,
        started=int(fields[19]),
        name=name,
        attitude=attitude,
        pending=has("ShdPnd"),
        reads=standard_input if standard_input.startswith("pipe:") else "",
        has_terminal=fields[3] == str(pid) and fields[4] != "0",
    )


def _pipes_written_by(pid: int) -> frozenset[str]:
    pipes = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{name}"
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target.startswith("pipe:") and os.lstat(link).st_mode & 0o200:
                    pipes.add(target)
    return frozenset(pipes)


def send(process: Process, number: signal.Signals) -> None:
    """Signal a process, and never another one that has its id by now."""
    with contextlib.suppress(OSError):  # it has ended, or it isn't ours to signal
        try:
            handle = os.pidfd_open(process.pid)
        except (AttributeError, OSError) as error:  # an old build of Python, or an old kernel
            if isinstance(error, ProcessLookupError):
                raise
            os.kill(process.pid, number)
            return
        try:
            started = _read(f"/proc/{process.pid}/stat").rpartition(")")[2].split()[19]
            if int(started) == process.started:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


class Order(enum.IntEnum):
    """What is to be done with COMMAND. A later order only ever replaces a weaker one."""

    NONE = 0
    ASK = 1  # the stop signal, and all the time it needs
    END = 2  # the stop signal, and SIGKILL after the grace
    END_SOON = 3  # the same, where the worker drains: it kills after DRAIN_GRACE
    KILL = 4


class Family:
    """COMMAND, and all that it has started, as their parent sees them. A Part.

    The parent is a subreaper: a process whose own parent has ended becomes its child, whatever
    session it has made for itself.
    """

    def __init__(
        self,
        command: int | None,
        stop: signal.Signals,
        grace: float,
        wake: int | None = None,
        spared: Collection[int] = (),
    ) -> None:
        """Take over COMMAND's process (None: it has ended), and all children but the spared.

        `wake` is the descriptor that SIGCHLD makes readable.
        """
        self.status: int | None = None  # COMMAND's own, as in subprocess: negative for a signal
        self.left = True  # False once there is nothing more of it
        self.killed = ""  # whom we have killed
        self.given_up = False  # what is left has survived SIGKILL
        self.due = math.inf
        self._command = command
        self._stop = stop
        self._grace = grace
        self._wake = wake
        self._spared = spared
        self._order = Order.NONE
        self._history = History()
        self._ended: dict[int, int] = {}  # children, and their statuses
        self._began_at = math.inf  # when the first one was asked
        self._late_at = math.inf
        self._kill_at = math.inf

    def descriptors(self) -> Mapping[int, int]:
        return {} if self._wake is None else {self._wake: select.POLLIN}

    def obey(self, order: Order) -> None:
        if order <= self._order:
            return
        self._order = order
        now = time.monotonic()
        self.due = now
        self._began_at = min(self._began_at, now)
        grace = self._grace
        if order == Order.KILL:
            self._kill_at = now
        elif order != Order.ASK:
            self._kill_at = min(self._kill_at, now + grace)
        if order == Order.END_SOON:
            grace = min(grace, DRAIN_GRACE)
        self._late_at = min(self._late_at, now + grace / 2)

    def step(self) -> None:
        if self._wake is not None:
            read_all(self._wake)
        self._reap()
        if not self.left or self._order == Order.NONE:
            return
        now = time.monotonic()
        if now < self._kill_at:
            self._ask(now)
        else:
            self._kill(now)
        patient = self._began_at + PATIENT_AFTER < now < self._kill_at - PATIENT_LOOK_EVERY
        self.due = now + (PATIENT_LOOK_EVERY if patient else LOOK_EVERY)

    def _ask(self, now: float) -> None:
        table = self._read()
        history = learn(self._history, table, self._ended, self._stop, now)
        for process in choose(table, self._command, history, now, now >= self._late_at).now:
            history = note_asked(history, process, table, now)
            send(process, self._stop)
        self._history = history

    def _read(self) -> dict[int, Process]:
        return read_family(os.getpid(), self._stop, self._spared)

    def _kill(self, now: float) -> None:
        table = self._read()
        self.killed = self.killed or name_all(table, self._command)
        for process in table.values():
            send(process, signal.SIGKILL)
        self.given_up = now >= self._kill_at + KILL_WAIT

    def names(self) -> str:
        """Name all that lives of it, for a person, COMMAND's own process first."""
        return name_all(self._read(), self._command)

    def _reap(self) -> None:
        """Take the statuses of children that have ended; the spared ones are somebody else's."""
        while True:
            members = [pid for pid in children_of(os.getpid()) if pid not in self._spared]
            if not any([self._reap_one(pid) for pid in members]):
                break  # else those that it had are ours now
        self.left = bool(members) or (not self._spared and _has_children())

    def _reap_one(self, pid: int) -> bool:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody else has taken it
            return False
        if ended == 0:
            return False
        self._ended[pid] = os.waitstatus_to_exitcode(status)
        if pid == self._command:
            self.status = self._ended[pid]
            self._command = None
        return True


def _has_children() -> bool:
    """Ask the system: /proc may miss one while another ends."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def become_subreaper() -> None:
    """Adopt whatever the processes under this one leave behind. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


# The guard: what a run of COMMAND is


# What a shell may do itself: its builtins, and its reserved words.
BUILTINS = frozenset(
    """
    . : alias bg break builtin case cd chdir command continue coproc declare dirs echo enable eval
    exec exit export false fc fg for function getopts hash help history if jobs kill let local
    logout popd printf pushd pwd read readonly return select set shift shopt source suspend test
    time times trap true type typeset ulimit umask unalias unset until wait while
    """.split()  # noqa: SIM905
)


def command_of(line: str) -> list[str]:
    """The command that runs a shell line, without a shell where that changes nothing.

    A shell would be one more process that can be asked to end in the consumer's place.
    """
    words = line.split()
    if re.search(r"[|&;<>()$`\\\"'*?\[#~=%{}!\n]", line) or not words or words[0] in BUILTINS:
        return ["sh", "-c", line]
    return words


class Place(NamedTuple):
    """Where COMMAND and --empty's run, when that isn't where we run: LocalVast's workers say so."""

    folder: str | None = None
    environment: Mapping[str, str | None] = {}  # what differs; None: it isn't set
    output: str | None = None  # a file for what COMMAND writes, added to its end

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Place":
        """Read NULL_PLACE, which is JSON, and no setting for people."""
        return cls(**json.loads(environment.get("NULL_PLACE") or "{}"))


OUR_OWN_PLACE = Place()


def environment_of_command(
    environment: Mapping[str, str],
    port: int,
    session_id: str | None,
    place: Place = OUR_OWN_PLACE,
) -> dict[str, str]:
    """The environment that COMMAND gets, from our own."""
    changed = dict(environment)
    for name in ("MASTER_TOKEN", "NULL_SESSION_ID", "NULL_PLACE"):  # the first is the worker's
        changed.pop(name, None)
    for name, value in place.environment.items():
        changed.pop(name, None)
        if value is not None:
            changed[name] = value
    changed["NULL_CONTROL_URL"] = f"http://127.0.0.1:{port}"
    changed["NULL_CONTROL_PORT"] = str(port)
    if session_id is not None:
        changed["NULL_SESSION_ID"] = session_id
    paths = [os.path.dirname(os.path.abspath(__file__)), changed.get("PYTHONPATH")]
    changed["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return changed


class Program(NamedTuple):
    """What a guard starts, and how it is asked to end."""

    command: Sequence[str]
    environment: Mapping[str, str]
    grace: float = 0.0  # seconds from the stop signal to SIGKILL
    stop: signal.Signals = signal.SIGTERM
    output: int = 1  # file descriptors
    errors: int = 2
    folder: str | None = None  # to work in; None: ours

    def start(self) -> int:
        """Start it in a session of its own, and return its process id. Raises OSError.

        By fork and exec: Pythons that were built against an old glibc have no posix_spawn() that
        makes a session.
        """
        reading, writing = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                self._become(writing)
            os.close(writing)
            writing = -1
            problem = os.read(reading, LONGEST_READ).decode(errors="replace")
        finally:
            close_all((reading, writing))
        if problem:
            os.waitpid(pid, 0)
            code, _, text = problem.partition(" ")
            raise OSError(int(code), text)
        return pid

    def _become(self, problems: int) -> None:
        """Turn this process, which was forked for that, into COMMAND."""
        try:
            os.setsid()  # whatever it signals its process group for is not for the guard
            if self.folder is not None:
                os.chdir(self.folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self.output, 1)
            os.dup2(self.errors, 2)
            for number in (*STOP_SIGNALS, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            self._execute()
        except BaseException as error:  # noqa: BLE001  whatever it is, it is told
            os.write(problems, self._problem(error).encode(errors="replace"))
        finally:
            os._exit(127)

    def _problem(self, error: BaseException) -> str:
        """What an OSError says, its number first; 0 for anything else."""
        if not isinstance(error, OSError):
            return f"0 {type(error).__name__}: {error}"
        about = self.command[0]
        if self.folder is not None and error.filename == self.folder:
            about = self.folder
        try:
            os.getcwd()
        except FileNotFoundError:
            about = "the working folder, which was deleted"
        return f"{error.errno or 0} {error.strerror}: {about}"

    def _execute(self) -> None:
        environment = dict(self.environment)
        try:
            os.execvpe(self.command[0], list(self.command), environment)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
        # A script without a first line `#!...` is the shell's, as everywhere.
        os.execvpe("sh", ["sh", "-c", 'exec "$0" "$@"', *self.command], environment)


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


def guard(program: Program, orders: int, report: Callable[[str], None]) -> None:
    """Live a guard's life: start COMMAND, report what becomes of it, end it when told to.

    `orders` is a pipe of bytes, each an Order. What is reported are lines: see Run.
    """
    os.setsid()  # a Ctrl-C in the terminal is for the wrapper alone
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it ends when nothing of COMMAND is left, not before
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    become_subreaper()
    _name_this_process()
    try:
        command = program.start()
    except OSError as error:
        report(f"failed {error}")
        report("done")
        return
    report(f"started {command}")
    _let_go_of({0, 1, 2, program.output, program.errors})
    family = Family(command, program.stop, program.grace, wake)
    _watch_over(family, orders, report)
    report("done")


def _watch_over(family: Family, orders: int, report: Callable[[str], None]) -> None:
    parts = (Orders(orders, family), family)
    tell_left_at = math.inf
    ended = killed = False
    while family.left and not family.given_up:
        turn(parts, tell_left_at)
        if family.status is not None and not ended:
            ended = True
            report(f"ended {family.status}")
            tell_left_at = time.monotonic() + 1
        if family.left and time.monotonic() >= tell_left_at:
            report(f"left {family.names()}")
            tell_left_at = math.inf
        if family.killed and not killed:
            killed = True
            report(f"killed {family.killed}")
    if family.given_up:
        report(f"stuck {family.names()}")


def _name_this_process() -> None:
    """Give it a name of its own in ps, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_NAME, GUARD_NAME.encode(), 0, 0, 0)


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


class Run:
    """A run of COMMAND under a guard, as the wrapper sees it. A Part."""

    guards: ClassVar[set[int]] = set()  # of all runs: children, but not of a COMMAND's family

    def __init__(self, program: Program, lock: int = -1) -> None:
        """Start it. While the guard holds `lock`, a descriptor, no successor starts a COMMAND."""
        self.started_at = time.monotonic()
        self.order = Order.NONE
        self.process: int | None = None  # COMMAND's own, once it is started
        self.status: int | None = None  # of that, once it has ended
        self.ended = False  # whether that has ended, or never was
        self.failure = ""  # how it failed, if it did, and that was not our doing
        # The next three name processes, once there is something to tell.
        self.left = ""  # what COMMAND's own process has left behind without being asked to end
        self.killed = ""
        self.stuck = ""  # what has survived SIGKILL
        self.done = False  # nothing else of it is left
        self._program = program
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
            self._guard = self._fork(orders, reports, lock)
        except OSError as error:
            self.failure = f"can't be started: {error}"
            self._close()
        finally:
            close_all(theirs)

    def _fork(self, orders: int, reports: int, lock: int) -> int:
        # A signal that came before the guard ignores it would count as one to the wrapper.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_the_guard(orders, reports, lock)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.guards.add(pid)
        return pid

    def _be_the_guard(self, orders: int, reports: int, lock: int) -> None:
        def report(line: str) -> None:
            with contextlib.suppress(OSError):  # the wrapper has been killed
                os.write(reports, f"{line}\n".encode(errors="replace"))

        try:
            streams = {0, 1, 2, self._program.output, self._program.errors}
            _close_all_but({*streams, orders, reports, lock})
            guard(self._program, orders, report)
        except BaseException as error:  # noqa: BLE001  whatever it is, it is told
            report(f"broken {type(error).__name__}: {error}".replace("\n", " "))
        finally:
            os._exit(0)

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
            self._step_without_guard(self._orphans)
            return
        received = read_all(self._reports)
        self._received += received or b""
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._take(line.decode())
        if received is None:
            self._guard_has_ended()

    def names(self) -> str:
        """Name all that runs of COMMAND now, for a person."""
        if self._orphans:
            return self._orphans.names()
        try:
            return name_all(read_family(self._guard, self._program.stop), self.process)
        except OSError:  # the guard has ended
            return ""

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
        elif what == "broken":
            self.failure = f"its guard failed: {about}"
        elif what == "left" and self.order == Order.NONE:
            self.left = about
        elif what == "killed":
            self.killed = about
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
        program = self._program
        spared = self.guards - {self._guard}
        self._orphans = Family(command, program.stop, program.grace, spared=spared)
        self._orphans.obey(max(self.order, Order.END))

    def _step_without_guard(self, orphans: Family) -> None:
        orphans.step()
        self.killed = orphans.killed
        if orphans.given_up:
            self.stuck = orphans.names()
        if orphans.given_up or not orphans.left:
            self._close()

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
