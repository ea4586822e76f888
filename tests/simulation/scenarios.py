"""The scenarios: bursts, trickles, crashes, ghosts, lists that lie."""

from __future__ import annotations

import math
import random
from typing import Any

from tests.simulation.world import Scenario


def burst(n: int, at: float = 0.0) -> Any:
    return lambda _random, _until: [at] * n


def each(seconds: float, first: float = 0.0, last: float = math.inf) -> Any:
    """One after the other, as a clock."""
    return lambda _random, until: [
        first + i * seconds for i in range(int(max(0.0, min(last, until) - first) / seconds))
    ]


def poisson(rate: float, first: float = 0.0, last: float = math.inf) -> Any:
    def arrive(rng: random.Random, until: float) -> list[float]:
        times = []
        t = first
        while (t := t + rng.expovariate(rate)) < min(last, until):
            times.append(t)
        return times

    return arrive


def both(*several: Any) -> Any:
    return lambda rng, until: [t for one in several for t in one(rng, until)]


def fixed(seconds: float) -> Any:
    return lambda _random: seconds


def around(seconds: float, sigma: float = 0.5) -> Any:
    return lambda rng: seconds * math.exp(rng.gauss(-sigma * sigma / 2, sigma))


HOUR = 3600.0


def scenarios() -> list[Scenario]:
    S = Scenario
    all_of: list[Scenario] = [
        S("burst 100 x 1 s", burst(100), fixed(1)),
        S("burst 100 x 1 s, 50 a worker", burst(100), fixed(1), jpw=50),
        S("burst 60 x 60 s", burst(60), around(60)),
        S("burst 60 x 60 s, one number", burst(60), around(60), numbers=1),
        S("burst 25 x 20 min", burst(25), around(1200), until=2 * HOUR),
        S(
            "two bursts, 5 + 3 after 30 min, 1 h",
            both(burst(5), burst(3, 1800)),
            fixed(3600),
            until=2 * HOUR,
        ),
        S("trickle 1/3 s x 1 s, max 3", poisson(1 / 3), fixed(1), most=3),
        S("trickle 1/3 s x 1 s, max 3, one number", poisson(1 / 3), fixed(1), most=3, numbers=1),
        S("trickle 1/3 s x 1 s, one a run", poisson(1 / 3), fixed(1), most=3, per_run=1),
        S("trickle 1/30 s x 20 s", poisson(1 / 30), around(20)),
        S("trickle 1/5 min x 60 s", poisson(1 / 300), around(60), until=2 * HOUR),
        S("trickle 1/min x 20 min", poisson(1 / 60), around(1200), until=2 * HOUR, most=30),
        S(
            "trickle 1/min x 20 min, one number",
            poisson(1 / 60),
            around(1200),
            until=2 * HOUR,
            most=30,
            numbers=1,
        ),
        S("overload 2/s x 20 s", poisson(2), around(20)),
        S("overload 2/s x 20 s, one a run", poisson(2), around(20), per_run=1),
        S(
            "overload 2/s x 20 s, one a run, one number",
            poisson(2),
            around(20),
            per_run=1,
            numbers=1,
        ),
        S("overload by a clock, one a run, one number", each(0.5), fixed(20), per_run=1, numbers=1),
    ]
    for every in (1, 2, 3, 5, 7, 10):
        all_of.append(
            S(
                f"K2: 60 jobs, one each {every} s x 20 min",
                each(every, 0, 60 * every),
                fixed(1200),
                most=60,
                until=2400,
                start=60,
                spread=0,
            )
        )
    all_of += [
        S(
            "growing 10/s, max 3, ends after 4, one number",
            each(0.1),
            fixed(0.5),
            most=3,
            per_run=4,
            numbers=1,
            start=5,
            spread=0,
            until=900,
        ),
        S(
            "growing 10/s, max 3, ends after 4",
            each(0.1),
            fixed(0.5),
            most=3,
            per_run=4,
            start=5,
            spread=0,
            until=900,
        ),
        S(
            "growing 10/s, max 3, crash 1/12, one number",
            each(0.1),
            fixed(0.5),
            most=3,
            crash=12,
            numbers=1,
            start=5,
            spread=0,
            until=900,
        ),
        S(
            "growing 1/s x 30 s, ends after 5, one number",
            poisson(1),
            around(30),
            per_run=5,
            numbers=1,
            until=HOUR,
        ),
        S("growing 1/s x 30 s, ends after 5", poisson(1), around(30), per_run=5, until=HOUR),
        S(
            "growing 1/s x 30 s, crash 1/20, one number",
            poisson(1),
            around(30),
            crash=20,
            numbers=1,
            until=HOUR,
        ),
        S(
            "growing 1/10 s x 5 min, one a run, one number",
            poisson(0.1),
            around(300),
            per_run=1,
            numbers=1,
            until=2 * HOUR,
        ),
        S("crash 1/5, 200 x 10 s", burst(200), around(10), crash=5),
        S("crash 1/5, 200 x 10 s, back after 3 min", burst(200), around(10), crash=5, back=180),
        S("crash 1/5, 200 x 10 s, one number", burst(200), around(10), crash=5, numbers=1),
        S("crash 1/20, 100 x 60 s, back after 3 min", burst(100), around(60), crash=20, back=180),
        S("a consumer ends after 3, 300 x 10 s", burst(300), around(10), per_run=3),
    ]
    for kind in ("leave", "fail", "elsewhere", "forgotten"):
        all_of.append(
            S(
                f"broken ({kind}), 20 jobs, 1 h",
                burst(20),
                fixed(10),
                broken=kind,
                load=1,
                until=HOUR,
            )
        )
        all_of.append(
            S(
                f"broken ({kind}) after 90 s, 20 jobs, 1 h",
                burst(20),
                fixed(10),
                broken=kind,
                load=90,
                until=HOUR,
            )
        )
        all_of.append(
            S(
                f"broken ({kind}) after 6 min, 20 jobs, 2 h",
                burst(20),
                fixed(10),
                broken=kind,
                load=360,
                until=2 * HOUR,
            )
        )
        all_of.append(
            S(
                f"broken ({kind}), 1/10 s, 1 h",
                poisson(0.1),
                fixed(10),
                broken=kind,
                load=20,
                until=HOUR,
            )
        )
        all_of.append(
            S(
                f"broken ({kind}), 1/10 s, one number, 1 h",
                poisson(0.1),
                fixed(10),
                broken=kind,
                load=20,
                numbers=1,
                until=HOUR,
            )
        )
    all_of += [
        S(
            "broken (leave), 1/s, one number, 1 h",
            poisson(1),
            fixed(10),
            broken="leave",
            load=20,
            numbers=1,
            until=HOUR,
        ),
        S(
            "broken (leave), one phantom, 1 h",
            burst(20),
            fixed(10),
            broken="leave",
            load=1,
            phantoms=1,
            until=HOUR,
        ),
        S(
            "broken (leave), mended after 30 min",
            burst(40),
            around(30),
            broken="leave",
            load=5,
            mended=1800,
            until=HOUR,
        ),
        S(
            "broken (forgotten), mended after 30 min",
            burst(40),
            around(30),
            broken="forgotten",
            load=5,
            mended=1800,
            until=HOUR,
        ),
        S(
            "broken (leave), mended after 30 min, 20 min jobs",
            burst(20),
            around(1200),
            broken="leave",
            load=5,
            mended=1800,
            until=2 * HOUR,
        ),
        S(
            "crash 1/4, 1/60 s x 20 min",
            poisson(1 / 60),
            around(1200),
            crash=4,
            most=30,
            until=2 * HOUR,
        ),
        S(
            "restarts each 10 min, 8 x 1 h, one number",
            both(burst(4), poisson(1 / 600)),
            around(3600),
            restart=600,
            numbers=1,
            until=3 * HOUR,
        ),
        S(
            "3 of 10 machines broken (leave)",
            poisson(0.2),
            around(60),
            broken="leave",
            share=0.3,
            load=5,
            until=HOUR,
        ),
        S(
            "3 of 10 machines broken (fail)",
            poisson(0.2),
            around(60),
            broken="fail",
            share=0.3,
            load=5,
            until=HOUR,
        ),
        S("load 90 s, 20 x 10 s, max 5", burst(20), around(10), load=90, most=5),
        S("load 90 s, 2 waiting, 18 phantoms", burst(2), fixed(10), load=90, phantoms=18),
        S("load 6 min, 40 x 60 s", burst(40), around(60), load=360, until=HOUR),
        S("load 6 min, 1/30 s x 60 s", poisson(1 / 30), around(60), load=360, until=2 * HOUR),
        S(
            "load 6 min, 1/30 s x 60 s, one number",
            poisson(1 / 30),
            around(60),
            load=360,
            until=2 * HOUR,
            numbers=1,
        ),
        S(
            "load 90 s, 1/60 s x 5 min, 5 phantoms 10 min",
            poisson(1 / 60),
            around(300),
            load=90,
            phantoms=5,
            phantoms_for=600,
            until=HOUR,
        ),
    ]
    for ghosts in (1, 3):
        for most in (1, 3, 20):
            for old in (False, True):
                who = "from before" if old else "met"
                all_of.append(
                    S(
                        f"{ghosts} ghost(s) {who}, max {most}",
                        poisson(1 / 60),
                        around(30),
                        ghosts=ghosts,
                        ghosts_old=old,
                        most=most,
                        until=HOUR,
                    )
                )
    all_of += [
        S(
            "1 ghost from before, max 1, one number",
            poisson(1 / 60),
            around(30),
            ghosts=1,
            ghosts_old=True,
            most=1,
            numbers=1,
            until=HOUR,
        ),
        S(
            "1 ghost met, max 1, one number",
            poisson(1 / 60),
            around(30),
            ghosts=1,
            most=1,
            numbers=1,
            until=HOUR,
        ),
        S("list lags 15 s, 1/30 s x 20 s", poisson(1 / 30), around(20), list_lag=15),
        S("count lags 30 s, 1/30 s x 20 s", poisson(1 / 30), around(20), count_lag=30),
        S("count lags 60 s, 1/30 s x 20 s", poisson(1 / 30), around(20), count_lag=60),
        S("count lags 60 s, burst 40 x 20 s", burst(40), around(20), count_lag=60),
        S("a third of the counts 0, 60 x 10 s, max 3", burst(60), around(10), zeros=0.33, most=3),
        S("a third of the counts 0, 1/30 s x 60 s", poisson(1 / 30), around(60), zeros=0.33),
        S("6 jobs, a phantom in hand", burst(6), fixed(10), phantoms=1, most=3),
        S(
            "6 jobs, a phantom 15 min, one number",
            burst(6),
            fixed(10),
            phantoms=1,
            phantoms_for=900,
            numbers=1,
            most=3,
        ),
        S("restarts each min, 1/10 s x 60 s", poisson(0.1), around(60), restart=60, list_lag=15),
        S("restarts each min, 40 x 5 min", burst(40), around(300), restart=60, list_lag=15),
        S(
            "restarts each min, 20 x 5 min, load 90 s",
            burst(20),
            around(300),
            restart=60,
            load=90,
            list_lag=15,
        ),
        S(
            "restarts each 5 min, 20 x 10 min, load 6 min",
            burst(20),
            around(600),
            restart=300,
            load=360,
            list_lag=15,
            until=HOUR,
        ),
        S(
            "restarts each 5 min, 12 x 10 min, one number",
            burst(12),
            around(600),
            restart=300,
            numbers=1,
            list_lag=15,
            until=HOUR,
        ),
        S(
            "overlap 60 s in a deploy, 1/10 s x 60 s",
            poisson(0.1),
            around(60),
            overlap=(600, 660),
            list_lag=15,
        ),
        S(
            "overlap 60 s in a deploy, burst at it",
            burst(20, 590),
            around(120),
            overlap=(600, 660),
            list_lag=15,
        ),
        S("3 of 10 starts fail, 40 x 60 s", burst(40), around(60), start_fails=0.3),
        S("slow starts, 4 min, 1/30 s x 60 s", poisson(1 / 30), around(60), start=240, until=HOUR),
        S(
            "day: quiet, busy, quiet",
            both(poisson(1 / 60, 0, 1800), poisson(0.5, 1800, 3000), poisson(1 / 60, 3000)),
            around(30),
            until=2 * HOUR,
        ),
    ]
    all_of += [
        S(
            "growing 10/s, max 3, ends after 4, three numbers",
            each(0.1),
            fixed(0.5),
            most=3,
            per_run=4,
            numbers=3,
            start=5,
            spread=0,
            until=900,
        ),
        S(
            "broken (fail), 1/10 s, three numbers, 1 h",
            poisson(0.1),
            fixed(10),
            broken="fail",
            load=20,
            numbers=3,
            until=HOUR,
        ),
        S("burst 60 x 60 s, three numbers", burst(60), around(60), numbers=3),
        S(
            "stranded: back by the clock, 3 min",
            burst(12),
            around(30),
            crash=4,
            back=180,
            most=4,
            until=HOUR,
        ),
        S(
            "stranded: back by a running worker, 1 min",
            burst(12),
            around(30),
            crash=4,
            back=60,
            back_by="worker",
            most=4,
            until=HOUR,
        ),
        S(
            "stranded: back by a running worker, 10 min",
            burst(12),
            around(30),
            crash=4,
            back=600,
            back_by="worker",
            most=4,
            until=2 * HOUR,
        ),
        S(
            "stranded: never back",
            burst(12),
            around(30),
            crash=4,
            back_by="nobody",
            most=4,
            until=2 * HOUR,
        ),
        S("once: 40 x 20 s", burst(40), around(20), once=True, most=10),
        S(
            "once: crash 1/5, back after 3 min",
            burst(40),
            around(20),
            crash=5,
            back=180,
            once=True,
            most=10,
            until=HOUR,
        ),
        S("once: a third of the counts 0", burst(40), around(20), zeros=0.33, once=True, most=10),
        S("refused for 2 min, 1/30 s x 60 s", poisson(1 / 30), around(60), refused=(300, 420)),
        S(
            "refused for 20 min, 1/30 s x 60 s",
            poisson(1 / 30),
            around(60),
            refused=(300, 1500),
            until=HOUR,
        ),
        S("no list for 40 s, 1/30 s x 60 s", poisson(1 / 30), around(60), no_list=(300, 340)),
        S("no list for 5 min, 1/30 s x 60 s", poisson(1 / 30), around(60), no_list=(300, 600)),
    ]
    return all_of + held_out()


