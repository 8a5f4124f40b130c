"""Flows as people see and steer them on the command line."""

import json
from pathlib import Path

import pytest

import batchq as package
from batchq.operate.monitor import Monitor
from batchq.postgres.link import Link
from tests.component.rows import Conn, values
from tests.support.alone import run_alone
from tests.support.commands import CommandLine


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def made(conn: Conn) -> list[int]:
    """Enqueue a diamond, and a batch that waits for its end."""
    top = package.enqueue(conn, "top") or 0
    sides = package.enqueue_each(conn, "side", [{}, {}], after=[top], queue="b")
    bottom = package.enqueue(conn, "bottom", after=sides) or 0
    return [top, *sides, bottom, package.enqueue(conn, "mail", after=[bottom], on_failure="run") or 0]


def test_the_tree_has_below_each_batch_those_that_wait_for_it(batchq: CommandLine, conn: Conn) -> None:
    top, left, right, bottom, mail = made(conn)
    alone = package.enqueue(conn, "alone")
    for shown in (batchq("flow", str(top)).out, batchq("flow", str(mail)).out):
        assert shown.splitlines() == [
            f"{top}  default/top  ready",
            f"  {left}  b/side  waiting for 1",
            f"    {bottom}  default/bottom  waiting for 2",
            f"      {mail}  default/mail  waiting for 1",
            f"  {right}  b/side  waiting for 1",
            f"    {bottom}  default/bottom  waiting for 2  (see above)",
        ]
    assert batchq("flow", str(alone)).out.splitlines() == [f"{alone}  default/alone  ready"]
    assert batchq("flow", "999").err == "batchq: there is no batch 999\n"


def test_a_large_flow_is_counted(batchq: CommandLine, conn: Conn) -> None:
    top = package.enqueue(conn, "top") or 0
    package.enqueue(conn, "last", after=package.enqueue_each(conn, "part", [{}] * 50, after=[top]))
    shown = batchq("flow", str(top), "--limit", "10").out
    assert [line.split() for line in shown.splitlines()[2:]] == [
        ["0", "default", "top", "ready", "1"],
        ["1", "default", "part", "waiting", "50"],
        ["2", "default", "last", "waiting", "1"],
    ]
    read = json.loads(batchq("flow", str(top), "--json").out)
    assert (len(read["batches"]), len(read["edges"]), read["is_cut"]) == (52, 100, False)


def test_a_batch_shows_what_it_waits_for_and_the_status_how_many_wait(batchq: CommandLine, conn: Conn) -> None:
    top, left, _, bottom, mail = made(conn)
    shown = json.loads(batchq("show", str(bottom), "--json").out)
    assert (shown["status"], shown["needs_left"]) == ("waiting", 2)
    assert shown["after"][0] == {"id": left, "queue": "b", "kind": "side", "status": "waiting", "on_failure": "wait"}
    assert "If it fails" in batchq("show", str(mail)).out
    assert "After" not in batchq("show", str(top)).out
    queues = json.loads(batchq("status", "--json").out)["queues"]
    assert {(row["queue"], row["kind"]): row["waiting"] for row in queues} == {
        ("default", "top"): 0, ("b", "side"): 2, ("default", "bottom"): 1, ("default", "mail"): 1,
    }  # fmt: skip
    assert "Waiting" in batchq("status").out
    listed = json.loads(batchq("status", "--status", "waiting", "--json").out)["batches"]
    assert len(listed) == 4


def test_a_monitor_is_done_when_only_a_person_can_let_what_waits_go_on(dsn: str, conn: Conn) -> None:
    link = Link(dsn, 10)
    monitor = Monitor(link, "mail", None)
    needed = package.enqueue(conn, "part", queue="other") or 0
    package.enqueue(conn, "mail", queue="mail", after=[needed])
    assert not monitor.is_done(), "what it waits for can begin"
    conn.execute("SELECT batchq.cancel(%s)", [needed])
    assert not monitor.is_done(), "no worker has looked at the end yet"
    conn.execute("SELECT batchq.follow_flows(0)")
    assert monitor.is_done(), "it waits for a batch that was cancelled"
    link.close()


def test_the_command_line_enqueues_cancels_and_runs_what_waits(batchq: CommandLine, conn: Conn) -> None:
    top, _, right, bottom, mail = made(conn)
    assert batchq("enqueue", "k", "--after", str(top), str(bottom), "--on-failure", "cancel").code == 0
    new = values(conn, "SELECT max(id) FROM batchq.all_batches")[0]
    assert values(conn, "SELECT needs_left FROM batchq.all_batches WHERE id = %s", [new]) == [2]
    assert batchq("run-anyway", str(mail)).out == f"batch {mail} made pending\n"
    for given in (["--all"], ["--kind", "mail"], ["--all", "--dry-run"], []):
        refused = batchq("cancel", "--with-dependents", *given)
        assert (refused.code, refused.err) == (2, "batchq: --with-dependents takes ids of batches, and no filter\n")
    assert (
        batchq("cancel", str(bottom), "--with-dependents").out
        == f"batch {bottom} cancelled, and 1 batch that waits for it\n"
    )
    statuses = "SELECT status FROM batchq.all_batches WHERE id = ANY (%s) ORDER BY id"
    assert values(conn, statuses, [[top, right, bottom, mail, new]]) == [
        "pending", "waiting", "cancelled", "pending", "cancelled",
    ]  # fmt: skip
    assert "cannot wait for 999: no batch has that id" in batchq("enqueue", "k", "--after", "999").err.lower()


if __name__ == "__main__":
    run_alone(__file__)
