"""What the Null PyWorker promises, end to end, in the order of its README.

Real are the workers, in processes of their own, Vast's SDK, the command and HTTP; LocalVast stands
in for Vast, and keeps what its autoscaler was told. The workers of the `vast` fixture are shared
and free at the start of each test; a test that ends or configures one starts its own. Everything
else that is promised has a file of its subject in `tests/`.
"""

import itertools
import re
import shutil
import sys

import pytest

from null_client import reserve
from null_worker import END
from tests.kit.autoscaler import ended, reservations_over_time, statuses
from tests.kit.command import Command
from tests.kit.environment import BARE, HERE, run
from tests.kit.http import Callbacks, post, request, server
from tests.kit.reservation import endpoint_of, worker_at
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh, lease, release, renew, until

pytest_plugins = ["tests.kit.fixtures"]
pytestmark = pytest.mark.anyio


# The command: see it scale


async def test_the_command_reserves_a_worker_holds_it_and_lets_it_go(vast):
    async with Command("--hold", "4", vast=vast) as command:
        await command.says("#1 waiting for a worker")
        await command.says(r"#1 held .*, http://127")
        await command.says("#1 released after")
        assert await command.status() == 0
    await eventually(lambda: statuses(vast) == ["Success"])
    await eventually(lambda: reservations_over_time(vast) == [0, 1, 0])


def seconds_of(command, what):
    """The clock, in seconds of the day, of the command's lines that hold a text."""
    found = []
    for line in command.lines:
        if what in line:
            hours, minutes, seconds = line[:8].split(":")
            found.append(int(hours) * 3600 + int(minutes) * 60 + int(seconds))
    return found


async def test_the_demo_ramps_up_and_down_and_watches_the_workers_go(small_vast):
    vast = small_vast
    async with Command("--demo", "--interval", "2.5", "--plateau", "3", vast=vast) as command:
        assert await command.status() == 0
        assert command.errors == []
        assert not vast.workers  # all of them were started for it, and went with it
    assert statuses(vast) == ["Success"] * 3
    assert reservations_over_time(vast) == [0, 1, 2, 3, 2, 1, 0]

    order = [line.split()[1] for line in command.lines if "released after" in line]
    assert order == ["#1", "#2", "#3"]
    asked, held = seconds_of(command, "waiting for"), seconds_of(command, "held after")
    released = seconds_of(command, "released after")
    plateau = (held[-1], released[0])
    for earlier, later in [*itertools.pairwise(asked), plateau, *itertools.pairwise(released)]:
        assert (later - earlier) % 86400 >= 2  # in whole seconds of a clock

    *lines, axis, first, second, third, workers = command.lines
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    states = [line.partition("workers: ")[2] for line in lines if "workers: " in line]
    assert states[0] == states[-1] == "none"
    assert "3 reserved" in states
    assert any("loading" in each for each in states)
    assert ". waiting  = held" in axis
    for row in (first, second, third):
        assert re.match(r"#\d +\.*=+ ", row)
    assert re.fullmatch(r"workers {2}[ 0]*1+2*3+[12]*0", workers.rstrip())
    assert len(workers) == len("workers  ") + 40
    assert all(line.isascii() and line.isprintable() and len(line) <= 100 for line in command.lines)


# A reservation: one session, one worker


async def test_the_sdk_reserves_and_the_autoscaler_is_told(vast):
    async with vast.client(max_poll_interval=1.0) as client:
        endpoint = await client.get_endpoint(vast.endpoint_name)
        session = await endpoint.session(cost=100, lifetime=60)
        await eventually(lambda: any(report["cur_load"] == 100 for report in vast.reports))
        await session.close()
        await eventually(lambda: vast.reports[-1]["cur_load"] == 0)
    await eventually(lambda: statuses(vast) == ["Success"])
    assert {report["max_perf"] for report in vast.reports} == {100.0}
    assert {report["cur_load"] for report in vast.reports} <= {0, 100}
    assert not any(report["rej_load"] or report["error_msg"] for report in vast.reports)


async def test_one_session_at_a_time(vast, worker):
    first = await create(vast, worker)
    await create(vast, worker, expected=429)
    assert await release(worker, first) == (200, {"released": True, "session_ids": [first]})
    second = await create(vast, worker)
    assert second != first


async def by_release(worker, session):
    answer = await release(worker)
    assert answer == (200, {"released": True, "session_ids": [session["session_id"]]})


async def by_the_dispatcher(worker, session):
    assert (await post(f"{worker.url}{END}", json=session))[0] == 200


