"""`--diagnose` against a stub of Vast: each thing that it finds, and what it proposes."""

import re
import subprocess

import pytest

import null_diagnose
from null_diagnose import show
from tests.kit.account import account, ports
from tests.kit.diagnosis import found, parsed, wrong


@pytest.fixture
def vast():
    with account() as stub:
        yield stub


def add_two_ready(vast, open_port):
    vast.add_worker(11, port=open_port)
    vast.add_worker(12, port=open_port, load=100.0)


def test_nothing_is_wrong(vast):
    with ports() as (open_port, _):
        add_two_ready(vast, open_port)
        findings = found(vast)
    assert not [finding for finding in findings if finding.wrong]
    said = show(findings)
    assert said[0] == "workers: 1 free (for 10 min at most), 1 reserved (for 10 min at most)"
    assert said[1:] == [
        "instances: 2 running, which cost $0.50 an hour now",
        "offers that match the workergroup's search: 12",
        "nothing wrong was found",
    ]
    (search,) = vast.searches
    assert search["gpu_name"] == {"eq": "RTX 4090"}
    assert search["gpu_ram"] == {"gte": 24000.0}
    assert search["machine_id"] == {"notin": ["5"]}
    assert search["allocated_storage"] == 40
    assert "external" not in search  # as the SDK would add by itself


def test_a_key_that_is_refused(vast):
    what, (fix,) = wrong(found(vast, key="another-key"))
    assert re.search(r"refuses the API key \(\$VAST_API_KEY.*401 - Invalid user key", what)
    assert fix.func.__name__ == "set__api_key"
    assert set(vast.asked) == {("GET", "/api/v0/endptjobs/")}


def test_too_little_credit(vast):
    vast.user["credit"] = 3.2
    what, _ = wrong(found(vast))
    assert "$3.20" in what
    assert "wants $5" in what


def test_no_endpoint_of_that_name(vast):
    what, (fix,) = wrong(found(vast, "other"))
    assert "no endpoint 'other'; there are: queue" in what
    assert (fix.endpoint_name, fix.max_queue_time, fix.max_workers) == ("other", 1.0, 1)


def test_an_endpoint_that_is_stopped(vast):
    vast.endpoint["endpoint_state"] = "stopped"
    what, (fix,) = wrong(found(vast))
    assert what == "endpoint queue is stopped"
    assert (fix.id, fix.endpoint_state) == (4242, "active")


@pytest.mark.parametrize(
    "name, value, said, good",
    [
        ("max_queue_time", 30.0, "30 s", 1.0),
        ("max_queue_time", None, "default of 30 s", 1.0),
        ("target_queue_time", 10.0, "10 s", 0.5),
        ("target_queue_time", None, "default of 10 s", 0.5),
        ("target_util", 0.9, "0.9", 1.0),
        ("cold_workers", 4, "not below max_workers 4", 3),
    ],
)
def test_parameters_at_which_nothing_scales(vast, name, value, said, good):
    vast.endpoint[name] = value
    what, (fix,) = wrong(found(vast))
    assert said in what
    assert (fix.id, getattr(fix, name)) == (4242, good)


def test_a_parameter_that_vast_does_not_show(vast):
    del vast.endpoint["max_queue_time"]
    assert not any(finding.wrong for finding in found(vast))


def test_no_workergroup(vast):
    vast.groups = []
    what, (fix,) = wrong(found(vast))
    assert "no workergroup" in what
    assert (fix.endpoint_name, fix.template_hash) == ("queue", "${HASH:?}")


def test_two_workergroups(vast):
    vast.groups.append(vast.group | {"id": 79})
    what, (look,) = wrong(found(vast))
    assert "2 workergroups (77, 79)" in what
    assert look.func.__name__ == "show__workergroups"


