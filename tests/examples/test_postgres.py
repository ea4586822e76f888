"""examples/postgres: a table of jobs in a real PostgreSQL."""

import pytest

from tests.kit.broker import needs_postgres
from tests.kit.example import Example
from tests.kit.whole_run import (
    LATE,
    check_that_bad_jobs_go_aside_and_late_ones_are_done,
    check_that_jobs_are_done_once_though_a_consumer_is_killed,
    check_that_sigterm_lets_the_job_be_finished,
    check_that_the_watch_tells_of_each_change,
)

pytestmark = needs_postgres
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")


@pytest.fixture
def postgres(database_url):
    return Example("postgres", DATABASE_URL=database_url, LEASE="5")


@pytest.fixture
def put_late(database_url):
    def put(queue, seconds):
        insert = "INSERT INTO jobs (queue, what, due) VALUES (%s, '0', now() + %s * interval '1 s')"
        with psycopg.connect(database_url) as connection:
            connection.execute(insert, [queue, seconds])

    return put


def test_jobs_are_done_once_though_a_consumer_is_killed(postgres, tmp_path):
    queues = check_that_jobs_are_done_once_though_a_consumer_is_killed(postgres, tmp_path, LATE)
    assert postgres.backlog(*queues) == (0, 0, 18)


@pytest.mark.long
def test_bad_jobs_go_aside_and_late_ones_are_done(postgres, put_late, tmp_path):
    queue = check_that_bad_jobs_go_aside_and_late_ones_are_done(postgres, tmp_path, put_late)
    assert postgres.backlog(queue) == (0, 0, 5)


def test_the_watch_tells_of_each_change(postgres):
    check_that_the_watch_tells_of_each_change(postgres, "DATABASE_URL")


def test_sigterm_lets_the_job_be_finished(postgres):
    check_that_sigterm_lets_the_job_be_finished(postgres)


def test_who_was_too_slow_finishes_nothing(database_url):
    """Its lease has run out, and another has the job."""
    slow = Example("postgres", DATABASE_URL=database_url, LEASE="3600")
    slow.put(1, 9)
    with slow.consumer() as first, psycopg.connect(database_url, autocommit=True) as connection:
        slow.until_counted(0, 1, 0)
        connection.execute("UPDATE jobs SET taken_until = now(), what = '60'")
        with slow.consumer():
            slow.until_counted(0, 1, 0)
            assert first.wait(60) == 0
            assert slow.backlog() == (0, 1, 0)
