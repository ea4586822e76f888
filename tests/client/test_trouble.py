"""What somebody who waits for a worker is told, and callbacks that raise."""

import contextlib
import logging
from types import SimpleNamespace

import pytest

from null_local import hold_port
from null_reservation import reserve
from null_worker import PING
from tests.kit.command import Command
from tests.kit.stub import ROUTE, first, stubbed

pytestmark = pytest.mark.anyio

RAISED = "a callback's own"


@contextlib.contextmanager
def nobody_listens():
    """The URL of a worker whose host's ports are closed."""
    with hold_port() as held:
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


async def test_a_worker_that_nobody_can_reach_is_told_by_its_url_and_how_often():
    troubles = []
    async with stubbed() as (stub, endpoint):
        with nobody_listens() as url:
            named = (200, {"url": url, "request_idx": 1})
            waits = (200, {"request_idx": 1})
            stub.fate = first(named, named, waits, route=ROUTE)
            async with reserve(endpoint, on_trouble=troubles.append):
                pass
    told = [trouble.partition(": Cannot connect")[0] for trouble in troubles]
    once, twice = (f"worker {url} can't be reached, try {times}" for times in (1, 2))
    assert told == [once, twice, twice]  # also while the router knows of no other


async def test_a_worker_that_nobody_can_reach_is_in_the_lines_of_the_command():
    async with stubbed() as (stub, _):
        vast = SimpleNamespace(url=stub.url, api_key="key", endpoint_name="stub")
        with nobody_listens() as url:
            stub.fate = lambda route, _: (200, {"url": url}) if route == ROUTE else None
            async with Command("--wait", "3", vast=vast) as command:
                assert await command.status() == 1
    assert command.said(f"#1 still waiting: worker {url} can't be reached, try 2: ")
    assert command.said(f"#1 not reserved: no worker within 3 s; at last: worker {url} can't be")


async def test_what_raises_beside_a_keep_alive_is_told_and_not_taken_for_an_unreachable_worker():
    def raises(_record):
        raise KeyError(RAISED)

    log = logging.getLogger("null_reservation")
    log.addFilter(raises)
    try:
        async with stubbed() as (stub, endpoint):
            async with reserve(endpoint, lifetime=2) as reservation:
                stub.fate = first((500, b""), route=PING)  # a line of the log
                with pytest.raises(KeyError, match=RAISED):
                    await reservation.ended(timeout=10)
                assert not reservation.unreachable
            assert stub.left() == []
    finally:
        log.removeFilter(raises)
