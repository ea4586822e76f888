"""Sessions on a worker: who gets one, how it ends, and what the autoscaler hears of it."""

import asyncio
import json
import signal
import socket
import struct

import aiohttp
import pytest

from tests.kit.autoscaler import silence
from tests.kit.environment import HERE
from tests.kit.http import Refused, post, request
from tests.kit.waiting import eventually
from tests.kit.worker import create, driver, fresh, killed, release, until

pytestmark = pytest.mark.anyio


async def test_of_many_creates_at_once_one_gets_in_and_of_many_releases_one_releases(vast, worker):
    creates = (create(vast, worker) for _ in range(200))
    got = await asyncio.gather(*creates, return_exceptions=True)
    refused = [answer.status for answer in got if isinstance(answer, Refused)]
    assert refused == [429] * 199
    assert sum(isinstance(answer, str) for answer in got) == 1  # the id of the one that got in
    answers = await asyncio.gather(*(release(worker) for _ in range(100)))
    assert all(status == 200 for status, _ in answers)
    assert [answer["released"] for _, answer in answers].count(True) == 1
    assert {answer.get("reason") for _, answer in answers} == {None, "no active session"}


async def test_a_ping_extends_the_session_and_adds_no_load(vast, worker):
    auth = vast.auth_data(worker)
    session_id = await create(vast, worker, auth=auth, lifetime=60)
    about = {"session_id": session_id, "session_auth": auth}
    before = (await post(f"{worker.url}/session/get", json=about))[1]["expiration"]
    await until(worker, lambda: worker.report["cur_load"] == 100)
    vast.reports.clear()
    ping = {"auth_data": auth, "session_id": session_id, "payload": {}}
    assert await post(f"{worker.url}/ping", json=ping) == (200, {"result": {}})
    assert (await post(f"{worker.url}/session/get", json=about))[1]["expiration"] == before + 60
    report = await eventually(
        lambda: [report for report in vast.reports if report["id"] == worker.number]
    )
    assert (report[0]["cur_load"], report[0]["new_load"], report[0]["cur_perf"]) == (100, 0, 0)
    # Outside its session, with the very signature that opened it, a ping would take the session's
    # load away.
    assert (await post(f"{worker.url}/ping", json={"auth_data": auth, "payload": {}}))[0] == 422
    forged = {**ping, "auth_data": {**auth, "signature": ""}}
    assert (await post(f"{worker.url}/ping", json=forged))[0] == 401
    assert (await post(f"{worker.url}/session/get", json=about))[1]["expiration"] == before + 60


async def test_a_metrics_step_that_raises_leaves_the_worker_free(vast, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import runpy\n"
        "from vastai.serverless.server.lib.metrics import Metrics\n"
        "def broken(self, request): raise RuntimeError('metrics are broken')\n"
        "Metrics._request_success = broken\n"
        f"runpy.run_path({str(HERE / 'null_worker.py')!r}, run_name='__main__')\n"
    )
    worker = await fresh(vast, script=str(script))
    session_id = await create(vast, worker)
    await until(worker, lambda: worker.report["cur_load"] == 100)
    status, answer = await release(worker)
    assert status == 500 and "RuntimeError('metrics are broken')" in answer["reason"]
    assert (answer["released"], answer["session_ids"]) == (True, [session_id])
    await until(worker, lambda: worker.report["cur_load"] == 0, timeout=30)
    await create(vast, worker)
    log = worker.log.read_text()
    assert "Traceback" in log and f"closing session={session_id} failed" in log
    await killed(worker)


async def test_a_create_that_says_less_than_the_sdk_gets_in(vast, worker):
    body = {"auth_data": vast.auth_data(worker, cost=0) | {"more": 1}, "payload": {}}
    assert (await post(f"{worker.url}/session/create", json=body))[0] == 201


async def test_a_stale_benchmark_is_not_believed(vast, tmp_path):
    stale = "open('.has_benchmark', 'w').write('99.9')"
    worker = await fresh(vast, script=driver(tmp_path, stale))
    assert worker.report["max_perf"] == 100
    await killed(worker)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_creator_that_is_gone_leaves_the_worker_free(vast, worker, reset):
    auth = vast.auth_data(worker)
    body = json.dumps({"auth_data": auth, "payload": {"lifetime": 600}}).encode()
    worker.process.send_signal(signal.SIGSTOP)
    try:
        creator = socket.create_connection(("127.0.0.1", worker.port))
        creator.sendall(
            b"POST /session/create HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        if reset:
            creator.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        creator.close()
    finally:
        worker.process.send_signal(signal.SIGCONT)
    # For a moment it may not have heard of the reset yet.
    await eventually(lambda: create(vast, worker))
    assert (await release(worker))[1]["released"]
    assert (await request("GET", f"{worker.control_url}/session"))[2] == {"session_id": None}
    await until(worker, lambda: worker.report["cur_load"] == 0)


async def test_what_happens_while_a_report_is_under_way_is_in_the_next(vast, worker):
    await silence(vast)
    vast.report_delay, count, rejected = 0.3, 400, 0
    async with aiohttp.ClientSession() as http:
        for number in range(count):
            body = {"auth_data": vast.auth_data(worker), "payload": {"lifetime": 60}}
            async with http.post(f"{worker.url}/session/create", json=body) as response:
                assert response.status == 201
            if number % 10 == 0:
                async with http.post(f"{worker.url}/session/create", json=body) as response:
                    assert response.status == 429
                    rejected += 1
            async with http.post(f"{worker.control_url}/release") as response:
                assert (await response.json())["released"]

    def told(what):
        return sum(report[what] for report in vast.reports if report["id"] == worker.number)

    def sums():
        return told("new_load"), told("cur_perf"), told("rej_load")

    await eventually(lambda: sums() == (100 * count, 100 * count, 100 * rejected), timeout=8)
    await silence(vast)
    assert sums() == (0, 0, 0)  # and nothing twice
