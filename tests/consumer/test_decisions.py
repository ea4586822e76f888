"""What null_consumer.py decides, apart from processes and requests."""

import re
import signal

import pytest

from null_consumer import (
    Failures,
    Jobs,
    Progress,
    Settings,
    SettingsError,
    Verdict,
    environment_of_command,
    gives_back,
    parse_answer,
    parse_jobs,
    target_for,
)
from null_guard import describe_failure


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"NULL_GRACE": "soon"}, "NULL_GRACE is 'soon', should be a number of seconds, 0 or more"),
        ({"NULL_GRACE": "-1"}, "NULL_GRACE is '-1', should be a number of seconds"),
        ({"NULL_GRACE": "nan"}, "NULL_GRACE is 'nan', should be a number of seconds"),
        ({"NULL_GRACE": "inf"}, "NULL_GRACE is 'inf', should be a number of seconds"),
        ({"NULL_GRACE": "1e3"}, "NULL_GRACE is '1e3', should be a number of seconds"),
        ({"NULL_GRACE": " 3"}, "NULL_GRACE is ' 3', should be a number of seconds"),
        ({"NULL_GRACE": "3\n"}, "NULL_GRACE is '3\\n', should be a number of seconds"),
        ({"NULL_GRACE": "٣"}, "NULL_GRACE is '٣', should be a number of seconds"),
        ({"NULL_GRACE": "9" * 5000}, "should be a number of seconds"),
        ({"NULL_BROKEN_AFTER": "never"}, "NULL_BROKEN_AFTER is 'never', should be a number"),
        ({"NULL_RESIDENT": "maybe"}, "NULL_RESIDENT is 'maybe', should be true or false"),
        (
            {"NULL_RESIDENT": "true", "NULL_EMPTY": "echo 0"},
            "NULL_EMPTY is 'echo 0', should not be set for a resident COMMAND",
        ),
        ({"NULL_CONTROL_PORT": "0"}, "NULL_CONTROL_PORT is '0', should be a port, 1-65535"),
        ({"NULL_CONTROL_PORT": "65536"}, "NULL_CONTROL_PORT is '65536', should be a port"),
        ({"NULL_CONTROL_PORT": "x"}, "NULL_CONTROL_PORT is 'x', should be a port"),
        ({"NULL_GRACE": "1", "--grace": "x"}, "--grace is 'x', should be a number of seconds"),
        (
            {"NULL_STOP_SIGNAL": "KILL"},
            "NULL_STOP_SIGNAL is 'KILL', should be one of TERM, INT, QUIT, HUP, USR1, USR2",
        ),
        ({"--stop-signal": "9"}, "--stop-signal is '9', should be one of TERM, INT"),
        ({"--broken-after": ""}, "--broken-after is '', should be a number of seconds"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_it_should_be(environment, line):
    flags = {name: environment[name] for name in environment if name.startswith("--")}
    with pytest.raises(SettingsError, match=re.escape(line)):
        Settings.from_environment(environment, flags)


def test_good_settings_are_taken_and_flags_go_before_variables():
    assert Settings.from_environment({}) == Settings(
        18999, 30.0, None, False, 600.0, signal.SIGTERM
    )
    for port in (1, 65535):
        assert Settings.from_environment({"NULL_CONTROL_PORT": str(port)}).control_port == port
    for name in ("INT", "int", "SIGINT"):
        assert Settings.from_environment({"NULL_STOP_SIGNAL": name}).stop_signal == signal.SIGINT
    empty = {"NULL_GRACE": "", "NULL_EMPTY": "", "NULL_RESIDENT": "", "NULL_BROKEN_AFTER": ""}
    assert Settings.from_environment(empty) == Settings()
    environment = {"NULL_GRACE": "0", "NULL_EMPTY": "echo 1", "NULL_BROKEN_AFTER": "2.5"}
    assert Settings.from_environment(environment) == Settings(18999, 0.0, "echo 1", False, 2.5)
    flags = {"--grace": "7", "--empty": "echo 2", "--broken-after": "0"}
    assert Settings.from_environment(environment, flags) == Settings(
        18999, 7.0, "echo 2", False, 0.0
    )
    assert Settings.from_environment({"NULL_RESIDENT": "True"}).resident
    assert Settings.from_environment({"NULL_RESIDENT": "0"}, {"--resident": "true"}).resident
    assert not Settings.from_environment({"NULL_RESIDENT": "off"}).resident


@pytest.mark.parametrize(
    ("times", "pause"), [(0, 0), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (5000, 60)]
)
def test_the_pause_after_so_many_failures(times, pause):
    assert Failures(times).pause == pause


def test_failures_count_from_the_first_ones_start():
    assert Failures().one_more(7.0).one_more(9.0) == Failures(2, 7.0)


@pytest.mark.parametrize(
    ("failures", "now", "broken_after", "is_broken"),
    [
        (Failures(3, 100.0), 700.0, 600.0, True),
        (Failures(3, 100.0), 699.0, 600.0, False),  # not for so long
        (Failures(2, 100.0), 5000.0, 600.0, False),  # two are no rule
        (Failures(3, 100.0), 5000.0, 0.0, False),  # never
        (Failures(), 5000.0, 600.0, False),
    ],
)
def test_when_the_worker_is_called_broken(failures, now, broken_after, is_broken):
    assert failures.mean_broken(now, broken_after) == is_broken


@pytest.mark.parametrize(
    ("waiting", "verdicts"),
    [
        ([0], "RELEASE"),
        ([None], "RELEASE"),  # nobody knows: as without --empty
        ([3, 2, 1, 0], "AGAIN AGAIN AGAIN RELEASE"),
        ([3, None], "AGAIN RELEASE"),
        ([3, 3, 3, 3], "AGAIN AGAIN AGAIN FAILED"),
        ([3, 4, 5, 6], "AGAIN AGAIN AGAIN FAILED"),
        ([3, 3, 3, 2, 2, 2, 2], "AGAIN AGAIN AGAIN AGAIN AGAIN AGAIN FAILED"),
    ],
)
def test_what_comes_after_runs_that_ended_with_0(waiting, verdicts):
    progress, got = Progress(), []
    for number in waiting:
        verdict, progress = progress.after_run(number)
        got.append(verdict)
    assert got == [Verdict[name] for name in verdicts.split()]


@pytest.mark.parametrize(
    ("output", "jobs"),
    [
        ("0\n", Jobs(0)),
        ("12", Jobs(12)),
        ("3 4\n", Jobs(3, 4)),
        ("0\n5\n", Jobs(0, 5)),
        ("0 5 100", Jobs(0, 5)),  # a third number is how many are done
        ("007", Jobs(7)),
        ("", None),
        ("many", None),
        ("-3", None),
        ("1.5", None),
        ("1 2 3 4", None),
        ("3 jobs", None),
        ("٣", None),
        ("9" * 30, None),
    ],
)
def test_how_many_wait_by_what_is_printed(output, jobs):
    assert parse_jobs(output) == jobs


@pytest.mark.parametrize(
    ("asked_at", "after", "expected"),
    [
        (Jobs(0, 1), Jobs(1, 0), True),
        (Jobs(0, 1), Jobs(0, 0), False),  # it has finished its job
        (Jobs(0, 0), Jobs(1, 0), False),  # it had none
        (Jobs(0), Jobs(1), False),  # nobody knows
        (Jobs(2, 1), Jobs(3, 0), True),
        (Jobs(2, 1), Jobs(2, 0), False),
    ],
)
def test_whether_a_job_was_given_back(asked_at, after, expected):
    assert gives_back(asked_at, after) == expected


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, ""),
        (1, "status 1"),
        (3, "status 3"),
        (-9, "ended by SIGKILL"),
        (-40, "ended by signal 40"),
    ],
)
def test_how_a_failure_is_told(status, text):
    assert describe_failure(status) == text


