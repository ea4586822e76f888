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

The command needs Linux, null_guard.py beside itself, and nothing but the standard library. It is
one thread that waits for everything at once, see turn(); for each run of COMMAND it forks a guard
process, see null_guard.py. Old Pythons can read this file, and then get a line and no traceback.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  for them alone
    found = f"{sys.version_info[0]}.{sys.version_info[1]}, {sys.executable}"
    sys.stderr.write(f"null_consumer: needs Python 3.10 or newer, and this is {found}\n")
    sys.exit(2)

import os

if __name__ == "__main__":
    # A queue.py beside this file, say, must not be taken for the standard library's.
    here = [os.path.dirname(path(__file__)) for path in (os.path.abspath, os.path.realpath)]
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) not in here] + here

import argparse
import contextlib
import enum
import errno
import json
import math
import re
import select
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

try:
    from null_guard import (
        GUARD_NAME,
        KILL_WAIT,
        STOP_SIGNALS,
        Family,
        Order,
        Part,
        Place,
        Program,
        Run,
        become_subreaper,
        children_of,
        close_all,
        command_of,
        environment_of_command,
        read_all,
        read_family,
        turn,
    )
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"null_consumer: needs null_guard.py beside itself: {error}\n")
    sys.exit(2)

RENEW_EVERY = 1.0  # seconds: COMMAND is to be asked within 2 s of its reservation's end
ANSWER_WAIT = 5.0  # seconds for the control server to answer
RELEASE_WAIT = 20.0  # seconds for a release: the worker calls on_close first, which may take 15
SESSION_WAIT = 30.0  # seconds that the control server is to wait for a reservation
RETRY_EVERY = 1.0  # seconds between two tries to reach a worker that isn't there
LOCK_EVERY = 0.2  # seconds between two tries to take over from a predecessor
SIGNAL_ECHO = 1.0  # seconds in which the same signal may come twice and counts once
GLANCE = 0.2  # seconds between two looks at what can't wake a thread
EMPTY_EVERY = 5.0  # seconds between two looks at the jobs that wait
EMPTY_WAIT = 20.0  # seconds for --empty's COMMAND
GOES_ON_AFTER = 60.0  # seconds after which a COMMAND that was asked and hasn't ended is told
GOES_ON_EVERY = 600.0  # seconds until it is told again
RERUN_EVERY = 1.0  # seconds from one start of COMMAND to the next under the same lease
IDLE_RUNS = 3  # in a row, after which as many jobs wait as before: a failure
LONGEST_PAUSE = 60.0  # seconds after a failure
BROKEN_RUNS = 3  # failed ones, at least, before the worker is called broken
LONG_RUN = 60.0  # seconds after which a resident COMMAND that ends was well before
HEARTBEAT_EVERY = 5.0  # seconds
HANGING = 75  # exit status of a process whose job hangs: EX_TEMPFAIL, "try again"
LONGEST_ANSWER = 1 << 16  # bytes
LONGEST_LINE = 4096  # bytes: a pipe takes so many at once or none of them (PIPE_BUF)
ENDING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
TRUE = ("y", "yes", "t", "true", "on", "1")  # as in null_worker.py
FALSE = ("n", "no", "f", "false", "off", "0")


# Settings


class SettingsError(Exception):
    """A setting is bad; the text is one line that names it, its value and what it should be."""


class Settings(NamedTuple):
    """What variables and flags decide, checked."""

    control_port: int = 18999
    grace: float = 30.0  # seconds from the stop signal to SIGKILL
    empty: str | None = None  # a shell line that prints how many jobs wait
    resident: bool = False
    broken_after: float = 600.0  # seconds; 0: never
    stop_signal: signal.Signals = signal.SIGTERM  # asks COMMAND to end

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
        stop_signal = _stop_signal(*text("NULL_STOP_SIGNAL", "TERM"))
        name, empty = text("NULL_EMPTY", "")
        if empty and resident:
            raise SettingsError(f"{name} is {empty!r}, should not be set for a resident COMMAND")
        return cls(
            control_port=control_port,
            grace=grace,
            empty=empty or None,
            resident=resident,
            broken_after=broken_after,
            stop_signal=stop_signal,
        )


