"""`null_client.py` as a command, in a process of its own."""

import asyncio
import contextlib
import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from tests.kit.environment import BARE, HERE
from tests.kit.forking import closing
from tests.kit.waiting import eventually


class Command:
    """`null_client.py` in a process of its own, pointed at a LocalVast instead of Vast."""

    DRIVER = (
        "import sys, vastai, null_client, null_local\n"
        "vastai.Serverless = lambda key, instance, **options: null_local.LocalClient(\n"
        "    key, autoscaler_url={url!r}, webserver_url={url!r}, **options)\n"
        "sys.exit(null_client.main(sys.argv[1:]))"
    )

    def __init__(
        self, *arguments, vast=None, environment=None, driver=None, reads=math.inf, output="pipe"
    ):
        """Start it; `output` is where its standard output goes.

        "pipe", "full" (no space left), "stalled" (a pipe that nobody empties), a descriptor, the
        size of a terminal: (columns, lines); or how a shell closes what: ">&- 2>&-".
        """
        environment = (
            BARE
            | {"PYTHONPATH": str(HERE), "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
            | (environment or {})
        )
        command = [HERE / "null_client.py"]
        if vast or driver:
            command = ["-c", driver or self.DRIVER.format(url=vast.url)]
        if vast:
            environment = {
                "VAST_API_KEY": vast.api_key,
                "VAST_ENDPOINT": vast.endpoint_name,
            } | environment
        command = [sys.executable, *map(str, command), *arguments]
        if isinstance(output, str) and "&-" in output:
            command = closing(output, *command)
        self._unread, self.terminal, stdout = None, None, subprocess.PIPE
        if output == "full":
            stdout = os.open("/dev/full", os.O_WRONLY)
        elif output == "stalled":
            self._unread, stdout = os.pipe()
            os.set_blocking(stdout, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(stdout, b"x" * 4096)
            os.set_blocking(stdout, True)
        elif isinstance(output, int):
            stdout = output
        elif isinstance(output, tuple):
            master, stdout = pty.openpty()
            fcntl.ioctl(stdout, termios.TIOCSWINSZ, struct.pack("HHHH", output[1], output[0], 0, 0))
            self.terminal = os.fdopen(master, "rb", buffering=0)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if stdout is not subprocess.PIPE:
            os.close(stdout)
        self.lines, self.errors, self._reads = [], [], reads
        pipes = [self.terminal or self.process.stdout, self.process.stderr]
        self._output = [
            asyncio.ensure_future(asyncio.to_thread(self._read, pipe)) for pipe in pipes if pipe
        ]

    def _read(self, pipe):
        lines = self.errors if pipe is self.process.stderr else self.lines
        with contextlib.suppress(OSError):  # EIO: the other side of a terminal is closed
            for line in pipe:
                lines.append(line.decode().rstrip("\r\n"))
                if lines is self.lines and len(lines) >= self._reads:
                    pipe.close()
                    break

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.process.kill()
        await self.status()
        for pipe in filter(None, (self.process.stdout, self.process.stderr, self.terminal)):
            pipe.close()
        if self._unread is not None:
            os.close(self._unread)

    async def status(self, timeout=60):
        status = await asyncio.to_thread(self.process.wait, timeout)
        await asyncio.gather(*self._output)
        return status

    def said(self, pattern):
        return re.search(pattern, "\n".join(self.lines))

    async def says(self, pattern, timeout=40):
        """Wait for the pattern in the output; the match. Fails at once when the command ends."""
        return await eventually(lambda: self.said(pattern), timeout, self._epitaph)

    def _epitaph(self):
        if self.process.poll() is None or not all(reading.done() for reading in self._output):
            return None
        last = "\n".join([*self.lines[-15:], *self.errors[-15:]])
        return f"the command ended with status {self.process.returncode}; its last lines:\n{last}"
