import asyncio
import os

import job
from saq import Queue

queue = Queue.from_url(os.environ["REDIS_URL"], name="jobs")


async def work(ctx, *, job_id, what):
    await job.work_async(job_id, what)


settings = {
    "queue": queue,
    "functions": [work],
    "concurrency": 1,
    "burst": True,
    "dequeue_timeout": 1,
    "shutdown_grace_period_s": int(os.environ.get("GRACE", 0)) or None,
}


async def put(job_id, what):
    await queue.connect()
    await queue.enqueue("work", job_id=job_id, what=what, retries=3, timeout=600, heartbeat=5)


async def count():
    await queue.connect()
    return [await queue.count(kind) for kind in ("queued", "active", "incomplete")]


if __name__ == "__main__":
    job.answer(lambda *a: asyncio.run(put(*a)), lambda: asyncio.run(count()))
