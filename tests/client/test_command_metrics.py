"""`--metrics` as a flag of the command."""

import socket

import pytest

from tests.client.test_metrics import free_port, samples, scraped
from tests.kit.command import Command
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio

WITHOUT = (
    "import sys, null_client\n"
    "sys.modules['prometheus_client'] = None\n"
    "sys.exit(null_client.main(sys.argv[1:]))"
)
BACKLOG = ("--local", "--backlog", "echo 0", "--max", "1")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--endpoint", "queue", "--metrics", "9105"), "--metrics: only with --backlog"),
        ((*BACKLOG, "--metrics", "70000"), "--metrics: 70000 is not within 1 and 65535"),
        ((*BACKLOG, "--metrics", "soon"), "--metrics: 'soon' is not a whole number"),
    ],
)
async def test_flags_that_do_not_fit(arguments, said):
    async with Command(*arguments) as command:
        assert await command.status() == 2
    (line,) = command.errors
    assert said in line


async def test_metrics_of_the_command():
    port = free_port()
    waiting = "echo 2 0 7"
    arguments = ("--local", "--backlog", waiting, "--max", "2", "--every", "0.5")
    async with Command(*arguments, "--metrics", str(port)) as command:
        await command.says("2 reserved")
        got = {}

        def complete():
            got.update(samples(scraped(f"http://127.0.0.1:{port}/metrics")))
            return got.get('null_workers{state="reserved"}') == 2

        await eventually(complete)
        assert got['null_jobs{state="waiting"}'] == 2
        assert got["null_jobs_done"] == 7
        assert got["null_reservation_wait_seconds_count"] == 2


async def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with Command(*BACKLOG, "--metrics", str(port)) as command:
            assert await command.status() == 2
    expected = f"null_client: argument --metrics: port {port}: Address already in use"
    assert command.errors == [expected]


async def test_without_prometheus_client():
    async with Command(*BACKLOG, "--metrics", "9105", driver=WITHOUT) as command:
        assert await command.status() == 2
    (line,) = command.errors
    assert line.endswith("needs prometheus_client: pip install prometheus_client")
