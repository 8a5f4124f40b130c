-- The statements of the web UI, by the names that batchq/web/reads.py uses. Long texts of batches are shortened here,
-- in the database, because they may be megabytes. Times are text in UTC, durations are seconds.

-- name: only_read
SELECT set_config('transaction_read_only', 'on', true), set_config('jit', 'off', true)

-- name: ping
SELECT max(version) FROM batchq.migrations

-- name: queues
SELECT q.queue, q.kind, q.ready, q.scheduled, q.waiting, q.processing, q.stalled, q.failed,
       extract(epoch FROM q.oldest_wait)::float8 AS oldest_wait_seconds,
       q.finished_per_second::float8, q.workers, q.estimated, q.held_back, q.held_back_by,
       EXISTS (SELECT 1 FROM batchq.pauses p
               WHERE (p.queue IS NULL OR p.queue = q.queue)
                 AND (p.kind IS NULL OR p.kind = q.kind)
                 AND (p.until IS NULL OR p.until > now())) AS is_paused
FROM batchq.queues q
ORDER BY q.queue, q.kind
LIMIT %(limit)s

-- name: waiting_for_failed
SELECT queue, kind, count(DISTINCT batch_id) AS batches
FROM batchq.stuck_waiting()
GROUP BY queue, kind
ORDER BY queue, kind

-- name: minutes
SELECT (extract(epoch FROM date_trunc('minute', now()) - t.minute) / 60)::integer AS minutes_ago, t.queue, t.kind,
       sum(t.completed)::bigint AS completed, sum(t.failed)::bigint AS failed, sum(t.items)::bigint AS items,
       sum(t.completed + t.failed + t.cancelled + t.retried)::bigint AS runs, sum(t.run_seconds) AS run_seconds
FROM batchq.throughput_minutes t
WHERE t.minute > date_trunc('minute', now()) - interval '60 minutes'
GROUP BY t.minute, t.queue, t.kind
LIMIT 20000

-- name: failures
SELECT kind, error, failures, extract(epoch FROM now() - latest_at)::float8 AS latest_seconds_ago, example_id
FROM batchq.failures
ORDER BY latest_at DESC
LIMIT %(limit)s

-- name: workers
SELECT id, hostname, pid, version, queues, kinds, concurrency, in_hand,
       CASE
         WHEN heartbeat_at < now() - interval '1 minute' THEN 'gone'
         WHEN stopping THEN 'stopping'
         WHEN drain_asked_at IS NOT NULL THEN 'draining'
         ELSE 'working'
       END AS state,
       extract(epoch FROM now() - started_at)::float8 AS up_seconds,
       extract(epoch FROM now() - heartbeat_at)::float8 AS heartbeat_seconds
FROM batchq.workers
ORDER BY heartbeat_at < now() - interval '1 minute', id
LIMIT %(limit)s

