"""examples/pgboss: pg-boss in Node, and a backlog that does what its supervisor would."""

import subprocess

import pytest

from tests.kit.broker import needs_postgres
from tests.kit.environment import HERE
from tests.kit.example import Example, which
from tests.kit.whole_run import (
    LATE,
    check_that_bad_jobs_go_aside_and_late_ones_are_done,
    check_that_jobs_are_done_once_though_a_consumer_is_killed,
    check_that_sigterm_lets_the_job_be_finished,
    check_that_the_watch_tells_of_each_change,
)

pytestmark = [
    needs_postgres,
    pytest.mark.skipif(not which("node"), reason="node is not installed"),
    pytest.mark.skipif(
        not (HERE / "examples/pgboss/node_modules/pg-boss").exists(),
        reason="pg-boss is not installed: npm install in examples/pgboss",
    ),
]


@pytest.fixture
def pgboss(database_url):
    return Example("pgboss", DATABASE_URL=database_url, HEARTBEAT="10")


def put_late(pgboss):
    def put(queue, seconds):
        code = f"""
            import {{ connect }} from "./boss.js";
            const boss = await connect();
            await boss.sendAfter("{queue}", {{ what: "0" }}, null, {seconds});
            await boss.stop();
        """
        subprocess.run(
            [which("node"), "--input-type=module", "-e", code],
            cwd=pgboss.folder,
            env=pgboss.environment,
            check=True,
        )

    return put


def test_jobs_are_done_once_though_a_consumer_is_killed(pgboss, tmp_path):
    queues = check_that_jobs_are_done_once_though_a_consumer_is_killed(pgboss, tmp_path, LATE)
    assert pgboss.backlog(*queues) == (0, 0, 18)


@pytest.mark.long
def test_bad_jobs_go_aside_and_late_ones_are_done(pgboss, tmp_path):
    queue = check_that_bad_jobs_go_aside_and_late_ones_are_done(pgboss, tmp_path, put_late(pgboss))
    assert pgboss.backlog(queue) == (0, 0, 5)


def test_the_watch_tells_of_each_change(pgboss):
    check_that_the_watch_tells_of_each_change(pgboss, "DATABASE_URL")


def test_sigterm_lets_the_job_be_finished(pgboss):
    check_that_sigterm_lets_the_job_be_finished(pgboss)
