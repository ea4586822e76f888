"""When a worker is ready, and what it reports of a consumer that is sick."""

import asyncio
import socket
import struct
import time

import pytest
from aiohttp import web

from null_local import hold_port
from tests.kit.http import consumer_health, listens, server
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import create, driver, exit_status, fresh, killed, ready, until

pytestmark = pytest.mark.anyio


async def test_without_the_public_key_a_worker_is_not_ready_and_takes_no_session():
    async with FaultyVast(control_port=None) as vast:
        vast.publish_key = False
        worker = vast.start_worker()
        await eventually(lambda: listens(worker.control_port))
        answer = await create(vast, worker, expected=503)
        assert answer == {"error": "no sessions now: starting up"}
        assert worker.state == "MODEL_LOADING"
        vast.publish_key = True
        await ready(worker)
        await create(vast, worker)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("503", "the health check answers 503"),
        ("204", "the health check answers 204"),
        ("hangs", "the health check does not answer within 1 s"),
        ("closes", "the health check fails: ServerDisconnectedError: Server disconnected"),
        ("resets", "the health check fails: ClientOSError: [Errno 104] Connection reset by peer"),
    ],
)
async def test_a_sick_consumer_is_reported_for_what_it_does_and_takes_no_session(
    vast, tmp_path, how, text
):
    well = asyncio.Event()
    well.set()

    async def health(request):
        if well.is_set():
            return web.Response()
        if how == "hangs":
            await well.wait()
        if how == "resets":
            linger = struct.pack("ii", 1, 0)
            request.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        if how in ("closes", "resets"):
            request.transport.abort()
        return web.Response(status=204 if how == "204" else 503)

    async with server(web.get("/health", health)) as origin:
        script = driver(tmp_path, "null_worker.HEALTH_INTERVAL = null_worker.HEALTH_TIMEOUT = 1")
        worker = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/health"}, script=script)
        worker.stopping = True  # so that LocalVast doesn't stop it for its error
        well.clear()
        sick_at = time.monotonic()
        await until(worker, lambda: worker.report["error_msg"])
        assert worker.report["error_msg"] == text
        assert time.monotonic() - sick_at < 8  # a look, its time-out and a report, of a second each
        assert await create(vast, worker, expected=503) == {"error": "no sessions now: broken"}
        well.set()
        vast.reports.clear()
        await asyncio.sleep(2.2)  # two more looks, were there any
        assert await create(vast, worker, expected=503) == {"error": "no sessions now: broken"}
        worker.process.terminate()
        assert await exit_status(worker) == 0
    assert {report["error_msg"] for report in vast.reports if report["id"] == worker.number} <= {
        text
    }


async def test_a_consumer_that_was_well_is_looked_at_every_ten_seconds(vast):
    looks = []

    async def health(_request):
        looks.append(time.monotonic())
        return web.Response()

    async with server(web.get("/health", health)) as origin:
        worker = await fresh(vast, {"BACKEND_HEALTH_URL": f"{origin}/health"})
        already = len(looks)  # the last of them made it ready
        await until(worker, lambda: len(looks) > already)
        assert 9 < looks[-1] - looks[-2] < 15
        await killed(worker)


@pytest.mark.parametrize(
    ("seconds", "before"), [(0, "well"), (4, "503"), (4, "refuses"), (13, "refuses")]
)
async def test_a_worker_is_ready_within_two_seconds_of_its_consumer(vast, seconds, before):
    asked, answer = [], {"health": 503 if before == "503" else 200}

    async def health(_request):
        asked.append(time.monotonic())
        return web.Response(status=answer["health"])

    app, start, held = web.Application(), time.monotonic(), hold_port()
    port = held.getsockname()[1]
    app.add_routes([web.get("/health", health)])
    runner = web.AppRunner(app)
    await runner.setup()
    worker = vast.start_worker({"BACKEND_HEALTH_URL": f"http://127.0.0.1:{port}/health"})
    if before == "refuses":
        await asyncio.sleep(seconds)
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    held.close()
    if before == "503":
        await asyncio.sleep(seconds)
    answer["health"], well = 200, time.monotonic()
    assert not worker.report.get("max_perf") and well - start >= seconds
    await ready(worker)
    # It takes longer to start than a consumer that is well at once.
    since = well if seconds else asked[0]
    assert time.monotonic() - since < 2 + 3  # 10 by the framework alone
    await create(vast, worker)
    await killed(worker)
    await runner.cleanup()


async def test_a_consumer_that_is_never_well_is_the_workers_error():
    async with (
        server(consumer_health({"health": 503})) as origin,
        FaultyVast(control_port=None) as vast,
    ):
        environment = {"BACKEND_HEALTH_URL": f"{origin}/health", "BACKEND_START_TIMEOUT": "2"}
        worker = vast.start_worker(environment)
        await until(worker, lambda: worker.report.get("error_msg"))
        assert "within 2 s: the health check answers 503" in worker.report["error_msg"]
        assert not worker.report["max_perf"] and await exit_status(worker) == 0
