"""Import a CSV file of contacts (email, name): contacts.py import FILE, then contacts.py failed FILE"""

import csv
import hashlib
import os
import sys
from pathlib import Path

import psycopg

import batchq


def import_file(conn: psycopg.Connection, file: Path) -> str:
    """Enqueue the lines of a file as one batch, and record the file, in one transaction; a file is imported once."""
    data = file.read_bytes()
    rows = csv.DictReader(data.decode("utf-8-sig").splitlines(keepends=True))
    items = [{"line": rows.line_num, "email": row["email"], "name": row["name"]} for row in rows]
    with conn.transaction():
        batch_id = batchq.enqueue(conn, "import_contact", items=items, max_failed_items=len(items))
        recorded = conn.execute(
            "INSERT INTO imports (sha256, file, batch_id) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING 1",
            [hashlib.sha256(data).hexdigest(), file.name, batch_id],
        ).fetchone()
        if recorded is None:
            raise psycopg.Rollback  # takes the batch back, too
    return f"batch {batch_id}: {len(items)} lines" if recorded else "imported already"


def failed_lines(conn: psycopg.Connection, file: Path) -> str:
    """Return the failed lines of a file, with their errors."""
    found = conn.execute(
        "SELECT format('line %%s: %%s', failed.item ->> 'line', failed.error)"
        " FROM imports, batchq.failed_items_of(batch_id, -1, 100000) AS failed"
        " WHERE sha256 = %s ORDER BY item_index",
        [hashlib.sha256(file.read_bytes()).hexdigest()],
    )
    return "\n".join(row[0] for row in found)


if __name__ == "__main__":
    action = {"import": import_file, "failed": failed_lines}[sys.argv[1]]
    with psycopg.connect(os.environ["BATCHQ_DSN"], prepare_threshold=None) as connection:
        print(action(connection, Path(sys.argv[2])))
