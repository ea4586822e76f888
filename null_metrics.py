"""What `null_client.py --metrics PORT` serves: how a backlog gets on, as Prometheus metrics.

    pip install '.[metrics]'
    curl http://127.0.0.1:PORT/metrics

A Metrics is told what follow() tells, and nothing here asks Vast or the queue anything. It serves
on this machine only. docs/operating.md explains each metric and has alerts for them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from null_backlog import TROUBLES

if TYPE_CHECKING:
    from null_backlog import Progress

__all__ = ["Metrics"]

HOST = "127.0.0.1"
# A stopped worker serves within 2 minutes, a new one may load for half an hour.
WAIT_BUCKETS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)  # seconds
WORKER_STATES = ("reserved", "free", "loading", "stopping", "stopped", "broken")


class Metrics(Collector):
    """The metrics of one dispatcher, in a registry of their own."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._workers: Mapping[str, int] | None = None  # how many do what
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._waits = Histogram(
            "null_reservation_wait_seconds",
            "Time from asking for a worker to holding its reservation.",
            buckets=WAIT_BUCKETS,
            registry=self._registry,
        )

    def has_progressed(self, progress: Progress) -> None:
        """Take over what follow() tells. It tells of each reservation as it is opened."""
        before = self._progress.opened if self._progress else 0
        if progress.opened > before:
            self._waits.observe(progress.waited)
        self._progress = progress

    def has_workers(self, words: Sequence[str]) -> None:
        """Take over what the endpoint's workers do, in a word each."""
        self._workers = Counter(word if word in WORKER_STATES else "other" for word in words)

    @contextlib.contextmanager
    def served(self, port: int) -> Iterator[None]:
        """Serve them for the length of the block. Raises OSError where the port can't be had."""
        server, thread = start_http_server(port, HOST, self._registry)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def collect(self) -> Iterator[Metric]:
        """Give what a scrape gets beside the histogram. Called in another thread."""
        if self._progress is not None:
            yield from of_progress(self._progress)
        if self._workers is not None:
            counts = {state: self._workers[state] for state in (*WORKER_STATES, "other")}
            yield gauge("null_workers", "Workers of the endpoint by what they do.", "state", counts)


def of_progress(progress: Progress) -> Iterator[Metric]:
    """Give the metrics that say how follow() gets on. What isn't known has no sample."""
    jobs = progress.jobs
    if jobs is not None:
        counts = {"waiting": jobs.waiting, "in_hand": jobs.in_hand}
        yield gauge("null_jobs", "Jobs that are not done, as last counted.", "state", counts)
        if jobs.done is not None:
            # Not a counter: it may fall, where the queue forgets old results.
            text = "Jobs that are done or were put aside, as the queue counts them."
            yield GaugeMetricFamily("null_jobs_done", text, jobs.done)
    wanted = "Workers for the jobs that are not done, --max at most."
    yield GaugeMetricFamily("null_workers_wanted", wanted, progress.wanted)
    held = {"own": progress.own, "others": progress.others}
    yield gauge("null_reservations_held", "Reservations that are held now.", "holder", held)
    asked = "Requests for a worker that wait now."
    yield GaugeMetricFamily("null_reservations_requested", asked, progress.asked)
    reserved = "Time for which this dispatcher has held workers, summed over them."
    yield CounterMetricFamily("null_reserved_seconds", reserved, progress.reserved_seconds)
    failed = "Times that the backlog could not be counted."
    yield CounterMetricFamily("null_backlog_failures", failed, progress.failed_counts)
    now = {name: int(name in progress.troubles) for name in TROUBLES}
    yield gauge("null_trouble", "Whether this goes wrong now: 1, or 0.", "name", now)


def gauge(name: str, text: str, label: str, values: Mapping[str, int | None]) -> Metric:
    """Return a gauge with one label, whose values are few and known beforehand."""
    metric = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        if number is not None:
            metric.add_metric([value], number)
    return metric
