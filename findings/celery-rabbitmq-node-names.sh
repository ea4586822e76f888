#!/usr/bin/env bash
# Celery on RabbitMQ: the second worker on a host never starts, as both have the same name.
#
# Celery names a worker celery@HOST. On Redis two of them run side by side. On RabbitMQ each wants a
# queue of its own for remote control, by that name and for itself alone: the second one gets
# RESOURCE_LOCKED, and ends. So it is when two containers have one host name, too. A name for each
# (`-n w1@%h`) is enough.
#
# Versions: Celery 5.7.0, RabbitMQ 3.10.8 (Debian 12), Python 3.11. Seen on 2026-11-28:
#     same name: the second worker ends with status 1, RESOURCE_LOCKED
#     a name for each: both run
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
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -qq --no-compile celery==5.7.0; } || exit 2

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

worker() { # LOG [OPTION...]: start a worker, and wait until it is ready or has ended
    local log=$folder/$1 pid
    "$folder/venv/bin/celery" -b "$AMQP_URL" worker --concurrency 1 --pool solo -l info \
        "${@:2}" >"$log" 2>&1 &
    pid=$!
    running+=("$pid")
    for _ in $(seq 400); do
        grep -qs ' ready\.$' "$log" && { echo ready; return; }
        if ! kill -0 "$pid" 2>/dev/null; then
            grep -o -m 1 RESOURCE_LOCKED "$log" || echo "ended: $(tail -n 1 "$log")"
            return
        fi
        sleep 0.1
    done
    echo "neither ready nor ended"
}

cd "$folder"
worker first >"$folder/said1"
worker second >"$folder/said2"
worker third -n third@%h >"$folder/said3"
said="$(cat "$folder/said1" "$folder/said2" "$folder/said3" | paste -sd ' ')"
echo "the first, the second of the same name, a third with its own: $said"
[ "$said" = "ready RESOURCE_LOCKED ready" ]
