"""Verbs in bulk: batchq.bulk, chunk by chunk, and the commands that go through all of them."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from batchq.operate.bulk import Bulk, LeftOut, Runner
from batchq.postgres.link import Link
from batchq.postgres.statements import endings
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from tests.component.rows import (
    KIND,
    Conn,
    batch,
    checkpoint,
    claim,
    failure,
    finish,
    finished,
    insert,
    processing,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.steps import step
from tests.support.terminals import on_terminal
from tests.support.waiting import wait_until

AUDIT = "SELECT verb, batches, queue, kind, reason, actor FROM batchq.audit ORDER BY id"


def bulk(conn: Conn, verb: str, filter_: dict[str, Any] | None = None, most: int = 1000, **given: Any) -> int:
    """Do a verb in bulk to its end; return how many batches it changed."""
    return sum(changed for _, changed in chunks(conn, verb, filter_ or {}, most, **given))


def chunks(
    conn: Conn, verb: str, filter_: dict[str, Any], most: int, *, dry_run: bool = False, **change: Any
) -> Iterator[tuple[int, int]]:
    """Do a verb in bulk; yield of each chunk how many batches matched, and how many were changed."""
    place, audit = None, None
    while True:
        row = conn.execute(
            "SELECT matched, changed, next_place, audit FROM batchq.bulk(%s, %s, %s, %s, %s, %s, 'why', 'ann', %s)",
            [verb, Jsonb(filter_), Jsonb(change), place, dry_run, most, audit],
        ).fetchone()
        assert row
        yield row[0], row[1]
        place, audit = row[2] and Jsonb(row[2]), row[3]
        if row[2] is None:
            return


def add(conn: Conn, count: int, status: str = "pending", **columns: Any) -> list[int]:
    """Insert *count* batches, each a second older than the one before; return their ids."""
    given = {"kind": KIND, "queue": "default", "error": "no", "hours": 0} | columns
    is_final = status in ("failed", "completed", "cancelled")
    given |= {"status": status, "count": count, "is_final": is_final}
    statement = sql.SQL(
        "INSERT INTO batchq.{} (id, kind, queue, status, errors, created_at, finished_at) OVERRIDING SYSTEM VALUE "
        "SELECT nextval(pg_get_serial_sequence('batchq.batches', 'id')), %(kind)s, %(queue)s, %(status)s, "
        "jsonb_build_array(jsonb_build_object('error', %(error)s::text)), "
        "now() - %(hours)s * interval '1 hour' - n * interval '1 second', "
        "CASE WHEN %(is_final)s THEN now() - %(hours)s * interval '1 hour' - n * interval '1 second' END "
        "FROM generate_series(1, %(count)s) n RETURNING id"
    ).format(sql.Identifier("batches_finished" if is_final else "batches_live"))
    return values_of(conn.execute(statement, given).fetchall())


def values_of(rows: list[tuple[Any, ...]]) -> list[Any]:
    """Return the first value of each row."""
    return [row[0] for row in rows]


def statuses(conn: Conn) -> dict[str, int]:
    """Return how many batches have each status."""
    return dict(conn.execute("SELECT status, count(*) FROM batchq.all_batches GROUP BY status").fetchall())


# ------------------------------------------------------------------------------------------------------ all verbs


@pytest.mark.parametrize("most", [7, 1000])
def test_a_retry_in_bulk_makes_all_failed_batches_pending(conn: Conn, most: int) -> None:
    ids = add(conn, 50, "failed", kind="mail")
    add(conn, 3, "cancelled")
    add(conn, 3, "completed")
    found = list(chunks(conn, "retry", {}, most))
    assert [changed for _, changed in found if changed] == ([7] * 7 + [1] if most == 7 else [50])
    assert {row.id for row in claim(conn, kinds=["mail"])} == set(ids)
    assert statuses(conn) == {"processing": 50, "cancelled": 3, "completed": 3}
    step("one row of the audit for all chunks")
    assert conn.execute(AUDIT).fetchall() == [("retry", 50, None, None, "why", "ann")]
    assert bulk(conn, "retry") == 0
    assert conn.execute(AUDIT).fetchall() == [("retry", 50, None, None, "why", "ann")]


@pytest.mark.parametrize("most", [3, 100])
def test_a_retry_in_bulk_ends_though_its_batches_fail_again_at_once(conn: Conn, most: int) -> None:
    add(conn, 10, "failed", kind="mail")
    changed = 0
    for number, (_, more) in enumerate(chunks(conn, "retry", {}, most)):
        assert number < 20, "it goes on for ever"
        changed += more
        token = uuid4()
        for taken in claim(conn, kinds=["mail"], token=token):
            finish(conn, Finish(taken.id, token, "failed", error='{"error": "again"}'))
    assert changed == 10
    assert statuses(conn) == {"failed": 10}
    step("done again, it takes them again")
    assert bulk(conn, "retry") == 10


def test_a_batch_retried_in_bulk_is_as_one_retried_alone(conn: Conn) -> None:
    def half_done() -> int:
        taken = processing(conn, items=[0, 1, 2, 3], payload={"a": 1}, priority=3, max_attempts=2, max_failed_items=1)
        failures = [failure(1), failure(2, retryable=False)]
        checkpoint(conn, taken, Progress(2, 2, failures, first_index=0, keeps_cursor=False, cursor='"here"'))
        finish(conn, endings.Finish(*taken, "failed", error='{"error": "no"}'))
        return taken.id

    for whole in (False, True):
        alone, in_bulk = half_done(), half_done()
        conn.execute("SELECT batchq.retry(%s, %s)", [alone, whole])
        assert bulk(conn, "retry", whole=whole) == 1
        for name, expected in batch(conn, alone).items():
            if name not in ("id", "run_at", "created_at", "errors"):
                assert batch(conn, in_bulk)[name] == expected, name
        items = "SELECT item_index, attempt, retryable FROM batchq.failed_items WHERE batch_id = %s ORDER BY 1"
        assert conn.execute(items, [in_bulk]).fetchall() == conn.execute(items, [alone]).fetchall()
        conn.execute("DELETE FROM batchq.batches")


def test_a_retry_in_bulk_leaves_what_would_meet_a_live_batch_of_its_key(conn: Conn) -> None:
    for number in range(4):
        finished(conn, "failed", unique_key=f"key {number // 2}")
    finished(conn, "failed", unique_key="live")
    insert(conn, unique_key="live")
    assert list(chunks(conn, "retry", {}, 1000)) == [(5, 2)]
    assert statuses(conn) == {"pending": 3, "failed": 3}
    assert values(conn, "SELECT unique_key FROM batchq.batches_live ORDER BY 1") == ["key 0", "key 1", "live"]


def test_a_retry_of_completed_batches_takes_those_with_failed_items_or_whole_ones(conn: Conn) -> None:
    add(conn, 3, "completed")
    taken = processing(conn, items=[1, 2], max_failed_items=1)
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
    finish(conn, endings.Finish(*taken, "completed"))
    assert bulk(conn, "retry", {"status": "completed"}) == 1
    assert [row.id for row in claim(conn)] == [taken.id]
    assert bulk(conn, "retry", {"status": "completed"}, whole=True) == 3


def test_retrying_items_in_bulk_takes_those_with_failed_items(conn: Conn) -> None:
    add(conn, 3, "failed")
    taken = processing(conn, items=[1, 2])
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
    finish(conn, endings.Finish(*taken, "failed"))
    assert bulk(conn, "retry_items") == 1
    assert [row.id for row in claim(conn)] == [taken.id]


def test_a_cancel_in_bulk_takes_what_waits_and_what_runs(conn: Conn) -> None:
    add(conn, 20)
    taken = processing(conn, kind="other")
    assert bulk(conn, "cancel", {"status": "processing"}) == 1
    assert bulk(conn, "cancel", most=6) == 20
    assert statuses(conn) == {"cancelled": 21}
    assert finish(conn, endings.Finish(*taken, "completed")) == set()
    assert batch(conn, taken.id)["errors"][-1]["error"] == "cancelled: why"


def test_snooze_priority_and_queue_change_in_bulk_what_is_pending(conn: Conn) -> None:
    ids = add(conn, 20)
    other = processing(conn, kind="other").id
    assert [bulk(conn, "snooze", most=6, delay_seconds=3600), claim(conn)] == [20, []]
    assert [bulk(conn, "snooze", most=6, until="2001-01-01") for _ in range(2)] == [20, 0]
    assert [bulk(conn, "set_priority", most=6, priority=-1) for _ in range(2)] == [20, 0]
    assert [bulk(conn, "move", most=6, to_queue="slow") for _ in range(2)] == [20, 0]
    assert {row.id for row in claim(conn, queue="slow", priority=-1)} == set(ids)
    assert batch(conn, other)["queue"] == "default"
    assert values_of(conn.execute(AUDIT).fetchall()) == ["snooze", "snooze", "set_priority", "move"]


def test_a_move_in_bulk_leaves_what_would_meet_its_key_and_takes_failed_items_along(conn: Conn) -> None:
    insert(conn, unique_key="a", queue="slow")
    stays = insert(conn, unique_key="a")
    for queue in ("default", "other"):
        insert(conn, unique_key="b", queue=queue)
    taken = processing(conn, items=[1, 2], priority=1)
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
    finish(conn, endings.Finish(*taken, "failed"))
    conn.execute("SELECT batchq.retry(%s)", [taken.id])
    assert list(chunks(conn, "move", {}, 1000, to_queue="slow")) == [(4, 2)], (
        "the one that is there already is no match"
    )
    assert batch(conn, stays)["queue"] == "default"
    assert values(conn, "SELECT queue FROM batchq.failed_items") == ["slow"]


# --------------------------------------------------------------------------------------------------------- filters

FILTERS: list[tuple[dict[str, Any], str]] = [
    ({}, "abcdef"),
    ({"kind": "mail"}, "acdf"),
    ({"queue": "slow"}, "cd"),
    ({"error_like": "TIME"}, "bdf"),
    ({"error_like": "%out"}, "bd"),
    ({"older_than_seconds": 5 * 3600}, "def"),
    ({"kind": "mail", "queue": "slow", "error_like": "no", "older_than_seconds": 60}, "c"),
    ({"kind": "none"}, ""),
]


@pytest.mark.parametrize(("filter_", "expected"), FILTERS, ids=lambda given: "-".join(given) or "none")
@pytest.mark.parametrize("status", ["failed", "cancelled", "pending"])
def test_a_filter_takes_what_fits_all_of_it(conn: Conn, status: str, filter_: dict[str, Any], expected: str) -> None:
    kinds = {"a": "mail", "b": "sms", "c": "mail", "d": "mail", "e": "sms", "f": "mail"}
    names = {}
    for number, (name, kind) in enumerate(kinds.items()):
        queue = "slow" if name in "cd" else "default"
        error = {"b": "time out", "d": "Time out", "f": "time over"}.get(name, "no")
        [batch_id] = add(conn, 1, status, kind=kind, queue=queue, error=error, hours=2 * number)
        names[batch_id] = name
    verb = "snooze" if status == "pending" else "retry"
    change = {"until": "2100-01-01"} if status == "pending" else {}
    given = filter_ if status in ("failed", "pending") else filter_ | {"status": status}
    expected_count = len(expected)
    assert [found for found, _ in chunks(conn, verb, given, 1000, dry_run=True, **change)] == [expected_count]
    assert bulk(conn, verb, given, most=2, **change) == expected_count
    changed = "SELECT id FROM batchq.batches_live WHERE run_at > now() OR errors <> '[]' AND %s"
    live = values(conn, changed, [status != "pending"])
    assert "".join(sorted(names[batch_id] for batch_id in live)) == expected


@pytest.mark.parametrize(
    ("verb", "filter_", "change", "message"),
    [
        ("dance", {}, {}, "has no verb 'dance'"),
        ("cancel", {"colour": "red"}, {}, 'has no filter {"colour": "red"}'),
        ("cancel", {"status": "failed"}, {}, "cancel does not apply to batches that are failed"),
        ("retry", {"status": "pending"}, {}, "retry does not apply to batches that are pending"),
        ("snooze", {}, {}, "does not fit the verb snooze"),
        ("cancel", {}, {"priority": 1}, "does not fit the verb cancel"),
        ("move", {}, {"until": "2100-01-01"}, "does not fit the verb move"),
    ],
)
def test_what_makes_no_sense_is_refused(
    conn: Conn, verb: str, filter_: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match=message):
        bulk(conn, verb, filter_, **change)


# ---------------------------------------------------------------------------------------------------------- chunks


def test_a_dry_run_counts_and_changes_nothing(conn: Conn) -> None:
    add(conn, 30, "failed")
    assert list(chunks(conn, "retry", {}, 1000, dry_run=True)) == [(30, 0)]
    assert statuses(conn) == {"failed": 30}
    assert conn.execute(AUDIT).fetchall() == []


def test_what_is_locked_is_left_and_not_waited_for(conn: Conn, dsn: str) -> None:
    failed, pending = add(conn, 5, "failed"), add(conn, 5)
    with psycopg.connect(dsn, prepare_threshold=None) as other:
        other.execute("SELECT FROM batchq.batches_live WHERE id = ANY (%s) FOR UPDATE", [pending[:1]])
        other.execute("SELECT FROM batchq.batches_finished WHERE id = ANY (%s) FOR UPDATE", [failed[:1]])
        with conn.transaction():
            conn.execute("SET LOCAL statement_timeout = '5s'")
            assert list(chunks(conn, "set_priority", {}, 1000, priority=3)) == [(5, 4)]
            assert list(chunks(conn, "retry", {}, 1000)) == [(5, 4)]
            assert list(chunks(conn, "cancel", {"status": "pending"}, 1000)) == [(9, 8)]
    assert statuses(conn) == {"failed": 1, "pending": 1, "cancelled": 8}


def test_a_step_goes_through_its_queues_in_one_order_so_that_two_of_them_cannot_deadlock(conn: Conn) -> None:
    queues = [f"q{7 * number % 40:02}" for number in range(40)]
    for queue in queues:
        insert(conn, queue=queue)
    assert value(conn, "SELECT changed FROM batchq.bulk('cancel')") == 40
    step("the rows of finished batches lie in the order in which they were written")
    written = values(conn, "SELECT queue FROM batchq.batches_finished ORDER BY tableoid, ctid")
    assert written == sorted(queues) != queues


def test_what_has_changed_since_it_was_found_is_left_as_it_is(conn: Conn) -> None:
    cancelled, completed, running = finished(conn, "cancelled"), finished(conn, "completed"), processing(conn).id
    before = [batch(conn, batch_id) for batch_id in (cancelled, completed, running)]
    retry = "SELECT changed FROM batchq.revive('default', %s, %s, false, '-infinity', 'infinity')"
    assert value(conn, retry, [[cancelled, completed], "failed"]) == 0
    step("nothing of it failed, so it is not what a retry of completed ones is for")
    assert value(conn, retry, [[completed], "completed"]) == 0
    assert value(conn, "SELECT batchq.cancel_live('default', %s, '{pending}', 'why')", [[running]]) == 0
    assert value(conn, "SELECT changed FROM batchq.change_pending('default', %s, new_priority => 5)", [[running]]) == 0
    assert [batch(conn, batch_id) for batch_id in (cancelled, completed, running)] == before


@pytest.mark.parametrize(("whole", "left"), [(True, []), (False, [0])])
def test_a_retry_in_bulk_leaves_the_failed_items_of_other_batches(conn: Conn, whole: bool, left: list[int]) -> None:
    ids = []
    for kind in ("mail", "sms"):
        taken = processing(conn, items=[1, 2], kind=kind)
        checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
        finish(conn, endings.Finish(*taken, "failed"))
        ids.append(taken.id)
    assert bulk(conn, "retry", {"kind": "mail"}, whole=whole) == 1
    items = "SELECT attempt FROM batchq.failed_items WHERE batch_id = %s"
    assert [values(conn, items, [batch_id]) for batch_id in ids] == [left, [1]]


def test_few_that_match_among_many_are_found_in_bounded_looks(conn: Conn) -> None:
    add(conn, 45_000, kind="many")
    add(conn, 3, kind="few")
    looks = list(chunks(conn, "cancel", {"kind": "few"}, 1000))
    assert looks == [(0, 0), (0, 0), (3, 3)]


def test_batches_of_all_days_are_found(conn: Conn) -> None:
    conn.execute("SELECT batchq.create_finished_partitions((now() - interval '4 days')::date, 3)")
    for days in range(5):
        add(conn, 4, "failed", hours=24 * days)
    assert bulk(conn, "retry", {"older_than_seconds": 36 * 3600}, most=3) == 12
    assert bulk(conn, "retry", most=3) == 8


# ------------------------------------------------------------------------------------------------ the command line


def fail_again(conn: Conn) -> None:
    """Run all that is ready, as a worker whose handler fails at once, for good."""
    token = uuid4()
    if ready := claim(conn, 5000, token=token):
        finish(conn, *(Finish(taken.id, token, "failed", error='{"error": "again"}') for taken in ready))


@pytest.mark.parametrize("has_counted", [True, False], ids=["counted", "uncounted"])
def test_a_retry_in_bulk_takes_each_batch_once_though_some_are_left_out(
    conn: Conn, dsn: str, has_counted: bool
) -> None:
    add(conn, 2997, "failed")
    keyed, locked = finished(conn, "failed", unique_key="a"), finished(conn, "failed")
    insert(conn, unique_key="a", run_at="2100-01-01")
    link = Link(dsn, 10)
    retry = Bulk("retry", {}, state="counting" if has_counted else "changing")
    runner = Runner(link, retry, pause_factor=0)
    with closing(link), psycopg.connect(dsn, prepare_threshold=None) as other:
        other.execute("SELECT FROM batchq.batches_finished WHERE id = %s FOR UPDATE", [locked])
        assert not has_counted or runner.count() == 2999
        for _ in runner.changes():
            fail_again(conn)
    assert retry.changed == 2997
    assert values(conn, "SELECT batches FROM batchq.audit") == [2997]
    untouched = "SELECT id FROM batchq.all_batches WHERE status = 'failed' AND errors -> -1 ->> 'error' <> 'again'"
    assert set(values(conn, untouched)) <= {keyed, locked}
    if has_counted:
        assert retry.left_out() == LeftOut(keyed=1, locked=1)


def test_no_more_is_changed_than_was_counted(conn: Conn, dsn: str) -> None:
    add(conn, 1500)
    link = Link(dsn, 10)
    cancel = Bulk("cancel", {})
    runner = Runner(link, cancel, pause_factor=0)
    with closing(link):
        assert runner.count() == 1500
        step("one that was inserted before the count, in a transaction that ended after it")
        add(conn, 3, hours=1)
        for _ in runner.changes():
            pass
    assert (cancel.changed, statuses(conn)) == (1500, {"cancelled": 1500, "pending": 3})


def test_a_snooze_for_a_while_is_done_once_though_some_are_locked(conn: Conn, dsn: str) -> None:
    ids = add(conn, 5)
    link = Link(dsn, 10)
    snooze = Bulk("snooze", {}, {"delay_seconds": 600})
    runner = Runner(link, snooze, pause_factor=0)
    with closing(link), psycopg.connect(dsn, prepare_threshold=None) as other:
        other.execute("SELECT FROM batchq.batches_live WHERE id = %s FOR UPDATE", [ids[0]])
        runner.count()
        for _ in runner.changes():
            pass
    assert (snooze.changed, snooze.left_out()) == (4, LeftOut(locked=1))
    assert (
        value(conn, "SELECT count(DISTINCT run_at) FROM batchq.all_batches WHERE run_at > now() + interval '9 min'")
        == 1
    )


def test_what_was_not_old_enough_at_the_beginning_is_left(conn: Conn) -> None:
    add(conn, 1, hours=1)
    before = "SELECT to_jsonb(now() - interval '30 minutes') #>> '{}'"
    then = value(conn, before)
    assert bulk(conn, "cancel", {"older_than_seconds": 3000, "before": then}) == 0
    assert bulk(conn, "cancel", {"older_than_seconds": 1500, "before": then}) == 1


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def test_a_dry_run_says_how_many(batchq: CommandLine, conn: Conn) -> None:
    add(conn, 1500, "failed", kind="mail")
    add(conn, 30, "failed", hours=3)
    ended = batchq("retry", "--kind", "mail", "--dry-run")
    assert (ended.code, ended.out) == (0, "1,500 batches would be made pending again\n"), ended.err
    assert batchq("retry", "--older-than", "2h", "--dry-run", "--json").json["matched"] == 30
    assert statuses(conn) == {"failed": 1530}


def test_a_retry_by_filter_says_what_it_did_and_notes_it(batchq: CommandLine, conn: Conn) -> None:
    add(conn, 1500, "failed", error="time out")
    add(conn, 30, "failed")
    ended = batchq("retry", "--error-like", "time out", "--reason", "mended", "--actor", "ann")
    assert (ended.code, ended.out) == (0, "1,500 batches made pending again\n"), ended.err
    assert statuses(conn) == {"failed": 30, "pending": 1500}
    assert conn.execute(AUDIT).fetchall() == [("retry", 1500, None, None, "mended", "ann")]
    assert batchq("retry", "--error-like", "time out").out == "0 batches made pending again\n"


def test_what_is_left_out_is_said_and_makes_the_exit_code(batchq: CommandLine, conn: Conn) -> None:
    for key in ("a", "b"):
        finished(conn, "failed", unique_key=key)
    insert(conn, unique_key="a")
    ended = batchq("retry", "--all")
    assert ended.code == 1
    assert ended.out == "1 batch made pending again; 1 left unchanged: 1 with the unique_key of a live batch\n"
    assert batchq("retry", "--all", "--json").json["left_out"] == {"keyed": 1, "locked": 0, "changed": 0}


@pytest.mark.parametrize(
    ("arguments", "column", "expected"),
    [
        (["cancel", "--reason", "no more"], "errors -> -1 ->> 'error'", "cancelled: no more"),
        (["snooze", "--until", "2100-01-01 00:00+00"], "run_at::date", "2100-01-01"),
        (["priority", "--to", "-3"], "priority", "-3"),
        (["move", "--to", "slow"], "queue", "slow"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_each_verb_takes_ids_or_a_filter(
    batchq: CommandLine, conn: Conn, arguments: list[str], column: str, expected: str
) -> None:
    alone, many = add(conn, 1)[0], add(conn, 5, kind="many")
    others = add(conn, 2)
    one, bulk_ = batchq(*arguments, str(alone)), batchq(*arguments, "--kind", "many")
    assert (one.code, bulk_.code) == (0, 0), one.err + bulk_.err
    query = f"SELECT id FROM batchq.all_batches WHERE ({column})::text = %s ORDER BY id"
    assert values(conn, query, [expected]) == sorted([alone, *many])
    assert {batch(conn, other)["status"] for other in others} == {"pending"}


def test_batches_must_be_named_one_way(batchq: CommandLine) -> None:
    assert "no batches selected" in batchq("retry").complaint
    assert "not both" in batchq("retry", "7", "--kind", "x").complaint
    assert "goes with a filter" in batchq("retry", "7", "--dry-run").complaint
    assert "choose one" in batchq("retry", "--all", "--items", "--whole").complaint


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("Y\n", 0), ("n\n", 1), ("\n", 1), ("yes\n", 1), ("\x04", 1)])
def test_many_batches_are_changed_on_a_terminal_only_after_a_y(
    batchq: CommandLine, conn: Conn, typed: str, code: int
) -> None:
    add(conn, 1234)
    ended, seen = on_terminal(batchq, "cancel", "--all", typed=typed)
    assert ended == code, seen
    assert "Cancel 1,234 batches? [y/N]" in seen
    assert ("1,234 batches cancelled" in seen, "nothing was changed" in seen) == (code == 0, code == 1)
    assert statuses(conn) == {"cancelled" if code == 0 else "pending": 1234}


def test_nobody_is_asked_about_one_batch_with_yes_by_id_in_a_dry_run_or_in_a_script(
    batchq: CommandLine, conn: Conn
) -> None:
    [one], many, more = add(conn, 1, kind="one"), add(conn, 3, kind="many"), add(conn, 3, kind="more")
    for arguments in (
        ["cancel", "--all", "--dry-run"], ["cancel", "--kind", "one"], ["cancel", "--kind", "many", "--yes"],
        ["snooze", *map(str, more), "--for", "1h"],
    ):  # fmt: skip
        code, seen = on_terminal(batchq, *arguments)
        assert (code, "[y/N]" in seen) == (0, False), seen
    assert batch(conn, one)["status"] == batch(conn, many[0])["status"] == "cancelled"
    assert batchq("cancel", "--all").out == "3 batches cancelled\n"


QUESTIONS = {
    "retry --all --whole": "Retry 2 batches from the start?",
    "retry --all --items": "Retry the failed items of 2 batches?",
    "priority --status pending --to 3": "Change the priority of 2 batches?",
    "move --all --to slow": "Move 2 batches?",
}


@pytest.mark.parametrize("command", QUESTIONS)
def test_the_question_says_what_would_be_done(batchq: CommandLine, conn: Conn, command: str) -> None:
    for _ in range(2):
        taken = processing(conn, items=[1, 2])
        checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
        finish(conn, endings.Finish(*taken, "failed"))
    add(conn, 2)
    code, seen = on_terminal(batchq, *command.split(), typed="n\n")
    assert (code, f"{QUESTIONS[command]} [y/N]" in seen) == (1, True), seen


def test_a_prune_of_more_than_workers_drop_is_asked_about(batchq: CommandLine) -> None:
    code, seen = on_terminal(batchq, "prune", "--older-than-days", "1", typed="n\n")
    assert (code, "Drop all finished batches older than 1 day, for good? [y/N]" in seen) == (1, True), seen
    for more in (["--older-than-days", "90"], ["--older-than-days", "1", "--yes"], []):
        assert on_terminal(batchq, "prune", *more)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bulk_that_is_interrupted_leaves_what_is_done_and_says_how_many(
    batchq: CommandLine, conn: Conn, number: signal.Signals
) -> None:
    add(conn, 30_000, "failed")
    pending = "SELECT count(*) FROM batchq.batches_live"
    with batchq.start("retry", "--all", "--json") as process:
        wait_until(lambda: value(conn, pending) > 1000, 20, "the first chunks")
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    said = json.loads(out)
    step("%s", said)
    assert 1000 < said["changed"] == value(conn, pending) < 30_000
    assert said["left"] == 30_000 - said["changed"]
    assert values(conn, "SELECT batches FROM batchq.audit") == [said["changed"]]


def test_pauses_from_the_command_line(batchq: CommandLine) -> None:
    assert batchq("pause").out.startswith("nothing was paused, and nothing is paused now; to pause something: ")
    given = ["--queue", "mail", "--for", "2h", "--reason", "too dear", "--actor", "ann"]
    said = [batchq("pause", *given).out, batchq("pause", "--queue", "mail", "--kind", "x").out]
    assert said == ["paused: queue mail\n", "paused: kind x in queue mail\n"]
    listed = {(row["queue"], row["kind"], row["reason"], row["actor"]) for row in batchq("pause", "--json").json}
    assert ("mail", None, "too dear", "ann") in listed
    assert len(listed) == 2
    lines = batchq("pause").out.splitlines()
    assert lines[0] == "nothing was paused; these are paused now:"
    assert "too dear" in "".join(lines)
    assert lines[-1] == "to pause something: batchq pause --queue QUEUE, --kind KIND, or both"
    assert [batchq("resume", "--queue", "mail").out for _ in range(2)] == [
        "resumed: queue mail\n", "no matching pause: queue mail; paused now: kind x in queue mail\n",
    ]  # fmt: skip
    assert "resume needs" in batchq("resume").complaint
    noted = [(row["verb"], row["queue"]) for row in batchq("audit", "--json").json]
    assert noted == [("resume", "mail"), ("pause", "mail"), ("pause", "mail")]
    assert "too dear" in batchq("audit").out


def test_a_worker_is_drained_from_the_command_line(batchq: CommandLine, conn: Conn) -> None:
    with batchq.start("worker", "tasks:app") as worker:
        ids = "SELECT id FROM batchq.workers"
        wait_until(lambda: len(values(conn, ids)) == 1, 20, "the worker's row")
        [worker_id] = values(conn, ids)
        assert batchq("drain", worker_id).out == f"{worker_id}: draining\n"
        _, err = worker.communicate(timeout=25)
    assert worker.returncode == 0, err
    assert values(conn, ids) == []
    assert batchq("drain", worker_id).code == 1


def test_the_audit_of_one_batch(batchq: CommandLine, conn: Conn) -> None:
    first, second = add(conn, 2)
    batchq("cancel", str(first), str(second), "--actor", "ann")
    [row] = batchq("audit", "--id", str(second), "--json").json
    assert (row["verb"], row["batch_id"], row["actor"]) == ("cancel", second, "ann")


def test_the_audit_tells_what_was_done_and_in_a_pipe_a_row_is_a_line(batchq: CommandLine, conn: Conn) -> None:
    add(conn, 2, kind="a kind whose name would be broken where a line has eighty characters")
    batchq(
        "move",
        "--queue",
        "default",
        "--older-than",
        "0s",
        "--to",
        "slow",
        "--reason",
        "they can wait until it is night",
    )
    batchq("pause", "--queue", "mail", "--until", "2100-01-01", "--actor", "ann")
    _, _, paused, moved, *_ = batchq.run_program("audit", COLUMNS="").out.splitlines()
    assert "until 2100-01-01T00:00:00" in paused
    assert paused.split()[-1] == "ann"
    for text in ("move ", "to_queue slow", "older_than_seconds 0.0", "they can wait until it is night"):
        assert text in moved
    statuses = [line for line in batchq.run_program("status", COLUMNS="").out.splitlines() if "eighty" in line]
    assert len(statuses) == 3, "its queue, and two batches"


def test_a_verb_done_again_on_the_command_line_leaves_nothing_out(conn: Conn, dsn: str, tmp_path: Path) -> None:
    for queue in ("default", "default", "slow"):
        insert(conn, queue=queue)
    command = CommandLine(dsn, tmp_path)
    said = [command("move", "--all", "--to", "slow") for _ in range(2)]
    assert [(ended.code, ended.out) for ended in said] == [(0, "2 batches moved\n"), (0, "0 batches moved\n")]
    assert command("priority", "--all", "--to", "0", "--dry-run").out.startswith("0 batches")


if __name__ == "__main__":
    run_alone(__file__)
