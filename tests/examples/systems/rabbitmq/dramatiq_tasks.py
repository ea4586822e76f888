"""Dramatiq on RabbitMQ."""

import os

import dramatiq
import job
import pika
from dramatiq.brokers.rabbitmq import RabbitmqBroker

broker = RabbitmqBroker(
    host="127.0.0.1", port=int(os.environ["PORT"]), connection_attempts=60, retry_delay=1
)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="jobs", max_retries=2)
def work(job_id, what):
    job.work(job_id, what)


def put(job_id, what):
    work.send(job_id, what)


def count():
    channel = pika.BlockingConnection(
        pika.ConnectionParameters("127.0.0.1", int(os.environ["PORT"]))
    ).channel()
    names = ("jobs", "jobs.DQ")
    return [channel.queue_declare(name, passive=True).method.message_count for name in names]


if __name__ == "__main__":
    job.answer(put, count)
