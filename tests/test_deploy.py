"""The lines of docs/deploying.md, run as printed with the installed `vastai`.

Vast is a stub on loopback. Nothing can get past it: any other address is behind a proxy that isn't
there.
"""

import argparse
import http.server
import json
import os
import re
import shlex
import subprocess
import threading

import pytest

from tests.kit.example import PATH, which
from tests.kit.pages import blocks, for_vastai

KEY = "a-key-of-no-account"
HASHES = ["0123456789abcdef", "fedcba9876543210"]  # of the template, and of its next version
MADE = ("POST", "/api/v0/template/")
CHANGED = ("PUT", "/api/v1/template/")
DEFAULT = " verified=True rentable=True rented=False"  # what the command adds to a search


pytestmark = for_vastai


def deploying():
    """The page's shell blocks that use `vastai`, one after the other."""
    scripts = [block.text for block in blocks("docs/deploying.md", "sh")]
    return "\n".join(script for script in scripts if re.search(r"^ *vastai ", script, re.MULTILINE))


def crontab():
    """The commands of the crontab in docs/operating.md, without the times."""
    (block,) = blocks("docs/operating.md", "crontab")
    commands = [line.split(maxsplit=5)[5] for line in block.text.splitlines()]
    return "\n".join(re.sub(r"^/\S+/vastai ", "vastai ", command) for command in commands)


class Vast(http.server.BaseHTTPRequestHandler):
    """Its web API and its autoscaler, as far as the lines need them."""

    def answer(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"null")
        path, _, _ = self.path.partition("?")
        key = self.headers["Authorization"]
        self.server.asked.append((self.command, path, body, key))
        answer = {"success": True, "results": [], "offers": [], "instances": []}
        if (self.command, path) == MADE:
            answer["template"] = {"id": 7, "hash_id": HASHES[0], "name": body["name"]}
        elif (self.command, path) == CHANGED:
            answer["template"] = {"id": 8, "hash_id": HASHES[1], "name": body["name"]}
        elif path == "/api/v0/template/":
            answer["templates"] = [{"id": 7, "hash_id": HASHES[0]}]
        elif path == "/get_endpoint_workers/":
            answer = [{"id": 1, "status": "idle"}]
        elif path.startswith("/get_"):
            answer = {"info1": "a line of the log"}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass


def run_lines(lines, folder):
    """Return what the lines sent: methods, paths, bodies."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vast)
    server.asked = []
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    # By the option, not by VAST_URL: with that some commands go to the autoscaler of the real one.
    command = folder / "vastai"
    url = f"http://127.0.0.1:{server.server_address[1]}"
    command.write_text(f'#!/bin/sh\nexec {which("vastai")} "$@" --url {url}\n')
    command.chmod(0o755)
    config = folder / ".config/vastai"
    config.mkdir(parents=True)
    (config / "vast_api_key").write_text(KEY)
    nowhere = "http://127.0.0.1:9"
    environment = {
        "PATH": os.pathsep.join([str(folder), PATH]),
        "HOME": str(folder),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            ["sh", "-eu", "-c", lines],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert {key for _, _, _, key in server.asked} == {f"Bearer {KEY}"}
    return [(method, path, body) for method, path, body, _ in server.asked]


def body_of(asked, method, path):
    """What the one request of its kind sent."""
    (body,) = [sent for by, to, sent in asked if (by, to) == (method, path)]
    return body


def value_of(name):
    """What the lines set a variable to, without its quotes."""
    return re.search(rf"\b{name}='?([^'\n]*)'?$", deploying(), re.MULTILINE)[1]


def docker_options(template):
    """The ports and the variables of a template."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-p", action="append")
    parser.add_argument("-e", action="append")
    given = parser.parse_args(shlex.split(template["env"]))
    return given.p, dict(variable.split("=", 1) for variable in given.e)


