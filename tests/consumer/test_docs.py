"""docs/consumers.md: its settings are those of the code, and its wrappers do what it says."""

import os
import re
import subprocess
import sys

import pytest

import null_consumer
from tests.consumer.wrappers import WRAPPERS, installed, row_of
from tests.kit.environment import BARE, HERE

PAGE = (HERE / "docs/consumers.md").read_text()


def table_after(heading):
    """The cells of the first table under a heading, row by row, without its head."""
    section = PAGE.partition(f"\n## {heading}\n")[2]
    lines = section[section.index("\n|") :].lstrip().partition("\n\n")[0].splitlines()
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    return [[cell.strip() for cell in cells] for cells in split]


def test_its_settings_are_those_of_the_code():
    rows = {row[1].strip("`").partition("=")[0]: row for row in table_after("Settings")}
    fields = null_consumer.Settings._field_defaults
    assert set(rows) == {f"NULL_{name.upper()}" for name in fields}
    help_text = subprocess.run(
        [sys.executable, HERE / "null_consumer.py", "--help"],
        capture_output=True,
        text=True,
        env=BARE,
        check=True,
    ).stdout
    flags = {row[0].strip("`").split()[0] for row in rows.values() if row[0]}
    assert set(re.findall(r"^  (--[a-z-]+)", help_text, re.MULTILINE)) == flags
    for name, row in rows.items():
        default = fields[name.removeprefix("NULL_").lower()]
        words = {True: "true", False: "false", None: "none"}
        shown = getattr(default, "name", None) or words.get(default) or f"{default:g}"
        assert row[2].strip("`") == shown.removeprefix("SIG")


def test_its_table_has_every_wrapper():
    assert [row[0] for row in table_after("Wrappers")] == [wrapper.name for wrapper in WRAPPERS]
    assert len(WRAPPERS) >= 25


@pytest.mark.long
@pytest.mark.parametrize("wrapper", [pytest.param(each, id=each.name) for each in WRAPPERS])
def test_a_wrapper_does_what_it_says(wrapper):
    if not installed(wrapper):
        pytest.skip(f"{' and '.join(wrapper.needs)}: not on this machine")
    if os.geteuid() != 0 and wrapper.line.startswith(
        ("sudo", "su ", "runuser", "unshare", "chpst")
    ):
        pytest.skip("needs root")
    if wrapper.varies:
        pytest.skip("it isn't the same each time")
    (row,) = [row for row in table_after("Wrappers") if row[0] == wrapper.name]
    assert row[:5] == list(row_of(wrapper))
