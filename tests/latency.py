"""How long a job waits between `put in` and `worked on`, with a worker free; what counting costs.

    python tests/latency.py [--checkout DIR] [--rounds 20] [files|rq|parts|changes ...]

In each round one job is put in, at any moment between two looks; the consumer takes it in no time.
Prints the median of the rounds, with --backlog at its default and, where the checkout has it, with
--watch; and the CPU that counting takes of one core, for RQ at one look a second. `rq` needs
redis-server and redis-cli.

`parts` takes the way from `asked for` to `worked on` apart: the router's answer, the worker's to a
create, the control server's to a consumer that waits, and the start of COMMAND. `changes` is the
CPU that the command with LocalVast takes of one core, at a thousand changes a second and at one.
Both are of this version's files only, and `changes` needs psutil.
"""

import argparse
import asyncio
import contextlib
import inspect
import os
import random
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import aiohttp

COUNTED_FOR = 20.0  # seconds


class Files:
    def __init__(self, folder):
        self.jobs = Path(folder, "jobs")
        self.jobs.mkdir()
        self.environment = {"JOBS": str(self.jobs)}
        done = 'mv "$job" "${job%.job}.done" && date +%s.%N'
        self.consumer = f"cd {self.jobs}; for job in *.job; do {done}; done"

    def put(self, number):
        new = self.jobs / f"{number}.new"
        new.write_text("1\n")
        new.rename(self.jobs / f"{number}.job")