async def on_the_http_only_port(worker, session):
    url = f"http://127.0.0.1:{worker.http_port}{END}"
    assert (await post(url, json=session))[0] == 200


async def by_expiry(_worker, _session):
    """Nobody renews it."""


async def by_a_signal(worker, _session):
    worker.process.terminate()
    assert await worker.process.wait() == 0


@pytest.mark.parametrize(
    "end", [by_release, by_the_dispatcher, on_the_http_only_port, by_expiry, by_a_signal]
)
async def test_every_end_of_a_reservation_is_a_success_and_calls_back(vast, worker, end):
    if end is by_a_signal:
        worker = await fresh(vast)
    callbacks = Callbacks()
    async with server(callbacks.route) as origin:
        auth_data = vast.auth_data(worker)
        session_id = await create(
            vast,
            worker,
            auth=auth_data,
            lifetime=3 if end is by_expiry else 60,
            on_close_route=f"{origin}/closed",
            on_close_payload={"job": 7},
        )
        await until(worker, lambda: worker.report["cur_load"] == 100)
        await end(worker, {"session_id": session_id, "session_auth": auth_data})
        await eventually(lambda: worker.report["cur_load"] == 0 and ended(vast))
        await eventually(lambda: callbacks.bodies == [{"job": 7, "session_id": session_id}])
    (told,) = ended(vast)
    assert told["request_idx"] == auth_data["request_idx"]
    assert (told["status"], told["success"]) == ("Success", True)


# The consumer, on the instance


async def test_a_consumer_sees_renews_and_releases_its_reservation(vast, worker):
    assert await lease(worker) == {"session_id": None}
    session_id = await create(vast, worker, lifetime=60)
    assert (await lease(worker, "?wait=30"))["session_id"] == session_id
    status, answer = await renew(worker, session_id)
    assert (status, answer["renewed"], answer["session_id"]) == (200, True, session_id)
    assert 59 < answer["time_to_live"] <= 60.01
    assert (await release(worker, session_id))[1]["released"]
    over = {"reason": "no active session"}
    assert await renew(worker) == (200, {"renewed": False, **over})
    assert await release(worker) == (200, {"released": False, **over})


async def test_a_late_consumer_cannot_release_its_successor(vast, worker):
    first = await create(vast, worker)
    await release(worker, first)
    second = await create(vast, worker)
    refused = (200, {"released": False, "reason": "session ID is not active"})
    assert await release(worker, first) == refused
    assert await release(worker, "") == refused  # a shell variable that isn't set
    url = f"{worker.control_url}/release"
    assert (await post(f"{url}?session={first}"))[0] == 400
    assert (await post(f"{url}?session_id={first}&session_id={second}"))[0] == 400
    assert await release(worker, second) == (200, {"released": True, "session_ids": [second]})


async def test_health_is_answered_where_the_consumer_has_none_of_its_own(worker):
    status, _, answer = await request("GET", f"{worker.control_url}/health")
    assert (status, answer) == (200, {"status": "ok"})


# The dispatcher


async def test_reserve_keeps_a_worker_until_its_block_ends(vast):
    async with endpoint_of(vast) as endpoint, reserve(endpoint, lifetime=4) as reservation:
        worker = worker_at(vast, reservation.url)
        assert not await reservation.ended(timeout=4 + 5.5)  # kept alive: 5 to the next sweep
        assert (await lease(worker))["session_id"] == reservation.session_id
    assert await lease(worker) == {"session_id": None}
    await eventually(lambda: statuses(vast) == ["Success"])


async def test_a_reservation_that_was_handed_over_is_the_consumers(vast):
    async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
        reservation.hand_over()
        worker = worker_at(vast, reservation.url)
        assert (await renew(worker, reservation.session_id))[1]["renewed"]
        assert (await release(worker, reservation.session_id))[1]["released"]
        assert await reservation.ended(timeout=5)
    await eventually(lambda: statuses(vast) == ["Success"])


# On Vast: what its bootstrap starts with BACKEND=null


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("workers.null.worker", "not a Vast Serverless instance"),
        ("workers.null.client", "argument --endpoint"),
    ],
)
def test_the_modules_for_vasts_bootstrap_run(module, says):
    done = run([sys.executable, "-m", module], BARE)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in done.stderr


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
    async with FaultyVast(max_workers=1) as vast:
        worker = await fresh(vast, script=str(script))
        async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
            assert reservation.url == worker.url
            await release(worker)
            assert await reservation.ended(timeout=10)
        await eventually(lambda: statuses(vast) == ["Success"])
    assert (tmp_path / ".has_benchmark").read_text() == "100\n"
