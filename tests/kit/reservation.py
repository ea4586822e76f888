"""A reservation, from the outside."""

import contextlib

from tests.kit.http import post


@contextlib.asynccontextmanager
async def endpoint_of(vast, **options):
    async with vast.client(max_poll_interval=1.0, **options) as client:
        yield await client.get_endpoint(vast.endpoint_name)


def worker_at(vast, url):
    return next(worker for worker in list(vast.workers.values()) if worker.url == url)


async def expiration(reservation):
    """The worker's own word on when the session expires, in its clock, which here is ours."""
    about = {"session_id": reservation.session_id, "session_auth": reservation.auth_data}
    return (await post(f"{reservation.url}/session/get", json=about))[1]["expiration"]
