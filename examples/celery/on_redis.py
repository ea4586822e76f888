"""What `backlog` asks of Celery on Redis."""

import json
import time

from kombu import Connection


def count(connection: Connection, queues: list[str]) -> tuple[int, int]:
    """How many jobs wait in these queues, and how many are in hand."""
    channel = connection.default_channel
    _bring_back(channel, queues)
    # One transaction, so that a job that moves on meanwhile is counted once.
    with channel.client.pipeline(transaction=True) as transaction:
        for name in queues:
            for priority in channel.priority_steps:  # each has a list of its own
                transaction.llen(channel._q_for_pri(name, priority))
        transaction.hvals(channel.unacked_key)
        *waiting, taken = transaction.execute()
    return sum(waiting), sum(_queue_of(job) in queues for job in taken)


def _bring_back(channel, queues: list[str]) -> None:
    """Put back what is past its visibility timeout, as Celery's worker does for all queues."""
    past = time.time() - channel.visibility_timeout
    for tag in channel.client.zrangebyscore(channel.unacked_index_key, 0, past):
        job = channel.client.hget(channel.unacked_key, tag)
        if job and _queue_of(job) in queues:
            channel.qos.restore_by_tag(tag)


def _queue_of(job: bytes) -> str:
    _, _, routing_key = json.loads(job)  # as kombu's QoS.append() wrote it
    return routing_key
