-- Limits that were passed and orders that were broken by what began since %(since)s: a row each, of what, batch and
-- detail. See spans.py. Of a batch that a person has put back, a new life begins; its place is not judged any more.
WITH lived AS (
  SELECT s.*, coalesce((SELECT max(i.at) FROM interventions i
                        WHERE i.batch_id = s.batch_id AND i.what = 'retried' AND i.at < s.began_at), '-infinity') AS life
  FROM spans s
  WHERE s.key IS NOT NULL
), lives AS (
  SELECT
    l.batch_id, l.life, l.queue, l.kind, l.key, l.priority, l.created_at,
    min(l.began_at) AS began_at,
    max(l.began_at) AS last_began_at,
    max(l.ended_at) AS completed_at,
    coalesce(max(l.ended_at), (SELECT min(i.at) FROM interventions i
                               WHERE i.batch_id = l.batch_id AND i.what = 'cancelled' AND i.at > l.life), 'infinity') AS ended_at
  FROM lived l
  GROUP BY l.batch_id, l.life, l.queue, l.kind, l.key, l.priority, l.created_at
), held AS (
  SELECT l.*, max(l.ended_at) OVER (PARTITION BY l.queue, l.kind, l.key ORDER BY l.began_at, l.batch_id
                                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS held_until
  FROM lives l
), firsts AS (
  SELECT l.batch_id, l.queue, l.kind, l.key, l.priority, l.created_at, l.began_at FROM lives l WHERE l.life = '-infinity'
  UNION ALL
  SELECT b.id, b.queue, b.kind, b.key, b.priority, b.created_at, 'infinity'
  FROM batchq.batches_live b
  WHERE b.key IS NOT NULL
    AND NOT EXISTS (SELECT FROM spans s WHERE s.batch_id = b.id)
    AND NOT EXISTS (SELECT FROM interventions i WHERE i.batch_id = b.id)
), placed AS (
  -- What a batch comes after was there when it was, in the same transaction or an earlier one, and is as urgent or more.
  SELECT f.*, u.priority AS of_priority,
         max(f.began_at) OVER (PARTITION BY u.priority, f.queue, f.kind, f.key ORDER BY f.created_at, f.priority, f.batch_id
                               ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS others_began_at
  FROM firsts f
  JOIN (SELECT DISTINCT priority FROM firsts) u ON f.priority <= u.priority
), at_once AS (
  SELECT e.*, sum(e.step) OVER (PARTITION BY e.queue, e.kind ORDER BY e.at, e.step) AS count
  FROM (
    SELECT batch_id, queue, kind, began_at AS at, 1 AS step FROM spans WHERE key IS NULL AND ended_at IS NOT NULL
    UNION ALL
    SELECT batch_id, queue, kind, ended_at, -1 FROM spans WHERE key IS NULL AND ended_at IS NOT NULL
  ) e
)
SELECT 'limit', a.batch_id, format('%%s: %%s ran at once, of %%s', a.kind, a.count, l.max_running)
FROM at_once a
JOIN batchq.limits l ON l.queue = a.queue AND l.kind = a.kind
WHERE a.step = 1 AND a.count > l.max_running AND a.at >= to_timestamp(%(since)s)
UNION ALL
SELECT 'limit', s.batch_id, format('%%s began at %%s: then %%s were processing, of %%s', concat_ws(' ', s.kind, s.key),
                                   s.began_at, s.running, coalesce(l.max_running, l.max_running_per_key))
FROM spans s
JOIN batchq.limits l ON l.queue = s.queue AND l.kind = s.kind
WHERE s.running > coalesce(l.max_running, l.max_running_per_key) AND s.began_at >= to_timestamp(%(since)s)
UNION ALL
SELECT 'order', h.batch_id, format('%%s %%s began at %%s: another had its key until %%s', h.kind, h.key, h.began_at, h.held_until)
FROM held h
WHERE h.began_at < h.held_until AND h.began_at >= to_timestamp(%(since)s)
UNION ALL
SELECT 'order', l.batch_id, format('%%s %%s began again at %%s: it had ended at %%s', l.kind, l.key, l.last_began_at, l.completed_at)
FROM lives l
WHERE l.last_began_at > l.completed_at AND l.last_began_at >= to_timestamp(%(since)s)
UNION ALL
SELECT 'order', p.batch_id, format('%%s %%s began at %%s: one that came first began at %%s', p.kind, p.key, p.began_at,
                                   p.others_began_at)
FROM placed p
WHERE p.priority = p.of_priority AND p.began_at < p.others_began_at AND p.began_at >= to_timestamp(%(since)s)
UNION ALL
SELECT 'lost', f.id, format('%%s, completed: when it ran is not there', f.kind)
FROM batchq.batches_finished f
JOIN batchq.limits l ON l.queue = f.queue AND l.kind = f.kind
WHERE f.status = 'completed'
  AND f.finished_at >= to_timestamp(%(since)s)
  AND NOT EXISTS (SELECT FROM spans s WHERE s.batch_id = f.id AND s.ended_at IS NOT NULL)
LIMIT 200
