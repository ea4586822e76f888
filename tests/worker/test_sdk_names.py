"""The private names of the SDK that worker and client use: one that is gone is noticed."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from null_reservation import NotReserved, reserve
from tests.kit.environment import BARE, HERE, ON_VAST
from tests.kit.stub import ROUTE, stubbed

pytestmark = pytest.mark.anyio

BACKEND = "vastai.serverless.server.lib.backend"


METRICS = "vastai.serverless.server.lib.metrics"


TYPES = "vastai.serverless.server.lib.data_types"


PRIVATE = [  # what the worker uses of the SDK: module, class or "", name
    *(
        ("vastai", "", name)
        for name in ("BenchmarkConfig", "HandlerConfig", "Worker", "WorkerConfig")
    ),
    *((BACKEND, "", name) for name in ("AuthData", "RSA", "log", "BENCHMARK_INDICATOR_FILE")),
    *((module, "", "time") for module in (BACKEND, METRICS, TYPES)),
    *(
        ("vastai.serverless.server.worker", "Worker", name)
        for name in ("backend", "routes", "run_async")
    ),
    *(
        (BACKEND, "Backend", f"_Backend__{name}")
        for name in ("check_signature", "close_session", "run_session_on_close")
    ),
    *(
        (BACKEND, "Backend", f"session_{name}_handler")
        for name in ("create", "get", "end", "health")
    ),
    *(
        (BACKEND, "Backend", name)
        for name in ("pyworker_update_handler", "backend_errored", "metrics")
    ),
    *(
        (BACKEND, "Backend", name)
        for name in ("mtoken", "unsecured", "_pubkey", "sessions", "session_metrics")
    ),
    *((BACKEND, "Backend", name) for name in ("model_server_url", "report_addr", "_fetch_pubkey")),
    *((METRICS, "Metrics", name) for name in ("_request_success", "_request_end")),
    *((METRICS, "Metrics", name) for name in ("update_pending", "model_metrics")),
    *(
        (TYPES, "ModelMetrics", f"workload_{name}")
        for name in ("served", "received", "cancelled", "errored", "rejected")
    ),
    *(
        (TYPES, "ModelMetrics", name)
        for name in ("empty", "requests_deleting", "error_msg", "workload_processing", "reset")
    ),
    *((TYPES, "Session", name) for name in ("session_id", "lifetime", "expiration")),
    (TYPES, "AuthData", "from_json_msg"),
    *(
        ("vastai.serverless.server.worker", "HandlerConfig", name)
        for name in ("allow_parallel_requests", "workload_calculator")
    ),
    *(("version", "", version) for version in ("1.2.2", "2.0.0", "0.9", "unknown")),
]


WITHOUT = """
import importlib, importlib.metadata, json, os, signal, sys
sys.path.insert(0, HERE)
import null_worker
from vastai.serverless.server import worker

def remove(module, owner, name):
    if module == "version":
        importlib.metadata.version = lambda _: name
        return
    module = importlib.import_module(module)
    if not owner:
        return delattr(module, name)
    owner = getattr(module, owner)
    if name in vars(owner):
        delattr(owner, name)
    getattr(owner, "__dataclass_fields__", {}).pop(name, None)
    init = owner.__init__
    def shorn(self, *given, **named):
        if name in named:
            raise TypeError(f"unexpected argument {name!r}")
        init(self, *given, **named)
        vars(self).pop(name, None)
    owner.__init__ = shorn

children = []
for number, what in enumerate(json.load(sys.stdin)):
    if not (child := os.fork()):
        output = os.open(str(number), os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        remove(*what)
        signal.alarm(12)  # it is running, which it should not
        os._exit(null_worker.main())
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_every_private_name_of_the_sdk_is_checked_at_the_start(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"HERE = {str(HERE)!r}\n{WITHOUT}"],
        input=json.dumps(PRIVATE),
        env=BARE | ON_VAST,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    installed, wrong = importlib.metadata.version("vastai"), {}
    for number, (what, status) in enumerate(zip(PRIVATE, done.stdout.split(), strict=True)):
        version = what[2] if what[0] == "version" else installed
        lines = (tmp_path / str(number)).read_text().splitlines()
        said = len(lines) == 1 and lines[0].startswith(
            f"null_worker: vastai-sdk {version} is not known to work"
        )
        if status != "2" or not said:
            wrong[what] = status, lines[-1:]
    assert not wrong


OF_THE_ENDPOINT = ("id", "name", "api_key", "data", "last_refresh")
OF_THE_CLIENT = ("autoscaler_url", "vast_web_url", "get_ssl_context", "is_open")


@pytest.mark.parametrize("name", ["client", *OF_THE_ENDPOINT, *OF_THE_CLIENT])
async def test_a_name_that_the_sdk_no_longer_has_is_noticed_before_anything_is_asked_for(name):
    async with stubbed() as (stub, endpoint):
        names = {each: getattr(endpoint.client, each) for each in ("api_key", *OF_THE_CLIENT)}
        client = SimpleNamespace(**names)
        names = {each: getattr(endpoint, each) for each in OF_THE_ENDPOINT}
        known = SimpleNamespace(**names, client=client)
        delattr(known if hasattr(known, name) else client, name)
        with pytest.raises(NotReserved, match=f"vastai-sdk is not known to work .*{name}"):
            await reserve(known, wait=2).__aenter__()
        assert not stub.times(ROUTE)
