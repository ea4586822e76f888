"""The log of a worker, which strangers may neither forge nor fill."""

import asyncio
import re
import sys

import aiohttp
import pytest

from null_worker import CALLBACK, ROUTES, TEXT
from tests.kit.environment import BARE, run
from tests.kit.http import on_the_wire
from tests.kit.malformed import DOORS, NASTY, WIRE, put, well_formed
from tests.kit.worker import lines_since, release

pytestmark = pytest.mark.anyio


async def test_nothing_that_a_stranger_sends_starts_a_line_of_the_log(vast, worker):
    logged = worker.log.stat().st_size
    async with aiohttp.ClientSession() as http:
        for port, path in DOORS:
            url = f"http://127.0.0.1:{getattr(worker, port)}{path}"
            for field, kind in ROUTES[path].items():
                body = well_formed(vast, worker, path)
                put(body, field, NASTY if kind is not CALLBACK else "/" + NASTY)
                options = {
                    "params": {NASTY: NASTY},
                    "headers": {
                        "User-Agent": "x\x85FORGED\u2028FORGED",
                        "Authorization": "x\x85FORGED",
                    },
                }
                async with http.post(url, json=body, **options) as response:
                    assert 200 <= response.status < 500
                    if response.status == 201:
                        assert (await release(worker))[1]["released"]
                # The log names a refused signature once a second only: let each of them be the one.
                if field.startswith("auth_data.") and kind is TEXT:
                    await asyncio.sleep(1.05)
        for port in (worker.port, worker.http_port):
            for sent in WIRE:
                answer = await on_the_wire(port, sent)
                assert re.match(rb"HTTP/1.[01] 4\d\d |$", answer), (sent[:100], answer)
    log = lines_since(worker, logged)
    assert log.count("the signature does not verify") > 2
    assert "\x1b" not in log
    assert "Traceback" not in log
    for line in log.splitlines():  # at \x85 and \u2028 too
        assert re.match(r"20\d\d-\d\d-\d\d \S+ (INFO|WARNING|ERROR) [a-z]", line), line


async def test_a_thousand_refused_requests_write_little(vast, worker):
    auth = {**vast.auth_data(worker), "signature": "x" * 4000}
    unsigned = {"auth_data": auth, "payload": {}, "session_id": NASTY}
    logged = worker.log.stat().st_size
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=20)) as http:

        async def refused(number):
            path, options, expected = [
                ("/session/create", {"json": unsigned}, 401),
                ("/ping", {"json": unsigned}, 401),
                ("/session/get", {"json": {"session_id": [NASTY]}}, 422),
                ("/session/end", {"data": b" " * (1 << 21)}, 413),
                (f"/{'x' * 5000}", {"json": {}}, 404),
                ("/session/end", {"json": {"session_id": NASTY * 9, "session_auth": {}}}, 400),
                ("/pyworker/update", {"headers": {"Authorization": "x" * 5000}}, 401),
                (None, WIRE[number // 10 % len(WIRE)], None),
                (None, WIRE[number // 10 % len(WIRE)], None),
                ("/session/health", {"data": b"[" * 10_000}, 422),
            ][number % 10]
            if path is None:
                assert not re.match(rb"HTTP/1.[01] [^4]", await on_the_wire(worker.port, options))
            else:
                async with http.post(worker.url + path, **options) as response:
                    assert response.status == expected

        await asyncio.gather(*map(refused, range(1000)))
    log = lines_since(worker, logged)
    assert 0 < len(log) < 100 << 10 and "Traceback" not in log


LOGGED = r"""
import logging, null_worker
null_worker.set_up_log()
for _ in range(2):
    for name in ("null_worker.door", "asyncio", "null_worker", "vastai"):
        logging.getLogger(name).warning("of %s\nFORGED", name)
"""


def test_what_strangers_cause_in_the_log_hides_nobody_elses():
    lines = run([sys.executable, "-c", LOGGED], BARE).stderr.splitlines()
    assert [line.partition("WARNING ")[2] for line in lines] == [
        *(
            f"of {name}\\nFORGED"
            for name in ("null_worker.door", "asyncio", "null_worker", "vastai")
        ),
        *(f"of {name}\\nFORGED" for name in ("null_worker", "vastai")),
    ]


@pytest.mark.starts
def test_the_sdks_own_lines_go_the_same_way():
    program = LOGGED.replace("for _ in", "import vastai\nfor _ in", 1)
    lines = run([sys.executable, "-c", program], BARE).stderr.splitlines()
    assert [line.partition("WARNING ")[2] for line in lines].count("of vastai\\nFORGED") == 2
