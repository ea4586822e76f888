"""The rule by which follow() asks for workers: a pure function of numbers.

`decide()` takes what the dispatcher sees at one moment (`Snapshot`) and what earlier moments have
left behind (`History`), and says how many workers to ask for and how many requests to take back.
Try a change in tests/simulation first: a world in numbers, with jobs, machines and crashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LIST_LAG = 15.0  # seconds by which Vast's list of workers may be behind
LIST_KEPT = 60.0  # seconds for which the last list counts while no newer one comes

STUCK_AFTER = 3  # own reservations that have ended while nothing moved
GROWTH = 120.0  # seconds for which a number that grows may hide that jobs get done
WORKED_AFTER = 30.0  # seconds in hand after which a job counts as worked on
GHOST_AFTER = 600.0  # seconds without a job after which another's reservation doesn't count
STRANDED_AFTER = 60.0  # seconds
LONGEST_PAUSE = 60.0  # seconds between two requests that are likely to be in vain
LONGEST_RESCUE_PAUSE = 3600.0  # seconds between two workers for stranded jobs


class Jobs(NamedTuple):
    """A backlog: the jobs that aren't done."""

    waiting: int  # where only one number is known, the jobs in hand too
    in_hand: int | None = None
    done: int | None = None  # ever done or put aside

    @property
    def total(self) -> int:
        return self.waiting + (self.in_hand or 0)


