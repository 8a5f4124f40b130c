"""The embedded Postgres: private, found again, and clear about why it cannot start."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from batchq.errors import ConfigError
from batchq.postgres import embedded
from tests.support.alone import run_alone
from tests.support.servers import open_directory
from tests.support.steps import step

FAST = {"fsync": "off"}


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a new directory that the user whom Postgres runs as can enter."""
    with open_directory() as directory:
        yield directory


def query(server: embedded.EmbeddedServer, statement: str) -> object:
    with psycopg.connect(server.dsn()) as conn:
        row = conn.execute(statement).fetchone()
    return row and row[0]


def test_a_second_start_finds_the_running_server_and_leaves_it_running(directory: Path) -> None:
    with embedded.start(directory, FAST) as server:
        step("start again in %s", directory)
        with embedded.start(directory) as found:
            assert found.pid == server.pid
        assert query(server, "SHOW fsync") == "off"


def test_the_server_stops_at_the_end_and_its_data_stays(directory: Path) -> None:
    with embedded.start(directory, FAST) as server, psycopg.connect(server.dsn()) as conn:
        conn.execute("CREATE TABLE kept AS SELECT 1 AS one")
    with pytest.raises(ConfigError, match="no Postgres is running"):
        _ = server.pid
    with embedded.start(directory) as server:
        server.restart(immediate=True)
        assert query(server, "SELECT one FROM kept") == 1


def test_only_the_unix_socket_is_open(directory: Path) -> None:
    with embedded.start(directory, FAST) as server:
        assert query(server, "SHOW listen_addresses") == ""


def test_a_path_too_long_for_a_socket_gets_a_short_one(directory: Path) -> None:
    with embedded.start(directory / ("long" * 30), FAST) as server:
        sockets = server.socket_directory
        assert query(server, "SELECT 1") == 1
    assert not sockets.exists()


def test_a_directory_closed_to_the_server_is_named(directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o000)
    with pytest.raises(ConfigError, match=f"cannot enter {closed}; choose another directory"):
        embedded.start(closed)
    closed.chmod(0o755)


def test_without_the_wheel_the_error_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'pgbatchq\[embedded\]'"):
        embedded.start(directory)


if __name__ == "__main__":
    run_alone(__file__)
