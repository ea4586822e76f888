"""A job queue on a Redis stream: each queue NAME is a stream of that name, read by one group.

Redis counts how often it has delivered a job, and for how long nobody has spoken for it (`idle`). A
job that is idle for longer than IDLE waits again. A finished job leaves the stream NAME for
NAME:done, or for NAME:aside after three tries.
"""

import os
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

GROUP = "workers"
# All consumers share one name. Nobody asks whose a job is, and a consumer that is removed from its
# group takes the jobs in its hand with it.
CONSUMER = "worker"
TRIES = 3
IDLE = float(os.environ.get("IDLE", 30))  # seconds
KEPT = 10_000  # jobs that are done, or aside, for `results`


def connect() -> Redis:
    url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
    return Redis.from_url(url, decode_responses=True)


def make(redis: Redis, queue: str) -> None:
    """Make the stream and its group where they are missing."""
    try:
        redis.xgroup_create(queue, GROUP, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


def finish(redis: Redis, queue: str, job_id: str, end: str, job: dict[str, Any]) -> None:
    """Take a job out of its stream, into the stream QUEUE:done or QUEUE:aside."""
    with redis.pipeline(transaction=True) as transaction:
        transaction.xack(queue, GROUP, job_id)
        transaction.xdel(queue, job_id)
        transaction.xadd(f"{queue}:{end}", {**job, "id": job_id}, maxlen=KEPT)
        transaction.execute()


def set_aside(redis: Redis, queue: str) -> None:
    """Set aside each job that has had its tries and that nobody speaks for any more."""
    idle = int(IDLE * 1000)
    for entry in redis.xpending_range(queue, GROUP, "-", "+", 1000, idle=idle):
        if entry["times_delivered"] >= TRIES:
            for job_id, job in redis.xrange(queue, entry["message_id"], entry["message_id"]):
                finish(redis, queue, job_id, "aside", job)
