#!/usr/bin/env bash
# An event loop that ends while an aiohttp session closes leaves a thread and an epoll behind.
#
# `await session.close()` waits for the connections in a task of aiohttp's own. asyncio.run() cancels
# every task when its main function has returned. When it hits that one, close() stops there and
# doesn't come to close the resolver. The resolvers of aiodns are kept in a dictionary with weak keys,
# by event loop; but each refers to its loop, so the entry keeps itself alive: the loop, the resolver,
# and the thread of c-ares with its epoll. Each asyncio.run() that ends so leaves one more, for as long
# as the process lives. Without aiodns, or when the loop ends a moment later, nothing stays.
#
# Versions: aiohttp 3.14.5, aiodns 3.6.1, pycares 4.11.0, Python 3.11.
# Seen on 2026-11-28, 20 times asyncio.run():
#     closed before the loop ends: 0 threads and 0 epolls more
#     the loop ends while it closes, aiodns: 20 threads and 20 epolls more
#     the loop ends while it closes, ThreadedResolver: 0 threads and 0 epolls more
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile aiohttp==3.14.5 aiodns==3.6.1 pycares==4.11.0; } || exit 2

"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import gc
import os
import sys
import threading
import time

import aiohttp
from aiohttp import web


async def serve(addresses):
    runner = web.AppRunner(web.Application())  # answers 404
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    addresses.append(runner.addresses[0][1])
    await asyncio.sleep(3600)


async def ask(port, resolver, at_once):
    connector = aiohttp.TCPConnector(resolver=resolver and resolver())  # aiodns by default
    session = aiohttp.ClientSession(connector=connector)
    async with session.get(f"http://127.0.0.1:{port}/") as answer:
        await answer.read()
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    if not at_once:
        await closing


def there():
    gc.collect()
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return len(os.listdir("/proc/self/task")), links.count("anon_inode:[eventpoll]")


def more(port, resolver, at_once):
    """How many threads and epolls are left by twenty event loops."""
    asyncio.run(ask(port, resolver, False))  # what stays in any case is there now
    time.sleep(1)
    before = there()
    for _ in range(20):
        asyncio.run(ask(port, resolver, at_once))
    time.sleep(2)  # c-ares ends in the background
    return tuple(after - was for after, was in zip(there(), before))


addresses = []
threading.Thread(target=asyncio.run, args=(serve(addresses),), daemon=True).start()
while not addresses:
    time.sleep(0.01)
(port,) = addresses
closed = more(port, None, False)
print("closed before the loop ends: {} threads and {} epolls more".format(*closed))
closing = more(port, None, True)
print("the loop ends while it closes, aiodns: {} threads and {} epolls more".format(*closing))
threads = more(port, aiohttp.ThreadedResolver, True)
print("the loop ends while it closes, ThreadedResolver: {} threads and {} epolls more".format(*threads))
sys.exit((closed, closing, threads) != ((0, 0), (20, 20), (0, 0)))
PYTHON