-- name: pauses
SELECT queue, kind, to_char(until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS until_utc, reason,
       coalesce(actor, role) AS actor, extract(epoch FROM now() - paused_at)::float8 AS paused_seconds
FROM batchq.pauses
WHERE until IS NULL OR until > now()
ORDER BY queue NULLS FIRST, kind NULLS FIRST
LIMIT 200

-- name: limits
SELECT queue, kind, max_running, per_second, items_per_second, burst_seconds, max_running_per_key, is_set, is_declared,
       workers, running, starts_per_second_shared, items_per_second_shared, held_back_by
FROM batchq.limits_in_use
ORDER BY queue, kind NULLS FIRST
LIMIT %(limit)s

-- name: throttles
SELECT queue, nullif(kind, '') AS kind, nullif(key, '') AS key, worker,
       extract(epoch FROM until - now())::float8 AS left_seconds,
       extract(epoch FROM now() - throttled_at)::float8 AS throttled_seconds
FROM batchq.throttles
WHERE until > now()
ORDER BY queue, kind, key
LIMIT 200

-- name: schedules
SELECT name, left(cron, 300) AS cron, time_zone, queue, kind, missed, catch_up_most, overlap, state, next_at, last_batch_id,
       last_status, last_late_seconds, batches_made, ticks_missed, ticks_overlapped, left(error, 300) AS error, is_declared,
       declaring_workers, handling_workers, extract(epoch FROM now() - next_at)::float8 AS overdue_seconds
FROM batchq.schedule_status
ORDER BY name
LIMIT %(limit)s

-- name: audit
SELECT id, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS at_utc, verb, batches, batch_id, queue, kind,
       left(details::text, 300) AS details, left(reason, 300) AS reason, role, actor
FROM batchq.audit
WHERE (%(before)s::bigint IS NULL OR id < %(before)s)
ORDER BY id DESC
LIMIT %(limit)s

-- name: searched_by_id
WITH finished AS (
  SELECT b.id, b.queue, b.kind, b.status, b.run_at, b.lease_expires_at, b.created_at, b.claimed_at,
         b.finished_at, b.items_total, b.items_done, b.items_failed, b.attempt, b.max_attempts, b.priority,
         b.unique_key, b.errors
  FROM batchq.batches b
  WHERE b.id < %(before_id)s
    AND b.status = ANY (%(final_statuses)s)
  ORDER BY b.id DESC
  LIMIT %(most)s
), live AS (
  SELECT b.id, b.queue, b.kind, b.status, b.run_at, b.lease_expires_at, b.created_at, b.claimed_at,
         b.finished_at, b.items_total, b.items_done, b.items_failed, b.attempt, b.max_attempts, b.priority,
         b.unique_key, b.errors
  FROM batchq.batches_live b
  WHERE b.id = ANY (ARRAY(SELECT batchq.newest_live(NULL, NULL, %(live_status)s, %(before_id)s, %(most)s)))
    AND b.status = ANY (%(statuses)s)
), searched AS MATERIALIZED (
  SELECT b.*, b.id::text AS key, row_number() OVER (ORDER BY b.id DESC) AS number
  FROM (SELECT * FROM finished UNION ALL SELECT * FROM live) b
  ORDER BY b.id DESC
  LIMIT %(most)s
)

-- name: searched_processing
WITH searched AS MATERIALIZED (
  SELECT b.*, b.id::text AS key, row_number() OVER (ORDER BY b.id DESC) AS number
  FROM (SELECT l.id, l.queue, l.kind, l.status, l.run_at, l.lease_expires_at, l.created_at, l.claimed_at,
               l.finished_at, l.items_total, l.items_done, l.items_failed, l.attempt, l.max_attempts, l.priority,
               l.unique_key, l.errors
        FROM batchq.busy_queues() q
        CROSS JOIN LATERAL (
          SELECT *
          FROM batchq.batches_live b
          WHERE b.queue = q.queue
            AND b.status = 'processing'
            AND b.lease_expires_at >= q.at
          ORDER BY b.lease_expires_at
          LIMIT 20000
        ) l
        WHERE q.at IS NOT NULL
        ORDER BY l.queue, l.lease_expires_at
        LIMIT 20000) b
  WHERE b.id < %(before_id)s
  ORDER BY b.id DESC
  LIMIT %(most)s
)

-- name: searched_failed
WITH searched AS MATERIALIZED (
  SELECT b.id, extract(epoch FROM b.finished_at)::text || ' ' || b.id AS key, b.queue, b.kind, b.status, b.run_at,
         b.lease_expires_at, b.created_at, b.claimed_at, b.finished_at, b.items_total, b.items_done, b.items_failed,
         b.attempt, b.max_attempts, b.priority, b.unique_key, b.errors,
         row_number() OVER (ORDER BY b.finished_at DESC, b.id DESC) AS number
  FROM batchq.batches b
  WHERE b.status = 'failed'
    AND (b.finished_at, b.id) < (to_timestamp(%(before_time)s::float8), %(before_id)s)
  ORDER BY b.finished_at DESC, b.id DESC
  LIMIT %(most)s
)

-- name: matching
, shown AS (
  SELECT l.*,
         CASE
           WHEN l.status = 'processing' AND l.lease_expires_at < now() THEN 'stalled'
           WHEN l.status = 'pending' AND l.run_at <= now() THEN 'ready'
           WHEN l.status = 'pending' AND jsonb_array_length(l.errors) > 0 THEN 'retrying'
           WHEN l.status = 'pending' THEN 'scheduled'
           ELSE l.status
         END AS shown_status,
         l.errors -> -1 ->> 'error' AS error
  FROM searched l
  WHERE (%(queue)s::text IS NULL OR l.queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR l.kind = %(kind)s)
), page AS MATERIALIZED (
  SELECT *
  FROM shown
  WHERE (%(status)s::text IS NULL OR shown_status = %(status)s)
    AND (%(error)s::text IS NULL OR strpos(lower(error), lower(%(error)s)) > 0)
  ORDER BY number
  LIMIT %(limit)s + 1
)
SELECT id, key, queue, kind, shown_status AS status, items_total, items_done, items_failed, attempt, max_attempts,
       priority, left(error, 200) AS error,
       CASE WHEN isfinite(created_at) THEN extract(epoch FROM now() - created_at)::float8 END AS age_seconds,
       (SELECT count(*) FROM searched) AS searched, (SELECT l.key FROM searched l ORDER BY number DESC LIMIT 1) AS last_key
FROM page
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, count(*),
       (SELECT l.key FROM searched l ORDER BY number DESC LIMIT 1)
FROM searched
WHERE NOT EXISTS (SELECT 1 FROM page)

-- name: batch
SELECT s.id, s.queue, s.kind, s.status, s.items_total, s.items_done, s.items_failed, s.attempt, s.max_attempts,
       s.priority, s.claimed_by, s.unique_key, s.key, s.needs_left, b.on_failure, b.max_failed_items, b.timeout_seconds,
       extract(epoch FROM s.running_time)::float8 AS running_seconds,
       CASE WHEN isfinite(s.created_at) THEN extract(epoch FROM now() - s.created_at)::float8 END AS age_seconds,
       CASE WHEN isfinite(s.next_run_at) THEN extract(epoch FROM s.next_run_at - now())::float8 END AS due_in_seconds,
       extract(epoch FROM s.lease_expires_at - now())::float8 AS lease_seconds,
       to_char(s.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS created_utc,
       to_char(s.claimed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS claimed_utc,
       to_char(s.finished_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS finished_utc,
       to_char(s.next_run_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS due_utc
FROM batchq.status s
JOIN batchq.batches b ON b.id = s.id AND b.queue = s.queue
WHERE s.id = %(id)s
  AND b.id = %(id)s

-- name: inputs
SELECT field.name, left(field.text, %(most)s) AS text, length(field.text) AS characters
FROM batchq.batches b
CROSS JOIN LATERAL (
  VALUES ('payload', CASE WHEN pg_column_size(b.payload) < 20000 THEN jsonb_pretty(b.payload) ELSE b.payload::text END),
         ('cursor', CASE WHEN pg_column_size(b.cursor) < 20000 THEN jsonb_pretty(b.cursor) ELSE b.cursor::text END),
         ('result', CASE WHEN pg_column_size(b.result) < 20000 THEN jsonb_pretty(b.result) ELSE b.result::text END)
) field(name, text)
WHERE b.id = %(id)s
  AND field.text IS NOT NULL

-- name: errors
SELECT left(e.value ->> 'attempt', 20) AS attempt, left(e.value ->> 'at', 19) AS at_text,
       left(e.value ->> 'error', 2500) AS error, left(e.value ->> 'traceback', 20000) AS traceback
FROM batchq.batches b
CROSS JOIN LATERAL jsonb_array_elements(b.errors) WITH ORDINALITY e(value, number)
WHERE b.id = %(id)s
ORDER BY e.number DESC
LIMIT 20

-- name: failed_items
SELECT f.item_index, left(f.item::text, 500) AS item, length(f.item::text) AS item_characters,
       left(f.error, 1000) AS error, f.attempt, f.retryable
FROM batchq.failed_items f
WHERE f.batch_id = %(id)s
  AND f.item_index > %(after)s
ORDER BY f.item_index
LIMIT %(limit)s
