"""Processes of this machine."""

import contextlib
import os
from pathlib import Path


def processes_of(folder):
    """The workers of the LocalVast with that folder, which is named in their arguments."""
    found = []
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in arguments.read_bytes():
                found.append(arguments.parent.name)
    return found


def holds(pid, path):
    """Whether a process has this file or folder open."""
    with contextlib.suppress(OSError):
        return any(os.readlink(each) == path for each in Path(f"/proc/{pid}/fd").iterdir())
    return False


def marked(mark):
    """The processes with this text in their environment, and what each is called."""
    found = {}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                name = environment.with_name("comm").read_text().strip()
                found[int(environment.parent.name)] = name
    return found
