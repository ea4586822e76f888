"""examples/nats: a JetStream work queue on a real nats-server."""

import pytest

from tests.kit.example import Example
from tests.kit.jetstream import (
    check_that_heartbeats_keep_others_off,
    check_that_sigterm_gives_the_job_back_at_once,
    in_hand,
    nats_server,
    needs_nats,
    outcomes,
)

pytestmark = needs_nats


@pytest.fixture
def url(tmp_path):
    with nats_server(tmp_path) as url:
        yield url


def test_all_are_done_once_though_a_consumer_and_a_worker_are_killed(url, tmp_path):
    nats = Example("nats", NATS_URL=url, NATS_ACK_WAIT="3")
    nats.put(18)
    assert nats.backlog() == (18,)
    with nats.command(tmp_path, "--max", "3", "--settle", "3", "--once") as run:
        run.until(lambda: in_hand(nats) == 3)
        assert len(run.workers()) == 3
        run.kill_consumer()
        run.kill_worker()
        assert run.status() == 0
        assert run.workers() == []
    assert outcomes(nats) == (18, 0)
    assert nats.backlog() == (0,)


@pytest.mark.long
def test_jobs_that_fail_or_kill_their_worker_go_aside_and_the_workers_home(url, tmp_path):
    nats = Example("nats", NATS_URL=url, NATS_ACK_WAIT="1")
    nats.put(1, "fail")
    nats.put(1, "kill")
    nats.put(1)
    with nats.command(tmp_path, "--max", "2", "--settle", "3", "--once") as run:
        assert run.status() == 0
        assert run.workers() == []
    assert outcomes(nats) == (1, 2)
    assert nats.backlog() == (0,)


def test_sigterm_gives_the_job_back_at_once(url):
    check_that_sigterm_gives_the_job_back_at_once(Example("nats", NATS_URL=url, NATS_ACK_WAIT="60"))


def test_heartbeats_keep_others_off(url):
    check_that_heartbeats_keep_others_off(Example("nats", NATS_URL=url, NATS_ACK_WAIT="5"))
