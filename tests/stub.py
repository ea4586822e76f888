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
        self.free, self.waits = True, True  # a worker is; the workers know `wait`
        self.sessions, self.asked, self.numbers = {}, [], itertools.count(1)
        self._connections, self._server = set(), None

    async def __aenter__(self):
        await self.listen()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for connection in self._connections:
            connection.cancel()
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
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = re.search(r"content-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b"{}"
                answer = await self._answer(head.split()[1].partition("?")[0], json.loads(body))
                if answer is None:
                    break
                text = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
                writer.write(
                    b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (answer[0], len(text)) + text
                )
        writer.transport.abort()

    async def _answer(self, path, message):
        route = re.sub(r"^/w\d+", "", path)
        self.asked.append((time.monotonic(), route, message))
        fate = self.fate(route, message)
        fate = await fate if asyncio.iscoroutine(fate) else fate
        if isinstance(fate, tuple) or fate == "reset":
            return fate if fate != "reset" else None
        status, answer = await self._truth(route, message)
        if fate == "lost":
            if route == CREATE:
                del self.sessions[answer["session_id"]]
            return None
        await asyncio.sleep(fate or 0)
        return status, answer

    async def _truth(self, route, message):
        if route.startswith("/api/"):
            one = {
                "id": 1,
                "endpoint_name": "stub",
                "api_key": "key",
                "user_id": 1,
                "created_at": 0.0,
            }
            return 200, {"success": True, "results": [one], "result": one}
        if route == ROUTE:
            auth = {"request_idx": message["request_idx"] or next(self.numbers)}
            if not self.free:
                return 200, {**auth, "status": "no worker is free"}
            worker = f"{self.url}/w{next(self.numbers)}"
            auth |= {
                "cost": message["cost"],
                "endpoint": "stub",
                "reqnum": 1,
                "signature": "",
                "url": worker,
            }
            return 200, auth
        if route == CREATE:
            name, lifetime = f"s{next(self.numbers)}", message["payload"]["lifetime"]
            new = SimpleNamespace(
                name=name,
                lifetime=lifetime,
                expiration=time.time() + lifetime,
                over=asyncio.Event(),
            )
            self.sessions[name] = new
            return 201, {"session_id": name, "expiration": new.expiration}
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
        session.expiration += session.lifetime * (route == PING)
        return 200, {
            END: {"ended": True},
            PING: {"result": {}},
            LOOK: {"expiration": session.expiration},
        }[route]


@contextlib.asynccontextmanager
async def stubbed():
    async with (
        Stub() as stub,
        LocalClient("key", autoscaler_url=stub.url, webserver_url=stub.url) as client,
    ):
        yield stub, await client.get_endpoint("stub")


def first(*fates, route, then=None):
    """A fate: the first requests to a route get these, one each."""
    fates = list(fates)
    return lambda asked, _: (fates.pop(0) if fates else then) if asked == route else None


def truth(_route, _message):
    """The fate of a request to which nothing happens."""
    return
