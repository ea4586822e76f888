"""A worker without LocalVast, which gives its workers a log, a folder and a path of its own."""

import asyncio
import contextlib
import signal
import sys
from typing import NamedTuple

from null_local import hold_port
from tests.kit.environment import BARE, HERE, ON_VAST
from tests.kit.http import post, request


class LoneWorker(NamedTuple):
    """One that nobody routes to: its reservations are unsigned."""

    process: asyncio.subprocess.Process
    port: int
    control_port: int

    async def reserve(self):
        """The id of a new session, or None where that is refused."""
        auth = {"endpoint": "", "signature": "", "url": ""}
        auth |= {"cost": 1, "reqnum": 1, "request_idx": 1}
        body = {"auth_data": auth, "payload": {}}
        status, answer = await post(f"http://127.0.0.1:{self.port}/session/create", json=body)
        return answer["session_id"] if status == 201 else None

    async def session_id(self):
        url = f"http://127.0.0.1:{self.control_port}/session"
        return (await request("GET", url))[2]["session_id"]


@contextlib.asynccontextmanager
async def worker_alone(folder, program=(sys.executable, HERE / "null_worker.py"), **environment):
    """It is drained at the end."""
    held = [hold_port() for _ in range(3)]
    port, http_port, control_port = (each.getsockname()[1] for each in held)
    ports = {"WORKER_PORT": str(port), f"VAST_TCP_PORT_{port}": "1"}
    ports |= {"WORKER_HTTP_PORT": str(http_port), "NULL_CONTROL_PORT": str(control_port)}
    ours = {"UNSECURED": "true", "PYTHONPATH": str(HERE)}
    process = await asyncio.create_subprocess_exec(
        *program, env=BARE | ON_VAST | ports | ours | environment, cwd=folder
    )
    try:
        yield LoneWorker(process, port, control_port)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        for each in held:
            each.close()
