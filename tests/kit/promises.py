"""What each example promises, as checks for their tests."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import psutil

QUEUES = ("high", "low")


def check_a_run_in_which_much_goes_wrong(
    example,
    folder,
    *,
    end,
    dies=0,
    after_kill=None,
    queues=(*QUEUES, "other"),
    counted_by="--watch",
    **variables,
):
    """Eighteen jobs of a second in two queues, two that never end well, and a consumer is killed.

    All its processes are killed, once each consumer has a job in hand. That may be two of three:
    reservations that end within a second may be on Vast's list together, and one of them counts as
    somebody else's for a while. `after_kill` makes up for the time that the system takes to give a
    dead worker's job back. `end` is what the last count must be, and `dies` how many consumers the
    job takes with it that kills its process.
    """
    high, low, other = queues
    example.put(1, "fail", queue=high)
    example.put(1, "kill", queue=high)
    example.put(9, queue=high)
    example.put(9, queue=low)
    example.put(1, 0, queue=other)
    options = ("--max", "3", "--settle", "3", "--once")
    with example.command(
        folder, *options, queues=(high, low), counted_by=counted_by, **variables
    ) as run:
        with example.watch(high, low) as watch:
            run.until(lambda: watch.lines and watch.lines[-1][1] == max(2, len(run.consumers())))
        run.kill_consumer()
        if after_kill:
            run.until(after_kill)
        assert run.status() == 0, run.said()
        assert run.most_workers == 3
        assert example.processes() == []
    assert example.backlog(high, low) == end
    assert example.outcomes(high, low) == (18, 2)
    assert example.backlog(other)[0] == 1
    # Three workers, one more for each consumer that died. As many again may have found nothing to
    # do: a count is a look old, and on a busy machine a job that was seen waiting is taken by then.
    needed = 3 + 1 + dies
    assert needed - 2 <= run.said().count("null_consumer: reserved ") <= 2 * needed


def check_named_queues_without_a_worker(example, *, last=(0,), ends=True):
    """They count together, another is left alone, and one that isn't there yet counts 0.

    `last` is the third number of a queue that is new, or nothing. `ends` says whether the consumer
    ends by itself when nothing waits.
    """
    all_done = (0, 0, *(3 for _ in last))
    assert example.backlog(*QUEUES) == (0, 0, *last)
    with example.watch(*QUEUES) as watch:
        example.put(2, 0, queue="high")
        example.put(1, 0, queue="low")
        example.put(1, 0, queue="other")
        watch.says(3, 0, *last)
        with example.consumer(*QUEUES) as consumer:
            if not ends:
                watch.says(*all_done, timeout=60)
                consumer.terminate()
            assert consumer.wait(60) == 0
        watch.says(*all_done)
    assert example.backlog(*QUEUES) == all_done
    assert example.outcomes(*QUEUES) == (3, 0)
    assert example.backlog() == (0, 0, *last)
    assert example.backlog("other")[:2] == (1, 0)


def check_that_a_late_job_is_done_before_once_ends(example, folder, **variables):
    """A job was put in that is due in 15 s. `--settle` has its default, which is longer."""
    assert example.backlog()[:2] == (0, 0)
    options = ("--once", "--max", "1")
    with example.command(folder, *options, counted_by="--watch", **variables) as run:
        assert run.status() == 0, run.said()
    assert example.outcomes() == (1, 0), run.said()


def check_the_watch(example, url, *, last=(0,)):
    """It prints a change at once, what it has at least each five seconds, and ends with its server.

    `url` is the server's, `last` as above.
    """
    example.put(1, 0)
    with example.watch() as watch:
        watch.says(1, 0, *last)
        # On a busy machine a look, or a job that is put in, may take as long as a watch is silent:
        # then several are put in at the same time.
        number = 1
        for more in (1, 4, 4, 4, 4):
            with ThreadPoolExecutor() as pool:
                list(pool.map(partial(example.put, 1), [0] * more))
            number += more
            watch.says(number, 0, *last)
            if watch.tells_changes_at_once():
                break
        assert watch.tells_changes_at_once(), watch.times
        lines = len(watch.lines)
        began_at = time.monotonic()
        example.until(lambda: len(watch.lines) > lines, 20)
        assert time.monotonic() - began_at < 10
        end_server(url)
        status, errors = watch.ends()
    assert status == 1
    assert len(errors.splitlines()) == 1, errors


def end_server(url):
    """SIGKILL the server that listens on the port of a URL."""
    port = urlsplit(url).port
    for connection in psutil.net_connections("tcp4"):
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            psutil.Process(connection.pid).kill()
