"""LocalVast for all tests: its workers are shared, and each test finds all of them free."""

import contextlib
import signal

import aiohttp
import pytest

from tests.kit.environment import BARE
from tests.kit.forking import forking, install
from tests.kit.http import post
from tests.kit.vast import FaultyVast
from tests.kit.waiting import eventually
from tests.kit.worker import WORKERS, epitaph

pytest_plugins = ["tests.kit.outside"]

# Ignored in a run in the background, and so by all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
install(BARE)


LONG = ("examples/", "client/test_backlog.py", "worker/test_clock", "test_deploy", "test_its_jobs")


def pytest_collection_modifyitems(items):
    """All files side by side: what keeps the processors busy runs beside what waits.

    What takes long isn't among the last, where all other processes would wait for it.
    """
    long = [item for item in items if any(word in item.nodeid for word in LONG)]
    places = {item: 0.7 * index / len(long) for index, item in enumerate(long)}
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    for number, of_file in enumerate(files.values()):
        for index, item in enumerate(of_file):
            places.setdefault(item, (index + number / len(files)) / len(of_file))
    items.sort(key=places.get)


def pytest_unconfigure():
    forking.end()


@pytest.fixture(autouse=True)
def real_starts(request):
    """A test that is about starting starts its programs as anybody does."""
    if request.node.get_closest_marker("starts"):
        with forking.paused():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
async def shared_vast():
    async with FaultyVast(max_workers=WORKERS, inactivity_timeout=3600, control_port=None) as vast:
        yield vast


@pytest.fixture
async def vast(shared_vast):
    """LocalVast with its workers ready and free, and an empty record."""
    await eventually(lambda: all(epitaph(each) is None for each in shared_vast.workers.values()))
    for surplus in list(shared_vast.workers.values())[WORKERS:]:  # an earlier test's own
        surplus.send_signal(signal.SIGKILL)
    await eventually(lambda: len(shared_vast.workers) <= WORKERS)
    for _ in range(WORKERS - len(shared_vast.workers)):
        shared_vast.start_worker()
    await eventually(lambda: all(worker.free for worker in shared_vast.workers.values()))
    shared_vast.begin_anew()
    yield shared_vast
    shared_vast.begin_anew()
    for worker in list(shared_vast.workers.values()):
        # It may be gone, and its port somebody else's.
        with contextlib.suppress(aiohttp.ClientError, ValueError):
            await post(f"{worker.control_url}/release")


@pytest.fixture
def worker(vast):
    return next(iter(vast.workers.values()))


@pytest.fixture
async def small_vast():
    """A LocalVast of its own, which scales back down."""
    async with FaultyVast(inactivity_timeout=4, control_port=None) as vast:
        yield vast
