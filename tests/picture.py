"""Draw what a person sees while `--backlog` works: the picture in the README, from a real run.

pip install pyte && python tests/picture.py examples/files/screen.svg
"""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

HERE = Path(__file__).parent.parent
WIDTH = 84
HEIGHT = 20
COMMAND = "null_client.py --local --backlog examples/files/backlog --max 3 --settle 3 --once"


def screens():
    """Each state of the terminal during the run, as text."""
    with tempfile.TemporaryDirectory() as jobs:
        environment = {
            **os.environ,
            "JOBS": jobs,
            "NULL_CONSUMER": "examples/files/consumer",
            "TERM": "xterm",
        }
        put = [HERE / "examples/files/put", "12", "1"]
        subprocess.run(put, env=environment, check=True)
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        run = subprocess.Popen(
            [sys.executable, *shlex.split(COMMAND)],
            cwd=HERE,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        screen = pyte.Screen(WIDTH, HEIGHT)
        stream = pyte.ByteStream(screen)
        while received := read(ours):
            stream.feed(received)
            yield "\n".join(line.rstrip() for line in screen.display).rstrip()
        os.close(ours)
        assert run.wait() == 0


def read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def main(path):
    # The middle of it: some jobs are done, some are in hand, all three workers are reserved.
    middle = ""
    for text in screens():
        if re.search("reserved +3", text) and re.search("[1-9] in hand", text):
            middle = text
    assert middle
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere)
        console.print(middle, markup=False, highlight=False)
    # With the reader's own fonts, instead of fetching one.
    style = re.sub(r"@font-face {{.*?}}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(path, title=f"python {COMMAND}", code_format=style)


if __name__ == "__main__":
    main(sys.argv[1])
