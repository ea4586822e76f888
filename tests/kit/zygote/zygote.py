"""A Python that has imported what the programs under test import, and forks for each of them.

Started by forking.py, with a socket as its standard input. A request names what an exec would: the
arguments, environment, folder, open files, signals, limits, session. The child then is what
`python FILE ARG ...` or `python -c CODE ARG ...` is, as far as it and others can see. It runs the
file as the main program, its own modules are imported anew, and its parent is the process that
asked.

`null_client.py --local` starts workers itself. It gets a zygote of its own, forked from this one.
"""

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import glob
import importlib
import importlib.util
import io
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path

CONTROL = 0  # the descriptor of the socket
MAX_FDS = 64
OWN_ZYGOTE = 199  # the descriptor of the socket, in a child that has a zygote of its own
LENGTH = 8  # bytes that say how long a message is


# What is imported, and kept

codes = {}  # of a file's path: which version of it was compiled, and its code


def code_of(path):
    """The code of a file, compiled once as long as it doesn't change."""
    status = os.stat(path)
    version = (status.st_mtime_ns, status.st_size, status.st_ino)
    if codes.get(path, (None,))[0] != version:
        text = Path(path).read_bytes()
        codes[path] = version, compile(text, path, "exec", dont_inherit=True)
    return codes[path][1]


def keep_code(here):
    """Compile the project's modules once, where Python may not write the code beside them."""
    get_code = SourceFileLoader.get_code

    def get_kept_code(loader, name):
        path = loader.path
        return code_of(path) if os.path.dirname(path) == here else get_code(loader, name)

    SourceFileLoader.get_code = get_kept_code


def preload(here):
    """Import what the programs import, but keep no more than the code of their own modules."""
    before = sys.path[1:]  # without this folder
    sys.path[0] = here
    own = [os.path.basename(path)[:-3] for path in glob.glob(os.path.join(here, "null_*.py"))]
    for name in own:
        with contextlib.suppress(ModuleNotFoundError):  # of an extra that isn't installed
            importlib.import_module(name)
    for name in (
        "vastai.serverless.server.lib.backend",
        "vastai.serverless.server.lib.metrics",
        "vastai.serverless.client.client",
        "multiprocessing",
        "http.server",
        "runpy",
    ):
        importlib.import_module(name)
    import vastai

    for name in ("Serverless", "VastAI", "Worker", "WorkerConfig", "HandlerConfig"):
        getattr(vastai, name)  # some are imported only when they are asked for
    for name in own:
        sys.modules.pop(name, None)
    sys.path[:] = before
    sys.path_importer_cache.clear()


# Requests


def receive(control):
    """The next request, and the descriptors that came with it; None at the end."""
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    head, ancillary, _, _ = control.recvmsg(LENGTH, space)
    if not head:
        return None, []
    fds = array.array("i")
    for _level, _kind, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    length, message = int.from_bytes(head, "big"), b""
    while len(message) < length:
        message += control.recv(length - len(message))
    return json.loads(message), list(fds)


def fork(control):
    """Fork until there are no more requests; return in each child, with its own request.

    The child's parent ends at once. The child is then one of the process that asked for it, which
    is an ancestor, and a subreaper meanwhile.
    """
    while True:
        request, fds = receive(control)
        if request is None:
            os._exit(0)
        path = request["path"]
        code = None
        with contextlib.suppress(SyntaxError):  # the child says so
            code = path and code_of(path)
        inner, outer = os.pipe()
        middle = os.fork()
        if not middle:
            child = os.fork()
            if child:
                os.write(outer, child.to_bytes(LENGTH, "big"))
                os._exit(0)
            return request, fds, code
        os.close(outer)
        pid = os.read(inner, LENGTH)
        os.close(inner)
        os.waitpid(middle, 0)
        for each in fds:
            os.close(each)
        control.sendall(pid)


# The child


def become(request, fds):
    """Make this process what an exec would have made it."""
    while os.getppid() != request["parent"]:
        time.sleep(0.0002)
    if request["session"]:
        os.setsid()
    place_descriptors(fds, request["fds"])
    set_signals(request["ignored"], request["blocked"])
    for limit, values in enumerate(request["limits"]):
        if values is not None:
            resource.setrlimit(limit, values)
    os.chdir(request["cwd"])
    os.environ.clear()  # first: the C library's own list points to what is then overwritten
    os.environ.update(request["environment"])
    overwrite(request["arguments"], request["environment"])
    time.tzset()
    tempfile.tempdir = None
    random.seed()
    sys.orig_argv = request["arguments"]
    sys.argv = request["argv"]
    open_standard_files()
    paths = [path for path in request["environment"].get("PYTHONPATH", "").split(":") if path]
    sys.path[:] = [request["first_path"], *paths, *sys.path]


