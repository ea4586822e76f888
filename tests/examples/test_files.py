"""examples/files: a folder of files as a queue, by its executables alone."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.kit.example import Example
from tests.kit.promises import check_a_run_in_which_much_goes_wrong


@pytest.fixture
def files(tmp_path):
    example = Example("files", JOBS=str(tmp_path / "jobs"))
    yield example
    example.kill()


def names(example, ending):
    return sorted(path.name for path in jobs(example).glob(f"*.{ending}"))


def jobs(example):
    return Path(example.environment["JOBS"])


def consume(example):
    """Run a consumer to its end; its exit status."""
    with example.consumer() as process:
        return process.wait(60)


def test_several_consumers_share_the_jobs_and_each_is_done_once(files):
    assert files.backlog() == (0, 0, 0)
    files.put(200, 0.02)
    assert files.backlog() == (200, 0, 0)
    consumers = [
        subprocess.Popen([files.folder / "consumer"], env=files.environment) for _ in range(4)
    ]
    assert [process.wait(60) for process in consumers] == [0] * 4
    assert files.backlog() == (0, 0, 200)
    results = files.results()
    assert len(results) == 200
    assert all(" try 1 " in line for line in results)
    done_by = {line.split("pid=")[1].split()[0] for line in results}
    assert len(done_by) > 1


@pytest.mark.long
def test_all_are_done_though_a_consumer_is_killed_and_poisoned_jobs_go_aside(files, tmp_path):
    folders = [str(tmp_path / name) for name in ("high", "low", "other")]
    check_a_run_in_which_much_goes_wrong(files, tmp_path, end=(0, 0, 20), dies=3, queues=folders)


def test_what_is_worked_on_is_in_hand_and_free_again_as_soon_as_its_worker_is_dead(files):
    files.put(2, 60)
    with files.consumer() as process:
        files.until(lambda: files.backlog() == (1, 1, 0))
        process.kill()
        process.wait()
        assert files.backlog() == (2, 0, 0)


def test_sigterm_lets_it_finish_its_job_and_take_no_other(files):
    files.put(3, 4)
    with files.consumer() as process:
        files.until(lambda: files.backlog() == (2, 1, 0))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert files.backlog() == (2, 0, 1)
    assert len(files.results()) == 1


@pytest.mark.parametrize(("what", "runs"), [("fail", 1), ("kill", 4)])
def test_a_job_that_fails_three_times_goes_aside_and_the_others_are_done(what, runs, files):
    files.put(1, what)
    files.put(3, 0)
    statuses = [consume(files) for _ in range(runs)]
    assert statuses == [-signal.SIGKILL] * (runs - 1) + [0]
    assert files.outcomes() == (3, 1)
    assert files.backlog() == (0, 0, 4)
    (failed,) = names(files, "failed")
    assert (jobs(files) / failed).read_text().count("\ntry ") == 3


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"nan\ninf", b"0" * 200_000, b"1 2"])
def test_a_job_that_is_nonsense_counts_its_tries_like_any_other(content, files):
    files.put(1, 0)
    (jobs(files) / "nonsense.job").write_bytes(content)
    assert consume(files) == 0
    assert sum(files.outcomes()) == 2
    assert files.backlog() == (0, 0, 2)


def test_a_job_that_is_done_does_not_come_back_by_being_looked_at(files):
    """A look between the listing and the lock must not create the file anew."""
    files.put(40, 0)
    with files.consumer() as process:
        while process.poll() is None:
            files.backlog()
    assert (names(files, "job"), len(files.results())) == ([], 40)


def test_named_folders_count_together_and_another_is_left_alone(files, tmp_path):
    high, low, other = (str(tmp_path / name) for name in ("high", "low", "other"))
    assert files.backlog(high, low) == (0, 0, 0)
    for folder in (high, low, other):
        files.put(1, 0, queue=folder)
    assert files.backlog(high, low) == (2, 0, 0)
    with files.consumer(high, low) as consumer:
        assert consumer.wait(60) == 0
    assert files.backlog(high, low) == (0, 0, 2)
    assert files.outcomes(high, low) == (2, 0)
    assert files.backlog(other) == (1, 0, 0)


def test_the_watch_tells_a_change_at_once_and_what_it_has_every_few_seconds(files):
    with files.watch() as watch:
        watch.says(0, 0, 0)
        for number in (1, 2, 3):
            files.put(1, 60)
            watch.says(number, 0, 0)
        assert watch.tells_changes_at_once()
        with files.consumer() as process:
            watch.says(2, 1, 0)
            process.kill()
            process.wait()
            watch.says(3, 0, 0)
            lines = len(watch.lines)
            files.until(lambda: len(watch.lines) > lines, 10)


def test_what_put_does_not_understand_it_refuses(files):
    for arguments in (["x"], ["1", "slow"], ["1", "-1"], ["1", "inf"], []):
        done = subprocess.run(
            [files.folder / "put", *arguments],
            env=files.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, ""), arguments
    assert not jobs(files).exists() or not os.listdir(jobs(files))
