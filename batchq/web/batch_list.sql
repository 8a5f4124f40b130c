-- The statements of the list of batches, by the names that batchq/web/list_reads.py uses. A statement "searched_..." reads
-- at most "most" batches by an index, in the order of a sort. The statement "matching" follows it: it filters them.

-- name: by_index
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off

-- name: columns
b.id, batchq.whole_queue(b.queue) AS queue, b.kind, b.status, b.run_at, b.lease_expires_at, b.created_at, b.claimed_at, b.finished_at, b.items_total,
       b.items_done, b.items_failed, b.attempt, b.max_attempts, b.priority, b.errors, b.key AS batch_key, b.spread,
       b.unique_key, b.claimed_by,
       CASE
         WHEN %(path)s::text[] IS NOT NULL AND pg_column_size(b.payload) <= %(most_payload)s THEN b.payload
       END AS payload

-- name: searched_newest
WITH finished AS (
  SELECT /* columns */
  FROM batchq.all_batches b
  WHERE b.id < %(before_id)s
    AND b.status = ANY (%(final_statuses)s)
    AND b.part_of IS NULL
  ORDER BY b.id DESC
  LIMIT %(most)s
), live AS (
  SELECT /* columns */
  FROM batchq.batches_live b
  WHERE b.id = ANY (ARRAY(
      SELECT batchq.newest_live(NULL, NULL, %(live_status)s, %(before_id)s, %(most)s)
      UNION ALL  -- all of the key: newest_live reads only the first keys of a queue
      SELECT k.id
      FROM batchq.keyed_queues() AS q(queue)
      CROSS JOIN LATERAL (
        SELECT b.id
        FROM batchq.batches_live b
        WHERE b.queue = q.queue
          AND b.status = 'pending'
          AND b.key = %(of_key)s
          AND b.part_of IS NULL
          AND b.id < %(before_id)s
        ORDER BY b.id + 0 DESC
        LIMIT %(most)s
      ) k
      WHERE %(of_key)s::text IS NOT NULL))
    AND b.status = ANY (%(statuses)s)
), searched AS MATERIALIZED (
  SELECT b.*, b.id::text AS page_key, row_number() OVER (ORDER BY b.id DESC) AS number
  FROM (SELECT * FROM finished UNION ALL SELECT * FROM live) b
  ORDER BY b.id DESC
  LIMIT %(most)s
)

-- name: searched_oldest
WITH searched AS MATERIALIZED (
  SELECT /* columns */, b.id::text AS page_key, row_number() OVER (ORDER BY b.id) AS number
  FROM batchq.all_batches b
  WHERE b.id > %(before_id)s
    AND b.status = ANY (%(final_statuses)s)
    AND b.part_of IS NULL
  ORDER BY b.id
  LIMIT %(most)s
)

-- name: searched_due_first
WITH due AS (
  SELECT l.id, l.run_at
  FROM batchq.waiting_levels() w
  CROSS JOIN LATERAL (
    SELECT b.id, b.run_at
    FROM batchq.batches_live b
    WHERE b.queue = w.queue
      AND b.status = 'pending'
      AND b.key IS NULL
      AND b.part_of IS NULL
      AND b.priority = w.priority
      AND (b.run_at, b.id) >= (w.at, w.id)
      AND (b.run_at, b.id) > (to_timestamp(%(before_time)s::float8), %(before_id)s)
      AND b.run_at > CASE WHEN %(is_ready)s THEN '-infinity' ELSE now() END
      AND b.run_at <= CASE WHEN %(is_ready)s THEN now() ELSE 'infinity' END
    ORDER BY b.run_at, b.id
    LIMIT %(most)s
  ) l
  WHERE w.at IS NOT NULL
    AND (%(queue)s::text IS NULL OR batchq.whole_queue(w.queue) = %(queue)s)
  UNION ALL
  SELECT l.id, l.run_at
  FROM batchq.keyed_queues() AS q(queue)
  CROSS JOIN LATERAL (
    SELECT b.id, b.run_at
    FROM batchq.batches_live b
    WHERE b.queue = q.queue
      AND b.status = 'pending'
      AND b.key > ''
      AND b.part_of IS NULL
    ORDER BY b.key, b.priority, b.run_at, b.id
    LIMIT 20000
  ) l
  WHERE (%(queue)s::text IS NULL OR batchq.whole_queue(q.queue) = %(queue)s)
    AND (l.run_at, l.id) > (to_timestamp(%(before_time)s::float8), %(before_id)s)
    AND (l.run_at <= now()) = %(is_ready)s
), searched AS MATERIALIZED (
  SELECT /* columns */, extract(epoch FROM b.run_at)::text || ' ' || b.id AS page_key,
         row_number() OVER (ORDER BY b.run_at, b.id) AS number
  FROM (SELECT id FROM due ORDER BY run_at, id LIMIT %(most)s) d
  CROSS JOIN LATERAL (SELECT * FROM batchq.batches_live l WHERE l.id = d.id LIMIT 1) b
)

