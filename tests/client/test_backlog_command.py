"""The COMMAND of --backlog: what it prints, and that nothing of it is left."""

import asyncio
import os
import re
import signal
import sys
import time

import psutil
import pytest

from null_backlog import Jobs, NotCounted
from null_count import run_backlog
from tests.kit.command import Command
from tests.kit.environment import BARE, HERE, run
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio


def processes_with(mark):
    """Those that have this in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values() and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("line", "jobs"),
    [
        ("echo 3", Jobs(3)),
        ("echo 3 4", Jobs(3, 4)),
        ("echo 3 4 5", Jobs(3, 4, 5)),
        ("printf ' 3\\t\\n4'", Jobs(3, 4)),
        ("echo 007", Jobs(7)),
        ("echo 0 0; echo noise >&2", Jobs(0, 0)),
        ("sleep 600 & echo 7", Jobs(7)),  # what still holds the pipe is not waited for
        ("set -- $(cat /proc/$$/stat); [ $6 = $$ ] && echo 1", Jobs(1)),  # its session
        ("exec >&- 2>&-; sleep 0.1", "it printed nothing"),
        ("true", "it printed nothing"),
        ("exit 1", "exit status 1$"),
        ("echo 5; exit 1", "exit status 1 after a number"),  # as grep -c does
        ("echo many; exit 1", "exit status 1$"),
        ("echo 5; exit 2", "exit status 2$"),
        ("kill -9 $$", "killed by signal 9"),
        ("no-such-program", "exit status 127: .*not found"),
        (
            "echo first >&2; printf '\\033[2Jno \\007server\\n\\n' >&2; exit 3",
            r"3:  ?\[2Jno server",
        ),
        ("echo many", "it printed 'many', not one to three whole numbers"),
        ("echo -3", "it printed '-3', not"),
        ("echo 1.5", "it printed '1.5', not"),
        ("echo 1 2 3 4", "it printed '1 2 3 4', not"),
        ("echo 1e3", "it printed '1e3', not"),
        ("echo 1_0", "it printed '1_0', not"),
        ("echo ٣", "it printed '٣', not"),
        ("echo 99999999999999999999", "it printed '9+', not"),
        ("echo 3; echo oh >&2; echo x", "it printed '3 x', not one to three whole numbers: oh"),
        ("yes", "it prints without end"),
        ("yes 1 2 >&2 & yes", "it prints without end"),
        ("cat; tty >&2", "exit status 1: not a tty"),
        ("(exec 9<>/dev/tty)", "exit status"),
    ],
)
async def test_what_it_prints_is_one_or_two_numbers_or_not_known(line, jobs, monkeypatch, capfd):
    mark = f"{os.getpid()}-{time.monotonic()}"
    monkeypatch.setenv("BACKLOG_OF_THE_TEST", mark)
    if isinstance(jobs, Jobs):
        assert await run_backlog(line) == jobs
    else:
        with pytest.raises(NotCounted) as not_counted:
            await run_backlog(line)
        text = str(not_counted.value)
        assert re.search(jobs, text) and text.isprintable()
    await eventually(lambda: not processes_with(mark))
    assert capfd.readouterr() == ("", "")


async def test_cancelled_all_that_it_has_started_is_killed(monkeypatch):
    mark = f"{os.getpid()}-{time.monotonic()}"
    monkeypatch.setenv("BACKLOG_OF_THE_TEST", mark)
    counting = asyncio.create_task(run_backlog("trap '' TERM; sleep 600 | sleep 600 & sleep 600"))
    await eventually(lambda: len(processes_with(mark)) >= 4)
    counting.cancel()
    await asyncio.wait({counting})
    await eventually(lambda: not processes_with(mark))


# Orphans of its children become children of this process, as they do where it is PID 1.
ADOPTING = """
import asyncio, ctypes, os
from null_count import run_backlog

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
for line in ("sleep 600 & sleep 600 & echo 7", "(true &); (true &); sleep 0.1; echo 7"):
    print(asyncio.run(run_backlog(line)).waiting)
print(open(f"/proc/self/task/{os.getpid()}/children").read() or "no children")
"""


def test_orphans_leave_no_zombies_where_it_is_pid_1():
    done = run([sys.executable, "-c", ADOPTING], BARE | {"PYTHONPATH": str(HERE)})
    assert (done.stdout, done.stderr) == ("7\n7\nno children\n", "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("yes", "backlog: it prints without end"),
        ("yes oh >&2; echo 1", None),
        ("sleep 600", None),
        ("echo no server at all >&2; exit 4", "backlog: exit status 4: no server at all"),
    ],
)
async def test_a_command_that_goes_wrong_holds_up_nothing_and_takes_no_memory(line, says, vast):
    mark = f"{os.getpid()}-{time.monotonic()}"
    polls = vast.polls
    options = ("--backlog", line, "--max", "3", "--every", "0.5")
    environment = {"BACKLOG_OF_THE_TEST": mark}
    async with Command(*options, vast=vast, environment=environment) as command:
        assert await command.says("connecting")
        process = psutil.Process(command.process.pid)
        if says is None:
            await eventually(lambda: len(processes_with(mark)) > 1)
            await asyncio.sleep(1.0)
        else:
            assert await command.says(re.escape(says))
            before = process.memory_info().rss
            await asyncio.sleep(2.0)
            assert process.memory_info().rss - before < 20 << 20
            assert len([text for text in command.lines if "backlog:" in text]) == 1
        assert process.memory_info().rss < 300 << 20
        command.process.send_signal(signal.SIGTERM)
        asked_at = time.monotonic()
        assert await command.status() == 143
        assert time.monotonic() - asked_at < 5
        assert command.errors == []
        await eventually(lambda: not processes_with(mark))
    assert vast.polls == polls


async def test_a_command_that_stays_is_told_from_and_not_left(vast):
    """--watch in the place of --backlog."""
    mark = f"{os.getpid()}-{time.monotonic()}"
    line = "echo 0 2; read nothing; sleep 0.5; echo 0 1; sleep 600"
    environment = {"BACKLOG_OF_THE_TEST": mark}
    arguments = ("--watch", line, "--max", "3")
    async with Command(*arguments, vast=vast, environment=environment) as command:
        await command.says("jobs: 0 waiting, 2 in hand")
        await command.says("jobs: 0 waiting, 1 in hand")
        command.process.send_signal(signal.SIGTERM)
        assert await command.status() == 143
    assert command.errors == []
    await eventually(lambda: not processes_with(mark))
