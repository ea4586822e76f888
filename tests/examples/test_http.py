"""examples/http: the raw protocol, against LocalVast behind a router that misbehaves."""

import asyncio
import contextlib
import os
import signal

import aiohttp
import pytest
from aiohttp import web

from tests.kit.environment import BARE, HERE, installed
from tests.kit.http import request, server
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import release

pytestmark = [pytest.mark.anyio, installed("trustme", "jq", "curl")]


class CrookedRouter:
    """In front of LocalVast's: after the first answer it misbehaves, then it passes all through."""

    def __init__(self, vast):
        self.vast = vast
        self.asked = []  # the bodies
        self.answers = [
            web.Response(text="<html>please log in</html>", content_type="text/html"),
            web.Response(status=502, text="bad gateway"),
            web.json_response({"endpoint": "local", "status": "loading"}),
            web.json_response({"error_msg": "try again"}),
            web.json_response(["?"]),
            web.json_response({"request_idx": 0}),
            web.json_response({"request_idx": "x", "url": None}),
            web.Response(status=500, text='{"request_idx": 77, "url": "http://127.0.0.1:1"}'),
        ]

    async def route(self, asked):
        query = await asked.json()
        assert asked.headers["Authorization"] == f"Bearer {query['api_key']}"
        self.asked.append(query)
        if len(self.asked) > 1 and self.answers:
            return self.answers.pop(0)
        status, _, answer = await request("POST", f"{self.vast.url}/route/", json=query)
        return web.json_response(answer, status=status)


@contextlib.asynccontextmanager
async def reserve(vast, router, *command, **variables):
    """The script in a process of its own, in a process group of its own."""
    environment = {
        "VAST_WEB": vast.url,
        "VAST_ROUTER": router,
        "VAST_API_KEY": vast.api_key,
        "VAST_ENDPOINT": vast.endpoint_name,
        "VAST_CA": vast.authority,
        "NAP": "0.2",
        "LOOK": "1",
    }
    process = await asyncio.create_subprocess_exec(
        HERE / "examples/http/reserve",
        *command,
        env=BARE | environment | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def end_of(process):
    """What it wrote, once it has ended: standard output, standard error."""
    output, errors = await asyncio.wait_for(process.communicate(), 30)
    return output.decode(), errors.decode()


def ready(vast):
    return next((w for w in vast.workers.values() if w.state == "IDLE"), None)


async def the_only_session(worker):
    _, _, session = await request("GET", f"{worker.control_url}/session")
    return session["session_id"]


async def create_over_tls(vast, worker):
    async with aiohttp.ClientSession() as http, vast.client() as client:
        body = {"auth_data": vast.auth_data(worker), "payload": {"lifetime": 60}}
        tls = await client.get_ssl_context()
        async with http.post(f"{worker.url}/session/create", json=body, ssl=tls) as answer:
            assert answer.status == 201


async def test_it_keeps_its_place_and_gets_the_worker_whatever_it_is_answered():
    async with FaultyVast(1, inactivity_timeout=30, control_port=None, tls=True) as vast:
        router = CrookedRouter(vast)
        command = ("sh", "-c", 'sleep 1; echo "$NULL_SESSION_ID $NULL_WORKER_URL"; exit 3')
        async with (
            server(web.post("/route/", router.route)) as url,
            reserve(vast, url, *command) as process,
        ):
            worker = await eventually(lambda: ready(vast))
            # Another one's, whom the router doesn't know of: 429 for the first creates.
            await create_over_tls(vast, worker)
            vast.overbooked = True
            routed = worker.routed
            await eventually(lambda: worker.routed >= routed + 2)
            vast.overbooked = False
            await release(worker)
            session_id = await eventually(lambda: the_only_session(worker))
            output, errors = await end_of(process)
            assert output.split() == [session_id, worker.url]
            assert process.returncode == 3
            assert await the_only_session(worker) is None
        assert not router.answers
        assert "502" in errors
        assert "429" in errors
        places = [query["request_idx"] for query in router.asked]
        assert places[0] == 0
        assert set(places[1:]) == {1}
        await eventually(
            lambda: [e["status"] for e in vast.ended if e["request_idx"] == 1][-1:] == ["Success"]
        )


async def test_without_a_command_it_waits_until_the_consumer_lets_the_worker_go():
    async with (
        FaultyVast(1, inactivity_timeout=30, control_port=None, tls=True) as vast,
        reserve(vast, vast.url) as process,
    ):
        worker = await eventually(lambda: ready(vast))
        await eventually(lambda: the_only_session(worker))
        await asyncio.sleep(1.5)  # longer than one look
        assert process.returncode is None
        await release(worker)
        await end_of(process)
        assert process.returncode == 0


async def test_a_signal_ends_the_command_and_lets_the_worker_go():
    command = ("sh", "-c", "echo started; exec sleep 60")
    async with (
        FaultyVast(1, inactivity_timeout=30, control_port=None, tls=True) as vast,
        reserve(vast, vast.url, *command) as process,
    ):
        await asyncio.wait_for(process.stdout.readline(), 30)
        process.terminate()
        await end_of(process)
        assert process.returncode == 143
        assert await the_only_session(ready(vast)) is None


async def test_an_endpoint_that_is_not_there_is_said():
    async with (
        FaultyVast(1, control_port=None, tls=True) as vast,
        reserve(vast, vast.url, "true", VAST_ENDPOINT="other") as process,
    ):
        _, errors = await end_of(process)
        assert process.returncode == 1
        assert errors == "no key of an endpoint named other\n"
