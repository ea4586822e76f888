"""A world in numbers for a dispatcher's rule: jobs come, machines start, consumers work or crash.

Everything is seeded. All rules meet the same world: the n-th job, the n-th cold start and the n-th
look's lag are the same for each of them. The world goes in steps of half a second.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.simulation.rules import STEP, Rule, Seen

IDLE = 10.0  # seconds after which Vast stops a worker that nobody reserves
LIFETIME = 125.0  # seconds that a reservation lasts which nobody renews
UNREACHED = 10.0  # seconds lost with a worker that can't be reached
GHOST_FOR = 4000.0  # seconds for which the list shows load on it
FIGURES = (
    "done",
    "opened",
    "needless",
    "doubled",
    "starved_s",
    "reserved_s",
    "worked_s",
    "gpu_s",
    "beyond",
    "starts",
    "ended_at",
    "left",
    "told",
)
BROKEN_AFTER = 600.0  # seconds of failing after which null_consumer.py reports its machine


@dataclass
class Scenario:
    name: str
    arrive: Callable[[random.Random, float], list[float]]  # when jobs come
    length: Callable[[random.Random], float]  # seconds of a job
    until: float = 1800.0
    most: int = 20
    jpw: int = 1
    numbers: int = 2
    start: float = 90.0  # median seconds of a cold start
    spread: float = 0.5  # sigma of its logarithm; all between 30 s and 8 min
    start_fails: float = 0.0  # share of starts that come to nothing
    load: float = 0.0  # seconds from a reservation to its first pull
    per_run: int = 0  # jobs after which a consumer ends; 0: it goes on while jobs wait
    crash: int = 0  # each so-manieth job kills its consumer
    back: float = 0.0  # seconds after which a dead consumer's job waits again
    back_by: str = "clock"  # who gives it back: the clock, a running worker, nobody
    broken: str = ""  # leave, fail, elsewhere, forgotten
    share: float = 1.0  # of the machines that are so
    mended: float = math.inf  # when all machines are well again
    ghosts: int = 0  # workers that can't be reached
    ghosts_old: bool = False  # their load was there before us, so nobody here knows of them
    count_lag: float = 0.0
    zeros: float = 0.0  # share of the counts that say 0
    list_lag: float = 5.0
    phantoms: int = 0  # in hand from the start, by nobody
    phantoms_for: float = math.inf
    restart: float = 0.0  # the dispatcher is killed and started again so often
    overlap: tuple[float, float] | None = None  # a second one from, the first one until
    refused: tuple[float, float] | None = None  # Vast refuses all requests from, until
    no_list: tuple[float, float] | None = None  # Vast's list fails from, until
    once: bool = False  # the dispatcher ends when it sees that nothing is left


@dataclass(eq=False)
class Machine:
    ready: float
    fails_start: bool
    is_broken: bool
    busy: bool = False
    idle_since: float = 0.0
    failures: int = 0
    failing_since: float = 0.0
    next_run: float = 0.0


@dataclass(eq=False)
class Held:
    """A reservation."""

    by: Any
    machine: Machine
    opened: float
    loaded: float  # when it begins to pull
    job: int | None = None
    until: float = 0.0  # of the job
    pulled: int = 0


@dataclass(eq=False)
class Dispatcher:
    rule: Rule
    own: list[Held] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)  # when each may be served
    next_look: float = 0.0
    last_look: float = -9.0
    last_opened: float = -math.inf
    last_ended: float = -math.inf
    opened: int = 0
    ended: int = 0
    unreachable: int = 0
    refused_until: float | None = None
    pause: float = 1.0
    held: deque[tuple[float, int]] = field(default_factory=deque)


class Truth(NamedTuple):
    waiting: int
    working: int
    loading: int
    reserved: int
    hopeless: bool


class World:
    def __init__(self, scenario: Scenario, make: type[Rule], seed: int) -> None:
        self.s = scenario
        self.make = make
        self.job_random = random.Random(f"jobs {seed}")
        self.start_random = random.Random(f"starts {seed}")
        self.look_random = random.Random(f"looks {seed}")
        self.crash_random = random.Random(f"crashes {seed}")
        self.arrivals = sorted(scenario.arrive(self.job_random, scenario.until))
        self.lengths = [scenario.length(self.job_random) for _ in self.arrivals]
        self.come = 0
        self.waiting: deque[int] = deque()
        self.pulled_at: list[float | None] = [None] * len(self.arrivals)
        self.in_hand = 0  # by consumers, or by nobody
        self.coming_back: list[tuple[float, int]] = []
        self.machines: list[Machine] = []
        self.dispatchers = [self.new_dispatcher(0.0)]
        self.orphans: list[Held] = []  # reservations whose dispatcher is gone
        self.ghosts = [0.0] * scenario.ghosts if scenario.ghosts_old else []
        self.unmet = 0 if scenario.ghosts_old else scenario.ghosts
        self.history: list[tuple[int, int, int]] = []  # waiting, in hand, reserved: each step
        self.out = dict.fromkeys(FIGURES, 0.0)

    def new_dispatcher(self, at: float) -> Dispatcher:
        return Dispatcher(self.make(self.s.most, self.s.jpw), next_look=at)

    # one step after the other

    def run(self) -> dict[str, float]:
        steps = int(self.s.until / STEP)
        for step in range(steps):
            t = step * STEP
            if self.out["ended_at"]:
                break
            self.jobs_come(t)
            self.dispatchers_come_and_go(t)
            self.serve_requests(t)
            self.machines_come_and_go(t)
            for held in self.all_held():
                self.work(held, t)
            self.measure(t)
            for dispatcher in self.dispatchers:
                if t >= dispatcher.next_look:
                    self.look(dispatcher, t)
                    self.end_once(dispatcher, t)
        return self.result()

    def all_held(self) -> list[Held]:
        return [held for each in self.dispatchers for held in each.own] + self.orphans

    def jobs_come(self, t: float) -> None:
        while self.come < len(self.arrivals) and self.arrivals[self.come] <= t:
            self.waiting.append(self.come)
            self.come += 1
        if self.s.back_by == "clock":
            self.give_back(t)

    def give_back(self, t: float) -> None:
        """The jobs of dead consumers wait again."""
        for item in [each for each in self.coming_back if each[0] <= t]:
            self.coming_back.remove(item)
            self.in_hand -= 1
            self.waiting.append(item[1])

    def dispatchers_come_and_go(self, t: float) -> None:
        s = self.s
        if self.dispatchers[0].rule.keeps:
            return
        if s.restart and t and t % s.restart == 0:
            self.orphans += self.dispatchers[0].own
            self.dispatchers[0] = self.new_dispatcher(t + 1)
        if s.overlap and t == s.overlap[0]:
            self.dispatchers.append(self.new_dispatcher(t))
        if s.overlap and t == s.overlap[1]:
            self.orphans += self.dispatchers.pop(0).own

    def is_refused(self, dispatcher: Dispatcher, t: float) -> bool:
        """Refusals end the requests; the next comes after a pause, as by null_backlog._Refusals."""
        s = self.s
        if not s.refused or not s.refused[0] <= t < s.refused[1]:
            return False
        if dispatcher.asking:
            dispatcher.asking.clear()
            dispatcher.refused_until = t + dispatcher.pause
            dispatcher.pause = min(60.0, 2 * dispatcher.pause)
        return True

    def serve_requests(self, t: float) -> None:
        free = [each for each in self.machines if each.ready <= t and not each.busy]
        for dispatcher in self.dispatchers:
            if self.is_refused(dispatcher, t):
                continue
            if dispatcher.asking:
                dispatcher.refused_until = None
                dispatcher.pause = 1.0
            for may_be in list(dispatcher.asking):
                if may_be > t:
                    continue
                if self.unmet:  # the router names it first, as it seems free
                    self.unmet -= 1
                    self.ghosts.append(t)
                    dispatcher.unreachable += 1
                    dispatcher.asking[dispatcher.asking.index(may_be)] = t + UNREACHED
                    continue
                if not free:
                    break
                dispatcher.asking.remove(may_be)
                self.open(dispatcher, free.pop(), t)

    def open(self, dispatcher: Dispatcher, machine: Machine, t: float) -> None:
        machine.busy = True
        loaded = max(t, machine.next_run) + self.s.load
        dispatcher.own.append(Held(dispatcher, machine, t, loaded))
        dispatcher.last_opened = t
        dispatcher.opened += 1
        self.out["opened"] += 1

    def machines_come_and_go(self, t: float) -> None:
        s = self.s
        for machine in list(self.machines):
            if machine.busy or machine.ready > t:
                continue
            if machine.fails_start or t - machine.idle_since > IDLE:
                self.machines.remove(machine)
        asked = sum(len(each.asking) for each in self.dispatchers)
        coming = sum(not each.busy for each in self.machines)
        room = s.most + 5 - len(self.machines)
        for _ in range(max(0, min(asked - coming, room))):
            takes = s.start * math.exp(self.start_random.gauss(0, s.spread))
            fails = self.start_random.random() < s.start_fails
            is_broken = self.start_random.random() < s.share and bool(s.broken)
            if s.spread:
                takes = min(480.0, max(30.0, takes))
            ready = t + takes
            self.machines.append(Machine(ready, fails, is_broken, idle_since=ready))
            self.out["starts"] += 1

    def work(self, held: Held, t: float) -> None:
        s = self.s
        is_broken = held.machine.is_broken and t < s.mended
        if is_broken and s.broken == "forgotten":
            if t - held.opened >= LIFETIME:
                self.end(held, t)
            return
        if t < held.loaded:
            return
        if is_broken:
            self.work_badly(held, t)
            return
        if held.job is not None and t >= held.until:
            self.finish(held, t)
            if held not in held.by.own and held not in self.orphans:
                return  # crashed
            if s.per_run and held.pulled >= s.per_run:
                self.end(held, t)
                return
        if held.job is None:
            self.find_job(held, t)

    def find_job(self, held: Held, t: float) -> None:
        if self.s.back_by == "worker":
            self.give_back(t)
        if self.waiting:
            self.pull(held, t, None)
        else:
            held.machine.failures = 0
            self.end(held, t)

    def pull(self, held: Held, t: float, seconds: float | None) -> None:
        job = self.waiting.popleft()
        if self.pulled_at[job] is None and seconds is None:
            self.pulled_at[job] = t
        self.in_hand += 1
        held.job = job
        held.pulled += 1
        held.until = t + (self.lengths[job] if seconds is None else seconds)

    def finish(self, held: Held, t: float) -> None:
        s = self.s
        job = held.job
        assert job is not None
        held.job = None
        if s.crash and self.crash_random.random() < 1 / s.crash:
            if s.back or s.back_by == "nobody":
                self.coming_back.append((t + s.back, job))
            else:
                self.in_hand -= 1
                self.waiting.appendleft(job)
            self.end(held, t)
            return
        self.in_hand -= 1
        self.out["done"] += 1
        self.out["worked_s"] += self.lengths[job]

    def work_badly(self, held: Held, t: float) -> None:
        kind = self.s.broken
        machine = held.machine
        if kind == "elsewhere":
            if held.until == 0.0:
                held.until = t + 5.0
            elif t >= held.until:
                self.end(held, t)
            return
        if kind == "fail" and held.job is None and self.waiting:
            self.pull(held, t, 2.0)
            return
        if held.job is not None:
            if t < held.until:
                return
            self.in_hand -= 1
            self.waiting.append(held.job)
            held.job = None
        machine.failures += 1
        if machine.failures == 1:
            machine.failing_since = t
        machine.next_run = t + min(60.0, 2.0 ** (machine.failures - 1))
        self.end(held, t)
        if machine.failures >= 3 and t - machine.failing_since >= BROKEN_AFTER:
            self.machines.remove(machine)

    def end(self, held: Held, t: float) -> None:
        dispatcher = held.by
        held.machine.busy = False
        held.machine.idle_since = t
        self.out["reserved_s"] += t - held.opened
        self.out["needless"] += not held.pulled
        if held in self.orphans:
            self.orphans.remove(held)
            return
        dispatcher.own.remove(held)
        dispatcher.ended += 1
        dispatcher.last_ended = t
        if dispatcher.rule.after_end:
            dispatcher.next_look = min(dispatcher.next_look, max(t, dispatcher.last_look + 1))

    def truth(self, t: float) -> Truth:
        held = self.all_held()
        working = sum(each.job is not None for each in held)
        hopeless = bool(self.s.broken) and self.s.share == 1.0 and t < self.s.mended
        return Truth(len(self.waiting), working, len(held) - working, len(held), hopeless)

    def measure(self, t: float) -> None:
        s = self.s
        phantoms = s.phantoms if t < s.phantoms_for else 0
        truth = self.truth(t)
        ghosts = sum(t - since < GHOST_FOR for since in self.ghosts)
        self.history.append((truth.waiting, self.in_hand + phantoms, truth.reserved + ghosts))
        asked = sum(len(each.asking) for each in self.dispatchers)
        need = self.dispatchers[0].rule.workers_for(truth.waiting + truth.working) - truth.working
        if need > truth.loading + asked and truth.reserved + asked < s.most and not truth.hopeless:
            self.out["starved_s"] += STEP
        self.out["gpu_s"] += STEP * len(self.machines)
        self.out["beyond"] = max(self.out["beyond"], truth.reserved - s.most)
        for each in self.dispatchers:
            each.held.append((t, len(each.own)))
            while each.held and each.held[0][0] < t - 15:
                each.held.popleft()

    def end_once(self, dispatcher: Dispatcher, t: float) -> None:
        """As follow() with `once`."""
        idle = not dispatcher.own and not dispatcher.asking
        if self.s.once and idle and dispatcher.rule.sees_nothing_left(t):
            self.out["ended_at"] = t
            self.out["left"] = len(self.arrivals) - self.out["done"]

    def look(self, dispatcher: Dispatcher, t: float) -> None:
        s = self.s
        dispatcher.next_look = t + dispatcher.rule.every
        dispatcher.last_look = t

        def at(lag: float) -> tuple[int, int, int]:
            index = len(self.history) - 1 - int(lag / STEP)
            return (
                self.history[index]
                if index >= 0
                else (0, 0, self.history[0][2] if s.ghosts_old else 0)
            )

        waiting, in_hand, _ = at(s.count_lag * self.look_random.uniform(0.5, 1))
        if s.zeros and self.look_random.random() < s.zeros:
            waiting = in_hand = 0
        truth = self.truth(t)
        seen = Seen(
            at=t,
            waiting=waiting if s.numbers >= 2 else waiting + in_hand,
            in_hand=in_hand if s.numbers >= 2 else None,
            done=int(self.out["done"]) if s.numbers == 3 else None,
            listed=self.listed(at(s.list_lag * self.look_random.uniform(0.3, 1))[2], t),
            most_own=max(count for _, count in dispatcher.held) if dispatcher.held else 0,
            own=tuple(each.opened for each in dispatcher.own),
            last_opened=dispatcher.last_opened,
            last_ended=dispatcher.last_ended,
            asked=len(dispatcher.asking),
            opened=dispatcher.opened,
            ended=dispatcher.ended,
            unreachable=dispatcher.unreachable,
            refused_until=dispatcher.refused_until,
            truth=truth,
        )
        ask, take_back = dispatcher.rule.look(seen)
        self.out["told"] = max(self.out["told"], len(dispatcher.rule.troubles))
        if take_back:
            del dispatcher.asking[len(dispatcher.asking) - min(take_back, len(dispatcher.asking)) :]
        asked = sum(len(each.asking) for each in self.dispatchers)
        need = dispatcher.rule.workers_for(truth.waiting + truth.working) - truth.working
        surplus = asked + ask + truth.loading - need
        self.out["doubled"] += max(0, min(ask, surplus))
        dispatcher.asking += [t] * ask

    def listed(self, reserved: int, t: float) -> int | None:
        if self.s.no_list and self.s.no_list[0] <= t < self.s.no_list[1]:
            return None
        return reserved

    def result(self) -> dict[str, float]:
        out = self.out
        for held in self.all_held():
            out["reserved_s"] += self.s.until - held.opened
            if held.job is not None and not (
                held.machine.is_broken and self.s.until < self.s.mended
            ):
                out["worked_s"] += max(0.0, self.lengths[held.job] - (held.until - self.s.until))
        waits = [
            (self.s.until if pulled is None else pulled) - came
            for came, pulled in zip(self.arrivals, self.pulled_at, strict=True)
        ] or [0.0]
        out["wait"] = statistics.fmean(waits)
        out["p95"] = sorted(waits)[int(0.95 * (len(waits) - 1))]
        return out
