"""`NULL_CONSUMER`: the worker runs null_consumer.py beside itself, and ends it with itself."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from aiohttp import web

import null_worker
from tests.consumer.wrappers import words_of, write_consumer
from tests.kit.alone import worker_alone
from tests.kit.autoscaler import statuses
from tests.kit.environment import BARE, HERE, ON_VAST, run
from tests.kit.http import server
from tests.kit.waiting import eventually
from tests.kit.worker import create, drained, driver, fresh, killed, lease, release, until

pytestmark = pytest.mark.anyio


class Command:
    """A COMMAND that says its process id once for each run, and works until it is ended."""

    def __init__(self, folder, trap=""):
        self.file = folder / "runs"
        self.line = f"{trap} echo $$ >> {self.file}; while sleep 0.1; do :; done"

    def runs(self):
        return self.file.read_text().split() if self.file.exists() else []

    def is_running(self):
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{self.runs()[-1]}/status").read_text()
            return "State:\tZ" not in status
        return False


def child_of(worker):
    """The process id of the worker's null_consumer.py."""
    for children in Path(f"/proc/{worker.process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread or a process that ends meanwhile
            for pid in children.read_text().split():
                if b"null_consumer.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    return None


async def test_its_command_runs_while_the_worker_is_reserved(vast, tmp_path):
    command = Command(tmp_path)
    worker = await fresh(vast, {"NULL_CONSUMER": command.line})
    await asyncio.sleep(1)
    assert not command.runs()
    session_id = await create(vast, worker)
    await until(worker, command.is_running)
    assert (await release(worker, session_id))[1]["released"]
    await until(worker, lambda: not command.is_running())
    assert len(command.runs()) == 1
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 5


@pytest.mark.parametrize(("trap", "longest"), [("", 5), ("trap '' TERM;", 8)])
async def test_a_drain_ends_the_command_and_only_then_the_session(vast, tmp_path, trap, longest):
    command, worked_on = Command(tmp_path, trap), []

    async def closed(_request):
        worked_on.append(command.is_running())
        return web.Response()

    async with server(web.post("/closed", closed)) as origin:
        worker = await fresh(vast, {"NULL_CONSUMER": command.line})
        await create(vast, worker, on_close_route=f"{origin}/closed")
        await until(worker, command.is_running)
        status, seconds = await drained(worker)
    assert (status, worked_on, statuses(vast)) == (0, [False], ["Success"])
    assert seconds < longest and "not done" not in worker.log.read_text()


async def test_on_a_drain_who_may_have_been_told_is_asked_after_two_seconds(tmp_path):
    write_consumer(tmp_path, 0.5, None)
    seconds = []
    line = "trap 'exit 0' TERM; ./consumer & wait"  # it catches the signal, and tells nobody
    async with worker_alone(tmp_path, NULL_CONSUMER=line) as worker:
        await eventually(worker.reserve)
        await eventually(lambda: words_of(tmp_path))
        asked_at = time.monotonic()
        told = asyncio.create_task(eventually(lambda: "told" in str(words_of(tmp_path))))
        told.add_done_callback(lambda _: seconds.append(time.monotonic() - asked_at))
        # At its end the worker is drained.
    await told
    assert 1.5 < seconds[0] < 4
    assert words_of(tmp_path)[-1][0] == "done"


async def test_it_ends_when_the_worker_is_killed(vast, tmp_path):
    command = Command(tmp_path, "trap '' TERM;")
    worker = await fresh(vast, {"NULL_CONSUMER": command.line, "NULL_GRACE": "1"})
    await create(vast, worker)
    await until(worker, command.is_running)
    consumer = child_of(worker)
    await killed(worker)
    await eventually(lambda: not command.is_running(), timeout=15)
    await eventually(lambda: not os.path.exists(f"/proc/{consumer}"), timeout=15)


async def test_it_is_started_again_when_it_ends(vast, tmp_path):
    command = Command(tmp_path)
    worker = await fresh(vast, {"NULL_CONSUMER": command.line, "NULL_GRACE": "1"})
    first = await until(worker, lambda: child_of(worker))
    os.kill(first, signal.SIGKILL)
    await until(worker, lambda: child_of(worker) not in (None, first))
    await create(vast, worker)
    await until(worker, command.is_running)
    assert f"null_consumer.py ended with status -{signal.SIGKILL}; " in worker.log.read_text()
    assert (await drained(worker))[0] == 0
    assert not command.is_running()


async def test_what_it_and_its_guard_had_started_is_ended_when_both_are_killed(vast, tmp_path):
    command = Command(tmp_path, "trap '' TERM; (setsid sleep 70 &);")
    environment = {"NULL_CONSUMER": command.line, "NULL_GRACE": "2"}
    worker = await fresh(vast, environment)
    session_id = await create(vast, worker, lifetime=2)
    await until(worker, command.is_running)
    (first,) = command.runs()
    family = psutil.Process(child_of(worker)).children(recursive=True)
    (guard,) = psutil.Process(child_of(worker)).children()
    for pid in (guard.pid, child_of(worker)):
        os.kill(pid, signal.SIGKILL)
    while len(command.runs()) == 1:
        assert (await lease(worker))["session_id"] == session_id  # kept meanwhile
        await asyncio.sleep(0.1)
    assert command.runs()[0] == first
    left = [each for each in family if each.is_running() and each.status() != "zombie"]
    assert not left
    assert "null_consumer.py has left behind, and that is ended: " in worker.log.read_text()
    assert (await drained(worker))[0] == 0
    assert not command.is_running()


def in_place_of_the_script(folder, *lines):
    """A worker's script, and a program that it runs in the place of null_consumer.py."""
    program = folder / "instead.py"
    program.write_text("\n".join(lines))
    return driver(folder, f"import null_consumer; null_consumer.__file__ = {str(program)!r}")


@pytest.mark.parametrize(("status", "starts"), [(2, 1), (1, 3)])
async def test_one_that_cannot_run_here_is_the_workers_error(vast, tmp_path, status, starts):
    script = in_place_of_the_script(
        tmp_path,
        "import sys",
        f"open({str(tmp_path / 'starts')!r}, 'a').write('x')",
        "print('first line', file=sys.stderr)",
        "print('no such flag: --worker-pipe', file=sys.stderr)",
        f"sys.exit({status})",
    )
    worker = vast.start_worker({"NULL_CONSUMER": "true"}, script=script)
    await until(worker, lambda: worker.report.get("error_msg"))
    why = f"it ended with status {status}: no such flag: --worker-pipe"
    assert worker.report["error_msg"] == f"null_consumer.py can't be run here: {why}"
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert "first line" in worker.log.read_text()
    await eventually(lambda: worker.number not in vast.workers)


async def test_one_that_breaks_later_leaves_its_last_words(vast, tmp_path):
    script = in_place_of_the_script(
        tmp_path,
        f"import sys; sys.path.append({str(HERE)!r}); import null_consumer",
        "null_consumer.Consumer.run = lambda self: 1 / 0",
        "sys.exit(null_consumer.main())",
    )
    worker = vast.start_worker({"NULL_CONSUMER": "true"}, script=script)
    await until(worker, lambda: worker.report.get("error_msg"))
    assert worker.report["error_msg"].endswith("status 1: ZeroDivisionError: division by zero")
    await eventually(lambda: worker.number not in vast.workers)


async def test_its_command_is_not_in_the_virtual_environment_of_the_worker(tmp_path):
    ours = os.path.join(sys.prefix, "bin")
    line = 'echo "$VIRTUAL_ENV|$PATH|$MASTER_TOKEN|$NULL_CONTROL_PORT|$PWD" > told; sleep 60'
    environment = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": os.pathsep.join((ours, "/usr/bin", "/bin")),
        "MASTER_TOKEN": "secret",
        "NULL_CONSUMER": line,
    }
    async with worker_alone(tmp_path, **environment) as worker:
        await eventually(worker.reserve)
        told = tmp_path / "told"
        await eventually(lambda: told.exists() and told.read_text())
    virtual_env, path, token, port, folder = told.read_text().strip().split("|")
    assert (virtual_env, token, port) == ("", "", str(worker.control_port))
    assert path.split(os.pathsep)[-2:] == ["/usr/bin", "/bin"] and ours not in path
    assert os.path.samefile(folder, tmp_path)


