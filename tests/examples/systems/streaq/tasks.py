import os

import anyio
import job
from streaq import Worker

worker = Worker(redis_url=os.environ["REDIS_URL"], queue_name="jobs", concurrency=1)


@worker.task(timeout=600)
async def work(job_id, what):
    await anyio.sleep(job.begin(job_id, what))
    job.note(f"end {job_id}")


async def put(job_id, what):
    async with worker:
        await work.enqueue(job_id, what)


async def count():
    async with worker:
        return [await worker.queue_size()]


if __name__ == "__main__":
    job.answer(lambda *a: anyio.run(put, *a), lambda: anyio.run(count))
