"""Why no worker comes: `python null_client.py --endpoint NAME --diagnose`.

Asks Vast once, by the SDK, and says what is wrong and what to do about it. It changes nothing, and
makes no request for a worker.

The facts that the checks go by are from Vast's documentation and from what its users measured; the
latter say so.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.metadata
import json
import os
import re
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from null_backlog import one_line, worker_word

if TYPE_CHECKING:
    from vastai import Serverless, VastAI  # type: ignore[import-untyped]

__all__ = ["Facts", "Finding", "diagnose", "findings_of", "show"]

ANSWER_TIMEOUT = 15.0  # seconds without a byte of an answer
QUESTION_TIMEOUT = 40.0  # seconds for one question with its repetitions
RATE_PAUSE = 4.0  # seconds; Vast answers the same question once in 3 seconds at most
PORT_TIMEOUT = 5.0  # seconds for a connection to a worker's port
MOST_PORTS = 20  # workers whose ports are tried
MOST_OFFERS = 100  # that are counted
MOST_CONDITIONS = 12  # of a search, each of which is left out once
LOG_LINES = 200

CREDIT_PER_ENDPOINT = 5.0  # dollars; users report that Vast makes no endpoint where there is less
FULL_QUEUE_TIME = 1.0  # seconds of queue that a reserved worker shows: its load by its performance
LONG_LOADING = 900.0  # seconds; users saw that Vast gives up loading after 791 to 1,012
WORKER_PORT = "3000"  # the default of Vast's image
MOVING_TAGS = ("", "latest", "main", "master", "nightly", "stable", "edge")

JSON = dict[str, Any]  # an object of it
UNKNOWN_FORM = (AttributeError, KeyError, TypeError, ValueError)  # raised by an odd answer
Query = JSON | str  # a search for offers: {"gpu_name": {"eq": "RTX 4090"}}, or as a person types it


class Finding(NamedTuple):
    """One thing that was seen."""

    what: str  # it, in a line
    do: tuple[str, ...] = ()  # what to do, as commands to paste
    wrong: bool = True


class Port(NamedTuple):
    """A worker's port, tried from here."""

    address: str
    trouble: str = ""  # why there was no connection


class Facts(NamedTuple):
    """What Vast has answered. None: it wasn't asked, or `unasked` says why there is no answer."""

    name: str  # the endpoint's
    now: float  # by time.time()
    refused: str = ""  # what Vast said to the key
    away: str = ""  # why Vast said nothing at all
    unasked: tuple[str, ...] = ()
    user: JSON | None = None
    endpoints: Sequence[JSON] | None = None
    groups: Sequence[JSON] | None = None  # the workergroups of the endpoint
    template: JSON | None = None  # of the first workergroup
    workers: Sequence[JSON] | None = None
    log: str = ""  # the endpoint's
    instances: Mapping[int, JSON] = {}  # those of the workers, by id
    ports: Mapping[int, Port] = {}  # by instance
    offers: int | None = None  # how many match the workergroup's search
    offers_without: Mapping[str, int] = {}  # how many would, without one of its conditions

    @property
    def endpoint(self) -> JSON | None:
        """Return the endpoint that this is about."""
        named = [each for each in self.endpoints or () if each.get("endpoint_name") == self.name]
        return named[0] if named else None

    @property
    def group(self) -> JSON:
        """Return its first workergroup, or nothing."""
        return self.groups[0] if self.groups else {}


def findings_of(facts: Facts) -> list[Finding]:
    """Return what the facts say, in the order in which it is best looked at."""
    checks = [check_key, check_endpoint, check_parameters, check_groups, check_template]
    checks += [check_workers, check_ports, check_room, check_cost, check_offers]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(facts)
        except UNKNOWN_FORM as error:
            subject = check.__name__.removeprefix("check_")
            what = f"could not judge Vast's answer about the {subject}: {error!r}"
            findings.append(Finding(what, wrong=False))
    asked_in_vain = [Finding(f"could not ask for {why}", wrong=False) for why in facts.unasked]
    return [*findings, *asked_in_vain]


def vastai(*words: object) -> str:
    """Return a line for Vast's own command."""
    return shlex.join(["vastai", *map(str, words)])


# The account


