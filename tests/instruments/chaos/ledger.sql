-- What is wrong with the batches that are live, or finished since %(since)s: a row each, of what, batch and detail.
-- One statement, so one snapshot: what a transaction writes of its own and of the batch's is seen together.
WITH looked AS (
  SELECT id, kind, status, payload, items_total, items_done, items_failed, part_of, cursor, attempt, max_attempts,
         max_failed_items, run_at, lease_expires_at, result, errors
  FROM batchq.batches_live
  UNION ALL
  SELECT id, kind, status, payload, items_total, items_done, items_failed, part_of, cursor, attempt, max_attempts,
         max_failed_items, run_at, lease_expires_at, result, errors
  FROM batchq.batches_finished
  WHERE finished_at >= to_timestamp(%(since)s)
), counted AS (
  SELECT
    l.*,
    e.count AS effects,
    e.count - e.distinct_items AS twice,
    f.count - p.gathered AS failed_rows,  -- the whole counts those of its parts when all have ended
    CASE
      WHEN l.kind IN ('tx', 'tx_async', 'limited', 'keyed', 'needed', 'fan_in', 'tick') THEN (l.status = 'completed')::integer
      WHEN l.kind = 'steps' THEN CASE WHEN l.status = 'completed' THEN 3 ELSE coalesce(l.cursor::integer, 0) END
      WHEN l.kind IN ('chunks', 'chunks_async', 'items_tx', 'items_tx_async') THEN l.items_done
      ELSE 0
    END AS wanted
  FROM looked l
  CROSS JOIN LATERAL (
    SELECT count(*), count(DISTINCT item) AS distinct_items FROM effects WHERE batch_id = l.id
  ) e
  CROSS JOIN LATERAL (
    SELECT count(*) FROM batchq.failed_items WHERE batch_id = l.id AND l.items_total IS NOT NULL
  ) f
  CROSS JOIN LATERAL (
    SELECT coalesce(sum(items_failed), 0) AS gathered FROM batchq.parts WHERE batch_id = l.id AND is_gathered
  ) p
)
SELECT 'doubled', id, format('%%s, %%s: %%s effects of %%s, %%s of them twice', kind, status, effects, wanted, twice)
FROM counted
WHERE effects > wanted OR twice > 0
UNION ALL
SELECT 'lost', id, format('%%s, %%s: %%s effects of %%s', kind, status, effects, wanted)
FROM counted
WHERE effects < wanted
UNION ALL
SELECT 'counters', id, format('%%s, %%s: %%s failed by the counter, %%s rows', kind, status, items_failed, failed_rows)
FROM counted
WHERE items_failed <> failed_rows
UNION ALL
SELECT 'counters', id, format('%%s, completed: %%s done and %%s failed of %%s, %%s may fail', kind, items_done, items_failed,
                              items_total, max_failed_items)
FROM counted
WHERE status = 'completed'
  AND items_total IS NOT NULL
  AND (items_done + items_failed <> items_total OR items_failed > max_failed_items)
UNION ALL
SELECT 'counters', id, format('%%s, %%s: attempt %%s of %%s', kind, status, attempt, max_attempts)
FROM counted
WHERE attempt > max_attempts OR attempt < 0 OR (status = 'processing' AND attempt = 0)
UNION ALL
SELECT 'lost', id, format('%%s, completed: its text has become %%s', kind, result ->> 'text')
FROM counted
WHERE kind = 'plain' AND status = 'completed' AND result ->> 'text' <> coalesce(payload ->> 'text', '')
UNION ALL
SELECT 'lost', id, format('%%s, %%s: its text has become %%s', kind, status, e.error)
FROM counted
CROSS JOIN LATERAL (
  SELECT jsonb_array_elements(errors) ->> 'error' AS error
  UNION ALL
  SELECT f.error FROM batchq.failed_items f WHERE f.batch_id = id
) e
WHERE payload ? 'text'
  AND e.error ~ 'always fails|is bad|fails at first'
  AND strpos(e.error, payload ->> 'text') = 0
UNION ALL
SELECT 'stuck', id, format('%%s, processing: its lease ran out %%s ago', kind, now() - lease_expires_at)
FROM counted
WHERE status = 'processing' AND lease_expires_at < now() - %(patience)s * interval '1 second'
UNION ALL
SELECT 'stuck', id, format('%%s, ready for %%s', kind, now() - run_at)
FROM counted
WHERE status = 'pending' AND run_at < now() - %(ready_patience)s * interval '1 second'
LIMIT 200
