"""null_consumer.py: COMMAND runs while its worker is reserved, and finds what it needs."""

import asyncio
import json
import os
import signal
import time

import pytest

from tests.kit.consumer import SCRIPT, consumer
from tests.kit.environment import BARE, run
from tests.kit.http import Callbacks, server
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh, is_free, lease, ready, successor

pytestmark = pytest.mark.anyio


async def test_command_runs_only_while_its_worker_is_reserved(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, command="echo began; sleep 1; echo ended") as running:
        for times in (1, 2):
            session_id = await create(vast, worker)
            reserved_at = time.monotonic()
            await running.until_printed("began", times)
            assert time.monotonic() - reserved_at < 3
            await eventually(lambda: is_free(worker))
            assert running.printed("ended") == times  # before it is released
            await running.until_said(f"released session={session_id}")
            assert not running.family()
            assert not running.guards()
        assert running.said("reserved") and not running.said("failed")
        running.signal()
        assert await running.status() == 128 + signal.SIGTERM


async def test_what_command_finds(vast, worker, tmp_path):
    script = (
        "import json, os, sys, null_consumer; print(json.dumps([dict(os.environ), sys.argv[1:], "
        "sys.stdin.read(), os.getcwd(), os.getsid(0) == os.getpid(), sorted(map(int, "
        "os.listdir('/proc/self/fd')))[:-1]]))"
    )
    command = ["python3", "-c", script, "an argument", ""]
    secret = {"MASTER_TOKEN": "secret", "PYTHONPATH": "/nowhere", "MINE": "7"}
    async with consumer(worker, tmp_path, command=command, **secret) as running:
        session_id = await create(vast, worker)
        await running.until_said("released")
        (found,) = [line for line in running.output().splitlines() if line.startswith("[")]
    environment, arguments, entered, folder, has_session, files = json.loads(found)
    assert environment["NULL_SESSION_ID"] == session_id
    assert environment["NULL_CONTROL_URL"] == worker.control_url
    assert environment["PYTHONPATH"].split(":") == [str(SCRIPT.parent), "/nowhere"]
    assert environment["MINE"] == "7" and "MASTER_TOKEN" not in environment
    assert (arguments, entered, folder) == (["an argument", ""], "", str(tmp_path))
    assert has_session
    assert files == [0, 1, 2]


async def test_a_proxy_in_the_environment_is_not_asked(vast, worker, tmp_path):
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY")}
    async with consumer(worker, tmp_path, command="echo began", **proxies) as running:
        await create(vast, worker)
        await running.until_printed("began")
        await running.until_said("released")


async def test_a_lease_is_renewed_as_long_as_it_takes_and_never_piled_up(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, command="sleep 12; echo ended") as running:
        session_id = await create(vast, worker, lifetime=4)
        while not running.printed("ended"):
            held = await lease(worker)
            assert held["session_id"] in (session_id, None)
            assert held.get("time_to_live", 0) <= 4.01
            await asyncio.sleep(0.05)
        await running.until_said("released")
        assert not running.said("over")


async def test_what_command_leaves_behind_still_has_the_reservation(vast, worker, tmp_path):
    line = "(setsid sh -c 'sleep 3; echo late' &) ; echo began"
    async with consumer(worker, tmp_path, command=line) as running:
        await create(vast, worker, lifetime=2)
        await running.until_printed("late")
        assert running.said("what it has started goes on")
        await running.until_said("released")
        assert not running.said("over")


async def test_output_that_nobody_reads_holds_up_no_renewal(vast, worker, tmp_path):
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        # Quiet: where COMMAND itself has to wait for a reader, that is its own affair.
        line = "touch began; sleep 5; touch ended"
        async with consumer(worker, tmp_path, command=line, output=writing) as running:
            for _ in range(2):
                session_id = await create(vast, worker, lifetime=2)
                await eventually((tmp_path / "began").exists)
                while True:
                    held = (await lease(worker))["session_id"]
                    if (tmp_path / "ended").exists():
                        break
                    assert held == session_id
                    await asyncio.sleep(0.05)
                await eventually(lambda: is_free(worker))
                (tmp_path / "began").unlink()
                (tmp_path / "ended").unlink()
            running.signal()
            assert await running.status() == 143
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_worker_that_comes_late_or_back_is_waited_for(vast, tmp_path):
    worker = await fresh(vast)
    async with consumer(worker, tmp_path, command="echo began") as running:
        worker.process.kill()
        await running.until_said("waiting for the worker")
        heir = successor(vast, worker)
        await ready(heir)
        await create(vast, heir)
        await running.until_said("released")
        assert len(running.said("waiting for the worker")) == 1
        heir.process.kill()
        await heir.process.wait()


async def test_the_next_one_is_kept_while_a_release_takes_long(vast, worker, tmp_path):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        async with consumer(worker, tmp_path, command="echo $NULL_SESSION_ID") as running:
            await create(vast, worker, on_close_route=f"{origin}/closed")
            await eventually(lambda: callbacks.bodies)
            second = await create(vast, worker, lifetime=2)
            await running.until_printed(second)
            await running.until_said(f"released session={second}")
        callbacks.let_go.set()


async def test_copied_with_its_guard_and_without_standard_streams_it_works(vast, worker, tmp_path):
    copy = tmp_path / "copy.py"
    copy.write_bytes(SCRIPT.read_bytes())
    (tmp_path / "null_guard.py").write_bytes(SCRIPT.with_name("null_guard.py").read_bytes())
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    line = "cat; echo noise; echo noise >&2; echo $NULL_SESSION_ID > id"
    async with consumer(worker, tmp_path, command=line, script=copy, under=closing) as running:
        session_id = await create(vast, worker)
        await eventually(lambda: is_free(worker))
        assert (tmp_path / "id").read_text() == f"{session_id}\n"
        running.signal()
        assert await running.status() == 143


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["--", "true"], {"NULL_GRACE": "soon"}, "NULL_GRACE is 'soon', should be a number of "),
        (["--grace", "-1", "--", "true"], {}, "--grace is '-1', should be a number of seconds"),
        (["--grace=x", "--", "true"], {"NULL_GRACE": "3"}, "--grace is 'x', should be a number"),
        (["--", "true"], {"NULL_CONTROL_PORT": "x"}, "NULL_CONTROL_PORT is 'x', should be a port"),
        (["--resident", "--empty", "echo", "--", "true"], {}, "--empty is 'echo', should not be"),
        ([], {}, "null_consumer.py: error: COMMAND is missing"),
        (["true"], {}, "error: unrecognized arguments: true"),
        (["--worker-pipe", "77", "--", "true"], {}, "--worker-pipe is 77, should be an open pipe"),
    ],
)
def test_what_is_wrong_with_a_call_is_one_line(arguments, environment, line):
    done = run(["python3", SCRIPT, *arguments], BARE | environment)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not done.stdout


def test_where_it_is_not_linux_it_says_so(tmp_path):
    script = tmp_path / "elsewhere.py"
    head = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import null_consumer"
    script.write_text(f"{head}; sys.platform = 'darwin'; sys.exit(null_consumer.main())")
    done = run(["python3", script, "--", "true"], BARE)
    expected = "null_consumer: needs Linux, not darwin: it runs on the instance\n"
    assert (done.returncode, done.stderr) == (2, expected)
