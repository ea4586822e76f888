"""The job in hand is finished, and nobody is told twice, whatever the consumer is wrapped in."""

import asyncio
import shutil
import signal
import time

import pytest

from tests.consumer.wrappers import TRAP, Wrapper, trial, words_of, write_consumer
from tests.kit.alone import worker_alone
from tests.kit.consumer import consumer, driver, held
from tests.kit.http import post
from tests.kit.waiting import eventually
from tests.kit.worker import create, release

pytestmark = pytest.mark.anyio

SECONDS = 3.0  # of a job
# A server that the consumer needs, and that says when it was told to end.
SERVER = """\
#!/bin/sh
trap 'echo told server $$ >> consumer.log; exit 0' TERM
echo server $$ > server.pid
while :; do sleep 0.1; done
"""
WRAPPERS = {
    "asked twice": Wrapper("timeout 1h sh -c 'true && ./consumer'"),
    "passes it on": Wrapper("./run.sh", files=TRAP),
    "ignores it": Wrapper("strace -f -o /dev/null ./consumer", ("strace",)),
    "blocks it": Wrapper("unshare --fork --pid ./consumer", ("unshare",)),
    "two under xargs": Wrapper("seq 2 | xargs -P2 -n1 ./consumer"),
    "a pipeline": Wrapper("./consumer | tee log"),
    "a server beside it": Wrapper("./server & ./consumer; true", files={"server": SERVER}),
}


QUICK = ("asked twice", "a server beside it")


def by_name(wrappers):
    params = []
    for name, wrapper in wrappers.items():
        marks = [] if name in QUICK else [pytest.mark.long]  # `test_a_run_of_its_own` has them all
        params.append(pytest.param(wrapper, id=name, marks=marks))
    return params


def needs(wrapper):
    if not all(shutil.which(name) for name in wrapper.needs):
        pytest.skip(f"{' and '.join(wrapper.needs)} not installed")


def are_finished(words):
    """Whether each consumer was told once, and has done its job after that."""
    by_pid = {}
    for head, *_, pid in words:
        by_pid.setdefault(pid, []).append(head)
    consumers = [heads for heads in by_pid.values() if "began" in heads]
    return all(heads.count("told") == 1 and heads[-1] == "done" for heads in consumers)


async def test_a_run_of_its_own(tmp_path):
    wrappers = [wrapper for wrapper in WRAPPERS.values() if all(map(shutil.which, wrapper.needs))]
    runs = [asyncio.to_thread(trial, wrapper, None, SECONDS) for wrapper in wrappers]
    for wrapper, run in zip(wrappers, await asyncio.gather(*runs), strict=True):
        assert are_finished(run.words), (wrapper.line, run)
        assert not run.killed, (wrapper.line, run)


@pytest.mark.parametrize("wrapper", by_name(WRAPPERS))
async def test_as_null_consumer(tmp_path, wrapper):
    needs(wrapper)
    write_consumer(tmp_path, SECONDS, None)
    for name, text in wrapper.files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    async with worker_alone(tmp_path, NULL_CONSUMER=wrapper.line) as worker:
        await eventually(worker.reserve)
        await eventually(lambda: words_of(tmp_path))
        await asyncio.sleep(1)
        await post(f"http://127.0.0.1:{worker.control_port}/release")
        await eventually(lambda: are_finished(words_of(tmp_path)))
        if "server" in wrapper.files:  # it is the last to be told
            await eventually(lambda: words_of(tmp_path)[-1][:2] == ["told", "server"])
    assert not any(line[0] == "lost" for line in words_of(tmp_path))


async def test_a_job_of_twelve_seconds_is_finished_behind_a_shell_and_timeout(
    vast, worker, tmp_path
):
    write_consumer(tmp_path, 12.0, None)
    command = ["timeout", "1h", "sh", "-c", "true && ./consumer"]
    async with consumer(worker, tmp_path, command=command) as running:
        session_id = await create(vast, worker, lifetime=4)
        await eventually(lambda: words_of(tmp_path))
        running.signal()
        signalled_at = time.monotonic()
        while len(words_of(tmp_path)) < 3:
            assert await held(worker, session_id)
            await asyncio.sleep(0.2)
        assert [line[0] for line in words_of(tmp_path)] == ["began", "told", "done"]
        assert time.monotonic() - signalled_at > 10
        assert await running.status() == 143
        assert not running.said("killed")


