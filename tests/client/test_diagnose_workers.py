"""`--diagnose` against a stub of Vast: what it says of workers and offers, and of no answer."""

import asyncio
import re
import time

import pytest

import null_diagnose
from null_diagnose import Facts, Finding, findings_of, show
from tests.kit.account import KEY, account, ports
from tests.kit.diagnosis import found, parsed, wrong


@pytest.fixture
def vast():
    with account() as stub:
        yield stub


def test_a_worker_in_error(vast):
    vast.add_worker(11, "error")
    vast.log = f"worker 11: {KEY} is no model\nworker 110 is fine\nworker 12 started\n"
    what, (fix,) = wrong(found(vast))
    assert what == "worker 11 is in error: worker 11: (key) is no model"
    assert (fix.func.__name__, fix.INSTANCE_ID, fix.tail) == ("logs", 11, "200")


def test_a_key_where_a_line_is_cut(vast):
    vast.add_worker(11, "error")
    for length in range(230, 300, 7):
        vast.log = f"worker 11: {'x' * length}{KEY}"
        what, _ = wrong(found(vast))
        assert KEY[:8] not in what


def test_a_worker_whose_provisioning_failed(vast):
    vast.add_worker(11, "ERROR")
    vast.log = "worker 11: provisioning has failed: see /var/log/portal/provisioning.log\nthe end"
    what, _ = wrong(found(vast))
    assert re.search("the provisioning script failed on worker 11: .*/provisioning.log", what)


@pytest.mark.parametrize("status", ["loading", "model_loading", "creating"])
def test_a_worker_that_has_been_loading_for_long(vast, status):
    vast.add_worker(11, status, age=840)
    vast.add_worker(12, status, age=960)
    what, (fix,) = wrong(found(vast))
    assert what.startswith("worker 12 has been loading for 16 min")
    assert fix.INSTANCE_ID == 12


def test_a_stopped_worker_that_cannot_start(vast):
    vast.add_worker(11, "stopped")
    vast.add_worker(12, "stopped", intended_status="running")
    what, (fix,) = wrong(found(vast))
    assert what.startswith("worker 12 is to start, and its instance is exited")
    assert (fix.func.__name__, fix.id, fix.yes) == ("destroy__instance", 12, True)


def test_a_port_that_is_closed(vast):
    with ports() as (open_port, closed_port):
        vast.add_worker(11, port=open_port)
        vast.add_worker(12, port=closed_port)
        vast.add_worker(13, "loading", port=closed_port)
        findings = found(vast)
    first, second = [finding for finding in findings if finding.wrong]
    assert f"worker 12 is ready, and its port 127.0.0.1:{closed_port} can't be" in first.what
    assert first.what.endswith("from here: Connection refused")
    destroy = parsed(*first.do)
    assert (destroy.id, destroy.yes) == (12, True)
    leave_out = parsed(*second.do)
    assert (leave_out.id, leave_out.endpoint_id, leave_out.no_default) == (77, 4242, True)
    assert leave_out.search_params == (
        "gpu_name=RTX_4090 gpu_ram>=24 dph_total<0.6 verified=True rentable=True "
        "machine_id notin [5,9012]"
    )


def test_a_load_that_nobody_holds(vast):
    with ports() as (_, closed_port):
        vast.add_worker(12, load=100.0, port=closed_port)
        findings = found(vast)
    assert "; nobody holds the load of 100 that Vast lists for it: " in findings[1].what


def test_a_port_that_never_answers(vast, monkeypatch):
    """The queue of connections that wait is full, and what comes then gets no answer."""
    monkeypatch.setattr(null_diagnose, "PORT_TIMEOUT", 0.3)
    with ports() as (open_port, _):
        asyncio.run(fill(open_port))
        began_at = time.monotonic()
        port = asyncio.run(null_diagnose.try_port("127.0.0.1", open_port))
        assert time.monotonic() - began_at < 30  # the system itself gives up after minutes
        vast.add_worker(11, port=open_port)
        findings = found(vast)
    assert port.trouble == "no answer within 0.3 s"
    assert port.trouble in findings[1].what


async def fill(port):
    """Connect until nobody can any more."""
    while True:
        try:
            await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 0.3)
        except asyncio.TimeoutError:
            return


def test_places_that_stopped_workers_use_up(vast):
    with ports() as (open_port, _):
        vast.add_worker(11, port=open_port, load=100.0)
        for number in (12, 13, 14):
            vast.add_worker(number, "stopped")
        what, (more, *destroys) = wrong(found(vast))
    assert what == "max_workers 4 is used up, and 3 of them are stopped"
    assert (more.id, more.max_workers) == (4242, 7)
    assert [each.id for each in destroys] == [12, 13, 14]


def test_what_the_workers_cost(vast):
    with ports() as (open_port, _):
        vast.add_worker(11, port=open_port, dph_total=0.31)
        vast.add_worker(12, "stopped")
        said = show(found(vast))
    assert (
        "instances: 1 running, which cost $0.31 an hour now; 1 not running, whose disks are billed"
        in said
    )


def test_more_workers_than_one_page_of_instances_has(vast):
    vast.endpoint["max_workers"] = 50
    for number in range(30):
        vast.add_worker(number, "stopped")
    said = show(found(vast))
    assert any("30 not running" in line for line in said)
    assert vast.asked.count(("GET", "/api/v1/instances/")) == 2


