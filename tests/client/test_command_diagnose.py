"""`--diagnose` as a flag of the command."""

import pytest

from tests.kit.account import KEY, account
from tests.kit.command import Command

pytestmark = pytest.mark.anyio

DRIVER = (
    "import sys, vastai, null_client\n"
    "real = vastai.Serverless\n"
    "vastai.Serverless = lambda key, instance: real(key, autoscaler_url={url!r},"
    " webserver_url={url!r})\n"
    "sys.exit(null_client.main(sys.argv[1:]))"
)


def diagnosing(vast, **environment):
    return Command(
        *("--endpoint", "queue", "--diagnose"),
        driver=DRIVER.format(url=vast.url),
        environment={"VAST_API_KEY": KEY} | environment,
    )


async def test_nothing_is_wrong():
    with account() as vast:
        async with diagnosing(vast) as command:
            assert await command.status() == 0
    assert command.lines == [
        "workers: none",
        "offers that match the workergroup's search: 12",
        "nothing wrong was found",
    ]
    assert command.errors == []


async def test_something_is_wrong():
    with account() as vast:
        vast.endpoint["endpoint_state"] = "stopped"
        async with diagnosing(vast) as command:
            assert await command.status() == 1
    assert command.lines[:2] == [
        "wrong: endpoint queue is stopped",
        "    vastai update endpoint 4242 --endpoint_state active",
    ]
    assert command.lines[-1] == "1 thing is wrong"


async def test_without_a_key():
    with account() as vast:
        async with diagnosing(vast, VAST_API_KEY="") as command:
            assert await command.status() == 2
    assert not vast.asked
    assert len(command.errors) == 1
    assert "VAST_API_KEY" in command.errors[0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--local", "--diagnose"), "--diagnose: not with --local"),
        (("--endpoint", "queue", "--diagnose", "--demo"), "--diagnose: not with --demo"),
        (("--endpoint", "queue", "--diagnose", "--hold", "3"), "--hold: not with --diagnose"),
    ],
)
async def test_flags_that_do_not_fit(arguments, said):
    async with Command(*arguments) as command:
        assert await command.status() == 2
    (line,) = command.errors
    assert said in line
