"""What a job does in each of the Python systems, and how `try` asks them: put ID WHAT, or count."""

import asyncio
import os
import signal
import sys
import time


def note(line):
    with open(os.environ["LOG"], "a") as log:
        log.write(line + "\n")


def begin(job_id, what):
    """Note that a job begins, and how many seconds it is to take."""
    note(f"begin {job_id}")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return float(what)


def work(job_id, what):
    time.sleep(begin(job_id, what))
    note(f"end {job_id}")


async def work_async(job_id, what):
    await asyncio.sleep(begin(job_id, what))
    note(f"end {job_id}")


def answer(put, count):
    """Put a job in, or print numbers of the queue."""
    if sys.argv[1] == "put":
        put(*sys.argv[2:])
    else:
        print(*count())
