"""The command: reserve workers of a Vast endpoint, and see what they do.

    python null_client.py --endpoint NAME            one reservation, held 180 s
    python null_client.py --endpoint NAME --demo     three, ramped up and down
    python null_client.py --endpoint NAME --backlog COMMAND --max N    as many as there are jobs
    python null_client.py --endpoint NAME --diagnose    why no worker comes
    python null_client.py --local ...                the same on this machine: no account, no GPU

`--help` says the rest. You can import `reserve` and `follow` from here.
"""

from __future__ import annotations

import os
import signal
import sys

__version__ = "1.1.0"  # of the whole project: pyproject.toml takes it from here
__all__ = ["follow", "main", "reserve"]

if sys.version_info < (3, 10):  # noqa: UP036  a line in the place of a traceback
    version = f"{sys.executable} is {sys.version.split()[0]}"
    print(f"null_client: needs Python 3.10 or newer; {version}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        # A Ctrl-C while the rest loads shows no traceback; Interruption takes over.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Python's own modules come first: a queue.py beside this file hides none of them. What is
    # beside this file comes next: no installed copy of this project is taken for it. Under
    # `python -I` this folder wouldn't be searched at all.
    _library = os.path.dirname(os.__file__)
    _folder = os.path.dirname(os.path.realpath(__file__))
    _first = [_library, os.path.join(_library, "lib-dynload"), _folder]
    sys.path[:] = _first + [folder for folder in sys.path if folder not in _first]

import argparse
import asyncio
import contextlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

# aiohttp, the SDK and rich take long to import: functions import them, so --help needs none.
if TYPE_CHECKING:
    from types import FrameType

    from vastai import Endpoint  # type: ignore[import-untyped]

    from null_backlog import Progress, follow
    from null_display import BacklogDisplay, Display, Screen
    from null_metrics import Metrics
    from null_reservation import reserve

log = logging.getLogger("null_client")


def __getattr__(name: str) -> object:
    """Give on reserve() and follow(), for `from null_client import reserve`."""
    if name == "reserve":
        from null_reservation import reserve

        return reserve
    if name == "follow":
        from null_backlog import follow

        return follow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class UsageError(Exception):
    """An argument or a setting is wrong: the text says which. The exit status is 2."""


# The arguments

INSTANCES = ("prod", "alpha", "candidate", "local")
WEEK = 7 * 86400

# The flags that each mode heeds, with their defaults. Any other flag would change nothing, so it is
# refused: `--max 20` without `--backlog` would reserve one worker.
EACH: dict[str, Any] = {"cost": 100, "lifetime": 120}
MODES: dict[str, dict[str, Any]] = {
    "single": {"hold": 180, "wait": 1800, **EACH},
    "demo": {"count": 3, "interval": 30, "plateau": 300, "wait": 1800, **EACH},
    "backlog": {
        "max": None,
        "jobs_per_worker": 1,
        "every": 5,
        "settle": 30,
        "once": False,
        "metrics": None,
        **EACH,
    },
    "diagnose": {},
}

USAGE = """%(prog)s PLACE [options]                            one worker
       %(prog)s PLACE --demo [options]                     several, up and down
       %(prog)s PLACE --backlog COMMAND --max N [options]  as many as there are jobs
       %(prog)s PLACE --watch COMMAND --max N [options]    the same, sooner
       %(prog)s --endpoint NAME --diagnose                 why no worker comes
       where PLACE is --endpoint NAME or --local"""
EPILOG = """\
environment:
  VAST_API_KEY   the key of your Vast account; unset: the key that `vastai set api-key` saved
  NULL_CONSUMER  with --local: a shell line that works on your queue; it runs on each worker
                 while that is reserved. On Vast it belongs into the template of the instances.

exit status:
  0    all were held and released; --backlog --once: no job is left; --diagnose: nothing is wrong
  1    not reserved, lost or unreachable; --backlog --once: given up; --diagnose: something is wrong
  2    an argument or a setting is wrong
  130  Ctrl-C (143: SIGTERM), and every session is closed. --backlog: what waits is taken back,
       what is reserved goes on
"""


class Parser(argparse.ArgumentParser):
    """argparse, with one line in the place of the whole usage when an argument is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def number(
    least: float,
    most: float,
    text: str,
    whole: bool = False,
    endless: bool = False,
) -> float:
    """Read an argument: a number within the bounds; `inf` only if `endless`."""
    kind: type[int | float] = int if whole else float
    try:
        value = kind(text)
    except ValueError:
        wanted = "whole number" if whole else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}") from None
    if endless and value == math.inf:
        return value
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not within {least:g} and {most:g}")
    return value


def parser_of(program: str) -> Parser:
    """Return the parser, whose help has a group for each mode with an example."""
    parser = Parser(
        prog=program,
        usage=USAGE,
        description="Reserve workers of a Vast Serverless endpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    place = parser.add_argument_group("place").add_argument
    endpoint = os.environ.get("VAST_ENDPOINT")
    instance = os.environ.get("VAST_INSTANCE") or "prod"
    place(
        "--endpoint",
        metavar="NAME",
        default=endpoint,
        help="of your account; default: $VAST_ENDPOINT",
    )
    place(
        "--instance",
        metavar="NAME",
        default=instance,
        help=f"of Vast: {', '.join(INSTANCES)}; default: $VAST_INSTANCE or prod",
    )
    place("--local", action="store_true", help="a stand-in for Vast on this machine: no account")
    add_modes(parser)
    more = parser.add_argument_group("more").add_argument
    more("-h", "--help", action="help", help="show this and end")
    more("--version", action="version", version=f"%(prog)s {__version__}", help="show it and end")
    more("--debug", action="store_true", help="show a traceback where an error is one line")
    return parser


def add_modes(parser: Parser) -> None:
    """Add the flags of MODES. They are None where they aren't given, for check_flags()."""
    seconds = partial(number, 0.1, WEEK)

    def group(title: str, example: str | None = None) -> Callable[..., object]:
        description = example and f"%(prog)s {example}"
        return parser.add_argument_group(title, description).add_argument

    def whole(most: float) -> Callable[[str], float]:
        return partial(number, 1, most, whole=True)

    def add(add_argument: Callable[..., object], flag: str, kind: object, text: str) -> None:
        name = flag[2:].replace("-", "_")
        default = next(flags[name] for flags in MODES.values() if name in flags)
        if default is not None:
            text += f" (default: {default})"
        add_argument(flag, metavar="S" if "seconds" in text else "N", type=kind, help=text)

    single = group("one worker", "--endpoint my-queue --hold 600")
    add(single, "--hold", partial(seconds, endless=True), "seconds to hold it, or inf")
    demo = group("several workers, up and down", "--local --demo --interval 3 --plateau 5")
    demo(
        "--demo",
        action="store_true",
        default=None,
        help="reserve them one by one, and release them so",
    )
    add(demo, "--count", whole(100), "how many")
    add(demo, "--interval", seconds, "seconds between two steps")
    add(demo, "--plateau", seconds, "seconds with all of them held")
    backlog = group(
        "as many workers as there are jobs", "--endpoint my-queue --backlog ./backlog --max 20"
    )
    backlog("--backlog", metavar="COMMAND", help="a shell line that prints how many aren't done")
    watch = "in its place: a shell line that stays, and prints that whenever it changes"
    backlog("--watch", metavar="COMMAND", help=watch)
    add(backlog, "--max", whole(10_000), "how many reservations at most; needed")
    add(backlog, "--jobs-per-worker", whole(1e9), "jobs for which one worker is enough")
    add(backlog, "--every", seconds, "seconds between two looks at the jobs")
    add(backlog, "--settle", seconds, "seconds of too many, until a request is taken back")
    backlog("--once", action="store_true", default=None, help="end when no job is left")
    port = partial(number, 1, 65535, whole=True)
    text = "serve Prometheus metrics at http://127.0.0.1:PORT/metrics"
    backlog("--metrics", metavar="PORT", type=port, help=text)
    diagnose = group("why no worker comes", "--endpoint my-queue --diagnose")
    text = "ask Vast, say what is wrong and what to do, and end; it changes nothing"
    diagnose("--diagnose", action="store_true", default=None, help=text)
    each = group("each reservation")
    add(each, "--cost", whole(1e6), "its load; 100 is one worker")
    add(each, "--lifetime", partial(number, 1, 86400), "seconds that it lasts unless renewed")
    add(each, "--wait", seconds, "seconds to wait for a worker; not with --backlog")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return what was asked for, with its `mode`. Raises UsageError."""
    args = parser_of(called_as()).parse_args(arguments)
    check_place(args)
    args.mode = mode_of(args)
    check_flags(args)
    check_folder(args)
    vars(args).update(
        {name: default for name, default in MODES[args.mode].items() if vars(args)[name] is None}
    )
    if args.mode == "backlog" and args.max is None:
        raise UsageError("argument --max: needed with --backlog: how many reservations at most")
    return args


def called_as() -> str:
    """Return how the program was called: null_client.py, null-client, or as a module."""
    if "workers.null.client" in sys.orig_argv:
        return "python -m workers.null.client"
    return os.path.basename(sys.argv[0])


def check_place(args: argparse.Namespace) -> None:
    if args.instance not in INSTANCES:
        known = ", ".join(INSTANCES)
        raise UsageError(f"argument --instance: {args.instance!r} is none of {known}")
    if not (args.local or args.endpoint):
        raise UsageError("argument --endpoint: needed, or $VAST_ENDPOINT, or --local")


def check_folder(args: argparse.Namespace) -> None:
    """Refuse a working folder that is gone, where a shell line of the user's would run in it."""
    if args.local or args.mode == "backlog":
        try:
            os.getcwd()
        except FileNotFoundError:
            raise UsageError("the working folder has been deleted: cd to another one") from None
    if args.local and args.diagnose:
        raise UsageError("argument --diagnose: not with --local: it is about Vast itself")


def mode_of(args: argparse.Namespace) -> str:
    """Return the one mode that was named, or `single`."""
    named = [
        name for name in ("demo", "backlog", "watch", "diagnose") if vars(args)[name] is not None
    ]
    if len(named) > 1:
        raise UsageError(f"argument --{named[1]}: not with --{named[0]}")
    if not named:
        return "single"
    return "backlog" if named == ["watch"] else named[0]


def check_flags(args: argparse.Namespace) -> None:
    """Refuse a flag that would change nothing in this mode."""
    given = {name for name, value in vars(args).items() if value is not None}
    mode_flag = "watch" if "watch" in given else args.mode
    for mode, flags in MODES.items():
        for name in flags:
            if name in given and name not in MODES[args.mode]:
                why = f"not with --{mode_flag}" if mode == "single" else f"only with --{mode}"
                raise UsageError(f"argument --{name.replace('_', '-')}: {why}")


# The modes


async def connect(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    most: int,
    display: Screen,
) -> Endpoint:
    """Return the endpoint: on Vast, or on a LocalVast of `most` workers that ends with the stack.

    Raises UsageError.
    """
    if args.local:
        vast = await stack.enter_async_context(local_vast(most, display))
        client = vast.client()
        name = vast.endpoint_name
    else:
        client = vast_client(args.instance)
        name = args.endpoint
    await stack.enter_async_context(client)
    endpoints = {endpoint.name: endpoint for endpoint in await client.get_endpoints()}
    if name not in endpoints:
        known = ", ".join(endpoints) or "none"
        raise UsageError(f"no endpoint {name!r}; there are: {known}")
    return endpoints[name]


def local_vast(max_workers: int, display: Screen) -> Any:
    try:
        from null_local import LocalVast
    except ImportError as error:
        raise UsageError(f"--local needs null_local.py beside this file: {error}") from error
    return LocalVast(max_workers, inactivity_timeout=3, on_event=display.say)


def vast_client(instance: str) -> Any:
    from vastai import Serverless, VastAI

    try:
        # From the environment, or where `vastai set api-key` saved it.
        key = VastAI().client.api_key
    except RuntimeError:
        raise UsageError("no API key: set VAST_API_KEY, or: vastai set api-key KEY") from None
    if not (key.isascii() and key.isprintable()) or " " in key:
        source = "VAST_API_KEY" if os.environ.get("VAST_API_KEY") else "`vastai set api-key KEY`"
        text = f"{source}: the key has a space, a newline or a character that is not ASCII in it"
        raise UsageError(text)
    return Serverless(key, instance=instance)


async def workers_in_words(endpoint: Endpoint) -> list[str]:
    """Return what each of the endpoint's workers does. Raises what the SDK raises."""
    from null_backlog import worker_word

    workers = await endpoint.get_workers()
    return [worker_word(worker.status, worker.cur_load) for worker in workers]


# One worker, or several: the demo


async def attempt_reservations(args: argparse.Namespace, display: Display) -> int:
    """Reserve, hold and release, shown on the way. Return the exit status."""
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await connect(stack, args, len(display.rows), display)
        await ramp(endpoint, args, display)
    if args.demo:
        display.show_chart()
    if all(end.how in ("released", "let go") for _, end in display.ends):
        return 0
    return 1


async def ramp(endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Ramp up, hold all, ramp down, the oldest first. One alone is a short ramp."""
    occupying: dict[str, asyncio.Task[None]] = {}
    watching = set[asyncio.Task[None]]()
    if args.demo:
        watching.add(asyncio.create_task(watch_workers(endpoint, display)))
    try:
        for name in display.rows:
            if occupying:
                await asyncio.sleep(args.interval)
            occupying[name] = asyncio.create_task(occupy(name, endpoint, args, display))
        while not display.all_settled:
            await asyncio.sleep(0.1)
        plateau = args.plateau if args.demo else args.hold
        interval = args.interval if args.demo else 0.0
        for place, name in enumerate(display.held):
            display.holds_until(name, time.monotonic() + plateau + place * interval)
        timeout = None if math.isinf(plateau) else plateau
        await asyncio.wait(occupying.values(), timeout=timeout)
        await ramp_down(occupying, interval, display)
        if watching:  # the endpoint scale back down
            display.say("watching the workers go")
            await asyncio.wait(watching, timeout=15 if args.local else 60)
    finally:
        tasks = {*watching, *occupying.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def occupy(name: str, endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Reserve a worker, hold it until cancelled or until it has ended otherwise, and say so."""
    from null_reservation import WorkerLost, reserve

    display.waits(name)
    how = "not reserved"
    reason = ""
    on_trouble = partial(display.has_trouble, name)
    try:
        async with reserve(
            endpoint, args.cost, args.lifetime, args.wait, on_trouble=on_trouble
        ) as session:
            display.holds(name, session)
            how = "released"
            try:
                await session.ended()
                how = "let go"
                reason = "the worker let go"
            except WorkerLost as error:  # noted before the end of the block, which may be cancelled
                how = "lost"
                reason = str(error)
    except Exception as error:  # this one has ended, and the others go on
        log.debug("%s has ended", name, exc_info=True)
        if how != "not reserved":
            how = "lost"
        reason = " ".join((str(error) or repr(error)).split())
    finally:
        display.ended(name, how, reason)


async def ramp_down(
    occupying: dict[str, asyncio.Task[None]],
    interval: float,
    display: Display,
) -> None:
    """Release those that are still held, one each `interval` seconds, until all have ended."""
    for name, task in occupying.items():
        if name in display.held:
            task.cancel()
            await asyncio.wait(occupying.values(), timeout=interval)


async def watch_workers(endpoint: Endpoint, display: Display) -> None:
    """Show what the workers do, until none runs any more."""
    while True:
        with contextlib.suppress(Exception):  # a display only; the reservations ask for themselves
            words = await workers_in_words(endpoint)
            display.has_workers(words)
            if display.all_ended and words.count("stopped") == len(words):
                return
        await asyncio.sleep(1.0)


# As many workers as there are jobs


async def attempt_backlog(args: argparse.Namespace, display: BacklogDisplay) -> int:
    """Follow the backlog, shown on the way. Return the exit status. Raises Stuck."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            watchers: list[BacklogDisplay | Metrics] = [display]
            if args.metrics is not None:
                watchers.append(stack.enter_context(served_metrics(args.metrics)))
            endpoint = await connect(stack, args, args.max, display)
            interval = 1.0 if args.local else args.every
            showing = asyncio.create_task(keep_showing_workers(endpoint, watchers, interval))
            stack.callback(showing.cancel)
            await follow_backlog(endpoint, args, display, watchers)
    finally:
        display.show_end()
    return 0


async def follow_backlog(
    endpoint: Endpoint,
    args: argparse.Namespace,
    display: BacklogDisplay,
    watchers: Sequence[BacklogDisplay | Metrics],
) -> None:
    from null_backlog import follow
    from null_count import run_backlog, watch_backlog

    watched = args.watch is not None

    def tell(progress: Progress) -> None:
        for watcher in watchers:
            watcher.has_progressed(progress)

    await follow(
        endpoint,
        watch_backlog(args.watch) if watched else partial(run_backlog, args.backlog),
        args.max,
        jobs_per_worker=args.jobs_per_worker,
        every=args.every,
        settle=args.settle,
        once=args.once,
        cost=args.cost,
        lifetime=args.lifetime,
        on_progress=tell,
        on_trouble=display.has_trouble,
    )


async def keep_showing_workers(
    endpoint: Endpoint, watchers: Sequence[BacklogDisplay | Metrics], interval: float
) -> None:
    """Show what the workers do, each `interval` seconds."""
    while True:
        with contextlib.suppress(Exception):  # a display only; follow() asks for itself
            words = await workers_in_words(endpoint)
            for watcher in watchers:
                watcher.has_workers(words)
        await asyncio.sleep(interval)


@contextlib.contextmanager
def served_metrics(port: int) -> Iterator[Metrics]:
    """Serve metrics on a port of this machine. Raises UsageError."""
    try:
        from null_metrics import Metrics
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        why = "argument --metrics: needs prometheus_client: pip install prometheus_client"
        raise UsageError(why) from error
    metrics = Metrics()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(metrics.served(port))
        except OSError as error:
            raise UsageError(f"argument --metrics: port {port}: {error.strerror}") from error
        yield metrics


# Why no worker comes


async def attempt_diagnosis(args: argparse.Namespace) -> int:
    """Ask Vast, and print what was found. Return the exit status. Raises UsageError."""
    from null_diagnose import diagnose, show

    findings = await diagnose(vast_client(args.instance), args.endpoint)
    print("\n".join(show(findings)), flush=True)
    return int(any(finding.wrong for finding in findings))


# Signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """The first signal ends the command with every session closed, a later one at once."""

    # A process group and whoever passes signals on send the same one twice within milliseconds.
    SAME = 1.0  # seconds

    def __init__(self, on_first: Callable[[], object]) -> None:
        """`on_first` is called in the event loop."""
        self.signum: int | None = None  # the first one
        self._on_first = on_first
        self._caught_at = 0.0
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Interruption:
        # SIGHUP: the terminal is gone. One that is ignored on purpose (nohup) stays so.
        self._before = {
            signum: signal.getsignal(signum)
            for signum in SIGNALS
            if signal.getsignal(signum) != signal.SIG_IGN
        }
        for signum in self._before:
            # Not the event loop's handlers: a second signal counts also while the loop is busy.
            signal.signal(signum, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        if self.signum is not None:  # still of use until the end, see main()
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def nobody_reads(self) -> None:
        """Take it as a signal, but never as a second one, that nobody reads standard output.

        Ctrl-C ends the reader of a pipe as well as this command.
        """
        if self.signum is None:
            self._begin(signal.SIGTERM)

    def _catch(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self._begin(signum)
        elif time.monotonic() - self._caught_at >= self.SAME:
            os._exit(128 + self.signum)

    def _begin(self, signum: int) -> None:
        self.signum = signum
        self._caught_at = time.monotonic()
        self._loop.call_soon_threadsafe(self._on_first)


def undo_inherited() -> None:
    """Undo what the parent has left: signals that are blocked, children whose end nobody learns."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else each exit status is lost, and reads 0


# The whole


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Return the exit status."""
    hold_standard_files()
    undo_inherited()
    debug = False
    try:
        args = parse_arguments(arguments)
        debug = args.debug
        if debug:
            show_debug_log()
        work = attempt_diagnosis if args.mode == "diagnose" else run
        status = asyncio.run(work(args))
    except Exception as error:  # noqa: BLE001  a person gets a line, whatever went wrong
        if debug:
            traceback.print_exc()
        return report(error)
    if status > 128:
        # All is closed. The same signal may still come, and Python gives up handlers as it ends.
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
    return status


async def run(args: argparse.Namespace) -> int:
    """Run the mode, and show what happens. Return the exit status. Raises UsageError."""
    command = asyncio.current_task()

    def close_all() -> None:
        """On the first signal. A second signal then leaves the terminal as it finds it."""
        if command is not None:
            command.cancel()
        display.stop()
        display.say(interrupted(args))

    with Interruption(close_all) as interruption:
        display, attempt = shown_mode(args, interruption.nobody_reads)
        try:
            async with display:
                display.say("connecting")
                status = await attempt
            display.output.finish()
            while not display.output.finished:
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            if interruption.signum is None:
                raise
            status = 128 + interruption.signum
        finally:
            display.output.finish()
            display.output.join(1.0)
    if status == 0 and display.output.error is not None:
        raise OSError(f"not all of the output could be written: {display.output.error}")
    return status


def shown_mode(
    args: argparse.Namespace, on_broken_pipe: Callable[[], object]
) -> tuple[Screen, Coroutine[Any, Any, int]]:
    """Return the mode's display, and the mode itself, to be awaited. Raises UsageError."""
    from null_display import BacklogDisplay, Display

    if args.mode == "backlog":
        display = BacklogDisplay(on_broken_pipe)
        return display, attempt_backlog(args, display)
    reservations = Display(args.count if args.demo else 1, on_broken_pipe)
    return reservations, attempt_reservations(args, reservations)


def interrupted(args: argparse.Namespace) -> str:
    if args.mode != "backlog" or args.local:
        return "interrupted, closing"
    return "interrupted: what waits is taken back, what is reserved goes on"


def hold_standard_files() -> None:
    """Where standard output or error is closed: nothing that is opened later takes its place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def show_debug_log() -> None:
    """Write to standard error what the modules log for whoever looks for a fault."""
    logging.getLogger().setLevel(logging.DEBUG)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.DEBUG)


def report(error: Exception) -> int:
    """Tell a person in one line what went wrong. Return the exit status."""
    text = " ".join((str(error) or repr(error)).split())
    status = 2 if isinstance(error, UsageError) else 1
    if isinstance(error, ModuleNotFoundError):
        text = missing(error.name)
        status = 2
    print(f"null_client: {text}", file=sys.stderr)
    return status


def missing(module: str | None) -> str:
    """Say what to do about a module that can't be imported."""
    if module is not None and module.startswith("null_"):
        return f"{module}.py is missing beside this file"
    return (
        f"{sys.executable} has no {module}: activate the virtual environment, "
        "or run: pip install -r requirements.txt"
    )


if __name__ == "__main__":
    sys.exit(main())
