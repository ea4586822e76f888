"""LocalVast: which worker a request gets, and when one is started or stopped."""

import time

import pytest

from null_local import LocalWorker, another_is_needed, place_of, why_to_stop, worker_for
from tests.kit.vast import overbooked_worker

FREE = {"max_perf": 100.0, "cur_load": 0.0}
OCCUPIED = {"max_perf": 100.0, "cur_load": 100.0}
BROKEN = {"max_perf": 100.0, "cur_load": 0.0, "error_msg": "it is sick"}


def worker(report=None, **fields):
    return LocalWorker(1, 1, 2, 3, "", "", [], report=report or {}, **fields)


@pytest.mark.parametrize(
    ("waiting", "ago", "place"),
    [
        ([], {}, 0),
        ([7], {7: 0}, 0),
        ([5, 6, 7], {5: 0, 6: 9, 7: 0}, 2),
        ([5, 6, 7], {5: 0, 6: 11, 7: 0}, 1),  # nobody polls for 6 any more
        ([7, 8], {7: 0, 8: 0}, 0),
    ],
)
def test_the_place_of_a_request_is_after_those_that_still_ask(waiting, ago, place):
    now = 1000.0
    assert place_of(7, waiting, {idx: now - seconds for idx, seconds in ago.items()}, now) == place


@pytest.mark.parametrize(
    ("choose", "place", "reports", "chosen"),
    [
        (worker_for, 0, [], None),
        (worker_for, 0, [{}], None),
        (worker_for, 0, [FREE], 0),
        (worker_for, 0, [OCCUPIED, FREE], 1),
        (worker_for, 0, [BROKEN, FREE], 1),
        (worker_for, 1, [FREE], None),  # it is for the one before
        (worker_for, 1, [FREE, FREE], 0),
        (worker_for, 0, [OCCUPIED], None),
        (overbooked_worker, 0, [OCCUPIED], 0),
        (overbooked_worker, 0, [OCCUPIED, FREE], 1),
        (overbooked_worker, 0, [BROKEN], None),
    ],
)
def test_a_request_gets_a_free_worker(choose, place, reports, chosen):
    workers = [worker(report) for report in reports]
    expected = None if chosen is None else workers[chosen]
    assert choose(place, workers) is expected


def test_a_worker_that_was_promised_is_not_free_until_that_is_over():
    soon, over = time.monotonic() + 5, time.monotonic() - 1
    assert worker_for(0, [worker(FREE, promised_to=7, promised_until=soon)]) is None
    assert worker_for(0, [worker(FREE, promised_to=7, promised_until=over)]) is not None
    assert worker_for(0, [worker(FREE, promised_until=soon)]) is not None  # it came, and has gone


@pytest.mark.parametrize(
    ("place", "reports", "most", "needed"),
    [
        (0, [], 3, True),
        (0, [], 0, False),
        (0, [{}], 3, False),  # one is loading
        (1, [{}], 3, True),
        (1, [{}], 1, False),
        (0, [OCCUPIED], 3, True),
        (0, [FREE], 3, False),
        (1, [FREE, {}], 3, False),
        (2, [FREE, {}], 3, True),
        (0, [BROKEN], 3, True),
        (0, [BROKEN], 1, False),  # it is there until it has ended
    ],
)
def test_one_is_started_where_none_is_free_or_coming(place, reports, most, needed):
    assert another_is_needed(place, [worker(report) for report in reports], most) == needed


def test_the_states_are_vasts():
    assert [worker(report).state for report in ({}, FREE, BROKEN)] == [
        "MODEL_LOADING",
        "IDLE",
        "ERROR",
    ]
    assert worker(FREE, stopping=True).state == "DESTROYING"


@pytest.mark.parametrize(
    ("report", "stopping", "idle", "why"),
    [
        (FREE, False, 9, None),
        (FREE, False, 11, "idle"),
        (FREE, True, 11, None),
        (OCCUPIED, False, 11, None),
        ({}, False, 11, None),  # it is loading
        (BROKEN, False, 0, "it reported an error"),
        (BROKEN, True, 0, None),
    ],
)
def test_one_is_stopped_when_it_is_idle_or_broken(report, stopping, idle, why):
    idle_worker = worker(report, stopping=stopping, idle_since=1000.0 - idle)
    assert why_to_stop(idle_worker, inactivity_timeout=10, now=1000.0) == why
