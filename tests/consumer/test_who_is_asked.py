"""Who is asked to end, by a table of COMMAND's processes: null_guard.choose() and learn()."""

import signal

import pytest

from null_guard import (
    PIPE_WAIT,
    TAKE_WAIT,
    Attitude,
    History,
    Process,
    choose,
    command_of,
    learn,
    name_all,
    note_asked,
)

ENDS, CATCHES, BLOCKS, IGNORES = Attitude
TERM = signal.SIGTERM


def table(*processes):
    return {process.pid: process for process in processes}


def one(pid, parent=0, attitude=ENDS, **other):
    """Process ids are ages here: the higher, the younger."""
    return Process(pid, parent, started=100 * pid, name=f"p{pid}", attitude=attitude, **other)


def reads(pid, pipe, **other):
    return one(pid, reads=pipe, **other)


def writes(pid, pipe, **other):
    return one(pid, writes=frozenset([pipe]), **other)


def chosen(processes, command=None, history=None, now=100.0, late=False):
    """Process ids: who is asked now, who later, and who is spared."""
    history = history or learn(History(), processes, {}, TERM, now)
    choice = choose(processes, command, history, now, late)
    return tuple([each.pid for each in part] for part in choice)


class Scene:
    """The same processes, look by look: who is asked then, in the order of time."""

    def __init__(self, *processes, command=1):
        self.table = table(*processes)
        self.history = History()
        self.command = command
        self.now = 0.0
        self.late_at = 15.0

    def look(self, seconds=0.1, ended=None, pending=(), orphans=(), then=None):
        """After so many seconds; the statuses of who has ended, who is somebody's orphan now."""
        self.now += seconds
        for pid in ended or {}:
            self.table.pop(pid)
        for pid in orphans:
            self.table[pid] = self.table[pid]._replace(parent=0)
        for pid, process in self.table.items():
            self.table[pid] = process._replace(pending=pid in pending, **(then or {}).get(pid, {}))
        if self.command not in self.table:
            self.command = None
        self.history = learn(self.history, self.table, ended or {}, TERM, self.now)
        late = self.now >= self.late_at
        choice = choose(self.table, self.command, self.history, self.now, late)
        for process in choice.now:
            self.history = note_asked(self.history, process, self.table, self.now)
        return [process.pid for process in choice.now]


@pytest.mark.parametrize(
    ("processes", "command", "expected"),
    [
        # COMMAND's own process, and nobody else while it lives
        ([one(1)], 1, ([1], [], [])),
        ([one(1), one(2, 1), one(3, 2)], 1, ([1], [], [])),
        ([one(1, attitude=CATCHES), one(2)], 1, ([1], [], [])),
        # orphans, the youngest first: what it needs was started before it
        ([one(2)], None, ([2], [], [])),
        ([one(2), one(3), one(4)], None, ([4], [3, 2], [])),
        ([one(2), one(3)._replace(started=200)], None, ([3], [2], [])),  # in one tick: by their ids
        ([one(2)._replace(started=301), one(3)], None, ([2], [3], [])),  # ids start again at 1
        ([one(2), one(3, 2)], None, ([2], [], [])),  # never an orphan's child
        # one that ignores it tells nobody: its children are asked, and theirs
        ([one(1, attitude=IGNORES), one(2, 1)], 1, ([2], [], [])),
        ([one(1, attitude=IGNORES), one(2, 1, IGNORES), one(3, 2)], 1, ([3], [], [])),
        ([one(1, attitude=IGNORES), one(2, 1), one(3, 1)], 1, ([3], [2], [])),
        ([one(1, attitude=IGNORES), one(2, 1), one(3)], 1, ([2], [], [])),  # before orphans
        ([one(1, attitude=IGNORES), one(3)], 1, ([3], [], [])),
        ([one(2, attitude=IGNORES), one(3, 2), one(4)], None, ([4], [3], [])),
        ([one(1, attitude=IGNORES)], 1, ([], [], [])),
        # consumer | tee log
        ([writes(2, "p"), reads(3, "p")], None, ([2], [], [3])),
        ([writes(2, "p"), reads(3, "p", parent=0), one(4, 2)], None, ([2], [], [3])),
        ([writes(2, "p"), writes(3, "q", reads="p"), reads(4, "q")], None, ([2], [], [4, 3])),
        ([reads(2, "p", writes=frozenset(["p"]))], None, ([], [], [2])),  # its own end: see below
        ([], None, ([], [], [])),
    ],
)
def test_who_is_asked_at_first(processes, command, expected):
    assert chosen(table(*processes), command) == expected


