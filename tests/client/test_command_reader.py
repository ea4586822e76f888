"""The command's output: all of it arrives, or the status says why it didn't."""

import asyncio
import fcntl
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.kit.command import Command
from tests.kit.environment import BARE, HERE
from tests.kit.forking import closing
from tests.kit.stub import stubbed
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio

FULL = "null_client: not all of the output could be written: [Errno 28] No space left on device"
DEMO = ("--demo", "--count", "60", "--interval", "0.1", "--plateau", "0.1")  # some 20 KiB


def small_pipe():
    """The ends of a pipe that holds one page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def read_all(reader):
    with open(reader, "rb") as file:
        return file.read().decode()


def no_workers(route, _message):
    """A fate: no worker is left, so that the demo ends."""
    return (200, []) if route == "/get_endpoint_workers/" else None


async def all_released(stub):
    await eventually(lambda: len(stub.sessions) == 60 and not stub.left())


async def test_a_reader_that_stalls_for_a_while_gets_every_line():
    async with stubbed() as (stub, _):
        stub.fate = no_workers
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        reader, writer = small_pipe()
        async with Command(*DEMO, vast=vast, output=writer) as command:
            await all_released(stub)
            await asyncio.sleep(3)
            assert command.process.poll() is None
            lines = (await asyncio.to_thread(read_all, reader)).splitlines()
            assert await command.status() == 0
    assert sum("released after" in line for line in lines) == 60
    assert lines[-2].startswith("#60 ") and lines[-1].startswith("workers")
    assert command.errors == []


async def test_a_signal_ends_the_wait_for_a_reader_that_reads_no_more():
    async with stubbed() as (stub, _):
        stub.fate = no_workers
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        reader, writer = small_pipe()
        async with Command(*DEMO, vast=vast, output=writer) as command:
            await all_released(stub)
            await asyncio.sleep(1)
            command.process.terminate()
            start = time.monotonic()
            assert await command.status() == 143
            assert time.monotonic() - start < 5
        os.close(reader)
    assert command.errors == []


async def test_a_full_disk_is_an_error():
    async with stubbed() as (stub, _):
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        async with Command("--hold", "0.1", vast=vast, output="full") as command:
            assert await command.status() == 1
        assert stub.left() == []
    assert command.errors == [FULL]


LONG_CHART = """
import null_display
null_display.chart = lambda *_: ["x" * 999] * 300
"""


async def test_all_of_the_output_arrives_where_the_reader_stalls_at_the_end(small_vast):
    vast = small_vast
    program = LONG_CHART + Command.DRIVER.format(url=vast.url)
    arguments = ("--demo", "--count", "1", "--interval", "0.5", "--plateau", "0.5")
    account = {"VAST_API_KEY": vast.api_key, "VAST_ENDPOINT": vast.endpoint_name}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=BARE | {"PYTHONPATH": str(HERE)} | account,
        stdout=subprocess.PIPE,
    )
    try:
        await eventually(
            lambda: vast.started and not vast.workers,
            epitaph=lambda: process.poll() and f"it ended with status {process.returncode}",
        )
        await asyncio.sleep(6)  # within a second or two the command has only to print
        assert process.poll() is None
        output, _ = await asyncio.to_thread(process.communicate, timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert output.endswith((b"x" * 999 + b"\n") * 300)


# One of them is really started: what the imports open gets the free numbers.
CLOSED = [">&-", "2>&-", ">&- 2>&-", pytest.param("<&- >&- 2>&-", marks=pytest.mark.starts)]


@pytest.mark.parametrize("closed", CLOSED)
async def test_the_command_works_with_its_outputs_closed(closed):
    async with Command("--local", "--hold", "0.5", output=closed) as command:
        assert await command.status() == 0
    assert command.errors == []
    assert bool(command.said("#1 released")) == (closed == "2>&-")


@pytest.mark.parametrize("how", [["null_client.py"], ["-m", "workers.null.client"]])
@pytest.mark.parametrize("closed", CLOSED)
def test_bad_settings_are_status_2_with_the_outputs_closed(how, closed):
    command = closing(closed, sys.executable, *how, "--endpoint", "x")
    environment = BARE | {"HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("null_client: no API key: ") == (closed == ">&-")
