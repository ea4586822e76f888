import os
import signal
import sys

import greenstalk
import job

TTR = 10  # seconds that a worker may keep a job
stopping = False


def stop(*_):
    global stopping
    stopping = True


def connect():
    address = ("127.0.0.1", int(os.environ["PORT"]))
    return greenstalk.Client(address, use="jobs", watch="jobs")


def consume():
    signal.signal(signal.SIGTERM, stop)
    with connect() as queue:
        while not stopping:
            try:
                taken = queue.reserve(timeout=0)
            except greenstalk.TimedOutError:
                return
            job.work(*taken.body.split())
            queue.delete(taken)


def put(job_id, what):
    with connect() as queue:
        queue.put(f"{job_id} {what}", ttr=TTR)


def count():
    with connect() as queue:
        stats = queue.stats_tube("jobs")
    return [stats["current-jobs-ready"], stats["current-jobs-reserved"]]


if __name__ == "__main__":
    if sys.argv[1] == "consume":
        consume()
    else:
        job.answer(put, count)
