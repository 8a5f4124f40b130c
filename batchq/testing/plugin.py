"""Fixtures for pytest, which finds this module by itself where batchq is installed. See docs/testing.md.

It starts and imports nothing until a test asks for a fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    import psycopg

    from batchq.testing.databases import Databases


@pytest.fixture(scope="session")
def batchq_databases() -> Iterator[Databases]:
    """Return the maker of test databases: on the server of BATCHQ_TEST_DSN, or on a private one that ends with the
    session (extra `pgbatchq[embedded]`). Override this fixture for a server of your own."""
    from batchq.testing.databases import running_databases

    with running_databases() as databases:
        yield databases


@pytest.fixture
def batchq_dsn(batchq_databases: Databases) -> Iterator[str]:
    """Return the DSN of a new database with batchq's schema: a copy of a template, dropped later."""
    with batchq_databases.migrated() as dsn:
        yield dsn


@pytest.fixture
def batchq_conn(batchq_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Return a connection to the database of `batchq_dsn`, not in autocommit: the test commits, or nobody does."""
    from batchq.postgres.connections import connect

    with connect(batchq_dsn) as conn:
        conn.autocommit = False
        yield conn
        conn.rollback()
