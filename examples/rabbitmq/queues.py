"""What the executables have in common: the connection, and the queues."""

import os

import pika
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.exceptions import ChannelClosedByBroker

AMQP_URL = os.environ.get("AMQP_URL", "amqp://127.0.0.1:5672")
NOT_FOUND = 404
TRIES = 3
DAY = 24 * 3600 * 1000  # milliseconds


def connect() -> BlockingConnection:
    return BlockingConnection(pika.URLParameters(AMQP_URL))


def make(channel: BlockingChannel, queue: str) -> None:
    """Make the queue of the jobs, and one each for what is done and what went aside."""
    arguments = {
        "x-queue-type": "quorum",  # the only type that counts deliveries
        "x-delivery-limit": TRIES - 1,  # how often a job may come back
        "x-consumer-timeout": DAY,  # how long a job may take; RabbitMQ 3.12 and newer read it
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{queue}.aside",
    }
    channel.queue_declare(queue, durable=True, arguments=arguments)
    channel.queue_declare(f"{queue}.aside", durable=True)
    channel.queue_declare(f"{queue}.done", durable=True)


def waiting(connection: BlockingConnection, queue: str) -> int | None:
    """Return how many jobs wait, or None where there is no such queue.

    To ask for a queue that isn't there closes the channel.
    """
    channel = connection.channel()
    try:
        count = channel.queue_declare(queue, passive=True).method.message_count
    except ChannelClosedByBroker as error:
        if error.reply_code != NOT_FOUND:
            raise
        return None
    channel.close()
    return count
