"""A worker, as its dispatcher, its consumer and the machine see it."""

import asyncio
import contextlib
import os
import re
import signal
import time
from pathlib import Path

import aiohttp

from null_local import LocalWorker
from tests.kit.environment import HERE
from tests.kit.http import Refused, post, request
from tests.kit.waiting import eventually

WORKERS = 3


async def create(vast, worker, auth=None, lifetime=60, expected=201, **payload):
    """The id of a new session; where a refusal is expected, what that says.

    Raises Refused for another status than the expected one.
    """
    auth_data = auth or vast.auth_data(worker)
    body = {"auth_data": auth_data, "payload": {"lifetime": lifetime, **payload}}
    status, answer = await post(f"{worker.url}/session/create", json=body)
    if status != expected:
        raise Refused(status, answer)
    return answer["session_id"] if status == 201 else answer


async def release(worker, session_id=None):
    return await _tell_control_server(worker, "/release", session_id)


async def renew(worker, session_id=None):
    return await _tell_control_server(worker, "/renew", session_id)


async def _tell_control_server(worker, path, session_id):
    query = "" if session_id is None else f"?session_id={session_id}"
    return await post(f"{worker.control_url}{path}{query}")


async def lease(worker, query=""):
    status, _, answer = await request("GET", f"{worker.control_url}/session{query}")
    assert status == 200
    return answer


async def is_free(worker):
    try:
        return (await lease(worker))["session_id"] is None
    except aiohttp.ClientError:
        return True  # free for so long that it was stopped


def epitaph(worker):
    """How the worker's process ended, with the end of its log; None while it hasn't."""
    if worker.process is None or worker.process.returncode is None:
        return None
    log = worker.log.read_text(errors="replace") if worker.log.exists() else "(no log)"
    last = "\n".join(log.splitlines()[-15:])
    return f"the worker ended with status {worker.process.returncode}; the end of its log:\n{last}"


async def until(worker, condition, timeout=60.0):
    """Wait for the condition, which can't come true once the worker's process has died."""
    return await eventually(condition, timeout, lambda: epitaph(worker))


async def ready(worker):
    await until(worker, lambda: worker.state == "IDLE")
    return worker


async def fresh(vast, environment=None, **options) -> LocalWorker:
    return await ready(vast.start_worker(environment, **options))


async def exit_status(worker, timeout=20.0):
    return await asyncio.wait_for(worker.process.wait(), timeout)


async def drained(worker, number=signal.SIGTERM):
    """Exit status after a signal, and the seconds that it took."""
    start = time.monotonic()
    worker.process.send_signal(number)
    return await exit_status(worker), time.monotonic() - start


def driver(folder, *lines):
    """A script that changes null_worker, then runs it."""
    script = folder / "driver.py"
    head = ("import sys, time", f"sys.path.insert(0, {str(HERE)!r})", "import null_worker")
    script.write_text("\n".join((*head, *lines, "sys.exit(null_worker.main())")))
    return str(script)


async def killed(*workers):
    for worker in workers:
        worker.process.kill()
        await exit_status(worker)


@contextlib.asynccontextmanager
async def honest_requests(vast, worker):
    """Meanwhile an honest dispatcher reserves and its consumer releases, over and over in time."""
    over, seconds = asyncio.Event(), []

    async def go_on():
        while not over.is_set() or not seconds:
            start = time.monotonic()
            session_id = await create(vast, worker)
            assert await release(worker) == (200, {"released": True, "session_ids": [session_id]})
            seconds.append(time.monotonic() - start)

    going_on = asyncio.create_task(go_on())
    try:
        yield
    finally:
        over.set()
        await going_on
    # 2 by the contract, on a machine that isn't full of tests.
    assert max(seconds) < 8, max(seconds)


def memory(worker, what):
    """MiB, of a line of the process's status."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) >> 10


def cpu_seconds(worker):
    fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lines_since(worker, logged):
    return worker.log.read_bytes()[logged:].decode(errors="replace")


def successor(vast, worker, **options):
    """A worker on another's ports, started at once."""
    heir = vast.start_worker(**options)
    # Its process starts one step of the loop later.
    heir.port, heir.http_port, heir.control_port = worker.ports
    heir.url = worker.url
    return heir


def thread_count(worker):
    status = Path(f"/proc/{worker.process.pid}/status")
    return int(re.search(r"Threads:\s+(\d+)", status.read_text())[1]) if status.exists() else 0
