"""What `backlog` asks of Celery on RabbitMQ, which doesn't tell a client what is in hand."""

from amqp.exceptions import NotFound
from kombu import Connection


def count(connection: Connection, queues: list[str]) -> tuple[int]:
    """How many jobs wait in these queues; RabbitMQ itself brings back what dead workers had."""
    return (sum(_waiting(connection, queue) for queue in queues),)


def _waiting(connection: Connection, queue: str) -> int:
    try:
        with connection.channel() as channel:
            return channel.queue_declare(queue, passive=True).message_count
    except NotFound:
        return 0  # nobody has put a job in yet
