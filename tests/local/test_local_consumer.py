"""LocalVast: the consumers of its workers, in the caller's place, and what it shows of them."""

import json
import os
import re
import signal
import tempfile
import uuid
from pathlib import Path

import pytest

import null_local
from null_local import GrowingFile, LocalVast, callers_place, of_the_caller
from null_reservation import NotReserved, reserve
from tests.kit.command import Command
from tests.kit.environment import BARE
from tests.kit.processes import marked
from tests.kit.reservation import endpoint_of
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh

OWN_LINE = "worker 1: null_consumer: "
pytestmark = pytest.mark.anyio


def test_where_a_consumer_is_to_run(tmp_path, monkeypatch):
    folder = tmp_path / "it's $HOME; #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    place = json.loads(callers_place({"PATH": "/bin", "VIRTUAL_ENV": "/v", "A": "b"}, Path("out")))
    of_worker = {"PATH": "/bin", "VIRTUAL_ENV": "/v"}
    assert place == {"folder": str(folder), "environment": of_worker, "output": "out"}


def test_of_the_callers_environment_workers_get_what_is_for_any_consumer():
    consumers = ("CONSUMER", "EMPTY", "GRACE", "RESIDENT", "BROKEN_AFTER", "STOP_SIGNAL")
    passed = {f"NULL_{name}": "1" for name in consumers}
    passed |= {"JOBS": "1", "REDIS_URL": "1", "http_proxy": "1", "PATH": "1", "VAST_API_KEY": "1"}
    of_others = ("NULL_SESSION_ID", "NULL_CONTROL_URL", "NULL_CONTROL_PORT", "BACKEND_HEALTH_URL")
    assert of_the_caller(passed | dict.fromkeys(of_others, "1")) == passed


def test_lines_are_shown_once_complete_and_as_they_can_be_shown_anywhere(tmp_path):
    path = tmp_path / "log"
    file = GrowingFile(path)
    assert file.new_lines() == file.last_lines(5) == []
    path.write_bytes(b"one\n\n\x1b[2Jtwo\xff\nthr")
    assert file.new_lines() == ["one", "?[2Jtwo\ufffd"]
    with path.open("ab") as more:
        more.write(b"ee\n" + b"x" * 100_000)
    assert file.new_lines() == ["three"]
    assert [len(line) for line in file.new_lines()] == [1000]  # of a line without an end
    assert file.new_lines() == []
    with path.open("ab") as more:
        more.write(b"\n1\n2\n\n3\n")
    assert file.last_lines(2) == ["2", "3"]
    assert file.last_lines(2) == []