def check_key(facts: Facts) -> Iterator[Finding]:
    """See whether Vast answers, takes the key, and the account has credit."""
    if facts.refused:
        what = f"Vast refuses the API key ($VAST_API_KEY, or the saved one): {facts.refused}"
        yield Finding(what, (vastai("set", "api-key", "KEY"),))
    if facts.away:
        yield Finding(f"Vast doesn't answer: {facts.away}", (vastai("show", "endpoints"),))
    credit = credit_of(facts.user or {})
    needed = CREDIT_PER_ENDPOINT * len(facts.endpoints or [facts.name])
    if credit is not None and credit < needed:
        what = (
            f"the account has ${credit:.2f}, and users report that Vast wants $5 for each endpoint "
            f"(${needed:.0f} here): add credit at https://cloud.vast.ai/billing/"
        )
        yield Finding(what, (vastai("show", "user"),))


def credit_of(user: JSON) -> float | None:
    """Return the dollars of an account, where its key may see them."""
    for name in ("credit", "balance"):
        if isinstance(user.get(name), (int, float)):
            return float(user[name])
    return None


# The endpoint


def check_endpoint(facts: Facts) -> Iterator[Finding]:
    """See whether there is an endpoint of that name, and it is switched on."""
    if facts.endpoints is None:
        return
    endpoint = facts.endpoint
    if endpoint is None:
        known = ", ".join(str(each.get("endpoint_name")) for each in facts.endpoints)
        create = vastai(
            *("create", "endpoint", "--endpoint_name", facts.name, "--target_util", 1.0),
            *("--min_load", 0, "--max_queue_time", 1, "--target_queue_time", 0.5),
            *("--inactivity_timeout", 10, "--max_workers", 1, "--cold_workers", 0),
        )
        yield Finding(
            f"there is no endpoint {facts.name!r}; there are: {known or 'none'}", (create,)
        )
        return
    state = endpoint.get("endpoint_state") or "active"
    if state != "active":
        activate = vastai("update", "endpoint", endpoint["id"], "--endpoint_state", "active")
        yield Finding(f"endpoint {facts.name} is {state}", (activate,))


def check_parameters(facts: Facts) -> Iterator[Finding]:
    """See whether the endpoint scales by reservations.

    A reserved worker shows a queue of FULL_QUEUE_TIME. Where more is allowed it gets the next
    reservation too, answers 429, and no worker is started.
    """
    endpoint = facts.endpoint
    if endpoint is None:
        return
    for name, most, good, default in (
        ("max_queue_time", FULL_QUEUE_TIME, "1", "30 s"),
        ("target_queue_time", FULL_QUEUE_TIME / 2, "0.5", "10 s"),
    ):
        value = endpoint.get(name, good)  # not in the answer: not known
        if value is None or float(value) > most:
            shown = f"Vast's default of {default}" if value is None else f"{value:g} s"
            what = f"{name} is {shown}: an occupied worker looks free, and none is started"
            yield Finding(what, (update_endpoint(endpoint, name, good),))
    target = endpoint.get("target_util")
    if target is not None and float(target) < 1:
        what = f"target_util is {target:g}: Vast keeps spare capacity, rounded up to a whole worker"
        yield Finding(what, (update_endpoint(endpoint, "target_util", "1.0"),))
    cold, most_workers = endpoint.get("cold_workers"), endpoint.get("max_workers")
    if cold is not None and most_workers is not None and cold >= most_workers:
        what = f"cold_workers {cold} is not below max_workers {most_workers}"
        why = "users saw one worker made and destroyed every 5 s"
        fix = update_endpoint(endpoint, "cold_workers", max(0, most_workers - 1))
        yield Finding(f"{what}: {why}", (fix,))


def update_endpoint(endpoint: JSON, name: str, value: object) -> str:
    """Return the command that changes one parameter and leaves the others."""
    return vastai("update", "endpoint", endpoint["id"], f"--{name}", value)


# The workergroup and its template


