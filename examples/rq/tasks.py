"""What the jobs do: whatever yours do, these only show what may happen to them."""

import os
import signal
import time


def work(seconds: float) -> None:
    time.sleep(seconds)


def fail() -> None:
    raise RuntimeError("told to fail")


def kill() -> None:
    """Do what the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
