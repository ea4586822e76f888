"""Waiting for what is to come."""

import asyncio
import time

import aiohttp


async def eventually(condition, timeout=60.0):
    """Wait for the condition to hold, and return what it gave.

    Who can't be asked has not said yes.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            try:
                result = await result
            except aiohttp.ClientError:
                result = None
        if result:
            return result
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)