def check_groups(facts: Facts) -> Iterator[Finding]:
    """See whether one workergroup says which workers the endpoint gets."""
    endpoint = facts.endpoint
    if endpoint is None or facts.groups is None:
        return
    if not facts.groups:
        create = vastai("create", "workergroup", "--endpoint_name", facts.name, "--template_hash")
        do = f'{create} "${{HASH:?}}" --search_params "${{SEARCH:?}}"'
        what = (
            "the endpoint has no workergroup, so no worker can be started; HASH is its template's, "
            "SEARCH says which offers will do"
        )
        yield Finding(what, (do,))
    elif len(facts.groups) > 1:
        ids = ", ".join(str(group.get("id")) for group in facts.groups)
        what = (
            f"the endpoint has {len(facts.groups)} workergroups ({ids}), and a request names none"
        )
        do = vastai("show", "workergroups")
        yield Finding(
            f"{what}: delete those for other queues", (f"{do}  # vastai delete workergroup ID",)
        )


def check_template(facts: Facts) -> Iterator[Finding]:
    """See whether the instances that the template makes run the worker."""
    template = facts.template
    if template is None:
        return
    findings = [*check_start(template), *check_switches(template), *check_versions(template)]
    yield from findings
    if findings:
        look = vastai("search", "templates", f"hash_id={template.get('hash_id')}", "--raw")
        tell = update_group(facts.group, query_text(search_of(facts.group)), "NEW")
        what = (
            "before you change the template: set the shell's ENV and ONSTART to what it has now as "
            "'env' and 'onstart'. Afterwards it has a NEW hash: tell the workergroup"
        )
        yield Finding(what, (look, tell), wrong=False)


def update_group(group: JSON, search: str, template: str = "") -> str:
    """Return the command that gives a workergroup another search or template.

    Users report that Vast merges a search into the one before: -n and all conditions replace it.
    """
    changed = ["--template_hash", template] if template else []
    return vastai(
        *("update", "workergroup", group.get("id"), "--endpoint_id", group.get("endpoint_id")),
        *(*changed, "-n", "--search_params", search),
    )


def starts_itself(template: JSON) -> bool:
    """Return whether the on-start script starts the worker, in the place of Vast's image."""
    onstart = onstart_of(template)
    return "start_server.sh" in onstart or "null_worker.py" in onstart


def onstart_of(template: JSON) -> str:
    return str(template.get("onstart") or "")


def check_start(template: JSON) -> Iterator[Finding]:
    """See what a template lacks.

    By `entrypoint.sh` Vast's image runs what SERVERLESS switches on.
    """
    onstart = onstart_of(template)
    runtype = str(template.get("runtype") or "")
    needs_entrypoint = re.search("ssh|jupyter", runtype) and not starts_itself(template)
    if needs_entrypoint and "entrypoint.sh" not in onstart:
        what = f"launch mode {runtype!r} replaces the image's entry point, so no worker is started"
        yield Finding(what, (new_version(template, onstart="entrypoint.sh"),))
    if "null_worker.py" in onstart:
        return
    variables = variables_of(template)
    missing = []
    if variables.get("SERVERLESS", "").lower() != "true" and not starts_itself(template):
        missing.append("SERVERLESS=true")
    if variables.get("BACKEND") != "null":
        missing.append("BACKEND=null")
    if not variables.get("PYWORKER_REPO"):
        missing.append("PYWORKER_REPO=https://github.com/YOU/YOUR_FORK")
    if missing:
        names = ", ".join(each.partition("=")[0] for each in missing)
        what = f"no null worker is started by the template's {names}"
        yield Finding(what, (new_version(template, variables=missing),))


def check_switches(template: JSON) -> Iterator[Finding]:
    """See what keeps Vast's image from starting a worker though SERVERLESS is set."""
    if starts_itself(template):
        return
    if "pyworker" in onstart_of(template):
        what = "the on-start script has the word 'pyworker', so the image starts no worker itself"
        yield Finding(what, (new_version(template, onstart="entrypoint.sh", instead=True),))
    if variables_of(template).get("SUPERVISOR_SKIP_PYWORKER", "").lower() == "true":
        what = "SUPERVISOR_SKIP_PYWORKER=true: the image starts no worker"
        switch = ["SUPERVISOR_SKIP_PYWORKER=false"]
        yield Finding(what, (new_version(template, variables=switch),))


