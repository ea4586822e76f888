"""Every example of a queue has its four programs, its place in the docs, and its tests."""

import os

import pytest

from tests.kit.environment import HERE
from tests.kit.pages import PAGES

QUEUES = sorted(path.parent for path in HERE.glob("examples/*/backlog"))


@pytest.mark.parametrize("folder", QUEUES, ids=lambda folder: folder.name)
def test_it_is_whole(folder):
    for program in ("consumer", "backlog", "put", "results"):
        assert os.access(folder / program, os.X_OK), program
    assert f"`examples/{folder.name}/consumer" in PAGES["docs/queues.md"]
    assert f"examples/{folder.name}/backlog --watch" in PAGES["docs/queues.md"]
    assert (HERE / f"tests/examples/test_{folder.name.replace('-', '_')}.py").exists()
