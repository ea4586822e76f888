"""LocalVast: the consumers of its workers, in the caller's place, and what it shows of them."""

import os
import re
import shutil
import subprocess

import pytest

from null_local import GrowingFile, in_callers_place, of_the_caller

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize(
    ("line", "wrote"),
    [
        ("echo one", "one\n"),
        ("echo one # two", "one\n"),
        ("echo one; echo two >&2", "one\ntwo\n"),
        ("echo one & wait", "one\n"),
        ("# nothing\necho one\n\necho two", "one\ntwo\n"),
        ("cat <<END\none\nEND", "one\n"),
        ("exec echo one", "one\n"),
        ('echo "one" \'two\' "$WORD"', "one two three\n"),
        ("exit 3", ""),
        ('echo "one', "(?i)unterminated|unexpected EOF"),
        ("-x", "not found"),
        ("pwd; echo $PATH; echo $VIRTUAL_ENV", "{folder}\n{path}\nit's $HOME\n"),
    ],
)
def test_any_line_runs_in_the_callers_place_and_writes_to_its_file(
    shell, line, wrote, tmp_path, monkeypatch
):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    folder = tmp_path / "it's $HOME; #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = f"{folder}:{os.environ['PATH']}"
    output = folder / "output"
    there = in_callers_place(line, {"PATH": path, "VIRTUAL_ENV": "it's $HOME"}, output)
    run = subprocess.run(
        [shell, "-c", there],
        cwd="/",
        env={"PATH": os.environ["PATH"], "WORD": "three"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout + run.stderr == ""
    expected = wrote.replace("{folder}", str(folder)).replace("{path}", path)
    assert output.read_text() == expected or re.search(wrote, output.read_text())
    assert (run.returncode == 3) == (line == "exit 3")


def test_of_the_callers_environment_workers_get_what_is_for_any_consumer():
    consumers = ("CONSUMER", "EMPTY", "GRACE", "RESIDENT", "BROKEN_AFTER")
    passed = {f"NULL_{name}": "1" for name in consumers}
    passed |= {"JOBS": "1", "REDIS_URL": "1", "http_proxy": "1", "PATH": "1", "VAST_API_KEY": "1"}
    of_others = ("NULL_SESSION_ID", "NULL_CONTROL_URL", "NULL_CONTROL_PORT", "BACKEND_HEALTH_URL")
    assert of_the_caller(passed | dict.fromkeys(of_others, "1")) == passed


def test_lines_are_shown_once_complete_and_as_they_can_be_shown_anywhere(tmp_path):
    path = tmp_path / "log"
    file = GrowingFile(path)
    assert file.new_lines() == file.last_lines(5) == []
    path.write_bytes(b"one\n\n\x1b[2Jtwo\xff\nthr")
    assert file.new_lines() == ["one", "?[2Jtwo\ufffd"]
    with path.open("ab") as more:
        more.write(b"ee\n" + b"x" * 100_000)
    assert file.new_lines() == ["three"]
    assert [len(line) for line in file.new_lines()] == [500]  # of a line without an end
    assert file.new_lines() == []
    with path.open("ab") as more:
        more.write(b"\n1\n2\n\n3\n")
    assert file.last_lines(2) == ["2", "3"]
    assert file.last_lines(2) == []