def held_out() -> list[Scenario]:
    """Written after the constants were chosen, and never used to choose them."""
    S = Scenario
    return [
        S(
            "held out: by a clock 3/s, one a run, one number",
            each(1 / 3),
            fixed(20),
            per_run=1,
            numbers=1,
            until=HOUR,
        ),
        S(
            "held out: by a clock 1.2/s, one a run, one number",
            each(1 / 1.2),
            fixed(20),
            per_run=1,
            numbers=1,
            until=HOUR,
        ),
        S(
            "held out: by a clock 6/s, one a run, one number",
            each(1 / 6),
            fixed(20),
            per_run=1,
            numbers=1,
            until=HOUR,
        ),
        S(
            "held out: 1.5/s x 12 s, ends after 3, one number",
            poisson(1.5),
            around(12),
            per_run=3,
            numbers=1,
            most=10,
            until=HOUR,
        ),
        S(
            "held out: 2/min x 8 min, crash 1/3, max 12",
            poisson(1 / 30),
            around(480),
            crash=3,
            back=120,
            most=12,
            until=2 * HOUR,
        ),
        S(
            "held out: 2/min x 8 min, crash 1/3, max 12, one number",
            poisson(1 / 30),
            around(480),
            crash=3,
            back=120,
            most=12,
            numbers=1,
            until=2 * HOUR,
        ),
        S(
            "held out: K2, Poisson 1/4 s x 15 min, max 60",
            poisson(0.25, 0, 240),
            around(900),
            most=60,
            until=2400,
        ),
        S(
            "held out: mended after 45 min, 3 min jobs",
            burst(15),
            around(180),
            broken="fail",
            load=30,
            mended=2700,
            until=2 * HOUR,
        ),
        S(
            "held out: 2 ghosts from before, max 5, one number",
            poisson(1 / 40),
            around(60),
            ghosts=2,
            ghosts_old=True,
            most=5,
            numbers=1,
            until=HOUR,
        ),
        S(
            "held out: 1 ghost met, max 2, restarts each 10 min",
            poisson(1 / 60),
            around(30),
            ghosts=1,
            most=2,
            restart=600,
            until=HOUR,
        ),
        S(
            "held out: restart each 20 min, load 6 min, 30 min jobs, one number",
            burst(6),
            around(1800),
            load=360,
            restart=1200,
            numbers=1,
            until=2 * HOUR,
        ),
        S(
            "broken (leave), held out: 1/s, one number, 1st hour",
            poisson(1),
            fixed(10),
            broken="leave",
            load=20,
            numbers=1,
            until=HOUR,
        ),
        S(
            "broken (leave), held out: 1/s, one number, 4 hours",
            poisson(1),
            fixed(10),
            broken="leave",
            load=20,
            numbers=1,
            until=4 * HOUR,
        ),
    ]
