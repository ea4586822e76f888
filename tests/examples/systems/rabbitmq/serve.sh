# serve.sh PORT FOLDER: become a RabbitMQ that keeps what it stores there. Erlang's port mapper, which
# RabbitMQ would leave behind, is started first, in the same session.
export HOME="$2" ERL_EPMD_ADDRESS=127.0.0.1
ports=$(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in held))')
export ERL_EPMD_PORT="${ports% *}" RABBITMQ_DIST_PORT="${ports#* }"
epmd &
until epmd -names >/dev/null 2>&1; do sleep 0.1; done
export RABBITMQ_CONF_ENV_FILE="$2/none" RABBITMQ_CONFIG_FILE="$2/none"
export RABBITMQ_ENABLED_PLUGINS_FILE="$2/none" RABBITMQ_LOG_BASE="$2" RABBITMQ_MNESIA_BASE="$2/$1"
export RABBITMQ_NODENAME="try$1@localhost" RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT="$1"
export RABBITMQ_PID_FILE="$2/pid" RUNNING_UNDER_SYSTEMD=true
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
exec /usr/lib/rabbitmq/bin/rabbitmq-server
