"""How the command is called, where it lies, and what it inherits."""

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

import null_client
from tests.kit.command import Command
from tests.kit.environment import BARE, HERE, run

pytestmark = pytest.mark.anyio


# How it is called, and what it says of itself


CALLED = [
    (["null_client.py"], "null_client.py"),
    (["-m", "workers.null.client"], "python -m workers.null.client"),
    (["-I", "null_client.py"], "null_client.py"),
]


@pytest.mark.parametrize(("how", "name"), CALLED)
def test_it_calls_itself_as_it_was_called(how, name):
    version = run([sys.executable, *how, "--version"], BARE)
    assert (version.stdout, version.stderr) == (f"{name} {null_client.__version__}\n", "")
    usage = run([sys.executable, *how, "--help"], BARE).stdout
    assert usage.startswith(f"usage: {name} ")
    assert f"  {name} --local --demo" in usage


def test_help_has_a_group_and_an_example_for_each_mode_and_every_exit_status():
    text = run([sys.executable, "null_client.py", "--help"], BARE).stdout
    for group in ("one worker", "several workers", "as many workers as there are jobs"):
        assert re.search(rf"^{group}.*:\n  null_client.py --", text, re.MULTILINE), group
    for status in ("0", "1", "2", "130"):
        assert re.search(rf"^  {status} ", text, re.MULTILINE), status
    assert "NULL_CONSUMER" in text and "==SUPPRESS==" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_needs_none_of_the_requirements():
    """Which take long to import, and may be missing."""
    imported = run([sys.executable, "-X", "importtime", "null_client.py", "--help"], BARE).stderr
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "argparse" in modules
    assert not modules & {"aiohttp", "vastai", "rich", "null_backlog", "null_display"}


def test_what_users_import_is_given_on():
    program = (
        "import null_client, null_reservation, null_backlog\n"
        "from null_client import *\n"
        "from null_client import follow, reserve\n"
        "assert reserve is null_reservation.reserve and follow is null_backlog.follow\n"
        "null_client.no_such_name"
    )
    done = run([sys.executable, "-c", program], BARE)
    assert done.stderr.splitlines()[-1].endswith(
        "module 'null_client' has no attribute 'no_such_name'"
    )


@pytest.mark.parametrize("how", [["null_client.py"], ["-m", "workers.null.client"]])
def test_an_old_python_gets_a_line(how):
    old = Path("~/.pyenv/versions/3.9.18/bin/python").expanduser()
    if not old.exists():
        pytest.skip("no Python 3.9")
    done = run([old, *how, "--help"], BARE)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"null_client: needs Python 3.10 or newer; .* is 3\.9\.\d+\n", done.stderr)


@pytest.mark.parametrize("how", [["null_client.py"], ["-m", "workers.null.client"]])
@pytest.mark.parametrize("mode", [["--local"], ["--endpoint", "x"]])
def test_a_python_without_the_requirements_gets_a_line(how, mode):
    done = run([sys.executable, "-S", *how, *mode], BARE)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"null_client: \S+ has no \w+: activate the virtual environment, "
        r"or run: pip install -r requirements.txt\n",
        done.stderr,
    )


def test_debug_shows_the_traceback_of_what_is_a_line_otherwise():
    command = [sys.executable, "null_client.py", "--endpoint", "x"]
    environment = BARE | {"HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
    line = run(command, environment).stderr
    assert line.startswith("null_client: no API key") and line.count("\n") == 1
    text = run([*command, "--debug"], environment).stderr
    assert "Traceback (most recent call last)" in text and text.endswith(line)


# Where it lies, and where it is started


@pytest.fixture
def copied(tmp_path):
    """A folder with all that the command consists of, and modules that hide Python's own."""
    for file in HERE.glob("null_*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(HERE / "workers", tmp_path / "workers")
    for name in ("queue", "logging", "selectors", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    return tmp_path


CALLS = [
    ["null_client.py"],
    ["-I", "null_client.py"],
    ["-P", "null_client.py"],
    ["-m", "workers.null.client"],
    ["link.py"],
    ["-I", "link.py"],
]


@pytest.mark.parametrize("how", CALLS)
def test_modules_beside_it_hide_none_of_pythons_own(how, copied):
    if sys.version_info < (3, 11) and "-P" in how:
        pytest.skip("-P came with Python 3.11")
    (copied / "elsewhere").mkdir()
    link = copied / "elsewhere" / "link.py"
    link.symlink_to(copied / "null_client.py")
    how = [str(link) if part == "link.py" else part for part in how]
    environment = BARE | {"HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
    done = run([sys.executable, *how, "--endpoint", "x"], environment, copied)
    assert done.stderr.startswith("null_client: no API key: ")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)


def test_a_client_that_was_copied_alone_says_what_its_stand_in_needs(tmp_path):
    for name in ("client", "reservation", "rule", "backlog", "count", "display"):
        shutil.copy(HERE / f"null_{name}.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_client.py", "--local"], BARE)
    assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (2, 1, 1)
    assert done.stderr.startswith("null_client: --local needs null_local.py beside this file: ")


def test_a_command_that_was_copied_alone_says_what_it_needs(tmp_path):
    shutil.copy(HERE / "null_client.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_client.py", "--local"], BARE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "null_client: null_display.py is missing beside this file\n"


def test_a_stand_in_lives_in_a_folder_of_the_users(copied):
    """With a module that hides Python's own, and a temporary folder that has no absolute path."""
    for other in ("logging.py", "selectors.py", "argparse.py"):
        (copied / other).unlink()
    here = {"TMPDIR": ".", "NULL_CONSUMER": "echo worked >worked; sleep 60"}
    command = [sys.executable, "null_client.py", "--local", "--hold", "3"]
    done = run(command, BARE | here, copied)
    assert done.stderr == "" and "#1 released" in done.stdout, done.stdout
    assert done.returncode == 0
    assert (copied / "worked").read_text() == "worked\n"
    assert not list(copied.glob("null-*"))


# What it inherits


@pytest.mark.parametrize(
    "arguments", [["--local"], ["--endpoint", "x", "--backlog", "x", "--max=1"]]
)
def test_a_working_folder_that_was_deleted_is_named(arguments, tmp_path):
    folder = tmp_path / "deleted"
    folder.mkdir()
    program = [sys.executable, HERE / "null_client.py", *arguments]
    done = run(["sh", "-c", f'rmdir {folder}; exec "$@"', "sh", *program], BARE, folder)
    assert done.stderr == "null_client: the working folder has been deleted: cd to another one\n"
    assert (done.returncode, done.stdout) == (2, "")


INHERITING = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.executable, [sys.executable, "-c", {driver!r}, *sys.argv[1:]])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signals_that_the_parent_has_blocked_or_ignored(number, vast):
    """An exit status is told, and a signal ends the command."""
    driver = INHERITING.format(driver=Command.DRIVER.format(url=vast.url))
    arguments = ("--backlog", "echo 0; exit 3", "--max", "1", "--every", "0.2")
    async with Command(*arguments, vast=vast, driver=driver) as command:
        await command.says("backlog: exit status 3")
        command.process.send_signal(number)
        assert await command.status() == 128 + number
    assert command.errors == []
