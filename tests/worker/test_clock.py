"""The instance's clock is set, forward or back, while a worker runs."""

import asyncio
import time

import pytest

from tests.kit.http import post
from tests.kit.worker import create, driver, fresh, is_free, killed, lease, release, renew, until

pytestmark = pytest.mark.anyio
HOUR = 3600


class Clock:
    """A worker's wall clock, which can be set."""

    def __init__(self, folder):
        self._file = folder / "shift"
        self.set(0)
        self.script = driver(
            folder,
            "true_time = time.time",
            f"time.time = lambda: true_time() + float(open({str(self._file)!r}).read())",
        )

    def set(self, seconds):
        """So much later than it is."""
        written = self._file.with_suffix(".new")
        written.write_text(str(seconds))
        written.rename(self._file)


async def both(check, vast, folder):
    """Run the check with a clock that is set back and one that is set forward, at the same time."""
    checks = []
    for seconds in (-HOUR, 180):
        place = folder / str(seconds)
        place.mkdir()
        checks.append(check(vast, Clock(place), seconds))
    await asyncio.gather(*checks)


async def expiration(worker, session_id, auth):
    look = {"session_id": session_id, "session_auth": auth}
    return (await post(f"{worker.url}/session/get", json=look))[1]["expiration"]


async def test_a_lease_lasts_as_long_as_it_should(vast, tmp_path):
    await both(check_that_a_lease_lasts_as_long_as_it_should, vast, tmp_path)


async def check_that_a_lease_lasts_as_long_as_it_should(vast, clock, seconds):
    worker = await fresh(vast, script=clock.script)
    for lifetime, is_renewed in ((60, True), (8, False)):
        session_id, start = await create(vast, worker, lifetime=lifetime), time.monotonic()
        clock.set(seconds)
        await asyncio.sleep(6)  # a sweep for expired sessions at least
        assert 5 < lifetime - (await lease(worker))["time_to_live"] < 7
        if is_renewed:
            assert 59 < (await renew(worker, session_id))[1]["time_to_live"] <= 60
            assert (await release(worker, session_id))[1]["released"]
        seconds *= 2
    await until(worker, lambda: is_free(worker))
    assert 8 <= time.monotonic() - start < 8 + 5 + 4  # 5 to the next sweep
    await killed(worker)


async def test_reports_go_on(vast, tmp_path):
    await both(check_that_reports_go_on, vast, tmp_path)


async def check_that_reports_go_on(vast, clock, seconds):
    worker = await fresh(vast, script=clock.script)
    clock.set(seconds)
    for _ in range(2):  # ten seconds apart, when nothing happens
        before = len(reports_of(vast, worker))
        await until(
            worker, lambda before=before: len(reports_of(vast, worker)) > before, timeout=20
        )
    await create(vast, worker)
    await until(worker, lambda: worker.report["cur_load"] == 100, timeout=10)
    await killed(worker)


def reports_of(vast, worker):
    return [report for report in vast.reports if report["id"] == worker.number]


async def test_what_the_dispatcher_is_told_is_the_wall_clocks_as_it_was_at_the_create(
    vast, tmp_path
):
    clock = Clock(tmp_path)
    worker = await fresh(vast, script=clock.script)
    clock.set(-HOUR)
    auth = vast.auth_data(worker)
    session_id = await create(vast, worker, auth=auth, lifetime=60)
    told = await expiration(worker, session_id, auth)
    assert abs(told - (time.time() - HOUR + 60)) < 10
    clock.set(HOUR)  # a dispatcher that reckons from what it was told first isn't misled
    assert await expiration(worker, session_id, auth) == told
    ping = {"auth_data": auth, "session_id": session_id, "payload": {}}
    assert (await post(f"{worker.url}/ping", json=ping))[0] == 200
    assert await expiration(worker, session_id, auth) == told + 60
    await killed(worker)
