"""Processes of this machine."""

import contextlib
import os
import time
from pathlib import Path

SETTLED = 2.0  # seconds after which a process has the environment that it stays with

_strangers = {}  # for each mark, the processes that don't have it, and when that was seen first


def processes_of(folder):
    """The workers of the LocalVast with that folder: each works in a folder of its own in it."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(place).startswith(f"{folder}/"):
                found.append(place.parent.name)
    return found


def holds(pid, path):
    """Whether a process has this file or folder open."""
    with contextlib.suppress(OSError):
        return any(os.readlink(each) == path for each in Path(f"/proc/{pid}/fd").iterdir())
    return False


def marked(mark):
    """The processes with this text in their environment, and what each is called.

    It is asked often, while a test waits: those that are known to be none of ours aren't read.
    """
    found = {}
    now = time.monotonic()
    strangers = _strangers.setdefault(mark, {})
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    for pid in strangers.keys() - pids:
        del strangers[pid]
    for pid in pids:
        if now - strangers.get(pid, now) > SETTLED:
            continue
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if mark.encode() in environment:
                strangers.pop(pid, None)  # it was seen between its fork and its exec
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
            else:
                strangers.setdefault(pid, now)
    return found


def listening_ports(pids):
    """The TCP ports of this machine on which each process listens, by its pid."""
    ports = {}
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A":
                    ports[f"socket:[{rest[5]}]"] = int(local.rpartition(":")[2], 16)
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError, KeyError):
                    found.setdefault(pid, []).append(ports[os.readlink(name)])
    return found
