"""A classic queue; with QUORUM set a quorum queue with a limit. `do` is amqp-consume's command."""

import os
import signal
import sys
import threading

import job
import pika
from pika.exceptions import ChannelClosedByBroker

QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 2}
ARGUMENTS = QUORUM if "QUORUM" in os.environ else {}
stopping = threading.Event()


def connect():
    parameters = pika.ConnectionParameters(
        "127.0.0.1", int(os.environ["PORT"]), connection_attempts=60, retry_delay=1
    )
    return pika.BlockingConnection(parameters)


def consume():
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    channel = connect().channel()
    channel.queue_declare("jobs", durable=True, arguments=ARGUMENTS)
    while not stopping.is_set():
        taken, _, body = channel.basic_get("jobs")
        if not taken:
            return
        job.work(*body.decode().split())
        channel.basic_ack(taken.delivery_tag)


def put(job_id, what):
    channel = connect().channel()
    channel.queue_declare("jobs", durable=True, arguments=ARGUMENTS)
    channel.confirm_delivery()
    channel.basic_publish("", "jobs", f"{job_id} {what}".encode())


def count():
    channel = connect().channel()
    try:
        return [channel.queue_declare("jobs", passive=True).method.message_count]
    except ChannelClosedByBroker:
        return ["no such queue"]


if __name__ == "__main__":
    if sys.argv[1] == "consume":
        consume()
    elif sys.argv[1] == "do":
        job.work(*sys.stdin.read().split())
    else:
        job.answer(put, count)
