"""The unit and the container file of docs/operating.md, run as printed as far as one can."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.kit.environment import HERE, installed, run
from tests.kit.pages import blocks
from tests.kit.waiting import eventually

pytestmark = pytest.mark.anyio

OPERATING = "docs/operating.md"
(UNIT,) = blocks(OPERATING, "ini")
(CONTAINER,) = blocks(OPERATING, "dockerfile")


@installed("systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    python = tmp_path / "null-pyworker/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    unit = tmp_path / "null-client.service"
    unit.write_text(UNIT.text.replace("/opt/null-pyworker", str(tmp_path / "null-pyworker")))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert str(unit.name) not in done.stderr  # an unknown setting is a warning with status 0


def value_of(name):
    (value,) = re.findall(rf"^{name}=(.+)$", UNIT.text, re.MULTILINE)
    return value


def test_the_unit_knows_the_exit_statuses_of_the_command():
    assert int(value_of("SuccessExitStatus")) == 128 + signal.SIGTERM
    assert int(value_of("RestartPreventExitStatus")) == 2


@pytest.mark.parametrize("of", ["unit", "container"])
def test_the_command_lacks_nothing_but_a_key(of, tmp_path):
    if of == "unit":
        python, script, *arguments = shlex.split(value_of("ExecStart"))
        assert (Path(python).name, script) == ("python", "null_client.py")
    else:
        (entry,), (call,) = instructions("ENTRYPOINT"), instructions("CMD")
        assert json.loads(entry) == ["python", "null_client.py"]
        arguments = json.loads(call)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = run([sys.executable, "null_client.py", *arguments], environment)
    assert done.returncode == 2
    assert "no API key" in done.stderr


def instructions(name):
    return re.findall(rf"^{name} (.+)$", CONTAINER.text, re.MULTILINE)


def copy(folder):
    """Do what COPY does: a folder's content, or files."""
    for line in instructions("COPY"):
        *sources, target = line.split()
        for source in sources:
            for path in HERE.glob(source):
                if path.is_dir():
                    shutil.copytree(path, folder / target)
                else:
                    shutil.copy(path, folder / target)


def first_process_of(unshare):
    children = psutil.Process(unshare.pid).children()
    return children[0] if children else None


def zombies_of(process):
    return [each for each in process.children() if each.status() == psutil.STATUS_ZOMBIE]


def can_unshare():
    command = ["unshare", "--fork", "--pid", "--mount-proc", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="process namespaces are not allowed here")
async def test_the_container_runs_and_ends_as_the_first_process(tmp_path):
    copy(tmp_path)
    (entry,), (arguments,) = instructions("ENTRYPOINT"), instructions("CMD")
    command = [*json.loads(entry), *json.loads(arguments)]
    assert command[0] == "python"
    command[0] = sys.executable
    # Without Vast and without Redis. Each count leaves an orphan.
    place = command.index("--endpoint")
    command[place : place + 2] = ["--local"]
    counted = tmp_path / "counted"
    command[command.index("--backlog") + 1] = f"(sleep 60 &) ; echo >>{counted} ; echo 0"
    command += ["--every", "0.5"]
    output = tmp_path / "output"
    with output.open("wb") as file:
        unshare = subprocess.Popen(
            ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child", *command],
            cwd=tmp_path,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        await eventually(lambda: "jobs: 0 to do" in output.read_text())
        first = first_process_of(unshare)
        assert Path(os.readlink(f"/proc/{first.pid}/exe")).name.startswith("python")
        await eventually(lambda: len(counted.read_text()) >= 8)
        assert len(zombies_of(first)) <= 2
        first.terminate()
        await eventually(lambda: unshare.poll() is not None)
        assert unshare.returncode == 128 + signal.SIGTERM, output.read_text()
        assert "Traceback" not in output.read_text()
    finally:
        unshare.kill()
        unshare.wait()


def test_the_container_installs_what_it_copies():
    for line in instructions("RUN"):
        words = shlex.split(line)
        assert words[:3] == ["pip", "install", "--no-cache-dir"]
        assert (HERE / words[words.index("-r") + 1]).is_file()
