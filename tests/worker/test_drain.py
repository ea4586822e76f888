"""The drain: what a worker does when it is asked to end."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time

import pytest

from null_local import hold_port
from tests.kit.autoscaler import ended, statuses
from tests.kit.environment import BARE, HERE, ON_VAST
from tests.kit.http import Callbacks, listens, post, server
from tests.kit.vast import FaultyVast
from tests.kit.waiting import catches, eventually
from tests.kit.worker import create, drained, driver, fresh, ready, release, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("hang", [False, True])
async def test_a_signal_ends_the_open_session_well(vast, number, hang):
    callbacks = Callbacks(hang)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        url = f"{origin}/closed"
        session_id = await create(vast, worker, on_close_route=url, on_close_payload={"job": 1})
        draining = asyncio.ensure_future(drained(worker, number))
        await eventually(lambda: callbacks.bodies)
        if hang:
            await create(vast, worker, expected=503)
        assert callbacks.bodies == [{"job": 1, "session_id": session_id}]
        status, seconds = await draining
        assert status == 0 and seconds < 8
        assert statuses(vast) == ["Success"]
        callbacks.let_go.set()


async def test_the_autoscaler_hears_of_the_end_even_when_a_report_is_under_way(vast):
    worker = await fresh(vast)
    await create(vast, worker)
    vast.report_delay = 1.5
    await until(
        worker, lambda: worker.report["cur_load"] == 100
    )  # received, but not acknowledged yet
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 8
    assert [report["cur_load"] for report in vast.reports if report["id"] == worker.number][-1] == 0


@pytest.mark.parametrize("later", [0.005, 0.5])
async def test_a_signal_that_comes_twice_within_a_second_is_one(vast, later):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        await create(vast, worker, on_close_route=f"{origin}/closed")
        worker.process.terminate()
        await asyncio.sleep(later)
        draining = asyncio.ensure_future(drained(worker))
        await eventually(lambda: callbacks.bodies)
        await asyncio.sleep(0.5)
        callbacks.let_go.set()
        assert (await draining)[0] == 0
    assert statuses(vast) == ["Success"]
    assert worker.report["cur_load"] == 0 and callbacks.answered == [True]


async def test_a_worker_under_nohup_outlives_its_terminal(vast, tmp_path):
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    worker = await fresh(vast, script=driver(tmp_path, ignored))
    worker.process.send_signal(signal.SIGHUP)
    await create(vast, worker)
    assert (await drained(worker))[0] == 0


async def test_an_idle_worker_goes_at_once(vast):
    worker = await fresh(vast)
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 5
    assert ended(vast) == []


async def test_the_drain_takes_no_longer_when_the_autoscaler_is_gone(vast):
    async with server() as origin:
        nobody = origin
    worker = vast.start_worker({"REPORT_ADDR": nobody, "UNSECURED": "true"})
    await eventually(lambda: listens(worker.control_port))
    await eventually(lambda: create(vast, worker))
    status, seconds = await drained(worker)
    assert status == 0 and seconds < 8


async def test_a_second_signal_ends_it_at_once(vast):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        await create(vast, worker, on_close_route=f"{origin}/closed")
        worker.process.terminate()
        await eventually(lambda: callbacks.bodies)
        await asyncio.sleep(1.2)  # within a second it would be the same one
        status, seconds = await drained(worker)
        assert status == 128 + signal.SIGTERM and seconds < 5
        callbacks.let_go.set()


async def test_whatever_hangs_the_drain_ends_in_time_and_says_what_was_not_done(tmp_path):
    blocking = driver(tmp_path, "async def block(**_): time.sleep(60)", "null_worker._pong = block")
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin, FaultyVast(control_port=None) as vast:
        blocked = vast.start_worker(script=blocking)
        workers = [blocked, deserted, mute] = [blocked, vast.start_worker(), vast.start_worker()]
        for worker in workers:
            await ready(worker)
        auth = vast.auth_data(blocked)
        session_id = await create(vast, blocked, auth=auth)
        left_open = await create(vast, deserted, on_close_route=f"{origin}/closed")
        await create(vast, mute)
        await eventually(lambda: all(worker.report["cur_load"] == 100 for worker in workers))
        vast.report_delay = 30
        ping = {"auth_data": auth, "session_id": session_id, "payload": {}}
        pinging = asyncio.create_task(post(f"{blocked.url}/ping", json=ping))
        look = {"session_id": session_id, "session_auth": auth}

        async def is_blocked():
            try:
                await asyncio.wait_for(post(f"{blocked.url}/session/get", json=look), 1)
            except asyncio.TimeoutError:
                return True

        await eventually(is_blocked)
        for status, seconds in await asyncio.gather(*map(drained, workers)):
            assert status == 0 and seconds < 8
        for worker, undone in (
            (blocked, "anything: the event loop is blocked"),
            (deserted, f"the on_close callbacks of session={left_open}"),
            (mute, "the last report to the autoscaler"),
        ):
            assert worker.log.read_text().splitlines()[-1].endswith(f"not done: {undone}")
        callbacks.let_go.set()
        await asyncio.gather(pinging, return_exceptions=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_during_the_start_ends_it_soon_without_a_traceback(tmp_path, number):
    async def ended_after(delay):
        held = [hold_port() for _ in range(3)]
        port, http_port, control_port = (each.getsockname()[1] for each in held)
        environment = BARE | ON_VAST | {"WORKER_PORT": str(port), f"VAST_TCP_PORT_{port}": "1"}
        environment |= {"WORKER_HTTP_PORT": str(http_port), "NULL_CONTROL_PORT": str(control_port)}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            HERE / "null_worker.py",
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
        )
        try:
            if number == signal.SIGINT:  # until then Python says KeyboardInterrupt
                await catches(process, signal.SIGTERM)
            await asyncio.sleep(delay)
            with contextlib.suppress(ProcessLookupError):  # the status will say why
                process.send_signal(number)
            start = time.monotonic()
            _, errors = await asyncio.wait_for(process.communicate(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            for each in held:
                each.close()
        return delay, process.returncode, time.monotonic() - start, errors.decode()

    for delay, status, seconds, errors in await asyncio.gather(
        *map(ended_after, (0.05, 0.3, 0.8, 1.5, 2.5))
    ):
        assert status in (0, -number) and "Traceback" not in errors and seconds < 30, (
            delay,
            status,
            seconds,
            errors,
        )


async def test_a_drain_waits_for_a_session_that_is_just_closing(vast):
    callbacks = Callbacks(hang=True)
    async with server(callbacks.route) as origin:
        worker = await fresh(vast)
        await create(vast, worker, on_close_route=f"{origin}/closed")
        releasing = asyncio.create_task(release(worker))
        await eventually(lambda: callbacks.bodies)
        # All told.
        await eventually(lambda: statuses(vast) == ["Success"] and worker.report["cur_load"] == 0)
        draining = asyncio.create_task(drained(worker))
        await eventually(lambda: "draining" in worker.log.read_text())
        await create(vast, worker, expected=503)
        await asyncio.sleep(1)
        assert worker.process.returncode is None
        callbacks.let_go.set()
        status, seconds = await draining
        assert status == 0 and seconds < 6 and callbacks.answered == [True]
        assert "not done" not in worker.log.read_text()
        await asyncio.gather(releasing, return_exceptions=True)
