"""After the last test, from outside: no process, port or folder of the suite is left.

All temporary files of a run are in one folder, which also is in the environment of all that the run
starts. So the processes of this run are told from those of another, and from anybody else's.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from null_local import KEPT_PREFIX, Folder
from tests.kit.environment import HERE
from tests.kit.processes import listening_ports, marked

PREFIX = "nt-"  # of the folder, a short name: sockets are made in it
DAY = 86400.0  # seconds
# What may be there: pytest's own, what failed consumers wrote, for who asks, and what Python's
# multiprocessing and xvfb-run make, of jobs that tests have killed.
STAYS = ("pytest-of-", KEPT_PREFIX, "pymp-", "xvfb-run.")
GRACE = 15.0  # seconds for what is ending: workers wait for their drain
# What may be made anew beside the project's files.
MADE = ("__pycache__", ".git", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".venv")
MADE += ("node_modules", "build")


class Outside:
    """What was there before the run, for the process that all others are started by."""

    def __init__(self):
        sweep()
        self.folder = tempfile.mkdtemp(prefix=PREFIX)
        os.chmod(self.folder, 0o711)  # a server under test may be another user's
        os.environ["TMPDIR"] = tempfile.tempdir = self.folder
        self.files = project_files()

    def left(self):
        """What is left, a line each."""
        processes, ports = {}, {}
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            processes = {
                pid: name for pid, name in marked(self.folder).items() if pid != os.getpid()
            }
            ports = listening_ports(processes)
            if not processes:
                break
            time.sleep(0.1)
        with Folder():  # the next LocalVast removes what one that was killed has left
            pass
        lines = [f"process {pid} {name}, ports {ports.get(pid)}" for pid, name in processes.items()]
        folders = {path.name for path in Path(self.folder).iterdir()}
        lines += [f"{self.folder}/{name}" for name in folders if not name.startswith(STAYS)]
        return lines + sorted(project_files() - self.files)

    def end(self):
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def sweep():
    """Remove what runs that failed, or were killed, have left a day ago."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)


def project_files():
    """The files of the project, without those that may be made anew."""
    found = set()
    for folder, folders, files in os.walk(HERE):
        folders[:] = [name for name in folders if name not in MADE]
        found.update(os.path.join(folder, name) for name in files)
    return found


outside = None if "PYTEST_XDIST_WORKER" in os.environ else Outside()


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Last of all, when the processes that ran the tests have ended."""
    yield
    if outside is None:
        return
    left = outside.left()
    if left:
        session.exitstatus = session.exitstatus or 1
        print("\nThe suite has left:", *left, sep="\n  ")
    elif session.exitstatus == 0:
        outside.end()
    else:
        print(f"\ntemporary files: {outside.folder}")
