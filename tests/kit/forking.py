"""Start the programs under test by forking: most of a start is importing Vast's SDK.

While it is on, `subprocess.Popen`, and so asyncio's subprocesses, start `python FILE ARG ...`,
`python -c CODE ARG ...`, and our own modules by `python -m MODULE ARG ...`, by asking a process
that has imported the SDK (zygote.py) to fork. The child is a child of this process, with a pid of
its own, like any other. The workers of a `null_client.py --local` are forked by a zygote of its
own. A shell that closes standard files and becomes the program is left out: see `closing()`.

What a fork can't stand for starts as ever: other programs, options of Python's, variables that
Python or a module reads when it starts, a module beside the script, or on its path, that hides one
which is imported already. A test that is about starting has the marker `starts`.
"""

import array
import contextlib
import ctypes
import inspect
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parents[2]
ZYGOTE = Path(__file__).parent / "zygote" / "zygote.py"  # alone: its folder is on its path
PR_SET_CHILD_SUBREAPER = 36
LENGTH = 8  # bytes that say how long a message is
ROOM = 12_000  # bytes for the arguments, and for the environment, of a child
# What is read when Python starts, or when the SDK is imported.
READ_AT_START = re.compile("PYTHON(?!PATH$)|LC_|LANG|SSL_|VAST_LOG|VAST_URL|IS_DEPLOYMENT|AIOHTTP")
CLOSES = re.compile(r'exec "\$@"((?: (?:<|>|2>)&-)+)')  # the line of closing()
MODULE = re.compile(r"null_\w+|workers\.null\.\w+")
WANTED = {"close_fds": True, "preexec_fn": None, "shell": False, "startupinfo": None}
WANTED |= {"gid": None, "gids": None, "uid": None, "umask": -1, "process_group": -1}

_libc = ctypes.CDLL(None, use_errno=True)
_execute_child = subprocess.Popen._execute_child
signature = inspect.signature(_execute_child)


