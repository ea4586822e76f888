"""What a stranger may send: each way to spoil a request, and bytes that are none."""

import functools
import math

WRONG = {
    str: [None, 1, True, [], {}],
    int: [None, "1", 1.5, True, [], {}],
    float: [None, "1", True, [], {}],
}


AUTH = {
    "cost": float,
    "endpoint": str,
    "reqnum": int,
    "request_idx": int,
    "signature": str,
    "url": str,
}


LIFETIMES = [None, "60", True, [], {}, 0, -1, -0.0, math.nan, math.inf, -math.inf, 10**400]


ROUTES = [
    1,
    True,
    [],
    {},
    "",
    "closed",
    "ftp://host/x",
    "http://",
    "http://[",
    "http://a b",
    "javascript:alert(1)",
]


RAW = [
    (422, b""),
    (422, b"not json"),
    (422, b"{"),
    (422, b"[]"),
    (422, b"null"),
    (422, b"0"),
    (422, b'"x"'),
    (422, b"\xff\xfe\xff"),
    (422, b'{"auth_data": "\xc3\x28"}'),
    (422, b"[" * 500_000),
    (422, b'{"auth_data":' * 50_000),
    (422, b'{"payload": {"lifetime": ' + b"9" * 5000 + b"}}"),
    (413, b" " * ((1 << 20) + 1)),
    (413, b'{"auth_data": "' + b"x" * (3 << 20)),
]


HELD = {"session_id": str, "session_auth": dict}


SIGNED = {
    "auth_data": dict,
    **{f"auth_data.{name}": kind for name, kind in AUTH.items()},
    "payload": dict,
}


READS = {  # path to the fields that it reads
    "/session/create": {
        **SIGNED,
        "payload.lifetime": "lifetime",
        "payload.on_close_route": "route",
    },
    "/session/get": {**HELD, "wait": "wait"},
    "/session/end": HELD,
    "/session/health": HELD,
    "/ping": {**SIGNED, "session_id": str},
    "/pyworker/update": {},
}


DOORS = [("port", path) for path in READS] + [("http_port", "/session/end")]


SPOILT = {
    str: [*WRONG[str], "x" * 4097, "é" * 2049],
    int: [*WRONG[int], 10**30, 1 << 63, -(1 << 63) - 1, math.nan],
    float: [*WRONG[float], -1, -0.5, 1e308, 1_000_001, math.nan, math.inf, -math.inf, 10**400],
    dict: [None, 1, True, "x", []],
    "lifetime": LIFETIMES,
    "route": [*ROUTES, "/" + "x" * 4096],
    "wait": [None, "1", True, [], {}, -1, 60.5, 10**400, math.nan, math.inf],
}


REQUIRED = (str, int, float, dict)


QUADRATIC = b"dn32ga" + b"a" * 200_000  # to Python's punycode decoder


def good(vast, worker, path):
    auth = vast.auth_data(worker)
    if path in ("/session/create", "/ping"):
        return {
            "auth_data": auth,
            "payload": {},
            **({"session_id": "x"} if path == "/ping" else {}),
        }
    return {"session_id": "x", "session_auth": auth}


def malformed(path="/session/create"):
    """(what, change of the body) for every way to spoil one field that a route reads."""
    for named, kind in READS[path].items():
        *parents, name = named.split(".")

        def spoil(body, change, parents=parents):
            change(body[parents[0]] if parents else body)

        if kind in REQUIRED:
            yield named, functools.partial(spoil, change=lambda fields, name=name: fields.pop(name))
        for wrong in SPOILT[kind]:
            yield (
                named,
                functools.partial(
                    spoil,
                    change=lambda fields, name=name, wrong=wrong: fields.update({name: wrong}),
                ),
            )


NASTY = (
    "x\nFORGED\rFORGED\r\nFORGED\x85FORGED\u2028FORGED\u2029FORGED"
    "\x0bFORGED\x0cFORGED\x1cFORGED\x1b[2K\x1b[1GFORGED"
)


WIRE = [
    b"garbage\r\n\r\n",
    b"GET / HTTP/x.y\r\n\r\n",
    b"POST /session/create HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"POST /session/create HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /session/get HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
    b"POST /session/get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"zz\r\nx\r\n0\r\n\r\n",
    b"POST /session/end HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 3\r\n\r\nabc",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n"
    b"\x1f\x8bxx",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Type: \xff\xfe; charset=\xff\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nExpect: the-unexpected\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nbad name: x\r\n\r\n",
    b"POST /ping HTTP/1.1\r\nHost: x\r\nx: \x00\nFORGED\x85\r\n\r\n",
    b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"\x16\x03\x01\x02\x00" * 100,
    b"\x00\xff" * 5000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"FORGED\nFORGED\x85FORGED\x1b[2K\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    b"",
]
