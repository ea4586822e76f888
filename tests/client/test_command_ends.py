"""How a reservation of the command ends, and with which status."""

import asyncio
import contextlib
import time
from types import SimpleNamespace

import pytest

import null_client
import null_display
from null_local import hold_port
from null_reservation import WorkerLost, reserve
from tests.kit.autoscaler import reservations_over_time, statuses
from tests.kit.command import Command
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.stub import stubbed
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, killed, release

pytestmark = pytest.mark.anyio


async def test_cost_and_instance_are_passed_on(vast):
    driver = (
        "import sys, vastai, null_client, null_local\n"
        "def client(key, instance):\n"
        "    print(f'instance {instance}', flush=True)\n"
        "    return null_local.LocalClient(\n"
        f"        key, autoscaler_url={vast.url!r}, webserver_url={vast.url!r})\n"
        "vastai.Serverless = client\n"
        "sys.exit(null_client.main(sys.argv[1:]))"
    )
    arguments = ("--cost", "250", "--instance", "alpha", "--hold", "inf")
    async with Command(*arguments, vast=vast, driver=driver) as command:
        await eventually(
            lambda: any(worker.report["cur_load"] == 250 for worker in vast.workers.values())
        )
        assert command.said("instance alpha")
        command.process.terminate()
        assert await command.status() == 143


async def test_why_the_last_poll_failed_is_on_the_screen_and_in_the_end(vast):
    vast.failing_polls += [502] * 100
    async with Command("--wait", "3", vast=vast) as command:
        assert await command.status() == 1
    assert command.said("#1 still waiting: the autoscaler answers HTTP 502 - .*out of order")
    assert command.said(
        "#1 not reserved: no worker within 3 s; at last: the autoscaler answers HTTP 502"
    )


async def test_holding_ends_when_the_worker_lets_go(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        url = (await command.says(r"held .*, (http\S+)"))[1]
        status, answer = await release(worker_at(vast, url))
        assert status == 200 and answer["released"]
        assert await command.status() == 0
    assert command.said("the worker let go") and command.errors == []


async def test_a_lost_worker_is_status_1(vast):
    async with Command("--hold", "inf", "--lifetime", "2", vast=vast) as command:
        url = (await command.says(r"held .*, (http\S+)"))[1]
        worker = worker_at(vast, url)
        await killed(worker)
        with hold_port(worker.port):
            assert await command.status() == 1
    assert command.said("#1 lost after .*can't be reached") and command.errors == []


async def test_no_worker_in_time_is_status_1(vast):
    async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(reserve(endpoint))
        async with Command("--wait", "1", vast=vast) as command:
            assert await command.status() == 1
    assert command.said("#1 not reserved: no worker within 1 s") and command.errors == []


async def test_a_refusal_is_status_1_and_one_line(vast):
    vast.failing_polls += [401]
    async with Command(vast=vast) as command:
        assert await command.status() == 1
    assert command.said("#1 not reserved: .*HTTP 401.*out of order") and command.errors == []


async def test_a_client_that_is_killed_frees_its_worker(vast):
    async with Command("--hold", "inf", "--lifetime", "2", vast=vast) as command:
        await command.says("#1 held")
        await eventually(lambda: reservations_over_time(vast) == [0, 1])
        command.process.kill()
        killed = time.monotonic()
        await eventually(lambda: statuses(vast) == ["Success"])
        assert time.monotonic() - killed < 1.5 * 2 + 5 + 3  # 3 for the report


async def test_a_worker_that_is_lost_stays_so_when_its_row_is_released_meanwhile():
    async with stubbed() as (stub, endpoint):
        display = null_display.Display(1, lambda: None)
        args = SimpleNamespace(cost=100, lifetime=4, wait=10)
        holding = asyncio.create_task(null_client.occupy("#1", endpoint, args, display))
        held = await eventually(
            lambda: isinstance(display.rows["#1"], null_display.Held) and display.rows["#1"]
        )
        stub.fate = lambda *_: (502, b"")
        with pytest.raises(WorkerLost):
            await held.session.ended()
        holding.cancel()
        await asyncio.wait({holding})
        assert (display.rows["#1"].how, display.rows["#1"].held_at) == ("lost", held.held_at)
        display.output.finish()
