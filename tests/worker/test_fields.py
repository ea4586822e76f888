"""The door: each field of a request that anybody reads is one that the door has checked."""

from pathlib import Path

import pytest

from null_worker import CREATE, END, HEALTH, LOOK, PING, ROUTES
from tests.kit.http import post
from tests.kit.worker import driver, fresh

pytestmark = pytest.mark.anyio

# Of routes with the same table the first is recorded for all.
SAME = {HEALTH: END}
# Requests that name a field of their own, so that what reads it is seen to.
RECORDING = """
class Recorded(dict):
    def __init__(self, message, route, parent=""):
        super().__init__(message)
        self.route, self.parent = route, parent
    def read(self, name):
        with open("fields", "a") as file:
            file.write(f"{self.route} {self.parent}{name}\\n")
    def __getitem__(self, name):
        self.read(name)
        value = super().__getitem__(name)
        is_read_on = f"{self.parent}{name}" in ("auth_data", "payload")
        return Recorded(value, self.route, f"{name}.") if is_read_on else value
    def get(self, name, default=None):
        return self[name] if name in self else default
    def __contains__(self, name):
        self.read(name)
        return super().__contains__(name)
def parse(body, fields, checked=null_worker.parse):
    route = next(route for route, known in null_worker.ROUTES.items() if known is fields)
    return Recorded(checked(body, fields), route)
null_worker.parse = parse
"""


async def test_no_field_is_read_that_the_door_does_not_know(vast, tmp_path):
    worker = await fresh(vast, script=driver(tmp_path, RECORDING))
    auth = vast.auth_data(worker)
    ours = {"session_id": "x", "session_auth": auth}
    payload = {"lifetime": 60, "on_close_route": "/closed", "on_close_payload": {"a": 1}}

    async def send(route, **message):
        return (await post(f"{worker.url}{route}", json=message))[1]

    ours["session_id"] = (await send(CREATE, auth_data=auth, payload=payload))["session_id"]
    for route in (LOOK, HEALTH):
        await send(route, **ours)
    await send(LOOK, **ours, wait=0.1)
    await send(PING, auth_data=auth, payload={}, session_id=ours["session_id"])
    await send(END, **ours)
    lines = Path(worker.folder, "fields").read_text().splitlines()
    read = {tuple(line.split()) for line in lines}
    known = {(route, field) for route, fields in ROUTES.items() for field in fields}
    assert read == {(route, field) for route, field in known if route not in SAME}