class Limits(NamedTuple):
    """What the caller of follow() has set."""

    most: int  # reservations
    jobs_per_worker: int = 1
    settle: float = 30.0  # seconds

    def workers_for(self, jobs: int) -> int:
        """Round up, exactly for numbers of any size."""
        return -(-jobs // self.jobs_per_worker)


class Snapshot(NamedTuple):
    """What follow() sees at one moment, in numbers. Times are in seconds, by one steady clock."""

    at: float
    jobs: Jobs | None  # None: not known
    listed: int | None  # reserved workers on Vast's list, whoever's they are; None: not known
    most_own: int = 0  # own reservations held at a time, from LIST_LAG before the list on
    own: Sequence[float] = ()  # when each own reservation that is held was opened
    last_opened: float = -math.inf  # when the latest own reservation was opened, held or not
    asked: int = 0  # own requests that wait for a worker
    ended: int = 0  # own reservations that have ended since the start
    unreachable: int = 0  # workers that the router has named and nobody reached
    refused_until: float | None = None  # while Vast refuses: when to ask again


Counts = tuple[tuple[float, int], ...]  # when, and how many


class Mark(NamedTuple):
    """A moment, and how things were then."""

    at: float
    jobs: int
    ended: int


class History(NamedTuple):
    """What the snapshots so far leave behind for the next one."""

    not_before: float | None = None  # when to ask for the first worker; None: no list has come yet
    others: Counts = ()  # reservations of others, for the last LIST_LAG
    jobless: Counts = ()  # reservations of others that had no job
    ghosts: int = 0  # reservations of others that had no job for GHOST_AFTER: they don't count
    wanted: Counts = ()  # workers, for the last `settle` seconds
    last_wanted: int = 0
    jobs: Jobs | None = None  # the last ones that were known
    pulled_at: float = -math.inf  # when a count last showed that jobs are pulled
    moved: Mark = Mark(-math.inf, 0, 0)  # when jobs last moved, or before the first end since
    stuck: bool = False
    stranded_since: float | None = None
    rescues: int = 0  # workers asked for since then
    none_since: float | None = None  # when the first of the latest counts found no job
    counts_of_none: int = 0


class Decision(NamedTuple):
    """What to do now."""

    wanted: int = 0  # workers in all
    others: int = 0  # reserved by others
    ask: int = 0  # for so many more
    take_back: int = 0  # so many requests, the latest ones


def decide(limits: Limits, history: History, now: Snapshot) -> tuple[History, Decision | None]:
    """Say how many workers to ask for or take back. None: not known, so do neither."""
    history = _note_list(history, now)
    history = history._replace(wanted=_since(now.at - limits.settle, history.wanted))
    if now.jobs is None or not history.others:
        return _note_gap(history, now), None
    history = _note_jobs(history, now, now.jobs)
    loading = sum(opened_at > history.pulled_at for opened_at in now.own)
    history = _note_ghosts(history, now, now.jobs, own_working=len(now.own) - loading)
    others = max(count for _, count in history.others) - history.ghosts
    reserved = len(now.own) + others
    history = _note_stranded(history, now, now.jobs, working=reserved - loading)
    wanted = _wanted(limits, history, now, now.jobs, working=reserved - loading)
    history = _note_wanted(history, now.at, wanted)
    ask = wanted - reserved - now.asked
    take_back = now.asked - max(0, max(count for _, count in history.wanted) - reserved)
    if history.stuck:
        ask = min(ask, _one_at_a_time(history, now))
        take_back = max(take_back, now.asked - 1)
    if history.not_before is None or now.at < history.not_before:
        ask = 0
    if now.refused_until is not None:
        ask = min(ask, 1 - now.asked) if now.at >= now.refused_until else 0
    if is_stranded(history, now.at):
        ask = min(ask, _rescue_is_due(history, now))
        history = history._replace(rescues=history.rescues + max(0, ask))
    return history, Decision(wanted, others, max(0, ask), max(0, take_back))


def _note_gap(history: History, now: Snapshot) -> History:
    """Let the last number of workers stand while the jobs, or the list, aren't known."""
    history = _note_wanted(history, now.at, history.last_wanted)
    return history._replace(none_since=None, counts_of_none=0)


def _note_wanted(history: History, at: float, wanted: int) -> History:
    """Only the latest time of a number counts, so a number that stays takes one place."""
    before = history.wanted
    if before and before[-1][1] == wanted:
        before = before[:-1]
    return history._replace(wanted=(*before, (at, wanted)), last_wanted=wanted)


def _wanted(limits: Limits, history: History, now: Snapshot, jobs: Jobs, working: int) -> int:
    """Return how many workers the jobs need that wait, or that reserved workers may have in hand.

    A worker that was just reserved may take minutes to load before it pulls: until then jobs in
    hand are somebody else's.
    """
    if is_stranded(history, now.at):
        return 1
    in_hand = min(jobs.in_hand or 0, limits.jobs_per_worker * working)
    return min(limits.most, limits.workers_for(jobs.waiting + in_hand))


def _one_at_a_time(history: History, now: Snapshot) -> int:
    """While stuck: one, and once it has ended the next, 1, 2, 4 ... 60 s after it was opened."""
    in_vain = now.ended - history.moved.ended - STUCK_AFTER
    due = now.last_opened + min(LONGEST_PAUSE, 2.0 ** min(max(0, in_vain), 9))
    if now.last_opened in now.own or now.at < due:
        return 0
    return 1 - now.asked


def _note_list(history: History, now: Snapshot) -> History:
    """Count the reservations of others: those on Vast's list that aren't ours.

    The list may lag. What we have just ended isn't somebody else's, and what it doesn't show yet
    isn't free. A worker that nobody reaches stays on the list with the load of requests that never
    arrived.
    """
    if now.listed is None:
        last = [each for each in history.others[-1:] if each[0] >= now.at - LIST_KEPT]
        return history._replace(others=_since(now.at - LIST_LAG, history.others) or tuple(last))
    newest = (now.at, max(0, now.listed - now.most_own - now.unreachable))
    not_before = history.not_before
    if not_before is None:  # the list may not show yet what a predecessor has just opened
        not_before = now.at + LIST_LAG if now.listed else now.at
    others = (*_since(now.at - LIST_LAG, history.others), newest)
    return history._replace(others=others, not_before=not_before)


def _note_jobs(history: History, now: Snapshot, jobs: Jobs) -> History:
    """See whether jobs are pulled, whether they move, and whether none is left.

    Stuck is when reservations end, one after the other, and no job gets done.
    """
    before = history.jobs
    none_since = None
    if jobs.total == 0:
        none_since = now.at if history.none_since is None else history.none_since
    history = history._replace(
        jobs=jobs,
        none_since=none_since,
        counts_of_none=history.counts_of_none + 1 if jobs.total == 0 else 0,
    )
    mark = Mark(now.at, jobs.total, now.ended)
    if before is None:
        return history._replace(pulled_at=now.at, moved=mark)
    if jobs.waiting < before.waiting or jobs.in_hand != before.in_hand:
        history = history._replace(pulled_at=now.at)
    ended = now.ended - history.moved.ended
    if ended == 0 or _moved(history, now, before, jobs):
        return history._replace(moved=mark, stuck=False)
    if jobs.done is None and now.at < max(history.moved.at, history.pulled_at) + GROWTH:
        # A queue that grows hides that jobs get done: each job that has come excuses one end.
        ended -= max(0, jobs.total - history.moved.jobs)
    return history._replace(stuck=ended >= STUCK_AFTER)


def _moved(history: History, now: Snapshot, before: Jobs, jobs: Jobs) -> bool:
    """Whether a job gets done, as far as the numbers tell."""
    if jobs.waiting == 0 or _latest_works(history, now, jobs):
        return True
    if jobs.done is not None and before.done is not None:
        return jobs.done > before.done
    return jobs.total < before.total


def _latest_works(history: History, now: Snapshot, jobs: Jobs) -> bool:
    """Whether the latest reservation is held, and has had a job in hand for WORKED_AFTER."""
    pulled_long_ago = now.last_opened < history.pulled_at < now.at - WORKED_AFTER
    return bool(jobs.in_hand) and now.last_opened in now.own and pulled_long_ago


def _note_ghosts(history: History, now: Snapshot, jobs: Jobs, own_working: int) -> History:
    """Find the reservations of others that have had no job for GHOST_AFTER.

    With one number nobody knows who has a job in hand: then all of them are jobless while no job
    moves.
    """
    if history.stuck:  # ours found nothing to do, so the jobs in hand may be theirs
        return history._replace(jobless=(), ghosts=0)
    others = max(count for _, count in history.others)
    working = max(0, (jobs.in_hand or 0) - own_working)
    if jobs.in_hand is None and history.pulled_at == now.at:
        working = others
    now_jobless = max(0, others - working)
    jobless = history.jobless
    if not jobless or jobless[-1][1] != now_jobless:  # a number holds until the next one
        jobless = (*jobless, (now.at, now_jobless))
    ghosts = min(history.ghosts, others)
    if jobless[0][0] <= now.at - GHOST_AFTER:
        ended = [count for count in jobless if count[0] <= now.at - GHOST_AFTER]
        jobless = jobless[len(ended) - 1 :]
        ghosts = max(ghosts, min(count for _, count in jobless))
    return history._replace(jobless=jobless, ghosts=ghosts)


def _note_stranded(history: History, now: Snapshot, jobs: Jobs, working: int) -> History:
    """See whether jobs are in hand that no reserved worker can have."""
    if jobs.waiting or not jobs.in_hand or working > 0:
        return history._replace(stranded_since=None, rescues=0)
    if history.stranded_since is None:
        return history._replace(stranded_since=now.at)
    return history


def is_stranded(history: History, at: float) -> bool:
    """Whether that has lasted: most systems give a dead worker's job back before that."""
    return history.stranded_since is not None and at >= history.stranded_since + STRANDED_AFTER


def _rescue_is_due(history: History, now: Snapshot) -> int:
    """One worker, the next 2, 4, 8 ... 60 min after it: some systems give back only to one."""
    pause = min(LONGEST_RESCUE_PAUSE, 60.0 * 2.0 ** min(history.rescues, 9))
    if history.rescues and now.at < now.last_opened + pause:
        return 0
    return 1 - now.asked - len(now.own)


def nothing_is_left(limits: Limits, history: History, at: float) -> bool:
    """Whether each count of the last `settle` seconds, two at least, found no job."""
    if history.none_since is None or history.counts_of_none < 2:
        return False
    return at - history.none_since >= limits.settle


def _since(moment: float, counts: Iterable[tuple[float, int]]) -> Counts:
    return tuple(count for count in counts if count[0] > moment)
