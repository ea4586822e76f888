"""null_worker.py and null_consumer.py, wherever they lie, and whoever has started them."""

import ast
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.kit.alone import worker_alone
from tests.kit.environment import BARE, HERE, run
from tests.kit.waiting import eventually
from tests.kit.worker import create, driver, until

pytestmark = pytest.mark.anyio
PROGRAMS = ("null_worker.py", "null_consumer.py")
ALONE = {"PYTHONPATH": ""}


def old_pythons():
    """Those of this machine that are older than what the project needs."""
    names = [f"python3.{minor}" for minor in range(6, 10)]
    found = [shutil.which(name) for name in names]
    found += Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")
    paths = sorted({str(path) for path in found if path})
    # Not what pyenv puts in the place of a version that isn't chosen.
    return [path for path in paths if run([path, "-c", ""], BARE).returncode == 0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_old_python_can_read_it_and_says_what_it_needs(program):
    ast.parse((HERE / program).read_text(), feature_version=(3, 6))
    pretend = "import runpy, sys; sys.version_info = (3, 9, 2); sys.argv = sys.argv[1:]; "
    pretend += "runpy.run_path(sys.argv[0], run_name='__main__')"
    calls = [[sys.executable, "-c", pretend], *([python] for python in old_pythons())]
    for call in calls:
        done = run([*call, HERE / program, "--", "true"], BARE)
        line = f"{program.removesuffix('.py')}: needs Python 3.10 or newer, and this is 3."
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_python_without_the_requirements_gets_a_line():
    done = run([sys.executable, "-S", HERE / "null_worker.py"], BARE | ALONE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No module named 'aiohttp'" in done.stderr
    assert done.stderr.endswith("pip install -r requirements.txt\n")


def test_null_consumer_without_its_guard_says_so(tmp_path):
    shutil.copy(HERE / "null_consumer.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_consumer.py", "--", "true"], BARE | ALONE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("null_consumer: needs null_guard.py beside itself")


def beside_files_of_the_user(folder):
    for name in (*PROGRAMS, "null_guard.py"):
        shutil.copy(HERE / name, folder)
    for name in ("queue.py", "json.py", "select.py", "signal.py", "asyncio.py"):
        (folder / name).write_text("raise SystemExit('this is the file of a user')\n")
    return folder / "null_worker.py"


def linked(folder):
    (folder / "null_worker.py").symlink_to(HERE / "null_worker.py")
    return folder / "null_worker.py"


def as_it_is(_folder):
    return HERE / "null_worker.py"


@pytest.mark.parametrize(
    ("lies", "environment"),
    [
        (beside_files_of_the_user, {}),
        (linked, {}),
        (as_it_is, {"PYTHONSAFEPATH": "1"}),
        (as_it_is, {"TMPDIR": "."}),
    ],
)
async def test_wherever_it_lies_its_consumer_runs(tmp_path, lies, environment):
    program = (sys.executable, lies(tmp_path))
    variables = {"NULL_CONSUMER": "touch ran", **ALONE, **environment}
    async with worker_alone(tmp_path, program, **variables) as worker:
        await eventually(worker.reserve)
        await eventually((tmp_path / "ran").exists)


async def test_signals_that_its_parent_has_blocked_or_ignored_are_its_own(tmp_path):
    changed = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    changed += "signal.pthread_sigmask(signal.SIG_BLOCK, [1, 2, 15]); "
    changed += "os.execv(sys.executable, sys.argv[1:])"
    program = (sys.executable, "-c", changed, sys.executable, HERE / "null_worker.py")
    line = "trap 'echo told >> told; exit 0' TERM; touch began; while :; do sleep 0.1; done"
    async with worker_alone(tmp_path, program, NULL_CONSUMER=line) as worker:
        await eventually(worker.reserve)
        await eventually((tmp_path / "began").exists)
    # At its end it was asked to drain, and ended with 0.
    assert (tmp_path / "told").read_text() == "told\n"


async def test_a_consumer_gets_the_limit_of_open_files_that_the_worker_was_started_with(tmp_path):
    line = f"ulimit -Sn 300; exec {sys.executable} {HERE / 'null_worker.py'}"
    options = {"NULL_CONSUMER": "ulimit -Sn > limit; touch ran"}
    async with worker_alone(tmp_path, ("sh", "-c", line), **options) as worker:
        await eventually(worker.reserve)
        await eventually((tmp_path / "ran").exists)
        soft, hard = resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE)
    assert (tmp_path / "limit").read_text() == "300\n"
    assert soft == hard > 300


async def test_an_instance_whose_provisioning_has_failed_is_broken(vast, tmp_path):
    failed = tmp_path / "failed"
    failed.touch()
    path = f"null_worker.Path({str(failed)!r})"
    script = driver(tmp_path, f"null_worker.PROVISIONING_FAILED = {path}")
    worker = vast.start_worker(script=script)
    await until(worker, lambda: worker.log.exists() and "control server" in worker.log.read_text())
    began_at = time.monotonic()
    await until(worker, lambda: worker.report.get("error_msg"))
    assert time.monotonic() - began_at < 3
    assert "/var/log/portal/provisioning.log" in worker.report["error_msg"]
    assert await create(vast, worker, expected=503)
    await eventually(lambda: worker.number not in vast.workers)
