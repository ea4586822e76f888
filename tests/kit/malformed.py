"""What a stranger may send: each way to spoil a request, and bytes that are none."""

import functools
import math

from null_worker import (
    ANYTHING,
    CALLBACK,
    COST,
    CREATE,
    END,
    INTEGER,
    LIFETIME,
    OBJECT,
    ROUTES,
    TEXT,
    WAIT,
)

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
    (422, b"1.5"),
    (422, b"true"),
    (422, b"9" * 5000),
    (422, b"[" * 9_000),
    (422, b"[" * 300_000),
    (422, b"[" * 500_000),
    (422, b'{"auth_data":' * 50_000),
    (422, b'{"payload": {"lifetime": ' + b"9" * 5000 + b"}}"),
    (413, b" " * ((1 << 20) + 1)),
    (413, b'{"auth_data": "' + b"x" * (3 << 20)),
]
# Every route of the framework on both of its ports.
DOORS = [*(("port", path) for path in ROUTES), ("http_port", END)]
NO_TEXT = [None, 1, True, [], {}]
NO_INTEGER = [None, "1", 1.5, True, [], {}]
NO_NUMBER = [None, "1", True, [], {}, math.nan, math.inf, -math.inf, 10**400]
NO_CALLBACK = [
    *(1, True, [], {}, "", "closed", "/" + "x" * 4096),
    *("ftp://host/x", "http://", "http://[", "http://a b", "javascript:alert(1)"),
]
# What each kind of field must refuse. A new kind is missing here until it is tested.
SPOILT = {
    TEXT: [*NO_TEXT, "x" * 4097, "é" * 2049],
    INTEGER: [*NO_INTEGER, 10**30, 1 << 63, -(1 << 63) - 1, math.nan],
    COST: [*NO_NUMBER, -1, -0.5, 1e308, 1_000_001],
    OBJECT: [None, 1, True, "x", []],
    LIFETIME: [*NO_NUMBER, 0, -1, -0.0, 30 * 24 * 3600 + 1],
    CALLBACK: NO_CALLBACK,
    WAIT: [*NO_NUMBER, -1, 60.5],
    ANYTHING: [],
}
QUADRATIC = b"dn32ga" + b"a" * 200_000  # to Python's punycode decoder


def well_formed(vast, worker, path):
    """What the SDK sends to a route: the fields that the route reads."""
    auth_data = vast.auth_data(worker)
    sent = {"auth_data": auth_data, "payload": {}, "session_id": "x", "session_auth": auth_data}
    return {name: value for name, value in sent.items() if name in ROUTES[path]}


def malformed(path=CREATE):
    """(field, a function that spoils it in a body) for every way to spoil a field of a route."""
    for field, kind in ROUTES[path].items():
        if not kind.accepts(kind.default):
            yield field, functools.partial(remove, field=field)
        for wrong in SPOILT[kind]:
            yield field, functools.partial(put, field=field, value=wrong)


def put(body, field, value):
    """Set a field of a body, which may be one of an object in it: `payload.lifetime`."""
    parent, _, name = field.rpartition(".")
    (body[parent] if parent else body)[name] = value


def remove(body, field):
    parent, _, name = field.rpartition(".")
    del (body[parent] if parent else body)[name]


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
