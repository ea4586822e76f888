"""The rule of null_backlog.py against scenarios, an oracle, KEDA and the rule of before.

    python -m tests.simulation [--before DIR] [--rules oracle,new,...] [--only WORD] [--seeds N]

--before is a checkout of version 1.0.0 or older. For each scenario and rule it prints, beyond the
oracle's: the mean wait of a job in seconds, GPU-seconds, and reservations that pulled no job.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics

from tests.simulation.rules import rules
from tests.simulation.scenarios import scenarios
from tests.simulation.world import World

Figures = dict[str, float]


def one(task: tuple[str, str, str, int]) -> tuple[str, str, Figures]:
    before, rule, name, seed = task
    scenario = next(each for each in scenarios() if each.name == name)
    return name, rule, World(scenario, rules(before)[rule], seed).run()


def means(tasks: list[tuple[str, str, str, int]], processes: int) -> dict[tuple[str, str], Figures]:
    results: dict[tuple[str, str], list[Figures]] = {}
    with multiprocessing.Pool(processes) as pool:
        for name, rule, figures in pool.imap(one, tasks, chunksize=4):
            results.setdefault((name, rule), []).append(figures)
    return {
        key: {field: statistics.fmean(each[field] for each in all_of) for field in all_of[0]}
        for key, all_of in results.items()
    }


def show(names: list[str], chosen: list[str], found: dict[tuple[str, str], Figures]) -> None:
    print(f"{'wait / GPU-seconds / in vain':52}" + "".join(f"{rule:>24}" for rule in chosen))
    for name in names:
        base = found[name, "oracle"]
        cells = ""
        for rule in chosen:
            m = found[name, rule]
            cells += f"{m['wait'] - base['wait']:9.1f} {m['gpu_s'] - base['gpu_s']:8.0f}"
            cells += f" {m['needless']:5.0f}"
        print(f"{name[:52]:52}{cells}")
    print(f"{'mean':52}", end="")
    for rule in chosen:
        wait = statistics.fmean(
            found[name, rule]["wait"] - found[name, "oracle"]["wait"] for name in names
        )
        gpu = statistics.fmean(
            found[name, rule]["gpu_s"] - found[name, "oracle"]["gpu_s"] for name in names
        )
        print(f"{wait:9.1f} {gpu:8.0f}      ", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--before", default="", metavar="DIR")
    parser.add_argument("--rules", default="", metavar="NAMES", help="default: oracle, new, before")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="scenarios with this in the name"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    chosen = (
        args.rules.split(",") if args.rules else ["oracle", "new"] + ["before"] * bool(args.before)
    )
    names = [each.name for each in scenarios() if args.only in each.name]
    tasks = [
        (args.before, rule, name, seed)
        for name in names
        for rule in dict.fromkeys(["oracle", *chosen])
        for seed in range(args.seeds)
    ]
    show(names, chosen, means(tasks, args.processes))


if __name__ == "__main__":
    main()
