"""The terminal as a person sees it: an emulator of one tells what was drawn, and what scrolled."""

import re
from types import SimpleNamespace

import pyte
import pytest

from tests.kit.command import Command
from tests.kit.stub import stubbed

pytestmark = pytest.mark.anyio


def no_workers(route, _message):
    """A fate: no worker is left, so that the demo ends."""
    return (200, []) if route == "/get_endpoint_workers/" else None


def shown(command, columns, lines):
    """All lines that the terminal shows in the end, with the lines that have scrolled away."""
    screen = pyte.HistoryScreen(columns, lines, history=100_000)
    pyte.Stream(screen).feed("".join(f"{line}\r\n" for line in command.lines))
    history = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*history, *screen.display]]


# Rows come and go, so a frame that is drawn by another thread meanwhile has another height.
BUSY = """
import asyncio, null_display
from null_backlog import Jobs, Progress

async def main():
    display = null_display.BacklogDisplay(lambda: None)
    async with display:
        for number in range(300):
            troubles = {f"trouble {each}": "oh" for each in range(number % 5)}
            display.has_progressed(Progress(Jobs(1), troubles=troubles))
            display.say(f"line {number}")
            await asyncio.sleep(0.005)
    display.output.finish()
    display.output.join(30)

asyncio.run(main())
"""


async def test_no_line_leaves_a_frame_behind():
    async with Command(driver=BUSY, output=(60, 24)) as command:
        assert await command.status() == 0
    lines = shown(command, 60, 24)
    said = [line[9:] for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert said == [f"line {number}" for number in range(300)]
    assert len([line for line in lines if line.startswith("jobs ")]) == 1


ONCE = ("--backlog", "echo 0", "--max", "1", "--every", "0.2", "--settle", "0.5", "--once")
DEMO = ("--demo", "--count", "2", "--interval", "0.1", "--plateau", "0.5", "--wait", "20")


@pytest.mark.parametrize("mode", [ONCE, DEMO])
@pytest.mark.parametrize("size", [(27, 12), (20, 10), (17, 4), (1, 1)])
async def test_a_terminal_without_room_is_no_failure(size, mode):
    async with stubbed() as (stub, _):
        stub.fate = no_workers
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        async with Command(*mode, vast=vast, output=size) as command:
            assert await command.status() == 0
    assert command.errors == []
    assert not command.said(r"jobs +\d+ \||= held")  # no chart


WITH_FAULTS = """
import null_display

def fails(*_):
    raise ValueError("a fault of the display")

null_display.count = null_display.backlog_line = null_display.clock = fails
null_display.chart = null_display.backlog_chart = null_display.gpu_time = fails
"""


@pytest.mark.parametrize("mode", [ONCE, DEMO])
@pytest.mark.parametrize("output", [(80, 24), "pipe"])
async def test_a_fault_of_the_display_decides_nothing(mode, output):
    async with stubbed() as (stub, _):
        stub.fate = no_workers
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        driver = WITH_FAULTS + Command.DRIVER.format(url=stub.url)
        async with Command(*mode, vast=vast, driver=driver, output=output) as command:
            assert await command.status() == 0
        assert stub.left() == []
    assert command.errors == [] and not command.said("Traceback")


async def test_a_terminal_that_can_do_nothing_gets_lines():
    async with stubbed() as (stub, _):
        stub.fate = no_workers
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        dumb = {"TERM": "dumb"}
        async with Command(*ONCE, vast=vast, environment=dumb, output=(80, 24)) as command:
            assert await command.status() == 0
    assert command.said("jobs: 0 to do; 0 wanted") and not command.said("\x1b")
