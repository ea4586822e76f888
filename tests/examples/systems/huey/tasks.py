import os

import job
from huey import RedisHuey

huey = RedisHuey("jobs", url=os.environ["REDIS_URL"])


@huey.task(retries=2, name="work")
def work(job_id, what):
    job.work(job_id, what)


if __name__ == "__main__":
    job.answer(work, lambda: [huey.pending_count(), huey.scheduled_count()])