class Zygote:
    """The process that forks; it ends when its socket closes, at the latest with this process."""

    def __init__(self, control, told):
        self._control = control
        self._lock = threading.Lock()
        told = told or self._receive()
        self.modules = set(told["modules"])
        self.room = told["room"]
        self.environment_at_start = environment_at_start(told["environment"])

    @classmethod
    def started(cls, environment):
        """One that was just started, with this environment."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, ZYGOTE, HERE, "x" * ROOM],
                stdin=theirs,
                env={**environment, "ROOM": "x" * ROOM},
                cwd="/",
            )
        zygote = cls(ours, None)
        zygote.process = process
        return zygote

    def _read(self, length):
        message = b""
        while len(message) < length:
            part = self._control.recv(length - len(message))
            if not part:
                raise RuntimeError("the zygote has ended")
            message += part
        return message

    def _receive(self):
        return json.loads(self._read(int.from_bytes(self._read(LENGTH), "big")))

    def fork(self, request, descriptors):
        """The pid of a child."""
        message = json.dumps(request).encode()
        ancillary = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        with self._lock:
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                self._control.sendmsg([len(message).to_bytes(LENGTH, "big")], [ancillary])
                self._control.sendall(message)
                return int.from_bytes(self._read(LENGTH), "big")
            finally:
                _libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def end(self):
        self._control.close()
        self.process.wait()


def environment_at_start(environment):
    """The variables that Python or a module reads when it starts."""
    return {name: value for name, value in environment.items() if READ_AT_START.match(name)}


class Forking:
    """Whether programs are forked, and by which process."""

    def __init__(self):
        self.on = False
        self.environment = {}
        self._zygote = None
        self._lock = threading.Lock()

    def zygote(self):
        with self._lock:
            if self._zygote is None:
                with self.paused():
                    self._zygote = Zygote.started(self.environment)
            return self._zygote

    def use(self, zygote):
        self._zygote = zygote

    @contextlib.contextmanager
    def paused(self):
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was

    def end(self):
        self.on = False
        if self._zygote is not None:
            self._zygote.end()
            self._zygote = None


forking = Forking()


def closing(closed, *command):
    """The command, without the standard files that a shell closes by `>&- 2>&-`, for example."""
    return ["sh", "-c", f'exec "$@" {closed}', "sh", *map(os.fspath, command)]


def taken_apart(command):
    """What the shell of closing() becomes, and the descriptors that it closes before."""
    line = CLOSES.fullmatch(command[2]) if len(command) > 4 else None
    if line is None or [*command[:2], command[3]] != ["sh", "-c", "sh"]:
        return command, set()
    descriptors = {"<&-": 0, ">&-": 1, "2>&-": 2}
    return command[4:], {descriptors[word] for word in line[1].split()}


def execute_child(popen, *arguments, **named):
    """In the place of Popen._execute_child(): fork where that is the same."""
    start = signature.bind(popen, *arguments, **named).arguments
    if not forking.on or not can_fork(start):
        return _execute_child(popen, *arguments, **named)
    request, descriptors = request_of(start)
    try:
        popen.pid = forking.zygote().fork(request, descriptors)
        popen._child_created = True
    finally:
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        popen._close_pipe_fds(*(start[name] for name in pipes))
    return None


def can_fork(start):
    """Whether a fork can stand for this start."""
    if any(start.get(name, wanted) != wanted for name, wanted in WANTED.items()):
        return False
    if isinstance(start["args"], (str, bytes, os.PathLike)):
        return False
    arguments, _ = taken_apart([os.fspath(each) for each in start["args"]])
    if len(arguments) < 2 or arguments[0] != sys.executable:
        return False
    if not all(isinstance(each, str) for each in arguments):
        return False
    if start["executable"] not in (None, start["args"][0]):
        return False
    cwd = os.fspath(start["cwd"] or ".")
    if not os.path.isdir(cwd) or not all(_is_open(number) for number in (0, 1, 2)):
        return False
    environment = os.environ if start["env"] is None else start["env"]
    return _is_plain(arguments, cwd) and _fits(arguments, environment)


def _is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _is_plain(arguments, cwd):
    """Whether these are a script or code, with no module beside it that hides another."""
    if arguments[1] == "-c" or (arguments[1] == "-m" and MODULE.fullmatch(arguments[2])):
        folder = cwd
    elif arguments[1].startswith("-") or not os.path.isfile(os.path.join(cwd, arguments[1])):
        return False
    else:
        folder = os.path.dirname(os.path.realpath(os.path.join(cwd, arguments[1])))
    return not _hides(folder)


def _hides(folder):
    """Whether a module in this folder would be imported in the place of one that is already."""
    if Path(folder) == HERE or not os.path.isdir(folder):
        return False
    names = {entry.partition(".")[0] for entry in os.listdir(folder)}
    return bool(names & (forking.zygote().modules | {"sitecustomize", "usercustomize"}))


def _fits(arguments, environment):
    """Whether the environment changes nothing that was read at the start, and there is room."""
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    if any(_hides(path) for path in paths if path):
        return False
    if environment_at_start(environment) != forking.zygote().environment_at_start:
        return False
    texts = (arguments, [f"{name}={value}" for name, value in environment.items()])
    sizes = [sum(len(os.fsencode(line)) + 1 for line in lines) for lines in texts]
    fits = [size <= room for size, room in zip(sizes, forking.zygote().room, strict=True)]
    return all(fits) and not any("\0" in line for lines in texts for line in lines)


def request_of(start):
    """What the zygote has to know, and the descriptors that the child gets."""
    arguments, closed = taken_apart([os.fspath(each) for each in start["args"]])
    cwd = os.path.abspath(os.fspath(start["cwd"] or "."))
    environment = os.environ if start["env"] is None else start["env"]
    path = first_path = code = None
    if arguments[1] == "-c":
        code, first_path = arguments[2], ""
        arguments_seen = [arguments[0], "-c", *arguments[3:]]
    elif arguments[1] == "-m":
        code, first_path = f"import runpy; runpy._run_module_as_main({arguments[2]!r})", cwd
        arguments_seen = [arguments[0], "-m", *arguments[3:]]
    else:
        path = os.path.join(cwd, arguments[1])
        first_path = os.path.dirname(os.path.realpath(path))
        arguments_seen = arguments
    standard = {0: start["p2cread"], 1: start["c2pwrite"], 2: start["errwrite"]}
    descriptors = {number: number if fd == -1 else fd for number, fd in standard.items()}
    descriptors = {number: fd for number, fd in descriptors.items() if number not in closed}
    descriptors |= {number: number for number in start["pass_fds"]}
    ignored = [
        number
        for number in signal.valid_signals()
        if signal.getsignal(number) == signal.SIG_IGN
        and not (start["restore_signals"] and number in (signal.SIGPIPE, signal.SIGXFSZ))
    ]
    request = {
        "parent": os.getpid(),
        "path": path,
        "code": code,
        "first_path": first_path,
        "arguments": arguments,
        "argv": arguments_seen[1:],
        "environment": {os.fspath(name): os.fspath(environment[name]) for name in environment},
        "cwd": cwd,
        "session": start["start_new_session"],
        "starts_workers": "--local" in arguments and is_client(arguments),
        "fds": list(descriptors),
        "ignored": ignored,
        "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "limits": [limit_of(number) for number in range(16)],
    }
    return request, list(descriptors.values())


def is_client(arguments):
    program = arguments[2] if arguments[1] == "-m" else Path(arguments[1]).name
    return program in ("null_client.py", "null_client", "workers.null.client")


def limit_of(number):
    try:
        return resource.getrlimit(number)
    except ValueError:
        return None


def install(environment):
    """Let Popen fork from now on. The zygote gets this environment."""
    forking.environment = {name: environment[name] for name in environment if name != "PYTHONPATH"}
    subprocess.Popen._execute_child = execute_child
    forking.on = True


def take(control, told):
    """Let Popen fork from now on, by a zygote that listens at the other end of this socket."""
    forking.use(Zygote(control, told))
    install({})
