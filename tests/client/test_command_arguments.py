"""The arguments of the command, and the account that it uses."""

import math
import re

import pytest

import null_client
from tests.kit.command import Command

pytestmark = pytest.mark.anyio


PLACE = {"instance": "prod", "local": True, "debug": False}
EACH = {"cost": 100, "lifetime": 120}
SINGLE = {"mode": "single", "hold": 180, "wait": 1800}
DEMO = {"mode": "demo", "demo": True, "count": 3, "interval": 30, "plateau": 300, "wait": 1800}
BACKLOG = {
    "mode": "backlog",
    "max": 7,
    "jobs_per_worker": 1,
    "every": 5,
    "settle": 30,
    "once": False,
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], SINGLE),
        (["--demo"], DEMO),
        (["--backlog", "count", "--max", "7"], BACKLOG | {"backlog": "count"}),
        (["--watch", "count", "--max", "7"], BACKLOG | {"watch": "count"}),
    ],
)
def test_each_mode_has_the_defaults_of_the_contract(arguments, expected, monkeypatch):
    for name in ("VAST_ENDPOINT", "VAST_INSTANCE"):
        monkeypatch.delenv(name, raising=False)
    args = null_client.parse_arguments(["--local", *arguments])
    heeded = {name: value for name, value in vars(args).items() if value is not None}
    assert heeded == PLACE | EACH | expected


def test_what_is_given_counts_in_the_place_of_the_defaults():
    """Also an endless hold: what is read as nothing would be the default."""
    args = null_client.parse_arguments(["--local", "--hold", "inf", "--cost", "250"])
    assert (args.hold, args.cost, args.lifetime) == (math.inf, 250, 120)


def test_the_endpoint_and_the_instance_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("VAST_ENDPOINT", "mine")
    monkeypatch.setenv("VAST_INSTANCE", "alpha")
    args = null_client.parse_arguments([])
    assert (args.endpoint, args.instance) == ("mine", "alpha")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument --endpoint: needed, or $VAST_ENDPOINT, or --local"),
        (["--local", "--hold", "-1"], "argument --hold: -1 is not within"),
        (["--local", "--hold", "nan"], "argument --hold: nan is not within"),
        (["--local", "--hold", "1e9"], "argument --hold: 1e9 is not within"),
        (["--local", "--interval", "0"], "argument --interval: 0 is not within"),
        (["--local", "--plateau", "inf"], "argument --plateau: inf is not within"),
        (["--local", "--count", "0"], "argument --count: 0 is not within"),
        (["--local", "--count", "2.5"], "argument --count: '2.5' is not a whole number"),
        (["--local", "--cost", "-100"], "argument --cost: -100 is not within"),
        (["--local", "--cost", "much"], "argument --cost: 'much' is not a whole number"),
        (["--local", "--lifetime", "0.5"], "argument --lifetime: 0.5 is not within"),
        (["--local", "--lifetime", "inf"], "argument --lifetime: inf is not within"),
        (["--local", "--wait=-inf"], "argument --wait: -inf is not within"),
        (["--local", "--backlog", "echo 1"], "argument --max: needed with --backlog"),
        (["--local", "--backlog", "echo 1", "--max", "0"], "argument --max: 0 is not within"),
        (["--local", "--backlog", "echo 1", "--demo"], "argument --backlog: not with --demo"),
        (
            ["--local", "--backlog", "x", "--watch", "x", "--max", "1"],
            "argument --watch: not with --backlog",
        ),
        (
            ["--local", "--watch", "x", "--max", "1", "--hold", "5"],
            "argument --hold: not with --watch",
        ),
        (["--local", "--watch", "echo 1"], "argument --max: needed with --backlog"),
        (["--local", "--every", "0"], "argument --every: 0 is not within"),
        (["--local", "--settle=-1"], "argument --settle: -1 is not within"),
        (["--local", "--jobs-per-worker", "1.5"], "argument --jobs-per-worker: '1.5' is not a"),
        (
            ["--endpoint", "x", "--instance", "moon"],
            "argument --instance: 'moon' is none of prod, alpha",
        ),
        (["--local", "--max", "3"], "argument --max: only with --backlog"),
        (["--local", "--once"], "argument --once: only with --backlog"),
        (["--local", "--count", "3"], "argument --count: only with --demo"),
        (["--local", "--demo", "--hold", "5"], "argument --hold: not with --demo"),
        (
            ["--local", "--backlog", "x", "--max", "3", "--wait", "5"],
            "argument --wait: not with --backlog",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("VAST_ENDPOINT", raising=False)
    assert null_client.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"null_client: {message}")


NUMBERS = [
    action.option_strings[0]
    for action in null_client.parser_of("null_client.py")._actions
    if action.metavar in ("N", "S")
]


@pytest.mark.parametrize("flag", NUMBERS)
def test_every_number_of_the_command_is_checked(flag):
    for value in ("much", "nan", "-1"):
        with pytest.raises(null_client.UsageError) as refused:
            null_client.parse_arguments(["--local", f"{flag}={value}"])
        assert re.match(rf"argument {flag}: '?{value}'? is not", str(refused.value))


def test_the_numbers_are_all_there():
    assert len(NUMBERS) == 11


# The account that it uses


async def test_without_an_api_key_one_line_says_both_ways_to_give_one():
    async with Command("--endpoint", "x") as command:
        assert await command.status() == 2
    (line,) = command.errors
    assert "VAST_API_KEY" in line and "vastai set api-key" in line


async def test_the_saved_api_key_is_used_and_an_unknown_endpoint_is_told_from_the_known(
    vast, tmp_path
):
    (tmp_path / "vastai").mkdir()
    (tmp_path / "vastai" / "vast_api_key").write_text(vast.api_key)
    saved = {"XDG_CONFIG_HOME": str(tmp_path), "VAST_API_KEY": ""}
    async with Command("--endpoint", "typo", vast=vast, environment=saved) as command:
        assert await command.status() == 2
    assert command.errors == ["null_client: no endpoint 'typo'; there are: local"]


async def test_a_wrong_api_key_is_one_line(vast):
    async with Command(vast=vast, environment={"VAST_API_KEY": "wrong"}) as command:
        assert await command.status() == 1
    (line,) = command.errors
    assert line.startswith("null_client: ") and "401" in line


@pytest.mark.parametrize(
    ("key", "saved"),
    [
        ("key\n", False),
        (" key", False),
        ("ke\ty", False),
        ("k\u00e9y", False),
        ("k\u00e9y", True),
    ],
)
async def test_a_key_that_no_header_can_hold_is_named_and_not_shown(key, saved, tmp_path):
    (tmp_path / "vastai").mkdir()
    (tmp_path / "vastai" / "vast_api_key").write_text(key)
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "VAST_INSTANCE": "local"}
    environment["VAST_API_KEY"] = "" if saved else key
    async with Command("--endpoint", "x", environment=environment) as command:
        assert await command.status() == 2
    source = "`vastai set api-key KEY`" if saved else "VAST_API_KEY"
    what = "a space, a newline or a character that is not ASCII"
    assert command.errors == [f"null_client: {source}: the key has {what} in it"]
