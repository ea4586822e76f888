"""A worker of several queues that, when it dies, has lost none of their jobs.

RQ's worker moves a job of its only queue to a second list, where `backlog` finds it until it runs.
Of several queues it takes the job out (RQ 3.0: LPOP), and until the job is registered nobody but
the worker knows of it. Here several queues are asked one after another, in their order.
"""

from typing import Any

from rq import Queue, Worker
from rq.job import Job


class KeepingQueue(Queue):
    @classmethod
    def dequeue_any(cls, queues: Any, timeout: int | None, **options: Any) -> Any:
        if timeout is None:  # with --burst: it doesn't wait for a job
            for queue in queues:
                if taken := super().dequeue_any([queue], None, **options):
                    return taken
            return None
        return super().dequeue_any(queues, timeout, **options)


class KeepingWorker(Worker):
    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        super().prepare_job_execution(job, remove_from_intermediate_queue=True)
