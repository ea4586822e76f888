"""A worker that is started again on the ports of its predecessor."""

import contextlib

import pytest

from tests.kit.http import Callbacks, server
from tests.kit.vast import FaultyVast
from tests.kit.worker import create, driver, exit_status, fresh, killed, ready, successor, until

pytestmark = pytest.mark.anyio


async def test_restarted_three_times_with_a_session_open_it_is_ready_each_time(vast, tmp_path):
    callbacks = Callbacks(hang=True)
    script = driver(
        tmp_path, "assert null_worker.PORT_WAIT >= null_worker.DRAIN + 2", "null_worker.DRAIN = 3"
    )
    async with server(callbacks.route) as origin:
        worker = await fresh(vast, script=script)
        for _ in range(3):
            await create(vast, worker, on_close_route=f"{origin}/closed")
            worker.process.terminate()
            heir = successor(vast, worker, script=script)
            await ready(heir)
            assert worker.process.returncode == 0
            worker = heir
        await create(vast, worker)
        callbacks.let_go.set()
        await killed(worker)
    assert len(callbacks.bodies) == 3 and not any(report["error_msg"] for report in vast.reports)


async def test_a_killed_worker_is_ready_again_on_its_ports(vast):
    worker = await fresh(vast)
    await create(vast, worker)
    worker.process.kill()
    heir = successor(vast, worker)
    await ready(heir)
    assert heir.url == worker.url and not heir.report["error_msg"]
    await create(vast, heir)
    await killed(heir)


async def test_a_port_that_stays_taken_is_the_workers_error(tmp_path):
    script = driver(tmp_path, "null_worker.PORT_WAIT = 1")
    async with FaultyVast(control_port=None) as vast, contextlib.AsyncExitStack() as stack:
        workers = []
        for name in ("port", "http_port", "control_port"):
            origin = await stack.enter_async_context(server())
            workers.append(vast.start_worker(script=script))
            setattr(workers[-1], name, int(origin.rpartition(":")[2]))
        for worker in workers:
            await until(worker, lambda worker=worker: worker.report.get("error_msg"))
            assert "address already in use" in worker.report["error_msg"].lower()
            assert await exit_status(worker) == 0
