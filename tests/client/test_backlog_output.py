"""What `--backlog` shows: a line for each change, rows on a terminal, a chart at the end."""

import re
import signal

import pytest

from null_backlog import Jobs, Progress
from null_display import Lasted, backlog_chart, backlog_line, backlog_rows, bars
from tests.kit.command import Command
from tests.kit.worker import WORKERS, release

pytestmark = pytest.mark.anyio

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress(), "jobs: not known; 0 wanted, 0 reserved, 0 asked for"),
        (
            Progress(Jobs(7), wanted=7, own=2, asked=5),
            "jobs: 7 to do; 7 wanted, 2 reserved, 5 asked for",
        ),
        (
            Progress(Jobs(0, 7), wanted=7, own=2, others=3),
            "jobs: 0 waiting, 7 in hand; 7 wanted, 5 reserved (3 by others), 0 asked for",
        ),
    ],
)
def test_all_numbers_are_in_a_line(progress, line):
    assert backlog_line(progress) == line


@pytest.mark.parametrize(
    ("numbers", "height", "lines"),
    [
        ([0, 0, 0], 3, ["some          1 |"]),
        ([1, 0, 1], 3, ["some          1 |# #"]),
        ([0, 1, 2], 3, ["some          2 |  #", "                | ##"]),
        (
            [1, 100, 50, 0, 34, 33],
            3,
            ["some        100 | #", "                | ## #", "                |### ##"],
        ),
    ],
)
def test_bars_are_as_high_as_their_numbers_and_none_is_left_out(numbers, height, lines):
    assert bars("some", numbers, height) == lines


def test_the_chart_has_the_jobs_over_the_workers_on_one_time_axis():
    history = [(100, 4, 0), (102, 4, 1), (104, 2, 2), (106, 0, 1), (108, 0, 0)]
    assert backlog_chart(history, 110, 20) == [
        "jobs          4 |#########",
        "                |#########",
        "                |#############",
        "                |#############",
        "reserved      2 |        #####",
        "                |    #############",
        "                 0 s             10 s",
    ]


def test_a_chart_of_a_moment():
    assert backlog_chart([(100, 1, 0)], 100, 12)[-1] == " " * 17 + "0 s      0 s"


async def test_on_a_pipe_it_is_one_line_for_each_change(vast, tmp_path):
    jobs = tmp_path / "jobs"
    jobs.write_text("9 0")
    options = ("--backlog", f"cat {jobs}", "--max", f"{WORKERS}", "--every", "0.3")
    async with Command(*options, vast=vast) as command:
        await command.says(f"{WORKERS} reserved, 0 asked for")
        await command.says(f"workers: {WORKERS} reserved")
        jobs.write_text("0 1")
        await command.says("0 waiting, 1 in hand")
        for worker in vast.workers.values():
            await release(worker)
        await command.says("1 wanted, 0 reserved")
        jobs.write_text("none")
        await command.says("backlog: ")
        command.process.send_signal(signal.SIGTERM)
        assert await command.status() == 143
    assert command.errors == []
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in command.lines)
    *lines, last = [line[9:] for line in command.lines]
    assert re.fullmatch(r"reserved in all: \d+\.\d GPU-minutes", last)
    expected = ["connecting"]
    expected += [
        f"jobs: 9 waiting, 0 in hand; 3 wanted, {held} reserved, {WORKERS - held} asked for"
        for held in range(WORKERS + 1)
    ]
    expected += [
        f"jobs: 0 waiting, 1 in hand; 1 wanted, {held} reserved, 0 asked for"
        for held in range(WORKERS, -1, -1)
    ]
    at_once = expected[2:WORKERS] + expected[-WORKERS:-1]  # two in one moment are one change
    expected += ["backlog: it printed 'none', not one to three whole numbers"]
    expected += ["interrupted: what waits is taken back, what is reserved goes on"]
    workers = [line for line in lines if line.startswith("workers: ")]
    others = [line for line in lines if line not in workers]
    assert others == [line for line in expected if line in others or line not in at_once]
    assert {"workers: 3 free", "workers: 3 reserved"} <= set(workers)
    assert all(before != after for before, after in zip(workers, workers[1:], strict=False))


TROUBLES = {"stuck": "stuck: no job moves", "vast": "vast: no answer"}


