"""What follow() decides: a pure function of numbers."""

import itertools
import math

import pytest

from null_backlog import as_jobs
from null_rule import (
    Decision,
    History,
    Jobs,
    Limits,
    Snapshot,
    decide,
    is_stranded,
    nothing_is_left,
)

NOT_KNOWN = None


def look(at, jobs, asked=0, own=(), **more):
    """A look at which Vast's list shows no reservations but our own."""
    numbers = {"listed": len(own), "most_own": len(own), "last_opened": max(own, default=-math.inf)}
    return Snapshot(at=at, jobs=jobs, asked=asked, own=own, **{**numbers, **more})


def history_of(looks, most=20, **limits):
    """One look after the other: what the last one left behind, and what it decided."""
    history, decision = History(), None
    for each in looks:
        history, decision = decide(Limits(most, **limits), history, each)
    return history, decision


# name: (the looks, the limits, what the last one decides: wanted, others, ask, take back)
CASES = {
    "one number, all of it is waiting": ([look(0, Jobs(3))], {}, (3, 0, 3, 0)),
    "two numbers, both are to be done": (
        [
            look(0, Jobs(3, 0)),
            look(5, Jobs(0, 3), own=(1, 2, 3)),
            look(10, Jobs(2, 3), own=(1, 2, 3)),
        ],
        {},
        (5, 0, 2, 0),
    ),
    "no job": ([look(0, Jobs(0, 0))], {}, (0, 0, 0, 0)),
    "never more than the most": ([look(0, Jobs(50, 0))], {"most": 4}, (4, 0, 4, 0)),
    "what was asked for isn't asked for again": (
        [look(0, Jobs(5, 0)), look(5, Jobs(5, 0), asked=3)],
        {},
        (5, 0, 2, 0),
    ),
    "jobs per worker, rounded up": (
        [look(0, Jobs(25, 0))],
        {"jobs_per_worker": 12},
        (3, 0, 3, 0),
    ),
    "jobs per worker, as many as are enough for one": (
        [look(0, Jobs(12, 0))],
        {"jobs_per_worker": 12},
        (1, 0, 1, 0),
    ),
    "as many jobs as one can count to": (
        [look(0, Jobs(10**17 + 1, 0))],
        {"most": 10**17, "jobs_per_worker": 2},
        (5 * 10**16 + 1, 0, 5 * 10**16 + 1, 0),
    ),
    "jobs in hand have their workers, or come back by themselves: phantoms": (
        [look(0, Jobs(2, 18))],
        {},
        (2, 0, 2, 0),
    ),
    "only phantoms": ([look(0, Jobs(0, 3))], {}, (0, 0, 0, 0)),
    "of one number phantoms can't be told": ([look(0, Jobs(3))], {}, (3, 0, 3, 0)),
    "one that loads for minutes isn't opened twice": (
        [look(0, Jobs(2, 5)), look(60, Jobs(2, 5), own=(10, 10))],
        {},
        (2, 0, 0, 0),
    ),
    "pulls that are hidden behind arrivals: in hand has changed": (
        [look(0, Jobs(2, 0)), look(5, Jobs(2, 2), own=(1, 2))],
        {},
        (4, 0, 2, 0),
    ),
    "in hand of one that has pulled, and of one that loads": (
        [look(0, Jobs(2, 0)), look(5, Jobs(1, 1), own=(1,)), look(10, Jobs(1, 1), own=(1, 6))],
        {},
        (2, 0, 0, 0),
    ),
    "one that was opened before waiting fell has pulled": (
        [look(0, Jobs(3, 0)), look(5, Jobs(2, 1), own=(1,)), look(10, Jobs(2, 1), own=(1,))],
        {},
        (3, 0, 2, 0),
    ),
    "more reserved than wanted: nothing is ended": (
        [look(0, Jobs(9, 0)), look(90, Jobs(0, 1), own=(1, 2, 3, 4))],
        {},
        (1, 0, 0, 0),
    ),
    "more reserved than wanted: what waits is taken back": (
        [look(0, Jobs(9, 0)), look(90, Jobs(0, 1), own=(1, 2, 3, 4), asked=5)],
        {},
        (1, 0, 0, 5),
    ),
    "too many for less than settle: all keep waiting": (
        [look(0, Jobs(9, 0)), look(5, Jobs(9, 0), asked=9), look(34, Jobs(0, 0), asked=9)],
        {},
        (0, 0, 0, 0),
    ),
    "too many for settle: the rest is taken back": (
        [look(0, Jobs(9, 0)), look(5, Jobs(2, 0), asked=9), look(34, Jobs(0, 0), asked=9)],
        {"settle": 30},
        (0, 0, 0, 7),
    ),
    "a zero between two readings takes back nothing": (
        [look(0, Jobs(9, 0)), look(5, Jobs(0, 0), asked=9), look(10, Jobs(9, 0), asked=9)],
        {"settle": 8},
        (9, 0, 0, 0),
    ),
    "not known for long, then zero: settle begins with the zero": (
        [
            look(0, Jobs(9, 0)),
            look(50, NOT_KNOWN, asked=9),
            look(55, Jobs(0, 0), asked=9),
        ],
        {},
        (0, 0, 0, 0),
    ),
    "others' reservations count": (
        [look(0, Jobs(5, 0)), look(20, Jobs(5, 0), listed=2)],
        {},
        (5, 2, 3, 0),
    ),
    "the list still shows what we have just ended": (
        [look(0, Jobs(5, 0)), look(20, Jobs(5, 0), listed=2, most_own=2)],
        {},
        (5, 0, 5, 0),
    ),
    "the list doesn't show yet what we have just opened": (
        [look(0, Jobs(5, 0)), look(20, Jobs(3, 2), own=(18, 19), listed=0)],
        {},
        (5, 0, 3, 0),
    ),
    "others count by the highest of the last 15 s": (
        [
            look(0, Jobs(5, 0)),
            look(20, Jobs(5, 0), listed=4),
            look(30, Jobs(5, 0), listed=1),
        ],
        {},
        (5, 4, 1, 0),
    ),
    "and then no longer": (
        [
            look(0, Jobs(5, 0)),
            look(20, Jobs(5, 0), listed=4),
            look(36, Jobs(5, 0), listed=1),
        ],
        {},
        (5, 1, 4, 0),
    ),
    "a restart: the first list shows a predecessor's, so none in the first 15 s": (
        [look(0, Jobs(9, 1), listed=1), look(14, Jobs(9, 1), listed=1)],
        {},
        (10, 1, 0, 0),
    ),
    "a restart: after these 15 s": (
        [look(0, Jobs(9, 1), listed=1), look(15, Jobs(9, 1), listed=1)],
        {},
        (10, 1, 9, 0),
    ),
    "a restart: the first list comes late": (
        [look(0, Jobs(9, 1), listed=NOT_KNOWN), look(20, Jobs(9, 1), listed=1)],
        {},
        (10, 1, 0, 0),
    ),
    "a list that fails: the last one counts for a minute": (
        [
            look(0, Jobs(0, 0)),
            look(20, Jobs(5, 0), listed=2),
            look(80, Jobs(5, 0), listed=NOT_KNOWN),
        ],
        {},
        (5, 2, 3, 0),
    ),
    "a list that fails: it is the last one alone that counts for a minute": (
        [
            look(0, Jobs(0, 0)),
            look(20, Jobs(5, 0), listed=4),
            look(30, Jobs(5, 0), listed=1),
            look(80, Jobs(5, 0), listed=NOT_KNOWN),
        ],
        {},
        (5, 1, 4, 0),
    ),
    "a list that fails: others count by the highest of the last 15 s all the same": (
        [
            look(0, Jobs(0, 0)),
            look(20, Jobs(5, 0), listed=4),
            look(30, Jobs(5, 0), listed=1),
            look(32, Jobs(5, 0), listed=NOT_KNOWN),
        ],
        {},
        (5, 4, 1, 0),
    ),
    "refused: none before it is time": (
        [look(0, Jobs(5, 0)), look(5, Jobs(5, 0), refused_until=6)],
        {},
        (5, 0, 0, 0),
    ),
    "refused: then one is tried": (
        [look(0, Jobs(5, 0)), look(6, Jobs(5, 0), refused_until=6)],
        {},
        (5, 0, 1, 0),
    ),
    "refused: one at a time": (
        [look(0, Jobs(5, 0)), look(7, Jobs(5, 0), refused_until=6, asked=1)],
        {},
        (5, 0, 0, 0),
    ),
    "two have ended and nothing moved: not yet stuck": (
        [look(0, Jobs(9, 0)), look(5, Jobs(9, 0), ended=2)],
        {},
        (9, 0, 9, 0),
    ),
    "two have ended since jobs moved, and many before: not yet stuck": (
        [look(0, Jobs(9, 0), ended=10), look(5, Jobs(9, 0), ended=12)],
        {},
        (9, 0, 9, 0),
    ),
    "stuck: only what has ended since jobs moved makes the pauses longer": (
        [look(0, Jobs(9, 0), ended=10), look(5, Jobs(9, 0), ended=13, last_opened=4)],
        {},
        (9, 0, 1, 0),
    ),
    "stuck: requests beyond one are taken back": (
        [look(0, Jobs(9, 0)), look(5, Jobs(9, 0), ended=3, asked=6)],
        {},
        (9, 0, 0, 5),
    ),
    "stuck: one at a time": (
        [
            look(0, Jobs(9, 0)),
            look(5, Jobs(9, 0), ended=3),
            look(99, Jobs(9, 0), ended=3, own=(6,)),
        ],
        {},
        (9, 0, 0, 0),
    ),
    "stuck, one number": (
        [look(0, Jobs(9)), look(5, Jobs(9), ended=3, asked=6)],
        {},
        (9, 0, 0, 5),
    ),
    "ended, and as many more were put in: some may have been done": (
        [look(0, Jobs(9, 0)), look(5, Jobs(12, 0), ended=3, asked=6)],
        {},
        (12, 0, 6, 0),
    ),
    "ended, and one more was put in: that excuses one end": (
        [look(0, Jobs(9, 0)), look(5, Jobs(10, 0), ended=3, asked=6)],
        {},
        (10, 0, 4, 0),
    ),
    "ended four times, and one more was put in": (
        [look(0, Jobs(9, 0)), look(5, Jobs(10, 0), ended=4, asked=6)],
        {},
        (10, 0, 0, 5),
    ),
    "growth is no excuse for over two minutes": (
        [
            look(0, Jobs(9)),
            look(60, Jobs(10), ended=1),
            look(119, Jobs(12), ended=3),
            look(120, Jobs(12), ended=3, asked=6),
        ],
        {},
        (12, 0, 0, 5),
    ),
    "growth before the first end is no excuse": (
        [look(0, Jobs(9)), look(100, Jobs(12)), look(105, Jobs(12), ended=3, asked=6)],
        {},
        (12, 0, 0, 5),
    ),
    "growth is one for two minutes after a pull": (
        [
            look(0, Jobs(9, 0)),
            look(60, Jobs(10, 1), ended=1),
            look(179, Jobs(12, 1), ended=3, asked=6),
        ],
        {},
        (12, 0, 6, 0),
    ),
    "one number that rises at each look while three end": (
        [look(5 * place, Jobs(9 + place), ended=min(3, place)) for place in range(9)],
        {},
        (17, 0, 17, 0),
    ),
    "a third number that stays: growth is no excuse": (
        [look(0, Jobs(9, 0, 4)), look(5, Jobs(12, 0, 4), ended=3, asked=6)],
        {},
        (12, 0, 0, 5),
    ),
    "a third number that stays: fewer jobs aren't movement": (
        [look(0, Jobs(9, 0, 4)), look(5, Jobs(8, 0, 4), ended=3, asked=6)],
        {},
        (8, 0, 0, 5),
    ),
    "a third number that rises: jobs get done, whatever else": (
        [look(0, Jobs(9, 0, 4)), look(5, Jobs(12, 0, 5), ended=9, asked=6)],
        {},
        (12, 0, 6, 0),
    ),
    "a third number that falls says nothing": (
        [look(0, Jobs(9, 0, 4)), look(5, Jobs(12, 0, 1), ended=3, asked=6)],
        {},
        (12, 0, 0, 5),
    ),
    "a third number that is new says nothing": (
        [look(0, Jobs(9, 0)), look(5, Jobs(9, 0, 4), ended=3, asked=6)],
        {},
        (9, 0, 0, 5),
    ),
    "a third number that is missing says nothing": (
        [look(0, Jobs(9, 0, 4)), look(5, Jobs(9, 0), ended=3, asked=6)],
        {},
        (9, 0, 0, 5),
    ),
    "fewer jobs in all: that is movement": (
        [look(0, Jobs(9, 2)), look(5, Jobs(9, 1), ended=3, asked=6)],
        {},
        (9, 0, 3, 0),
    ),
    "a job was pulled and none is done: that isn't": (
        [look(0, Jobs(9, 2)), look(5, Jobs(8, 3), ended=3, asked=6)],
        {},
        (8, 0, 0, 5),
    ),
    "none is waiting: that is": (
        [look(0, Jobs(9, 0)), look(5, Jobs(0, 9), ended=3, own=(4,), asked=6)],
        {},
        (1, 0, 0, 0),
    ),
    "the latest has had a job in hand for 30 s: that is": (
        [
            look(0, Jobs(9, 0)),
            look(5, Jobs(9, 1), ended=4, own=(4,)),
            look(36, Jobs(9, 1), ended=4, own=(4,)),
        ],
        {},
        (10, 0, 9, 0),
    ),
    "the latest has had a job in hand for 29 s: not yet": (
        [
            look(0, Jobs(9, 0)),
            look(5, Jobs(9, 1), ended=4, own=(4,)),
            look(34, Jobs(9, 1), ended=4, own=(4,)),
        ],
        {},
        (10, 0, 0, 0),
    ),
    "the latest is held, and has no job in hand any more: that isn't": (
        [
            look(0, Jobs(9, 0)),
            look(5, Jobs(9, 1), ended=4, own=(4,)),
            look(10, Jobs(10, 0), ended=4, own=(4,)),
            look(50, Jobs(10, 0), ended=4, own=(4,), asked=6),
        ],
        {},
        (10, 0, 0, 5),
    ),
    "a worker that the router named and nobody reached isn't somebody's": (
        [look(0, Jobs(1, 0)), look(20, Jobs(1, 0), listed=1, unreachable=1)],
        {"most": 1},
        (1, 0, 1, 0),
    ),
    "a load that nobody holds counts": (
        [look(5 * place, Jobs(1, 0), listed=1) for place in range(120)],
        {"most": 1},
        (1, 1, 0, 0),
    ),
    "a load that nobody holds counts for ten minutes": (
        [look(5 * place, Jobs(1, 0), listed=1) for place in range(121)],
        {"most": 1},
        (1, 0, 1, 0),
    ),
    "a load that nobody holds, and a list that shows it now and then": (
        [look(5 * place, Jobs(1, 0), listed=1 - place % 2) for place in range(121)],
        {"most": 1},
        (1, 0, 1, 0),
    ),
    "a load that nobody holds, and the one job in hand is ours": (
        [look(0, Jobs(9, 0), listed=1)]
        + [look(5 * place, Jobs(8, 1), own=(2,), listed=2) for place in range(1, 122)],
        {"most": 2},
        (2, 0, 1, 0),
    ),
    "ours loads, and the one job in hand is another's": (
        [look(0, Jobs(9, 1), listed=1)]
        + [look(5 * place, Jobs(9, 1), own=(3,), listed=2) for place in range(1, 123)],
        {"most": 2},
        (2, 1, 0, 0),
    ),
    "a load that nobody holds, one number: the first look tells nothing": (
        [look(5 * place, Jobs(1), listed=1) for place in range(121)],
        {"most": 1},
        (1, 1, 0, 0),
    ),
    "a load that nobody holds, one number": (
        [look(5 * place, Jobs(1), listed=1) for place in range(122)],
        {"most": 1},
        (1, 0, 1, 0),
    ),
    "one number that falls: others may have done it": (
        [look(5 * place, Jobs(9 if place < 60 else 8), listed=1) for place in range(130)],
        {"most": 1},
        (1, 1, 0, 0),
    ),
    "one of two others has a job in hand": (
        [look(5 * place, Jobs(9, 1), listed=2) for place in range(121)],
        {"most": 2},
        (2, 1, 1, 0),
    ),
    "others with jobs in hand stay": (
        [look(5 * place, Jobs(9, 2), listed=2) for place in range(121)],
        {"most": 2},
        (2, 2, 0, 0),
    ),
    "the list shows fewer: the next one counts again": (
        [look(5 * place, Jobs(1, 0), listed=1) for place in range(121)]
        + [look(605 + 5 * place, Jobs(1, 0), listed=0) for place in range(4)]
        + [look(630, Jobs(1, 0), listed=1)],
        {"most": 1},
        (1, 1, 0, 0),
    ),
    "while stuck jobs in hand may be the others'": (
        [look(5 * place, Jobs(1, 0), listed=1) for place in range(121)]
        + [look(605, Jobs(1, 0), listed=1, ended=3)],
        {"most": 1},
        (1, 1, 0, 0),
    ),
    "no longer stuck: the ten minutes of the others begin anew": (
        [look(5 * place, Jobs(2, 0), listed=1) for place in range(121)]
        + [look(605, Jobs(2, 0), listed=1, ended=3), look(610, Jobs(1, 0), listed=1, ended=3)],
        {"most": 1},
        (1, 1, 0, 0),
    ),
    "jobs in hand of nobody: the system may still bring them back": (
        [look(0, Jobs(0, 2)), look(59, Jobs(0, 2))],
        {},
        (0, 0, 0, 0),
    ),
    "jobs in hand of nobody for a minute: one is asked for": (
        [look(0, Jobs(0, 2)), look(60, Jobs(0, 2))],
        {},
        (1, 0, 1, 0),
    ),
    "the first one is asked for at once, whenever the latest was opened": (
        [look(0, Jobs(0, 2)), look(60, Jobs(0, 2), last_opened=55, ended=1)],
        {},
        (1, 0, 1, 0),
    ),
    "in hand of nobody once more: the pauses begin anew": (
        [
            look(0, Jobs(0, 1)),
            look(60, Jobs(0, 1)),
            look(65, Jobs(1, 1), own=(62,)),
            look(70, Jobs(0, 1), last_opened=62, ended=1),
            look(130, Jobs(0, 1), last_opened=62, ended=1),
        ],
        {},
        (1, 0, 1, 0),
    ),
    "and not a second one": (
        [look(0, Jobs(0, 2)), look(60, Jobs(0, 2)), look(200, Jobs(0, 2), asked=1)],
        {},
        (1, 0, 0, 0),
    ),
    "some wait as well: they aren't stranded": (
        [look(0, Jobs(1, 2)), look(60, Jobs(1, 2), asked=1)],
        {},
        (1, 0, 0, 0),
    ),
    "a worker that is loading can't have them": (
        [look(0, Jobs(0, 2)), look(60, Jobs(0, 2), own=(30,))],
        {},
        (1, 0, 0, 0),
    ),
    "somebody else may have them": (
        [look(0, Jobs(0, 2), listed=1), look(60, Jobs(0, 2), listed=1)],
        {},
        (1, 1, 0, 0),
    ),
}


