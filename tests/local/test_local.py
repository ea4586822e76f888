"""LocalVast: it starts workers on demand, and leaves none behind."""

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

import null_local
from null_local import LocalVast, hold_port
from null_reservation import NotReserved, reserve
from tests.kit.command import Command
from tests.kit.http import listens
from tests.kit.processes import processes_of
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import fresh, release

pytestmark = pytest.mark.anyio


def control_urls(command):
    return re.findall(r"control (http\S+)", "\n".join(command.lines))


@pytest.mark.parametrize("how", ["end", "SIGINT", "SIGTERM", "SIGKILL"])
async def test_a_local_run_leaves_no_worker_behind_however_it_ends(how):
    async with Command("--local", "--hold", "1" if how == "end" else "inf") as command:
        await command.says("#1 held")
        url = control_urls(command)[-1]  # of the one that is held
        port = int(url.rpartition(":")[2])
        assert command.errors == [] and listens(port)
        if how == "SIGINT":
            os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        elif how != "end":
            command.process.send_signal(signal.Signals[how])
        expected = {"end": 0, "SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[how]
        assert await command.status() == expected
        await eventually(lambda: not listens(port), timeout=10)


async def test_localvast_stops_its_workers_after_an_exception():
    with pytest.raises(KeyError):
        async with FaultyVast(control_port=None) as vast:
            worker = await fresh(vast)
            raise KeyError("job")
    assert worker.process.returncode == 0


async def test_workers_start_on_demand_up_to_the_most_and_stop_when_idle():
    async with FaultyVast(max_workers=2, inactivity_timeout=4, control_port=None) as vast:
        async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
            assert not vast.workers
            waiting = [
                asyncio.ensure_future(stack.enter_async_context(reserve(endpoint, wait=30)))
                for _ in range(3)
            ]
            await eventually(lambda: sum(task.done() for task in waiting) == 2)
            assert len(vast.workers) == 2
            one, two = {task.result().url for task in waiting if task.done()}
            await release(worker_at(vast, one))
            await asyncio.wait(waiting)
            assert {task.result().url for task in waiting} == {one, two} and vast.started == 2
        await eventually(lambda: not vast.workers)


async def test_a_slow_start_is_waited_for_and_shown():
    async with FaultyVast(control_port=None) as vast:
        vast.start_delay = 2
        async with endpoint_of(vast) as endpoint, contextlib.AsyncExitStack() as stack:
            opening = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
            await eventually(lambda: vast.workers)
            assert [worker.status for worker in await endpoint.get_workers()] == ["MODEL_LOADING"]
            await asyncio.wait_for(opening, 30)
            assert [worker.status for worker in await endpoint.get_workers()] == ["IDLE"]
            opening.result()


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CONTAINER_ID": "x"}, "CONTAINER_ID is 'x', should be a number"),
        (
            {"BACKEND_HEALTH_URL": "http://127.0.0.1:9/", "BACKEND_START_TIMEOUT": "0.1"},
            "not well within 0.1 s",
        ),
        ({"TOO_LONG": "x" * (1 << 20)}, "can't be started: .*Argument list too long"),
    ],
)
async def test_workers_that_cannot_start_end_the_wait(environment, why):
    events = []
    async with FaultyVast(
        control_port=None, environment=environment, on_event=events.append
    ) as vast:
        refused = f"HTTP 409.*3 workers in a row failed to start; the last one: .*{why}"
        with pytest.raises(NotReserved, match=refused):
            async with endpoint_of(vast) as endpoint, reserve(endpoint):
                pass
    assert len([event for event in events if re.search(why, event)]) >= 3


async def test_after_workers_that_could_not_start_another_is_tried_in_a_while(monkeypatch):
    monkeypatch.setattr(null_local, "GIVEN_UP_FOR", 5.0)
    environment = {"CONTAINER_ID": "x"}
    async with (
        FaultyVast(control_port=None, environment=environment) as vast,
        endpoint_of(vast) as endpoint,
    ):
        with pytest.raises(NotReserved, match="3 workers in a row failed to start"):
            async with reserve(endpoint):
                pass
        del environment["CONTAINER_ID"]  # what was wrong is mended
        await asyncio.sleep(5.0)
        async with reserve(endpoint):
            assert vast.failed_starts == 0


async def test_an_idle_worker_is_stopped_at_once_where_it_is_to_be_and_a_loading_one_is_not():
    events = []
    async with FaultyVast(inactivity_timeout=0, control_port=None, on_event=events.append) as vast:
        vast.start_worker()
        await eventually(lambda: not vast.workers)
    assert events.pop(0) == "NULL_CONSUMER is not set: nothing will run on the workers"
    assert [
        re.match(r"worker 1 (on|ready|stopping: idle|ended, status 0)", event)[1]
        for event in events
    ] == [
        "on",
        "ready",
        "stopping: idle",
        "ended, status 0",
    ]


async def test_leaving_waits_for_the_starts_that_are_under_way():
    for delay in (0, 0.01, 60):
        async with FaultyVast(control_port=None) as vast:
            vast.start_delay = delay
            for _ in range(3):
                vast.start_worker()
            await asyncio.sleep(delay % 1)
        assert processes_of(vast.folder) == [] and not Path(vast.folder).exists()


async def test_leaving_is_carried_through_a_cancellation_at_any_step():
    folders = []

    async def hold():
        async with FaultyVast(control_port=None) as vast:
            folders.append(vast.folder)
            vast.start_worker()
            await asyncio.sleep(3600)

    for steps in range(3):
        holding = asyncio.create_task(hold())
        await eventually(
            lambda number=steps + 1: len(folders) == number and processes_of(folders[-1])
        )
        for _ in range(2):
            holding.cancel()
            for _ in range(steps):
                await asyncio.sleep(0)
        await asyncio.wait({holding})
        assert holding.cancelled()
        assert processes_of(folders[-1]) == []
        assert not Path(folders[-1]).exists()


def test_a_localvast_outside_of_its_block_says_so_in_a_line():
    for use in (LocalVast.client, LocalVast.start_worker, lambda vast: vast.url):
        with pytest.raises(
            RuntimeError, match=r"^LocalVast lives in its block: async with LocalVast\(\) as vast$"
        ):
            use(LocalVast())


async def test_of_two_localvasts_one_gets_the_control_port():
    with hold_port() as free:
        port = free.getsockname()[1]
    async with FaultyVast(control_port=port) as one, FaultyVast(control_port=port) as other:
        first = one.start_worker()
        assert first.control_port == port
        assert other.start_worker().control_port != port
        assert one.start_worker().control_port != port
        first.process = await eventually(lambda: first.process)
        first.process.kill()
        await eventually(lambda: first.number not in one.workers)
        assert other.start_worker().control_port == port
