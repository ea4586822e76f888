#!/usr/bin/env bash
# Procrastinate on psycopg_pool: `timeout` doesn't bound the time that opening takes. With a server
# that isn't there, `App.open_async()` takes 30 s, whatever the connector was given.
#
# PsycopgConnector(timeout=2) hands its arguments to psycopg's pool, for which `timeout` is the wait
# for a connection of an open pool. Procrastinate opens it with `wait=True` and psycopg_pool's own
# 30 s, in which it tries again and again. A health check or a count that gives it 20 s never learns
# why it failed.
#
# Versions: procrastinate 3.10.0, psycopg 3.3.9, psycopg_pool 3.3.3, Python 3.11.
# Seen on 2026-11-28:
#     open_async(): PoolTimeout after 30 s
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -qq --no-compile procrastinate==3.10.0 'psycopg[binary]==3.3.9' psycopg-pool==3.3.3; } || exit 2

"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import asyncio
import socket
import sys
import time

from procrastinate import App, PsycopgConnector

with socket.socket() as nobody:
    nobody.bind(("127.0.0.1", 0))  # and never listens: connections are refused
    url = f"postgresql://127.0.0.1:{nobody.getsockname()[1]}/postgres"

    async def open_and_close():
        async with App(connector=PsycopgConnector(conninfo=url, timeout=2)).open_async():
            pass

    began_at = time.monotonic()
    try:
        asyncio.run(open_and_close())
    except Exception as error:
        outcome = type(error).__name__
    else:
        outcome = "no error"
took = time.monotonic() - began_at
print(f"open_async(): {outcome} after {took:.0f} s")
sys.exit(not (outcome == "PoolTimeout" and took > 25))
PYTHON