@pytest.mark.parametrize(("looks", "limits", "expected"), CASES.values(), ids=CASES)
def test_decides_by_numbers(looks, limits, expected):
    _, decision = history_of(looks, **limits)
    assert decision == Decision(*expected)


@pytest.mark.parametrize(
    "last",
    [
        look(5, NOT_KNOWN, asked=9),
        look(66, Jobs(0, 0), asked=9, listed=NOT_KNOWN),
    ],
    ids=["jobs", "a list for over a minute"],
)
def test_what_is_not_known_asks_for_nothing_and_takes_nothing_back(last):
    _, decision = history_of([look(0, Jobs(9, 0)), last])
    assert decision is None


def test_stuck_the_pauses_double_up_to_a_minute_and_are_forgotten_once_something_moves():
    limits = Limits(most=20)
    history, _ = history_of([look(0, Jobs(9, 0)), look(1, Jobs(9, 0), ended=3)])
    at, ended, opened = 1.0, 3, [1.0]
    while len(opened) < 10:
        at += 0.5
        history, decision = decide(
            limits, history, look(at, Jobs(9, 0), ended=ended, last_opened=opened[-1])
        )
        if decision.ask:  # it is opened at once, and ends at once
            assert decision.ask == 1
            opened.append(at)
            ended += 1
    pauses = [later - earlier for earlier, later in zip(opened, opened[1:], strict=False)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    history, decision = decide(limits, history, look(at + 1, Jobs(8, 0), ended=ended))
    assert not history.stuck
    assert decision.ask == 8


def test_stranded_the_next_is_asked_for_after_2_4_8_minutes_up_to_an_hour():
    limits = Limits(most=20)
    history, at, opened = History(), 0.0, []
    while len(opened) < 9:
        last = opened[-1] if opened else -math.inf
        # Three that end are stuck as well: its pauses are shorter.
        now = look(at, Jobs(0, 1), ended=len(opened), last_opened=last)
        history, decision = decide(limits, history, now)
        if decision.ask:
            assert decision.ask == 1
            opened.append(at)
        at += 5
    assert opened[0] == 60
    minutes = [(later - earlier) / 60 for earlier, later in itertools.pairwise(opened)]
    assert minutes == [2, 4, 8, 16, 32, 60, 60, 60]

    history, _ = decide(limits, history, look(at, Jobs(1, 0), ended=len(opened)))
    assert not is_stranded(history, at)


def test_jobs_that_one_other_worker_may_have_are_not_stranded():
    history, _ = history_of([look(at, Jobs(0, 2), listed=1) for at in (0, 60)])
    assert not is_stranded(history, 60)


def test_a_number_of_workers_that_stays_takes_one_place_and_no_other_is_lost():
    """Of weeks nothing piles up; and what is taken back goes by the highest of settle seconds."""
    numbers = [3, 3, 3, 5, 5, 2, 2, 2]
    history, _ = history_of([look(at, Jobs(number, 0)) for at, number in enumerate(numbers)])
    assert history.wanted == ((2, 3), (4, 5), (7, 2))


def test_what_was_wanted_before_a_gap_counts_after_it():
    looks = [look(0, Jobs(9, 0)), look(50, NOT_KNOWN, asked=9), look(55, Jobs(0, 0), asked=9)]
    _, decision = history_of(looks)
    assert decision == Decision(0, 0, 0, 0)


def test_a_gap_ends_the_time_in_which_nothing_is_left():
    """A list that failed may have hidden a reserved worker."""
    looks = [look(0, Jobs(0, 0)), look(100, Jobs(0, 0), listed=NOT_KNOWN)]
    history, _ = history_of([*looks, look(101, Jobs(0, 0))])
    assert not nothing_is_left(Limits(20), history, 101)


def test_stuck_the_pause_runs_from_when_the_last_one_was_opened_not_from_when_it_was_asked_for():
    history, _ = history_of([look(0, Jobs(9, 0)), look(1, Jobs(9, 0), ended=3)])
    history, first = decide(Limits(20), history, look(2, Jobs(9, 0), ended=3))
    history, waits = decide(Limits(20), history, look(201, Jobs(9, 0), ended=4, last_opened=200))
    history, next_one = decide(Limits(20), history, look(202, Jobs(9, 0), ended=4, last_opened=200))
    assert [each.ask for each in (first, waits, next_one)] == [1, 0, 1]


NONE = Jobs(0, 0)


@pytest.mark.parametrize(
    ("jobs", "settle", "left"),
    [
        ([NONE], 0, True),  # one look is not enough
        ([NONE, NONE], 10, True),
        ([NONE, NONE, NONE], 10, False),
        ([NONE, NONE], 0, False),
        ([NONE, Jobs(0, 1), NONE], 10, True),
        ([NONE, Jobs(1, 0), NONE, NONE, NONE], 10, False),
        ([NONE, NOT_KNOWN, NONE], 10, True),
        ([NONE, NOT_KNOWN, NONE], 0, True),
        ([NONE, NONE, NOT_KNOWN, NONE], 0, True),  # one look after a gap is not enough
        ([NONE, NONE, NOT_KNOWN, NONE, NONE], 10, True),  # nor are two in less than settle
        ([NONE, Jobs(1, 0), NONE], 0, True),
        ([Jobs(1, 0), NONE, NONE], 10, True),
        ([Jobs(0), Jobs(0), Jobs(0)], 10, False),
    ],
)
def test_nothing_is_left_when_each_look_of_settle_seconds_and_two_at_least_said_so(
    jobs, settle, left
):
    """A look each 5 s."""
    looks = [look(5 * place, each) for place, each in enumerate(jobs)]
    history, _ = history_of(looks, settle=settle)
    assert nothing_is_left(Limits(20, settle=settle), history, looks[-1].at) == (not left)


def test_what_a_backlog_may_answer():
    assert as_jobs(7) == Jobs(7, None)
    assert as_jobs((7, 2)) == Jobs(7, 2)
    assert as_jobs([0, 0]) == Jobs(0, 0)
    assert as_jobs(Jobs(7)) == Jobs(7)
