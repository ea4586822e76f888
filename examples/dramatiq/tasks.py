"""The Dramatiq broker, with what makes it safe to lose a worker, and the tasks."""

import os
import signal
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

# Seconds without a sign of life after which a worker counts as dead.
HEARTBEAT_TIMEOUT = float(os.environ.get("HEARTBEAT_TIMEOUT", 60))

broker = RedisBroker(
    url=os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"),
    heartbeat_timeout=int(HEARTBEAT_TIMEOUT * 1000),
)


class Record(dramatiq.Middleware):
    """Keep a list of the last jobs that were done, for `results`: Dramatiq keeps none."""

    def after_process_message(
        self, broker: Any, message: Any, *, result: object = None, exception: object = None
    ) -> None:
        if exception is None:
            broker.client.lpush(f"{message.queue_name}:done", message.message_id)
            broker.client.ltrim(f"{message.queue_name}:done", 0, 9_999)


broker.add_middleware(Record())
dramatiq.set_broker(broker)
# An actor declares its own queue. These are those that `consumer` was told, so that you can try it.
for name in os.environ.get("QUEUES", "").split():
    broker.declare_queue(name)

# Three tries of an hour at most, each a second or two after the one before.
three_tries = {
    "max_retries": 2,
    "min_backoff": 1000,
    "max_backoff": 2000,
    "time_limit": 3_600_000,
}


@dramatiq.actor(queue_name="jobs", **three_tries)
def work(seconds: float) -> None:
    time.sleep(seconds)


@dramatiq.actor(queue_name="jobs", **three_tries)
def fail() -> None:
    raise RuntimeError("told to fail")


@dramatiq.actor(queue_name="jobs", **three_tries)
def kill() -> None:
    """Do what the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
