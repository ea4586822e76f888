"""The servers that several examples share, each started when the first test wants it."""

import contextlib
import uuid

import pytest

from tests.kit.broker import shared_server

with contextlib.suppress(ImportError):
    import psycopg


@pytest.fixture(scope="session")
def amqp_url(tmp_path_factory):
    """The RabbitMQ of this test run."""
    with shared_server("rabbitmq", tmp_path_factory.getbasetemp().parent) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory):
    """The PostgreSQL of this test run, without a database's name."""
    with shared_server("postgres", tmp_path_factory.getbasetemp().parent) as url:
        yield url


@pytest.fixture
def database_url(postgres_url):
    """A new database on it."""
    name = f"tests_{uuid.uuid4().hex}"
    with psycopg.connect(f"{postgres_url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield f"{postgres_url}/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
