"""Batches that wait for others, batches that are spread, and a schedule: what there is of them, and how it is checked.

A "fan_in" begins once all its "needed" have ended, and writes how many of them have not. A schedule makes a "tick" each
second, or says that it has missed it. The items of a "spread" are worked in parts. See flows.sql.
"""

from typing import Any, LiteralString

import psycopg

import batchq

QUEUE = "flows"  # of its own: old code knows no parts
NEEDED = 3  # batches of each fan-in
PARTS = 3
SCHEDULE: LiteralString = "chaos"

TABLES: LiteralString = """
CREATE TABLE fan_ins (batch_id bigint NOT NULL, unended integer NOT NULL);
COMMENT ON TABLE fan_ins IS 'How many of the batches that it waits for had not ended when a batch began.';
"""
SET_UP: LiteralString = f"""
SELECT batchq.set_schedule('{SCHEDULE}', '@every 1 s', 'tick', queue => '{QUEUE}', payload => '{{"tick": null}}',
                           missed => 'coalesce')
"""
# A person may have put back one that had ended.
BEGAN: LiteralString = """
INSERT INTO fan_ins (batch_id, unended)
SELECT b.id, (
    SELECT count(*) FROM batchq.batches_live l
    WHERE l.id = ANY (b.after) AND NOT EXISTS (SELECT FROM interventions i WHERE i.batch_id = l.id))
FROM batchq.batches_live b
WHERE b.queue = %s AND b.id = %s
"""
PAUSE: LiteralString = f"SELECT batchq.pause_schedule('{SCHEDULE}')"
# "@every" counts from when it was set, in whole seconds.
TICKS: LiteralString = """
SELECT extract(epoch FROM s.next_at - date_trunc('second', s.changed_at))::integer - 1
         - (date_trunc('second', s.changed_at) < s.changed_at)::integer,
       s.batches_made, s.ticks_missed, s.ticks_overlapped, b.count, b.different
FROM batchq.schedules s
CROSS JOIN (SELECT count(*) AS count, count(DISTINCT payload ->> 'tick') AS different
            FROM batchq.all_batches WHERE kind = 'tick') b
WHERE s.next_at IS NOT NULL
"""


def began(batch: batchq.Batch) -> tuple[LiteralString, list[Any]]:
    """Return the statement that writes what a fan-in still waits for, for its transaction."""
    return BEGAN, [QUEUE, batch.id]


def enqueue_fan_in(conn: psycopg.Connection[Any], needed: list[Any], payload: Any, options: dict[str, Any]) -> None:
    """Enqueue batches, and one after all of them, whatever becomes of them."""
    ids = batchq.enqueue_each(conn, "needed", needed, **options)
    batchq.enqueue(conn, "fan_in", payload, after=ids, on_failure="run", **options)


def wrong_ticks(conn: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    """Tell what is wrong with the ticks of the schedule, which is paused: what, and how."""
    row = conn.execute(TICKS).fetchone()
    if row is None:
        return []
    ticks, made, missed, overlapped, there, different = row
    text = f"{ticks} ticks: {made} batches, {missed} missed, {overlapped} overlapped; {there} are there"
    found = []
    if ticks != made + missed + overlapped or there < made:
        found.append(("lost", text))
    if there > made or different < there:
        found.append(("doubled", f"{text}, of {different} ticks"))
    return found
