"""Waiting for what is to come."""

import asyncio
import re
import time
from pathlib import Path

import aiohttp

from tests.http import Refused


async def eventually(condition, timeout=60.0, epitaph=lambda: None):
    """Wait for the condition to hold, and return what it gave.

    Who can't be asked has not said yes, nor has one who refuses. `epitaph` says why the condition
    can't come true any more; then this fails at once, with that text.
    """
    deadline = time.monotonic() + timeout
    while True:
        why = "the condition did not come true in time"
        over = epitaph()  # before the condition: what was done just before the end counts
        result = condition()
        if asyncio.iscoroutine(result):
            try:
                result = await result
            except (aiohttp.ClientError, Refused) as error:
                result, why = None, f"{why}: {error!r}"
        if result:
            return result
        assert not over, over
        assert time.monotonic() < deadline, why
        await asyncio.sleep(0.02)


async def catches(process, number):
    """Wait until a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status")
    await eventually(
        lambda: int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16) >> (number - 1) & 1
    )
