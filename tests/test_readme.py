"""What the README prints, run as printed but for where Vast and the virtual environment are."""

import inspect
import re
import subprocess
import sys

import pytest

import null_client
import null_consumer
import null_worker
from tests.kit.environment import BARE, HERE
from tests.kit.waiting import eventually
from tests.kit.worker import create, is_free, lease, release

pytestmark = pytest.mark.anyio

README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:sh|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
# Which test runs a block, by a pattern in it. Those of `.ci/run` make a virtual environment.
RUN_BY = {
    "--demo --interval": ".ci/run",
    "-m pytest": ".ci/run",
    "examples/files/put": "here",
    "from null_consumer import reservations": "here",
    r"/renew\?session_id=": "here",
    "from null_client import reserve": "here",
    r"\n *vastai ": "tests/test_deploy.py",
}


def block_with(text):
    (block,) = [block for block in BLOCKS if text in block]
    return block


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_run_by_a_test(block):
    run_by = [by for text, by in RUN_BY.items() if re.search(text, block)]
    assert len(run_by) == 1, block


def test_what_the_readme_names_is_there():
    for path in re.findall(r"examples/[\w./-]+\w", README):
        assert (HERE / path).exists(), path


def test_it_names_every_setting_route_and_parameter():
    consumer = [f"NULL_{field.upper()}" for field in null_consumer.Settings._fields]
    named = [*null_worker.DEFAULTS, *consumer, *null_worker.CONTROL_ROUTES]
    assert [name for name in named if name not in README] == []
    (parameters,) = re.findall(r"`reserve\((.+?)\)`", README)
    for parameter in inspect.signature(null_client.reserve).parameters:
        assert parameter in parameters, parameter


def test_its_jobs_are_done_by_three_workers(tmp_path):
    block = block_with("examples/files/put").replace(".venv/bin/python", sys.executable)
    environment = {**BARE, "JOBS": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-ec", block], cwd=HERE, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.done"))) == 12
    assert b"workers: 3 reserved" in done.stdout


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
def work(job):
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


async def test_its_dispatcher_holds_until_the_consumer_has_released(vast):
    block = block_with("from null_client import reserve")
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
