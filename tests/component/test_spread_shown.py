"""A batch that is spread, as people see it: on the command line, in bulk actions and in batchq doctor."""

from pathlib import Path
from typing import Any

import pytest

import batchq as package
from batchq.errors import ConfigError
from batchq.operate import doctor
from batchq.operate.monitor import Monitor
from batchq.postgres.link import Link
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.parts import part_rows
from tests.component.rows import (
    Conn,
    Taken,
    checkpoint,
    claim,
    expire_lease,
    failure,
    finish,
    insert,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.commands import CommandLine
from tests.support.scene import set_spread
from tests.support.steps import step


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def half_way(conn: Conn) -> tuple[int, list[Taken]]:
    """Return a batch of 400 items in 4 parts: one has ended, one runs with 40 of its items done and one failed."""
    whole, taken = set_spread(conn)
    for part, progress in zip(
        taken, (Progress(100, 0), Progress(40, 1, [failure(7, "ValueError: bad")], first_index=0)), strict=True
    ):
        assert checkpoint(conn, part, progress) == 1
    finish(conn, Finish(taken[0].id, taken[0].token, "completed"))
    conn.execute("SELECT batchq.follow_flows(0)")
    return whole, taken


# -------------------------------------------------------------------------------------------------- the commands


def test_show_has_the_parts_of_a_batch(batchq: CommandLine, conn: Conn) -> None:
    whole, taken = half_way(conn)
    shown = batchq("show", str(whole), "--json").json
    assert (shown["status"], shown["items_done"], shown["items_failed"], shown["attempt"]) == ("processing", 140, 1, 1)
    assert [item["item_index"] for item in shown["failed_items"]] == [107]
    assert [
        (part["first_item"], part["last_item"], part["status"], part["items_done"], part["items_failed"])
        for part in shown["parts"]
    ] == [
        (0, 99, "completed", 100, 0), (100, 199, "processing", 40, 1), (200, 299, "ready", 0, 0),
        (300, 399, "ready", 0, 0),
    ]  # fmt: skip
    assert shown["parts"][1]["claimed_by"] == "jobs-2-4412-5eed2"
    lines = [" ".join(line.split()) for line in batchq("show", str(whole)).out.splitlines()]
    assert "Parts: 4: 2 ready, 1 completed, 1 processing" in lines
    [line] = [line for line in lines if "items 100 to 199" in line]
    assert line.startswith(f"{taken[1].id} items 100 to 199 processing")
    assert line.endswith("40 done, 1 failed, of 100 1/5 jobs-2-4412-5eed2")
    assert not [line for line in lines if "items 200 to 299" in line], "it has nothing to tell yet"


def test_a_batch_that_is_not_spread_has_no_parts(batchq: CommandLine, conn: Conn) -> None:
    alone = str(insert(conn, items=[1]))
    assert batchq("show", alone, "--json").json["parts"] == []
    assert "Parts" not in batchq("show", alone).out


def test_show_says_that_a_part_is_one(batchq: CommandLine, conn: Conn) -> None:
    whole, taken = half_way(conn)
    for part, status in zip(taken, ("completed", "processing"), strict=True):
        ended = batchq("show", str(part.id))
        first = 100 * taken.index(part)
        assert ended.code == 0
        assert ended.out.startswith(
            f"Batch {part.id} is a part of batch {whole}: items {first} to {first + 99}. "
            f"For all of it: batchq show {whole}\n"
        )
        found = batchq("show", str(part.id), "--json").json
        assert (found["part_of"], found["status"], found["first_item"]) == (whole, status, first)
    for command in ("watch", "logs", "flow"):
        assert batchq(command, str(taken[1].id)).err == (
            f"batchq: batch {taken[1].id} is a part of batch {whole}: use {whole}\n"
        )
    assert batchq("show", "999").err == "batchq: there is no batch 999\n"


def test_status_top_and_logs_show_one_batch(batchq: CommandLine, conn: Conn) -> None:
    whole, _ = half_way(conn)
    for options in (["status"], ["status", "--status", "processing"], ["top"]):
        shown = batchq(*options, "--json").json
        [row] = shown.get("running") or shown["batches"]
        assert (row["id"], row["status"], row["items_done"]) == (whole, "processing", 140), options
    assert batchq("status", "--status", "waiting", "--json").json["batches"] == []
    assert "140 done, 1 failed, of 400" in batchq("top").out
    assert f"attempt 1 runs, in parts: batchq show {whole}" in batchq("logs", str(whole)).out


def test_counts_of_parts_stay_after_the_whole_has_counted_them(dsn: str, conn: Conn) -> None:
    app = package.App()

    @app.item_handler("work", backoff=package.Backoff(0, 0))
    def work(item: Any) -> None:
        if item in (0, 30):
            raise ValueError(item)

    whole = package.enqueue(conn, "work", items=list(range(40)), spread=4, max_attempts=1) or 0
    drain(app, dsn)
    assert value(conn, "SELECT status FROM batchq.status") == "failed"
    assert [(row["status"], row["items_done"], row["items_failed"]) for row in part_rows(conn, whole)] == [
        ("completed", 9, 1), ("completed", 10, 0), ("completed", 10, 0), ("completed", 9, 1),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the monitor


def test_a_monitor_waits_for_the_whole_and_shows_its_progress(dsn: str, conn: Conn) -> None:
    whole, taken = set_spread(conn, 100, 2, 2)
    monitor = Monitor(Link(dsn, 10))
    assert [(row["id"], row["status"], row["items_done"]) for row in monitor.changes()] == [(whole, "processing", 0)]
    checkpoint(conn, taken[0], Progress(10, 0))
    assert [(row["id"], row["items_done"]) for row in monitor.changes()] == [(whole, 10)]
    for part, count in zip(taken, (40, 50), strict=True):
        checkpoint(conn, part, Progress(count, 0))
        finish(conn, Finish(part.id, part.token, "completed"))
    assert values(conn, "SELECT count(*) FROM batchq.queues WHERE ready + processing + waiting > 0") == [0]
    assert not monitor.is_done(), "nobody has counted its parts yet"
    assert not Monitor(monitor.link, "default", "work").is_done()
    assert Monitor(monitor.link, "other").is_done()
    conn.execute("SELECT batchq.follow_flows(0)")
    assert not monitor.is_done(), "it is ready again"
    [row] = claim(conn)
    assert row.id == whole
    conn.execute("SELECT batchq.cancel(%s)", [whole])
    assert monitor.is_done()
    monitor.link.close()


# --------------------------------------------------------------------------------------------------- bulk, doctor


def test_bulk_knows_it_as_processing_and_not_as_waiting(conn: Conn) -> None:
    whole, _ = half_way(conn)
    assert values(conn, """SELECT matched FROM batchq.bulk('cancel', '{"status": "waiting"}')""") == [0]
    assert values(conn, """SELECT changed FROM batchq.bulk('cancel', '{"status": "processing"}')""") == [1]
    assert values(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [whole]) == ["cancelled"]
    assert values(conn, "SELECT count(*) FROM batchq.batches_live") == [0]


def found(dsn: str, check: str) -> doctor.Finding:
    """Return the first finding of a check."""
    return next(one for one in doctor.findings(dsn) if one.check == check)


def test_doctor_names_parts_in_trouble_by_their_whole(dsn: str, conn: Conn) -> None:
    whole, taken = half_way(conn)
    assert "2 ready, and no live worker has a handler" in found(dsn, "kind_without_a_worker").evidence
    assert found(dsn, "poisoned").severity == found(dsn, "parts_that_nobody_counts").severity == "ok"
    step("its worker dies, again and again")
    expire_lease(conn, taken[1].id, 60)
    assert f"batch {taken[1].id} of kind work, a part of batch {whole}: " in found(dsn, "stalled").evidence
    died = """[{"error": "worker died: w gave no sign of life"}, {"error": "worker died: x gave no sign of life"}]"""
    conn.execute("UPDATE batchq.batches SET errors = %s::jsonb WHERE id = %s", [died, taken[1].id])
    finding = found(dsn, "poisoned")
    assert finding.evidence == (
        f"batch {whole} of kind work: its worker died 2 times, attempt 1 of 5, with items 100 to 199"
    )
    assert f"batchq cancel {whole} stops it" in finding.remedy


def test_doctor_names_a_batch_whose_parts_nobody_counts(dsn: str, conn: Conn) -> None:
    whole, taken = set_spread(conn, 100, 2, 2)
    for part in taken:
        checkpoint(conn, part, Progress(50, 0))
        finish(conn, Finish(part.id, part.token, "completed"))
    conn.execute("UPDATE batchq.batches SET claimed_at = now() - interval '1 hour' WHERE id = %s", [whole])
    assert found(dsn, "parts_that_nobody_counts").severity == "ok", "it has just happened"
    conn.execute("UPDATE batchq.batches_finished SET finished_at = now() - interval '2 minutes'")
    assert found(dsn, "parts_that_nobody_counts").evidence == (
        f"batch {whole} of kind work: all its parts have ended, and no worker has counted them"
    )


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("spread", ["0", "-1", "1001", "many"])
def test_enqueue_refuses_a_number_of_parts_that_does_not_fit(batchq: CommandLine, conn: Conn, spread: str) -> None:
    ended = batchq("enqueue", "work", "--lines", "-", "--spread", spread, stdin="a\n")
    assert ended.code == 2
    assert f"argument --spread: must be a number of parts, 1 to 1000, not '{spread}'" in ended.err
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


def test_enqueue_refuses_parts_without_items(batchq: CommandLine, conn: Conn) -> None:
    ended = batchq("enqueue", "work", "--spread", "4")
    assert ended.complaint == "--spread is for a list of items: give it with --items, --lines or --csv"
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


def test_a_queue_with_a_space_in_its_name_needs_a_comma() -> None:
    with pytest.raises(ConfigError, match="use a comma between queues: mail,bulk,slow;"):
        package.Settings.load(queues="mail bulk  slow")
    with pytest.raises(ConfigError, match="use a comma between queues: mail:5,bulk;"):
        package.Settings.load(queues="mail:5 bulk")
    assert package.Settings.load(queues="mail bulk,").queues == ("mail bulk",)
    assert package.Settings.load(queues="mail, bulk").queues == ("mail", "bulk")
    assert package.Settings.load(queues=("mail bulk",)).queues == ("mail bulk",)


if __name__ == "__main__":
    run_alone(__file__)
