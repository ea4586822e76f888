"""null_consumer.py as a test has it: the wrapper, its guard, and what COMMAND starts.

    async with consumer(worker, tmp_path, "--grace", "3", command="sleep 60") as running:
        await eventually(lambda: running.family())

Its processes are found by a variable that all that is started here inherits, whatever session or
group they make for themselves. At the end of the block nothing of it may be left but by a kill.
"""

import asyncio
import contextlib
import re
import signal
import sys
import uuid
from pathlib import Path

import psutil

from tests.kit.environment import BARE, HERE
from tests.kit.processes import marked
from tests.kit.waiting import eventually
from tests.kit.worker import lease

MARK = "CONSUMER_OF_THE_TEST"
SCRIPT = HERE / "null_consumer.py"
IGNORES = "trap : TERM; while :; do sleep 0.1; done"  # a shell line that SIGTERM doesn't end


class Running:
    def __init__(self, folder, process):
        self.process = process
        self.mark = process.mark
        self._log = folder / f"{self.mark}.log"

    def alive(self):
        """All its processes but zombies."""
        found = []
        for pid in marked(self.mark):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.status() != "zombie":
                    found.append(process)
        return found

    def guards(self):
        own = (str(SCRIPT), "driver.py")
        found = []
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                if process.pid != self.process.pid and _runs(process, own):
                    found.append(process)
        return found

    def family(self):
        """The processes of COMMAND."""
        own = {self.process.pid, *(guard.pid for guard in self.guards())}
        return [process for process in self.alive() if process.pid not in own]

    def output(self):
        return self._log.read_text()

    def said(self, text=""):
        """Its own lines that hold this text."""
        own = [line for line in self.output().splitlines() if line.startswith("null_consumer: ")]
        return [line.removeprefix("null_consumer: ") for line in own if text in line]

    def printed(self, text):
        """How often COMMAND has printed this line."""
        return self.output().splitlines().count(text)

    async def until_said(self, text):
        return await eventually(lambda: self.said(text), epitaph=self._epitaph)

    async def until_printed(self, text, times=1):
        await eventually(lambda: self.printed(text) >= times, epitaph=self._epitaph)

    def _epitaph(self):
        if self.process.returncode is None:
            return None
        return f"it ended with status {self.process.returncode}, and said:\n{self.output()}"

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def is_up(self):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            caught = int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16)
            return bool(caught >> (signal.SIGTERM - 1) & 1)
        return False

    async def status(self, timeout=40.0):
        return await asyncio.wait_for(self.process.wait(), timeout)


async def held(worker, session_id):
    """Whether this is the worker's session."""
    return (await lease(worker))["session_id"] == session_id


def _runs(process, scripts):
    return any(part.endswith(scripts) for part in process.cmdline()[1:2])


@contextlib.asynccontextmanager
async def consumer(
    worker,
    folder,
    *options,
    command,
    script=SCRIPT,
    under=(),
    pass_fds=(),
    output=None,
    **environment,
):
    """`command` is a shell line, or a list. `under` is a program that runs the wrapper."""
    mark = uuid.uuid4().hex
    line = ["sh", "-c", command] if isinstance(command, str) else command
    variables = {**BARE, MARK: mark, "NULL_CONTROL_PORT": str(worker.control_port)}
    with open(folder / f"{mark}.log", "ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(*under, sys.executable, script, *options, "--", *line),
            cwd=folder,
            env={**variables, **environment},
            stdout=log if output is None else output,
            stderr=log if output is None else output,
            pass_fds=pass_fds,
        )
    process.mark = mark
    running = Running(folder, process)
    try:
        # It is there once it has handlers of its own; until then it tries whether it can run here.
        await eventually(lambda: process.returncode is not None or running.is_up())
        yield running
    finally:
        # The wrapper first: what it still has it would otherwise start again.
        for process in sorted(running.alive(), key=lambda one: one.pid != running.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await running.process.wait()
        await eventually(lambda: not running.alive())


def driver(folder, *lines):
    """A script that changes null_consumer, then runs it."""
    script = folder / "driver.py"
    head = ("import sys", f"sys.path.insert(0, {str(HERE)!r})", "import null_consumer")
    script.write_text("\n".join((*head, *lines, "sys.exit(null_consumer.main())")))
    return script
