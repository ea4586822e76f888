"""The settings of the worker."""

import re
import sys

import pytest

import null_worker
from null_worker import DEFAULTS, Settings, StartupError
from tests.kit.environment import BARE, HERE, ON_VAST, run

BAD = [
    ({"NULL_CONTROL_PORT": "0"}, "NULL_CONTROL_PORT is '0', should be a port, 1-65535"),
    ({"NULL_CONTROL_PORT": "65536"}, "NULL_CONTROL_PORT is '65536', should be a port"),
    ({"NULL_CONTROL_PORT": "18 999"}, "NULL_CONTROL_PORT is '18 999', should be a port"),
    ({"NULL_CONTROL_PORT": "-1"}, "NULL_CONTROL_PORT is '-1', should be a port"),
    ({"NULL_CONTROL_PORT": "٣"}, "NULL_CONTROL_PORT is '٣', should be a port"),
    ({"NULL_CONTROL_PORT": "9" * 5000}, "should be a port"),
    (
        {"NULL_CONTROL_PORT": "3000"},
        "NULL_CONTROL_PORT is '3000', should be another port than WORKER_PORT",
    ),
    (
        {"NULL_CONTROL_PORT": "3001"},
        "should be another port than WORKER_PORT and WORKER_HTTP_PORT",
    ),
    (
        {"NULL_CONTROL_PORT": "4000", "WORKER_HTTP_PORT": "4000"},
        "should be another port than WORKER_PORT",
    ),
    (
        {"WORKER_HTTP_PORT": "3000"},
        "WORKER_HTTP_PORT is '3000', should be another port than WORKER_PORT",
    ),
    ({"WORKER_HTTP_PORT": "x"}, "WORKER_HTTP_PORT is 'x', should be a port"),
    (
        {"WORKER_PORT": "65535", "VAST_TCP_PORT_65535": "1"},
        "WORKER_HTTP_PORT is '65536', should be a port",
    ),
    ({"WORKER_PORT": "http"}, "WORKER_PORT is 'http', should be a port"),
    ({"VAST_TCP_PORT_3000": "no"}, "VAST_TCP_PORT_3000 is 'no', should be a port"),
    ({"CONTAINER_ID": "abc"}, "CONTAINER_ID is 'abc', should be a number"),
    ({"UNSECURED": "maybe"}, "UNSECURED is 'maybe', should be true or false"),
    (
        {"BACKEND_HEALTH_URL": "/health"},
        "BACKEND_HEALTH_URL is '/health', should be an absolute http",
    ),
    (
        {"BACKEND_HEALTH_URL": "ftp://a/h"},
        "BACKEND_HEALTH_URL is 'ftp://a/h', should be an absolute http",
    ),
    (
        {"BACKEND_HEALTH_URL": "http://"},
        "BACKEND_HEALTH_URL is 'http://', should be an absolute http",
    ),
    (
        {"BACKEND_HEALTH_URL": "http://[/h"},
        "BACKEND_HEALTH_URL is 'http://[/h', should be an absolute http",
    ),
    ({"BACKEND_HEALTH_URL": "http://a b/"}, "should be an absolute http"),
    ({"BACKEND_HEALTH_URL": "http://a:99999/"}, "should be an absolute http"),
    ({"BACKEND_HEALTH_URL": "http://a:0/"}, "should be an absolute http"),
    (
        {"BACKEND_HEALTH_URL": "http://localhost:18999/health"},
        "the consumer's own, not the control server's",
    ),
    (
        {"BACKEND_HEALTH_URL": "http://[::1]:77/", "NULL_CONTROL_PORT": "77"},
        "not the control server's",
    ),
    (
        {"BACKEND_HEALTH_URL": "http://127.0.0.1", "NULL_CONTROL_PORT": "80"},
        "not the control server's",
    ),
    (
        {"BACKEND_HEALTH_URL": "http://u:p@127.0.0.1:18999/health"},
        "not the control server's",
    ),
    ({"CONTAINER_ID": "", "REPORT_ADDR": ""}, "CONTAINER_ID, REPORT_ADDR not set"),
    ({"BACKEND_START_TIMEOUT": "0"}, "BACKEND_START_TIMEOUT is '0', should be seconds above 0"),
    ({"BACKEND_START_TIMEOUT": "-1"}, "BACKEND_START_TIMEOUT is '-1', should be seconds above 0"),
    ({"BACKEND_START_TIMEOUT": "1e3"}, "should be seconds above 0"),
    ({"BACKEND_START_TIMEOUT": "inf"}, "should be seconds above 0"),
]


@pytest.mark.parametrize(("change", "line"), BAD)
def test_a_bad_setting_is_named_with_its_value_and_what_it_should_be(change, line):
    with pytest.raises(StartupError, match=re.escape(line)):
        Settings.from_environment({**ON_VAST, **change})


def test_every_setting_that_has_a_default_has_a_bad_value_here():
    assert {name for change, _ in BAD for name in change} >= set(DEFAULTS)


def test_good_settings_are_taken():
    assert Settings.from_environment(ON_VAST) == Settings(
        18999, None, "127.0.0.1", (3000, 3001), 1800.0, False
    )
    consumer = {
        **ON_VAST,
        "PUBLIC_IPADDR": "1.2.3.4",
        "BACKEND_HEALTH_URL": "https://u:p@[fd00::1]/h?x=1",
    }
    more = {
        "NULL_CONTROL_PORT": "",
        "UNSECURED": "True",
        "BACKEND_START_TIMEOUT": "0.5",
        "WORKER_HTTP_PORT": "4000",
    }
    settings = Settings(18999, "https://u:p@[fd00::1]/h?x=1", None, (3000, 4000), 0.5, True)
    assert Settings.from_environment(consumer | more) == settings
    assert Settings.from_environment(ON_VAST | {"UNSECURED": ""}).unsecured is False
    elsewhere = {"BACKEND_HEALTH_URL": "http://10.0.0.1:18999/"}  # the control server's port
    assert Settings.from_environment(ON_VAST | elsewhere).health_url == "http://10.0.0.1:18999/"


@pytest.mark.parametrize("folder", ["link", "file"])
def test_the_files_of_the_consumer_may_lie_beside_a_link_or_what_it_stands_for(
    tmp_path, monkeypatch, folder
):
    for name in ("link", "file"):
        (tmp_path / name).mkdir()
    (tmp_path / "file" / "null_worker.py").touch()
    link = tmp_path / "link" / "null_worker.py"
    link.symlink_to("../file/null_worker.py")
    monkeypatch.setattr(null_worker, "__file__", str(link))
    environment = {**ON_VAST, "NULL_CONSUMER": "rq worker"}
    for name in null_worker.CONSUMER_FILES:
        with pytest.raises(StartupError, match=f"should be unset where .*{name}"):
            Settings.from_environment(environment)
        (tmp_path / folder / name).touch()
    assert Settings.from_environment(environment).consumer == "rq worker"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {**ON_VAST, "NULL_CONTROL_PORT": "99999"},
            "NULL_CONTROL_PORT is '99999', should be a port, 1-65535",
        ),
        (
            {},
            (
                "not a Vast Serverless instance, CONTAINER_ID, PUBLIC_IPADDR, REPORT_ADDR, "
                "WORKER_PORT, VAST_TCP_PORT_<WORKER_PORT> not set; "
                "to run it off Vast: python null_client.py --local"
            ),
        ),
    ],
)
def test_a_worker_that_cannot_start_says_so_in_one_line(environment, line):
    command = [sys.executable, HERE / "null_worker.py"]
    done = run(command, BARE | environment)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"null_worker: {line}\n", "")
