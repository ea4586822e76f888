"""`POST /broken`: an instance that can't do its work says so, and is then left alone."""

import asyncio
from urllib.parse import quote

import pytest

from tests.kit.http import post, request
from tests.kit.worker import create, exit_status, fresh, lease, release, renew, until

pytestmark = pytest.mark.anyio
NO_GPU = "no GPU: /dev/nvidia0 is gone\nFORGED"


@pytest.fixture
async def broken(vast):
    """A worker of the test's own, which LocalVast doesn't stop for its error."""
    worker = await fresh(vast)
    worker.stopping = True
    yield worker
    worker.process.terminate()
    assert await exit_status(worker) == 0


async def say_broken(worker, reason):
    return await post(f"{worker.control_url}/broken?reason={quote(reason)}")


async def test_a_free_worker_that_is_broken_reports_why_and_takes_no_session(vast, broken):
    assert await say_broken(broken, NO_GPU) == (200, {"broken": True})
    assert await create(vast, broken, expected=503) == {"error": "no sessions now: broken"}
    await until(broken, lambda: broken.report["error_msg"] == NO_GPU)
    status, _, answer = await request("GET", f"{broken.control_url}/health")
    assert (status, answer["status"], answer["reason"]) == (503, "broken", NO_GPU)
    log = broken.log.read_text()
    assert "\\nFORGED" in log and "\nFORGED" not in log


async def test_what_is_reserved_goes_on_and_its_end_is_told_before_the_reason(vast, broken):
    session_id = await create(vast, broken, lifetime=60)
    await until(broken, lambda: broken.report["cur_load"] == 100)
    assert await say_broken(broken, NO_GPU) == (200, {"broken": True})
    await create(vast, broken, expected=503)
    vast.reports.clear()
    broken_reports = (r for r in vast.reports if r["id"] == broken.number)
    assert (await renew(broken, session_id))[1]["renewed"]
    assert (await lease(broken))["session_id"] == session_id
    await asyncio.sleep(2.2)  # two reports, were there any
    assert not any(report["error_msg"] for report in broken_reports)
    assert (await release(broken, session_id))[1]["released"]
    await until(broken, lambda: broken.report["error_msg"] == NO_GPU)
    assert broken.report["cur_load"] == 0
    await create(vast, broken, expected=503)


@pytest.mark.parametrize("by", ["session/end", "expiry"])
async def test_the_reason_is_reported_however_the_session_ends(vast, broken, by):
    auth = vast.auth_data(broken)
    session_id = await create(vast, broken, auth=auth, lifetime=2 if by == "expiry" else 60)
    await say_broken(broken, NO_GPU)
    if by == "session/end":
        body = {"session_id": session_id, "session_auth": auth}
        assert (await post(f"{broken.url}/session/end", json=body))[0] == 200
    await until(broken, lambda: broken.report["error_msg"] == NO_GPU)


async def test_the_first_reason_stays(vast, broken):
    session_id = await create(vast, broken)
    for reason in ("first", "second"):
        assert await say_broken(broken, reason) == (200, {"broken": True})
    await release(broken, session_id)
    await until(broken, lambda: broken.report["error_msg"])
    await say_broken(broken, "third")
    vast.reports.clear()
    await until(broken, lambda: [r for r in vast.reports if r["id"] == broken.number], timeout=20)
    assert broken.report["error_msg"] == "first"


async def test_a_worker_that_is_broken_while_reserved_says_so_when_it_is_drained(vast):
    worker = await fresh(vast)
    worker.stopping = True
    await create(vast, worker)
    await say_broken(worker, NO_GPU)
    worker.process.terminate()
    assert await exit_status(worker) == 0
    assert (worker.report["error_msg"], worker.report["cur_load"]) == (NO_GPU, 0)


async def test_a_reason_is_needed(vast, worker):
    for query in ("", "?reason=", "?reason=%20", "?reason=" + "x" * 1025, "?reason=a&reason=b"):
        status, answer = await post(f"{worker.control_url}/broken{query}")
        assert status == 400 and "reason" in answer["error"]
    session_id = await create(vast, worker)  # it isn't broken
    assert (await release(worker, session_id))[1]["released"]
