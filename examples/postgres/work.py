"""What one job does. Put your own in its place."""

import os
import signal
import time


def work(what: str) -> None:
    """Do a job. What it raises makes it a try in vain."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise RuntimeError("told to fail")
    time.sleep(float(what))