def test_nobody_is_asked_twice():
    scene = Scene(one(1))
    assert scene.look() == [1]
    assert scene.look() == scene.look(60) == []
    deaf = [one(1, attitude=IGNORES), one(2, 1)]  # late, orphans are looked for too: 1 is none
    assert chosen(table(*deaf), 1, late=True) == ([2], [], [])


def test_the_orphans_of_one_that_ends_by_the_signal_are_asked_at_once():
    scene = Scene(one(1), one(2, 1))  # sh -c 'a && b'
    assert scene.look() == [1]
    assert scene.look(ended={1: -TERM}, orphans=[2]) == [2]


def test_what_was_under_one_that_catches_it_counts_as_asked_until_half_of_the_grace():
    scene = Scene(one(1, attitude=CATCHES), one(2, 1), one(3, 2))  # timeout, sh, consumer
    assert scene.look() == [1]
    assert scene.look(ended={1: 124, 2: -TERM}, orphans=[3]) == []
    assert scene.look(14) == []
    assert scene.look(1) == [3]
    assert scene.look(10) == []


def test_one_that_was_started_after_its_parent_had_caught_it_is_asked_at_once():
    scene = Scene(one(1, attitude=CATCHES), one(2, 1))
    assert scene.look() == [1]
    scene.table[3] = one(3)
    assert scene.look(ended={1: 0, 2: 0}) == [3]


def test_a_signal_that_is_waited_for_shows_as_default_and_was_taken_all_the_same():
    by_its_status = Scene(one(1), one(2, 1))  # tini -g
    assert by_its_status.look() == [1]
    assert by_its_status.look(ended={1: 143}, orphans=[2]) == []
    by_its_life = Scene(one(1), one(2, 1))
    assert by_its_life.look() == [1]
    assert by_its_life.look(TAKE_WAIT + 0.1) == []
    assert by_its_life.look(ended={1: -TERM}, orphans=[2]) == []


def test_the_children_of_one_that_blocks_it_are_asked_in_its_place():
    scene = Scene(one(1, attitude=BLOCKS), one(2, 1, CATCHES))  # unshare --fork
    assert scene.look() == [1]
    assert scene.look(0.3, pending=[1]) == []
    assert scene.look(0.3, pending=[1]) == [2]
    assert scene.look(30, pending=[1]) == []
    scene = Scene(one(1, attitude=BLOCKS), one(2, 1), one(3, 1))
    assert scene.look() == [1]
    assert scene.look(TAKE_WAIT + 0.1, pending=[1]) == [3]
    assert scene.look(ended={1: 0, 3: -TERM}, orphans=[2]) == [2]  # it has told nobody


def test_the_children_of_one_that_is_slow_to_take_it_are_not_asked():
    scene = Scene(one(1, attitude=CATCHES), one(2, 1))  # Celery, on a machine that is too full
    assert scene.look() == [1]
    assert scene.look(5, pending=[1]) == scene.look(15, pending=[1]) == []
    slow_to_end = Scene(one(1), one(2, 1))
    assert slow_to_end.look() == [1]
    assert slow_to_end.look(5, pending=[1]) == []
    assert slow_to_end.look(ended={1: -TERM}, orphans=[2]) == [2]


def test_one_that_blocks_it_and_takes_it_has_perhaps_told_others():
    scene = Scene(one(1, attitude=BLOCKS), one(2, 1))  # signalfd
    assert scene.look() == [1]
    assert scene.look(1) == []
    assert scene.look(ended={1: 0}, orphans=[2]) == []
    quick = Scene(one(1, attitude=BLOCKS), one(2, 1))
    assert quick.look() == [1]
    assert quick.look(ended={1: 0}, orphans=[2]) == []


