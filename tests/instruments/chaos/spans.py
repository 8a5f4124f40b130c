"""When batches with a limit or a key ran, by the database's clock: a row for each beginning, and what it means.

A beginning is written outside the batch's transaction, past pooler and proxy, so it stays whatever becomes of the
handler. It is written only while the batch is still claimed with this handler's token: a handler that was frozen, and
goes on when another has its batch, leaves none. Its time is that of the statement, when the claim was committed and
not yet lost.

An end is written in the transaction that completes the batch, so it stays only if the claim was held until then. In
between, the batch ran for certain. The handler of a span without an end was killed, has failed, or has lost its claim,
nobody knows when. So such a span is not counted as running. Instead each beginning counts what is processing under a
lease that has not expired, in its own snapshot: there, killed and frozen workers count for as long as they must.

A key is held from a batch's first beginning until its end, also between attempts. For one that is cancelled, the end is
when that was written down, and a retry by the operator begins a new life, with a new place. See spans.sql.
"""

import os
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import make_conninfo

import batchq

DIRECT = "BATCHQ_CHAOS_DIRECT_DSN"
QUEUE = "limits"  # of its own: workers with old code must not rescue its batches, which would lose their places

TABLES: LiteralString = """
CREATE TABLE spans (batch_id bigint NOT NULL, token uuid NOT NULL, queue text NOT NULL, kind text NOT NULL, key text,
                    priority integer NOT NULL, created_at timestamptz NOT NULL, running integer NOT NULL,
                    began_at timestamptz NOT NULL, ended_at timestamptz);
CREATE INDEX spans_batch ON spans (batch_id);
COMMENT ON COLUMN spans.running IS 'How many of its kind, or with its key, were processing then, itself included.';
CREATE TABLE interventions (batch_id bigint NOT NULL, what text NOT NULL,
                            at timestamptz NOT NULL DEFAULT statement_timestamp());
COMMENT ON TABLE interventions IS
  'Each cancellation and each retry by a person, written in its transaction after the batch was locked.';
"""
LIMITS = """
INSERT INTO batchq.limits (queue, kind, max_running) VALUES ('limits', 'limited', 3);
INSERT INTO batchq.limits (queue, kind, max_running_per_key) VALUES ('limits', 'keyed', 1);
"""
BEGAN = """
INSERT INTO spans (batch_id, token, queue, kind, key, priority, created_at, running, began_at)
SELECT b.id, b.claim_token, b.queue, b.kind, b.key, b.priority, b.created_at, (
    SELECT count(*) FROM batchq.batches_live r
    WHERE r.queue = b.queue AND r.kind = b.kind AND r.key IS NOT DISTINCT FROM b.key
      AND r.status = 'processing' AND r.lease_expires_at > now()
  ), now()
FROM batchq.batches_live b
WHERE b.queue = %s AND b.id = %s AND b.status = 'processing' AND b.claim_token = %s
"""
ENDED = "UPDATE spans SET ended_at = clock_timestamp() WHERE batch_id = %s AND token = %s"

idle: list[psycopg.Connection[Any]] = []


def begin(batch: batchq.Batch) -> None:
    """Write that a batch begins, if it is still this handler's. Raises OperationalError when the server is away."""
    try:
        conn = idle.pop()
    except IndexError:
        dsn = make_conninfo(os.environ[DIRECT], connect_timeout=5, options="-c default_transaction_read_only=off")
        conn = psycopg.connect(dsn, autocommit=True, client_encoding="UTF8")
    try:
        conn.execute(BEGAN, [QUEUE, batch.id, batch._claimed.claim.token])
    except BaseException:
        conn.close()
        raise
    idle.append(conn)


def close() -> None:
    """Close all connections."""
    while idle:
        idle.pop().close()


def end(batch: batchq.Batch) -> tuple[str, list[Any]]:
    """Return the statement that writes the end, for the batch's transaction."""
    return ENDED, [batch.id, batch._claimed.claim.token]