async def test_the_stop_signal_is_another_one(vast, worker, tmp_path):
    line = "trap 'echo lost; exit 1' TERM; trap 'echo finished; exit 0' INT; echo began; "
    line += "while :; do sleep 0.1; done"
    options = {"command": line, "NULL_STOP_SIGNAL": "INT"}
    async with consumer(worker, tmp_path, **options) as running:
        session_id = await create(vast, worker)
        await running.until_printed("began")
        await release(worker, session_id)
        await running.until_printed("finished")
        assert not running.printed("lost")
    options = ("--stop-signal", "SIGUSR1")
    line = "trap 'echo finished; exit 0' USR1; echo began; while :; do sleep 0.1; done"
    async with consumer(worker, tmp_path, *options, command=line) as running:
        await create(vast, worker)
        await running.until_printed("began")
        running.signal(signal.SIGTERM)  # what null_consumer.py gets is another matter
        assert await running.status() == 143
        assert running.printed("finished")


async def test_who_was_killed_is_told_with_all_that_was_under_it(vast, worker, tmp_path):
    line = "trap '' TERM; setsid sleep 61 & echo began; sleep 60; sleep 60"
    async with consumer(worker, tmp_path, "--grace", "1", command=line) as running:
        await create(vast, worker)
        await running.until_printed("began")
        await eventually(lambda: len(running.family()) >= 3)
        pids = {process.pid: process.name() for process in running.family()}
        running.signal()
        assert await running.status() == 143
        (said,) = running.said("killed, for it had not ended in its time: ")
        named = said.partition(": ")[2].split(", ")
        assert named[0].endswith("(sh)")
        assert set(named) == {f"{pid} ({name})" for pid, name in pids.items()}


async def test_it_needs_no_session_of_posix_spawn(vast, worker, tmp_path):
    # As of a Python that was built against an old glibc.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "def spawn(*arguments, before=os.posix_spawn, setsid=False, **options):\n"
        "    if setsid:\n"
        "        raise NotImplementedError('setsid')\n"
        "    return before(*arguments, **options)\n"
        "os.posix_spawn = os.posix_spawnp = spawn\n"
    )
    options = {"command": "echo began", "PYTHONPATH": str(tmp_path)}
    async with consumer(worker, tmp_path, **options) as running:
        await create(vast, worker)
        await running.until_printed("began")
        await running.until_said("released")


async def test_what_the_system_lacks_is_told_at_the_start(worker, tmp_path):
    lines = ["def fail(*_):", "    raise NotImplementedError('no such call')"]
    lines += ["import null_guard; null_guard.Program._execute = fail"]
    script = driver(tmp_path, *lines)
    async with consumer(worker, tmp_path, command="exec sleep 60", script=script) as running:
        assert await running.status() == 2
        (said,) = running.said("can't run a command here: ")
        assert "NotImplementedError: no such call" in said


async def test_what_goes_wrong_in_a_guard_is_told_and_command_is_ended(vast, worker, tmp_path):
    script = driver(
        tmp_path,
        "import null_guard",
        "def guard(program, orders, report, before=null_guard.guard):",
        "    if program.command[0] == 'true':",
        "        return before(program, orders, report)",
        "    null_guard.become_subreaper()",
        "    report(f'started {program.start()}')",
        "    raise ValueError('a fault')",
        "null_guard.guard = guard",
    )
    async with consumer(worker, tmp_path, command="exec sleep 60", script=script) as running:
        session_id = await create(vast, worker)
        await running.until_said(f"released session={session_id}")
        assert running.said("the consumer failed: its guard failed: ValueError: a fault; ")
        assert not running.family()


async def test_a_script_without_a_first_line_is_the_shells(vast, worker, tmp_path):
    (tmp_path / "run").write_text("echo ran $1\n")
    (tmp_path / "run").chmod(0o755)
    async with consumer(worker, tmp_path, command=["./run", "it's"]) as running:
        await create(vast, worker)
        await running.until_printed("ran it's")
        await running.until_said("released")
        assert not running.said("failed")