def test_one_that_ignores_it_once_it_was_asked_is_not_deaf():
    scene = Scene(one(1, attitude=CATCHES), one(2, 1), one(3, 2))
    assert scene.look() == [1]
    changed = {1: {"attitude": IGNORES}, 2: {"attitude": IGNORES}}
    assert scene.look(then=changed) == []
    assert scene.look(ended={1: 0}, orphans=[2]) == []  # and 3 is at work for it
    assert scene.look(20) == [2]


def test_one_that_catches_it_later_is_asked_itself():
    scene = Scene(one(1, attitude=IGNORES))
    assert scene.look() == []
    assert scene.look(then={1: {"attitude": CATCHES}}) == [1]


def test_of_several_the_next_is_asked_when_the_youngest_has_ended_or_at_half_of_the_grace():
    scene = Scene(one(2), one(3), one(4), command=None)
    assert scene.look() == [4]
    assert scene.look(5) == []
    assert scene.look(ended={4: 0}) == [3]
    assert scene.look(5) == []
    assert scene.look(5) == [2]


def test_who_reads_a_pipe_is_asked_once_nobody_writes_to_it_any_more():
    # seq 2 | xargs: the writer has ended long ago.
    xargs = Scene(reads(2, "p"), one(3, 2), command=None)
    assert xargs.look() == []
    assert xargs.look(PIPE_WAIT) == [2]
    own_end = Scene(reads(2, "p", writes=frozenset(["p"])), command=None)
    assert own_end.look() == []
    assert own_end.look(PIPE_WAIT) == [2]
    # consumer | tee log: tee gets the time to end by itself, and is spared until then.
    tee = Scene(writes(2, "p"), reads(3, "p"), command=None)
    assert tee.look() == [2]
    assert tee.look(60) == []
    assert tee.look(ended={2: 0}) == []
    assert tee.look(PIPE_WAIT / 2) == []
    assert tee.look(PIPE_WAIT / 2 + 0.01) == [3]


def test_one_that_has_lost_its_terminal_was_told_by_the_kernel():
    scene = Scene(one(1), one(2, 1, has_terminal=True), one(3, 2))  # unbuffer
    assert scene.look() == [1]
    lost = {2: {"has_terminal": False}}
    assert scene.look(ended={1: -TERM}, orphans=[2], then=lost) == []
    assert scene.look(15, then=lost) == [2]
    has_it_still = Scene(one(1), one(2, 1, has_terminal=True))
    assert has_it_still.look() == [1]
    assert has_it_still.look(ended={1: -TERM}, orphans=[2]) == [2]


def test_a_process_id_that_is_used_again_is_another_process():
    scene = Scene(one(2), command=None)
    assert scene.look() == [2]
    scene.table[2] = one(2)._replace(started=777)
    assert scene.look() == [2]
    # Nor is it the one that has ended by the signal, which so has told nobody.
    scene = Scene(one(2), one(3, 2), command=None)
    assert scene.look() == [2]
    scene.table = table(one(3), one(2, 3)._replace(started=777))
    assert scene.look(TAKE_WAIT + 0.1) == [3]


def test_processes_are_named_with_the_command_first():
    assert name_all(table(one(2), one(3)), 3) == "3 (p3), 2 (p2)"
    assert name_all(table(one(3), one(2)), None) == "2 (p2), 3 (p3)"  # and then by age
    many = table(*(one(pid) for pid in range(1, 14)))
    assert name_all(many, 1).endswith("10 (p10), 3 more")
    for pid in (11, 12, 13):
        del many[pid]
    assert name_all(many, 1).endswith("9 (p9), 10 (p10)")
    assert name_all({}, None) == ""


@pytest.mark.parametrize(
    ("line", "needs_shell"),
    [
        ("pnpm start", False),
        ("  rq worker  --burst jobs ", False),
        ("./consumer a-b_c,d@e:f/g+h^i", False),
        ("echo one", True),  # a builtin
        ("exec consumer", True),
        ("if consumer", True),
        ("cd /x", True),
        *((f"consumer a{letter}b", True) for letter in "|&;<>()$`\\\"'*?[#~=%{}!\n"),
        ("   ", True),
    ],
)
def test_a_line_without_shell_characters_needs_no_shell(line, needs_shell):
    assert command_of(line) == (["sh", "-c", line] if needs_shell else line.split())
