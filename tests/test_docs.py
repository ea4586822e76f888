"""What the pages say agrees with the code, with each other, and with the command `vastai`."""

import ast
import functools
import json
import os
import re
import signal
import subprocess
import sys

import prometheus_client
import pytest

import null_backlog
import null_client
import null_consumer
import null_metrics
import null_worker
from tests.kit.environment import BARE, HERE
from tests.kit.pages import PAGES, blocks, commands, for_vastai, rows, section

API = "docs/api.md"
CODE = sorted(HERE.glob("null_*.py"))


def strings(path):
    """The texts in a module, without its docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


# Links


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\(([^)\s]+)\)", text)
    if not re.match("https?:", link)
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (HERE / page).parent / path if path else HERE / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(str(target.resolve().relative_to(HERE)))


def test_each_page_is_linked_from_the_readme():
    linked = {link for page, link in LINKS if page == "README.md"}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


# Flags


@functools.cache
def options(*command):
    """Return what a command's --help says of each flag."""
    environment = {**BARE, "COLUMNS": "1000"}
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        named = re.match(r" +(?:-\w, )?(--[a-z-]+)(.*)", line)
        if named:
            found[named[1]] = named[2]
    return found


def flags_of_table(heading):
    """The rows of a section's tables that are about a flag: its name, then the other cells."""
    found = {}
    for name, *cells in rows(section(API, heading)):
        flag = re.match(r"`(--[a-z-]+)", name)
        if flag:
            assert flag[1] not in found
            found[flag[1]] = cells
    return found


def test_the_flags_of_null_client_are_those_of_the_page():
    of_command = options("null_client.py")
    of_page = flags_of_table("Command line: `null_client.py`")
    assert set(of_page) == set(of_command)
    for flag, text in of_command.items():
        default = re.search(r"default: ([^)]+)", text)
        if default:
            assert default[1] in of_page[flag][0].replace("`", ""), flag


def test_the_flags_of_null_consumer_are_those_of_the_page():
    of_command = options("null_consumer.py")
    of_page = flags_of_table("Command line: `null_consumer.py`")
    assert set(of_page) == set(of_command) - {"--help"}
    for flag, (variable, _) in of_page.items():
        assert variable.strip("`").partition("=")[0] == "NULL_" + flag[2:].upper().replace("-", "_")


def test_flags_in_running_text_are_there():
    known = {*options("null_client.py"), *options("null_consumer.py")}
    for page, text in PAGES.items():
        for call in commands(text, "null_client.py"):
            named = {word.partition("=")[0].strip("`)") for word in call if word[:2] == "--"}
            assert named <= known, (page, named - known)


# Settings

SETTING = re.compile(r"\b(?:NULL|BACKEND)_[A-Z_]*[A-Z]\b|\bUNSECURED\b")
INTERNAL = {"NULL_PLACE"}  # from one of our programs to another


def settings_of_code():
    named = {name for path in CODE for text in strings(path) for name in SETTING.findall(text)}
    return named - INTERNAL


def settings_table():
    """The variables of the page, with their defaults where it says one."""
    found = {}
    for name, *cells in rows(section(API, "Settings on the instance")):
        found[name.strip("`")] = cells[0] if len(cells) == 2 else None
    return found


def test_the_settings_of_the_code_are_those_of_the_page():
    assert settings_of_code() == set(settings_table())


def test_the_defaults_of_the_settings_are_those_of_the_page():
    page = settings_table()
    for name, default in null_worker.DEFAULTS.items():
        if name in page:
            assert page[name] == default, name
    for name, default in null_consumer.Settings()._asdict().items():
        text = page[f"NULL_{name.upper()}"]
        if isinstance(default, float):
            assert float(text) == default, name
        elif isinstance(default, signal.Signals):
            assert f"SIG{text}" == default.name
        else:
            assert text == {None: "", False: "false"}.get(default, str(default)), name


def test_settings_in_running_text_are_read_somewhere():
    read = settings_of_code()
    for path in HERE.glob("examples/*/*"):
        if path.is_file() and path.suffix != ".svg":
            read.update(SETTING.findall(path.read_text(errors="replace")))
    for page, text in PAGES.items():
        assert set(SETTING.findall(text)) <= read, page


# Troubles and metrics


def troubles_of_page():
    return [
        name.strip("`").removesuffix(":")
        for name, *_ in rows(section("docs/operating.md", "Troubles by name"))
    ]


def test_the_troubles_of_the_page_are_those_of_the_code():
    assert troubles_of_page() == list(null_backlog.TROUBLES)