@pytest.mark.parametrize(
    "change, said, script, options",
    [
        ({"onstart": ""}, "launch mode 'ssh'", "entrypoint.sh", "${ENV:?}"),
        ({"onstart": "a.sh"}, "launch mode 'ssh'", "${ONSTART:?}; entrypoint.sh", "${ENV:?}"),
        (
            {"onstart": "pip install pyworker; entrypoint.sh"},
            "the word 'pyworker'",
            "entrypoint.sh",
            "${ENV:?}",
        ),
        (
            {"env": "-e SERVERLESS=true -e PYWORKER_REPO=x -e SDK_VERSION=1"},
            "no null worker is started by the template's BACKEND",
            "${ONSTART:?}",
            "${ENV:?} -e BACKEND=null",
        ),
        (
            {"env": "-e BACKEND=vllm -e SDK_VERSION=1"},
            "the template's SERVERLESS, BACKEND, PYWORKER_REPO",
            "${ONSTART:?}",
            "${ENV:?} -e SERVERLESS=true -e BACKEND=null "
            "-e PYWORKER_REPO=https://github.com/YOU/YOUR_FORK",
        ),
    ],
)
def test_a_template_that_starts_no_worker(vast, change, said, script, options):
    vast.template |= change
    what, (fix,) = wrong(found(vast))
    assert said in what
    assert (fix.onstart_cmd, fix.env) == (script, options)
    check_the_rest_stays(fix)


def check_the_rest_stays(fix):
    assert (fix.HASH_ID, fix.name, fix.image) == (
        "0123456789abcdef",
        "null queue",
        "vastai/base-image",
    )
    assert (fix.ssh, fix.direct, fix.jupyter, fix.disk_space) == (True, True, False, "40.0")
    assert (fix.search_params, fix.no_default) == ("num_gpus=1", True)


def test_a_worker_that_the_image_is_told_not_to_start(vast):
    vast.template["env"] += " -e SUPERVISOR_SKIP_PYWORKER=true"
    what, (fix,) = wrong(found(vast))
    assert "SUPERVISOR_SKIP_PYWORKER=true" in what
    assert fix.env == "${ENV:?} -e SUPERVISOR_SKIP_PYWORKER=false"


@pytest.mark.parametrize("tag", ["latest", "", "@vastai-automatic-tag"])
def test_a_tag_that_moves(vast, tag):
    vast.template["tag"] = tag
    what, (fix,) = wrong(found(vast))
    assert repr(tag) in what
    assert fix.image_tag == "TAG"
    check_the_rest_stays(fix)


def test_an_sdk_that_is_not_pinned(vast):
    vast.template["env"] = vast.template["env"].replace("-e SDK_VERSION=1.9.1", "")
    what, (fix,) = wrong(found(vast))
    assert "SDK_VERSION" in what
    assert re.fullmatch(r"\$\{ENV:\?\} -e SDK_VERSION=1[.\d]+", fix.env)


def test_a_template_is_changed_with_what_it_has(vast):
    vast.template["tag"] = "latest"
    findings = found(vast)
    (change,) = [finding for finding in findings if finding.wrong]
    (before,) = [finding for finding in findings if not finding.wrong and "NEW" in finding.what]
    tell = parsed(before.do[1])
    assert (tell.id, tell.endpoint_id, tell.template_hash) == (77, 4242, "NEW")
    assert tell.no_default
    assert "dph_total<0.6" in tell.search_params
    # Pasted into a shell that hasn't been told, it does nothing.
    line = change.do[0].replace("vastai", "echo", 1)
    done = subprocess.run(["sh", "-c", line], env={}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not done.stdout


@pytest.mark.parametrize(
    "onstart",
    [
        "wget -O - https://raw.githubusercontent.com/vast-ai/pyworker/main/start_server.sh | bash",
        "python /opt/null_worker.py & entrypoint.sh",
    ],
)
def test_an_on_start_script_that_starts_the_worker_itself(vast, onstart):
    vast.template["onstart"] = onstart
    vast.template["env"] = "-e BACKEND=null -e PYWORKER_REPO=x -e SDK_VERSION=1"
    assert not any(finding.wrong for finding in found(vast))


def test_a_search_goes_there_and_back():
    query = account_query()
    text = null_diagnose.query_text(query)
    assert text == (
        "gpu_name=RTX_4090 gpu_ram>=24 dph_total<0.6 machine_id notin [5] "
        "verified=True rentable=True"
    )
    assert null_diagnose.query_text(text) == text
    assert " ".join(null_diagnose.conditions_of(text)) == text


def account_query():
    with account() as stub:
        return stub.group["search_query"]
