"""The two lines with examples/files: `NULL_CONSUMER` and `--backlog`, end to end."""

import re
import time
from pathlib import Path

import pytest

from tests.kit.example import Example


@pytest.fixture
def files(tmp_path):
    return Example("files", JOBS=str(tmp_path / "jobs"))


def sessions(results):
    """In which the jobs were done."""
    return {re.search(r"session=(\S+)", line)[1] for line in results}


def reservations(run):
    return re.findall(r"null_consumer: reserved session=(\S+)", run.said())


def test_thirty_jobs_take_the_workers_from_none_to_three_to_none(files, tmp_path):
    files.put(30, 0.5)
    with files.command(tmp_path, "--max", "3", "--settle", "3", "--once") as run:
        run.until(lambda: len(run.workers()) == 3)
        assert run.status() == 0
        assert files.processes() == []
        assert run.most_workers == 3
        assert len(reservations(run)) == 3
    results = files.results()
    assert len(results) == 30
    assert all(" try 1 " in line for line in results)
    assert sessions(results) == set(reservations(run))


def test_one_worker_is_enough_for_as_many_jobs_as_it_is_told(files, tmp_path):
    files.put(12, 0.2)
    options = ("--max", "3", "--jobs-per-worker", "12", "--settle", "1", "--once")
    with files.command(tmp_path, *options) as run:
        assert run.status() == 0
        assert (run.most_workers, len(reservations(run))) == (1, 1)
    assert len(files.results()) == 12


def test_without_a_job_none_is_reserved_and_no_worker_started(files, tmp_path):
    with files.command(tmp_path, "--max", "3", "--settle", "3", "--once") as run:
        assert run.status() == 0
        assert (run.most_workers, reservations(run)) == (0, [])
        assert "asked for 1" not in run.said()


def test_jobs_that_come_one_by_one_are_each_done_soon(files, tmp_path):
    with files.command(tmp_path, "--max", "3", "--settle", "3") as run:
        run.until(lambda: "jobs: " in run.said())
        for _ in range(7):
            files.put(1, 0.5)
            time.sleep(2)
        run.until(lambda: files.backlog() == (0, 0, 7))
    for path in Path(files.environment["JOBS"]).glob("*.done"):
        put_at = int(path.name.partition("-")[0]) / 1e9
        assert path.stat().st_mtime - put_at < 15
    assert len(files.results()) == 7


def test_a_backlog_that_says_zero_every_third_time_is_believed_only_after_settle(files, tmp_path):
    files.put(20, 0.5)
    flaky = tmp_path / "flaky"
    flaky.write_text(
        f"echo x >> {tmp_path}/looks\n[ $(($(wc -l < {tmp_path}/looks) % 3)) -eq 0 ] && echo 0 0 ||"
        " exec examples/files/backlog"
    )
    options = ("--backlog", f". {flaky}", "--max", "3", "--every", "1", "--settle", "4", "--once")
    with files.command(tmp_path, *options) as run:
        assert run.status() == 0
        assert len(reservations(run)) <= 4
    assert len(files.results()) == 20
