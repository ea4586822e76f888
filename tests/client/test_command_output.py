"""What the command shows: lines, rows, the chart."""

import io
import math
import re
import signal

import pytest
from rich.console import Console

import null_display
from tests.kit.autoscaler import statuses
from tests.kit.command import Command
from tests.kit.reservation import worker_at
from tests.kit.worker import release

pytestmark = pytest.mark.anyio


async def test_a_worker_that_lets_go_is_marked_and_the_demo_goes_on(small_vast):
    vast = small_vast
    async with Command("--demo", "--interval", "1", "--plateau", "4", vast=vast) as command:
        for name in ("#1", "#3", "#2"):  # the plateau begins with the last one
            await command.says(f"{name} held")
        url = command.said(r"#2 held .*, (http\S+)")[1]
        await release(worker_at(vast, url))
        await command.says("#2 let go")
        assert not command.said("#1 released")
        assert await command.status() == 0
    assert command.said(r"#2 let go after .*: the worker let go")
    assert command.said("#1 released") and command.said("#3 released")
    assert not command.said("#2 released")
    assert statuses(vast) == ["Success"] * 3


def ended_row(asked_at, held_at, ended_at, how="released"):
    return null_display.Ended(asked_at, held_at, ended_at, how, "")


@pytest.mark.parametrize(
    ("rows", "workers", "lines"),
    [
        (
            [
                ("#1", ended_row(0, 2, 8)),
                ("#2", ended_row(2, 4, 10, "lost")),
                ("#3", ended_row(4, None, 10, "not reserved")),
            ],
            [(0, 0), (1, 1), (4, 12), (10, 0)],
            [
                "         0 s             10 s  . waiting  = held",
                "#1       ....============      waited 2 s, held 6 s, released",
                "#2           ....===========x  waited 2 s, held 6 s, lost",
                "#3               ...........x  waited 6 s, not reserved",
                "workers  00111111+++++++++++0",
            ],
        ),
        (  # over in no time, and no worker seen
            [("#1", ended_row(5, 5, 5))],
            [],
            [
                "         0 s              0 s  . waiting  = held",
                f"#1       {'':20}  waited 0 s, held 0 s, released",
            ],
        ),
        (  # the watch over the workers goes on after the last one
            [("#1", ended_row(0, 0, 5))],
            [(0, 1), (10, 0)],
            [
                "         0 s             10 s  . waiting  = held",
                f"#1       {'=' * 10:20}  waited 0 s, held 5 s, released",
                "workers  11111111111111111110",
            ],
        ),
    ],
)
def test_the_chart(rows, workers, lines):
    assert [line.plain for line in null_display.chart(rows, workers, width=20)] == lines


def test_the_chart_is_as_wide_as_the_terminal_has_room_for():
    display = null_display.Display(1, lambda: None)
    display.output.finish()
    text = io.StringIO()
    display._console = Console(width=60, height=20, file=text)
    display.has_rows = True
    display.rows["#1"] = ended_row(0, 2, 8)
    display.show_chart()
    row = text.getvalue().splitlines()[1]
    assert row.endswith("released") and 50 < len(row) <= 60


class Gauge:
    """What a row shows of a reservation."""

    url, unreachable, time_to_live = "https://w:1", False, 7.0


class Lost(Gauge):
    unreachable = True


