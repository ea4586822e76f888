"""A stub of an account on Vast: what its web API and its autoscaler say about one endpoint.

The shapes are those that the SDK's code reads and that Vast's published API description shows.
"""

import contextlib
import http.server
import json
import socket
import threading
import time
import urllib.parse

KEY = "an-account-key-of-nobody"
ENDPOINT_KEY = "an-endpoint-key-of-nobody"
READS = {  # nothing else may be asked: all of these change nothing
    ("GET", "/api/v0/users/current"),
    ("GET", "/api/v0/endptjobs/"),
    ("GET", "/api/v0/autojobs/"),
    ("GET", "/api/v0/template/"),
    ("GET", "/api/v1/instances/"),
    ("POST", "/api/v0/bundles/"),
    ("POST", "/get_endpoint_workers/"),
    ("POST", "/get_endpoint_logs/"),
}
ENVIRONMENT = (
    "-p 3000:3000 -e SERVERLESS=true -e BACKEND=null -e WORKER_PORT=3000 -e SDK_VERSION=1.9.1"
    " -e PYWORKER_REPO=https://example.com/queue -e REDIS_URL=redis://:a-password@db"
)


class Account:
    """What Vast knows of an account, in which nothing is wrong. Tests change it."""

    def __init__(self):
        now = time.time()
        self.url = ""
        self.asked = []  # method and path of each request
        self.searches = []  # for offers
        self.failing = {}  # path: (status, answer), for ever
        self.once = {}  # path: the same, one for each of the next requests
        self.silent = set()  # paths that get no answer
        self.ended = threading.Event()
        self.user = {"id": 1, "credit": 25.0, "balance": 0.0, "api_key": KEY}
        self.endpoint = {
            "id": 4242,
            "endpoint_name": "queue",
            "endpoint_state": "active",
            "api_key": ENDPOINT_KEY,
            "user_id": 1,
            "created_at": now - 9000,
            "min_load": 0.0,
            "target_util": 1.0,
            "cold_mult": 2.5,
            "cold_workers": 1,
            "max_workers": 4,
            "max_queue_time": 1.0,
            "target_queue_time": 0.5,
            "inactivity_timeout": 10,
        }
        self.endpoints = [self.endpoint]
        self.group = {
            "id": 77,
            "endpoint_id": 4242,
            "endpoint_name": "queue",
            "api_key": ENDPOINT_KEY,
            "template_hash": "0123456789abcdef",
            "template_id": 7,
            "search_query": {
                "gpu_name": {"eq": "RTX 4090"},
                "gpu_ram": {"gte": 24000.0},
                "dph_total": {"lt": 0.6},
                "machine_id": {"notin": ["5"]},
                "verified": {"eq": True},
                "rentable": {"eq": True},
            },
        }
        self.groups = [self.group, {"id": 78, "endpoint_id": 1, "template_hash": "another"}]
        self.template = {
            "id": 7,
            "hash_id": "0123456789abcdef",
            "name": "null queue",
            "image": "vastai/base-image",
            "tag": "cuda-12.8.1-auto",
            "env": ENVIRONMENT,
            "onstart": "entrypoint.sh",
            "runtype": "ssh",
            "use_ssh": True,
            "ssh_direct": True,
            "recommended_disk_space": 40.0,
            "extra_filters": {"num_gpus": {"eq": "1"}},
        }
        self.workers = []
        self.instances = []
        self.log = "a line\nanother line\n"
        self.offers = 12
        self.short = {}  # field: how many offers there would be without a condition on it

    def add_worker(self, number, status="idle", load=0.0, age=600, port=None, **instance):
        """A worker of the endpoint on an instance, whose port is `port` of this machine."""
        began_at = time.time() - age
        worker = {"id": number, "status": status, "cur_load": load, "measured_perf": 100.0}
        worker |= {"loaded_at": began_at, "started_at": began_at, "reqs_working": 0}
        self.workers.append(worker)
        running = status != "stopped"
        row = {
            "id": number,
            "machine_id": 9000 + number,
            "actual_status": "running" if running else "exited",
            "intended_status": "running" if running else "stopped",
            "public_ipaddr": "127.0.0.1",
            "ports": {"3000/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]} if port else None,
            "extra_env": [["WORKER_PORT", "3000"], ["REDIS_URL", "redis://:a-password@db"]],
            "dph_total": 0.25,
            "start_date": began_at,
        }
        self.instances.append(row | instance)

    def answer(self, method, path, query, body):
        """The JSON of an answer."""
        if path == "/api/v0/users/current":
            return self.user
        if path == "/api/v0/endptjobs/":
            return {"success": True, "results": self.endpoints}
        if path == "/api/v0/autojobs/":
            return {"success": True, "results": self.groups}
        if path == "/get_endpoint_workers/":
            return self.workers
        if path == "/get_endpoint_logs/":
            return {"info0": "", f"info{1}": self.log}
        if path == "/api/v1/instances/":
            ids = json.loads(query["select_filters"][0])["id"]["in"]
            rows = [row for row in self.instances if row["id"] in ids]
            return {"success": True, "instances": rows, "next_token": None}
        if path == "/api/v0/template/":
            ((field, condition),) = json.loads(query["select_filters"][0]).items()
            found = [self.template] if self.template.get(field) == condition["eq"] else []
            return {"success": True, "templates_found": len(found), "templates": found}
        if path == "/api/v0/bundles/":
            self.searches.append(body)
            without = [number for field, number in self.short.items() if field not in body]
            return {"offers": [{"id": each} for each in range(max([self.offers, *without]))]}
        raise AssertionError(f"{method} {path}")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        account = self.server.account
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"null")
        path, _, query = self.path.partition("?")
        account.asked.append((self.command, path))
        if path in account.silent:
            account.ended.wait()
            self.close_connection = True
            return
        status, answer = 200, None
        if self.headers["Authorization"] != f"Bearer {KEY}":
            status, answer = (
                401,
                {"success": False, "error": "auth_error", "msg": "Invalid user key"},
            )
        elif account.once.get(path):
            status, answer = account.once[path].pop(0)
        elif path in account.failing:
            status, answer = account.failing[path]
        else:
            answer = account.answer(self.command, path, urllib.parse.parse_qs(query), body)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def account():
    """The stub, answering at its `url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.account = Account()
    server.account.url = f"http://127.0.0.1:{server.server_address[1]}"
    serving = threading.Thread(target=server.serve_forever, args=(0.05,))
    serving.start()
    try:
        yield server.account
    finally:
        server.account.ended.set()
        server.shutdown()
        serving.join()
        server.server_close()


@contextlib.contextmanager
def ports():
    """Two ports of this machine: one on which somebody listens, and one that refuses."""
    with socket.socket() as open_port, socket.socket() as closed_port:
        for each in (open_port, closed_port):
            each.bind(("127.0.0.1", 0))
        open_port.listen(16)
        yield open_port.getsockname()[1], closed_port.getsockname()[1]