-- name: searched_due_last
WITH due AS (
  SELECT l.id, l.run_at
  FROM batchq.waiting_levels() w
  CROSS JOIN LATERAL (
    SELECT b.id, b.run_at
    FROM batchq.batches_live b
    WHERE b.queue = w.queue
      AND b.status = 'pending'
      AND b.key IS NULL
      AND b.part_of IS NULL
      AND b.priority = w.priority
      AND (b.run_at, b.id) >= (w.at, w.id)
      AND (b.run_at, b.id) < (to_timestamp(%(before_time)s::float8), %(before_id)s)
      AND b.run_at > CASE WHEN %(is_ready)s THEN '-infinity' ELSE now() END
      AND b.run_at <= CASE WHEN %(is_ready)s THEN now() ELSE 'infinity' END
    ORDER BY b.run_at DESC, b.id DESC
    LIMIT %(most)s
  ) l
  WHERE w.at IS NOT NULL
    AND (%(queue)s::text IS NULL OR batchq.whole_queue(w.queue) = %(queue)s)
  UNION ALL
  SELECT l.id, l.run_at
  FROM batchq.keyed_queues() AS q(queue)
  CROSS JOIN LATERAL (
    SELECT b.id, b.run_at
    FROM batchq.batches_live b
    WHERE b.queue = q.queue
      AND b.status = 'pending'
      AND b.key > ''
      AND b.part_of IS NULL
    ORDER BY b.key, b.priority, b.run_at, b.id
    LIMIT 20000
  ) l
  WHERE (%(queue)s::text IS NULL OR batchq.whole_queue(q.queue) = %(queue)s)
    AND (l.run_at, l.id) < (to_timestamp(%(before_time)s::float8), %(before_id)s)
    AND (l.run_at <= now()) = %(is_ready)s
), searched AS MATERIALIZED (
  SELECT /* columns */, extract(epoch FROM b.run_at)::text || ' ' || b.id AS page_key,
         row_number() OVER (ORDER BY b.run_at DESC, b.id DESC) AS number
  FROM (SELECT id FROM due ORDER BY run_at DESC, id DESC LIMIT %(most)s) d
  CROSS JOIN LATERAL (SELECT * FROM batchq.batches_live l WHERE l.id = d.id LIMIT 1) b
)

-- name: searched_processing
WITH running AS (
  SELECT l.id, l.claimed_at
  FROM batchq.busy_queues() q
  CROSS JOIN LATERAL (
    SELECT b.id, b.queue, b.lease_expires_at, b.claimed_at
    FROM batchq.batches_live b
    WHERE b.queue = q.queue
      AND b.status = 'processing'
      AND b.part_of IS NULL
      AND b.lease_expires_at >= q.at
    ORDER BY b.lease_expires_at
    LIMIT 20000
  ) l
  WHERE q.at IS NOT NULL
  ORDER BY l.queue, l.lease_expires_at
  LIMIT 20000
), found AS (
  SELECT id, claimed_at FROM running
  UNION ALL
  SELECT l.id, l.claimed_at
  FROM batchq.spread_batches(20000) AS s(id)
  CROSS JOIN LATERAL (
    SELECT b.id, b.claimed_at FROM batchq.batches_live b WHERE b.id = s.id AND b.status = 'waiting' LIMIT 1
  ) l
), placed AS (
  -- By the time of the claim, then by id; or by id only, in either direction.
  SELECT id, CASE WHEN %(by_time)s THEN extract(epoch FROM claimed_at)::float8 ELSE 0 END AS at, %(sign)s * id AS place
  FROM found
), searched AS MATERIALIZED (
  SELECT /* columns */, CASE WHEN %(by_time)s THEN f.at || ' ' ELSE '' END || b.id AS page_key,
         row_number() OVER (ORDER BY f.at, f.place) AS number
  FROM (
    SELECT id, at, place
    FROM placed
    WHERE (at, place) > (%(before_time)s::float8, %(sign)s * %(before_id)s::bigint)
    ORDER BY at, place
    LIMIT %(most)s
  ) f
  CROSS JOIN LATERAL (SELECT * FROM batchq.batches_live l WHERE l.id = f.id LIMIT 1) b
  WHERE b.status = 'processing'
     OR b.status = 'waiting' AND b.claimed_at IS NOT NULL
)

