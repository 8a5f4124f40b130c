"""A queue that has seen some work: for the page's browser tests and its screenshots."""

from typing import Any
from uuid import uuid4

import psycopg

import batchq
from batchq.postgres.statements import workers
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.workers import WorkerRow
from tests.component.rows import Taken, checkpoint, claim, expire_lease, failure, finish, finished, insert, processing

Conn = psycopg.Connection[Any]
TRACEBACK = """Traceback (most recent call last):
  File "tasks.py", line 31, in import_contact
    row = mailbox.parse(item["email"])
  File "mailbox.py", line 112, in parse
    raise ValueError(f"no @ in {text!r}")
ValueError: no @ in 'ann.example.com'
"""
TIMEOUT = "TimeoutError: geocode.example did not answer within 10 s"
THROUGHPUT = """
INSERT INTO batchq.throughput_minutes
  (minute, queue, kind, worker, completed, failed, cancelled, retried, items, run_seconds, run_times,
   wait_times)
SELECT date_trunc('minute', now()) - n * interval '1 minute', k.queue, k.kind, '',
       greatest(0, (k.pace * (1 + 0.35 * sin(n / 7.0 + k.pace) + 0.2 * sin(n * 1.7)))::integer),
       CASE WHEN n % k.each = 3 THEN n % 9 + k.pace / 12 ELSE 0 END, 0, 0, k.pace * 20, k.pace * 0.4,
       array_fill(0, ARRAY[26 + n / 20 % 3]) || '{20,40,25,10,4,1}',
       array_fill(0, ARRAY[16 + n / 9 % 5]) || '{5,20,40,20,10,4,1}'
FROM generate_series(0, 59) n
CROSS JOIN (VALUES ('default', 'send_receipt', 140, 17), ('bulk', 'import_contacts', 36, 5),
                   ('bulk', 'geocode', 60, 11))
  AS k(queue, kind, pace, each)
"""


def set_scene(conn: Conn) -> int:
    """Fill the queue; return the id of the batch that is half-way."""
    for _ in range(6):
        insert(conn, kind="geocode", queue="bulk", run_at="2100-01-01")
    for number in range(14):
        finished(conn, kind="send_receipt", payload={"order_id": number})
    for number in range(5):
        items = [f"{number}@example.com"]
        error = '{"error": "ValueError: no @ in \'ann.example.com\'", "attempt": 5, "at": "2026-05-04T10:12:00"}'
        finished(conn, "failed", error=error, kind="import_contacts", queue="bulk", items=items)
    finished(conn, "failed", error=f'{{"error": "{TIMEOUT}", "attempt": 3}}', kind="geocode", queue="bulk")
    finished(conn, "cancelled", kind="geocode", queue="bulk")
    stalled = processing(conn, kind="geocode", queue="bulk", items=list(range(40)), worker="jobs-2-4411-0badc0de")
    expire_lease(conn, stalled.id, 30)
    conn.execute(THROUGHPUT.encode())
    kinds = ["geocode", "import_contacts", "send_receipt"]
    for number, in_hand in ((1, 9), (2, 4), (3, 0)):
        with conn.transaction():
            row = WorkerRow(f"jobs-{number}-441{number}-5eed{number}", f"jobs-{number}", 4410 + number, "0.1.0",
                            ["default", "bulk"], kinds, 16)  # fmt: skip
            conn.execute(*workers.heartbeat(row, in_hand, stopping=number == 3))
    batch_id = half_way(conn)
    for number in range(24):
        insert(conn, kind="send_receipt", payload={"order_id": number})
    return batch_id


