"""People may watch a hot standby instead of the primary: commands, pages and metrics that only read work there."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

import batchq
from batchq.cli import main
from batchq.postgres import embedded, migrate
from tests.support import tour
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.commands import CommandLine
from tests.support.servers import open_directory
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import Site, served

SECONDS = 20
MORE_LOOKS = ("top", "top --json", "keys", "limit", "schedule", "roles", "flow 1", "show 1 --json")
READ_ONLY = "the server is a standby, which is read-only"
NEEDS_A_PRIMARY = {"check"}  # it reports whether a worker could start


@dataclass(frozen=True)
class Pair:
    """A primary and a hot standby that follows it: the DSN of each superuser."""

    primary: str
    standby: str

    def wait(self) -> None:
        """Wait until the standby has replayed all that the primary has written."""
        with psycopg.connect(self.primary) as primary, psycopg.connect(self.standby, autocommit=True) as standby:
            position = primary.execute("SELECT pg_current_wal_lsn()").fetchone()
            replayed = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
            wait_until(lambda: standby.execute(replayed, position).fetchone() == (True,), SECONDS, "the standby")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Start both, on the embedded server, with batches of every kind that have been worked."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(open_directory()) for _ in range(2))
        primary = stack.enter_context(embedded.start(first, {"fsync": "off"}))
        embedded.hand_over(second)
        subprocess.run(
            [primary.bin_directory / "pg_basebackup", "--write-recovery-conf", "--checkpoint=fast", "--no-sync",
             f"--pgdata={second / 'data'}", f"--dbname={primary.dsn()}"],
            check=True, capture_output=True, **embedded.run_unprivileged(),
        )  # fmt: skip
        (second / "data" / f".s.PGSQL.{embedded.PORT}.lock").unlink()  # the primary's socket is in the same directory
        standby = stack.enter_context(embedded.start(second))
        pair = Pair(primary.dsn(), standby.dsn())
        migrate.migrate(pair.primary)
        tour.produce(pair.primary)
        tour.work(pair.primary, pair.primary)
        pair.wait()
        yield pair


@pytest.fixture
def site(pair: Pair) -> Iterator[Site]:
    """Serve the web UI on the standby."""
    with served(pair.standby) as site:
        yield site


def test_all_that_people_look_at_answers_on_a_standby(pair: Pair, tmp_path: Path) -> None:
    found = tour.look(pair.standby, tmp_path)
    assert found.keys() == NEEDS_A_PRIMARY | {"doctor"}
    assert READ_ONLY in found["check"]
    step("and doctor finds nothing else that is critical")
    critical = [line for line in found["doctor"].splitlines() if line.startswith("critical")]
    assert len(critical) == 1
    assert READ_ONLY in critical[0]
    command = CommandLine(pair.standby, tmp_path)
    ended = {words: command(*words.split()) for words in MORE_LOOKS}
    assert {words: each.err for words, each in ended.items() if each.code} == {}


def test_a_page_of_a_standby_follows_the_primary(pair: Pair, site: Site) -> None:
    with psycopg.connect(pair.primary) as conn:
        batch_id = batchq.enqueue(conn, "good", {"on": "primary"}, delay_seconds=3600)
    pair.wait()
    assert "primary" in site.client.get(f"/batches/{batch_id}").text
    assert 'batchq_queue_depth{kind="good"' in site.client.get("/metrics").text


def test_an_action_on_a_standby_is_refused_and_changes_nothing(pair: Pair, site: Site) -> None:
    with psycopg.connect(pair.primary) as conn:
        batch_id = batchq.enqueue(conn, "good", delay_seconds=3600)
    pair.wait()
    answer = site.do("cancel", f"?id={batch_id}", id=batch_id)
    assert answer.status_code == 503
    assert "database is read-only, for example a standby; nothing was changed" in answer.text
    with psycopg.connect(pair.primary) as conn:
        status = "SELECT status FROM batchq.batches WHERE id = %s"
        assert conn.execute(status, [batch_id]).fetchone() == ("pending",)


def test_whatever_writes_is_refused_on_a_standby_with_a_reason(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    for command, code in (["enqueue", "good"], 1), (["migrate"], 2), (["pause", "--queue", "default"], 1):
        assert main([*command, "--dsn", pair.standby]) == code
        assert "read-only" in capsys.readouterr().err
    with pytest.raises(batchq.ConfigError, match=READ_ONLY):
        drain(tour.app, pair.standby)


if __name__ == "__main__":
    run_alone(__file__)
