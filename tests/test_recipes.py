"""The README's recipes for a queue in Redis, as printed."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from null_client import reserve
from null_local import LocalVast
from tests.environment import BARE, HERE, installed, readme
from tests.http import request, server
from tests.waiting import eventually
from tests.worker import create, fresh, is_free, release, until

with contextlib.suppress(ImportError):
    import redis.asyncio

pytestmark = pytest.mark.anyio

recipes = installed("redis", "trustme", "redis-server", "redis-cli", "jq", "curl", "setpriv")


# What the reader brings. Each start of a job is noted. A `first` hangs the first time that it is
# started; a `long` takes longer than a reservation lasts that nobody renews, and its worker after.
WORK_SH = """#!/bin/sh
id=$(printf %s "$1" | jq .id) || exit 1
task=$(printf %s "$1" | jq -r .task)
redis-cli -u "$REDIS_URL" RPUSH started "$id" >/dev/null
case "$task" in
fail) exit 1 ;;
hang) exec sleep 100 ;;
long) sleep 11 ;;
together) while [ "$(redis-cli -u "$REDIS_URL" EXISTS apart)" = 1 ]; do sleep 0.1; done ;;
some) sleep 2 ;;
first) [ -z "$(redis-cli -u "$REDIS_URL" SET pid $$ NX)" ] || exec sleep 100 ;;
esac
sleep 0.4
printf %s "did $id"
"""


WORK_PY = """
import os, time, redis
queue = redis.Redis.from_url(os.environ["REDIS_URL"])
def work(job):
    queue.rpush("started", job["id"])
    if job["task"] == "fail":
        raise ValueError("no")
    if job["task"] == "hang" or (job["task"] == "first" and queue.set("pid", os.getpid(), nx=True)):
        time.sleep(100)
    while job["task"] == "together" and queue.exists("apart"):
        time.sleep(0.1)
    time.sleep({"long": 11, "some": 2}.get(job["task"], 0.4))
    return f"did {job['id']}"
