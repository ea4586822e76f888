"""Waiting for what is to come."""

import asyncio
import re
import time
from pathlib import Path

import aiohttp

from tests.kit.http import Refused


async def eventually(condition, timeout=60.0, epitaph=lambda: None):
    """Wait for the condition to hold, and return what it gave.

    Who can't be asked has not said yes, nor has one who refuses. `epitaph` says why the condition
    can't come true any more; then this fails at once, with that text.
    """
    began_at = time.monotonic()
    deadline = began_at + timeout
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
        # Often at first. What takes long is not to be asked for so often that it takes longer.
        await asyncio.sleep(min(0.2, 0.02 + (time.monotonic() - began_at) / 20))


async def catches(process, number):
    """Wait until a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status")
    await eventually(
        lambda: int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16) >> (number - 1) & 1
    )
