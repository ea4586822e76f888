"""`--diagnose` of the stub of an account, with what holds for all that it finds."""

import asyncio
import functools
import shlex
import sys
from unittest import mock

import pytest
import vastai.cli.main
from vastai import Serverless

from null_diagnose import diagnose, show
from tests.kit.account import ENDPOINT_KEY, KEY, READS


def found(vast, name="queue", key=KEY):
    """What is found. The stub must have been asked for nothing but what changes nothing."""
    client = Serverless(key, autoscaler_url=vast.url, webserver_url=vast.url)
    findings = asyncio.run(diagnose(client, name))
    assert set(vast.asked) <= READS
    for finding in findings:
        assert bool(finding.do) >= finding.wrong, finding
        for line in finding.do:
            assert "\n" not in line
            parsed(line)
    text = "\n".join(show(findings))
    for secret in (KEY, ENDPOINT_KEY, "a-password"):
        assert secret not in text
    return findings


@functools.cache
def parser():
    """The parser of Vast's own command, which is told its commands as it starts."""
    with mock.patch.object(sys, "argv", ["vastai", "--version"]), pytest.raises(SystemExit):
        vastai.cli.main.main()
    return vastai.cli.main.parser


def parsed(line):
    """A proposed command as Vast's own command understands it."""
    program, *words = shlex.split(line, comments=True)
    assert program == "vastai"
    return parser().parse_args(words)


def wrong(findings):
    """The one thing that is wrong: what is, and the commands that mend it."""
    (one,) = [finding for finding in findings if finding.wrong]
    return one.what, [parsed(line) for line in one.do]
