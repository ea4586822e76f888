import asyncio
import os

import job
from redis import Redis
from taskiq_redis import ListQueueBroker, RedisStreamBroker

if os.environ["BROKER"] == "stream":
    broker = RedisStreamBroker(
        os.environ["REDIS_URL"], queue_name="jobs", idle_timeout=5000, unacknowledged_lock_timeout=5
    )
else:
    broker = ListQueueBroker(os.environ["REDIS_URL"], queue_name="jobs")


@broker.task(task_name="work")
def work(job_id, what):
    job.work(job_id, what)


async def put(*arguments):
    await broker.startup()
    await work.kiq(*arguments)
    await broker.shutdown()


def count():
    redis = Redis.from_url(os.environ["REDIS_URL"])
    if redis.type("jobs") != b"stream":
        return [redis.llen("jobs")]
    groups = redis.xinfo_groups("jobs")
    return [groups[0]["lag"], groups[0]["pending"]] if groups else [redis.xlen("jobs"), 0]


if __name__ == "__main__":
    job.answer(lambda *a: asyncio.run(put(*a)), count)
