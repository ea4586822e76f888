"""Run a consumer inside each wrapper that is installed here, and print what a stop does to it.

    python tests/consumer/wrappers.py [WORD ...]    those whose line holds one of the words; or all

A trial is one real run of a shell line under null_guard.py, in a process and a folder of its own.
The consumer finishes its job, which has 12 s to go, when it is told to end, and drops the job when
it is told again. docs/consumers.md has the rows, and test_docs.py compares.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[2]
sys.path.append(str(HERE))

from null_guard import Order, Program, Run, command_of, turn  # noqa: E402

JOB = 14.0  # seconds, so that one has 12 to go when it is told to end
GRACE = 30.0  # seconds
STOP_AFTER = 2.0  # seconds that a job has been going on by then
START_WAIT = 60.0  # seconds for a wrapper to start its consumer
END_WAIT = 20.0  # seconds in which COMMAND should have ended after its consumer

CONSUMER = """\
#!{python}
import os, signal, sys, time
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
told = []
def say(text):
    os.write(log, (text + " " + str(os.getpid()) + "\\n").encode())
def stop(number, frame):
    told.append(number)
    say("told " + signal.Signals(number).name)
    if len(told) == 2:
        say("lost")
        os._exit(1)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
say("began")
if {status!r} is not None:
    sys.exit({status!r})
while True:
    end = time.monotonic() + {job!r}
    while time.monotonic() < end:
        time.sleep(0.05)
    say("done")
    if told:
        break
    say("began")
