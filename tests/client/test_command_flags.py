"""Every flag of the command belongs to a mode, and does what it says there."""

import argparse
import asyncio

import pytest

import null_backlog
import null_client

ALWAYS = {"endpoint", "instance", "local", "demo", "backlog", "watch", "diagnose"}
ALWAYS |= {"help", "version", "debug"}


def test_each_flag_belongs_to_a_mode_where_it_is_refused_elsewhere():
    actions = null_client.parser_of("null_client.py")._actions
    of_modes = {name for flags in null_client.MODES.values() for name in flags}
    assert {action.dest for action in actions} == ALWAYS | of_modes


@pytest.mark.parametrize("mode", ["--backlog", "--watch"])
def test_what_was_asked_for_reaches_follow(monkeypatch, mode):
    asked = {}

    async def follow(endpoint, backlog, most, **options):
        asked.update(options, most=most)

    class Display(argparse.Namespace):
        has_trouble = has_progressed = None

    flags = ["--jobs-per-worker=2", "--every=3", "--settle=4", "--once", "--cost=7"]
    flags += ["--lifetime=8", "--max=9"]
    args = null_client.parse_arguments(["--local", mode, "true", *flags])
    monkeypatch.setattr(null_backlog, "follow", follow)
    asyncio.run(null_client.follow_backlog(None, args, Display(), []))
    told = {name: asked[name] for name in ("jobs_per_worker", "every", "settle", "once", "most")}
    assert told == {"jobs_per_worker": 2, "every": 3, "settle": 4, "once": True, "most": 9}
    assert (asked["cost"], asked["lifetime"]) == (7, 8)
