"""A worker whose key server is away at the start."""

import asyncio
import time

import pytest
from aiohttp import web

from tests.kit.http import listens, server
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import create, driver, exit_status, killed, until

pytestmark = pytest.mark.anyio


async def test_it_is_waited_for_and_the_worker_ready_soon_after_it_came():
    async with FaultyVast(control_port=None) as vast:
        vast.publish_key = False
        worker = vast.start_worker()
        await until(worker, lambda: listens(worker.port))
        await asyncio.sleep(25)
        await create(vast, worker, expected=503)
        assert not worker.report.get("error_msg")
        vast.publish_key, came_at = True, time.monotonic()
        await until(worker, lambda: worker.state == "IDLE")
        assert time.monotonic() - came_at < 20
        await create(vast, worker)


async def test_one_that_never_comes_is_the_workers_error():
    async with FaultyVast(control_port=None) as vast:
        vast.publish_key = False
        worker = vast.start_worker({"BACKEND_START_TIMEOUT": "2"})
        await eventually(lambda: worker.report.get("error_msg"))
        assert worker.report["error_msg"].startswith("not well within 2 s: no public key: ")
        assert not worker.report["max_perf"] and await exit_status(worker) == 0


async def test_nonsense_is_no_key(vast):
    async def nonsense(_request):
        return web.Response(text="<html>busy</html>")

    async with server(web.get("/pubkey/", nonsense)) as origin:
        worker = vast.start_worker({"REPORT_ADDR": origin, "BACKEND_START_TIMEOUT": "2"})
        said = "broken: not well within 2 s: no public key: ValueError"
        await until(worker, lambda: worker.log.exists() and said in worker.log.read_text())
        await killed(worker)


async def test_whatever_else_goes_wrong_at_the_start_is_the_workers_error(vast, tmp_path):
    odd = "def odd(_): raise RuntimeError('odd')"
    change = "from vastai.serverless.server.lib import backend; backend.RSA.import_key = odd"
    worker = vast.start_worker(script=driver(tmp_path, odd, change))
    await eventually(lambda: worker.report.get("error_msg"))
    assert worker.report["error_msg"] == "Lifecycle startup failed: odd"
