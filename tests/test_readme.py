"""What the pages print, run as printed but for where Vast and the virtual environment are."""

import inspect
import re
import subprocess
import sys

import pytest

import null_backlog
import null_client
import null_consumer
import null_reservation
import null_worker
from tests.kit.environment import BARE, HERE
from tests.kit.example import PATH
from tests.kit.pages import PAGES, block_with, blocks, commands, section, tables
from tests.kit.waiting import eventually
from tests.kit.worker import create, is_free, lease, release

pytestmark = pytest.mark.anyio

BLOCKS = [block for page in PAGES for block in blocks(page, "sh", "python")]
# Which test runs a block, by a pattern in it. Those of `.ci/run` make a virtual environment.
RUN_BY = {
    "--demo --interval": ".ci/run",
    "-m pytest$": ".ci/run",
    r"bash \.ci/run": ".ci/run",
    "examples/files/put": "here",
    "--endpoint my-queue": "here",
    "from null_consumer import reservations": "here",
    r"/renew\?session_id=": "here",
    "from null_client import reserve": "here",
    "bash findings/": "whoever wants to: outside the tests",
    r"(^|\n) *vastai ": "tests/test_deploy.py",
}
# Blocks that no test can run, and why.
NOT_RUN = {
    "/venv/main/bin/pip": "needs Vast's base image",
    r"pip install '\.\[metrics": "installs into the environment that these tests run in",
    "/opt/null-pyworker": "needs root, and writes to the system",
    "systemctl": "needs a running systemd",
    "docker build": "needs a container engine",
    r"\. \.venv/bin/activate\n$": "sets up the environment that these tests run in",
    "pytest tests/client": "runs the tests",
    "--local --backlog 'examples/rq": "needs a Redis; tests/examples/test_rq.py runs both lines",
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.page)
def test_every_block_is_run_by_a_test(block):
    run_by = [text for text in (*RUN_BY, *NOT_RUN) if re.search(text, block.text)]
    assert len(run_by) == 1, (block.text, run_by)


def test_what_the_pages_name_is_there():
    for page, text in PAGES.items():
        for path in re.findall(r"(?<![\w/])examples/[\w./-]+\w", text):
            if "NAME" not in path:
                assert (HERE / path).exists(), (page, path)


def test_they_name_every_setting_route_and_parameter():
    text = PAGES["docs/api.md"]
    consumer = [f"NULL_{field.upper()}" for field in null_consumer.Settings._fields]
    named = [*null_worker.DEFAULTS, *consumer, *null_worker.CONTROL_ROUTES]
    assert [name for name in named if name not in text] == []


@pytest.mark.parametrize("function", [null_client.reserve, null_client.follow])
def test_they_print_the_signature_of(function):
    name = function.__name__
    (printed,) = re.findall(rf"`{name}\(([^`]+, \*, .+?)\)`", PAGES["docs/api.md"])
    expected = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in expected:
            expected.append("*")
        default = parameter.default
        if default is parameter.empty:
            expected.append(parameter.name)
        else:
            expected.append(f"{parameter.name}={'...' if callable(default) else default}")
    assert printed.split(", ") == expected


def names(table):
    """What stands in the first column of a table, in code."""
    return re.findall(r"`(?:await )?(\w+)", " ".join(name for name, *_ in table))


def test_they_name_all_of_reserve():
    parameters, reservation, exceptions = tables(section("docs/api.md", "Python: `reserve()`"))
    assert set(names(parameters)) == set(inspect.signature(null_client.reserve).parameters)
    made_at_its_start = re.findall(
        r"self\.([a-z]\w+)(?:: \w+)? =", inspect.getsource(null_reservation.Reservation.__init__)
    )
    of_class = [name for name in vars(null_reservation.Reservation) if name[0] != "_"]
    assert set(names(reservation)) == {*made_at_its_start, *of_class}
    raised = [name for name in null_reservation.__all__ if name not in OF_RESERVE]
    assert set(raised) <= set(names(exceptions))