async def test_a_consumer_runs_in_the_callers_place_while_its_worker_is_reserved(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("NULL_CONSUMER", "consumer  # with a comment")
    consumer = tmp_path / "consumer"
    consumer.write_text('#!/bin/sh\necho "$PWD $VIRTUAL_ENV $PATH"\n')
    consumer.chmod(0o755)
    events = []
    async with FaultyVast(control_port=None, max_workers=1, on_event=events.append) as vast:
        async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
            assert await reservation.ended(timeout=30)  # it has done its work
        (worker,) = vast.workers.values()
        assert worker.output.read_text() == f"{tmp_path} {tmp_path} {os.environ['PATH']}\n"
        assert events[1] == f"worker 1: its consumer writes to {worker.output}"
        await eventually(lambda: any(event.startswith(OWN_LINE) for event in events))
        assert not [event for event in events if " wrote: " in event]


async def test_of_a_run_that_fails_the_last_five_lines_are_shown():
    events = []
    environment = {"NULL_CONSUMER": "seq 20 >&2; exit 7"}
    async with FaultyVast(
        control_port=None, environment=environment, on_event=events.append
    ) as vast:
        await create(vast, await fresh(vast))
        await eventually(lambda: [event for event in events if " wrote: 20" in event])
    (failed,) = [at for at, event in enumerate(events) if "the consumer failed: " in event]
    assert re.match(r"worker 1: null_consumer: the consumer failed: .*\b7\b", events[failed])
    wrote = [f"worker 1 wrote: {number}" for number in range(16, 21)]
    assert events[failed + 1 : failed + 6] == wrote
    assert len([event for event in events if " wrote: " in event]) == 5


async def test_what_a_consumer_wrote_is_kept_where_it_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(null_local, "KEPT", 1)
    events = []
    once = "seq 20; [ -e seen ] || { touch seen; exit 7; }"
    for line, runs in ((f"cd {tmp_path}; {once}", 2), ("exit 7", 2), ("echo well", 1)):
        environment = {"NULL_CONSUMER": line}
        async with LocalVast(
            1, 3, control_port=None, environment=environment, on_event=events.append
        ) as vast:
            for _ in range(runs):  # each on a worker of its own
                async with endpoint_of(vast) as endpoint, reserve(endpoint) as reservation:
                    await reservation.ended(timeout=30)
                await eventually(lambda vast=vast: not vast.workers)
            left = [path.name for path in Path(vast.folder).iterdir()]
            assert left == []
    kept = [
        Path(event.rpartition(" ")[2])
        for event in events
        if "what its consumer wrote is kept in " in event
    ]
    assert len(kept) == 3
    assert kept[0].joinpath("output").read_text().splitlines() == list(map(str, range(1, 21)))
    assert "null_consumer: " in kept[0].joinpath("log").read_text()
    # of the second LocalVast the older one went, as KEPT is 1
    assert [path.exists() for path in kept] == [True, False, True]
    assert sorted(tmp_path.glob("null-*")) == sorted({path.parent for path in kept})


def test_a_file_that_has_grown_large_is_emptied_and_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(null_local, "LARGEST_FILE", 100)
    path = tmp_path / "log"
    file = GrowingFile(path)
    with path.open("ab", buffering=0) as log:
        log.write(b"x\n" * 50)
        file.keep_small()
        assert len(file.new_lines()) == 50
        log.write(b"y\n")
        file.keep_small()
        log.write(b"z\n")
        assert file.new_lines() == ["z"] and path.read_bytes() == b"z\n"


async def test_empty_runs_in_the_callers_place_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = tmp_path / "count"
    count.write_text("#!/bin/sh\necho 0\n")
    count.chmod(0o755)
    environment = {"NULL_CONSUMER": "exec sleep 1000", "NULL_EMPTY": "./count  # jobs"}
    async with (
        FaultyVast(control_port=None, environment=environment) as vast,
        endpoint_of(vast) as endpoint,
        reserve(endpoint) as reservation,
    ):
        assert await reservation.ended(timeout=30)


@pytest.mark.parametrize("name", ["NULL_GRACE", "NULL_RESIDENT"])
async def test_a_consumers_bad_setting_is_told_to_who_asks_for_a_worker(name):
    environment = {"NULL_CONSUMER": "true", name: "soon"}
    async with FaultyVast(control_port=None, environment=environment) as vast:
        with pytest.raises(NotReserved, match=f"HTTP 409.*status 2.*{name} is 'soon', should be"):
            async with endpoint_of(vast) as endpoint, reserve(endpoint):
                pass


STUBBORN = "trap '' TERM; echo started; setsid sh -c 'trap \"\" TERM; sleep 1000 & wait' & wait"


async def test_leaving_leaves_no_consumer_behind():
    mark = uuid.uuid4().hex
    environment = {"NULL_CONSUMER": STUBBORN, "MARK": mark}
    async with FaultyVast(
        control_port=None, environment=environment, inactivity_timeout=600
    ) as vast:
        workers = [await fresh(vast) for _ in range(2)]
        for worker in workers:
            await create(vast, worker)
            await eventually(lambda worker=worker: worker.output.exists())
        assert len(marked(mark)) > 4
    assert [worker.process.returncode for worker in workers] == [0, 0]
    await eventually(lambda: not marked(mark), timeout=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_client_that_ends_leaves_no_consumer_behind(number):
    mark = uuid.uuid4().hex
    environment = BARE | {"NULL_CONSUMER": STUBBORN, "NULL_GRACE": "1", "MARK": mark}
    async with Command("--local", "--hold", "inf", environment=environment) as command:
        await command.says("null_consumer: reserved")
        await eventually(lambda: "sleep" in marked(mark).values())
        command.process.send_signal(number)
        assert await command.status() == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        await eventually(lambda: not marked(mark), timeout=20)