def check_versions(template: JSON) -> Iterator[Finding]:
    """See what may be another version tomorrow."""
    tag = str(template.get("tag") or "")
    if tag in MOVING_TAGS or tag.startswith("@"):
        what = f"the image's tag {tag!r} moves: a new image may break workers that ran"
        yield Finding(what, (new_version(template, tag="TAG"),))
    if "SDK_VERSION" not in variables_of(template):
        pinned = [f"SDK_VERSION={importlib.metadata.version('vastai-sdk')}"]
        what = "SDK_VERSION isn't set: each new worker installs the latest vastai-sdk"
        yield Finding(what, (new_version(template, variables=pinned),))


def variables_of(template: JSON) -> dict[str, str]:
    """Return the environment that a template sets, by its Docker options."""
    options = str(template.get("env") or "")
    try:
        words = shlex.split(options)
    except ValueError:  # a quote without its other one
        words = options.split()
    pairs = [word for flag, word in zip(words, words[1:], strict=False) if flag in ("-e", "--env")]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def new_version(
    template: JSON,
    *,
    tag: str = "",
    onstart: str = "",
    instead: bool = False,
    variables: Iterable[str] = (),
) -> str:
    """Return the command that changes a template. It wants the fields that stay, too.

    `onstart` is added to the script, or is there instead. There may be credentials in what the
    template has: the command reads it from the shell, which stops where it isn't set.
    """
    runtype = str(template.get("runtype") or "")
    fields: list[object] = ["--name", template.get("name"), "--image", template.get("image")]
    fields += ["--image_tag", tag or template.get("tag")]
    fields += ["--disk_space", template.get("recommended_disk_space") or 40]
    fields += [f"--{mode}" for mode in ("ssh", "jupyter") if runtype.startswith(mode)]
    if template.get("ssh_direct") or template.get("jup_direct"):
        fields.append("--direct")
    filters = template.get("extra_filters")
    if filters:
        fields += ["-n", "--search_params", query_text(filters)]
    line = vastai("update", "template", template.get("hash_id"), *fields)
    kept = "" if instead or onstart_of(template) in ("", onstart) else "${ONSTART:?}"
    script = "; ".join(filter(None, [kept, onstart]))
    options = " ".join(["${ENV:?}", *(f"-e {each}" for each in variables)])
    return f'{line} --onstart-cmd "{script}" --env "{options}"'


# Searches for offers

