"""examples/rabbitmq: quorum queues of a real RabbitMQ, by pika."""

import pytest

from tests.kit.broker import needs_rabbitmq
from tests.kit.example import Example
from tests.kit.whole_run import (
    AT_ONCE,
    check_that_bad_jobs_go_aside_and_late_ones_are_done,
    check_that_jobs_are_done_once_though_a_consumer_is_killed,
    check_that_sigterm_lets_the_job_be_finished,
    check_that_the_watch_tells_of_each_change,
)

pytestmark = needs_rabbitmq
pika = pytest.importorskip("pika", reason="pika is not installed")


@pytest.fixture
def rabbitmq(amqp_url):
    return Example("rabbitmq", AMQP_URL=amqp_url)


@pytest.fixture
def put_late(amqp_url):
    """Put a job into a queue whose messages RabbitMQ moves to the jobs when their time is over."""

    def put(queue, seconds):
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            arguments = {
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": queue,
                "x-message-ttl": seconds * 1000,
            }
            channel = connection.channel()
            channel.queue_declare(f"{queue}.later", arguments=arguments)
            late = pika.BasicProperties(message_id="late")
            channel.basic_publish("", f"{queue}.later", b'{"what": "0"}', late)

    return put


def test_jobs_are_done_once_though_a_consumer_is_killed(rabbitmq, tmp_path):
    check_that_jobs_are_done_once_though_a_consumer_is_killed(rabbitmq, tmp_path, AT_ONCE)


@pytest.mark.long
def test_bad_jobs_go_aside_and_late_ones_are_done(rabbitmq, put_late, tmp_path):
    check_that_bad_jobs_go_aside_and_late_ones_are_done(rabbitmq, tmp_path, put_late)


def test_the_watch_tells_of_each_change(rabbitmq):
    check_that_the_watch_tells_of_each_change(rabbitmq, "AMQP_URL")


def test_sigterm_lets_the_job_be_finished(rabbitmq):
    check_that_sigterm_lets_the_job_be_finished(rabbitmq)
