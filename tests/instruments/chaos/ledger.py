"""The ledger: what was enqueued, what was done, and whether the two come out even."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

import psycopg

from batchq.operate import invariants
from tests.instruments.chaos import flows, spans
from tests.instruments.chaos.marks import WHOLE_BATCH, Mark
from tests.instruments.chaos.orders import ORDERS

Conn = psycopg.Connection[Any]
CHECKS = [(Path(__file__).parent / name).read_text() for name in ("ledger.sql", "spans.sql", "flows.sql")]
EVER = 0.0

TABLES: LiteralString = f"""
{spans.TABLES}
{flows.TABLES}
CREATE TABLE effects (batch_id bigint NOT NULL, item integer NOT NULL, attempt integer NOT NULL, pid integer NOT NULL);
CREATE INDEX effects_batch ON effects (batch_id);
COMMENT ON TABLE effects IS 'Written in the transactions of batches. Nothing here refuses a second row.';
CREATE TABLE produced (kind text NOT NULL, first bigint NOT NULL, count integer NOT NULL);
COMMENT ON TABLE produced IS 'A row for each lot of batches, written in the transaction that enqueued them.';
CREATE TABLE cancelled (batch_id bigint NOT NULL);
COMMENT ON TABLE cancelled IS 'The batches that are cancelled, written in the transactions that did it.';
CREATE INDEX finished_lately ON batchq.batches_finished (finished_at);
"""

VANISHED = """
SELECT 'lost', NULL::bigint, format('%s number %s was enqueued and is gone', p.kind, seq)
FROM produced p, generate_series(p.first, p.first + p.count - 1) AS seq
WHERE NOT EXISTS (SELECT FROM numbered WHERE numbered.seq = seq.seq)
UNION ALL
SELECT 'doubled', max(id), format('number %s is there %s times', seq, count(*))
FROM numbered
GROUP BY seq
HAVING count(*) > 1
LIMIT 200
"""
NUMBERED = """
CREATE TEMPORARY TABLE numbered AS
  SELECT (payload ->> 'seq')::bigint AS seq, id FROM batchq.all_batches WHERE kind <> 'tick' AND part_of IS NULL;
CREATE INDEX ON numbered (seq);
ANALYZE numbered
"""
COUNTS = """
SELECT (SELECT coalesce(sum(count), 0) FROM produced)::bigint,
       (SELECT count(*) FROM batchq.all_batches WHERE kind <> 'tick' AND part_of IS NULL)
"""
FINAL = "SELECT id, kind, status, items_total FROM batchq.all_batches WHERE part_of IS NULL"


class Violation(NamedTuple):
    """Something that must not be. *what*: lost, doubled, stuck, limit, order, counters, status, worker,
    invariant."""

    what: str
    batch_id: int | None
    detail: str


def check_so_far(conn: Conn, since: float, patience_seconds: float, ready_patience_seconds: float) -> list[Violation]:
    """Check everything that is live, or finished since *since* (seconds since 1970), while work goes on."""
    parameters = {"since": since, "patience": patience_seconds, "ready_patience": ready_patience_seconds}
    found = [Violation(*row) for check in CHECKS for row in conn.execute(check.encode(), parameters)]
    enqueued, there = one(conn, COUNTS)
    if enqueued != there:
        found += vanished(conn) or [Violation("lost", None, f"{enqueued} batches were enqueued, {there} are there")]
    return found


def vanished(conn: Conn) -> list[Violation]:
    """Tell which batches were enqueued and are gone, or are there twice."""
    with conn.transaction(force_rollback=True):
        conn.execute(NUMBERED)
        return [Violation(*row) for row in conn.execute(VANISHED)]


def check_at_end(conn: Conn, known_lots: Iterable[tuple[int, int]], marks: Iterable[Mark]) -> list[Violation]:
    """Check everything, when nothing is left to do. *known_lots*: first number and count of the lots whose COMMIT was
    answered."""
    return [
        *check_so_far(conn, EVER, 0, 0),
        *vanished(conn),
        *lots_that_vanished(conn, known_lots),
        *wrong_ends(conn),
        *wrong_marks(conn, marks),
        *(Violation(what, None, text) for what, text in flows.wrong_ticks(conn)),
        *broken_invariants(conn),
    ]


def lots_that_vanished(conn: Conn, known_lots: Iterable[tuple[int, int]]) -> list[Violation]:
    """Tell which lots the server has forgotten whose COMMIT it answered."""
    there = set(conn.execute("SELECT first, count FROM produced").fetchall())
    return [Violation("lost", None, f"lot {lot} was committed and is gone") for lot in set(known_lots) - there]


def wrong_ends(conn: Conn) -> list[Violation]:
    """Tell which batches have not ended as they must."""
    found = []
    cancelled = {batch_id for (batch_id,) in conn.execute("SELECT batch_id FROM cancelled")}
    for batch_id, kind, status, _ in conn.execute(FINAL):
        wanted = "cancelled" if batch_id in cancelled else ORDERS[kind].ends_as
        if status in ("pending", "processing", "waiting"):
            found.append(Violation("stuck", batch_id, f"{kind} is {status} at the end"))
        elif status != wanted:
            found.append(Violation("status", batch_id, f"{kind} is {status}, not {wanted}"))
    return found


def wrong_marks(conn: Conn, marks: Iterable[Mark]) -> list[Violation]:
    """Tell which batches and items were not worked at least once, once a claim at most, in attempts that there are."""
    calls = Counter(marks)
    found = [Violation("doubled", m.batch_id, f"{count} calls of {m}") for m, count in calls.items() if count > 1]
    items_of: dict[int, set[int]] = defaultdict(set)
    attempts_of: dict[int, set[int]] = defaultdict(set)
    for mark in calls:
        items_of[mark.batch_id].add(mark.item)
        attempts_of[mark.batch_id].add(mark.attempt)
    for batch_id, kind, status, items_total in conn.execute(FINAL):
        wanted = set(range(items_total)) if items_total is not None else {WHOLE_BATCH}
        if status == "completed" and (missing := wanted - items_of[batch_id]):
            found.append(Violation("lost", batch_id, f"{kind} is completed; {sorted(missing)} never began"))
        if attempts_of[batch_id] and not attempts_of[batch_id] <= set(range(1, ORDERS[kind].max_attempts + 1)):
            found.append(Violation("doubled", batch_id, f"{kind} ran in attempts {sorted(attempts_of[batch_id])}"))
    return found


def broken_invariants(conn: Conn) -> list[Violation]:
    """Run the invariants that any system must keep. A later schema, which is a fault, leaves a gap in the ledger of the
    migrations."""
    found = [each for each in invariants.violations(conn) if each.invariant != "migrations_have_no_gap"]
    return [Violation("invariant", None, str(each)) for each in found]


def one(conn: Conn, query: str) -> Any:
    """Return the one row of *query*."""
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row
