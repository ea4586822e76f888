"""How long a job waits between `put in` and `worked on`, with a worker free; what counting costs.

    python tests/latency.py [--checkout DIR] [--rounds 20] [files|rq ...]

In each round one job is put in, at any moment between two looks; the consumer takes it in no time.
Prints the median of the rounds, with --backlog at its default and, where the checkout has it, with
--watch; and the CPU that counting takes of one core, for RQ at one look a second. `rq` needs
redis-server and redis-cli.
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


async def rounds(args, name, queue, watch, folder):
    """Seconds from `put in` to `worked on`, of each round."""
    from null_client import follow
    from null_local import LocalVast

    started = Path(folder, "started")
    os.environ["NULL_CONSUMER"] = f"exec >>{started}; {queue.consumer}"
    seconds = []
    dispatcher = Dispatcher()
    async with contextlib.AsyncExitStack() as stack:
        vast = await stack.enter_async_context(LocalVast(1, inactivity_timeout=3600))
        vast.start_worker()
        while not all(worker.free for worker in vast.workers.values()):
            await asyncio.sleep(0.1)
        client = await stack.enter_async_context(vast.client())
        endpoint = await client.get_endpoint(vast.endpoint_name)
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
