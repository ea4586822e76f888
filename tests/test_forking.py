"""A program that was forked is what one that was started is: to itself, and to others."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.environment import BARE, HERE
from tests.kit.forking import WANTED, closing, execute_child, forking, signature

LOOK = """
import json, os, resource, signal, subprocess, sys, threading, time
def text(path):
    with open(path, "rb") as file:
        return file.read().rstrip(bytes(1)).decode()
signals = sorted(signal.valid_signals())
seen = {
    "argv": [sys.argv, sys.orig_argv, text("/proc/self/cmdline"), text("/proc/self/comm")],
    "path": sys.path,
    "cwd": os.getcwd(),
    "environment": [sorted(os.environ.items()), sorted(text("/proc/self/environ").split(chr(0)))],
    "inherited": sorted(subprocess.check_output(["env", "-0"], text=True).split(chr(0))),
    "files": sorted(map(int, os.listdir("/proc/self/fd"))),
    "signals": [str(signal.getsignal(number)) for number in signals],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "family": [os.getppid(), os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "limits": [resource.getrlimit(number) for number in range(16)],
    "threads": [threading.active_count(), threading.main_thread().name],
    "main": [__name__, globals().get("__file__"), sys.modules["__main__"].seen is seen
        if "seen" in globals() else None],
    "own": sorted(name for name in sys.modules if name.startswith("null_")),
    "python": [str(sys.flags), os.umask(0o22), os.nice(0), time.tzname, sys.warnoptions],
}
for stream in (sys.stdin, sys.stdout, sys.stderr):
    seen[stream.name] = [stream.encoding, stream.errors, stream.line_buffering]
    seen[stream.name] += [getattr(stream, "write_through", None), stream.mode, stream.fileno()]
print(json.dumps(seen))
"""


def looks_of(start, **options):
    """What a program sees of itself: forked, and started."""
    looks = []
    for forks in (True, False):
        with forking.paused():
            forking.on = forks
            pids = [forking.zygote().process.pid]
            run = subprocess.run(start, check=True, stdout=subprocess.PIPE, text=True, **options)
            looks.append(json.loads(run.stdout))
            assert pids == [forking.zygote().process.pid]
    return looks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start_new_session": True, "cwd": "/"},
        {"env": {**BARE, "PYTHONPATH": str(HERE), "A": "b=c\nd", "TZ": "UTC+3"}},
        {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT},
        {"restore_signals": False},
    ],
)
@pytest.mark.parametrize("kind", ["file", "code"])
def test_a_forked_program_sees_of_itself_what_a_started_one_sees(kind, options, tmp_path):
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    start = [sys.executable, *(["-c", LOOK] if kind == "code" else [script]), "one", "two words"]
    forked, started = looks_of(start, **options)
    assert forked == started


@pytest.mark.parametrize("closed", ["<&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("kind", ["file", "code", "module"])
def test_a_program_without_standard_files_is_forked_as_it_starts(kind, closed, tmp_path):
    look = f"""if True:
        import os, stat, sys, json
        seen = [sys.argv, sys.path, sys.stdin is None, sys.stdout is None, sys.stderr is None]
        for number in range(3):
            try:
                seen.append(stat.S_IFMT(os.fstat(number).st_mode))
            except OSError:
                seen.append(None)
        with open({str(tmp_path / "seen")!r}, "w") as file:
            json.dump(seen, file)
    """
    (tmp_path / "null_look.py").write_text(look)
    named = {"file": ["null_look.py"], "code": ["-c", look], "module": ["-m", "null_look"]}
    command = closing(closed, sys.executable, *named[kind], "two words")
    looks = []
    for forks in (True, False):
        with forking.paused():
            forking.on = forks
            subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, check=True)
        looks.append(json.loads((tmp_path / "seen").read_text()))
    assert looks[0] == looks[1]
    assert looks[0][-3:].count(None) == len(closed.split())


def test_what_was_ignored_blocked_limited_and_passed_on_is_so_in_a_fork():
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    passed, theirs = os.pipe()
    try:
        forked, started = looks_of([sys.executable, "-c", LOOK], pass_fds=(passed,))
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.signal(signal.SIGUSR1, before)
        os.close(passed)
        os.close(theirs)
    assert forked == started
    assert passed in forked["files"] and forked["blocked"] == [signal.SIGUSR2]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('a word')", 1),
        ("raise SystemExit(-1)", 255),
        ("raise SystemExit(True)", 1),
        ("import sys; sys.stdout.close()", 0),
        ("import weakref; this = set(); weakref.finalize(this, print, 'gone')", 0),
        ("1 / 0", 1),
        ("1 +", 1),
        ("import os; os._exit(9)", 9),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("import atexit; atexit.register(print, 'end'); print('no end', end='; ')", 0),
        ("import threading; threading.Timer(0.1, print, ['late']).start()", 0),
        ("print('to a closed pipe' * 100000)", 1),
        ("import sys; sys.stdout = open(1, 'w', closefd=False); print('to a closed pipe')", 120),
    ],
)
def test_a_fork_ends_as_a_start_does(code, status):
    ends = []
    for forks in (True, False):
        with forking.paused():
            forking.on = forks
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            if "closed pipe" in code:
                process.stdout.close()
                process.stdout = None
            output, errors = process.communicate(timeout=30)
        ends.append((process.returncode, output, errors.splitlines()[-1:]))
    assert ends[0] == ends[1] and ends[0][0] == status


def test_forks_are_children_of_this_process_and_know_when_it_has_gone():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" in status and "Threads:\t1\n" in status
        assert child.poll() is None
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{child.pid}").exists()  # it was waited for, and is no zombie
    tasks = os.listdir(f"/proc/{forking.zygote().process.pid}/task")
    assert len(tasks) == 1


@pytest.mark.parametrize(
    ("arguments", "options", "forks"),
    [
        (["-c", LOOK], {}, True),
        (["look.py"], {}, True),
        (["-I", "-c", LOOK], {}, False),
        (["-m", "look"], {}, False),
        (["-m", "null_worker"], {}, True),
        (["nothing.py"], {}, False),
        (["-c", LOOK], {"env": {**BARE, "PYTHONPATH": "/elsewhere"}}, True),
        (["-c", LOOK], {"env": {**BARE, "PYTHONPATH": "custom"}}, False),
        (["-c", LOOK], {"env": {**BARE, "PYTHONPATH": f"{HERE}:hiding"}}, False),
        (["-c", LOOK], {"env": {**BARE, "PYTHONWARNINGS": "error"}}, False),
        (["-c", LOOK], {"env": {**BARE, "LANG": "xx_YY"}}, False),
        (["-c", LOOK], {"env": {**BARE, "LARGE": "x" * 150_000}}, False),
        (["-c", LOOK], {"cwd": "/nowhere"}, False),
        (["-c", LOOK], {"umask": 0o77}, False),
        (["-c", LOOK], {"preexec_fn": os.getpid}, False),
        (["-c", LOOK], {"cwd": "hiding"}, False),
        (["hiding/look.py"], {}, False),
        (["-c", LOOK], {"executable": "/bin/true"}, False),
    ],
)
def test_what_a_fork_cannot_stand_for_is_started(arguments, options, forks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("look.py").write_text(LOOK)
    Path("hiding").mkdir()
    Path("hiding/look.py").write_text(LOOK)
    Path("hiding/aiohttp.py").touch()
    Path("custom").mkdir()
    Path("custom/sitecustomize.py").touch()
    asked = []
    monkeypatch.setattr(forking.zygote(), "fork", lambda *_: asked.append(1) or os.getpid())
    monkeypatch.setattr("tests.kit.forking._execute_child", lambda *_, **__: asked.append(0))
    popen = subprocess.Popen.__new__(subprocess.Popen)
    popen.returncode = 0  # nothing to wait for
    arguments = {"args": [sys.executable, *arguments], "executable": None, **options}
    start = dict.fromkeys(execute_names(), None) | WANTED | NO_PIPES | arguments
    if "process_group" not in execute_names():
        del start["process_group"]
    execute_child(popen, **{**start, "pass_fds": (), "restore_signals": True})
    assert asked == [int(forks)]


NO_PIPES = dict.fromkeys(
    ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"), -1
) | {"start_new_session": False, "creationflags": 0}


def execute_names():
    return list(signature.parameters)[1:]


@pytest.mark.starts
def test_a_test_that_is_about_starting_starts():
    assert not forking.on
