"""The Celery application, with what makes it safe to lose a worker, and the tasks."""

import os
import signal
import time

from celery import Celery

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
BROKER_URL = os.environ.get("BROKER_URL", REDIS_URL)
# Seconds after which Redis gives a job that was taken and not finished to the next worker, because
# its own has died. Make it longer than your longest job: a job that takes longer is done twice.
VISIBILITY_TIMEOUT = float(os.environ.get("VISIBILITY_TIMEOUT", 3600))

app = Celery("tasks", broker=BROKER_URL, backend=REDIS_URL)
app.conf.update(
    broker_transport_options={
        "visibility_timeout": VISIBILITY_TIMEOUT,
        # Seconds for which a worker that is killed while it gives lost jobs back holds up others.
        "unacked_mutex_expire": 10,
    },
    task_default_queue="jobs",
    result_extended=True,  # `results` wants to know a job's queue
    task_acks_late=True,  # taken out when it is done, not when it begins
    worker_prefetch_multiplier=1,  # none is kept from other workers while this one is at work
    broker_connection_retry_on_startup=False,  # no machine is held for a Redis that is away
)

# Three tries in all, without a pause: a retry with a countdown is held by a worker until it is due.
three_tries = {"autoretry_for": (Exception,), "max_retries": 2, "default_retry_delay": 0}


@app.task(**three_tries)
def work(seconds: float) -> None:
    time.sleep(seconds)


@app.task(**three_tries)
def fail() -> None:
    raise RuntimeError("told to fail")


@app.task(**three_tries)
def kill() -> None:
    """Do what the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