class Rq:
    def __init__(self, folder):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = str(found.getsockname()[1])
        subprocess.Popen(
            ["redis-server", "--bind", "127.0.0.1", "--port", self.port, "--save", ""],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        while self.cli("ping").strip() != "PONG":
            time.sleep(0.1)
        self.environment = {"REDIS_URL": f"redis://127.0.0.1:{self.port}"}
        pop = f"redis-cli -p {self.port} lpop rq:queue:jobs"
        self.consumer = f'while [ -n "$({pop})" ]; do date +%s.%N; done'

    def cli(self, *words):
        command = ["redis-cli", "-p", self.port, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def put(self, number):
        self.cli("rpush", "rq:queue:jobs", f"job-{number}")

    def close(self):
        self.cli("shutdown", "nosave")


class Dispatcher:
    """A follow() of the checkout, and what it says of itself."""

    def __init__(self):
        self.own = self.asked = 0

    def note(self, progress):
        self.own, self.asked = progress.own, progress.asked


def backlog_of(checkout, name, watch):
    line = f"{sys.executable} {shlex.quote(str(checkout))}/examples/{name}/backlog"
    if watch:
        from null_count import watch_backlog

        return watch_backlog(f"exec {line} --watch")
    try:
        from null_count import run_backlog
    except ImportError:  # version 1.0.0
        from null_client import run_backlog
    return partial(run_backlog, line)


@contextlib.asynccontextmanager
async def free_worker(command):
    """LocalVast's only worker, whose NULL_CONSUMER this is, and the endpoint."""
    from null_local import LocalVast

    os.environ["NULL_CONSUMER"] = command
    async with LocalVast(1, inactivity_timeout=3600) as vast, vast.client() as client:
        vast.start_worker()
        while not all(worker.free for worker in vast.workers.values()):
            await asyncio.sleep(0.1)
        (worker,) = vast.workers.values()
        yield worker, await client.get_endpoint(vast.endpoint_name)


async def rounds(args, name, queue, watch, folder):
    """Seconds from `put in` to `worked on`, of each round."""
    from null_client import follow

    started = Path(folder, "started")
    seconds = []
    dispatcher = Dispatcher()
    async with free_worker(f"exec >>{started}; {queue.consumer}") as (_, endpoint):
        backlog = backlog_of(args.checkout, name, watch)
        following = asyncio.create_task(
            follow(endpoint, backlog, 1, on_progress=dispatcher.note, on_trouble=print)
        )
        for number in range(args.rounds):
            await asyncio.sleep(6)  # all of the round before has ended, and was seen
            while dispatcher.own or dispatcher.asked:
                await asyncio.sleep(0.1)
            await asyncio.sleep(random.uniform(0, 5))
            started.write_text("")
            begin = time.time()
            queue.put(number)
            while not started.read_text():
                await asyncio.sleep(0.005)
            seconds.append(float(started.read_text().split()[0]) - begin)
        following.cancel()
        await asyncio.wait({following})
    return seconds


async def parts(count, folder):
    """Seconds of each part of the way, of each round."""
    import null_reservation

    answered = {}  # of a route, when

    async def request(http, method, url, *arguments, **options):
        answer = await original(http, method, url, *arguments, **options)
        answered[url.rpartition("//")[2].partition("/")[2]] = time.time()
        return answer

    original, null_reservation._request = null_reservation._request, request
    taken = {"router": [], "create": [], "consumer told": [], "COMMAND started": []}
    started = Path(folder, "started")
    command = f"exec date +%s.%N >>{started}"
    async with free_worker(command) as (worker, endpoint), aiohttp.ClientSession() as http:
        for number in range(count):
            await asyncio.sleep(random.uniform(1, 2))
            waiting = asyncio.create_task(told(http, f"{worker.control_url}/session?wait=60"))
            await asyncio.sleep(0.5)
            asked = time.time()
            async with null_reservation.reserve(endpoint) as reservation:
                await reservation.ended()
            lines = started.read_text().splitlines()
            assert len(lines) == number + 1
            times = [asked, answered["route/"], answered["session/create"], await waiting]
            times.append(float(lines[-1]))
            for name, before, after in zip(taken, times, times[1:], strict=False):
                taken[name].append(after - before)
    return taken


async def told(http, url):
    """When the control server has said that there is a reservation."""
    async with http.get(url) as answer:
        assert (await answer.json())["session_id"]
    return time.time()


def print_parts(count):
    with tempfile.TemporaryDirectory() as folder:
        taken = asyncio.run(parts(count, folder))
    for name, seconds in taken.items():
        median, worst = statistics.median(seconds), max(seconds)
        print(f"{name}: median {median * 1000:.0f} ms, most {worst * 1000:.0f}")


COUNT = """
import itertools, sys, time
began_at, rate = time.monotonic(), float(sys.argv[1])
for number in itertools.count():
    print(1 + number % 2, 1, flush=True)
    time.sleep(max(0, began_at + number / rate - time.monotonic()))
"""


def print_changes(checkout):
    import psutil

    for rate in (1000, 1):
        line = shlex.join(["exec", sys.executable, "-c", COUNT, str(rate)])
        command = ["null_client.py", "--local", "--watch", line, "--max", "1"]
        nothing = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "NULL_CONSUMER": "sleep 600"}
        run = psutil.Popen([sys.executable, *command], cwd=checkout, env=environment, **nothing)
        time.sleep(15)  # its worker has started
        before = run.cpu_times()
        time.sleep(COUNTED_FOR)
        after = run.cpu_times()
        run.terminate()
        run.wait()
        spent = after.user + after.system - before.user - before.system
        print(f"{rate} changes a second: {spent / COUNTED_FOR:.3f} of a core")


def cpu_of(command, environment, again):
    """Seconds of CPU in COUNTED_FOR, of a command that stays or is started each second."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    if again:
        for look in range(int(COUNTED_FOR)):
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            time.sleep(max(0.0, begin + look + 1 - time.monotonic()))
    else:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(COUNTED_FOR)
        process.kill()
        process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("queues", nargs="*", default=["files", "rq"])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))
    import null_client

    if "parts" in args.queues:
        print_parts(args.rounds)
        args.queues.remove("parts")
    if "changes" in args.queues:
        print_changes(args.checkout)
        args.queues.remove("changes")
    has_watch = "AsyncIterable" in str(inspect.signature(null_client.follow))
    for name in args.queues:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            queue = {"files": Files, "rq": Rq}[name](folder)
            if name == "rq":
                stack.callback(queue.close)
            os.environ.update(queue.environment)
            for watch in (False, True) if has_watch else (False,):
                seconds = asyncio.run(rounds(args, name, queue, watch, folder))
                flag = "--watch" if watch else "--backlog"
                worst = max(seconds)
                print(f"{name} {flag}: median {statistics.median(seconds):.2f} s, most {worst:.2f}")
            if name == "rq" and has_watch:
                command = [sys.executable, args.checkout / "examples/rq/backlog"]
                looks = cpu_of(command, os.environ, again=True)
                stays = cpu_of([*command, "--watch"], os.environ, again=False)
                print(
                    f"rq, CPU of counting: {stays / COUNTED_FOR:.4f} to {looks / COUNTED_FOR:.4f}"
                )


if __name__ == "__main__":
    main()