"""


RECIPES = {
    "consumer.sh": "# consumer.sh: ./work",
    "consumer.py": "# consumer.py",
    "dispatcher.py": "# dispatcher.py",
    "own_worker.py": "async def run_alone",
    "own_consumer.sh": "# own_consumer.sh",
    "raw.sh": "place=0 id=",
}


def recipe(name, **constants):
    """A recipe as printed, but for the values of constants."""
    text = readme(holding=RECIPES[name])
    for constant, value in constants.items():
        if found := re.search(
            rf"^([A-Z, ]*\b{constant}\b[A-Z, ]*) = ([\d, ]+?)(?=  #|$)", text, re.MULTILINE
        ):
            values = dict(zip(found[1].split(", "), found[2].split(", "), strict=True)) | {
                constant: str(value)
            }
            text = text.replace(found[0], f"{', '.join(values)} = {', '.join(values.values())}")
        else:
            text, changed = re.subn(
                rf"\b{constant.lower()}=\d+", f"{constant.lower()}={value}", text
            )
            assert changed == 1, constant
    return text


class Farm:
    """Redis, LocalVast, and beside each worker the consumer.

    It goes with its worker, and is started again by itself.
    """

    def __init__(self, folder, language=None, tls=False, limit=60, max_workers=3, idle=1.5):
        """Without a language no consumers are run."""
        self.folder, self.language, self.limit = folder, language, limit
        self.vast = LocalVast(
            max_workers=max_workers, inactivity_timeout=idle, control_port=None, tls=tls
        )
        self.processes, self.consumers, self.most, self.supervise, self.stack = (
            [],
            {},
            0,
            True,
            contextlib.AsyncExitStack(),
        )

    async def start(self, *command, **environment):
        environment = BARE | {"PYTHONPATH": str(HERE), "REDIS_URL": self.url} | environment
        log = (self.folder / "log").open("ab")
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self.processes.append(process)
        return process

    async def start_redis(self):
        server = None
        # Somebody else was given the port meanwhile.
        while server is None or server.returncode is not None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url = f"redis://127.0.0.1:{port}"
            server = await self.start(
                "redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""
            )
            await eventually(
                lambda server=server, port=port: server.returncode is not None or answers_ping(port)
            )
        self.redis = server

    async def start_dispatcher(self, autoscaler=None):
        self.dispatcher = await self.start(
            sys.executable,
            "dispatcher.py",
            AUTOSCALER=autoscaler or self.vast.url,
            VAST_API_KEY=self.vast.api_key,
            VAST_ENDPOINT=self.vast.endpoint_name,
        )

    async def kill(self, process):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def run_consumers(self):
        while self.language:
            workers = {
                number: worker for number, worker in self.vast.workers.items() if worker.process
            }
            for number, (consumer, worker) in list(self.consumers.items()):
                if worker.process.returncode is not None:
                    await self.kill(consumer)  # the instance is gone
                    del self.consumers[number]
            for number, worker in workers.items():
                consumer, _ = self.consumers.get(number, (None, None))
                if worker.process.returncode is None and (
                    consumer is None or (self.supervise and consumer.returncode is not None)
                ):
                    command = (
                        ("sh", "consumer.sh")
                        if self.language == "sh"
                        else (sys.executable, "consumer.py")
                    )
                    self.consumers[number] = (
                        await self.start(*command, NULL_CONTROL_PORT=str(worker.control_port)),
                        worker,
                    )
            self.most = max(self.most, self.reserved)
            await asyncio.sleep(0.05)

    async def __aenter__(self):
        for consumer in ("consumer.sh", "consumer.py"):
            (self.folder / consumer).write_text(recipe(consumer, LEASE=4, BEAT=1, LIMIT=self.limit))
        (self.folder / "work").write_text(WORK_SH)
        (self.folder / "work").chmod(0o755)
        (self.folder / "work.py").write_text(WORK_PY)
        await self.stack.__aenter__()
        self.stack.push_async_callback(self.end)
        await self.stack.enter_async_context(self.vast)
        vast, authority = self.vast, self.vast.authority if self.vast.tls else None
        client = (
            "import os, vastai, null_local\n"
            "vastai.Serverless = lambda key, **options: null_local.LocalClient(key, authority="
            f"{authority!r}, webserver_url={vast.url!r}, "
            "autoscaler_url=os.environ['AUTOSCALER'], **options)\n"
        )
        (self.folder / "dispatcher.py").write_text(
            client + recipe("dispatcher.py", BOUND=3, LIFETIME=4)
        )
        await self.start_redis()
        self.queue = redis.asyncio.from_url(self.url, decode_responses=True)
        self.stack.push_async_callback(self.queue.aclose)
        running = asyncio.create_task(self.run_consumers())
        self.stack.push_async_callback(asyncio.wait, {running}, timeout=5)
        self.stack.callback(running.cancel)
        return self

    async def __aexit__(self, *error):
        if error[0]:
            print(self.log[-6000:])
        await self.stack.aclose()

    async def end(self):
        for process in self.processes:
            await self.kill(process)

    async def put(self, *jobs):
        await self.queue.rpush(
            "jobs", *(job if isinstance(job, str) else json.dumps(job) for job in jobs)
        )

    async def put_until_all_work(self, *some):
        """Put these after three that end only once as many workers are reserved."""
        await self.queue.set("apart", 1)
        await self.put(*({"id": n, "task": "together"} for n in range(3)), *some)
        await eventually(lambda: self.most == 3)
        await self.queue.delete("apart")

    async def held_by(self, job_id):
        """The number of the worker whose consumer has this job in hand."""
        async for key in self.queue.scan_iter("working:*"):
            if any(json.loads(job)["id"] == job_id for job in await self.queue.lrange(key, 0, -1)):
                for number, (_, worker) in self.consumers.items():
                    if (await request("GET", f"{worker.control_url}/session"))[2][
                        "session_id"
                    ] == key.split(":")[1]:
                        return number
        return None

    async def started(self):
        return Counter(map(int, await self.queue.lrange("started", 0, -1)))

    async def settled(self, results, failed=()):
        """Wait until all is done: in Redis is only what is to be there, and no worker is left."""

        await eventually(lambda: self.has(results), timeout=40)
        await eventually(lambda: not self.vast.workers)
        assert sorted(await self.queue.lrange("failed", 0, -1)) == sorted(failed)
        await eventually(self.no_other_keys)
        expected = {str(n): f"did {n}" for n in range(results)}
        assert await self.queue.hgetall("results") == expected

    async def has(self, results):
        return await self.queue.hlen("results") == results

    async def no_lease(self):
        return not await self.queue.keys("lease:*")

    @property
    def reserved(self):
        return sum(bool(worker.report.get("cur_load")) for worker in self.vast.workers.values())

    @property
    def log(self):
        return (self.folder / "log").read_text()

    async def work_is_gone(self):
        return not Path(f"/proc/{await self.queue.get('pid')}").exists()

    async def no_other_keys(self):
        return {*await self.queue.keys("*")} <= {"results", "started", "failed", "pid"}


async def answers_ping(port):
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PING\r\n")
        try:
            return await asyncio.wait_for(reader.readline(), 1) == b"+PONG\r\n"
        finally:
            writer.close()


JOBS = 30


ONE_OR_BOTH = ["sh", "py"] if os.environ.get("BOTH_LANGUAGES") else []


def jobs(**special):
    return [{"id": n, "task": special.get(f"job_{n}", "any")} for n in range(JOBS)]


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_thirty_jobs_are_done_once_by_workers_that_come_and_go(tmp_path, language):
    async with Farm(tmp_path, language, tls=True, idle=3) as farm:
        await farm.start_dispatcher()
        await farm.put_until_all_work(*jobs(job_3="long")[3:])
        await eventually(lambda: farm.has(results=JOBS))
        # Released, where an expiry takes longer.
        await eventually(lambda: not farm.reserved, timeout=4)
        await farm.settled(JOBS)
        assert await farm.started() == dict.fromkeys(range(JOBS), 1)
        assert farm.most == 3 and farm.vast.started == 3
        assert farm.dispatcher.returncode is None and "Traceback" not in farm.log


@recipes
@pytest.mark.parametrize("language", ONE_OR_BOTH or ["py"])
async def test_a_dispatcher_that_is_killed_and_started_again_changes_nothing(tmp_path, language):
    async with Farm(tmp_path, language) as farm:
        await farm.start_dispatcher()
        await farm.put_until_all_work(*jobs()[3:])
        await farm.kill(farm.dispatcher)
        await farm.put(*({"id": JOBS + n, "task": "any"} for n in range(10)))
        bad = [{"error_msg": "not now"}] * 3  # Vast's list may be empty at first

        async def forward(asked):
            if asked.path == "/get_endpoint_workers/" and bad:
                return web.json_response(bad.pop())
            status, _, answer = await request(
                "POST", farm.vast.url + asked.path, json=await asked.json()
            )
            return web.json_response(answer, status=status)

        async with server(web.post("/{path:.*}", forward)) as autoscaler:
            await farm.start_dispatcher(autoscaler)
            await farm.settled(JOBS + 10)
        assert await farm.started() == dict.fromkeys(range(JOBS + 10), 1)
        # It asked for none that was reserved already.
        assert not bad and farm.vast.last_request == 3


@recipes
async def test_the_dispatcher_takes_back_what_it_asks_for_and_never_what_works(tmp_path):
    async with Farm(tmp_path, "py", max_workers=1) as farm:
        await farm.start_dispatcher()
        await farm.put(*({"id": n, "task": "any"} for n in range(4)), {"id": 4, "task": "some"})
        await eventually(lambda: farm.has(results=5))
        assert farm.vast.last_request == 3  # the others' places go unpolled
        await farm.settled(5)
        assert await farm.started() == dict.fromkeys(range(5), 1)
        assert len(farm.vast.ended) == 1


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_a_consumer_pulls_only_while_it_is_reserved(tmp_path, language):
    async with Farm(tmp_path, language, max_workers=1, idle=60) as farm:
        worker = await fresh(farm.vast)
        await farm.put(*({"id": n, "task": "some"} for n in range(3)))
        first = await create(farm.vast, worker)
        await eventually(farm.started)
        assert (await release(worker))[1]["released"]
        stale = await request("POST", f"{worker.control_url}/renew?session_id={first}")
        assert stale[2] == {"renewed": False, "reason": "session ID is not active"}
        await eventually(lambda: farm.has(results=1))
        await eventually(farm.no_lease)  # it knows
        assert await farm.started() == {0: 1} and await farm.queue.llen("jobs") == 2
        await create(farm.vast, worker)
        await eventually(lambda: farm.has(results=3))
        await eventually(farm.no_lease)
        assert (await release(worker))[1] == {"released": False, "reason": "no active session"}


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_a_consumer_that_loses_redis_releases(tmp_path, language):
    async with Farm(tmp_path, language, max_workers=1, idle=60) as farm:
        worker = await fresh(farm.vast)
        await farm.put({"id": 0, "task": "some"})
        await create(farm.vast, worker)
        await eventually(farm.started)
        await farm.kill(farm.redis)
        await eventually(lambda: is_free(worker), timeout=20)


@recipes
@pytest.mark.parametrize("language", ONE_OR_BOTH or ["py"])
async def test_the_job_of_a_worker_that_is_killed_runs_again(tmp_path, language):
    async with Farm(tmp_path, language) as farm:
        await farm.start_dispatcher()
        await farm.put(*jobs(job_7="first"))
        number = await eventually(lambda: farm.held_by(7))
        await eventually(lambda: farm.queue.get("pid"))
        await farm.kill(farm.vast.workers[number].process)
        await farm.settled(JOBS)
        assert await farm.started() == {**dict.fromkeys(range(JOBS), 1), 7: 2}


@recipes
@pytest.mark.parametrize(
    ("language", "back"),
    [
        ("sh", "at once"),
        ("py", "later"),
        *((other, back) for other, back in zip(ONE_OR_BOTH, ["later", "at once"], strict=False)),
    ],
)
async def test_the_job_of_a_consumer_that_is_killed_runs_again(tmp_path, language, back):
    async with Farm(tmp_path, language) as farm:
        await farm.start_dispatcher()
        await farm.put(*jobs(job_7="first"))
        number = await eventually(lambda: farm.held_by(7))
        await eventually(lambda: farm.queue.get("pid"))
        consumer, worker = farm.consumers[number]
        farm.supervise = back == "at once"
        await farm.kill(consumer)
        if language == "sh":
            await eventually(farm.work_is_gone)
        if back == "later":
            await eventually(lambda: is_free(worker), timeout=15)  # nobody renews it any more
            farm.supervise = True
        await farm.settled(JOBS)
        # It finds what its predecessor had in hand by itself.
        assert ("put back" in farm.log) == (back == "later")
        assert await farm.started() == {**dict.fromkeys(range(JOBS), 1), 7: 2}


@recipes
@pytest.mark.parametrize("consumed", [True, False])
async def test_a_job_that_needs_a_reservation_of_its_own_gets_it_or_is_taken_back(
    tmp_path, consumed
):
    async with Farm(tmp_path, max_workers=1) as farm:
        names = {"json": json, "reserve": reserve}
        exec(recipe("own_worker.py"), names)
        job = {"id": 0, "task": "any"}
        async with farm.vast.client() as client:
            endpoint = await client.get_endpoint(farm.vast.endpoint_name)
            running = asyncio.create_task(names["run_alone"](job, endpoint, farm.queue))
            own = await eventually(lambda: farm.queue.keys("jobs:*"))
            (worker,) = farm.vast.workers.values()
            assert own == [f"jobs:127.0.0.1:{worker.port}"]
            if consumed:
                port = {
                    "WORKER_PORT": str(worker.port),
                    f"VAST_TCP_PORT_{worker.port}": str(worker.port),
                }
                control = {
                    "NULL_CONTROL_PORT": str(worker.control_port),
                    "PUBLIC_IPADDR": "127.0.0.1",
                }
                await farm.start("sh", "-c", recipe("own_consumer.sh"), **port, **control)
            else:
                assert (await request("POST", f"{worker.control_url}/release"))[0] == 200
            assert await asyncio.wait_for(running, 20) == ("did 0" if consumed else None)
        assert not await farm.queue.keys("jobs*")


@recipes
@pytest.mark.parametrize("language", ["sh", "py"])
async def test_a_job_that_keeps_failing_goes_aside_and_so_does_one_that_hangs(tmp_path, language):
    async with Farm(tmp_path, language, limit=2, max_workers=1) as farm:
        await farm.start_dispatcher()
        fails, hangs = {"id": 1, "task": "fail"}, {"id": 2, "task": "hang"}
        await farm.put(fails, "no JSON", hangs, {"id": 0, "task": 'it\'s \\ "5" % $HOME\n'})
        await farm.settled(1, failed=[json.dumps(fails), "no JSON", json.dumps(hangs)])
        started = await farm.started()
        assert (started[0], started[1], started[2]) == (1, 3, 3)


class Crooked:
    """A router in front of LocalVast's.

    After the first answer it misbehaves, then passes everything through.
    """

    def __init__(self, vast):
        self.vast, self.places = vast, []
        self.answers = [
            web.Response(text="<html>please log in</html>", content_type="text/html"),
            web.Response(status=502, text="bad gateway"),
            web.json_response({"endpoint": "local", "status": "loading"}),
            web.json_response({"error_msg": "try again"}),
            web.json_response(["?"]),
            web.json_response({"request_idx": 0}),
            web.json_response({"request_idx": "x", "url": None}),
            web.Response(status=500, text='{"request_idx": 77, "url": "http://127.0.0.1:1"}'),
        ]

    async def route(self, asked):
        query = await asked.json()
        self.places.append(query["request_idx"])
        if len(self.places) > 1 and self.answers:
            return self.answers.pop(0)
        status, _, answer = await request("POST", f"{self.vast.url}/route/", json=query)
        return web.json_response(answer, status=status)


@recipes
async def test_the_raw_http_recipe_keeps_its_place_whatever_it_is_answered(tmp_path):
    async with LocalVast(max_workers=1, inactivity_timeout=30, control_port=None, tls=True) as vast:
        crooked = Crooked(vast)
        async with server(web.post("/route/", crooked.route)) as url:
            environment = {
                "AUTOSCALER": url,
                "VAST_ENDPOINT": vast.endpoint_name,
                "ENDPOINT_KEY": vast.endpoint_key,
            }
            script = (
                recipe("raw.sh")
                .replace("|| sleep 4", "|| sleep 0.2")
                .replace("sleep 1\n", "sleep 0.2\n")
                .replace(": 20'", ": 1'")
            )
            log = (tmp_path / "log").open("ab")
            process = await asyncio.create_subprocess_exec(
                "sh",
                "-euc",
                script,
                env=BARE | environment | {"VAST_CA": vast.authority},
                stdout=subprocess.PIPE,
                stderr=log,
            )
            try:
                worker = await eventually(
                    lambda: next((w for w in vast.workers.values() if w.state == "IDLE"), None)
                )
                # Another one's, whom the router doesn't know of: 429 for the first creates.
                async with aiohttp.ClientSession() as http, vast.client() as client:
                    tls = await client.get_ssl_context()
                    body = {"auth_data": vast.auth_data(worker), "payload": {"lifetime": 60}}
                    async with http.post(
                        f"{worker.url}/session/create", json=body, ssl=tls
                    ) as answer:
                        assert answer.status == 201
                    vast.overbooked = True
                    routed = worker.routed
                    await until(worker, lambda: worker.routed >= routed + 2)
                    vast.overbooked = False
                    assert (await request("POST", f"{worker.control_url}/release"))[0] == 200
                output, _ = await asyncio.wait_for(process.communicate(), 30)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                log.close()
        errors = (tmp_path / "log").read_text()
        assert process.returncode == 0, errors
        decoder, text, answers = json.JSONDecoder(), output.decode(), []
        while text:
            answer, end = decoder.raw_decode(text)
            answers.append(answer)
            text = text[end:].lstrip()
        ping, look, end = answers
        assert ping == {"result": {}} and look["lifetime"] == 120 and end["ended"] is True
        assert not crooked.answers and "502" in errors and "429" in errors
        first, *later = crooked.places
        assert first == 0 and set(later) == {1}  # one request to the router, which kept its place
        await eventually(
            lambda: [e["status"] for e in vast.ended if e["request_idx"] == 1][-1:] == ["Success"]
        )