@pytest.mark.parametrize(
    ("state", "label", "clock", "bar", "detail"),
    [
        (None, "planned", "", "", ""),
        (null_display.Waiting(40.0), "waiting", "1:00", "", ""),
        (null_display.Waiting(99.5, "HTTP 502"), "waiting", "0:00", "", "HTTP 502"),
        (null_display.Held(0.0, 40.0, Gauge()), "held", "1:00", "until all are held", "on w:1"),
        (
            null_display.Held(0.0, 40.0, Gauge(), math.inf),
            "held",
            "1:00",
            "until released",
            "on w:1",
        ),
        (null_display.Held(0.0, 40.0, Gauge(), 140.0), "held", "1:00", (60, 100), "on w:1"),
        (null_display.Held(0.0, 40.0, Gauge(), 90.0), "held", "1:00", (50, 50), "on w:1"),
        (
            null_display.Held(0.0, 99.0, Lost()),
            "held",
            "0:01",
            "until all are held",
            "not answering, given up in 7 s",
        ),
        (null_display.Ended(0.0, 10.0, 75.0, "lost", "gone"), "lost", "1:05", "", "gone"),
        (
            null_display.Ended(0.0, None, 5.0, "not reserved", "no"),
            "not reserved",
            "0:05",
            "",
            "no",
        ),
    ],
)
def test_a_row_of_every_state_can_be_drawn(state, label, clock, bar, detail):
    word, time, last, text = null_display.describe(state, now=100.0)
    shown = last if isinstance(last, str) else (last.completed, last.total)
    assert (word.plain, time, shown, text.plain) == (label, clock, bar, detail)


def test_a_failure_has_a_colour_and_a_word_of_its_own():
    def shown(how):
        word, *_ = null_display.describe(ended_row(0, 1, 2, how), now=3.0)
        return word.plain, str(word.style)

    good, bad = shown("released"), [shown("lost"), shown("not reserved")]
    assert all(each[0] != good[0] and each[1] != good[1] for each in bad)


async def test_on_a_terminal_there_are_rows_with_bars_and_the_workers(small_vast):
    arguments = ("--demo", "--count", "2", "--interval", "0.5", "--plateau", "2")
    async with Command(*arguments, vast=small_vast, output=(100, 20)) as command:
        assert await command.status() == 0
    screen = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(command.lines))  # without the colours
    for pattern in (
        "#1 +waiting +0:0",
        r"#2 +held +0:0\d +\S*━\S* +on 127\.0\.0\.1:\d+",
        r"workers: 2 reserved",
        "workers: none",
    ):
        assert re.search(pattern, screen), pattern
    assert "\x1b[?25h" in screen  # the cursor is shown again
    assert command.errors == [] and re.match(r"workers  [ \d]+$", command.lines[-1])


@pytest.mark.parametrize(("rows", "shown", "more"), [(4, 4, []), (5, 3, ["and 2 more: 2 planned"])])
def test_what_fits_is_shown_and_of_the_rest_how_many_there_are_of_each(rows, shown, more):
    display = null_display.Display(rows, lambda: None)
    display._console = Console(width=80, height=7)  # three are for other lines
    table, *lines = display._render().renderables
    display.output.finish()
    assert (table.row_count, [line.plain for line in lines]) == (shown, more)


async def test_thirty_reservations_fit_on_twelve_lines(vast):
    async with Command(
        "--demo", "--count", "30", "--interval", "0.1", vast=vast, output=(80, 12)
    ) as command:
        await command.says(r"and 22 more: .*\d+ waiting")
        command.process.send_signal(signal.SIGINT)
        assert await command.status() == 130
    frames = re.split(r"(?:\x1b\[\d*[AK]|\r)+", "\n".join(command.lines))
    rows = [
        len(re.findall(r"^#\d+ +(?:planned|waiting|held)", frame, re.MULTILINE)) for frame in frames
    ]
    assert max(rows) == 8 and command.errors == []


@pytest.mark.parametrize(
    ("environment", "output"),
    [({"PYTHONIOENCODING": "ascii"}, (80, 12)), ({"FORCE_COLOR": "1"}, "pipe")],
)
async def test_an_ascii_terminal_and_a_pipe_that_wants_colour_are_told_in_plain_text(
    vast, environment, output
):
    async with Command("--hold", "1", vast=vast, environment=environment, output=output) as command:
        assert await command.status() == 0
    text = "\n".join(command.lines)
    assert text.isascii() and re.search("#1 (held|released) after", text) and command.errors == []
    assert ("\x1b" in text) == (output != "pipe")
