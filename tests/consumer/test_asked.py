"""null_consumer.py --empty: a COMMAND that gives its job back when asked, or that goes on."""

import asyncio

import pytest

from tests.kit.consumer import consumer, driver, held
from tests.kit.waiting import eventually
from tests.kit.worker import create, release

pytestmark = pytest.mark.anyio

# One job of 6 s. It is put back on SIGTERM, as arq does; with nothing to do it stays.
GIVES_BACK = """\
trap 'test -e job || echo 1 0 > jobs; rm -f job; echo asked; exit 0' TERM
echo began
while :; do
    test "$(cat jobs)" = "1 0" && { echo 0 1 > jobs; n=0; rm -f job; echo taken; }
    test "$(cat jobs)" = "0 1" && n=$((n + 1)) && test $n = 60 && {
        echo job done; echo 0 0 > jobs; touch job; }
    sleep 0.1
done
"""


async def test_one_that_gives_its_job_back_is_asked_only_when_nothing_is_in_hand(
    vast, worker, tmp_path
):
    (tmp_path / "jobs").write_text("1 0\n")
    (tmp_path / "run").write_text(GIVES_BACK)
    script = driver(tmp_path, "null_consumer.EMPTY_EVERY = 1.0")
    options = ("--empty", "cat jobs")
    command = ["sh", "./run"]
    async with consumer(worker, tmp_path, *options, command=command, script=script) as running:
        session_id = await create(vast, worker, lifetime=4)
        await running.until_said("the consumer gives its job back when it is asked to end")
        await running.until_printed("job done")
        await running.until_said(f"released session={session_id}")
        assert running.printed("taken") == running.printed("asked") == 2
        assert len(running.said("gives its job back")) == 1
        assert len(running.said("reserved")) == 1  # it went on under the same lease
        assert not running.said("failed")


async def test_one_that_was_asked_and_goes_on_is_told_again_and_again(vast, worker, tmp_path):
    script = driver(
        tmp_path,
        "null_consumer.EMPTY_EVERY = 0.3",
        "null_consumer.GOES_ON_AFTER = 1.0",
        "null_consumer.GOES_ON_EVERY = 1.0",
    )
    (tmp_path / "jobs").write_text("0 1")
    line = "trap '' TERM; echo began; while :; do sleep 0.1; done"
    options = {"command": line, "script": script, "NULL_EMPTY": "cat jobs"}
    async with consumer(worker, tmp_path, "--grace", "1", **options) as running:
        session_id = await create(vast, worker)
        await running.until_printed("began")
        await asyncio.sleep(4)
        assert not running.said("goes on")  # a job is in hand
        (tmp_path / "jobs").write_text("0")  # nobody knows of one
        await eventually(lambda: len(running.said("and goes on: ")) >= 2)
        assert "(sh)" in running.said("and goes on: ")[0]
        assert await held(worker, session_id)
        await release(worker, session_id)
        await running.until_said("killed, for it had not ended in its time")


async def test_a_count_of_grep_that_found_none_says_what_it_is(vast, worker, tmp_path):
    (tmp_path / "jobs").touch()
    script = driver(tmp_path, "null_consumer.EMPTY_EVERY = 0.3")
    options = ("--empty", "grep -c x jobs")
    line = "exec sleep 60"
    async with consumer(worker, tmp_path, *options, command=line, script=script) as running:
        await create(vast, worker)
        (said,) = await running.until_said("NULL_EMPTY changes nothing now: ")
        assert said.endswith("now: status 1 after it has printed '0'")
