"""examples/sqs: a model that stays loaded, on moto's stand-in for Amazon's SQS."""

import asyncio
import contextlib
import importlib.util

import psutil
import pytest

from null_reservation import reserve
from tests.kit.example import Example, kill, server, which
from tests.kit.promises import QUEUES, check_the_watch
from tests.kit.vast import FaultyVast

pytestmark = pytest.mark.skipif(
    not (which("moto_server") and importlib.util.find_spec("boto3")),
    reason="moto[server] and boto3, which pip would bring, are not both installed",
)


@pytest.fixture
def sqs():
    """The example with a server on loopback, and credentials that no other would take."""
    with server("moto_server", "--host", "127.0.0.1", "--port", "{port}") as port:
        yield Example(
            "sqs",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="dummy",
            AWS_SECRET_ACCESS_KEY="dummy",
            SQS_VISIBILITY="4",
            NULL_RESIDENT="true",
        )


def models(sqs):
    """The processes of the consumers, each of which has a model loaded."""
    found = []
    for process in sqs.processes():
        with contextlib.suppress(psutil.Error):
            if any(word.endswith("sqs/consumer") for word in process.cmdline()[1:2]):
                found.append(process)
    return found


@pytest.mark.long
def test_all_are_done_though_a_consumer_and_a_worker_are_killed_and_poisoned_jobs_go_aside(
    sqs, tmp_path
):
    sqs.put(1, 9, queue="high")  # hidden for 4 s at a time: without heartbeats it were done again
    sqs.put(8, queue="high")
    sqs.put(9, queue="low")
    sqs.put(1, queue="other")
    sqs.put(1, "fail", queue="low")
    sqs.put(1, "kill", queue="low")
    options = ("--max", "3", "--settle", "3", "--once")
    with sqs.command(tmp_path, *options, queues=QUEUES) as run:
        with sqs.watch(*QUEUES) as watch:
            run.until(lambda: watch.lines and watch.lines[-1][1] == 3)
        assert len(run.workers()) == 3
        first, second, *_ = models(sqs)
        kill(first)
        kill(run.worker_of(second))
        assert run.status() == 0
        assert run.workers() == []
    assert sqs.outcomes(*QUEUES) == (18, 2)
    assert sqs.outcomes(*QUEUES) == (18, 2)  # reading takes nothing out
    assert sqs.backlog(*QUEUES) == (0, 0)
    assert sqs.backlog("other") == (1, 0)


def test_the_watch_tells_a_change_at_once_and_ends_with_its_server(sqs):
    check_the_watch(sqs, sqs.environment["AWS_ENDPOINT_URL"], last=())


@pytest.mark.anyio
async def test_the_model_stays_loaded_from_one_reservation_to_the_next(sqs, monkeypatch):
    for name, value in sqs.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NULL_CONSUMER", str(sqs.folder / "consumer"))
    loaded = []
    async with FaultyVast(1, 60, control_port=None) as vast, vast.client() as client:
        endpoint = await client.get_endpoint(vast.endpoint_name)
        for _ in range(2):
            await asyncio.to_thread(sqs.put, 1)
            async with reserve(endpoint) as worker:
                worker.hand_over()
                assert await worker.ended(timeout=60)
            loaded.append([process.pid for process in models(sqs)])
    assert loaded[0] == loaded[1]
    assert len(loaded[0]) == 1
    assert await asyncio.to_thread(sqs.outcomes) == (2, 0)


def test_without_an_endpoint_it_goes_nowhere(sqs):
    del sqs.environment["AWS_ENDPOINT_URL"]
    with pytest.raises(AssertionError, match="AWS_ENDPOINT_URL is not set"):
        sqs.backlog()
