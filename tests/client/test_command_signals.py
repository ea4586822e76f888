"""The command and signals, and an output that cannot be written any more."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.kit.autoscaler import statuses
from tests.kit.command import Command
from tests.kit.environment import BARE, HERE
from tests.kit.http import listens, request
from tests.kit.reservation import worker_at
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, create, release

pytestmark = pytest.mark.anyio


async def stage_of(vast, command, stage):
    if stage == "waiting":
        await eventually(lambda: vast.polls > 1)
    else:
        await eventually(lambda: any(worker.report["cur_load"] for worker in vast.workers.values()))
    assert command.process.poll() is None


@pytest.mark.parametrize("stage", ["waiting", "held"])
@pytest.mark.parametrize("output", ["full", "stalled", (80, 12)])
@pytest.mark.parametrize("mode", [["--hold", "inf"], ["--demo", "--interval", "0.3"]])
async def test_a_signal_ends_the_command_also_when_it_cannot_print(vast, output, stage, mode):
    number = signal.SIGTERM if "--demo" in mode else signal.SIGINT
    taken = (
        [await create(vast, worker) for worker in vast.workers.values()]
        if stage == "waiting"
        else []
    )
    if taken:
        await eventually(lambda: all(worker.report["cur_load"] for worker in vast.workers.values()))
    # A terminal that is gone after its first line.
    vast.polls, reads = 0, 1 if isinstance(output, tuple) else 0
    async with Command(*mode, vast=vast, output=output, reads=reads) as command:
        await stage_of(vast, command, stage)
        command.process.send_signal(number)
        assert await command.status(timeout=15) == 128 + number
    assert command.errors == []
    left = [
        answer["released"]
        for _, answer in [await release(worker) for worker in vast.workers.values()]
    ]
    assert left == [bool(taken)] * WORKERS


def control_port_of_child(pid):
    """Of the worker process that a command has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                environment = stat.with_name("environ").read_bytes()
                if found := re.search(rb"NULL_CONTROL_PORT=(\d+)", environment):
                    return int(found[1])
    return None


async def test_the_command_works_without_a_standard_output():
    async with Command("--local", "--hold", "inf", output=">&-") as command:
        port = await eventually(lambda: control_port_of_child(command.process.pid))
        await eventually(lambda: listens(port))
        status, _, answer = await request("GET", f"http://127.0.0.1:{port}/session?wait=30")
        assert status == 200 and answer["session_id"]
        command.process.send_signal(signal.SIGINT)
        assert await command.status(timeout=20) == 130
    assert command.errors == []


async def test_a_terminal_that_is_gone_ends_the_command_with_its_session_closed(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        await command.says("#1 held")
        command.process.send_signal(signal.SIGHUP)
        assert await command.status() == 128 + signal.SIGHUP
    assert [(await release(worker))[1]["released"] for worker in vast.workers.values()] == [
        False
    ] * WORKERS


async def test_a_reader_that_stalls_holds_up_no_keep_alive(vast):
    async with Command("--hold", "inf", "--lifetime", "1", vast=vast, output="stalled") as command:
        worker = await eventually(
            lambda: next((w for w in vast.workers.values() if w.report["cur_load"]), None)
        )
        start, first = (
            time.time(),
            (await request("GET", f"{worker.control_url}/session"))[2]["session_id"],
        )

        async def kept_for_five_lifetimes():
            _, _, now = await request("GET", f"{worker.control_url}/session")
            assert now["session_id"] == first
            return time.time() + now["time_to_live"] > start + 5

        await eventually(kept_for_five_lifetimes)
        command.process.send_signal(signal.SIGTERM)
        assert await command.status() == 143


STAGES = [  # what was said last, interval, plateau
    ("connecting", 2, 60),
    ("waiting for a worker", 2, 60),
    ("#1 held", 60, 60),
    ("#3 held", 0.3, 60),
    ("#1 released after", 2, 0.5),
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("stage", "interval", "plateau"), STAGES)
async def test_a_signal_closes_every_session_at_any_stage(vast, stage, interval, plateau, number):
    waiting = "waiting" in stage
    if waiting:
        held = [await create(vast, worker) for worker in list(vast.workers.values())]
        await eventually(
            lambda: all(worker.report["cur_load"] for worker in list(vast.workers.values()))
        )
    async with Command(
        "--demo", "--interval", str(interval), "--plateau", str(plateau), vast=vast
    ) as command:
        await command.says(stage)
        command.process.send_signal(number)
        start = time.monotonic()
        assert await command.status() == 128 + number
        assert time.monotonic() - start < 8  # 3 for the sessions
    assert command.errors == []
    if waiting:
        held = [
            answer["released"]
            for _, answer in [await release(worker) for worker in list(vast.workers.values())]
        ]
        assert held == [True] * WORKERS
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})
    assert set(statuses(vast)) <= {"Success"}


async def test_a_reader_that_goes_away_ends_the_command_with_its_session_closed(vast):
    async with Command("--hold", "inf", vast=vast, reads=1) as command:
        assert await command.status() == 143
    assert command.lines[0].endswith("connecting") and command.errors == []
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_that_ends_the_reader_of_the_output_too_closes_the_session(vast, number):
    """`null_client.py | tee` and Ctrl-C."""
    command = [sys.executable, "-c", Command.DRIVER.format(url=vast.url), "--hold", "inf"]
    environment = BARE | {
        "PYTHONPATH": str(HERE),
        "VAST_API_KEY": vast.api_key,
        "VAST_ENDPOINT": vast.endpoint_name,
    }
    unread, output = os.pipe()
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=output)
    os.close(output)
    while b"held after" not in await asyncio.to_thread(os.read, unread, 65536):
        pass
    process.send_signal(signal.SIGSTOP)  # so that it sees both at once
    os.close(unread)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    assert await process.wait() == 128 + number
    for worker in list(vast.workers.values()):
        assert await release(worker) == (200, {"released": False, "reason": "no active session"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_same_signal_twice_within_a_second_is_one(vast, number):
    async with Command("--hold", "inf", vast=vast) as command:
        await command.says("#1 held")
        for _ in range(3):
            command.process.send_signal(number)
            await asyncio.sleep(0.005)
        assert await command.status() == 128 + number
    assert command.said("#1 released")
    await eventually(lambda: statuses(vast) == ["Success"])
    for worker in vast.workers.values():
        assert (await release(worker))[1]["released"] is False


async def test_a_second_signal_a_second_later_ends_the_client_at_once(vast):
    async with Command("--hold", "inf", vast=vast) as command:
        url = (await command.says(r"held .*, (http\S+)"))[1]
        worker = worker_at(vast, url)
        worker.process.send_signal(signal.SIGSTOP)  # the session can't be closed
        try:
            command.process.send_signal(signal.SIGINT)
            await asyncio.sleep(1.2)
            assert command.process.poll() is None
            command.process.send_signal(signal.SIGINT)
            assert await command.status(timeout=2) == 130
        finally:
            worker.process.send_signal(signal.SIGCONT)
    assert command.errors == []
