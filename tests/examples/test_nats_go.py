"""examples/nats-go: a JetStream work queue, and all that has to do with it in one binary."""

from pathlib import Path

import pytest

from tests.kit.example import Example
from tests.kit.jetstream import (
    check_that_heartbeats_keep_others_off,
    check_that_sigterm_gives_the_job_back_at_once,
    nats_server,
    needs_nats,
)
from tests.kit.promises import (
    check_a_run_in_which_much_goes_wrong,
    check_named_queues_without_a_worker,
    check_the_watch,
)

BINARY = Path(__file__).parents[2] / "examples/nats-go/jobs"

pytestmark = [
    needs_nats,
    pytest.mark.skipif(
        not BINARY.exists(), reason="not built, as Go is not installed: examples/nats-go/build"
    ),
]


@pytest.fixture
def url(tmp_path):
    with nats_server(tmp_path) as url:
        yield url


def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(url, tmp_path):
    nats = Example("nats-go", NATS_URL=url, NATS_ACK_WAIT="3")
    check_a_run_in_which_much_goes_wrong(nats, tmp_path, end=(0, 0, 20), dies=3)


def test_named_queues_count_together_and_another_is_left_alone(url):
    check_named_queues_without_a_worker(Example("nats-go", NATS_URL=url, NATS_ACK_WAIT="30"))


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(url):
    check_the_watch(Example("nats-go", NATS_URL=url, NATS_ACK_WAIT="30"), url)


def test_sigterm_gives_the_job_back_at_once(url):
    check_that_sigterm_gives_the_job_back_at_once(
        Example("nats-go", NATS_URL=url, NATS_ACK_WAIT="60")
    )


def test_heartbeats_keep_others_off(url):
    check_that_heartbeats_keep_others_off(Example("nats-go", NATS_URL=url, NATS_ACK_WAIT="5"))
