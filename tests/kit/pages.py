"""The pages for people: their text, the blocks of code in them, their tables, their links."""

import importlib.metadata
import re
import shlex
from typing import NamedTuple

import pytest

from tests.kit.environment import HERE

PAGES = {
    str(path.relative_to(HERE)): path.read_text()
    for path in sorted([*HERE.glob("*.md"), *HERE.glob("docs/*.md"), *HERE.glob("findings/*.md")])
}


def version_of_vastai():
    try:
        version = importlib.metadata.version("vastai")
    except importlib.metadata.PackageNotFoundError:  # it had another name once
        return (0,)
    return tuple(int(part) for part in re.findall(r"\d+", version))


for_vastai = pytest.mark.skipif(
    version_of_vastai() < (1, 9), reason="the lines are for vastai 1.9 and later"
)


class Block(NamedTuple):
    """A block of code on a page."""

    page: str
    language: str
    text: str


FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page, *languages):
    """The blocks of a page, one after the other."""
    return [
        Block(page, language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in FENCE.findall(PAGES[page])
        if language in languages
    ]


def block_with(text, page=None):
    """The text of the one block that holds another text."""
    pages = [page] if page else PAGES
    found = [block for each in pages for block in blocks(each, "sh", "python", "ini", "dockerfile")]
    (block,) = [block for block in found if text in block.text]
    return block.text


def section(page, heading):
    """What stands under a heading of the second level, up to the next one."""
    _, found, text = PAGES[page].partition(f"\n## {heading}\n")
    assert found, heading
    return text.partition("\n## ")[0]


def tables(text):
    """The tables in a text: each a list of rows, which are lists of cells, without the head."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        _, _, *lines = table.splitlines()
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        found.append([[cell.strip() for cell in row] for row in cells])
    return found


def rows(text):
    """The rows of all tables in a text."""
    return [row for table in tables(text) for row in table]


def commands(text, name):
    """The calls of a program in a shell script, as lists of words; variables stay as they are."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        for match in re.finditer(rf"(?:^|[\s(/]){name} (.*)", line):
            words = shlex.shlex(match[1], posix=True, punctuation_chars=True)
            words.whitespace_split = True
            words.commenters = "#"
            found.append(list(_up_to_the_end(words)))
    return found


def _up_to_the_end(words):
    for word in words:
        if set(word) <= set("();<>|&"):
            return
        yield word
