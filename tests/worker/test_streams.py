"""Standard output and error of a worker: stalled, or closed."""

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.alone import worker_alone
from tests.kit.environment import BARE, HERE
from tests.kit.forking import closing
from tests.kit.waiting import eventually
from tests.kit.worker import create, drained, driver, fresh, release

pytestmark = pytest.mark.anyio
NOBODY_READS = """
import fcntl, os
reads, writes = os.pipe()
fcntl.fcntl(writes, 1031, 4096)  # F_SETPIPE_SZ, its least
os.dup2(writes, 1), os.dup2(writes, 2)
"""


async def test_a_reader_of_the_log_that_stalls_holds_up_nothing(vast, tmp_path):
    worker = await fresh(vast, script=driver(tmp_path, NOBODY_READS))
    for _ in range(60):
        session_id = await asyncio.wait_for(create(vast, worker), 10)
        answer = await asyncio.wait_for(release(worker), 10)
        assert answer == (200, {"released": True, "session_ids": [session_id]})
    await create(vast, worker)
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 8


async def test_lines_that_could_not_be_written_are_counted(tmp_path):
    reading = """
        import fcntl, logging, os, null_worker
        reads, writes = os.pipe()
        fcntl.fcntl(writes, 1031, 4096)
        handler = null_worker.BackgroundHandler(writes)
        log = logging.Logger("test")
        log.addHandler(handler)
        for number in range(3000):
            log.error("line %d", number)
        os.set_blocking(reads, False)
        received = b""
        while not received.endswith(b"last\\n"):
            try:
                received += os.read(reads, 4096)
            except BlockingIOError:
                handler.flush()
                log.error("last")
        print(received.decode())
    """
    program = "\n".join(line[8:] for line in reading.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ["line 0", "line 1", "line 2"], done.stderr
    lost = map(int, re.findall(r"\((\d+) lines of the log are lost here\)", done.stdout))
    numbered = [line for line in lines if line.startswith("line ")]
    assert 1000 <= len(numbered) < 2999 and len(numbered) + sum(lost) == 3000


# One of them is really started: what the imports open gets the free numbers.
CLOSED = [">&-", "2>&-", ">&- 2>&-", pytest.param("<&- >&- 2>&-", marks=pytest.mark.starts)]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("module", ["null_worker", "workers.null.worker"])
async def test_a_worker_runs_whichever_of_its_outputs_is_closed(tmp_path, module, closed):
    program = closing(closed, sys.executable, "-m", module)
    async with worker_alone(tmp_path, program) as worker:
        session_id = await eventually(worker.reserve)
        assert await worker.session_id() == session_id
        for descriptor in (0, 1, 2):
            opened = Path(f"/proc/{worker.process.pid}/fd/{descriptor}").readlink()
            assert "socket" not in str(opened)


@pytest.mark.parametrize("closed", CLOSED)
async def test_a_consumer_gets_open_outputs_from_a_worker_that_had_none(tmp_path, closed):
    program = closing(closed, sys.executable, HERE / "null_worker.py")
    line = "readlink /proc/self/fd/1 /proc/self/fd/2 > told"
    async with worker_alone(tmp_path, program, NULL_CONSUMER=line) as worker:
        await eventually(worker.reserve)
        told = tmp_path / "told"
        await eventually(lambda: told.exists() and len(told.read_text().splitlines()) == 2)


@pytest.mark.parametrize("closed", CLOSED)
def test_the_client_of_the_bootstrap_runs_whichever_of_its_outputs_is_closed(tmp_path, closed):
    command = [sys.executable, "-m", "workers.null.client", "--local", "--hold", "0.5"]
    environment = BARE | {"PYTHONPATH": str(HERE)}
    start = time.monotonic()
    done = subprocess.run(
        closing(closed, *command), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("closed", CLOSED)
def test_a_worker_that_cannot_start_ends_with_its_status_all_the_same(closed):
    command = closing(closed, sys.executable, "null_worker.py")
    done = subprocess.run(command, cwd=HERE, env=BARE, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
