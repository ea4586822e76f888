"""The arguments of the command, and the account that it uses."""

import re
import shutil
import sys

import pytest

import null_client
from tests.kit.command import Command
from tests.kit.environment import BARE, HERE, run

pytestmark = pytest.mark.anyio


def test_the_command_has_the_defaults_of_its_help(monkeypatch):
    for name in ("VAST_ENDPOINT", "VAST_INSTANCE"):
        monkeypatch.delenv(name, raising=False)
    expected = {
        "endpoint": None,
        "instance": "prod",
        "local": True,
        "demo": False,
        "hold": 180,
        "interval": 30,
    }
    expected |= {"plateau": 300, "count": 3, "cost": 100, "lifetime": 120, "wait": 1800}
    expected |= {"backlog": None, "max": None, "jobs_per_worker": 1, "once": False}
    expected |= {"every": 5, "settle": 30}
    assert vars(null_client.parse_arguments(["--local"])) == expected
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
        (["--local", "--backlog", "echo 1", "--demo"], "not allowed with argument"),
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
def test_bad_arguments_are_refused_by_name(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("VAST_ENDPOINT", raising=False)
    with pytest.raises(SystemExit) as exit:
        null_client.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_every_number_of_the_command_is_checked(capsys):
    defaults = vars(null_client.parse_arguments(["--local"]))
    named = [name for name, value in defaults.items() if type(value) in (int, float)]
    assert len(named) > 8
    for name in named:
        flag = f"--{name.replace('_', '-')}"
        for value in ("much", "nan", "-1"):
            with pytest.raises(SystemExit):
                null_client.parse_arguments(["--local", f"{flag}={value}"])
            said = capsys.readouterr().err.splitlines()[-1]
            assert re.search(rf"argument {flag}: '?{value}'? is not", said), said


def test_a_client_that_was_copied_alone_says_what_its_stand_in_needs(tmp_path):
    for name in ("client", "reservation", "rule", "backlog", "count", "display"):
        shutil.copy(HERE / f"null_{name}.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_client.py", "--local"], BARE)
    assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (2, 1, 1)
    assert done.stderr.startswith("null_client: --local needs null_local.py beside this file: ")


def test_a_command_that_was_copied_alone_says_what_it_needs(tmp_path):
    shutil.copy(HERE / "null_client.py", tmp_path)
    done = run([sys.executable, tmp_path / "null_client.py", "--local"], BARE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "null_client: null_backlog.py is missing beside this file\n"


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
