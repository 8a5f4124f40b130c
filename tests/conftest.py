"""Fixtures: a server for the session, a migrated database of its own for each test."""

import os
import signal
from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.support.databases import Databases
from tests.support.layouts import PLAIN_ONLY, layout
from tests.support.poolers import PgBouncer
from tests.support.servers import NoServerError, Server, running_server
from tests.support.supasim import SupaSim
from tests.support.through import Way, way_to

SERVER = pytest.StashKey[Server]()
LEAKING_VARIABLES = {"PGOPTIONS", "PGTZ", "PGDATESTYLE", "PGGEQO", "PGCLIENTENCODING"}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server, so that the header can name it; it stops when pytest ends, however it ends."""
    if session.config.option.collectonly:
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _heed_signals()
    context = running_server()
    try:
        server = context.__enter__()
    except NoServerError as error:
        raise pytest.UsageError(str(error)) from error
    session.config.add_cleanup(lambda: context.__exit__(None, None, None))
    session.config.stash[SERVER] = server
    _forget_own_settings()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where only what is `pooled` is asked for, leave out the tests that have no use for the way to their database. On
    another layout of the tables, leave out what it does otherwise."""
    left_out = []
    if os.environ.get("BATCHQ_TEST_POOLED"):
        left_out = [item for item in items if "way" not in getattr(item, "fixturenames", [])]
    if layout() != "plain":
        left_out += [item for item in items if item.nodeid.partition("[")[0].removeprefix("tests/") in PLAIN_ONLY]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _heed_signals() -> None:
    """Ignore no signal that whoever started the tests may ignore (nohup, a job in the background): what the tests start
    would ignore it too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _forget_own_settings() -> None:
    """Remove the settings of whoever runs the tests, which would reach batchq."""
    for name in list(os.environ):
        ours = name.startswith("BATCHQ_") and not name.startswith("BATCHQ_TEST_")
        if ours or name in LEAKING_VARIABLES:
            del os.environ[name]


def pytest_report_header(config: pytest.Config) -> str:
    """Name the server and the way to it."""
    if SERVER not in config.stash:
        return "server: not started"
    return f"server: {config.stash[SERVER].describe()}, {os.environ.get('BATCHQ_TEST_THROUGH') or 'direct'}"


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """Return the server of this session."""
    return request.config.stash[SERVER]


@pytest.fixture(scope="session")
def databases(server: Server) -> Iterator[Databases]:
    """Return the maker of databases, for tests that need several."""
    databases = Databases(server)
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def way(server: Server) -> Iterator[Way]:
    """Return what opens a database by name, through the pooler under test or straight."""
    with way_to(server) as way:
        yield way


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """Return the name of a new migrated database."""
    with databases.migrated() as name:
        yield name


@pytest.fixture
def dsn(database: str, way: Way) -> Iterator[str]:
    """Return the DSN of the test's database; BATCHQ_TEST_THROUGH decides whether a pooler is in between."""
    with way(database) as dsn:
        yield dsn


@pytest.fixture
def admin_dsn(database: str, server: Server) -> str:
    """Return the DSN of the test's database that goes straight to the server, as superuser."""
    return server.dsn(database)


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection]:
    """Return an autocommit connection to the test's database."""
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        yield conn


@pytest.fixture
def empty_database(databases: Databases) -> Iterator[str]:
    """Return the name of a new database without batchq's schema."""
    with databases.empty() as name:
        yield name


@pytest.fixture
def empty_dsn(empty_database: str, way: Way) -> Iterator[str]:
    """Return the DSN of a database without batchq's schema; as for dsn, a pooler may be in between."""
    with way(empty_database) as dsn:
        yield dsn


@pytest.fixture
def pgbouncer(server: Server, database: str) -> Iterator[PgBouncer]:
    """Return a PgBouncer of this test's own, to be broken, with both backends of its database open."""
    with PgBouncer(server) as bouncer:
        bouncer.warm_up(database)
        yield bouncer


@pytest.fixture
def sim(admin_dsn: str) -> Iterator[SupaSim]:
    """Return a Supavisor simulator of this test's own before its database; its breaches are not checked."""
    with SupaSim(admin_dsn) as sim:
        yield sim


@pytest.fixture
def crash_server(server: Server) -> Callable[[], None]:
    """Return what crashes the server and lets it recover; it fails for a server of BATCHQ_TEST_DSN."""
    return server.crash
