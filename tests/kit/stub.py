"""A stub of the web API, the router and the workers, on one port."""

import asyncio
import contextlib
import itertools
import json
import re
import time
from types import SimpleNamespace

from null_local import LocalClient, hold_port
from null_worker import CREATE, END, LOOK, PING

ROUTE = "/route/"
GONE = {"error": "session does not exist"}


class Stub:
    """The web API, the router and any number of workers on one port.

    They are slow, wrong and absent on demand: `fate` decides what becomes of a request. None: the
    truth; an answer (status, body); "reset": dropped; "lost": dropped after it took effect; a
    number: the truth, told so many seconds after it took effect. It may be a coroutine function.
    """

    def __init__(self):
        self.fate = truth
        self.free = True  # a worker is
        self.waits = True  # the workers know `wait`
        self.key = "key"  # the endpoint's
        self.sessions = {}
        self.asked = []  # when, route, message
        self.numbers = itertools.count(1)
        self._connections = set()
        self._server = None

    async def __aenter__(self):
        await self.listen()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.drop_connections()
        if self._connections:
            await asyncio.wait(self._connections)

    async def listen(self, port=0):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, backlog=512)

    def drop_connections(self):
        for connection in list(self._connections):
            connection.cancel()

    async def absent(self, seconds):
        port = int(self.url.rpartition(":")[2])
        self._server.close()
        with hold_port(port):
            await asyncio.sleep(seconds)
            await self.listen(port)

    def times(self, route):
        return [when for when, asked, _ in self.asked if asked == route]

    def messages(self, route):
        return [message for _, asked, message in self.asked if asked == route]

    def left(self):
        """Sessions that a worker could still be told to close.

        Not those whose only mention got lost here.
        """
        now = time.time()
        return [
            session
            for session in self.sessions.values()
            if not session.over.is_set() and session.expiration > now
        ]

    async def _connected(self, reader, writer):
        self._connections.add(task := asyncio.current_task())
        task.add_done_callback(self._connections.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                answer = await self._answer(*await self._read(reader))
                if answer is None:
                    break
                status, body = answer
                text = body if isinstance(body, bytes) else json.dumps(body).encode()
                head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text))
                writer.write(head + text)
        writer.transport.abort()

    async def _read(self, reader):
        """The path and the JSON of a request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: *(\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b"{}"
        return head.split()[1].partition("?")[0], json.loads(body)

    async def _answer(self, path, message):
        """Status and body; None: the connection is dropped."""
        route = re.sub(r"^/w\d+", "", path)
        self.asked.append((time.monotonic(), route, message))
        fate = self.fate(route, message)
        if asyncio.iscoroutine(fate):
            fate = await fate
        if isinstance(fate, tuple):
            return fate
        if fate == "reset":
            return None
        status, answer = await self._truth(route, message)
        if fate == "lost":
            if route == CREATE:
                del self.sessions[answer["session_id"]]
            return None
        await asyncio.sleep(fate or 0)
        return status, answer

    async def _truth(self, route, message):
        if route.startswith("/api/"):
            return 200, self._endpoints()
        if route == ROUTE and message["api_key"] != self.key:
            return 401, {"error": "invalid API key"}
        if route == ROUTE:
            return 200, self._route(message)
        if route == CREATE:
            return 201, self._create(message)
        if "session_id" not in message:  # a worker of another test, whose autoscaler had this port
            return 404, {}
        session = self.sessions.get(message["session_id"])
        if session is not None and route == LOOK and self.waits:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(session.over.wait(), message.get("wait", 0))
        if session is None or session.over.is_set() or session.expiration < time.time():
            return 410 if route == PING else 400, GONE
        if route == END:
            session.over.set()
            return 200, {"ended": True}
        if route == PING:
            session.expiration += session.lifetime
            return 200, {"result": {}}
        return 200, {"expiration": session.expiration}

    def _endpoints(self):
        """The web API's."""
        one = {"id": 1, "endpoint_name": "stub", "api_key": self.key}
        one |= {"user_id": 1, "created_at": 0.0}
        return {"success": True, "results": [one], "result": one}

    def _route(self, message):
        request_idx = message["request_idx"] or next(self.numbers)
        if not self.free:
            return {"request_idx": request_idx, "status": "no worker is free"}
        return {
            "request_idx": request_idx,
            "cost": message["cost"],
            "endpoint": "stub",
            "reqnum": 1,
            "signature": "",
            "url": f"{self.url}/w{next(self.numbers)}",
        }

    def _create(self, message):
        name = f"s{next(self.numbers)}"
        lifetime = message["payload"]["lifetime"]
        expiration = time.time() + lifetime
        self.sessions[name] = SimpleNamespace(
            name=name, lifetime=lifetime, expiration=expiration, over=asyncio.Event()
        )
        return {"session_id": name, "expiration": expiration}


@contextlib.asynccontextmanager
async def stubbed():
    async with (
        Stub() as stub,
        LocalClient("key", autoscaler_url=stub.url, webserver_url=stub.url) as client,
    ):
        yield stub, await client.get_endpoint("stub")


def first(*fates, route, then=None):
    """A fate: the first requests to a route get these, one each."""
    left = list(fates)

    def fate(asked, _message):
        if asked != route:
            return None
        return left.pop(0) if left else then

    return fate


def truth(_route, _message):
    """The fate of a request to which nothing happens."""
    return
