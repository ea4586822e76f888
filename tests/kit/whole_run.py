"""What each queue of examples/ promises, on its real server, with the names of its queues.

All tests of a run may share one server: each uses queues of its own.
"""

import contextlib
import re
import socket
import threading
import uuid
from urllib.parse import urlsplit

from tests.kit.example import Example

AT_ONCE, LATE = 4, 5  # reservations at most, by when a killed worker's job comes back
ONCE = ("--max", "3", "--once")


def queue_names(count):
    """Names that no other test uses on the same server."""
    return [f"q{uuid.uuid4().hex[:8]}" for _ in range(count)]


def reservations(run):
    """How many consumers of this run were given a reservation."""
    return run.said().count("null_consumer: reserved session=")


@contextlib.contextmanager
def way_to(url, last=None):
    """Yield the URL of a port that leads to this server, and what cuts the connections there.

    What is sent after something that matches `last`, in bytes, doesn't arrive, nor does any answer.
    """
    parts = urlsplit(url)
    ends, over = [], threading.Event()

    def accept():
        with contextlib.suppress(OSError):
            while True:
                pair = listener.accept()[0], socket.create_connection((parts.hostname, parts.port))
                ends.extend(pair)
                for way in (pair, pair[::-1]):
                    arguments = (*way, last, over)
                    threading.Thread(target=_forward, args=arguments, daemon=True).start()

    def cut():
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield url.replace(f":{parts.port}", f":{listener.getsockname()[1]}"), cut
        listener.shutdown(socket.SHUT_RDWR)
    cut()
    for end in ends:
        end.close()


def _forward(source, target, last, over):
    with contextlib.suppress(OSError):
        while received := source.recv(65536):
            if not over.is_set():
                target.sendall(received)
            if last and re.search(last, received):
                over.set()


def check_that_jobs_are_done_once_though_a_consumer_is_killed(example, folder, most, *, ends=True):
    """Eighteen jobs of two queues on three workers; the third queue of the server isn't touched.

    `ends` says whether the consumer ends by itself when nothing waits. There are `most`
    reservations: one for each worker, one more in the place of the consumer that is killed,
    and one more for its job where that comes back only when all others are done.
    """
    high, low, other = queue_names(3)
    example.put(9, 2, queue=high)  # so long that three are at work at once on a crowded machine
    example.put(9, 2, queue=low)
    example.put(2, queue=other)
    assert example.backlog(high, low, "nobody-has-made-it")[0] == 18
    variables = {} if ends else {"NULL_EMPTY": f"examples/{example.name}/backlog {high} {low}"}
    options = (*ONCE, "--settle", "3")
    with example.command(
        folder, *options, queues=(high, low), counted_by="--watch", **variables
    ) as run:
        with example.watch(high, low) as watch:
            run.until(lambda: len(run.consumers()) == 3)  # each in a session of its own
            watch.until(lambda latest: latest[0] <= 15)
        run.kill_consumer()
        assert run.status() == 0
        assert example.processes() == []
        assert reservations(run) <= most, run.said()
    assert example.outcomes(high, low) == (18, 0)
    assert sum(example.backlog(high, low)[:2]) == 0
    assert example.backlog(other)[0] == 2
    return high, low


def check_that_bad_jobs_go_aside_and_late_ones_are_done(example, folder, put_late):
    """A job that fails, a job that kills its worker, and a job that is due in 15 seconds.

    `--settle` has its default: the run goes on for that long after the last job that is seen.
    There are nine reservations at most: three at first, one for each time that a job comes back,
    one for the late job, and one for a count between two of the first jobs' starts.
    """
    (queue,) = queue_names(1)
    example.put(1, "fail", queue=queue)
    example.put(1, "kill", queue=queue)
    example.put(2, queue=queue)
    put_late(queue, 15)
    with example.command(folder, *ONCE, queues=(queue,), counted_by="--watch") as run:
        assert run.status() == 0
        assert example.processes() == []
        assert reservations(run) <= 9, run.said()
    assert example.outcomes(queue) == (3, 2)
    assert sum(example.backlog(queue)[:2]) == 0
    return queue


def check_that_the_watch_tells_of_each_change(example, variable):
    """It begins before its queue is there, and ends when its connection is cut.

    `variable` is where the executables find the server's URL.
    """
    (queue,) = queue_names(1)
    with way_to(example.environment[variable]) as (url, cut):
        through = Example(example.name)
        through.environment = {**example.environment, variable: url}
        with through.watch(queue) as watch:
            example.until(lambda: watch.lines)
            example.put(2, 0, queue=queue)
            example.until(lambda: watch.lines[-1][0] == 2)
            with example.consumer(queue) as consumer:
                assert consumer.wait(60) == 0
            example.until(lambda: watch.lines[-1][0] == 0)
            lines = len(watch.lines)
            example.until(lambda: len(watch.lines) > lines)  # though nothing has changed
            cut()
            status, errors = watch.ends()
    assert status == 1
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("backlog: "), errors


def check_that_sigterm_lets_the_job_be_finished(example, begun=lambda _queue: True):
    """`begun` says whether the job of a queue is worked on: it may be taken before it is."""
    (queue,) = queue_names(1)
    example.put(2, 6, queue=queue)
    with example.watch(queue) as watch, example.consumer(queue) as consumer:
        watch.until(lambda latest: latest[0] == 1)
        example.until(lambda: begun(queue))
        consumer.terminate()
        assert consumer.wait(30) == 0
    assert example.outcomes(queue) == (1, 0)
    assert example.backlog(queue)[0] == 1