def _port(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise SettingsError(f"{name} is {text!r}, should be a port, 1-65535")
    return int(text)


def _seconds(name: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", text):
        raise SettingsError(f"{name} is {text!r}, should be a number of seconds, 0 or more")
    return float(text)


def _stop_signal(name: str, text: str) -> signal.Signals:
    for number in STOP_SIGNALS:
        if text.upper() in (number.name, number.name[3:]):
            return number
    names = [number.name[3:] for number in STOP_SIGNALS]
    raise SettingsError(f"{name} is {text!r}, should be one of {', '.join(names)}")


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
        while True:
            received = connection.recv(LONGEST_ANSWER)
            if not received:
                break
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
        self.expires_at = self._next_at + max(time_to_live, 2 * RENEW_EVERY)
        self._exchange: Exchange | None = None

    @property
    def due(self) -> float:
        if self.gone:
            return math.inf
        if self._exchange:
            return min(self._exchange.due, self.expires_at)
        return min(self._next_at, self.expires_at)

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
        if now >= self.expires_at and not self.gone:
            self._end("the worker was unreachable until it had expired")

    def _take(self, exchange: Exchange) -> None:
        renewed = exchange.answer.get("renewed")
        if renewed:
            time_to_live = float(exchange.answer.get("time_to_live", 0))
            self._next_at = exchange.sent_at + min(RENEW_EVERY, max(0.1, time_to_live / 3))
            if self._given_id is None:
                self.session_id = exchange.answer.get("session_id")
            else:
                self.expires_at = exchange.sent_at + time_to_live
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


class Jobs(NamedTuple):
    """What --empty's COMMAND counts."""

    waiting: int
    in_hand: int | None = None  # None: it doesn't say


def parse_jobs(output: str) -> Jobs | None:
    """Parse one number or two; a third one, jobs that are done, isn't needed here."""
    numbers = output.split()
    if len(numbers) not in (1, 2, 3):
        return None
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in numbers):
        return None
    return Jobs(*map(int, numbers[:2]))


def gives_back(asked_at: Jobs, after: Jobs) -> bool:
    """Whether COMMAND, which was asked with jobs in hand, has put one back instead of doing it."""
    return bool(asked_at.in_hand) and after.waiting > asked_at.waiting


# --empty


class Look:
    """One run of --empty's COMMAND. A Part."""

    def __init__(self, program: Program, lock: int) -> None:
        """Start it; what `program` writes is read here. Raises OSError."""
        self.jobs: Jobs | None = None  # None: no valid answer, and then:
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
            self._run = Run(program._replace(output=output, errors=errors), lock)
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
            if parse_jobs(output):  # as of `grep -c`, when it counts 0
                self.problem += f" after it has printed {output[:100].strip()!r}"
        else:
            self.jobs = parse_jobs(output)
            if self.jobs is None:
                self.problem = f"prints {output[:100]!r}, and not one number or two"
        if self.problem and errors.strip():
            self.problem += f": {errors.strip().splitlines()[-1]}"
        self.end()


class Waiting:
    """How many jobs wait: looks every 5 s while COMMAND runs, and when it is told to. A Part."""

    def __init__(self, start_look: Callable[[], Look]) -> None:
        # Looks in a row, without those that got no answer:
        self.zeros = 0  # at which nothing waited
        self.idle = 0  # at which nothing waited, and nothing was in hand
        self.latest: Jobs | None = None  # of the last look; None: it got no valid answer
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
        self.zeros = self.idle = 0
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
                self._take(self._look.jobs, self._look.problem)
                self._look = None

    def _take(self, jobs: Jobs | None, problem: str) -> None:
        """The answer of a look."""
        self._next_at = math.inf
        if self._regularly:
            self._next_at = time.monotonic() + EMPTY_EVERY
        self.latest = jobs
        if jobs:
            self.zeros = 0 if jobs.waiting else self.zeros + 1
            self.idle = 0 if jobs.waiting or jobs.in_hand else self.idle + 1
        if problem and not self._problem_told:
            say(f"NULL_EMPTY changes nothing now: {problem}")
        self._problem_told = bool(problem)


class Reminder:
    """Tells of a COMMAND that was asked to end because nothing waits, and goes on. A Part."""

    def __init__(self, run: Run, waiting: Waiting) -> None:
        """Begin when it is asked."""
        self.due = time.monotonic() + GOES_ON_AFTER
        self._run = run
        self._waiting = waiting
        self._asked_at = time.monotonic()

    def descriptors(self) -> Mapping[int, int]:
        return {}

    def step(self) -> None:
        now = time.monotonic()
        if now < self.due:
            return
        jobs = self._waiting.latest
        self.due = now + EMPTY_EVERY
        names = self._run.names()
        if jobs and not jobs.in_hand and names:  # else it may be at work
            ago = f"{now - self._asked_at:.0f} s ago"
            say(f"the consumer was asked to end {ago} and goes on: {names}")
            self.due = now + GOES_ON_EVERY


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
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whatever it was to our parent
        self._wake, woken = os.pipe()
        self._descriptors = {self._wake: select.POLLIN}
        os.set_blocking(self._wake, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in ENDING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        self._worker_pipe = worker_pipe
        if worker_pipe is not None:
            try:
                os.set_inheritable(worker_pipe, False)
                os.set_blocking(worker_pipe, False)
            except OSError as error:
                text = f"--worker-pipe is {worker_pipe}, should be an open pipe: {error}"
                raise SettingsError(text) from None
            self._descriptors[worker_pipe] = select.POLLIN

    @property
    def order(self) -> Order:
        """What it means for COMMAND."""
        if self.at_once:
            return Order.KILL
        if self.now and self._worker_pipe in self._descriptors:
            return Order.END_SOON  # the worker drains
        return Order.END if self.now else Order.NONE

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
            say(f"{number.name}: asking the consumer to end")
        elif now - self._first_signal_at > SIGNAL_ECHO and not self.at_once:
            self.at_once = True
            say("no time is left: the consumer is killed now")


class Consumer:
    """The life of the wrapper: wait, run COMMAND, release, pause where it failed, and again."""

    def __init__(self, settings: Settings, command: Sequence[str], stop: Stop) -> None:
        self._settings = settings
        self._port = settings.control_port
        self._command = command
        self._place = Place.from_environment(os.environ)
        self._stop = stop
        self._failures = Failures()
        self._gives_back = False  # whether COMMAND, when asked, gives its job back
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
        environment = self._environment(lease.session_id)
        waiting = None
        if self._settings.empty:
            look = Program(command_of(self._settings.empty), environment, folder=self._place.folder)
            waiting = Waiting(lambda: Look(look, self._lock))
        progress = Progress()
        verdict = Verdict.AGAIN
        while verdict is Verdict.AGAIN and not self._stop.now and not lease.gone:
            run = self._start(environment)
            asked_at = self._watch(run, lease, waiting)
            self._take_account(run)
            if run.failure or run.order > Order.ASK or waiting is None:
                return
            if run.order is Order.ASK and not (asked_at and asked_at.in_hand):
                return
            jobs = self._count(waiting, lease)
            if run.order is Order.ASK and not self._note_given_back(run, asked_at, jobs):
                return
            verdict, progress = progress.after_run(jobs.waiting if jobs else None)
            if verdict is Verdict.FAILED:
                self._failed(run.started_at, f"{IDLE_RUNS} runs, and no fewer jobs wait")
            elif verdict is Verdict.AGAIN:
                self._wait(lease, until=run.started_at + RERUN_EVERY)

    def _note_given_back(self, run: Run, asked_at: Jobs | None, jobs: Jobs | None) -> bool:
        """Whether COMMAND has given a job back, and may go on with it."""
        if asked_at is None or jobs is None or not gives_back(asked_at, jobs):
            return False
        if not self._gives_back:
            say(
                "the consumer gives its job back when it is asked to end: from now on it is asked "
                "only when no job is in hand"
            )
        self._gives_back = True
        return run.status == 0

    def _environment(self, session_id: str | None) -> dict[str, str]:
        return environment_of_command(os.environ, self._port, session_id, self._place)

    def _start(self, environment: Mapping[str, str]) -> Run:
        program = Program(
            command=self._command,
            environment=environment,
            grace=self._settings.grace,
            stop=self._settings.stop_signal,
            folder=self._place.folder,
        )
        if self._place.output is None:
            return Run(program, self._lock)
        output = -1
        with contextlib.suppress(OSError):  # it goes where our own output goes
            output = os.open(self._place.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            program = program._replace(output=output, errors=output)
        try:
            return Run(program, self._lock)
        finally:
            close_all([output])

    def _watch(self, run: Run, lease: Renewal, waiting: Waiting | None) -> Jobs | None:
        """Wait until nothing of the run is left. Returns the jobs at the time it was asked."""
        asked_at = None
        reminder = None
        if waiting:
            waiting.look_regularly()
        while not run.done or (waiting and waiting.busy):
            run.obey(self._order(lease, waiting))
            parts: list[Part] = [run, self._renewal_beside(lease)]
            if waiting:
                parts.append(waiting)
                if run.order is Order.ASK and not reminder:
                    asked_at = waiting.latest
                    reminder = Reminder(run, waiting)
                if run.ended or run.order > Order.ASK:
                    waiting.stop()
                elif reminder:
                    parts.append(reminder)
            self._turn(*parts)
            self._tell_what_is_left(run)
        return asked_at

    def _tell_what_is_left(self, run: Run) -> None:
        if run.left:
            say(f"the consumer has ended, and what it has started goes on: {run.left}")
            run.left = ""

    def _order(self, lease: Renewal | None = None, waiting: Waiting | None = None) -> Order:
        """What is to be done with COMMAND now."""
        if self._stop.now:
            return self._stop.order
        if lease and lease.gone:
            return Order.END
        if waiting and (waiting.idle if self._gives_back else waiting.zeros) >= 2:
            return Order.ASK
        return Order.NONE

    def _count(self, waiting: Waiting, lease: Renewal) -> Jobs | None:
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
        run = self._start(self._environment(None))
        while not run.done:
            run.obey(self._order())
            self._turn(run)
            self._tell_what_is_left(run)
        if time.monotonic() - run.started_at > LONG_RUN:
            self._failures = Failures()
        if run.order == Order.NONE and not run.failure:
            run.failure = "it ended by itself"
        self._take_account(run)
        self._release(None)

    # What follows

    def _take_account(self, run: Run) -> None:
        if run.killed:
            say(f"killed, for it had not ended in its time: {run.killed}")
        if run.stuck:
            self._report_broken(f"survives SIGKILL: {run.stuck}")
        if run.failure:
            self._failed(run.started_at, run.failure)
        elif run.status == 0:
            self._failures = Failures()

    def _failed(self, started_at: float, why: str) -> None:
        self._failures = self._failures.one_more(started_at)
        say(f"the consumer failed: {why}; a pause of {self._failures.pause:g} s")
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


class Sigterm:
    """SIGTERM, as reservations() takes it. In a forked child it is what it was before."""

    def __init__(self) -> None:
        """Take it: of the main thread only."""
        self.has_come = False
        self._before = signal.getsignal(signal.SIGTERM)
        self._taken = False
        os.register_at_fork(after_in_child=self.give_back)
        self.take()

    def take(self) -> None:
        signal.signal(signal.SIGTERM, self._come)
        self._taken = True

    def take_if_default(self) -> None:
        """Take it anew where a library that a job uses has put the default back."""
        is_default = self._taken and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if is_default and threading.current_thread() is threading.main_thread():
            self.take()

    def give_back(self) -> None:
        if self._taken:
            self._taken = False
            # None: what was there was no handler of Python's.
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _come(self, *_: object) -> None:
        self.has_come = True


def _is_spawned() -> bool:
    """Whether multiprocessing has started this process anew: it runs the main program again."""
    started_by = ("from multiprocessing.spawn import", "from multiprocessing.forkserver import")
    return any(argument.startswith(started_by) for argument in sys.orig_argv)


class Lease:
    """A reservation that a consumer has taken itself. True as long as it is held and wanted.

    It is the process's that took it: in a forked child it is false, and nothing is done with it.
    """

    def __init__(
        self, port: int, renewal: Renewal, limit: float | None, sigterm: "Sigterm"
    ) -> None:
        self.session_id = renewal.session_id
        self._owner = os.getpid()
        self._limit = math.inf if limit is None else limit
        self._port = port
        self._renewal = renewal
        self._sigterm = sigterm
        self._closed = False
        self._looked_at = time.monotonic()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    def __bool__(self) -> bool:
        if self._closed or os.getpid() != self._owner:
            return False
        self._looked_at = time.monotonic()
        self._sigterm.take_if_default()
        # A job that holds Python's lock keeps the thread from renewing: the clock decides.
        over = self._renewal.gone or self._looked_at >= self._renewal.expires_at
        return not (over or self._sigterm.has_come)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release it, if it is still there. Done at the end of the block."""
        if self._closed or os.getpid() != self._owner:
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

    Of the main thread only: it handles SIGTERM for as long as it lasts. A child that
    `multiprocessing` has spawned can't take reservations. Raises SettingsError.
    """
    if _is_spawned():
        raise SettingsError(
            "a process that multiprocessing has spawned can't take reservations: call "
            "reservations() under `if __name__ == '__main__':`"
        )
    port = _port("NULL_CONTROL_PORT", os.environ.get("NULL_CONTROL_PORT") or "18999")
    owner = os.getpid()
    sigterm = Sigterm()

    def is_ending() -> bool:
        return sigterm.has_come or os.getpid() != owner

    try:
        while not is_ending():
            sigterm.take()  # a library may have taken it meanwhile
            asked = ask_for_reservation(port)
            finish(asked, is_ending)
            renewal = renewal_of(asked)
            if renewal and not is_ending():
                with Lease(port, renewal, limit, sigterm) as lease:
                    yield lease
            else:  # one that isn't there, or drains, answers at once
                time.sleep(max(0.0, asked.sent_at + RETRY_EVERY - time.monotonic()))
    finally:
        sigterm.give_back()


# Beside a worker: what null_worker.py uses

PAUSE = 1.0  # seconds until null_consumer.py is started again, the first time; doubled each time
LONGEST_RESTART_PAUSE = 30.0  # seconds
WELL_AFTER = 60.0  # seconds after which one that ends was well before
QUICK_ENDS = 3  # in a row within a minute: it can't be run here
END_WAITS = (4.0, 1.0, 0.5)  # seconds after SIGTERM, after SIGTERM again, and after SIGKILL
LAST_WORDS_WAIT = 0.5  # seconds for its last line


class OfWorker(NamedTuple):
    """What the thread that runs null_consumer.py needs of its worker; safe to call there."""

    tell: Callable[[str], object]  # a line of the log
    keep: Callable[[], object]  # renew the open session, if there is one
    report_broken: Callable[[str], object]
    open_files: int  # the limit that the worker was started with


class ConsumerProcess:
    """Runs this file as a program beside a worker, in a thread, for as long as the worker lives."""

    def __init__(self, line: str, environment: Mapping[str, str], worker: OfWorker) -> None:
        """`line` is a shell line, what null_consumer.py is to run."""
        # Nobody writes. The kernel closes our end when we end, however that comes, and
        # null_consumer.py, which reads the other one to its end, then ends too.
        self._pipe, self._our_end = os.pipe()
        self._command = command_of(line)
        self._settings = Settings.from_environment(environment)
        self._environment = environment
        self._worker = worker
        self._others = children_of(os.getpid())  # that are nothing of ours
        self._process: Any = None  # a subprocess.Popen
        self._last_line = ""
        self._ending = threading.Event()
        self._ending_at_once = threading.Event()
        self._thread = threading.Thread(target=self._run, name="consumer", daemon=True)

    def start(self) -> None:
        """Start it, and again whenever it has ended, until end()."""
        with contextlib.suppress(OSError):
            become_subreaper()  # it and a guard of it may be killed at once
        self._thread.start()

    def end(self) -> None:
        """Ask it to end; again, which ends its command at once; then kill it. Waits for that."""
        self._ending.set()
        numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
        for number, seconds in zip(numbers, END_WAITS, strict=True):
            self._signal(number)
            self._thread.join(seconds)
            if not self._thread.is_alive():
                return
            self._ending_at_once.set()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _run(self) -> None:
        pause = PAUSE
        starts: list[float] = []
        while not self._ending.is_set():
            started_at = time.monotonic()
            starts.append(started_at)
            status, why = self._run_once()
            try:
                self._end_what_is_left()
            except OSError as error:
                self._worker.tell(f"what null_consumer.py has left behind isn't known: {error}")
            if self._ending.is_set():
                return
            now = time.monotonic()
            if now - started_at > WELL_AFTER:
                pause = PAUSE
            if status is None:  # for want of open files or of memory: that passes
                starts.clear()
            if status == 2 or (len(starts) >= QUICK_ENDS and now - starts[-QUICK_ENDS] < 60):
                self._worker.report_broken(f"null_consumer.py can't be run here: it {why}")
                return
            self._worker.tell(f"null_consumer.py {why}; started again in {pause:g} s")
            self._ending.wait(pause)
            pause = min(2 * pause, LONGEST_RESTART_PAUSE)

    def _run_once(self) -> tuple[int | None, str]:
        """Returns its status, and in words why it runs no more."""
        import subprocess  # here: it costs a megabyte

        self._last_line = ""
        last_words = theirs = errors = -1
        try:
            last_words, theirs = os.pipe()
            errors = os.dup(2)
            options = {"--worker-pipe": self._pipe, "--errors": errors}
            options["--open-files"] = self._worker.open_files
            arguments = [str(part) for option in options.items() for part in option]
            self._process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), *arguments, "--", *self._command],
                stdin=subprocess.DEVNULL,
                stderr=theirs,
                pass_fds=(self._pipe, errors),
                env=self._environment,
                start_new_session=True,  # a signal to our process group is for us alone
            )
        except OSError as error:
            close_all([last_words])
            return None, f"can't be started: {error}"
        finally:
            close_all([theirs, errors])
        self._worker.tell(f"started null_consumer.py pid={self._process.pid}")
        reading = threading.Thread(target=self._read, args=(last_words,), daemon=True)
        reading.start()
        if self._ending.is_set():  # meanwhile
            self._signal(signal.SIGTERM)
        status = self._process.wait()
        reading.join(LAST_WORDS_WAIT)
        why = f"ended with status {status}"
        if self._last_line:
            why += f": {self._last_line}"
        return status, why

    def _read(self, last_words: int) -> None:
        """Pass on what it writes until it has started, and how it breaks."""
        with open(last_words, "rb") as lines:
            for line in lines:
                with contextlib.suppress(OSError):
                    os.write(2, line)
                self._last_line = line[:LONGEST_LINE].decode(errors="replace").strip()

    def _end_what_is_left(self) -> None:
        """End what it had started, where it was killed, before another one is started."""
        settings = self._settings
        give_up_at = time.monotonic() + settings.grace + KILL_WAIT
        while time.monotonic() < give_up_at and self._has_guard():
            self._worker.keep()  # the guard ends COMMAND
            time.sleep(GLANCE)
        family = Family(None, settings.stop_signal, settings.grace, spared=self._others)
        family.step()
        if not family.left:
            return
        self._worker.tell(f"null_consumer.py has left behind, and that is ended: {family.names()}")
        family.obey(Order.END)
        while family.left and not family.given_up:
            if self._ending_at_once.is_set():
                family.obey(Order.KILL)
            self._worker.keep()
            turn([family], time.monotonic() + GLANCE)

    def _has_guard(self) -> bool:
        children = read_family(os.getpid(), self._settings.stop_signal, self._others)
        return any(each.name == GUARD_NAME for each in children.values())


