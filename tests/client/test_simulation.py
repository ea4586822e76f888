"""What the dispatcher's rule promises, in the simulated world of tests/simulation."""

import pytest

from tests.simulation.rules import rules
from tests.simulation.scenarios import scenarios
from tests.simulation.world import World

SCENARIOS = {scenario.name: scenario for scenario in scenarios()}


def run(name, rule="new"):
    return World(SCENARIOS[name], rules()[rule], seed=0).run()


def waits_beyond_the_oracle(name):
    return run(name)["wait"] - run(name, "oracle")["wait"]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7, 10])
def test_jobs_that_come_as_fast_as_they_are_pulled_wait_for_nobody(every):
    assert waits_beyond_the_oracle(f"K2: 60 jobs, one each {every} s x 20 min") <= 3


def test_a_worker_that_nobody_reaches_stops_nothing():
    assert waits_beyond_the_oracle("1 ghost(s) met, max 1") <= 40


def test_a_load_that_nobody_holds_stops_nothing_for_longer_than_it_takes_to_see_that():
    assert waits_beyond_the_oracle("1 ghost(s) from before, max 1") <= 200  # 1,690 if it did


def test_a_queue_that_grows_and_tells_what_is_done_keeps_its_workers():
    growing = "growing 10/s, max 3, ends after 4, three numbers"
    assert waits_beyond_the_oracle(growing) <= 5
    assert run(growing)["done"] >= 0.95 * run(growing, "oracle")["done"]


@pytest.mark.parametrize("kind", ["leave", "fail", "elsewhere", "forgotten"])
def test_consumers_that_are_broken_everywhere_cost_little_more_than_one_worker(kind):
    assert run(f"broken ({kind}), 20 jobs, 1 h")["gpu_s"] <= 3 * 3600


def test_jobs_that_only_a_running_worker_gives_back_are_done():
    assert run("stranded: back by a running worker, 10 min")["done"] == 12


def test_jobs_that_never_come_back_cost_a_few_reservations():
    figures = run("stranded: never back")
    assert figures["needless"] <= 8 and figures["told"]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("once")])
def test_once_ends_and_leaves_no_job(name):
    figures = run(name)
    assert figures["ended_at"] > 0 and figures["left"] == 0
