"""The arq worker's settings, with what makes it safe to lose a worker, and the jobs."""

import asyncio
import os
import signal
from typing import Any

from arq import Retry
from arq.connections import RedisSettings

# Seconds that a job may take. A job whose worker died comes back 10 s after that.
JOB_TIMEOUT = int(os.environ.get("JOB_TIMEOUT", 300))
TRIES = 3


async def work(ctx: dict[str, Any], seconds: float) -> None:
    await asyncio.sleep(seconds)


async def fail(ctx: dict[str, Any]) -> None:
    """Fail. arq tries a job again only if the job raises Retry."""
    if ctx["job_try"] < TRIES:
        raise Retry
    raise RuntimeError("told to fail")


async def kill(ctx: dict[str, Any]) -> None:
    """Do what the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


class WorkerSettings:
    functions = [work, fail, kill]
    redis_settings = RedisSettings.from_dsn(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"))
    max_jobs = 1  # at once
    max_tries = TRIES
    job_timeout = JOB_TIMEOUT
    keep_result = 24 * 3600  # seconds
    # Seconds for which SIGTERM lets a job go on; without, the job is given back. Keep it under
    # NULL_GRACE (30).
    job_completion_wait = 25