def check_template(template):
    assert template["name"] == value_of("NAME")
    assert template["image"] == value_of("IMAGE")
    assert template["tag"] == value_of("TAG")
    assert template["runtype"] == "ssh"
    assert template["use_ssh"]
    assert template["ssh_direct"]
    assert template["onstart"] == "entrypoint.sh"
    assert template["private"]
    assert float(template["recommended_disk_space"]) == 40
    bounds = template["extra_filters"]
    assert bounds["gpu_name"] == {"eq": "RTX 4090"}
    assert bounds["num_gpus"] == {"eq": "1"}
    assert bounds["dph_total"] == {"lt": "0.6"}
    assert bounds["direct_port_count"] == {"gte": "3"}
    assert bounds["inet_down_cost"] == {"lte": "0.005"}
    ports, variables = docker_options(template)
    assert ports == ["3000:3000"]
    queue, _, access = value_of("VARIABLES").removeprefix("-e ").partition("=")
    assert variables == {
        "SERVERLESS": "true",
        "BACKEND": "null",
        "WORKER_PORT": "3000",
        "SDK_VERSION": "1.9.1",
        "PYWORKER_REPO": value_of("REPO"),
        "PYWORKER_REF": "main",
        "PROVISIONING_SCRIPT": value_of("SETUP"),
        "NULL_CONSUMER": value_of("CONSUMER"),
        queue: access,
    }


def check_endpoint(asked):
    """It scales by reservations, to one worker at first."""
    endpoint = body_of(asked, "POST", "/api/v0/endptjobs/")
    expected = {
        "endpoint_name": value_of("NAME"),
        "target_util": 1.0,
        "min_load": 0.0,
        "max_queue_time": 1.0,
        "target_queue_time": 0.5,
        "inactivity_timeout": 10,
        "max_workers": 1,
        "cold_workers": 0,
    }
    assert expected.items() <= endpoint.items()
    raised, _ = changes_of_endpoint(asked)
    assert raised == {"max_workers": 20, "cold_workers": 5}


def changes_of_endpoint(asked):
    """What each change of the endpoint changed, without what names it."""
    bodies = [body for by, to, body in asked if (by, to) == ("PUT", "/api/v0/endptjobs/4242/")]
    naming = ("client_id", "endptjob_id", "autoscaler_instance")
    return [
        {name: value for name, value in body.items() if value is not None and name not in naming}
        for body in bodies
    ]


def check_workergroup(asked):
    """It has the template, and bounds of its own."""
    group = body_of(asked, "POST", "/api/v0/autojobs/")
    assert group["endpoint_name"] == value_of("NAME")
    assert group["template_hash"] == HASHES[0]
    assert group["search_params"] == value_of("SEARCH") + DEFAULT


def check_new_version(asked):
    """It keeps all the rest, and is rolled out."""
    template = body_of(asked, *CHANGED)
    check_template(template)
    assert template["hash_id"] == HASHES[0]
    group = body_of(asked, "PUT", "/api/v0/autojobs/4243/")
    assert group["endpoint_id"] == 4242
    assert group["template_hash"] == HASHES[1]
    assert group["search_params"] == value_of("SEARCH") + DEFAULT
    roll = body_of(asked, "POST", "/update_workers/")
    assert roll["workergroup_id"] == 4243
    assert "cancel_update" not in roll


def check_looks_pause_and_end(asked):
    assert body_of(asked, "POST", "/get_endpoint_workers/") == {"id": 4242}
    assert body_of(asked, "POST", "/get_endpoint_logs/")["id"] == 4242
    assert body_of(asked, "POST", "/get_autogroup_logs/")["id"] == 4243
    assert body_of(asked, "PUT", "/api/v0/instances/request_logs/4244/") == {"tail": "200"}
    _, paused = changes_of_endpoint(asked)
    assert paused == {"endpoint_state": "stopped"}
    paths = [path for method, path, _ in asked if method == "DELETE"]
    assert paths == [
        "/api/v0/instances/4244/",
        "/api/v0/autojobs/4243/",
        "/api/v0/endptjobs/4242/",
    ]


def check_key_of_dispatcher(asked):
    key = body_of(asked, "POST", "/api/v0/auth/apikeys/")
    assert key["permissions"] == {"api": {"misc": {}}}


@pytest.mark.long
def test_what_the_lines_of_deploying_send(tmp_path):
    asked = run_lines(deploying(), tmp_path)
    check_template(body_of(asked, *MADE))
    check_endpoint(asked)
    check_workergroup(asked)
    check_looks_pause_and_end(asked)
    check_new_version(asked)
    check_key_of_dispatcher(asked)


def test_what_the_lines_of_the_crontab_send(tmp_path):
    asked = run_lines(crontab(), tmp_path)
    assert changes_of_endpoint(asked) == [{"min_load": 300}, {"min_load": 0}]
