"""FaultyVast: each fault that tests may switch on does what it says."""

import asyncio
import contextlib
import time

import aiohttp
import pytest

from null_reservation import NotReserved, reserve
from tests.kit.http import post
from tests.kit.reservation import endpoint_of
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import create, release, until

pytestmark = pytest.mark.anyio


async def listed(vast):
    """What the list says, by number; the status of the answer where that isn't 200."""
    query = {"id": 1, "api_key": vast.api_key}
    status, rows = await post(f"{vast.url}/get_endpoint_workers/", json=query)
    if status != 200 or isinstance(rows, dict):
        return status, rows
    return {row["id"]: (row["status"], row["cur_load"]) for row in rows}


async def routed_to(vast, **more):
    query = {"endpoint": vast.endpoint_name, "api_key": vast.endpoint_key, "cost": 100, **more}
    return (await post(f"{vast.url}/route/", json=query))[1].get("url")


async def test_a_ghost_is_on_the_list_until_it_is_over(vast):
    truth = await listed(vast)
    ghost, brief = vast.ghost(), vast.ghost(seconds=0.3, status="offline", cur_load=7)
    lie = vast.pretend(vast.workers[min(truth)], status="PENDING", cur_load=100)
    seen = await listed(vast)
    assert seen.pop(ghost.worker) == ("IDLE", 100) and seen.pop(brief.worker) == ("offline", 7)
    assert seen == {**truth, min(truth): ("PENDING", 100)}
    await asyncio.sleep(0.4)
    assert (await listed(vast)).keys() == {*truth, ghost.worker}
    ghost.end()
    lie.end()
    assert await listed(vast) == truth


async def test_a_list_that_lags_says_what_was(vast):
    number = min(vast.workers)
    vast.list_lag = 1.5
    await eventually(lambda: vast.old_lists)
    session_id = await create(vast, vast.workers[number])
    await until(vast.workers[number], lambda: vast.workers[number].report["cur_load"] == 100)
    was = time.monotonic()
    assert (await listed(vast))[number] == ("IDLE", 0)

    async def is_told():
        return (await listed(vast))[number] == ("IDLE", 100)

    await eventually(is_told)
    assert time.monotonic() - was > 1.2
    await release(vast.workers[number], session_id)


async def test_a_list_that_fails_is_right_again(vast):
    vast.failing_lists += [502, 200]
    assert await listed(vast) == (502, {"error_msg": "out of order"})
    assert await listed(vast) == (200, {"error_msg": "out of order"})
    assert len(await listed(vast)) == len(vast.workers)


@pytest.mark.parametrize("silent", [False, True])
async def test_a_closed_worker_is_routed_to_once_and_answers_nobody(silent):
    async with FaultyVast(max_workers=1) as vast:
        closed = vast.closed_worker(silent=silent)
        assert (await listed(vast))[closed.number] == ("IDLE", 0)
        assert await routed_to(vast) == closed.url
        timeout = aiohttp.ClientTimeout(total=1)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            with pytest.raises(asyncio.TimeoutError if silent else aiohttp.ClientConnectorError):
                await http.get(closed.url)
        assert (await listed(vast))[closed.number] == ("IDLE", 100)
        assert await routed_to(vast) is None and vast.started == 1
        vast.remove(closed)
        assert await routed_to(vast) is None and vast.started == 2


async def test_starts_that_fail_end_the_wait_only_where_it_gives_up():
    async with FaultyVast() as vast, endpoint_of(vast) as endpoint:
        vast.failing_starts = 3
        with pytest.raises(NotReserved, match="the last one: can't be started: the host has no"):
            async with reserve(endpoint):
                pass
        vast.failing_starts, vast.gives_up = 4, False
        async with reserve(endpoint):
            assert vast.failing_starts == 0 and vast.started >= 8


async def test_of_two_hedged_starts_the_later_is_stopped():
    events = []
    async with FaultyVast(on_event=events.append) as vast, endpoint_of(vast) as endpoint:
        vast.hedged = True
        async with contextlib.AsyncExitStack() as stack:
            opening = asyncio.ensure_future(stack.enter_async_context(reserve(endpoint)))
            one, other = await eventually(lambda: list(vast.workers.values()))
            await eventually(lambda: other.process)
            other.process.send_signal(19)  # SIGSTOP: the first one is ready first
            await asyncio.wait_for(opening, 60)
            await eventually(lambda: other.stopping)
            other.process.send_signal(18)
            await eventually(lambda: other.number not in vast.workers)
            assert opening.result().url == one.url and vast.failed_starts == 0
    assert "worker 2 stopping: another was ready first" in events


async def test_a_rollout_replaces_each_worker():
    async with FaultyVast(max_workers=2) as vast:
        old = [vast.start_worker() for _ in range(2)]
        for worker in old:
            await until(worker, lambda worker=worker: worker.state == "IDLE")
        states = set()

        async def watch():
            while True:
                states.update(state for state, _ in (await listed(vast)).values())
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        await vast.rollout()
        states.update(state for state, _ in (await listed(vast)).values())
        watching.cancel()
        assert sorted(vast.workers) == [3, 4] and all(w.free for w in vast.workers.values())
    assert states >= {"IDLE", "UPDATE_REBOOTING", "UPDATE_STARTING", "UPDATE_READY"}