"""

PACKAGE = '{"name": "trial", "version": "1.0.0", "scripts": {"start": "./consumer"}}'
SUPERVISORD = """\
[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile=./supervisord.pid
[program:consumer]
command=./consumer
directory=.
"""


class Wrapper(NamedTuple):
    """A shell line that runs `./consumer`, and what it needs."""

    line: str
    needs: tuple[str, ...] = ()  # programs
    files: dict[str, str] = {}
    note: str = ""
    varies: bool = False  # it isn't the same each time

    @property
    def name(self) -> str:
        """Its name in a table of the docs."""
        return f"`{self.line}`".replace("|", "\\|") + self.note


def script(*lines: str, shell: str = "sh") -> dict[str, str]:
    return {"run.sh": "\n".join((f"#!/bin/{shell}", *lines, ""))}


TRAP = script("trap 'kill -TERM $p' TERM", "./consumer & p=$!", "wait $p")
PROCFILE = {"Procfile": "consumer: ./consumer\n"}
WRAPPERS = (
    Wrapper("./consumer"),
    Wrapper("exec ./consumer"),
    Wrapper("true && ./consumer"),
    Wrapper("./consumer; true"),
    Wrapper("./consumer | tee log"),
    Wrapper("./run.sh", files=script("true", "./consumer"), note=", which ends with `./consumer`"),
    Wrapper(
        "./run.sh",
        files=script("true", "exec ./consumer"),
        note=", which ends with `exec ./consumer`",
    ),
    Wrapper("./run.sh", files=TRAP, note=", which traps TERM and passes it on"),
    Wrapper(
        "./run.sh", files=script("./consumer & wait"), note=", which ends with `./consumer & wait`"
    ),
    Wrapper("timeout 1h ./consumer", ("timeout",)),
    Wrapper("timeout 1h sh -c 'true && ./consumer'", ("timeout",)),
    Wrapper("seq 2 | xargs -P2 -n1 ./consumer", ("xargs",), varies=True),
    Wrapper("nice ./consumer", ("nice",)),
    Wrapper("nohup ./consumer", ("nohup",)),
    Wrapper("env A=b ./consumer", ("env",)),
    Wrapper("stdbuf -oL ./consumer", ("stdbuf",)),
    Wrapper("flock lock ./consumer", ("flock",)),
    Wrapper("setsid ./consumer", ("setsid",)),
    Wrapper("setsid --wait ./consumer", ("setsid",)),
    Wrapper("setpriv --no-new-privs ./consumer", ("setpriv",)),
    Wrapper("unshare --fork --pid ./consumer", ("unshare",)),
    Wrapper("strace -f -o /dev/null ./consumer", ("strace",)),
    Wrapper("sudo ./consumer", ("sudo",)),
    Wrapper("runuser -u root -- ./consumer", ("runuser",)),
    Wrapper("su root -c ./consumer", ("su",)),
    Wrapper("tini ./consumer", ("tini",)),
    Wrapper("dumb-init ./consumer", ("dumb-init",)),
    Wrapper("dumb-init sh -c 'true && ./consumer'", ("dumb-init",), varies=True),
    Wrapper("chpst -u root ./consumer", ("chpst",)),
    Wrapper("xvfb-run -a ./consumer", ("xvfb-run", "xauth")),
    Wrapper("script -qec ./consumer /dev/null", ("script",), varies=True),
    Wrapper("unbuffer ./consumer", ("unbuffer",)),
    Wrapper("parallel ::: ./consumer", ("parallel",)),
    Wrapper("parallel --termseq TERM,40000,KILL ::: ./consumer", ("parallel",)),
    Wrapper("make", ("make",), {"Makefile": "all:\n\t./consumer\n"}),
    Wrapper("npm start", ("npm",), {"package.json": PACKAGE}),
    Wrapper("pnpm start", ("pnpm",), {"package.json": PACKAGE}),
    Wrapper("yarn start", ("yarn",), {"package.json": PACKAGE}),
    Wrapper("concurrently ./consumer", ("concurrently",)),
    Wrapper("nodemon --exec ./consumer", ("nodemon",)),
    Wrapper("pm2-runtime ./consumer --interpreter none", ("pm2-runtime",), varies=True),
    Wrapper(
        "pm2-runtime ./consumer --interpreter none --kill-timeout 40000",
        ("pm2-runtime",),
        varies=True,
    ),
    Wrapper("honcho start", ("honcho",), PROCFILE),
    Wrapper("foreman start", ("foreman",), PROCFILE),
    Wrapper("foreman start -t 40", ("foreman",), PROCFILE),
    Wrapper("watchfiles ./consumer .", ("watchfiles",)),
    Wrapper("watchfiles --sigint-timeout 40 ./consumer .", ("watchfiles",)),
    Wrapper("watchmedo auto-restart ./consumer", ("watchmedo",)),
    Wrapper("watchmedo auto-restart --kill-after 40 ./consumer", ("watchmedo",)),
    Wrapper("supervisord -c s.conf", ("supervisord",), {"s.conf": SUPERVISORD}),
    Wrapper(
        "supervisord -c s.conf",
        ("supervisord",),
        {"s.conf": SUPERVISORD + "stopwaitsecs=40\n"},
        note=", with `stopwaitsecs=40`",
    ),
    Wrapper("runsv service", ("runsv",), {"service/run": "#!/bin/sh\nexec ../consumer\n"}),
    Wrapper("uv run --no-project ./consumer", ("uv",)),
)


class Trial(NamedTuple):
    """What became of one run."""

    words: list[list[str]]  # of the consumer, line by line; the last one is its process id
    stopped_at: int  # how many lines there were when COMMAND was asked to end
    failure: str  # as null_consumer.py tells it
    killed: str
    took: float  # seconds from the stop until nothing was left
    ended: bool  # by itself

    def count(self, word: str, since: int = 0) -> int:
        return sum(words[0] == word for words in self.words[since:])


def words_of(folder: str | os.PathLike[str]) -> list[list[str]]:
    """What the consumer in that folder has written until now."""
    log = Path(folder, "consumer.log")
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def write_consumer(folder: str | os.PathLike[str], seconds: float, status: int | None) -> None:
    """Write one that works on jobs of so many seconds, or ends with that status at once."""
    program = Path(folder, "consumer")
    log = os.path.join(folder, "consumer.log")
    program.write_text(CONSUMER.format(python=sys.executable, log=log, job=seconds, status=status))
    program.chmod(0o755)


def run_here(line: str, folder: str, stops: bool) -> Trial:
    """Make a trial in this process, which should be one of its own."""
    command = command_of(line)
    output = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT)
    run = Run(Program(command, os.environ, GRACE, output=output, errors=output, folder=folder))
    began_at = stop_at = None
    count = 0
    while not run.done:
        now = time.monotonic()
        if began_at is None and words_of(folder):
            began_at = now
        waited = now - (began_at or run.started_at)
        if stop_at is None and waited > (STOP_AFTER if stops and began_at else START_WAIT):
            stop_at, count = now, len(words_of(folder))
            run.obey(Order.END)
        if stop_at is None and not stops and began_at and waited > END_WAIT:
            stop_at = now
            run.obey(Order.KILL)
        turn([run], now + 0.1)
    took = time.monotonic() - (stop_at or time.monotonic())
    return Trial(words_of(folder), count, run.failure, run.killed, took, stop_at is None)


def trial(wrapper: Wrapper, status: int | None = None, seconds: float = JOB) -> Trial:
    """Run a wrapper with a consumer that works, or with one that ends with this status."""
    folder = tempfile.mkdtemp(prefix="wrapper-")
    try:
        write_consumer(folder, seconds, status)
        for name, text in wrapper.files.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        arguments = json.dumps([wrapper.line, folder, status is None])
        done = subprocess.run(
            [sys.executable, __file__, "--here", arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return Trial(*json.loads(done.stdout))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Row(NamedTuple):
    """What the docs say of a wrapper, but how to lengthen its grace."""

    wrapper: str
    told: str  # the consumer, at a stop
    job: str  # what becomes of one of 12 s
    failure: str  # how a status of 3 is told
    ends: str  # COMMAND, once its consumer has ended with 0


def row_of(wrapper: Wrapper) -> Row:
    stopped = trial(wrapper)
    failed = trial(wrapper, 3)
    done = trial(wrapper, 0)
    return Row(wrapper.name, told(stopped), job(stopped), failure(failed), ends(done))


def told(stopped: Trial) -> str:
    signals = [words[1:] for words in stopped.words if words[0] == "told"]
    if not signals:
        return "never"
    pids = [pid for _, pid in signals]
    most = max(map(pids.count, pids))
    times = {1: "once", 2: "twice"}.get(most, f"{most} times")
    others = sorted({name for name, _ in signals} - {"SIGTERM"})
    return f"{times}, by {' and '.join(others)}" if others else times


def job(stopped: Trial) -> str:
    if stopped.count("lost"):
        return "lost"
    if not stopped.count("done", stopped.stopped_at):
        return "killed after the grace" if stopped.killed else "killed by the wrapper"
    begun = stopped.count("began", stopped.stopped_at)
    return f"finished, and {begun} more" if begun else "finished"


def failure(failed: Trial) -> str:
    return (failed.failure or "hidden") if failed.ended else "never ends"


def ends(done: Trial) -> str:
    return "yes" if done.ended and not done.failure else "no"


def installed(wrapper: Wrapper) -> bool:
    return all(shutil.which(name) for name in wrapper.needs)


def rows(words: Sequence[str] = ()) -> Iterator[Row]:
    """Try all that are installed, or those whose line holds one of the words."""
    chosen = [
        wrapper
        for wrapper in WRAPPERS
        if installed(wrapper) and (not words or any(word in wrapper.line for word in words))
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield from pool.map(row_of, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="What wrappers do to a consumer.")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(run_here(*json.loads(arguments.here))))
        return
    for row in rows(arguments.words):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
