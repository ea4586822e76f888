"""The rules that are compared: an oracle, KEDA's two, the obvious one, and null_rule.py's.

A rule sees what a dispatcher sees (`Seen`) and answers with two numbers: ask for so many workers,
take back so many requests.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import null_rule

STEP = 0.5  # seconds, of the world


@dataclass
class Seen:
    at: float
    waiting: int | None  # None: not counted
    in_hand: int | None  # None: one number only
    done: int | None  # None: two numbers at most
    listed: int | None  # reserved, by Vast's list, which lags; None: it failed
    most_own: int  # own ones held at a time in the 15 s before
    own: tuple[float, ...]  # when each that is held was opened
    last_opened: float
    last_ended: float
    asked: int
    opened: int  # so far
    ended: int  # so far
    unreachable: int  # workers that were named to us in the last hour and couldn't be reached
    refused_until: float | None  # while Vast refuses
    truth: Any = None  # for the oracle, and for KEDA, which knows its own pods


class Rule:
    every = 5.0  # seconds between two looks
    after_end = True  # and again a second after an end
    keeps = False  # its state outlives a restart, as Kubernetes keeps jobs

    def __init__(self, most: int, jobs_per_worker: int) -> None:
        self.most = most
        self.jobs_per_worker = jobs_per_worker

    def workers_for(self, jobs: int) -> int:
        return -(-jobs // self.jobs_per_worker)

    def look(self, seen: Seen) -> tuple[int, int]:
        """Ask for so many workers, take back so many requests."""
        raise NotImplementedError

    def sees_nothing_left(self, at: float) -> bool:
        """Whether `once` would end now, if nothing is reserved or asked for."""
        return False

    @property
    def troubles(self) -> set[str]:
        """What a person is told."""
        return set()


class Oracle(Rule):
    """See the truth without lag: who loads, who works, which jobs nobody will take.

    It has the same cold starts and the same consumers. Where all consumers are broken it asks for
    nobody.
    """

    every = STEP
    after_end = False
    keeps = True

    def look(self, seen: Seen) -> tuple[int, int]:
        truth = seen.truth
        if truth.hopeless:
            return 0, seen.asked
        need = self.workers_for(truth.waiting + truth.working) - truth.working - truth.loading
        room = self.most - truth.reserved
        need = max(0, min(need, room))
        return max(0, need - seen.asked), max(0, seen.asked - need)


class Keda(Rule):
    """KEDA's ScaledJob: every 30 s, so many new ones; a pending one is never taken back."""

    every = 30.0
    after_end = False
    keeps = True

    def look(self, seen: Seen) -> tuple[int, int]:
        if seen.waiting is None:
            return 0, 0
        running = seen.truth.reserved + seen.asked  # it counts all that haven't finished
        scale = min(self.most, self.workers_for(self.queue_length(seen)))
        ask = min(scale, max(0, self.effective_max(scale, running, seen.asked)))
        return ask, 0

    def queue_length(self, seen: Seen) -> int:
        return (seen.waiting or 0) + (seen.in_hand or 0)

    def effective_max(self, scale: int, running: int, pending: int) -> int:
        return scale - running


class KedaDefault(Keda):
    pass


class KedaAccurate(Keda):
    """For queues whose length doesn't hold what is locked: of two numbers, the first."""

    def queue_length(self, seen: Seen) -> int:
        return seen.waiting or 0

    def effective_max(self, scale: int, running: int, pending: int) -> int:
        if scale + running > self.most:
            return self.most - running
        return scale - pending


class Naive(Rule):
    """target = jobs"""

    def look(self, seen: Seen) -> tuple[int, int]:
        if seen.waiting is None:
            return 0, 0
        target = min(self.most, self.workers_for(seen.waiting + (seen.in_hand or 0)))
        lacking = target - len(seen.own) - seen.asked
        return max(0, lacking), max(0, min(seen.asked, -lacking))


class Decided(Rule):
    """The rule of null_rule.py."""

    def __init__(self, most: int, jobs_per_worker: int) -> None:
        super().__init__(most, jobs_per_worker)
        self.limits = null_rule.Limits(most, jobs_per_worker)
        self.history = null_rule.History()
        self.now = 0.0

    def look(self, seen: Seen) -> tuple[int, int]:
        jobs = None
        if seen.waiting is not None:
            jobs = null_rule.Jobs(seen.waiting, seen.in_hand, seen.done)
        fields = null_rule.Snapshot._fields
        told = {name: getattr(seen, name) for name in fields if name != "jobs"}
        now = null_rule.Snapshot(jobs=jobs, **told)
        self.now = seen.at
        self.history, decision = null_rule.decide(self.limits, self.history, now)
        return (decision.ask, decision.take_back) if decision else (0, 0)

    def sees_nothing_left(self, at: float) -> bool:
        return null_rule.nothing_is_left(self.limits, self.history, at)

    @property
    def troubles(self) -> set[str]:
        found = {
            "stuck": self.history.stuck,
            "ghost": self.history.ghosts,
            "stranded": null_rule.is_stranded(self.history, self.now),
        }
        return {name for name, is_so in found.items() if is_so}


class Before(Rule):
    """The rule of null_client.py up to version 1.0.0, from a checkout of it."""

    module: Any = None

    def __init__(self, most: int, jobs_per_worker: int) -> None:
        super().__init__(most, jobs_per_worker)
        self.limits = self.module.Limits(most, jobs_per_worker)
        self.course = self.module.Course()

    def look(self, seen: Seen) -> tuple[int, int]:
        jobs = None if seen.waiting is None else self.module.Jobs(seen.waiting, seen.in_hand)
        fields = self.module.Look._fields
        told = {name: getattr(seen, name) for name in fields if name != "jobs"}
        self.course, decision = self.module.decide(
            self.limits, self.course, self.module.Look(jobs=jobs, **told)
        )
        return (decision.ask, decision.take_back) if decision else (0, 0)

    def sees_nothing_left(self, at: float) -> bool:
        return bool(self.module.nothing_is_left(self.limits, self.course, at))


def module_of(checkout: str) -> ModuleType:
    """The null_client.py of an older checkout, under a name of its own."""
    spec = importlib.util.spec_from_file_location("before", Path(checkout) / "null_client.py")
    assert spec and spec.loader
    module = sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rules(before: str = "") -> dict[str, type[Rule]]:
    """By name. `before` is a checkout of version 1.0.0 or older."""
    found: dict[str, type[Rule]] = {
        "oracle": Oracle,
        "new": Decided,
        "keda-default": KedaDefault,
        "keda-accurate": KedaAccurate,
        "naive": Naive,
    }
    if before:
        found["before"] = type("BeforeHere", (Before,), {"module": module_of(before)})
    return found
