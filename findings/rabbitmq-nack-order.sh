#!/usr/bin/env bash
# RabbitMQ: a job that a consumer gives back (`basic.nack`, requeue) goes to the head of a classic
# queue, to the tail of a quorum queue, and to the head of a quorum queue that has a delivery limit.
# A job whose channel was closed goes to the head of all three.
#
# So a limit that is set against poisoned jobs also changes the order: a job that fails is tried
# again at once, as often as it may be, before anything else is. Without the limit the queue goes on
# meanwhile, but only when the consumer says no; when it dies, its job is at the head again.
#
# Versions: RabbitMQ 3.10.8 (Debian 12), pika 1.4.4, Python 3.11. Seen on 2026-11-28, with the jobs
# 0 to 3, of which each that is taken is given back:
#     nack              classic 0000  quorum 0123  quorum with a limit 0001
#     channel closed    classic 0000  quorum 0000  quorum with a limit 0001
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
running=()
port_mapper=
stop() { # the port mapper last: RabbitMQ would start another
    { kill -9 "${running[@]}"; wait "${running[@]}"; kill -9 $port_mapper; wait; } 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -qq --no-compile pika==1.4.4; } || exit 2

# A RabbitMQ of our own, and Erlang's port mapper, which it would leave behind.
server=/usr/lib/rabbitmq/bin/rabbitmq-server
[ -x "$server" ] || { echo "Debian's package rabbitmq-server is not installed"; exit 2; }
ports=$(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in held))')
read -r port between_nodes mapper <<<"$ports"
export ERL_EPMD_ADDRESS=127.0.0.1 ERL_EPMD_PORT=$mapper
epmd & port_mapper=$!
until epmd -names >/dev/null 2>&1; do
    kill -0 "$port_mapper" || exit 2
    sleep 0.1
done
HOME=$folder RABBITMQ_CONF_ENV_FILE=$folder/none RABBITMQ_CONFIG_FILE=$folder/none \
    RABBITMQ_DIST_PORT=$between_nodes RABBITMQ_ENABLED_PLUGINS_FILE=$folder/none \
    RABBITMQ_LOG_BASE=$folder RABBITMQ_MNESIA_BASE=$folder RABBITMQ_NODENAME=f$port@localhost \
    RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT=$port RABBITMQ_PID_FILE=$folder/pid \
    RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}' \
    RUNNING_UNDER_SYSTEMD=true "$server" >"$folder/server.log" 2>&1 & running+=($!)
for _ in $(seq 600); do
    grep -qs 'Starting broker.*completed' "$folder/server.log" && break
    sleep 0.1
done
export AMQP_URL=amqp://127.0.0.1:$port

"$folder/venv/bin/python" - <<'PYTHON'
import os
import sys

import pika

KINDS = {
    "classic": {},
    "quorum": {"x-queue-type": "quorum"},
    "quorum with a limit": {"x-queue-type": "quorum", "x-delivery-limit": 2},
}
EXPECTED = {
    "nack": ["0000", "0123", "0001"],
    "channel closed": ["0000", "0000", "0001"],
}


def order(connection, queue, arguments, how):
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_declare(queue, durable=True, arguments=arguments)
    for job in range(4):
        channel.basic_publish("", queue, str(job).encode())
    taken = ""
    for _ in range(4):
        channel = connection.channel()
        method, _, body = channel.basic_get(queue)
        taken += body.decode()
        if how == "nack":
            channel.basic_nack(method.delivery_tag, requeue=True)
        channel.close()
    return taken


with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as connection:
    seen = {
        how: [order(connection, f"{how} {kind}", KINDS[kind], how) for kind in KINDS]
        for how in EXPECTED
    }
for how, orders in seen.items():
    print(f"{how:<16}", *(f"{kind} {order} " for kind, order in zip(KINDS, orders)))
sys.exit(seen != EXPECTED)
PYTHON