OPERATORS = {"eq": "=", "neq": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
LISTS = {"in": "in", "notin": "notin"}
UNITS = {"cpu_ram": 1000, "gpu_ram": 1000, "gpu_total_ram": 1000, "duration": 86400}


def search_of(group: JSON) -> Query:
    """Return the search of a workergroup, under either name that Vast has for it."""
    query = group.get("search_query") or group.get("search_params") or {}
    return query if isinstance(query, dict) else str(query)


def conditions_of(query: Query) -> list[str]:
    """Return each condition of a search as a person types it: `dph_total<0.6`."""
    if isinstance(query, str):
        return re.findall(
            r"\w+ *(?:[<>=!]+| (?:not )?in |notin ) *(?:\[[^]]*\]|\"[^\"]*\"|\S+)", query
        )
    conditions = []
    for field, bounds in query.items():
        if not isinstance(bounds, dict):
            continue  # `order`, `type` and the like
        for operator, value in bounds.items():
            if operator in OPERATORS:
                conditions.append(f"{field}{OPERATORS[operator]}{typed(field, value)}")
            elif operator in LISTS:
                values = ",".join(typed(field, each) for each in value)
                conditions.append(f"{field} {LISTS[operator]} [{values}]")
    return conditions


def typed(field: str, value: object) -> str:
    """Return a value of a condition as a person types it, in the units of the command."""
    if field in UNITS and not isinstance(value, bool):
        return f"{float(str(value)) / UNITS[field]:g}"
    return str(value).replace(" ", "_")


def query_text(query: Query) -> str:
    """Return a search as a person types it."""
    return query if isinstance(query, str) else " ".join(conditions_of(query))


def without_machines(query: Query, machines: Iterable[object]) -> str:
    """Return a search that leaves out some more machines."""
    kept = []
    out = [str(machine) for machine in machines]
    for condition in conditions_of(query):
        listed = re.fullmatch(r"machine_id (?:not ?in|nin) *\[([^]]*)\]", condition)
        if listed:
            out += [each.strip() for each in listed[1].split(",")]
        else:
            kept.append(condition)
    return " ".join([*kept, f"machine_id notin [{','.join(sorted(set(out)))}]"])


# The workers


def word_of(worker: JSON) -> str:
    """Return what a worker of Vast's list does, in a word."""
    return worker_word(str(worker.get("status") or "unknown"), float(worker.get("cur_load") or 0))


def age_of(worker: JSON, now: float) -> float | None:
    """Return for how many seconds a worker has done what it does, where that is known."""
    since = worker.get("loaded_at" if word_of(worker) in ("free", "reserved") else "started_at")
    return max(0.0, now - float(since)) if since else None


def minutes(seconds: float) -> str:
    """Return a time for a person."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def check_workers(facts: Facts) -> Iterator[Finding]:
    """See what the workers do, and which of them will come to nothing."""
    if facts.workers is None:
        return
    ages: dict[str, list[float]] = {}
    for worker in facts.workers:
        age = age_of(worker, facts.now)
        ages.setdefault(word_of(worker), []).extend([] if age is None else [age])
    counts = Counter(map(word_of, facts.workers))
    parts = []
    for word, number in sorted(counts.items()):
        longest = f" (for {minutes(max(ages[word]))} at most)" if ages[word] else ""
        parts.append(f"{number} {word}{longest}")
    yield Finding(f"workers: {', '.join(parts) or 'none'}", wrong=False)
    for worker in facts.workers:
        yield from check_worker(facts, worker)


def check_worker(facts: Facts, worker: JSON) -> Iterator[Finding]:
    """See whether a worker is broken, loads for long, or can't start again."""
    number = int(worker["id"])
    word = word_of(worker)
    log = (vastai("logs", number, "--tail", 200),)
    if word == "broken":
        said = last_line(facts.log, number)
        what = f"worker {number} is in error: {said or 'the log of the endpoint says nothing'}"
        if "provisioning" in said.lower():
            what = f"the provisioning script failed on worker {number}: {said}"
        yield Finding(what, log)
    age = age_of(worker, facts.now)
    if word == "loading" and age is not None and age > LONG_LOADING:
        what = f"worker {number} has been loading for {minutes(age)}"
        yield Finding(f"{what}: users report that Vast gives up after 13 to 17 min", log)
    instance = facts.instances.get(number, {})
    actual = instance.get("actual_status")
    if word == "stopped" and instance.get("intended_status") == "running" and actual != "running":
        what = f"worker {number} is to start, and its instance is {actual or 'not there'!s}"
        why = "users report that another tenant may have its GPU"
        yield Finding(f"{what}: {why}", (destroy(number),))


def destroy(instance: int) -> str:
    """Return the command that gives an instance back. Without -y it waits for a person."""
    return vastai("destroy", "instance", instance, "-y")


def last_line(log: str, worker: int) -> str:
    """Return the last line that names a worker, or the last one."""
    lines = [line for line in log.splitlines() if line.strip()]
    naming = [line for line in lines if re.search(rf"\b{worker}\b", line)]
    return (naming or lines or [""])[-1]


def check_ports(facts: Facts) -> Iterator[Finding]:
    """See whether the workers that Vast routes to can be reached.

    A host that keeps its ports closed stays `idle`. Users saw the router count requests that never
    arrived there as its load, for over an hour.
    """
    machines = []
    for worker in facts.workers or ():
        number = int(worker["id"])
        port = facts.ports.get(number)
        if port is None or not port.trouble:
            continue
        what = f"worker {number} is ready, and its port {port.address} can't be reached from here"
        if word_of(worker) == "reserved":
            what += f"; nobody holds the load of {worker['cur_load']:g} that Vast lists for it"
        yield Finding(f"{what}: {port.trouble}", (destroy(number),))
        machines.append(facts.instances.get(number, {}).get("machine_id"))
    machines = [machine for machine in machines if machine is not None]
    if machines and facts.group:
        search = without_machines(search_of(facts.group), machines)
        leave_out = update_group(facts.group, search)
        what = f"Vast may rent the same machine again: {', '.join(map(str, machines))}"
        yield Finding(what, (leave_out,))


def check_room(facts: Facts) -> Iterator[Finding]:
    """See whether stopped workers use up max_workers: they count, and may never start again."""
    endpoint = facts.endpoint
    most = endpoint.get("max_workers") if endpoint else None
    if endpoint is None or most is None or facts.workers is None:
        return
    stopped = [int(each["id"]) for each in facts.workers if word_of(each) == "stopped"]
    if stopped and len(facts.workers) >= most:
        what = f"max_workers {most} is used up, and {len(stopped)} of them are stopped"
        more = update_endpoint(endpoint, "max_workers", most + len(stopped))
        yield Finding(what, (more, *map(destroy, stopped)))


def check_cost(facts: Facts) -> Iterator[Finding]:
    """See what the workers cost now."""
    running = [each for each in facts.instances.values() if each.get("actual_status") == "running"]
    if facts.instances:
        cost = sum(float(each.get("dph_total") or 0) for each in running)
        what = f"instances: {len(running)} running, which cost ${cost:.2f} an hour now"
        others = len(facts.instances) - len(running)
        if others:
            what += f"; {others} not running, whose disks are billed"
        yield Finding(what, wrong=False)


def check_offers(facts: Facts) -> Iterator[Finding]:
    """See whether there is anything to rent."""
    if facts.offers is None:
        return
    if facts.offers:
        some = f"{MOST_OFFERS} or more" if facts.offers >= MOST_OFFERS else str(facts.offers)
        yield Finding(f"offers that match the workergroup's search: {some}", wrong=False)
        return
    query = search_of(facts.group)
    what = "no offer matches the workergroup's search"
    condition, left = max(facts.offers_without.items(), key=lambda each: each[1], default=("", 0))
    if left:
        what += f"; without {condition} there are {left}"
        look = " ".join(each for each in conditions_of(query) if each != condition)
    else:
        what += ", and no condition of it alone is why"
        look = query_text(query)
    yield Finding(what, (vastai("search", "offers", "-n", look),))


# Asking


class NoAnswer(Exception):
    """Vast hasn't answered a question. Its text says why."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status  # of HTTP; 0: none came


async def in_a_thread(call: Callable[[], Any], seconds: float) -> Any:
    """Return the result of a call that blocks.

    Raises what the call raises, or NoAnswer when its time is up.

    The thread is a daemon, unlike asyncio's own: one that hangs doesn't keep the process alive.
    """
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
    answer.set_running_or_notify_cancel()  # from now on nobody but the thread settles it

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001  whoever waits gets it
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    waiting = asyncio.wrap_future(answer)
    await asyncio.wait({waiting}, timeout=seconds)
    if not waiting.done():
        waiting.cancel()
        raise NoAnswer(f"no answer within {seconds:g} s")
    return waiting.result()


def reason_of(error: Exception) -> NoAnswer:
    """Return what went wrong with a question."""
    if isinstance(error, NoAnswer):
        return error
    response = getattr(error, "response", None)
    if response is None:
        brief = re.search(r"\[Errno -?\d+\] [\w ]+", str(error))  # inside what requests adds
        return NoAnswer(brief[0] if brief else str(error) or repr(error))
    try:
        fields = json.loads(response.text)
        said = fields.get("msg") or fields.get("error") or fields.get("detail") or ""
    except (ValueError, AttributeError):
        said = response.text
    hint = "; the key may lack the permission" if response.status_code in (401, 403) else ""
    return NoAnswer(f"HTTP {response.status_code} - {said}{hint}", response.status_code)


def checked(answer: Any, kind: type) -> Any:
    """Return an answer of the kind that is expected.

    Raises NoAnswer for any other, and for an error that came with status 200.
    """
    if isinstance(answer, dict):
        said = answer.get("error_msg") or answer.get("error")
        if said:
            raise NoAnswer(str(said))
        answer = answer.get("workers", answer) if kind is list else answer
    if not isinstance(answer, kind):
        raise NoAnswer(f"an answer of an unknown form: {answer}")
    return answer


class Asked:
    """What Vast answers, question by question."""

    def __init__(self, client: Serverless) -> None:
        from vastai import VastAI

        self.unasked: list[str] = []
        self.secrets: set[str] = {client.api_key}  # that no text may show
        # Two, since the SDK's own knows of the autoscaler of `prod` alone.
        self._web = VastAI(client.api_key, client.vast_web_url, retry=2)
        self._autoscaler = VastAI(client.api_key, client.autoscaler_url, retry=2)
        for asker in (self._web, self._autoscaler):
            asker.client.timeout = ANSWER_TIMEOUT

    async def ask(self, asker: VastAI, method: str, *args: Any, **options: Any) -> Any:
        """Ask one question. Raises NoAnswer."""
        call = getattr(asker, method, None)
        if call is None:
            version = importlib.metadata.version("vastai-sdk")
            raise NoAnswer(f"vastai-sdk {version} can't: it has no {method}()")
        answering = partial(in_a_thread, partial(call, *args, **options), QUESTION_TIMEOUT)
        try:
            return await answering()
        except Exception as error:
            reason = reason_of(error)
            if reason.status != 429 or "quota" in str(reason):
                raise reason from error
        await asyncio.sleep(RATE_PAUSE)
        try:
            return await answering()
        except Exception as error:
            raise reason_of(error) from error

    async def web(self, what: str, kind: type, method: str, *args: Any, **options: Any) -> Any:
        """Ask the web API. None: it didn't answer."""
        return await self._or_none(what, kind, self.ask(self._web, method, *args, **options))

    async def autoscaler(self, what: str, kind: type, method: str, *args: Any) -> Any:
        """Ask the autoscaler. None: it didn't answer."""
        return await self._or_none(what, kind, self.ask(self._autoscaler, method, *args))

    async def _or_none(self, what: str, kind: type, asking: Any) -> Any:
        try:
            answer = checked(await asking, kind)
        except NoAnswer as error:
            self.unasked.append(f"{what}: {error}")
            return None
        self._note_secrets(answer)
        return answer

    async def endpoints(self) -> list[JSON]:
        """Ask for all endpoints of the account. Raises NoAnswer."""
        answer: list[JSON] = checked(await self.ask(self._web, "show_endpoints"), list)
        self._note_secrets(answer)
        return answer

    def _note_secrets(self, answer: Any) -> None:
        for each in answer if isinstance(answer, list) else [answer]:
            if isinstance(each, dict) and isinstance(each.get("api_key"), str):
                self.secrets.add(each["api_key"])


async def diagnose(client: Serverless, name: str) -> list[Finding]:
    """Ask Vast about the endpoint of that name, and return what was found. Change nothing.

    `client` is the SDK's. It needs not be open.
    """
    asked = Asked(client)
    facts = await facts_of(asked, Facts(name, time.time()))
    secrets = [secret for secret in asked.secrets if secret]
    return [redacted(finding, secrets) for finding in findings_of(facts)]


async def facts_of(asked: Asked, facts: Facts) -> Facts:
    """Ask for all that the checks go by."""
    try:
        facts = facts._replace(endpoints=await asked.endpoints())
    except NoAnswer as error:
        if error.status in (401, 403):
            return facts._replace(refused=str(error))
        return facts._replace(away=str(error))
    endpoint = facts.endpoint
    facts = facts._replace(user=await asked.web("the account's credit", dict, "show_user"))
    if endpoint is not None:
        groups, workers, log = await asyncio.gather(
            asked.web("the workergroups", list, "show_workergroups"),
            asked.autoscaler("the workers", list, "get_endpoint_workers", endpoint["id"]),
            asked.autoscaler("the log", dict, "get_endpt_logs", endpoint["id"], 1, LOG_LINES),
        )
        facts = facts._replace(
            groups=None if groups is None else groups_of(groups, endpoint),
            workers=workers,
            log="\n".join(text for text in (log or {}).values() if isinstance(text, str)),
        )
        for about in (about_workers, about_template, about_offers):
            try:
                facts = await about(asked, facts)
            except UNKNOWN_FORM as error:
                what = about.__name__.removeprefix("about_")
                asked.unasked.append(f"more about the {what}: an odd answer: {error!r}")
    return facts._replace(unasked=tuple(asked.unasked))


def groups_of(groups: Sequence[JSON], endpoint: JSON) -> list[JSON]:
    """Return the workergroups of an endpoint."""
    return [group for group in groups if group.get("endpoint_id") == endpoint["id"]]


async def about_workers(asked: Asked, facts: Facts) -> Facts:
    """Ask for the instances of the workers, and try their ports."""
    ids = [int(worker["id"]) for worker in facts.workers or ()]
    instances: dict[int, JSON] = {}
    for first in range(0, len(ids), 25):  # as many as Vast answers with at once
        params = {"select_filters": {"id": {"in": ids[first : first + 25]}}, "limit": 25}
        page = await asked.web("the instances", dict, "show_instances_v1", params)
        if page is None:
            break
        instances |= {int(each["id"]): each for each in page.get("instances") or []}
    ready = [
        int(worker["id"])
        for worker in facts.workers or ()
        if word_of(worker) in ("free", "reserved")
    ]
    addresses = {number: address_of(instances.get(number, {})) for number in ready[:MOST_PORTS]}
    known = {number: address for number, address in addresses.items() if address}
    tried = await asyncio.gather(*(try_port(*address) for address in known.values()))
    return facts._replace(instances=instances, ports=dict(zip(known, tried, strict=True)))


def address_of(instance: JSON) -> tuple[str, int] | None:
    """Return where the worker of an instance is reached, if Vast says so."""
    pairs = [pair for pair in instance.get("extra_env") or [] if len(pair) == 2]
    inside = dict(pairs).get("WORKER_PORT") or WORKER_PORT
    try:
        outside = int(instance["ports"][f"{inside}/tcp"][0]["HostPort"])
        return str(instance["public_ipaddr"]).strip(), outside
    except (KeyError, TypeError, ValueError, IndexError):
        return None


async def try_port(host: str, port: int) -> Port:
    """Open a connection to a port, and close it."""
    address = f"{host}:{port}"
    try:
        connecting = asyncio.open_connection(host, port)
        _, writer = await asyncio.wait_for(connecting, PORT_TIMEOUT)
    except asyncio.TimeoutError:
        return Port(address, f"no answer within {PORT_TIMEOUT:g} s")
    except OSError as error:
        return Port(address, os.strerror(error.errno) if error.errno else one_line(error))
    writer.close()
    return Port(address)


async def about_template(asked: Asked, facts: Facts) -> Facts:
    """Ask for the template of the first workergroup."""
    by = "hash_id" if facts.group.get("template_hash") else "id"
    which = facts.group.get("template_hash") or facts.group.get("template_id")
    if which is None:
        return facts
    templates = await asked.web("the template", list, "search_templates", {by: {"eq": which}})
    return facts._replace(template=(templates or [None])[0])


async def about_offers(asked: Asked, facts: Facts) -> Facts:
    """Ask for offers that match the first workergroup's search; if none, for the reason."""
    conditions = conditions_of(search_of(facts.group))
    if not conditions:
        return facts
    count = partial(count_offers, asked, (facts.template or {}).get("recommended_disk_space"))
    facts = facts._replace(offers=await count(conditions))
    if facts.offers != 0:
        return facts
    without = {}
    for condition in conditions[:MOST_CONDITIONS]:
        number = await count([each for each in conditions if each != condition])
        if number is None:
            break
        without[condition] = number
    return facts._replace(offers_without=without)


async def count_offers(asked: Asked, disk: float | None, conditions: Sequence[str]) -> int | None:
    """Ask how many offers there are, up to MOST_OFFERS."""
    offers = await asked.web(
        *("the offers", list, "search_offers", " ".join(conditions)),
        limit=MOST_OFFERS,
        storage=float(disk or 5),
        no_default=True,
    )
    return None if offers is None else len(offers)


# Telling


def redacted(finding: Finding, secrets: Iterable[str]) -> Finding:
    """Return a finding without the keys, its text then cut to a line: half a key isn't found."""
    what, do = finding.what, finding.do
    for secret in secrets:
        what = what.replace(secret, "(key)")
        do = tuple(line.replace(secret, "(key)") for line in do)
    return finding._replace(what=one_line(what), do=do)


def show(findings: Sequence[Finding]) -> list[str]:
    """Return the lines that a person gets: what is, and under what is wrong what to do."""
    lines = []
    for finding in findings:
        lines.append(f"wrong: {finding.what}" if finding.wrong else finding.what)
        lines += [f"    {command}" for command in finding.do]
    wrong = sum(finding.wrong for finding in findings)
    if wrong:
        return [*lines, "1 thing is wrong" if wrong == 1 else f"{wrong} things are wrong"]
    return [*lines, "nothing wrong was found"]