def place_descriptors(received, wanted):
    """Give what was received its numbers, and close all else."""
    above = max([2, *wanted]) + 1
    spare = [fcntl.fcntl(each, fcntl.F_DUPFD, above) for each in received]
    os.closerange(0, above)
    for each, number in zip(spare, wanted, strict=True):
        os.dup2(each, number, inheritable=number != OWN_ZYGOTE)
    os.closerange(above, max([above, *received, *spare]) + 1)


def set_signals(ignored, blocked):
    """As an exec leaves them, and Python's start after it."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def areas():
    """Where the kernel looks for this process's arguments and environment: (start, end) of each."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end, environment_start, environment_end = map(int, fields[45:49])
    return (start, end), (environment_start, environment_end)


def overwrite(arguments, environment):
    """Let /proc say the arguments and the environment of this process, not the zygote's."""
    texts = (arguments, [f"{name}={value}" for name, value in environment.items()])
    for (start, end), lines in zip(areas(), texts, strict=True):
        area = b"".join(os.fsencode(line) + b"\0" for line in lines)
        ctypes.memmove(start, area.ljust(end - start, b"\0"), end - start)


def open_standard_files():
    """New ones: the zygote's know whether its own files were terminals. None where it is closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        try:
            os.fstat(number)
        except OSError:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
            continue
        writes = number > 0
        unbuffered = old.write_through  # PYTHONUNBUFFERED
        raw = io.FileIO(number, "w" if writes else "r", closefd=False)
        raw.name = f"<{name}>"
        buffered = raw
        if not writes:
            buffered = io.BufferedReader(raw)
        elif not unbuffered:
            buffered = io.BufferedWriter(raw)
        file = io.TextIOWrapper(
            buffered,
            old.encoding,
            old.errors,
            newline="\n",
            line_buffering=not unbuffered and (number == 2 or raw.isatty()),
            write_through=unbuffered,
        )
        file.mode = "w" if writes else "r"
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def main_module(path):
    module = types.ModuleType("__main__")
    module.__builtins__ = __builtins__
    if path is not None:
        module.__file__ = path
    sys.modules["__main__"] = module
    return module


def tell(control):
    """Tell the tests' process what it has to know of this one."""
    (start, end), (environment_start, environment_end) = areas()
    told = {
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
        "room": (end - start, environment_end - environment_start),
        "environment": dict(os.environ),
    }
    message = json.dumps(told).encode()
    control.sendall(len(message).to_bytes(LENGTH, "big") + message)
    return told


def forking_of(here):
    """The module that asks for forks, for a child that has a zygote of its own."""
    path = os.path.join(here, "tests", "kit", "forking.py")
    spec = importlib.util.spec_from_file_location("forking", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child_of(control, told, forking):
    """Serve; return in each child, as what an exec would have made it: the code to be run."""
    while True:
        request, fds, code = fork(control)
        if not request["starts_workers"]:
            become(request, fds)
            break
        theirs, ours = socket.socketpair()
        if os.fork():
            become({**request, "fds": [*request["fds"], OWN_ZYGOTE]}, [*fds, ours.fileno()])
            ours.detach()
            forking.take(socket.socket(fileno=OWN_ZYGOTE), told)
            break
        control.detach()  # this is the child's zygote now
        os.dup2(theirs.detach(), CONTROL + 3)
        os.closerange(CONTROL + 4, 1 << 10)
        control = socket.socket(fileno=CONTROL + 3)
    control.detach()
    module = main_module(request["path"])
    if code is None:
        path = request["path"]
        text = request["code"] if path is None else Path(path).read_bytes()
        code = compile(text, path or "<string>", "exec", dont_inherit=True)
    return code, vars(module)


def run():
    control = socket.socket(fileno=os.dup(CONTROL))
    with open("/dev/null") as nothing:
        os.dup2(nothing.fileno(), CONTROL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests' process
    here = sys.argv[1]
    keep_code(here)
    preload(here)
    forking = forking_of(here)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads can't be forked so"
    told = tell(control)
    gc.collect()
    gc.freeze()  # what is there is shared with the children, who needn't look at it
    return child_of(control, told, forking)


def finish(status):
    """End as Python does, but don't take apart what the zygote has imported: that takes long."""
    threading._shutdown()  # waits for the threads
    atexit._run_exitfuncs()
    try:
        for file in (sys.stdout, sys.stderr):
            if file is not None and not file.closed:
                file.flush()
    except Exception:  # noqa: BLE001  Python says so, and has a status for it
        sys.exit(status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    try:
        exec(*run())
    except SystemExit as end:
        if not (end.code is None or isinstance(end.code, int)):
            raise
        finish(end.code or 0)
    else:
        finish(0)