OF_RESERVE = ("reserve", "Reservation", "UnreachableWorkers")


def test_they_name_all_of_progress():
    (progress,) = tables(section("docs/api.md", "Python: `follow()`"))
    assert tuple(names(progress)) == null_backlog.Progress._fields


def test_its_jobs_are_done_by_three_workers(tmp_path):
    block = block_with("examples/files/put")
    activated = block.replace(". .venv/bin/activate\n", "")
    assert activated != block
    environment = {**BARE, "PATH": PATH, "JOBS": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-ec", activated], cwd=HERE, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.done"))) == 12
    assert b"workers: 3 reserved" in done.stdout


CALLS = {
    tuple(words)
    for block in BLOCKS
    for words in commands(block.text, "null_client.py")
    if "--local" not in words
}


@pytest.mark.parametrize("words", sorted(CALLS))
def test_its_calls_of_the_command_lack_nothing_but_a_key(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "null_client.py", *words],
        cwd=HERE,
        env={**BARE, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no API key" in done.stderr


async def test_its_resident_consumer_works_and_releases(vast, worker):
    around = """\
import os, signal
jobs = ["one", "two"]
def pull():
    if jobs:
        return jobs.pop(0)
    os.kill(os.getpid(), signal.SIGTERM)  # enough: it ends with this reservation
def extend(job):
    pass
def load():
    return "a model"
def work(model, job):
    print(job, flush=True)
"""
    program = around + block_with("from null_consumer import reservations")
    consumer = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=HERE,
        env={**BARE, "NULL_CONTROL_PORT": str(worker.control_port)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        await create(vast, worker)
        await eventually(lambda: consumer.poll() is not None)
        assert (consumer.returncode, consumer.stdout.read()) == (0, "one\ntwo\n")
        assert await is_free(worker)
    finally:
        consumer.kill()
        consumer.wait()
        consumer.stdout.close()


async def test_its_curl_lines_show_renew_and_release(vast, worker):
    session_id = await create(vast, worker, lifetime=60)
    environment = {
        **BARE,
        "NULL_CONTROL_PORT": str(worker.control_port),
        "id": session_id,
        "http_proxy": "http://127.0.0.1:9",  # nobody is there
    }
    done = subprocess.run(
        ["sh", "-ec", block_with("/renew?session_id=")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    session, renewed, released = done.stdout.splitlines()
    assert f'"session_id": "{session_id}"' in session
    assert '"renewed": true' in renewed
    assert released == f'{{"released": true, "session_ids": ["{session_id}"]}}'


@pytest.mark.starts  # the SDK reads VAST_API_KEY when it is imported
async def test_its_dispatcher_holds_until_the_consumer_has_released(vast):
    block = block_with("await worker.ended()")
    imports, serverless = (
        "from vastai import Serverless\n",
        f"""\
import functools, null_local
Serverless = functools.partial(
    null_local.LocalClient, autoscaler_url={vast.url!r}, webserver_url={vast.url!r}
)
""",
    )
    assert imports in block
    assert '"my-queue"' in block
    block = block.replace(imports, serverless).replace('"my-queue"', repr(vast.endpoint_name))
    dispatcher = subprocess.Popen(
        [sys.executable, "-c", block],
        cwd=HERE,
        env={**BARE, "VAST_API_KEY": vast.api_key},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        reserved = await eventually(lambda: [w for w in vast.workers.values() if not w.free])
        (worker,) = reserved
        session_id = await eventually(lambda: session_of(worker))
        assert dispatcher.poll() is None
        await release(worker)
        await eventually(lambda: dispatcher.poll() is not None)
        assert dispatcher.returncode == 0
        assert dispatcher.stdout.read() == f"{session_id} {worker.url}\n"
    finally:
        dispatcher.kill()
        dispatcher.wait()
        dispatcher.stdout.close()


async def session_of(worker):
    return (await lease(worker))["session_id"]


def test_its_local_vast_gives_a_worker():
    block = block_with("LocalVast(max_workers")
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=HERE,
        env=BARE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", done.stdout)
