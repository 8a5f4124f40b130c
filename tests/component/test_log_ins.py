"""How often a command logs in: once, however many batches it is about and however long it runs.

Each log-in is a connection, and through a pooler across a far line a tenth of a second and more.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from rich.console import Console

import batchq
from batchq.cli import connections, main
from batchq.cli.commands import status, top
from batchq.cli.top.source import Source
from batchq.operate import bulk
from batchq.postgres.statements import views
from batchq.web.reads import POOL_SIZE
from tests.component.rows import values
from tests.instruments.bench.proxy import DelayingProxy
from tests.instruments.chaos.proxy import FaultyProxy
from tests.support.alone import run_alone
from tests.support.batches import look, put
from tests.support.steps import step
from tests.support.web import served

Conn = psycopg.Connection[Any]
LOOKS = 5


class CountingProxy(DelayingProxy):
    """A line without delay that counts who connects: a log-in each, since nobody asks for TLS first."""

    @property
    def log_ins(self) -> int:
        """How often somebody connected."""
        return len(self.sockets) // 2


@pytest.fixture
def proxy(dsn: str) -> Iterator[CountingProxy]:
    """Return the line to the test's database."""
    with CountingProxy(dsn, 0) as proxy:
        yield proxy


@pytest.fixture
def command(proxy: CountingProxy) -> Callable[..., int]:
    """Return what runs a command in this process; it returns the command's exit code."""
    return lambda *words: main([*words, "--dsn", proxy.dsn])


@pytest.fixture
def ids(conn: Conn) -> list[str]:
    """Return the ids of a hundred batches."""
    assert batchq.enqueue_many(conn, "work", [{}] * 100) == 100
    return [str(id_) for id_ in values(conn, "SELECT id FROM batchq.all_batches")]


def after(looks: int, monkeypatch: pytest.MonkeyPatch, query: str, act: Callable[[], Any]) -> None:
    """Have *act* done once a statement has been asked so often."""
    asked, original = [], getattr(views, query)

    def counted(*given: Any) -> Any:
        found = original(*given)
        asked.append(1)
        if len(asked) == looks:
            act()
        return found

    monkeypatch.setattr(views, query, counted)


def test_a_verb_logs_in_once_for_a_hundred_batches(
    proxy: CountingProxy, command: Callable[..., int], ids: list[str], conn: Conn
) -> None:
    verbs = (["snooze", "--for", "0s"], ["priority", "--to", "3"], ["move", "--to", "mail"], ["cancel"], ["retry"])
    for number, (verb, *more) in enumerate(verbs, 1):
        step("%s", verb)
        assert command(verb, *ids, *more) == 0
        assert proxy.log_ins == number
    assert values(conn, "SELECT DISTINCT queue || priority || status FROM batchq.all_batches") == ["mail3pending"]


@pytest.mark.usefixtures("ids")
def test_a_verb_in_bulk_logs_in_once_for_all_chunks(
    proxy: CountingProxy, command: Callable[..., int], conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "MOST_CHANGED", 10)
    assert command("cancel", "--all", "--fast") == 0
    assert values(conn, "SELECT DISTINCT status FROM batchq.all_batches") == ["cancelled"]
    assert proxy.log_ins == 1


