"""Count a backlog by a shell line, as --backlog does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from typing import IO

from null_backlog import Jobs, NotCounted, one_line

MAX_OUTPUT = 4096  # bytes of what a command prints


async def run_backlog(line: str) -> Jobs:
    """What a shell line prints. Raises NotCounted.

    It runs in a session of its own, without a terminal, and nothing of it is left running.
    """
    process = subprocess.Popen(
        ["sh", "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = await _read_to_end(process)
    finally:
        _end_group(process)
    last = (errors.decode(errors="replace").split("\n") or [""])[-1]
    said = f": {one_line(last)}" if last else ""
    if process.returncode:
        ended = f"exit status {process.returncode}"
        if process.returncode < 0:
            ended = f"killed by signal {-process.returncode}"
        raise NotCounted(ended + said)
    words = output.decode(errors="replace").split()
    if not words:
        raise NotCounted(f"it printed nothing{said}")
    if len(words) > 3 or not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        printed = f"{' '.join(words)!r:.60}"
        raise NotCounted(f"it printed {printed}, not one to three whole numbers{said}")
    return Jobs(*map(int, words))


async def _read_to_end(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What it writes to standard output, and the end of what it writes to standard error.

    Until it ends, not until these are closed: something that it has left running may hold them.
    """
    assert process.stdout and process.stderr
    for pipe in (process.stdout, process.stderr):
        os.set_blocking(pipe.fileno(), False)
    output = errors = b""
    while True:
        ended = process.poll() is not None
        output += _read(process.stdout)
        errors = (errors + _read(process.stderr)).rstrip()[-MAX_OUTPUT:]
        if len(output) > MAX_OUTPUT:
            raise NotCounted("it prints without end")
        if ended:
            return output, errors
        await asyncio.sleep(0.02)


def _read(pipe: IO[bytes]) -> bytes:
    """What is there now: 64 KiB at most, as a pipe holds."""
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), 1 << 16)
    return b""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in a driver
        process.wait(1)
    _reap_group(process.pid)


def _reap_group(group: int) -> None:
    """Reap the orphans of a group that was killed: they are ours where we are PID 1."""
    deadline = time.monotonic() + 1
    with contextlib.suppress(ChildProcessError):  # there is none, or none any more
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG) == (0, 0):
                time.sleep(0.005)  # it is still being killed
