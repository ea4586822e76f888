"""null_consumer.reservations() and other processes, libraries, and the clock."""

import signal

import pytest

from tests.consumer.test_reservations import program
from tests.kit.waiting import eventually
from tests.kit.worker import create, is_free

pytestmark = pytest.mark.anyio


async def test_a_forked_child_has_no_lease_and_releases_none(vast, worker, tmp_path):
    body = """
import signal
before = signal.getsignal(signal.SIGTERM)  # the default
child = None
for lease in reservations():
    with lease:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            time.sleep(3)
            print("held", bool(lease))
        else:
            assert not lease and signal.getsignal(signal.SIGTERM) == before
    if child:
        break
if child == 0:
    print("the child's loop is over")
"""
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker, lifetime=2)
        await running.until_printed("held ")
        lines = running.output().splitlines()  # from 3.12 on Python warns of the fork between them
        assert [lines[0], lines[-1]] == ["the child's loop is over", "held True"]
        assert await running.status() == 0
        assert await is_free(worker)


async def test_a_pool_whose_job_raises_is_ended_and_the_reservation_with_it(vast, worker, tmp_path):
    body = """
import multiprocessing
def job(number):
    if number:
        raise ValueError(number)
    time.sleep(600)
for lease in reservations():
    try:
        with lease:
            with multiprocessing.get_context("fork").Pool(2) as pool:
                for _ in pool.imap_unordered(job, [0, 1]):
                    pass
    except ValueError:
        print("raised")
        break
"""
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker, lifetime=4)
        await running.until_printed("raised")
        assert await running.status() == 0
        assert await is_free(worker)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_a_spawned_child_takes_no_reservation(vast, worker, tmp_path, method):
    body = f"""
import multiprocessing
def job():
    print("job of the child")
for lease in reservations():
    with lease:
        print("taken")
        child = multiprocessing.get_context("{method}").Process(target=job)
        child.start()
        child.join()
        print("the child ended with", child.exitcode)
    break
"""
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker)
        await running.until_printed("the child ended with 1")
        assert running.output().count("taken") == 1
        assert "SettingsError: a process that multiprocessing has spawned can't" in running.output()
    guarded = body.replace("for lease", "def main():\n  for lease").replace("\n    ", "\n      ")
    guarded = guarded.replace('\n      print("job', '\n    print("job')
    guarded += "if __name__ == '__main__':\n    main()\n"
    async with program(worker, tmp_path, guarded) as running:
        await eventually(lambda: is_free(worker))
        await create(vast, worker)
        await running.until_printed("the child ended with 0")
        assert "job of the child" in running.output()


@pytest.mark.parametrize("when", ["in the same reservation", "in the next one"])
async def test_sigterm_that_a_library_has_taken_is_taken_anew(vast, worker, tmp_path, when):
    body = """
import signal
first = True
for lease in reservations():
    with lease:
        while lease:
            if first:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                first = False
                if NEXT:
                    break
                continue
            print("job began")
            time.sleep(3)
            print("job done")
print("done")
"""
    body = body.replace("NEXT", str(when == "in the next one"))
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker)
        if when == "in the next one":
            await eventually(lambda: is_free(worker))
            await create(vast, worker)
        await running.until_printed("job began")
        running.process.send_signal(signal.SIGTERM)
        assert await running.status() == 0
        assert running.output().endswith("job done\ndone\n")


async def test_a_lease_whose_time_is_over_by_the_clock_is_false(vast, worker, tmp_path):
    # A job that holds Python's lock: nobody could renew, or hear of the end.
    body = """
import ctypes, sys
sys.setswitchinterval(60)
for lease in reservations():
    with lease:
        print("taken")
        assert lease
        ctypes.PyDLL(None).sleep(5)
        print("after", bool(lease))
"""
    async with program(worker, tmp_path, body) as running:
        await create(vast, worker, lifetime=2)
        await running.until_printed("after")
        assert "after False" in running.output()