def test_watch_logs_in_once_however_long_it_looks(
    proxy: CountingProxy, command: Callable[..., int], conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = put(conn, "work")
    after(LOOKS, monkeypatch, "status_row", lambda: conn.execute("SELECT batchq.cancel(%s)", [batch_id]))
    assert command("watch", str(batch_id), "--every-seconds", "0.01") == 3
    assert look(conn, batch_id).status == "cancelled"
    assert proxy.log_ins == 1


def test_watch_goes_on_when_its_connection_is_lost_at_the_commit_of_a_look(
    dsn: str,
    conn: Conn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batch_id = put(conn, "work")
    with FaultyProxy(dsn) as line:

        def cut_the_next_commit() -> None:
            line.cut_share = 1.0

        def end_well(_: float) -> None:
            line.cut_share = 0.0
            conn.execute("SELECT batchq.cancel(%s)", [batch_id])

        after(LOOKS, monkeypatch, "status_row", cut_the_next_commit)
        monkeypatch.setattr(connections, "time", SimpleNamespace(sleep=end_well))
        assert main(["watch", str(batch_id), "--every-seconds", "0.01", "--dsn", line.dsn]) == 3
    assert line.cuts == 1
    assert "the database is unavailable" in capsys.readouterr().err


def test_monitor_logs_in_once_however_long_it_looks(
    proxy: CountingProxy, command: Callable[..., int], conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = put(conn, "work")
    after(LOOKS, monkeypatch, "queue_rows", lambda: conn.execute("SELECT batchq.cancel(%s)", [batch_id]))
    assert command("monitor", "--until-done", "--every-seconds", "0.01") == 0
    assert look(conn, batch_id).status == "cancelled"
    assert proxy.log_ins == 1


def test_a_status_that_is_redrawn_logs_in_once(
    proxy: CountingProxy, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == LOOKS:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep))
    assert command("status", "--watch") == 130
    assert len(slept) == LOOKS
    assert proxy.log_ins == 1


def test_top_logs_in_once_and_its_threads_take_turns(
    proxy: CountingProxy, command: Callable[..., int], conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = put(conn, "work")
    seen: list[Any] = []

    def run(source: Source, *_: Any) -> None:
        with ThreadPoolExecutor(4) as threads:
            asked = [
                threads.submit(source.tables) if n % 2 else threads.submit(source.page, batch_id)
                for n in range(4 * LOOKS)
            ]
            seen.extend(each.result() for each in asked)

    monkeypatch.setattr(top, "console", lambda: Console(force_terminal=True))
    monkeypatch.setattr(top, "load_app", lambda: SimpleNamespace(run=run))
    assert command("top") == 0
    assert len(seen) == 4 * LOOKS
    assert all(seen)
    assert proxy.log_ins == 1


ONCE: dict[str, list[str]] = {
    "migrate": ["migrate"],
    "check": ["check"],
    "invariants": ["check", "--invariants"],
    "enqueue": ["enqueue", "work"],
    "status": ["status"],
    "show": ["show", "ID"],
    "logs": ["logs", "ID"],
    "top": ["top", "--json"],
    "pause": ["pause", "--queue", "mail"],
    "pauses": ["pause"],
    "audit": ["audit"],
    "prune": ["prune"],
}


@pytest.mark.parametrize("words", ONCE.values(), ids=ONCE)
def test_a_command_that_looks_once_logs_in_once(
    proxy: CountingProxy, command: Callable[..., int], conn: Conn, words: list[str]
) -> None:
    batch_id = put(conn, "work", delay_seconds=60)
    assert command(*[word.replace("ID", str(batch_id)) for word in words]) == 0
    assert proxy.log_ins == 1


def test_a_file_of_items_is_enqueued_over_one_log_in(
    proxy: CountingProxy, command: Callable[..., int], conn: Conn, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_text("item\n" * 100)
    assert command("enqueue", "work", "--lines", str(tmp_path / "lines"), "--items-per-batch", "1") == 0
    assert len(values(conn, "SELECT id FROM batchq.all_batches")) == 100
    assert proxy.log_ins == 1


def test_the_doctor_logs_in_twice_to_see_what_a_pooler_does(proxy: CountingProxy, command: Callable[..., int]) -> None:
    assert command("doctor") in (0, 1)
    assert proxy.log_ins == 2


def test_the_page_logs_in_as_often_as_its_pool_has_room(proxy: CountingProxy) -> None:
    with served(proxy.dsn) as site, ThreadPoolExecutor(2 * POOL_SIZE) as threads:
        for _ in range(3):
            pages = threads.map(lambda _: site.client.get("/").status_code, range(4 * POOL_SIZE))
            assert set(pages) == {200}
        assert 1 <= proxy.log_ins <= POOL_SIZE


if __name__ == "__main__":
    run_alone(__file__)