def half_way(conn: Conn) -> int:
    """Return a batch that has worked 620 of 1,000 items, some of which failed, after an attempt that failed."""
    items = [{"email": f"{number}@example.com", "name": "Ann"} for number in range(1000)]
    payload = {"source": "contacts.csv", "list": "newsletter", "dry_run": False}
    taken = processing(conn, kind="import_contacts", queue="bulk", items=items, payload=payload,
                       worker="jobs-1-4411-5eed1")  # fmt: skip
    failures = [failure(number * 31, "ValueError: no @ in 'ann.example.com'") for number in range(6)]
    checkpoint(conn, taken, Progress(614, 6, failures, first_index=0), queue="bulk")
    conn.execute(
        "UPDATE batchq.batches SET claimed_at = now() - interval '31 s', created_at = now() - interval '4 minutes', "
        "errors = jsonb_build_array(jsonb_build_object('attempt', 1, 'at', now() - interval '2 minutes', "
        "'error', 'ValueError: no @ in ''ann.example.com''', 'traceback', %s::text)) WHERE id = %s",
        [TRACEBACK, taken.id],
    )
    return taken.id


def advance(conn: Conn, batch_id: int, done: int) -> None:
    """Let a batch have worked so many items."""
    conn.execute("UPDATE batchq.batches SET items_done = %s WHERE id = %s", [done, batch_id])


def set_flow(conn: Conn) -> int:
    """Enqueue a flow of 41 batches that has come half-way; return the id of the one in its middle that waits."""
    options: dict[str, Any] = {"queue": "media"}
    fetched = batchq.enqueue_each(conn, "fetch_catalog", [{}] * 2, **options)
    unpacked = [batchq.enqueue_each(conn, "unpack", [{}] * 2, after=[one], **options) for one in fetched]
    sheets: list[int] = []
    for one in [one for ones in unpacked for one in ones]:
        resized = batchq.enqueue_each(conn, "resize_images", [{}] * 6, after=[one], **options)
        sheets.append(batchq.enqueue(conn, "make_contact_sheet", after=resized, **options) or 0)
    index = batchq.enqueue(conn, "build_search_index", after=[*sheets, *fetched], **options) or 0
    checked = batchq.enqueue_each(conn, "check_links", [{}] * 3, after=[index], on_failure="run", **options)
    published = batchq.enqueue(conn, "publish", after=[index, *checked], **options)
    batchq.enqueue(
        conn, "notify_subscribers_of_the_new_catalog", after=[published or 0], on_failure="cancel", **options
    )
    batchq.enqueue(conn, "clean_up", after=[published or 0, *fetched], on_failure="run", **options)
    end_of_kind(conn, "fetch_catalog", 2)
    end_of_kind(conn, "unpack", 3)
    end_of_kind(conn, "resize_images", 7)
    end_of_kind(conn, "resize_images", 1, "failed")
    end_of_kind(conn, "make_contact_sheet", 1)
    claim(conn, 3, queue="media", kinds=["resize_images"])
    return index


def end_of_kind(conn: Conn, kind: str, number: int, status: str = "completed") -> None:
    """End the next ready batches of a kind in the queue "media", and let those that waited for them go on."""
    token = uuid4()
    taken = claim(conn, number, queue="media", kinds=[kind], token=token)
    error = None if status == "completed" else '{"error": "OSError: truncated file", "attempt": 5}'
    finish(conn, *(Finish(one.id, token, status, error=error) for one in taken), queue="media")
    while conn.execute("SELECT seen FROM batchq.follow_flows(0)").fetchall() != [(0,)]:
        pass


def set_spread(
    conn: Conn, count: int = 400, parts: int = 4, running: int = 2, kind: str = "work", **columns: Any
) -> tuple[int, list[Taken]]:
    """Enqueue a batch that is spread to parts, of which some run; return its id, and those parts."""
    whole = processing(conn, kind=kind, items=list(range(count)), spread=parts, **columns)
    queue = columns.get("queue", "default")
    made = "SELECT parts FROM batchq.spread_batch(%s, %s, %s, %s)"
    assert conn.execute(made, [queue, whole.id, whole.token, parts]).fetchall() == [(parts,)]
    taken = []
    for number in range(running):
        token = uuid4()
        worker = f"jobs-{number % 3 + 1}-441{number % 3 + 1}-5eed{number % 3 + 1}"
        taken += [Taken(row.id, token) for row in claim(conn, 1, queue=queue, kinds=[kind], token=token, worker=worker)]
    return whole.id, taken