@pytest.mark.parametrize(
    ("prefix", "env", "expected"),
    [
        ("/v", {"VIRTUAL_ENV": "/v", "PATH": "/v/bin:/bin"}, {"PATH": "/bin"}),
        ("/v", {"VIRTUAL_ENV_PROMPT": "v", "VIRTUAL_ENV": "/v/"}, {}),
        ("/v", {"VIRTUAL_ENV": "/w", "PATH": "/w/bin:/bin"}, "as it is"),
        ("/v", {"PATH": "/bin:/v/bin/"}, {"PATH": "/bin"}),
        (sys.base_prefix, {"VIRTUAL_ENV": "/v", "PATH": "/v/bin:/bin"}, "as it is"),
        ("/v", {"MASTER_TOKEN": "x", "NULL_CONTROL_PORT": "1", "A": "b"}, {"A": "b"}),
    ],
)
def test_what_is_left_of_the_environment(monkeypatch, prefix, env, expected):
    monkeypatch.setattr(sys, "prefix", prefix)
    left = null_worker.environment_of_consumer(env, 4000)
    assert left == (env if expected == "as it is" else expected) | {"NULL_CONTROL_PORT": "4000"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"NULL_CONSUMER": " "}, "NULL_CONSUMER is ' ', should be a shell line"),
        ({"NULL_CONSUMER": "x", "NULL_GRACE": "soon"}, "NULL_GRACE is 'soon', should be a number"),
        ({"NULL_CONSUMER": "x", "NULL_STOP_SIGNAL": "9"}, "NULL_STOP_SIGNAL is '9', should be one"),
        ({"NULL_CONSUMER": "x", "NULL_RESIDENT": "2"}, "NULL_RESIDENT is '2', should be true"),
    ],
)
def test_a_bad_setting_of_the_consumer_is_one_of_the_worker(change, line):
    done = run([sys.executable, HERE / "null_worker.py"], BARE | ON_VAST | change)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"null_worker: {line}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("lacks", ["null_consumer.py", "null_guard.py"])
def test_a_worker_that_was_copied_without_what_it_needs_says_so(tmp_path, lacks):
    for name in {"null_worker.py", "null_consumer.py", "null_guard.py"} - {lacks}:
        shutil.copy(HERE / name, tmp_path)
    command = [sys.executable, tmp_path / "null_worker.py"]
    done = run(command, BARE | ON_VAST | {"NULL_CONSUMER": "rq worker"})
    beside = tmp_path / lacks
    line = f"null_worker: NULL_CONSUMER is 'rq worker', should be unset where there is no {beside}"
    assert (done.returncode, done.stderr) == (2, f"{line}\n")


def test_a_worker_that_was_copied_alone_needs_no_setting_of_the_consumer(tmp_path):
    shutil.copy(HERE / "null_worker.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_worker.py"], BARE | {"NULL_GRACE": "soon"})
    assert "not a Vast Serverless instance" in done.stderr