def test_an_answer_is_the_json_of_a_200():
    assert parse_answer(b'HTTP/1.0 200 OK\r\nA: b\r\n\r\n{"renewed": true}\n') == {"renewed": True}
    bad = [
        b"",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n{",
        b"HTTP/1.0 200 OK\r\n\r\n[1]",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b'HTTP/1.0 500 Oh\r\n\r\n{"renewed": false}',
        b'SSH-2.0 200\r\n\r\n{"renewed": false}',
        b"\xff\xfe",
    ]
    for received in bad:
        with pytest.raises(ValueError):
            parse_answer(received)


def test_a_session_id_is_quoted():
    assert target_for("/renew", None) == "/renew"
    assert target_for("/renew", "a&b=/ü") == "/renew?session_id=a%26b%3D%2F%C3%BC"


def test_what_command_finds_in_its_environment():
    mine = {"MASTER_TOKEN": "secret", "PYTHONPATH": "/lib", "NULL_SESSION_ID": "old", "A": "b"}
    changed = environment_of_command(mine, 4711, "abc")
    assert re.fullmatch("/[^:]*:/lib", changed.pop("PYTHONPATH"))
    assert changed == {
        "A": "b",
        "NULL_CONTROL_PORT": "4711",
        "NULL_CONTROL_URL": "http://127.0.0.1:4711",
        "NULL_SESSION_ID": "abc",
    }
    resident = environment_of_command({"NULL_SESSION_ID": "old"}, 4711, None)
    assert "NULL_SESSION_ID" not in resident
    assert ":" not in resident["PYTHONPATH"]
