"""An environment for one example whose requirements don't fit in with those of the tests."""

import fcntl
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.kit.environment import HERE


def environment_of(example, tmp_path_factory):
    """The `bin` of a virtual environment with the example's requirements, made once a run.

    Skips where pip can't bring them.
    """
    parent = tmp_path_factory.getbasetemp().parent  # the same for all of pytest-xdist's processes
    folder = parent / f"environment-of-{example}"
    with (parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            venv.create(folder, symlinks=True)
            requirements = HERE / "examples" / example / "requirements.txt"
            pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "-q"]
            command = [*pip, "--disable-pip-version-check", "-r", str(requirements)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                last = done.stderr.strip().splitlines()[-1:]
                pytest.skip(f"pip can't install {example}'s requirements: {last}")
            (folder / "complete").touch()
    return Path(folder) / "bin"
