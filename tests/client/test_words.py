"""Small things of which a person is told, as functions of their own."""

import pytest

from null_backlog import worker_word
from null_reservation import UnreachableWorkers


@pytest.mark.parametrize(
    ("status", "load", "word"),
    [
        ("idle", 0, "free"),
        ("idle", 100, "reserved"),
        ("update_ready", 100, "reserved"),
        ("IDLE", 0.5, "reserved"),
        ("loading", 100, "loading"),  # an old load
        ("unavail", 0, "broken"),
        ("Brand_New", 0, "brand_new"),  # a word that isn't known stays
    ],
)
def test_a_worker_is_called_what_a_person_would_call_it(status, load, word):
    assert worker_word(status, load) == word


def test_a_worker_that_has_answered_is_no_longer_among_those_that_nobody_reaches():
    unreachable = UnreachableWorkers()
    assert [unreachable.add("https://a:1"), unreachable.add("https://a:1")] == [1, 2]
    unreachable.add("https://b:1")
    unreachable.remove("https://a:1")
    unreachable.remove("https://never-named:1")
    assert unreachable.counts() == {"https://b:1": 1}
