"""`--metrics`: what a scrape gets, by Prometheus' own rules."""

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import tempfile
import urllib.request

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from null_backlog import TROUBLES, Jobs, Progress, follow
from null_local import LocalVast
from null_metrics import Metrics
from tests.kit.waiting import eventually

TWICE = Progress(
    jobs=Jobs(12, 3, 40),
    wanted=4,
    own=2,
    others=1,
    asked=1,
    troubles={"stuck": "stuck: look at the consumers", "waiting": "waiting: see --diagnose"},
    opened=1,
    waited=75.0,
    reserved_seconds=3600.5,
    failed_counts=2,
)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(metrics):
    """Its URL, while it is served."""
    port = free_port()
    with metrics.served(port):
        yield f"http://127.0.0.1:{port}/metrics"


def scraped(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as page:
        assert page.headers["Content-Type"].startswith("text/plain")
        return page.read().decode()


def samples(text):
    """Each sample as a person writes it, with its value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def of(*progress, workers=None):
    """The text of a scrape, after these were told."""
    metrics = Metrics()
    for each in progress:
        metrics.has_progressed(each)
    if workers is not None:
        metrics.has_workers(workers)
    with served(metrics) as url:
        return scraped(url)


def test_what_a_scrape_gets():
    got = samples(of(TWICE, workers=["reserved", "reserved", "free", "loading", "odd", "strange"]))
    expected = {
        'null_jobs{state="waiting"}': 12,
        'null_jobs{state="in_hand"}': 3,
        "null_jobs_done": 40,
        "null_workers_wanted": 4,
        'null_workers{state="reserved"}': 2,
        'null_workers{state="free"}': 1,
        'null_workers{state="loading"}': 1,
        'null_workers{state="stopping"}': 0,
        'null_workers{state="stopped"}': 0,
        'null_workers{state="broken"}': 0,
        'null_workers{state="other"}': 2,
        'null_reservations_held{holder="own"}': 2,
        'null_reservations_held{holder="others"}': 1,
        "null_reservations_requested": 1,
        "null_reserved_seconds_total": 3600.5,
        "null_backlog_failures_total": 2,
        "null_reservation_wait_seconds_count": 1,
        "null_reservation_wait_seconds_sum": 75,
        'null_reservation_wait_seconds_bucket{le="60.0"}': 0,
        'null_reservation_wait_seconds_bucket{le="120.0"}': 1,
        'null_reservation_wait_seconds_bucket{le="1800.0"}': 1,
        'null_trouble{name="stuck"}': 1,
        'null_trouble{name="waiting"}': 1,
        'null_trouble{name="ghost"}': 0,
    }
    assert expected.items() <= got.items()
    troubles = {name for name in got if name.startswith("null_trouble")}
    assert troubles == {f'null_trouble{{name="{name}"}}' for name in TROUBLES}
    unknown = {name for name in got if not name.startswith("null_")}
    assert not unknown  # nothing of Python's or of the process


def test_what_is_not_known_has_no_sample():
    got = samples(of())
    assert set(got) == {name for name in got if name.startswith("null_reservation_wait_seconds")}
    got = samples(of(Progress(Jobs(7))))
    assert got['null_jobs{state="waiting"}'] == 7
    assert 'null_jobs{state="in_hand"}' not in got
    assert "null_jobs_done" not in got
    assert not any(name.startswith("null_workers{") for name in got)


def test_each_reservation_is_counted_once():
    first = Progress(opened=1, waited=3.0)
    second = Progress(opened=2, waited=400.0)
    got = samples(of(Progress(), first, first._replace(own=1), second, second))
    assert got["null_reservation_wait_seconds_count"] == 2
    assert got["null_reservation_wait_seconds_sum"] == 403


def test_the_rules_of_prometheus():
    text = of(TWICE, workers=["reserved"])
    helped = set(re.findall(r"^# HELP (\w+)", text, re.MULTILINE))
    assert helped == set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    if shutil.which("promtool"):
        done = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_only_this_machine_is_served_and_nothing_is_left():
    metrics = Metrics()
    port = free_port()
    with metrics.served(port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(OSError, match="in use"), Metrics().served(port):
            pass
        scraped(f"http://127.0.0.1:{port}/metrics")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with metrics.served(port):  # it can be had again
        pass


@contextlib.asynccontextmanager
async def metrics_of(vast, backlog, most):
    """What gives the value of a metric, scraped while the backlog is followed."""
    metrics = Metrics()
    async with vast.client() as client:
        endpoint = await client.get_endpoint(vast.endpoint_name)
        work = follow(endpoint, backlog, most, every=0.2, on_progress=metrics.has_progressed)
        following = asyncio.ensure_future(work)
        try:
            with served(metrics) as url:
                yield lambda name: samples(scraped(url)).get(name)
        finally:
            following.cancel()
            await asyncio.wait({following})


@pytest.mark.anyio
async def test_metrics_of_a_backlog(vast):
    jobs = [(2, 0)]
    failing = [OSError("no queue")]

    async def backlog():
        if failing:
            raise failing.pop()
        return jobs[-1]

    async with metrics_of(vast, backlog, 2) as value:
        await eventually(lambda: value('null_reservations_held{holder="own"}') == 2)
        jobs.append((0, 2))
        assert value("null_reservation_wait_seconds_count") == 2
        assert 0 < value("null_reservation_wait_seconds_sum") < 120
        assert value("null_backlog_failures_total") == 1
        before = value("null_reserved_seconds_total")
        await eventually(lambda: value("null_reserved_seconds_total") > before + 0.5)


@pytest.mark.anyio
async def test_metrics_of_consumers_that_are_broken(tmp_path, monkeypatch):
    """Three workers, each of which lets go at once, and no job moves."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what a failed consumer wrote is kept

    async def backlog():
        return 12, 0

    async with (
        LocalVast(3, environment={"NULL_CONSUMER": "false"}, control_port=None) as vast,
        metrics_of(vast, backlog, 3) as value,
    ):
        await eventually(lambda: value('null_trouble{name="stuck"}') == 1, 60)
        assert value("null_reservation_wait_seconds_count") >= 3
        assert value('null_jobs{state="waiting"}') == 12
        assert value('null_trouble{name="backlog"}') == 0