@pytest.mark.parametrize(
    ("progress", "rows"),
    [
        (Progress(), {"jobs": "not known", "wanted": "0", "reserved": "0", "asked for": "0"}),
        (
            Progress(Jobs(5, 2, 40), wanted=4, own=2, others=1, asked=1, reserved_seconds=110),
            {
                "jobs": "5 waiting, 2 in hand, 40 done",
                "": None,
                "wanted": "4",
                "reserved": "3 (1 by others)",
                "asked for": "1, waiting 1:05",
                "workers": "3 reserved",
                "so far": "2.2 GPU-minutes reserved",  # and two for 10 s since then
            },
        ),
        (Progress(Jobs(0, 1)), {"": "1 job in hand has no worker"}),
        (Progress(Jobs(0, 3)), {"": "3 jobs in hand have no worker"}),
        (Progress(Jobs(0, 0), ends_in=31.2), {"ending": "in 21 s unless a job comes"}),
        (Progress(Jobs(0, 0), ends_in=3), {"ending": "in 0 s unless a job comes"}),
        (Progress(Jobs(1), reserved_seconds=9000), {"so far": "2.5 GPU-hours reserved"}),
        (Progress(troubles=TROUBLES), {"stuck": "no job moves", "vast": "no answer"}),
    ],
)
def test_the_rows_explain_themselves(progress, rows):
    """As they are 10 s after they were told, and 65 s after something was asked for."""
    lasted = Lasted(progress=10, asked=65, unworked=10)
    shown = {name: text for name, text, _ in backlog_rows(progress, "3 reserved", lasted)}
    assert {name: shown.get(name) for name in rows} == rows
    assert ("ending" in shown) == (progress.ends_in is not None)


def test_a_job_that_has_just_been_done_is_not_called_without_a_worker():
    """Which is still counted as in hand: its worker is gone before the next look."""
    rows = backlog_rows(Progress(Jobs(0, 1)), "", Lasted(unworked=2))
    assert not any("no worker" in text for _, text, _ in rows)


def test_a_trouble_looks_different_from_the_rest():
    styles = {
        name: style for name, _, style in backlog_rows(Progress(troubles=TROUBLES), "", Lasted())
    }
    assert styles["stuck"] == styles["vast"] != styles["jobs"] == styles["reserved"]


@pytest.mark.parametrize("columns", [80, 40])
async def test_a_terminal_shows_rows_and_at_the_end_the_chart(columns, vast, tmp_path):
    jobs = tmp_path / "jobs"
    jobs.write_text("5 1")
    oh = "the server at 127.0.0.1:6379 doesn't answer, and says nothing about why"
    options = (
        *("--backlog", f"[ -s {jobs} ] || echo {oh!r} >&2; cat {jobs}", "--max", f"{WORKERS + 1}"),
        *("--every", "0.3", "--settle", "2", "--once"),
    )
    plain = {"NO_COLOR": "1"}
    async with Command(*options, vast=vast, environment=plain, output=(columns, 40)) as command:
        for row in (
            r"jobs +5 waiting, 1 in hand",
            rf"wanted +{WORKERS + 1}",
            rf"reserved +{WORKERS}",
            r"asked for +1, waiting 0:0\d",
            rf"workers +{WORKERS} reserved",
        ):
            assert await command.says(row), row
        jobs.write_text("")
        assert await command.says("backlog +.*it printed")
        jobs.write_text("0 0")
        assert await command.says("asked for +0")
        for worker in vast.workers.values():
            await release(worker)
        assert await command.says(r"ending +in \d s unless a job comes")
        assert await command.status() == 0
    lines = [ESCAPE.sub("", line) for line in command.lines]
    assert re.search(r" reserved in all: \d+\.\d\s+GPU-minutes", "\n".join(lines[-2:]))
    assert max(len(part) for line in lines for part in line.split("\r")) <= columns
    text = "\n".join(lines)
    chart = text[text.rindex("jobs     ") :]
    assert re.search(rf"^jobs +6 \|#+\n(.*\n)+reserved +{WORKERS} \|.*#", chart)
    assert re.search(r"\n +0 s +\d+ s\n", chart + "\n")


async def test_without_a_terminal_there_is_no_chart(vast):
    options = ("--backlog", "echo 0", "--max", "1", "--every", "0.3", "--settle", "0.1", "--once")
    async with Command(*options, vast=vast) as command:
        assert await command.status() == 0
    assert not command.said("#")
