"""Requests and servers of the tests themselves."""

import asyncio
import contextlib
import json
import socket

import aiohttp
from aiohttp import web


async def request(method, url, **options):
    """Status, headers and JSON of one request on a connection of its own."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(timeout=timeout) as http,
        http.request(method, url, **options) as response,
    ):
        text = await response.text()
        return response.status, response.headers, json.loads(text) if text else None


async def post(url, **options):
    status, _, answer = await request("POST", url, **options)
    return status, answer


class Refused(AssertionError):
    """A request was answered with another status than it should have been."""

    def __init__(self, status, answer):
        super().__init__(f"HTTP {status} - {answer}")
        self.status = status


def listens(port):
    """Whether somebody takes connections on a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


@contextlib.asynccontextmanager
async def server(*routes):
    """An HTTP server of the user's own, a consumer say; gives its origin."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def consumer_health(statuses):
    async def health(request):
        return web.Response(status=statuses[request.match_info["name"]])

    return web.get("/{name}", health)


class Callbacks:
    """The receiver of on_close callbacks, which can be made to hang."""

    def __init__(self, hang=False):
        self.bodies, self.answered, self.let_go = [], [], asyncio.Event()
        if not hang:
            self.let_go.set()
        self.route = web.post("/closed", self.receive)

    async def receive(self, request):
        self.bodies.append(await request.json())
        assert "X-Null-Callback" in request.headers
        await self.let_go.wait()
        self.answered.append(request.transport is not None and not request.transport.is_closing())
        return web.json_response({})


async def on_the_wire(port, *parts):
    """What a port sends back for bytes on the wire, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 30)
        return b""
    finally:
        writer.close()
