import os

import job
from huey import RedisHuey

huey = RedisHuey("jobs", url=os.environ["REDIS_URL"])


@huey.task(retries=2)
def work(job_id, what):
    job.work(job_id, what)


if __name__ == "__main__":
    import tasks  # a task's name is that of its module: not __main__.work

    job.answer(tasks.work, lambda: [huey.pending_count(), huey.scheduled_count()])