# The command


class NotHere(Exception):
    """This system lacks something; the text is one line for a person."""


# No `true`, which not every container has, and what is so for a moment.
NOTHING_LACKS = (errno.ENOENT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def check_system() -> None:
    """Raise NotHere where COMMAND's processes can't be watched over."""
    if sys.platform != "linux":
        raise NotHere(f"needs Linux, not {sys.platform}: it runs on the instance")
    try:
        become_subreaper()
    except OSError as error:
        raise NotHere(f"needs a Linux with child subreapers: {error}") from None
    try:
        children_of(os.getpid())
    except OSError as error:
        raise NotHere(f"needs a Linux with /proc/PID/task/TID/children: {error}") from None
    trial = Run(Program(["true"], os.environ))
    while not trial.done:
        turn([trial])
    passes = any(f"[Errno {code}]" in trial.failure for code in NOTHING_LACKS)
    if trial.failure and not passes:
        raise NotHere(f"can't run a command here: {trial.failure}")


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Of the command line; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="null_consumer.py",
        usage="%(prog)s [options] -- COMMAND [ARG ...]",
        description="Run COMMAND while this instance's null_worker.py is reserved.",
        allow_abbrev=False,
    )
    parser.add_argument("--grace", metavar="S", help="seconds from the stop signal to SIGKILL (30)")
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
    parser.add_argument(
        "--stop-signal",
        metavar="NAME",
        help="the signal that asks COMMAND to end: TERM, INT, QUIT, HUP, USR1 or USR2 (TERM)",
    )
    for hidden in ("--worker-pipe", "--errors", "--open-files"):  # see ConsumerProcess
        parser.add_argument(hidden, metavar="N", type=int, help=argparse.SUPPRESS)
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
    descriptor = 0
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(descriptor, descriptor <= 2)
    os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    open_standard_streams()
    options, command = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    flags = {
        "--grace": options.grace,
        "--empty": options.empty,
        "--resident": options.resident,
        "--broken-after": options.broken_after,
        "--stop-signal": options.stop_signal,
    }
    given = {name: text for name, text in flags.items() if text is not None}
    try:
        settings = Settings.from_environment(os.environ, given)
        check_system()
        stop = Stop(options.worker_pipe)
    except (SettingsError, NotHere) as error:
        print(f"null_consumer: {error}", file=sys.stderr)
        return 2
    if options.open_files is not None:
        _set_open_files(options.open_files)
    if options.errors is not None:
        return _run_with_last_words(Consumer(settings, command, stop), options.errors)
    return Consumer(settings, command, stop).run()


def _set_open_files(soft: int) -> None:
    """Lower the limit for COMMAND to what the worker was started with."""
    import resource  # only beside a worker

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _run_with_last_words(consumer: Consumer, errors: int) -> int:
    """Standard error until now is a pipe to the worker: for what ends us, from here on."""
    last_words = os.dup(2)
    os.dup2(errors, 2)
    os.close(errors)
    try:
        return consumer.run()
    except BaseException as error:
        os.write(last_words, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
        raise


if __name__ == "__main__":
    sys.exit(main())
