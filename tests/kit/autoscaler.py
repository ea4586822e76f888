"""What the workers told the autoscaler."""

import time

from tests.kit.waiting import eventually


def ended(vast):
    """What workers said of requests of this test; of an earlier one's they may still be telling."""
    return [request for request in vast.ended if request["request_idx"] >= vast.first_request]


def statuses(vast):
    return [request["status"] for request in ended(vast)]


async def silence(vast):
    """Wait until the workers have told all of what was before, and forget it."""
    start = time.monotonic()
    await eventually(
        lambda: time.monotonic() - max([start, *(r["received"] for r in vast.reports)]) > 2.5
    )
    vast.reports.clear()


def reservations_over_time(vast):
    """How many reservations the workers reported, each time that it changed."""
    load, steps = {}, [0]
    for report in vast.reports:
        load[report["id"]] = report["cur_load"]
        held = sum(value >= 100 for value in load.values())
        if held != steps[-1]:
            steps.append(held)
    return steps
