"""Memory, time and files that a stranger can cost a worker."""

import asyncio
import functools
import gzip
import json
import re
import resource
import zlib
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.kit.http import post, server
from tests.kit.malformed import DOORS
from tests.kit.waiting import eventually
from tests.kit.worker import (
    cpu_seconds,
    create,
    driver,
    fresh,
    honest_requests,
    killed,
    lines_since,
    memory,
)

pytestmark = pytest.mark.anyio


@functools.cache
def bomb(encoding, size=400 << 20):
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    return b"".join(
        [packer.compress(b" " * (1 << 20)) for _ in range(size >> 20)] + [packer.flush()]
    )


async def test_bombs_on_every_route_are_refused_in_little_memory(vast, worker):
    bombs = {encoding: bomb(encoding) for encoding in ("gzip", "deflate")}
    Path(f"/proc/{worker.process.pid}/clear_refs").write_text("5")  # forget the peak
    before = memory(worker, "VmRSS")
    async with honest_requests(vast, worker):
        for port, path in DOORS:
            url = f"http://127.0.0.1:{getattr(worker, port)}{path}"
            for encoding, data in bombs.items():
                headers = {"Content-Encoding": encoding}
                status, _ = await post(url, data=data, headers=headers)
                assert status == 413, (path, encoding)
    assert memory(worker, "VmHWM") - before < 48


async def test_what_is_inflated_is_only_what_is_read(vast, worker):
    """A path that isn't there takes no body; aiohttp would inflate one, to throw it away."""
    before = cpu_seconds(worker)
    headers = {"Content-Encoding": "gzip"}
    for _ in range(5):
        assert (await statuses_of(worker, "/nope", data=bomb("gzip"), headers=headers))[0] == 404
    assert cpu_seconds(worker) - before < 1.5  # 5 times 0.9 otherwise
    good = gzip.compress(json.dumps({"session_id": "x", "session_auth": {}}).encode())
    # Read, and no such session.
    assert (await post(f"{worker.url}/session/get", data=good, headers=headers))[0] == 400


async def statuses_of(worker, path, **options):
    async with aiohttp.ClientSession() as http, http.post(worker.url + path, **options) as response:
        return response.status, await response.text()


async def test_a_body_that_does_not_come_is_not_waited_for(vast, tmp_path):
    worker = await fresh(vast, script=driver(tmp_path, "null_worker.BODY_WAIT = 1"))
    head = b"POST /session/end HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(head)
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408 ")
    writer.close()
    await killed(worker)


async def test_many_small_values_are_refused_before_they_are_made(vast, worker):
    dense = b'{"session_id": "x", "session_auth": {"a": [%s]}}' % b",".join([b"{}"] * 20_000)
    assert (await post(f"{worker.url}/session/get", data=dense))[0] == 422


async def test_a_worker_may_open_as_many_files_as_it_is_allowed(vast):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
    try:
        worker = await fresh(vast)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert re.search(
        r"Max open files +(\d+) +\1 ", Path(f"/proc/{worker.process.pid}/limits").read_text()
    )
    await killed(worker)


async def test_out_of_open_files_a_worker_stays_well_and_its_log_small(vast, tmp_path):
    async def health(_):
        response = web.Response()
        response.force_close()  # each check takes a connection of its own
        return response

    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    async with server(web.get("/health", health)) as origin:
        lines = (limit, "null_worker.HEALTH_INTERVAL = 0.5")
        worker = await fresh(
            vast, {"BACKEND_HEALTH_URL": f"{origin}/health"}, script=driver(tmp_path, *lines)
        )
        logged = worker.log.stat().st_size
        idle = [await asyncio.open_connection("127.0.0.1", worker.port) for _ in range(150)]
        await eventually(lambda: "out of system resource" in lines_since(worker, logged))
        await asyncio.sleep(2.5)  # some health checks
        for _, writer in idle:
            writer.close()
        await eventually(lambda: create(vast, worker))
        assert worker.report["error_msg"] == "" and len(lines_since(worker, logged)) < 10_000
        assert "Traceback" not in lines_since(worker, logged)
    await killed(worker)
