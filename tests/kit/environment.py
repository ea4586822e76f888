"""What the tests find: the project, the environment of what they start, what is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
ON_VAST = {
    "CONTAINER_ID": "1",
    "PUBLIC_IPADDR": "127.0.0.1",
    "REPORT_ADDR": "http://127.0.0.1:9",
    "WORKER_PORT": "3000",
    "VAST_TCP_PORT_3000": "3000",
}
# What was set for the tests themselves is no setting of what they start.
BARE = {
    name: value
    for name, value in os.environ.items()
    if not re.match("VAST|NULL_|BACKEND_|LINES|COLUMNS", name)
}


def installed(*needed):
    missing = [
        name for name in needed if not shutil.which(name) and not importlib.util.find_spec(name)
    ]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def run(command, environment, folder=HERE):
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