-- name: searched_ended_last
WITH searched AS MATERIALIZED (
  SELECT /* columns */, extract(epoch FROM b.finished_at)::text || ' ' || b.id AS page_key,
         row_number() OVER (ORDER BY b.finished_at DESC, b.id DESC) AS number
  FROM batchq.all_batches b
  WHERE b.status = %(status)s
    AND b.status <> 'completed'
    AND b.part_of IS NULL
    AND (b.finished_at, b.id) < (to_timestamp(%(before_time)s::float8), %(before_id)s)
  ORDER BY b.finished_at DESC, b.id DESC
  LIMIT %(most)s
)

-- name: searched_ended_first
WITH searched AS MATERIALIZED (
  SELECT /* columns */, extract(epoch FROM b.finished_at)::text || ' ' || b.id AS page_key,
         row_number() OVER (ORDER BY b.finished_at, b.id) AS number
  FROM batchq.all_batches b
  WHERE b.status = %(status)s
    AND b.status <> 'completed'
    AND b.part_of IS NULL
    AND (b.finished_at, b.id) > (to_timestamp(%(before_time)s::float8), %(before_id)s)
  ORDER BY b.finished_at, b.id
  LIMIT %(most)s
)

-- name: searched_ids
WITH searched AS MATERIALIZED (
  SELECT /* columns */, b.id::text AS page_key, row_number() OVER (ORDER BY b.id DESC) AS number
  FROM batchq.all_batches b
  WHERE b.id = ANY (%(ids)s::bigint[])
    AND b.part_of IS NULL
)

