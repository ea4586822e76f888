"""LocalVast: its folder in the temporary directory."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kit.environment import BARE, HERE, installed
from tests.kit.processes import holds, processes_of
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import fresh

pytestmark = pytest.mark.anyio

FORKING = (
    "import asyncio, os, sys, time\n"
    "from null_local import LocalVast\n"
    "async def main():\n"
    "    async with LocalVast(control_port=None) as vast:\n"
    "        worker = vast.start_worker()\n"
    "        while worker.state != 'IDLE': await asyncio.sleep(0.05)\n"
    "        if not (child := os.fork()): os.close(1), time.sleep(60), os._exit(0)\n"
    "        print(vast.folder, worker.process.pid, child, flush=True)\n"
    "        await asyncio.sleep(60)\n"
    "asyncio.run(main())\n"
)


async def test_a_killed_localvast_leaves_no_worker_and_its_folder_to_the_next():
    environment = BARE | {"PYTHONPATH": str(HERE)}
    command = (sys.executable, "-c", FORKING)
    program = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE
    )
    try:
        folder, worker, child = (await program.stdout.readline()).decode().split()
        assert processes_of(folder) == [worker]
        program.kill()
        await program.wait()
        await eventually(lambda: processes_of(folder) == [], timeout=5)
        os.kill(int(child), signal.SIGKILL)
        await eventually(lambda: not holds(int(child), folder))
        await eventually(lambda: the_next_one_removes(folder))
    finally:
        with contextlib.suppress(ProcessLookupError):
            program.kill()


async def the_next_one_removes(folder):
    """Not at once where the last thread of a killed worker, or another one that starts, has it."""
    async with FaultyVast(control_port=None):
        return not Path(folder).exists()


IN_ANOTHER_CONTAINER = (
    *("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"),
    *(sys.executable, "-c"),
)


@installed("unshare")
async def test_a_localvast_in_another_container_leaves_a_folder_that_is_in_use():
    if subprocess.run([*IN_ANOTHER_CONTAINER, ""], capture_output=True, check=False).returncode:
        pytest.skip("no new namespace of processes here")
    script = (
        "import asyncio\n"
        "from null_local import LocalVast\n"
        "async def main():\n"
        "    async with LocalVast(control_port=None): pass\n"
        "asyncio.run(main())\n"
    )
    async with FaultyVast(control_port=None) as vast:
        other = await asyncio.create_subprocess_exec(
            *IN_ANOTHER_CONTAINER, script, env=BARE | {"PYTHONPATH": str(HERE)}
        )
        assert await other.wait() == 0
        assert Path(vast.folder).exists()


@installed("trustme")
@pytest.mark.parametrize("tls", [False, True])
async def test_a_folder_that_vanished_is_made_anew(tls):
    async with FaultyVast(control_port=None, tls=tls) as vast:
        shutil.rmtree(vast.folder)
        worker = await fresh(vast)
        shutil.rmtree(vast.folder)
        await eventually(lambda: Path(worker.folder).exists())
        worker.process.kill()
        await eventually(lambda: worker.number not in vast.workers)
        await fresh(vast)
        async with FaultyVast(control_port=None):
            assert Path(vast.folder).exists()
    assert not Path(vast.folder).exists()


@pytest.mark.parametrize("tls", [False, True])
async def test_entering_that_is_cancelled_leaves_nothing(tls, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_files = len(os.listdir("/proc/self/fd"))
    cancelled = 0
    for steps in range(12):
        vast = FaultyVast(control_port=None, tls=tls)
        entering = asyncio.create_task(vast.__aenter__())
        for _ in range(steps):
            await asyncio.sleep(0)
        entering.cancel()
        await asyncio.wait({entering})
        if entering.cancelled():
            cancelled += 1
        else:
            await vast.__aexit__(None, None, None)
        assert list(tmp_path.iterdir()) == []
    assert cancelled > 1
    assert len(os.listdir("/proc/self/fd")) <= open_files  # others may have closed theirs
