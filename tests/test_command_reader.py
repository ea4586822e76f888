"""The reader of the command's output, who may be slow."""

import asyncio
import subprocess
import sys

import pytest

from tests.command import Command
from tests.environment import BARE, HERE
from tests.waiting import eventually

pytestmark = pytest.mark.anyio

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
