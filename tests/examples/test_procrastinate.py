"""examples/procrastinate: Procrastinate's own worker, and a backlog that asks for stalled jobs."""

import subprocess
import sys

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
pytest.importorskip("procrastinate", reason="procrastinate is not installed")


@pytest.fixture
def procrastinate(database_url):
    return Example("procrastinate", DATABASE_URL=database_url, STALLED="6")


def put_late(procrastinate):
    def put(queue, seconds):
        code = f"""
from tasks import app, work
with app.open():
    work.configure(queue={queue!r}, schedule_in={{"seconds": {seconds}}}).defer(seconds=0)
"""
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=procrastinate.folder,
            env=procrastinate.environment,
            check=True,
        )

    return put


def test_jobs_are_done_once_though_a_consumer_is_killed(procrastinate, tmp_path):
    queues = check_that_jobs_are_done_once_though_a_consumer_is_killed(
        procrastinate, tmp_path, LATE
    )
    assert procrastinate.backlog(*queues) == (0, 0, 18)


@pytest.mark.long
def test_bad_jobs_go_aside_and_late_ones_are_done(procrastinate, tmp_path):
    queue = check_that_bad_jobs_go_aside_and_late_ones_are_done(
        procrastinate, tmp_path, put_late(procrastinate)
    )
    assert procrastinate.backlog(queue) == (0, 0, 5)


def test_the_watch_tells_of_each_change(procrastinate):
    check_that_the_watch_tells_of_each_change(procrastinate, "DATABASE_URL")


def test_sigterm_lets_the_job_be_finished(procrastinate):
    check_that_sigterm_lets_the_job_be_finished(procrastinate)