def test_no_offer_because_of_one_condition(vast):
    vast.offers = 0
    vast.short = {"dph_total": 31, "gpu_name": 2}
    what, (look,) = wrong(found(vast))
    assert what.endswith("; without dph_total<0.6 there are 31")
    assert look.no_default
    assert look.query == [
        "gpu_name=RTX_4090 gpu_ram>=24 machine_id notin [5] verified=True rentable=True"
    ]


def test_no_offer_whichever_condition_is_left_out(vast):
    vast.offers = 0
    what, _ = wrong(found(vast))
    assert what.endswith("and no condition of it alone is why")
    assert len(vast.searches) == 1 + 6


def test_a_search_as_a_person_typed_it(vast):
    vast.group["search_query"] = "gpu_name in [RTX_4090,RTX_3090] dph_total<=0.6"
    found(vast)
    (search,) = vast.searches
    assert search["gpu_name"] == {"in": ["RTX 4090", "RTX 3090"]}
    assert search["dph_total"] == {"lte": "0.6"}


@pytest.mark.parametrize(
    "path, status, answer, said",
    [
        ("/api/v0/users/current", 403, {"msg": "no"}, "credit: HTTP 403 - no; the key may lack"),
        ("/api/v0/autojobs/", 500, "<html>", "the workergroups: HTTP 500 - <html>"),
        ("/api/v0/autojobs/", 200, {"success": False, "msg": "odd"}, "the workergroups: odd"),
        ("/api/v0/template/", 401, {"error": "auth"}, "the template: HTTP 401 - auth"),
        ("/api/v1/instances/", 200, [], "the instances: an answer of an unknown form: []"),
        ("/get_endpoint_workers/", 200, {"error_msg": "not yet"}, "the workers: not yet"),
        ("/get_endpoint_logs/", 502, {}, "the log: HTTP 502"),
        (
            "/api/v0/bundles/",
            429,
            {"error": "search_quota_exceeded", "msg": "no search is left of your quota"},
            "the offers: HTTP 429 - no search is left of your quota",
        ),
    ],
)
def test_a_question_without_an_answer(vast, monkeypatch, path, status, answer, said):
    """It is told, the others are asked all the same, and that alone is not called wrong."""
    monkeypatch.setattr(null_diagnose, "RATE_PAUSE", None)  # none of these is asked again later
    with ports() as (open_port, _):
        vast.add_worker(11, port=open_port)
        vast.endpoint["endpoint_state"] = "suspended"
        vast.failing[path] = (status, answer)
        findings = found(vast)
    what, _ = wrong(findings)
    assert "suspended" in what
    (untold,) = [finding.what for finding in findings if "could not ask" in finding.what]
    assert said in untold


def test_an_answer_that_never_comes(vast, monkeypatch):
    monkeypatch.setattr(null_diagnose, "QUESTION_TIMEOUT", 3.0)
    vast.silent = {"/get_endpoint_logs/", "/api/v0/users/current"}
    vast.endpoint["endpoint_state"] = "stopped"
    findings = found(vast)
    assert wrong(findings)[0] == "endpoint queue is stopped"
    untold = [finding.what for finding in findings if "could not ask" in finding.what]
    assert [what.rpartition(": ")[2] for what in untold] == ["no answer within 3 s"] * 2


def test_vast_that_is_not_there(vast):
    with ports() as (_, closed_port):
        vast.url = f"http://127.0.0.1:{closed_port}"
        what, (look,) = wrong(found(vast))
    assert what == "Vast doesn't answer: [Errno 111] Connection refused"
    assert look.func.__name__ == "show__endpoints"


def test_asked_too_often_is_asked_again(vast, monkeypatch):
    """Vast answers the same question once in some seconds."""
    monkeypatch.setattr(null_diagnose, "RATE_PAUSE", 0.2)
    refused = [(429, "API requests too frequent")] * 2  # by the SDK's own two tries
    vast.once = {"/api/v0/endptjobs/": refused}
    assert not any(finding.wrong for finding in found(vast))
    assert not refused


def test_an_older_sdk_that_cannot_ask(vast, monkeypatch):
    from vastai import VastAI

    monkeypatch.delattr(VastAI, "get_endpt_logs")
    (untold,) = [each.what for each in found(vast) if "could not ask" in each.what]
    assert re.fullmatch(
        r"could not ask for the log: vastai-sdk [.\d]+ can't: it has no get_endpt_logs\(\)", untold
    )


def test_an_answer_that_nobody_expected(vast):
    """What can't be judged is told, and the rest is judged."""
    vast.add_worker(11, "error")
    vast.workers.append({"status": "idle"})
    vast.endpoint["max_queue_time"] = "soon"
    vast.group["search_query"] = {"gpu_name": {"in": None}}
    vast.template["tag"] = "latest"
    findings = found(vast)
    assert any("the image's tag" in finding.what for finding in findings if finding.wrong)
    told = [each.what for each in findings if re.match("could not (judge|ask)", each.what)]
    assert len(told) >= 3


def test_what_is_shown():
    findings = [
        Finding("workers: none", wrong=False),
        Finding("endpoint queue is stopped", ("vastai do", "vastai that")),
    ]
    assert show(findings) == [
        "workers: none",
        "wrong: endpoint queue is stopped",
        "    vastai do",
        "    vastai that",
        "1 thing is wrong",
    ]
    assert show([])[-1] == "nothing wrong was found"


def test_no_fact_is_no_finding():
    assert findings_of(Facts("queue", time.time())) == []
