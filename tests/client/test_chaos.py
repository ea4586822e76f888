"""All of it at once."""

import asyncio
import random
import time

import pytest

from tests.kit.autoscaler import ended, statuses
from tests.kit.http import Refused, post
from tests.kit.malformed import malformed
from tests.kit.waiting import eventually
from tests.kit.worker import create, lines_since, release, thread_count, until

pytestmark = pytest.mark.anyio


class Storm:
    """Random requests against one worker, and what is known of its open session."""

    ACTIONS = (
        *("create", "create", "create_short", "ping", "release"),
        *("release_fenced", "end", "send_malformed", "send_unsigned"),
    )

    def __init__(self, vast, worker, dice, opened):
        self.vast, self.worker, self.dice, self.opened = vast, worker, dice, opened
        self.session_id, self.auth = (
            None,
            None,
        )  # of the session that is open, if its end isn't known
        self.short = False  # it expires by itself
        self.threads = thread_count(worker)
        self.logged = worker.log.stat().st_size

    async def blow(self, deadline):
        for _ in range(200):
            if time.monotonic() < deadline:
                await getattr(self, self.dice.choice(self.ACTIONS))()

    async def create(self, lifetime=60):
        auth = self.vast.auth_data(self.worker)
        try:
            session_id = await create(self.vast, self.worker, auth, lifetime)
        except Refused as refused:
            assert refused.status == 429
        else:
            assert self.session_id is None or self.short, "two sessions on one worker"
            self.opened.append(auth["request_idx"])
            self.session_id, self.auth, self.short = session_id, auth, lifetime < 1

    async def create_short(self):
        await self.create(lifetime=0.2)

    async def ping(self):
        if self.session_id is not None:
            message = {"auth_data": self.auth, "session_id": self.session_id, "payload": {}}
            status, _ = await post(f"{self.worker.url}/ping", json=message)
            assert status == 200 or self.short

    async def release(self):
        status, answer = await release(self.worker)
        assert status == 200
        assert answer["released"] == (self.session_id is not None) or self.short
        self.session_id = None

    async def release_fenced(self):
        if self.session_id is not None:
            _, answer = await release(self.worker, self.session_id)
            assert answer["released"] or self.short
            self.session_id = None

    async def end(self):
        if self.session_id is not None:
            message = {"session_id": self.session_id, "session_auth": self.auth}
            status, _ = await post(f"{self.worker.url}/session/end", json=message)
            assert status == 200 or self.short
            self.session_id = None

    async def send_malformed(self):
        named, spoil = self.dice.choice(list(malformed()))
        body = {"auth_data": self.vast.auth_data(self.worker), "payload": {"lifetime": 60}}
        spoil(body)
        assert (await post(f"{self.worker.url}/session/create", json=body))[0] == 422, named

    async def send_unsigned(self):
        unsigned = {**self.vast.auth_data(self.worker), "signature": ""}
        await create(self.vast, self.worker, unsigned, expected=401)


async def test_chaos_keeps_the_invariants(vast):
    """Never two sessions on one worker, each ended once, as a success, and nothing left over."""
    opened = []
    dice = random.Random(7)
    storms = [Storm(vast, worker, dice, opened) for worker in list(vast.workers.values())[:2]]
    deadline = time.monotonic() + 15
    await asyncio.gather(*(storm.blow(deadline) for storm in storms))
    for storm in storms:
        await release(storm.worker)
    assert len(opened) > 20
    await eventually(lambda: len(ended(vast)) >= len(opened) + statuses(vast).count("Rejected"))
    # "Rejected" is how the framework tells of a 429.
    ends = [request for request in ended(vast) if request["status"] != "Rejected"]
    assert sorted(request["request_idx"] for request in ends) == sorted(opened)
    assert {request["status"] for request in ends} == {"Success"}
    for storm in storms:
        worker, threads = storm.worker, storm.threads
        await until(worker, lambda worker=worker: worker.report["cur_load"] == 0)
        await create(vast, worker)
        await eventually(lambda worker=worker, threads=threads: thread_count(worker) <= threads + 1)
        assert "Traceback" not in lines_since(worker, storm.logged)
