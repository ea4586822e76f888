"""A follow() in this process, with a backlog that the test sets."""

import asyncio
import contextlib

from null_backlog import Progress, follow
from tests.kit.reservation import endpoint_of
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS


class Following:
    """A follow() with a backlog that the test sets."""

    def __init__(self):
        self.jobs = (
            0,
            0,
        )  # what the backlog answers, or a function for it; an exception: what it raises
        self.looks = 0
        self.opened = 0
        self.said = []
        self.progress = Progress()
        self.task = None

    async def backlog(self):
        self.looks += 1
        if self.jobs == "hangs":
            await asyncio.sleep(3600)
        if isinstance(self.jobs, Exception):
            raise self.jobs
        return self.jobs() if callable(self.jobs) else self.jobs

    def note(self, progress):
        self.opened += max(0, progress.own - self.progress.own)
        self.progress = progress

    @property
    def numbers(self):
        return self.progress.own, self.progress.asked

    async def looks_twice(self):
        """Both begun after this call."""
        last = self.looks + 2
        await eventually(lambda: self.looks > last)


@contextlib.asynccontextmanager
async def following(vast, most=WORKERS, jobs=(0, 0), every=0.2, **options):
    this = Following()
    this.jobs = jobs
    async with endpoint_of(vast) as endpoint:
        this.endpoint = endpoint
        this.task = asyncio.create_task(
            follow(
                endpoint,
                this.backlog,
                most,
                every=every,
                on_progress=this.note,
                on_trouble=this.said.append,
                **options,
            )
        )
        try:
            yield this
        finally:
            this.task.cancel()
            await asyncio.wait({this.task})
