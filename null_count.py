"""Count a backlog by a shell line, as --backlog and --watch do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from typing import IO

from null_backlog import Jobs, NotCounted, one_line

MAX_OUTPUT = 4096  # bytes of what a command prints
LONGEST_PAUSE = 60.0  # seconds until a command that stays is started again


async def run_backlog(line: str) -> Jobs:
    """Run a shell line that prints how many jobs there are. Raises NotCounted.

    It runs in a session of its own, without a terminal, and nothing of it is left running.
    """
    process = _start(line)
    try:
        output, errors = await _read_to_end(process)
    finally:
        _end_group(process)
    said = _last_line(errors)
    if process.returncode:
        raise NotCounted(_how_it_ended(process.returncode, output) + said)
    return _parse(output, said)


async def watch_backlog(line: str) -> AsyncIterator[Jobs | NotCounted]:
    """Run a shell line that stays and prints a line whenever the number of jobs has changed.

    What has been printed since the last step counts by its last line. When the command ends, it is
    started again after 1, 2, 4 ... 60 s. Close the iterator, and nothing of it is left running.
    """
    in_vain = 0  # starts in a row that didn't stay
    while True:
        began_at = time.monotonic()
        process = _start(line)
        errors = b""
        try:
            async for output, errors in _read_lines(process):
                if output is None:
                    break
                try:
                    yield _parse(output, _last_line(errors))
                except NotCounted as error:
                    yield error
            ended = "it has closed its standard output"
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = _how_it_ended(process.wait(0.1), b"")
                if process.returncode == 0:
                    ended = "it has ended, and --watch wants a command that stays"
        finally:
            _end_group(process)
        yield NotCounted(ended + _last_line(errors))
        if time.monotonic() - began_at >= LONGEST_PAUSE:
            in_vain = 0
        await asyncio.sleep(restart_pause(in_vain))
        in_vain += 1


def restart_pause(in_vain: int) -> float:
    """Return the seconds until the next start, after so many in a row that didn't stay."""
    return min(LONGEST_PAUSE, 2.0 ** min(in_vain, 9))


def _start(line: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["sh", "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout and process.stderr
    for pipe in (process.stdout, process.stderr):
        os.set_blocking(pipe.fileno(), False)
    return process


def _last_line(errors: bytes) -> str:
    """Return what a command wrote to standard error last, for the end of a sentence."""
    last = errors.decode(errors="replace").rstrip().split("\n")[-1]
    return f": {one_line(last)}" if last else ""


def _how_it_ended(status: int, output: bytes) -> str:
    if status < 0:
        return f"killed by signal {-status}"
    if status == 1:
        with contextlib.suppress(NotCounted):
            _parse(output, "")
            return "exit status 1 after a number (grep -c ends so at 0; if it is that, add ; true)"
    return f"exit status {status}"


def _parse(output: bytes, said: str) -> Jobs:
    """Take what a command printed for numbers. Raises NotCounted."""
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
    output = errors = b""
    while True:
        ended = process.poll() is not None
        output += _read(process.stdout) or b""
        errors = (errors + (_read(process.stderr) or b""))[-MAX_OUTPUT:]
        if len(output) > MAX_OUTPUT:
            raise NotCounted("it prints without end")
        if ended:
            return output, errors
        await asyncio.sleep(0.02)


async def _read_lines(
    process: subprocess.Popen[bytes],
) -> AsyncIterator[tuple[bytes | None, bytes]]:
    """Give the last whole line of what has come, and the end of standard error, at each step.

    A line that doesn't end is given once it is too long. None comes last, when the process or its
    standard output has ended.
    """
    assert process.stdout and process.stderr
    open_pipes = [process.stdout, process.stderr]
    unfinished = errors = b""
    while True:
        has_ended = process.poll() is not None
        await _readable(open_pipes, seconds=0.0 if has_ended else 1.0)
        new = _read(process.stdout)
        more = _read(process.stderr) if process.stderr in open_pipes else None
        if more == b"":
            open_pipes.remove(process.stderr)
        errors = (errors + (more or b""))[-MAX_OUTPUT:]
        *lines, unfinished = (unfinished + (new or b"")).split(b"\n")
        if len(unfinished) > MAX_OUTPUT:
            lines, unfinished = [unfinished[:MAX_OUTPUT]], b""
        if lines:
            yield lines[-1], errors
        if new == b"" or (new is None and has_ended):
            yield None, errors
            return


async def _readable(pipes: list[IO[bytes]], seconds: float) -> None:
    """Wait until something has come by one of the pipes, or one was closed; so long at most."""
    loop = asyncio.get_running_loop()
    some: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not some.done():
            some.set_result(None)

    for pipe in pipes:
        loop.add_reader(pipe.fileno(), wake)
    try:
        await asyncio.wait({some}, timeout=seconds)
    finally:
        for pipe in pipes:
            loop.remove_reader(pipe.fileno())


def _read(pipe: IO[bytes]) -> bytes | None:
    """Read what is there now, 64 KiB at most, as a pipe holds. None: nothing yet; b"": closed."""
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), 1 << 16)
    return None


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
