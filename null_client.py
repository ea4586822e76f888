"""The command: reserve null workers, and see it work.

    python null_client.py --endpoint NAME            one reservation, held 180 s
    python null_client.py --endpoint NAME --demo     three, ramped up and down
    python null_client.py --endpoint NAME --backlog COMMAND --max N    as many as there are jobs
    python null_client.py --local ...                the same on this machine: no account, no GPU

`reserve()` and `follow()` can be imported from here.

Exit status: 0 all were held and released, by whichever side; 1 not reserved, lost, or unreachable,
or not all of the output could be written; 2 usage or settings; 128 and the number of a signal (130
after Ctrl-C), with every session closed.

With --backlog: 0 nothing was left to do (--once), 1 stuck or refused for ten minutes; after a
signal what waits is taken back, and what is reserved goes on with its consumers.
"""

from __future__ import annotations

import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036  a line in the place of a traceback
    version = f"{sys.executable} is {sys.version.split()[0]}"
    print(f"null_client: needs Python 3.10 or newer; {version}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # A Ctrl-C while the rest loads shows no traceback; run() takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import contextlib
import math
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any


def missing(module: str | None) -> str:
    """Say what to do about a module that can't be imported."""
    if module is not None and module.startswith("null_"):
        return f"{module}.py is missing beside this file"
    return (
        f"{sys.executable} has no {module}: activate the virtual environment, "
        "or run: pip install -r requirements.txt"
    )


try:
    from null_backlog import follow, worker_word
    from null_count import run_backlog
    from null_reservation import WorkerLost, reserve
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"null_client: {missing(error.name)}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from types import FrameType

    from vastai import Endpoint  # type: ignore[import-untyped]

    from null_display import BacklogDisplay, Display, Screen

__all__ = ["follow", "main", "reserve"]


async def follow_backlog(
    endpoint: Endpoint, args: argparse.Namespace, display: BacklogDisplay
) -> None:
    await follow(
        endpoint,
        partial(run_backlog, args.backlog),
        args.max,
        jobs_per_worker=args.jobs_per_worker,
        every=args.every,
        settle=args.settle,
        once=args.once,
        cost=args.cost,
        lifetime=args.lifetime,
        on_progress=display.has_progressed,
        on_trouble=display.say,
    )


async def occupy(name: str, endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Reserve a worker, hold it until cancelled or until it has ended otherwise, and say so."""
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
    except Exception as error:  # noqa: BLE001  this one has ended, and the others go on
        if how != "not reserved":
            how = "lost"
        reason = " ".join((str(error) or repr(error)).split())
    finally:
        display.ended(name, how, reason)


async def ramp(endpoint: Endpoint, args: argparse.Namespace, display: Display) -> None:
    """Ramp up, hold all, ramp down, the oldest first. One alone is a ramp, too."""
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
        for place, name in enumerate(display.held):
            display.holds_until(name, time.monotonic() + plateau + place * args.interval)
        timeout = None if math.isinf(plateau) else plateau
        await asyncio.wait(occupying.values(), timeout=timeout)
        await ramp_down(occupying, args.interval, display)
        if watching:  # the endpoint scale back down
            display.say("watching the workers go")
            await asyncio.wait(watching, timeout=15 if args.local else 60)
    finally:
        tasks = {*watching, *occupying.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


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


async def keep_showing_workers(
    endpoint: Endpoint, display: BacklogDisplay, interval: float
) -> None:
    """Show what the workers do, each `interval` seconds."""
    while True:
        with contextlib.suppress(Exception):  # a display only; follow() asks for itself
            display.has_workers(await workers_in_words(endpoint))
        await asyncio.sleep(interval)


async def workers_in_words(endpoint: Endpoint) -> list[str]:
    """What each of the endpoint's workers does. Raises what the SDK raises."""
    workers = await endpoint.get_workers()
    return [worker_word(worker.status, worker.cur_load) for worker in workers]


def number(
    least: float,
    most: float,
    text: str,
    whole: bool = False,
    endless: bool = False,
) -> float:
    """What argparse is to take for a number: one within the bounds; `inf` only if `endless`."""
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


INSTANCES = "prod, alpha, candidate, local"
WEEK = 7 * 86400


# Flags that would change nothing without another one: `--max 20` alone reserves one worker.
ONLY_WITH = {
    "demo": ("interval", "plateau", "count"),
    "backlog": ("max", "jobs_per_worker", "every", "settle", "once"),
}
NOT_WITH = {"demo": ("hold",), "backlog": ("hold", "wait")}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="null_client.py", description="Reserve workers of a Vast endpoint."
    )
    parser.add_argument(
        "--endpoint",
        metavar="NAME",
        default=os.environ.get("VAST_ENDPOINT"),
        help="default: $VAST_ENDPOINT",
    )
    parser.add_argument(
        "--instance",
        default=os.environ.get("VAST_INSTANCE") or "prod",
        help=f"{INSTANCES}; default: $VAST_INSTANCE or prod",
    )
    parser.add_argument(
        "--local", action="store_true", help="run against a stand-in for Vast on this machine"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--demo", action="store_true", help="several reservations, ramped up and down"
    )
    kinds.add_argument(
        "--backlog", metavar="COMMAND", help="a shell line that prints how many jobs aren't done"
    )
    parser.add_argument(
        "--once", action="store_true", help="backlog: end when no job is left and nothing reserved"
    )
    seconds = partial(number, 0.1, WEEK)
    whole = partial(number, 1, 1e9, whole=True)
    for flag, kind, default, text in (
        ("--hold", partial(seconds, endless=True), 180, "seconds to hold, or inf"),
        ("--interval", seconds, 30, "demo: seconds between two steps"),
        ("--plateau", seconds, 300, "demo: seconds with all held"),
        ("--count", partial(number, 1, 100, whole=True), 3, "demo: how many"),
        ("--max", partial(number, 1, 10_000, whole=True), None, "backlog: reservations at most"),
        ("--jobs-per-worker", whole, 1, "backlog: jobs for which one worker is enough"),
        ("--every", seconds, 5, "backlog: seconds between two looks"),
        ("--settle", seconds, 30, "backlog: seconds of too many, until a request is taken back"),
        ("--cost", partial(number, 1, 1e6, whole=True), 100, "load of one; 100 is one worker"),
        ("--lifetime", partial(number, 1, 86400), 120, "seconds without a keep-alive"),
        ("--wait", seconds, 1800, "seconds to wait for a worker; backlog: for ever"),
    ):
        if default is not None:
            text += f" (default: {default})"
        parser.add_argument(flag, metavar="N", type=kind, default=default, help=text)
    args = parser.parse_args(arguments)
    if args.instance not in INSTANCES.split(", "):
        parser.error(f"argument --instance: {args.instance!r} is none of {INSTANCES}")
    if not (args.local or args.endpoint):
        parser.error("argument --endpoint: needed, or $VAST_ENDPOINT, or --local")
    if args.backlog is not None and args.max is None:
        parser.error("argument --max: needed with --backlog: how many reservations at most")
    # Attributes that are there are not given their defaults: those that are left are not given.
    none = argparse.Namespace(**dict.fromkeys(vars(args)))
    in_vain = flag_in_vain(parser.parse_args(arguments, none))
    if in_vain:
        parser.error(in_vain)
    return args


def flag_in_vain(given: argparse.Namespace) -> str:
    """What is wrong with a flag that would change nothing; empty when there is none."""
    flags = {name for name, value in vars(given).items() if value is not None}
    for mode in ("demo", "backlog"):
        for name in ONLY_WITH[mode] if mode not in flags else NOT_WITH[mode]:
            if name in flags:
                word = "not" if mode in flags else "only"
                return f"argument --{name.replace('_', '-')}: {word} with --{mode}"
    return ""


async def connect(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    most: int,
    display: Screen,
) -> Endpoint:
    """The endpoint on Vast, or on a LocalVast of `most` workers for the life of the stack."""
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
        raise argparse.ArgumentError(None, f"no endpoint {name!r}; there are: {known}")
    return endpoints[name]


def local_vast(max_workers: int, display: Screen) -> Any:
    try:
        from null_local import LocalVast
    except ImportError as error:
        text = f"--local needs null_local.py beside this file: {error}"
        raise argparse.ArgumentError(None, text) from error
    return LocalVast(max_workers, inactivity_timeout=3, on_event=display.say)


def vast_client(instance: str) -> Any:
    from vastai import Serverless, VastAI

    try:
        # From the environment, or where `vastai set api-key` saved it.
        key = VastAI().client.api_key
    except RuntimeError:
        text = "no API key: set VAST_API_KEY, or: vastai set api-key KEY"
        raise argparse.ArgumentError(None, text) from None
    return Serverless(key, instance=instance)


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
        """Standard output has no reader left: as a signal, but never a second one.

        Ctrl-C ends the reader of a pipe, too.
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


PATIENCE = 10.0  # seconds without progress, after which a reader of the output reads no more


async def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from null_display import BacklogDisplay, Display

    command = asyncio.current_task()

    def close_all() -> None:
        """On the first signal, when the display below is there."""
        if command is not None:
            command.cancel()
        display.live.stop()  # a second signal leaves the terminal as it finds it
        display.say(interrupted(args))

    interruption = Interruption(close_all)
    display: Screen
    attempt: Callable[[], Awaitable[int]]
    if args.backlog is None:
        display = Display(args.count if args.demo else 1, interruption.nobody_reads)
        attempt = partial(attempt_reservations, args, display)
    else:
        display = BacklogDisplay(interruption.nobody_reads)
        attempt = partial(attempt_backlog, args, display)
    with interruption:
        try:
            with display.live:
                display.say("connecting")
                status = await attempt()
            display.output.finish()
            while not display.output.finished and display.output.stalled_for < PATIENCE:
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            if interruption.signum is None:
                raise
            status = 128 + interruption.signum
        finally:
            display.output.finish()
            display.output.join(1.0)
    if status == 0 and not display.output.complete:
        raise OSError("not all of the output could be written")
    return status


def interrupted(args: argparse.Namespace) -> str:
    if args.backlog is None or args.local:
        return "interrupted, closing"
    return "interrupted: what waits is taken back, what is reserved goes on"


async def attempt_reservations(args: argparse.Namespace, display: Display) -> int:
    """Reserve, hold and release, shown on the way; the exit status."""
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await connect(stack, args, len(display.rows), display)
        await ramp(endpoint, args, display)
    if args.demo:
        display.show_chart()
    if all(end.how in ("released", "let go") for _, end in display.ends):
        return 0
    return 1


async def attempt_backlog(args: argparse.Namespace, display: BacklogDisplay) -> int:
    """Follow the backlog, shown on the way; the exit status. Raises Stuck."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            endpoint = await connect(stack, args, args.max, display)
            interval = 1.0 if args.local else args.every
            showing = asyncio.create_task(keep_showing_workers(endpoint, display, interval))
            stack.callback(showing.cancel)
            await follow_backlog(endpoint, args, display)
    finally:
        display.show_chart()
    return 0


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


def main(arguments: list[str] | None = None) -> int:
    hold_standard_files()
    try:
        status = asyncio.run(run(parse_arguments(arguments)))
    except ModuleNotFoundError as error:
        print(f"null_client: {missing(error.name)}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001  a person gets a line, whatever went wrong
        print(f"null_client: {error}".replace("\n", " "), file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1
    if status > 128:
        # All is closed. The same signal may still come, and Python gives up handlers as it ends.
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
    return status


if __name__ == "__main__":
    sys.exit(main())
