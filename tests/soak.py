"""Run `--local --backlog` for hours and note what memory it takes: nothing may grow without end.

pip install psutil && python tests/soak.py soak.csv --minutes 120

A job of 3 s comes each 2.5 s, and each 10 minutes one that kills its consumer. Each minute adds a
line to the CSV: how many jobs were done, and for each program how many processes of it run and how
many MiB the largest one has. At the end it prints how much each program has grown in the minutes
after the first half hour. Ctrl-C ends it early; it leaves nothing behind.
"""

import argparse
import contextlib
import csv
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent.parent
FILES = HERE / "examples/files"
JOB_EVERY = 2.5  # seconds
JOB_TAKES = "3"  # seconds
KILL_EVERY = 600.0  # seconds
WARM = 30  # minutes, until which memory may grow
PROGRAMS = ("null_client.py", "null_worker.py", "null_consumer.py", "null_guard.py")
COLUMNS = ["minute", "done", *(f"{each}{what}" for each in PROGRAMS for what in ("", " MiB"))]


@contextlib.contextmanager
def dispatcher(environment, log, on_terminal):
    """`null_client.py` while it works through the backlog; ended with all that it has started."""
    backlog = ["--local", "--backlog", "examples/files/backlog", "--max", "2", "--every", "1"]
    command = [sys.executable, "null_client.py", *backlog]
    ours, theirs = pty.openpty()
    reading = threading.Thread(target=empty, args=(ours,), daemon=True)
    reading.start()
    run = psutil.Popen(
        command,
        cwd=HERE,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs if on_terminal else log,
        stderr=log,
    )
    os.close(theirs)
    try:
        yield run
    finally:
        started = run.children(recursive=True) if run.is_running() else []
        run.send_signal(signal.SIGTERM)
        psutil.wait_procs([run, *started], timeout=30)
        for left in [run, *started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        run.wait()
        reading.join()
        os.close(ours)


def empty(terminal):
    """Read all that is written to a terminal, until its other side is closed."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def program_of(process):
    """Which of ours a process runs; its consumer's command doesn't count, nor what has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        for word in process.cmdline()[1:4]:  # LocalVast starts a worker by a program of its own
            if Path(word).name in PROGRAMS:
                return Path(word).name
    return ""


def memory(run):
    """The MiB of each process, by program."""
    sizes = {program: [] for program in PROGRAMS}
    for process in [run, *run.children(recursive=True)]:
        program = program_of(process)
        if program:
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes[program].append(process.memory_info().rss / (1 << 20))
    return sizes


def put(environment, what):
    subprocess.run([FILES / "put", "1", what], env=environment, check=True)


def watch(run, environment, minutes, jobs):
    """Put jobs in, and give a line of the CSV each minute."""
    began_at = time.monotonic()
    next_job = next_kill = 0.0
    for minute in range(1, minutes + 1):
        while (now := time.monotonic() - began_at) < 60 * minute:
            if now >= next_job:
                put(environment, JOB_TAKES)
                next_job += JOB_EVERY
            if now >= next_kill + KILL_EVERY:
                put(environment, "kill")
                next_kill += KILL_EVERY
            time.sleep(0.1)
        if run.poll() is not None:
            raise SystemExit(f"null_client.py ended with status {run.returncode}")
        line = {"minute": minute, "done": sum(1 for _ in jobs.glob("*.done"))}
        for program, sizes in memory(run).items():
            line[program] = len(sizes)
            line[f"{program} MiB"] = f"{max(sizes, default=0):.2f}"
        yield line


def growth(lines, program):
    """MiB an hour after the first half hour, from its first third to its last."""
    sizes = [
        (line["minute"], float(line[f"{program} MiB"]))
        for line in lines
        if line["minute"] > WARM and line[program] > 0  # none may run at that moment
    ]
    third = len(sizes) // 3
    if third == 0:
        return None
    began, first = (sum(column) / third for column in zip(*sizes[:third], strict=True))
    ended, last = (sum(column) / third for column in zip(*sizes[-third:], strict=True))
    return (last - first) / (ended - began) * 60


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--minutes", type=int, default=120, help="default: 120")
    parser.add_argument("--terminal", action="store_true", help="show it on a terminal, unseen")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lines = []
    with (
        tempfile.TemporaryDirectory() as folder,
        args.csv.open("w", newline="") as file,
        args.csv.with_suffix(".log").open("w") as log,
    ):
        jobs = Path(folder)
        environment = os.environ | {
            "JOBS": folder,
            "NULL_CONSUMER": "examples/files/consumer",
            "TERM": "xterm",
        }
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        with (
            contextlib.suppress(KeyboardInterrupt),
            dispatcher(environment, log, args.terminal) as run,
        ):
            for line in watch(run, environment, args.minutes, jobs):
                lines.append(line)
                writer.writerow(line)
                file.flush()
    for program in PROGRAMS:
        grown = growth(lines, program)
        if grown is not None:
            print(f"{program}: {grown:+.2f} MiB an hour after the first half hour")


if __name__ == "__main__":
    main()
