"""PostgreSQL and RabbitMQ servers of the tests' own.

Each listens on ports of 127.0.0.1 that the system chose, keeps what it stores in a temporary
folder, and leaves neither behind. Debian's packages bring the programs; the system's own servers
may run beside them.

    with shared_server("rabbitmq", folder) as url:

is one server for all processes of a test run. They may be killed: it ends when nobody uses it.
"""

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from tests.kit.environment import BARE, HERE
from tests.kit.example import which

START_TIMEOUT = 120.0  # seconds that a server may take until it is ready
STOP_TIMEOUT = 20.0  # seconds that it may take to end
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one on the path changes its user


def postgres_programs():
    """The folder of PostgreSQL's server programs, which Debian keeps off the path; or None."""
    found = [Path(each).parent for each in [which("initdb")] if each]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[4]))
    return found[-1] if found else None


def rabbitmq_program():
    """Where RabbitMQ's server program is, or None."""
    return str(RABBITMQ) if RABBITMQ.exists() and which("epmd") else None


@contextlib.contextmanager
def postgres_server():
    """A PostgreSQL with nothing in it; yields the URL of the server, without a database's name."""
    programs = postgres_programs()
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with _folder(user) as folder, _port() as port:
        initdb = [programs / "initdb", "--pgdata", folder / "db", "--username", "postgres"]
        options = ["--auth", "trust", "--no-sync", "--encoding", "UTF8", "--locale", "C"]
        with (folder / "initdb.log").open("wb") as log:
            subprocess.run(
                [*initdb, *options], user=user, cwd=folder, stdout=log, stderr=log, check=True
            )
        server = [programs / "postgres", "-D", folder / "db", "-h", "127.0.0.1", "-p", str(port)]
        settings = ["unix_socket_directories=", "fsync=off", "shared_buffers=16MB"]
        for setting in settings:
            server += ["-c", setting]
        # SIGQUIT is PostgreSQL's immediate shutdown: it waits for no connection.
        with _running(server, folder, {}, partial(_accepts, programs, port), signal.SIGQUIT, user):
            yield f"postgresql://postgres@127.0.0.1:{port}"


@contextlib.contextmanager
def rabbitmq_server():
    """A RabbitMQ with nothing in it; yields its URL.

    Erlang's port mapper would be started in the background, listen on all addresses and stay for
    ever. So it is started first, on a port of its own, and ended last.
    """
    with _folder() as folder, _port() as port, _port() as between_nodes, _port() as mapper:
        variables = {
            "HOME": str(folder),  # of the cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(mapper),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_DIST_PORT": str(between_nodes),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "none"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_MNESIA_BASE": str(folder),
            "RABBITMQ_NODENAME": f"tests{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} "
            "+sbwt none +sbwtdcpu none +sbwtdio none",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server, for which we wait
        }
        epmd = [which("epmd"), "-port", str(mapper), "-address", "127.0.0.1"]
        with (
            _running(epmd, folder, {}, partial(_listens, mapper), signal.SIGKILL),
            _running([RABBITMQ], folder, variables, partial(_is_up, folder), signal.SIGTERM),
        ):
            yield f"amqp://127.0.0.1:{port}"


@contextlib.contextmanager
def _folder(user=None):
    """A temporary folder, of this user's where one is named: then not in a folder of root's."""
    folder = Path(tempfile.mkdtemp(prefix="broker-", dir="/tmp" if user else None))
    try:
        if user:
            os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _port():
    """A port that the system gives to nobody else meanwhile."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def _running(command, folder, variables, ready, stop_signal, user=None):
    """Run a server, wait until it is ready, and end all that it has started."""
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**BARE, **variables},
            cwd=folder,
            user=user,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not ready():
            said = log.read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"{log.name}: {said}"
            assert time.monotonic() < deadline, f"{log.name}: not in {START_TIMEOUT} s: {said}"
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _accepts(programs, port):
    """Whether PostgreSQL lets clients in: it listens before it does."""
    ask = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(ask, check=False).returncode == 0


def _is_up(folder):
    """Whether RabbitMQ serves clients: it listens before it does."""
    said = (folder / "rabbitmq-server.log").read_text(errors="replace")
    return re.search("Starting broker.* completed", said)


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


SERVERS = {"postgres": postgres_server, "rabbitmq": rabbitmq_server}

needs_postgres = pytest.mark.skipif(
    not postgres_programs(), reason="postgresql, which apt-get would bring, is not installed"
)
needs_rabbitmq = pytest.mark.skipif(
    not rabbitmq_program(), reason="rabbitmq-server, which apt-get would bring, is not installed"
)


@contextlib.contextmanager
def shared_server(kind, folder):
    """Yield the URL of the one server of this kind for all who name the same folder.

    Each user holds a lock on a file, which the kernel frees however the user ends. The first one
    starts a keeper, a process that starts the server and ends it once nobody holds that lock.
    """
    used, starting, url = _files(kind, folder)
    with used.open("a") as use, starting.open("a") as start:
        fcntl.flock(use, fcntl.LOCK_SH)
        fcntl.flock(start, fcntl.LOCK_EX)
        if not url.exists():
            _start_keeper(kind, folder)
        fcntl.flock(start, fcntl.LOCK_UN)
        yield url.read_text()


def _files(kind, folder):
    return [folder / f"{kind}.{name}" for name in ("used", "starting", "url")]


def _start_keeper(kind, folder):
    log = folder / f"{kind}.log"
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.broker", kind, folder],
            cwd=HERE,
            env=BARE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    while not _files(kind, folder)[2].exists():
        assert keeper.poll() is None, log.read_text()
        time.sleep(0.1)


def keep(kind, folder):
    """Run the server until nobody uses it."""
    used, _, url = _files(kind, folder)
    with SERVERS[kind]() as server_url, used.open("a") as use:
        complete = url.with_suffix(".new")
        complete.write_text(server_url)
        complete.rename(url)
        fcntl.flock(use, fcntl.LOCK_EX)
        url.unlink()  # who comes now waits for the lock, and starts the next one


if __name__ == "__main__":
    keep(sys.argv[1], Path(sys.argv[2]))
