"""The Procrastinate application, with what makes it safe to lose a worker, and the tasks."""

import os
import signal
import time

from procrastinate import App, PsycopgConnector

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://127.0.0.1:5432/postgres")
# Seconds without a heartbeat after which a worker is taken for dead.
STALLED = float(os.environ.get("STALLED", 30))
RETRIES = 2  # three tries in all

app = App(
    connector=PsycopgConnector(conninfo=DATABASE_URL, timeout=10),
    worker_defaults={
        "update_heartbeat_interval": STALLED / 3,
        "stalled_worker_timeout": STALLED,
    },
)


@app.task(retry=RETRIES)
def work(seconds: float) -> None:
    time.sleep(seconds)


@app.task(retry=RETRIES)
def fail() -> None:
    raise RuntimeError("told to fail")


@app.task(retry=RETRIES)
def kill() -> None:
    """Do what the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
