"""What the null worker, its client and LocalVast promise, end to end."""

import itertools
import re
import shutil
import sys

import pytest

from null_client import reserve
from null_local import LocalVast
from tests.autoscaler import ended, reservations_over_time, statuses
from tests.command import Command
from tests.environment import BARE, HERE, run
from tests.http import post
from tests.reservation import endpoint_of
from tests.waiting import eventually
from tests.worker import create, fresh, release, until

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.anyio


async def test_the_sdk_reserves_and_the_autoscaler_is_told(vast):
    async with vast.client(max_poll_interval=1.0) as client:
        endpoint = await client.get_endpoint(vast.endpoint_name)
        reserved = await endpoint.session(cost=100, lifetime=60)
        await eventually(lambda: any(report["cur_load"] == 100 for report in vast.reports))
        await reserved.close()
        await eventually(lambda: vast.reports[-1]["cur_load"] == 0)
    await eventually(lambda: statuses(vast) == ["Success"])
    assert {report["max_perf"] for report in vast.reports} == {100.0}
    assert {report["cur_load"] for report in vast.reports} <= {0, 100}
    assert not any(report["rej_load"] or report["error_msg"] for report in vast.reports)


@pytest.mark.parametrize("by", ["release", "session/end", "HTTP-only session/end", "expiry"])
async def test_every_end_of_a_reservation_is_a_success(vast, worker, by):
    auth = vast.auth_data(worker)
    session_id = await create(vast, worker, auth=auth, lifetime=60 if by != "expiry" else 3)
    await until(worker, lambda: worker.report["cur_load"] == 100)
    if by == "release":
        assert await release(worker) == (200, {"released": True, "session_ids": [session_id]})
    elif by != "expiry":
        port = worker.http_port if by.startswith("HTTP") else worker.port
        body = {"session_id": session_id, "session_auth": auth}
        assert (await post(f"http://127.0.0.1:{port}/session/end", json=body))[0] == 200
    await until(worker, lambda: worker.report["cur_load"] == 0 and ended(vast))
    (request,) = ended(vast)
    assert (request["request_idx"], request["status"], request["success"]) == (
        auth["request_idx"],
        "Success",
        True,
    )


async def test_one_session_at_a_time(vast, worker):
    first = await create(vast, worker)
    await create(vast, worker, expected=429)
    assert await release(worker, first) == (200, {"released": True, "session_ids": [first]})
    second = await create(vast, worker)
    assert second != first


async def test_the_demo_ramps_up_and_down_and_watches_the_workers_go(small_vast):
    vast = small_vast
    async with Command("--demo", "--interval", "2.5", "--plateau", "3", vast=vast) as command:
        assert await command.status() == 0
        assert command.errors == [] and not vast.workers
    assert statuses(vast) == ["Success"] * 3
    assert reservations_over_time(vast) == [0, 1, 2, 3, 2, 1, 0]
    order = [line.split()[1] for line in command.lines if "released after" in line]
    assert order == ["#1", "#2", "#3"]
    requested, held, released = (
        [
            sum(map(int.__mul__, map(int, line[:8].split(":")), (3600, 60, 1)))
            for line in command.lines
            if what in line
        ]
        for what in ("waiting for", "held after", "released after")
    )
    for earlier, later in [
        *itertools.pairwise(requested),
        (held[-1], released[0]),
        *itertools.pairwise(released),
    ]:
        assert (later - earlier) % 86400 >= 2  # in whole seconds of a clock
    *lines, axis, first, second, third, workers = command.lines
    assert ". waiting  = held" in axis and all(
        re.match(r"#\d +\.*=+ ", line) for line in (first, second, third)
    )
    assert (
        re.fullmatch(r"workers {2}[ 0]*1+2*3+[12]*0", workers.rstrip())
        and len(workers) == len("workers  ") + 40
    )
    assert all(line.isascii() and line.isprintable() and len(line) <= 100 for line in command.lines)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    said = [line.partition("workers: ")[2] for line in lines if "workers: " in line]
    assert (
        said[0] == said[-1] == "none"
        and "3 idle" in said
        and any("model_loading" in states for states in said)
    )


@pytest.mark.parametrize("module", ["workers.null.worker", "workers.null.client"])
def test_the_modules_for_vasts_bootstrap_run(module):
    done = run([sys.executable, "-m", module], BARE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "not a Vast Serverless instance" in done.stderr or "argument --endpoint" in done.stderr


async def test_the_module_is_a_worker_that_can_be_reserved_and_released(tmp_path):
    shutil.copytree(HERE / "workers", tmp_path / "workers")
    shutil.copy(HERE / "null_worker.py", tmp_path)
    script = tmp_path / "as_python_m_does.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "sys.path[0] = os.getcwd()\n"
        "runpy.run_module('workers.null.worker', run_name='__main__')\n"
    )
    async with LocalVast(control_port=None, max_workers=1) as vast:
        worker = await fresh(vast, script=str(script))
        async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
            assert reservation.url == worker.url
            await release(worker)
            assert await reservation.ended(timeout=10)
        await eventually(lambda: statuses(vast) == ["Success"])
    assert (tmp_path / ".has_benchmark").read_text() == "100\n"
