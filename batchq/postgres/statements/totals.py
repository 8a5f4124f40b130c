"""The sums of one database, as a list of several databases shows them."""

from typing import Any, LiteralString

from batchq.postgres.statements.running import Conn, fetch_json

TOTALS: LiteralString = """
WITH q AS MATERIALIZED (SELECT * FROM batchq.queues)
SELECT jsonb_build_object(
  'ready', coalesce(sum(q.ready), 0),
  'scheduled', coalesce(sum(q.scheduled), 0),
  'waiting', coalesce(sum(q.waiting), 0),
  'processing', coalesce(sum(q.processing), 0),
  'stalled', coalesce(sum(q.stalled), 0),
  'failed', coalesce(sum(q.failed), 0),
  'finished_per_second', coalesce(sum(q.finished_per_second), 0)::float8,
  'oldest_wait', max(q.oldest_wait)::text,
  'oldest_wait_seconds', extract(epoch FROM max(q.oldest_wait))::float8,
  'estimated', coalesce((SELECT jsonb_agg(DISTINCT e.name) FROM q, unnest(q.estimated) AS e (name)), '[]'),
  'workers', (SELECT count(*)
              FROM (SELECT * FROM batchq.workers OFFSET 0) w
              WHERE w.heartbeat_at > now() - interval '1 minute'))
FROM q
"""


def totals(conn: Conn) -> dict[str, Any]:
    """Return the sums of batchq.queues over all queues and kinds, the longest wait, and the number of live workers."""
    return fetch_json(conn, TOTALS)[0]
