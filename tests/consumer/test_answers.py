"""null_consumer.py and a control server that answers oddly, slowly, or at once; what it costs."""

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from tests.kit.consumer import consumer, driver
from tests.kit.http import server
from tests.kit.waiting import eventually
from tests.kit.worker import create

pytestmark = pytest.mark.anyio


class ControlServer:
    """A stand-in for the worker's, with one session, that answers whatever it is told to."""

    def __init__(self):
        self.session = {"session_id": None}
        self.renewals = []  # what the next ones are answered; after that as it should be
        self.asked = []
        self.routes = [web.get("/session", self._session), web.post("/{path}", self._post)]

    async def _session(self, _request):
        self.asked.append("session")
        return web.json_response(self.session)

    async def _post(self, request):
        path = request.match_info["path"]
        self.asked.append(path)
        if path == "renew" and self.renewals:
            answer = self.renewals.pop(0)
            if answer is None:
                await asyncio.sleep(3600)
            return answer
        if path == "renew":
            return web.json_response({"renewed": True, **self.session})
        self.session = {"session_id": None}
        return web.json_response({"released": True, "session_ids": ["one"]})


def at(origin):
    return SimpleNamespace(control_port=int(origin.rpartition(":")[2]))


def nonsense():
    text = ("", "{", "[1]", "null", '"renewed"', '{"renewed": false', "x" * 200_000)
    return [
        *(web.Response(text=body) for body in text),
        web.json_response({"renewed": False}, status=500),
        web.json_response({"reason": "it took too long"}, status=504),
        web.json_response({"error": "not found"}, status=404),
        web.json_response({}),
    ]


async def test_no_nonsense_is_the_end_of_a_lease(tmp_path):
    control = ControlServer()
    control.session = {"session_id": "one", "time_to_live": 60}
    control.renewals = nonsense()
    async with (
        server(*control.routes) as origin,
        consumer(at(origin), tmp_path, command="echo began; sleep 14") as running,
    ):
        await running.until_said("released session=one")
        assert not control.renewals
        assert not running.said("over")


async def test_one_that_never_answers_is_given_up_when_the_lease_has_run_out(tmp_path):
    control = ControlServer()
    control.session = {"session_id": "one", "time_to_live": 3}
    control.renewals = [None] * 100
    async with (
        server(*control.routes) as origin,
        consumer(at(origin), tmp_path, command="exec sleep 60") as running,
    ):
        await running.until_said("reserved")
        start = time.monotonic()
        await running.until_said("over session=one: the worker was unreachable")
        assert 1.5 < time.monotonic() - start < 6
        running.signal()
        assert await running.status(10) == 143


async def test_one_that_answers_at_once_is_not_asked_without_a_break(tmp_path):
    control = ControlServer()  # as a worker that drains
    async with (
        server(*control.routes) as origin,
        consumer(at(origin), tmp_path, command="true"),
    ):
        await eventually(lambda: control.asked)
        await asyncio.sleep(3)
        assert len(control.asked) <= 5


async def test_a_line_is_said_through_a_pipe_that_cannot_be_opened_once_more(
    vast, worker, tmp_path
):
    # As in a container whose user isn't root, and whose standard error root has made.
    script = driver(
        tmp_path,
        "import os",
        "def refuse(path, *arguments, opening=os.open, **options):",
        "    if str(path).startswith('/proc/self/fd/'):",
        "        raise PermissionError(13, 'not yours')",
        "    return opening(path, *arguments, **options)",
        "os.open = refuse",
    )
    reading, writing = os.pipe()
    command = {"command": "true", "script": script, "output": writing}
    async with consumer(worker, tmp_path, **command) as running:
        os.close(writing)
        os.set_blocking(reading, False)
        session_id = await create(vast, worker)
        received = b""

        def is_said():
            nonlocal received
            try:
                received += os.read(reading, 4096)
            except BlockingIOError:
                return False
            return f"null_consumer: released session={session_id}\n".encode() in received

        await eventually(is_said)
        running.signal()
        await running.status()
    os.close(reading)


def resident_kibibytes(process):
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def cpu_seconds(process):
    times = process.cpu_times()
    return times.user + times.system


@pytest.mark.starts  # a fork's memory has what the one that forked has imported
async def test_while_they_renew_it_and_its_guard_cost_next_to_nothing(vast, worker, tmp_path):
    async with consumer(worker, tmp_path, command="echo began; exec sleep 60") as running:
        await create(vast, worker)
        await running.until_printed("began")
        await asyncio.sleep(1)
        both = [process for process in running.alive() if process not in running.family()]
        assert len(both) == 2
        before = sum(cpu_seconds(process) for process in both)
        await asyncio.sleep(10)
        assert sum(cpu_seconds(process) for process in both) - before <= 10 * 0.007
        assert sum(resident_kibibytes(process) for process in both) <= 40 * 1024