def test_the_metrics_of_the_page_are_those_of_the_code():
    metrics = null_metrics.Metrics()
    jobs = null_backlog.Jobs(waiting=1, in_hand=1, done=1)
    metrics.has_progressed(null_backlog.Progress(jobs=jobs, opened=1))
    metrics.has_workers(["free"])
    text = prometheus_client.generate_latest(metrics._registry).decode()
    served = {
        (name, kind) for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
    }
    table = rows(section("docs/operating.md", "Metrics"))
    named = {(re.match(r"`(\w+)", name)[1], kind) for name, kind, _ in table}
    assert {each for each in served if not each[0].endswith("_created")} == named
    (labelled,) = [set(re.findall(r'null_trouble\{name="(\w+)"', text))]
    assert labelled == set(troubles_of_page())


# Lines that programs print

LINES = [
    (page, line)
    for page, heading in [
        ("docs/troubleshooting.md", "The command ends at once"),
        ("docs/troubleshooting.md", "Lines of the dispatcher"),
        ("docs/troubleshooting.md", "Lines of the consumer's side"),
        ("docs/troubleshooting.md", "Lines and errors of the worker"),
        ("docs/troubleshooting.md", "Answers of the worker"),
    ]
    for row in rows(section(page, heading))
    for line in re.findall(r"`([^`]+)`", row[0])
]


@functools.cache
def texts():
    """All texts in the code."""
    return [text for path in CODE for text in strings(path)]


# What is filled in, and so separates the phrases of a line.
FILLED_IN = re.compile(
    r"""\.\.\. | [\d.:]*\d[\d.:]* | '[^']*' | "[^"]*" | https?:// | --[\w-]+ | \w+\.py | /[a-z/]+
    | [:;,()=#] | \b(?:or|and|after|HTTP)\b""",
    re.VERBOSE,
)


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_line_is_printed_by_the_code(page, line):
    """Each of its phrases is."""
    for phrase in FILLED_IN.split(line):
        assert any(phrase.strip() in text for text in texts()), phrase


# The project's own description


def test_there_is_one_version():
    newest = re.search(r"^## ([\d.]+)", PAGES["CHANGELOG.md"], re.MULTILINE)[1]
    assert null_client.__version__ == newest  # pyproject.toml takes it from there
    assert f"Status: {newest.rpartition('.')[0]}" in PAGES["README.md"]


def test_the_findings_are_listed():
    listed = re.findall(r"^\| \[([\w-]+\.sh)\]", PAGES["findings/README.md"], re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in HERE.glob("findings/*.sh"))


@pytest.mark.parametrize("path", sorted(HERE.glob("findings/*.sh")), ids=lambda path: path.name)
def test_a_finding_has_its_form(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in text
    assert "@@" not in text, "what was seen?"
    assert re.search(r"^# .*\b20\d\d-\d\d-\d\d\b", text, re.MULTILINE), "when was it seen?"
    assert subprocess.run(["bash", "-n", path]).returncode == 0


# The lines with `vastai`

PARSE = """\
import json, sys
from vastai.cli import main
main.run_command = lambda args: None
lines, names = json.load(sys.stdin)
sys.argv = ["vastai", "show", "user"]
main.main()  # knows its commands from here on
for words in lines:
    main.parser.parse_args(words)  # ends with status 2 where argparse refuses
(known,) = [action.choices for action in main.parser.parser._actions if action.choices]
unknown = [name for name in names if not {" ".join(name), name[0]} & set(known)]
sys.exit(f"no such commands: {unknown}" if unknown else 0)
"""
NUMBERS = {
    "ENDPOINT": "4242",
    "WORKERGROUP": "4243",
    "INSTANCE": "4244",
    "TEMPLATE": "0123456789abcdef",
    "SEARCH": "num_gpus=1",
    "NAME": "my-queue",
}


def with_values(word):
    """A word of a shell line, its variables replaced."""
    word = re.sub(r"\$\{?(\w+)(?::\?)?\}?", lambda match: NUMBERS.get(match[1], "1"), word)
    return re.sub(r"\b(?:ID|INSTANCE|ENDPOINT|WORKERGROUP)\b", "4242", word)


def calls(script):
    return [[with_values(word) for word in words] for words in commands(script, "vastai")]


def vastai_lines():
    """Those in blocks, but for one that takes what a function gets."""
    found = [
        words
        for page in PAGES
        for block in blocks(page, "sh", "crontab")
        for words in calls(block.text)
    ]
    return [words for words in found if "$@" not in words]


def vastai_names():
    """The commands that running text names, perhaps without all that they need."""
    return [
        words[:2]
        for text in PAGES.values()
        for code in re.findall(r"`(vastai [^`\n]+)`", text)
        for words in calls(code)
        if not words[0].startswith("-")
    ]


@for_vastai
def test_vastai_takes_every_line_of_the_pages(tmp_path):
    lines = vastai_lines()
    assert len(lines) > 20
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([lines, vastai_names()]),
        env={**BARE, "HOME": str(tmp_path), "VASTAI_NO_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
