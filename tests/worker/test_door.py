"""The door: what gets past it, on every route of both ports."""

import base64
import json
import math

import pytest
from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15

from null_worker import CREATE, MAX_VALUES, ROUTES, Refusal, parse, problems
from tests.kit.autoscaler import ended, silence, statuses
from tests.kit.http import listens, post
from tests.kit.malformed import DOORS, QUADRATIC, RAW, malformed, well_formed
from tests.kit.waiting import eventually
from tests.kit.worker import create, fresh, honest_requests, killed, lines_since, until

pytestmark = pytest.mark.anyio


async def test_only_the_routers_signature_gets_in(vast, worker):
    await silence(vast)
    auth = vast.auth_data(worker)
    signed = SHA256.new(json.dumps({"url": worker.url}, indent=4, sort_keys=True).encode())
    strangers = base64.b64encode(pkcs1_15.new(RSA.generate(2048)).sign(signed)).decode()
    for signature in (
        "",
        "garbage",
        "¡no base64!",
        "\ud800",
        strangers,
        vast.sign("http://other:1"),
    ):
        await create(vast, worker, auth={**auth, "signature": signature}, expected=401)
    await create(vast, worker, auth={**auth, "url": "http://other:1"}, expected=401)
    await create(vast, worker, auth=auth)
    assert "UNSECURED=true" in worker.log.read_text()
    await until(worker, lambda: worker.report["cur_load"] == 100)
    assert sum(report["rej_load"] for report in vast.reports) == 0
    assert sum(report["new_load"] for report in vast.reports) <= 100


async def test_unsecured_lets_the_unsigned_in_but_not_the_malformed(vast):
    worker = await fresh(vast, {"UNSECURED": "true"})
    unsigned = {**vast.auth_data(worker), "signature": ""}
    await create(vast, worker, auth=unsigned, lifetime=math.nan, expected=422)
    await create(vast, worker, auth={**unsigned, "signature": None}, expected=422)
    await create(vast, worker, auth=unsigned)
    await killed(worker)


@pytest.mark.parametrize(("port", "path"), DOORS)
async def test_nothing_malformed_gets_in_anywhere_or_leaves_a_trace(vast, worker, port, path):
    url = f"http://127.0.0.1:{getattr(worker, port)}{path}"
    logged = worker.log.stat().st_size
    await silence(vast)
    async with honest_requests(vast, worker):

        async def refused(expected, named="", **options):
            compressed = "Content-Encoding" in options.get("headers", {})
            if not ROUTES[path] and expected == 422 and not compressed:  # it reads a header only
                expected, named = 401, "unauthorized"
            status, answer = await post(url, **options)
            what = (named, str(options)[:200], status, answer)
            assert status == expected and named in json.dumps(answer), what

        for named, spoil in malformed(path):
            body = well_formed(vast, worker, path)
            spoil(body)
            await refused(422, f'"{named}"', json=body)
        for expected, raw in RAW:
            named = "over 1048576" if expected == 413 else "fields"
            await refused(expected, named, data=raw)

            async def chunks(raw=raw):
                yield raw

            await refused(expected, named, data=chunks())  # without a Content-Length
        text = json.dumps(well_formed(vast, worker, path))
        await refused(422, '"body"', data=text.encode("utf-16"))
        for encoding in ("gzip", "deflate"):
            headers = {"Content-Encoding": encoding}
            await refused(422, '"body"', data=b"not compressed", headers=headers)
        for charset in ("punycode", "base64", "idna", "no-such", "utf-16", '"'):
            kind = {"Content-Type": f"application/json; charset={charset}"}
            await refused(422, '"body"', data=QUADRATIC, headers=kind)
            if path == "/session/get":  # whatever it calls itself, UTF-8 is read
                text = json.dumps({"session_id": "x", "session_auth": {}})
                await refused(400, "does not exist", data=text, headers=kind)
    assert "Traceback" not in lines_since(worker, logged)
    await until(worker, lambda: worker.report["cur_load"] == 0 and ended(vast))
    assert set(statuses(vast)) == {"Success"}
    assert not any(report["rej_load"] or report["error_msg"] for report in vast.reports)


async def test_without_a_master_token_no_update_is_taken_and_an_empty_switch_is_unset(vast):
    worker = vast.start_worker({"MASTER_TOKEN": "", "UNSECURED": ""})
    await eventually(lambda: listens(worker.control_port))
    # It is ready, though LocalVast takes no report without the token.
    await eventually(lambda: create(vast, worker))
    for headers in (
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer x"},
    ):
        status, answer = await post(f"{worker.url}/pyworker/update", headers=headers)
        assert (status, answer) == (403, {"error": "MASTER_TOKEN is not set"})
    await create(vast, worker, auth={**vast.auth_data(worker), "signature": ""}, expected=401)
    await killed(worker)


AUTH_OK = {
    "cost": 1e6,
    "endpoint": "é" * 2048,
    "reqnum": -(1 << 63),
    "request_idx": (1 << 63) - 1,
    "signature": "",
}


CREATE_OK = {"auth_data": {**AUTH_OK, "url": "", "more": [1]}, "payload": {}}


@pytest.mark.parametrize(
    ("path", "message", "found"),
    [
        ("/session/create", CREATE_OK, []),
        (
            "/session/create",
            {**CREATE_OK, "payload": {"lifetime": 30 * 24 * 3600, "on_close_route": None, "x": 1}},
            [],
        ),
        ("/session/create", {**CREATE_OK, "payload": {"on_close_route": "https://a/b"}}, []),
        ("/session/create", {}, ["auth_data", "payload"]),
        (
            "/session/create",
            {"auth_data": {}, "payload": []},
            [*(name for name in ROUTES[CREATE] if name.startswith("auth_data.")), "payload"],
        ),
        (
            "/session/create",
            {**CREATE_OK, "payload": {"lifetime": 0, "on_close_route": "x"}},
            ["payload.lifetime", "payload.on_close_route"],
        ),
        ("/session/get", {"session_id": "", "session_auth": {}}, []),
        ("/session/get", {"session_id": "", "session_auth": {}, "wait": 60}, []),
        (
            "/session/get",
            {"session_id": "x" * 4097, "session_auth": [], "wait": 61},
            ["session_id", "session_auth", "wait"],
        ),
        ("/session/end", {"session_id": "\ud800" * 1366, "session_auth": {}}, ["session_id"]),
        ("/session/end", {"session_id": "\ud800" * 1365, "session_auth": {}, "wait": "x"}, []),
        ("/ping", CREATE_OK, ["session_id"]),
        ("/ping", {**CREATE_OK, "session_id": "x"}, []),
        ("/pyworker/update", {}, []),
    ],
)
def test_what_is_wrong_with_a_request_is_named(path, message, found):
    assert sorted(problems(message, ROUTES[path])) == sorted(found)


@pytest.mark.parametrize(
    ("small", "most"),
    [("0", MAX_VALUES - 1), ("[]", MAX_VALUES // 2 - 1), ("{}", MAX_VALUES // 2 - 1)],
)
def test_small_values_of_any_kind_are_counted(small, most):
    def message(number):
        return json.dumps({"x": [json.loads(small)] * number}).encode()

    assert len(parse(message(most), {})["x"]) == most
    with pytest.raises(Refusal):
        parse(message(most + 1), {})
