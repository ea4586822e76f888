"""What one job does. Put your own in its place."""

import os
import signal
import time


def work(what: str) -> None:
    """Do a job. If it raises, that was one of three tries."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise RuntimeError("told to fail")
    time.sleep(float(what))
