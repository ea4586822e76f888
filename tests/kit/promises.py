"""What each example promises that needs no worker, as checks for their tests."""

import time

import psutil


def check_that_named_queues_count_together_and_others_are_left_alone(example, *, done=True):
    """`done` says whether the example's system knows how many jobs were ever done."""
    last = (0,) if done else ()
    assert example.backlog("high", "low") == (0, 0, *last)
    example.put(2, 0, queue="high")
    example.put(1, 0, queue="low")
    example.put(1, 0, queue="other")
    assert example.backlog("high", "low") == (3, 0, *last)
    assert example.backlog() == (0, 0, *last)
    with example.consumer("high", "low") as consumer:
        assert consumer.wait(60) == 0
    assert example.backlog("high", "low") == (0, 0, *(3 for _ in last))
    assert example.outcomes("high", "low") == (3, 0)
    assert example.backlog("other") == (1, 0, *last)


def check_the_watch(example, end_server, *, last=(0,)):
    """It prints a change at once, what it has at least each five seconds, and ends with its server.

    `last` is what the third number is, or nothing.
    """
    example.put(1, 0)
    with example.watch() as watch:
        watch.says(1, 0, *last)
        example.put(1, 0)
        assert watch.says(2, 0, *last) < 3  # before it would say what it has already said
        lines = len(watch.lines)
        began_at = time.monotonic()
        example.until(lambda: len(watch.lines) > lines, 20)
        assert time.monotonic() - began_at < 10
        end_server()
        status, errors = watch.ends()
    assert status == 1
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("backlog: "), errors


def end_listener(port):
    """SIGKILL the server that listens on a port."""
    for connection in psutil.net_connections("tcp4"):
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            psutil.Process(connection.pid).kill()