-- name: matching
, shown AS (
  SELECT l.*,
         CASE
           WHEN l.status = 'processing' AND l.lease_expires_at < now() THEN 'stalled'
           WHEN l.status = 'pending' AND l.run_at <= now() THEN 'ready'
           WHEN l.status = 'pending' AND jsonb_array_length(l.errors) > 0 THEN 'retrying'
           WHEN l.status = 'pending' THEN 'scheduled'
           WHEN l.status = 'waiting' AND l.claimed_at IS NOT NULL THEN 'processing'
           ELSE l.status
         END AS shown_status,
         l.errors -> -1 ->> 'error' AS error
  FROM searched l
  WHERE (%(queue)s::text IS NULL OR l.queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR l.kind = %(kind)s)
    AND (%(of_key)s::text IS NULL OR l.batch_key = %(of_key)s)
    AND (%(unique_key)s::text IS NULL OR l.unique_key = %(unique_key)s)
    AND (%(worker)s::text IS NULL OR starts_with(l.claimed_by, %(worker)s))
    AND (%(path)s::text[] IS NULL
         OR l.payload #>> %(path)s::text[] = %(text_there)s
         OR l.payload #> %(path)s::text[] @> %(json_there)s::jsonb)
    AND (%(is_first)s OR l.id <> ALL (%(ids)s::bigint[]))
), page AS MATERIALIZED (
  SELECT *
  FROM shown
  WHERE (%(status)s::text IS NULL OR shown_status = %(status)s)
    AND (%(error)s::text IS NULL OR strpos(lower(error), lower(%(error)s)) > 0)
    AND (%(text)s::text IS NULL
         OR %(text)s IN (id::text, unique_key, batch_key, kind, queue)
         OR strpos(lower(error), lower(%(text)s)) > 0)
  ORDER BY number
  LIMIT %(limit)s + 1
)
SELECT p.id, p.page_key, p.queue, p.kind, p.shown_status AS status, p.items_total,
       (p.items_done + coalesce(s.items_done, 0))::integer AS items_done,
       (p.items_failed + coalesce(s.items_failed, 0))::integer AS items_failed,
       p.attempt + (p.status = 'waiting' AND p.claimed_at IS NOT NULL)::integer AS attempt, p.max_attempts, p.priority,
       p.batch_key, p.unique_key, p.claimed_by, left(p.error, 200) AS error,
       CASE WHEN isfinite(p.created_at) THEN extract(epoch FROM now() - p.created_at)::float8 END AS age_seconds,
       to_char(p.run_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS run_at_utc,
       to_char(p.finished_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS ended_utc,
       to_char(p.claimed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS claimed_utc,
       looked.searched, looked.last_key
FROM (
  SELECT count(*) AS searched, (SELECT l.page_key FROM searched l ORDER BY l.number DESC LIMIT 1) AS last_key
  FROM searched
) looked
LEFT JOIN page p ON true
LEFT JOIN LATERAL batchq.progress_of_parts(CASE WHEN p.spread > 1 THEN p.id END) s ON true
ORDER BY p.number

-- name: ids_by_index
SELECT u.id
FROM unnest(%(queues)s::text[], %(kinds)s::text[]) AS p(queue, kind)
CROSS JOIN LATERAL unnest(batchq.shards_of(p.queue)) AS s(shard)
CROSS JOIN LATERAL (
  SELECT b.id
  FROM batchq.batches_live b
  WHERE b.queue = s.shard
    AND b.kind = p.kind
    AND b.unique_key = %(unique_key)s
  LIMIT 1
) u
UNION
SELECT k.id
FROM batchq.keyed_queues() AS q(queue)
CROSS JOIN LATERAL (
  SELECT b.id
  FROM batchq.batches_live b
  WHERE b.queue = q.queue
    AND b.status = 'pending'
    AND b.key = %(of_key)s
  ORDER BY b.key, b.priority, b.run_at, b.id
  LIMIT 20
) k
WHERE %(of_key)s::text IS NOT NULL
LIMIT 50

-- name: counts
SELECT looked.retrying, looked.scheduled, cancelled.*, completed.*, finished.about AS finished_about
FROM (
  SELECT count(*) FILTER (WHERE has_failed AND fits) AS retrying, count(*) AS scheduled
  FROM (
    (SELECT b.errors <> '[]' AS has_failed, %(kind)s::text IS NULL OR b.kind = %(kind)s AS fits
     FROM batchq.waiting_levels() w
     CROSS JOIN LATERAL (
       SELECT b.errors, b.kind
       FROM batchq.batches_live b
       WHERE b.queue = w.queue
         AND b.status = 'pending'
         AND b.key IS NULL
         AND b.priority = w.priority
         AND (b.run_at, b.id) >= (w.at, w.id)
         AND b.run_at > now()
       ORDER BY b.run_at, b.id
       LIMIT %(most)s
     ) b
     WHERE w.at IS NOT NULL
       AND (%(queue)s::text IS NULL OR batchq.whole_queue(w.queue) = %(queue)s)
     LIMIT %(most)s)
    UNION ALL
    (SELECT b.errors <> '[]', (%(kind)s::text IS NULL OR b.kind = %(kind)s)
     FROM batchq.keyed_queues() AS q(queue)
     CROSS JOIN LATERAL (
       SELECT b.errors, b.kind, b.run_at
       FROM batchq.batches_live b
       WHERE b.queue = q.queue
         AND b.status = 'pending'
         AND b.key > ''
       ORDER BY b.key, b.priority, b.run_at, b.id
       LIMIT %(most)s
     ) b
     WHERE b.run_at > now()
       AND (%(queue)s::text IS NULL OR batchq.whole_queue(q.queue) = %(queue)s)
     LIMIT %(most)s)
  ) pending
) looked
CROSS JOIN (
  SELECT count(*) FILTER (WHERE b.part_of IS NULL
                            AND (%(queue)s::text IS NULL OR batchq.whole_queue(b.queue) = %(queue)s)
                            AND (%(kind)s::text IS NULL OR b.kind = %(kind)s)) AS cancelled,
         count(*) AS cancelled_looked
  FROM (
    SELECT f.queue, f.kind, f.part_of
    FROM batchq.batches_finished f
    WHERE f.status = 'cancelled'
    ORDER BY f.finished_at DESC, f.id DESC
    LIMIT %(most)s
  ) b
) cancelled
CROSS JOIN (
  SELECT count(*) FILTER (WHERE b.status = 'completed'
                            AND b.part_of IS NULL
                            AND (%(queue)s::text IS NULL OR batchq.whole_queue(b.queue) = %(queue)s)
                            AND (%(kind)s::text IS NULL OR b.kind = %(kind)s)) AS completed,
         count(*) AS finished_looked
  FROM (SELECT f.status, f.queue, f.kind, f.part_of FROM batchq.batches_finished f ORDER BY f.id DESC LIMIT %(most)s) b
) completed
CROSS JOIN (
  SELECT coalesce(sum(c.reltuples) FILTER (WHERE c.reltuples > 0), 0)::bigint AS about
  FROM pg_catalog.pg_inherits i
  JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
  WHERE i.inhparent = 'batchq.batches_finished'::regclass
) finished

-- name: chosen
SELECT s.id, s.kind, s.status, s.items_failed
FROM batchq.status s
WHERE s.id = ANY (%(ids)s::bigint[])
ORDER BY s.id DESC

-- name: was_changed
SELECT EXISTS (SELECT 1 FROM batchq.audit WHERE batch_id = %(id)s AND at = now()) AS was_changed
