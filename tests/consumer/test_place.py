"""Where null_consumer.py runs COMMAND and --empty's, when LocalVast says so."""

import json
import os
import shutil

import pytest

from tests.kit.consumer import consumer
from tests.kit.waiting import eventually
from tests.kit.worker import create

pytestmark = pytest.mark.anyio


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "it's $HOME; #1"
    folder.mkdir()
    (folder / "run").write_text('#!/bin/sh\necho "$PWD|$VIRTUAL_ENV|$A|$NULL_PLACE|$PATH"\n')
    (folder / "run").chmod(0o755)
    return folder


def described(folder, **changes):
    path = f"{folder}:{os.environ['PATH']}"
    environment = {"PATH": path, "VIRTUAL_ENV": "it's $HOME", "A": None}
    output = str(folder / "output")
    return json.dumps(
        {"folder": str(folder), "environment": environment, "output": output} | changes
    )


@pytest.mark.parametrize("command", [["run"], ["./run"], "echo $UNSET; run", "exec run"])
async def test_command_runs_there_and_writes_to_its_file(vast, worker, tmp_path, place, command):
    options = {"command": command, "NULL_PLACE": described(place), "A": "b"}
    async with consumer(worker, tmp_path, **options) as running:
        await create(vast, worker)
        await running.until_said("released")
        written = (place / "output").read_text().strip()
        assert written == f"{place}|it's $HOME|||{place}:{os.environ['PATH']}"
        assert all(line.startswith("null_consumer: ") for line in running.output().splitlines())


async def test_the_count_runs_there(vast, worker, tmp_path, place):
    (place / "count").write_text("#!/bin/sh\necho 0; pwd > counted\n")
    (place / "count").chmod(0o755)
    options = {"command": ["run"], "NULL_EMPTY": "count", "NULL_PLACE": described(place)}
    async with consumer(worker, tmp_path, **options) as running:
        await create(vast, worker)
        await running.until_said("released")
        assert (place / "counted").read_text() == f"{place}\n"


async def test_a_folder_that_is_gone_is_named(vast, worker, tmp_path, place):
    options = {"command": ["run"], "NULL_PLACE": described(place, output=None)}
    shutil.rmtree(place)
    async with consumer(worker, tmp_path, **options) as running:
        await create(vast, worker)
        (said,) = await running.until_said("the consumer failed: can't be started: ")
        assert f"No such file or directory: {place}" in said


async def test_a_working_folder_that_was_deleted_is_named(vast, worker, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    under = ("sh", "-c", f'cd {folder}; rmdir {folder}; exec "$@"', "sh")
    async with consumer(worker, tmp_path, command=["./run"], under=under) as running:
        await create(vast, worker)
        (said,) = await running.until_said("the consumer failed: can't be started: ")
        assert "No such file or directory: the working folder, which was deleted" in said
        await eventually(lambda: running.said("released"))
