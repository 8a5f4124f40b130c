-- The statements of the web UI, by the names that batchq/web/reads.py uses. Long texts of batches are shortened here,
-- in the database, because they may be megabytes. Times are text in UTC, durations are seconds.

-- name: only_read
SET LOCAL transaction_read_only = on;
SET LOCAL jit = off

-- name: by_index
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off

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

-- name: failure_groups
WITH latest AS MATERIALIZED (
  SELECT f.id, f.queue, f.kind, f.finished_at, f.error, batchq.error_group(f.error) AS error_group
  FROM batchq.latest_failures() f
), span AS MATERIALIZED (
  SELECT count(*) AS read, min(finished_at) AS first_at, greatest(now(), max(finished_at)) AS last_at FROM latest
), groups AS (
  SELECT kind, error_group, count(*) AS failures, array_agg(DISTINCT queue ORDER BY queue) AS queues,
         min(finished_at) AS first_at, max(finished_at) AS latest_at,
         (array_agg(id ORDER BY finished_at DESC, id DESC))[1] AS example_id,
         array_agg(extract(epoch FROM finished_at)::float8) AS times,
         (array_agg(left(error, 500) ORDER BY finished_at DESC, id DESC))[1] AS example
  FROM latest
  WHERE (%(kind)s::text IS NULL OR kind = %(kind)s)
    AND (%(error_group)s::text IS NULL OR error_group = %(error_group)s)
  GROUP BY kind, error_group
  ORDER BY latest_at DESC, kind, error_group
  LIMIT %(limit)s
)
SELECT g.kind, g.error_group AS error, g.failures, g.queues, g.example_id, g.example, g.times, span.read,
       extract(epoch FROM span.first_at)::float8 AS read_from, extract(epoch FROM span.last_at)::float8 AS read_to,
       extract(epoch FROM now() - span.first_at)::float8 AS read_seconds,
       extract(epoch FROM now() - g.first_at)::float8 AS first_seconds_ago,
       extract(epoch FROM now() - g.latest_at)::float8 AS latest_seconds_ago,
       to_char(g.first_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS first_utc,
       to_char(g.latest_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS latest_utc
FROM groups g
CROSS JOIN span
ORDER BY g.latest_at DESC, g.kind, g.error_group

-- name: failures_of_group
SELECT f.id, f.queue, left(f.error, 500) AS error, extract(epoch FROM now() - f.finished_at)::float8 AS seconds_ago,
       to_char(f.finished_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS finished_utc
FROM batchq.latest_failures() f
WHERE f.kind = %(kind)s
  AND batchq.error_group(f.error) = %(error_group)s
ORDER BY f.finished_at DESC, f.id DESC
LIMIT %(limit)s

-- name: workers
SELECT id, hostname, pid, version, queues, kinds, concurrency, in_hand,
       CASE  -- as in WORKERS of batchq/postgres/statements/views.py
         WHEN heartbeat_at < now() - interval '1 minute' THEN 'gone'
         WHEN heartbeat_at < now() - interval '10 seconds' THEN 'late'
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
       to_char(last_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS last_utc, now() AS now,
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

-- name: batch
SELECT s.id, s.queue, s.shard, s.kind, s.status, s.items_total, s.items_done, s.items_failed, s.attempt,
       s.max_attempts, s.priority, s.claimed_by, s.unique_key, s.key, s.needs_left, s.spread, b.on_failure, s.stored_status,
       b.max_failed_items, b.timeout_seconds, b.trace_context,
       extract(epoch FROM s.running_time)::float8 AS running_seconds,
       CASE WHEN isfinite(s.created_at) THEN extract(epoch FROM now() - s.created_at)::float8 END AS age_seconds,
       CASE WHEN isfinite(s.next_run_at) THEN extract(epoch FROM s.next_run_at - now())::float8 END AS due_in_seconds,
       extract(epoch FROM s.lease_expires_at - now())::float8 AS lease_seconds,
       to_char(s.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') AS created_utc,
       to_char(s.claimed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') AS claimed_utc,
       to_char(s.finished_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') AS finished_utc,
       to_char(s.next_run_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') AS due_utc,
       CASE WHEN b.run_at > b.created_at + interval '1 second' AND b.run_at <= now()
            THEN to_char(b.run_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') END AS was_due_utc
FROM batchq.status s
JOIN batchq.all_batches b ON b.id = s.id AND b.queue = s.shard
WHERE s.id = %(id)s
  AND b.id = %(id)s

-- name: batch_audit
SELECT a.verb, a.batches, a.reason, coalesce(a.actor, a.role) AS actor,
       to_char(a.at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') AS at_utc,
       left(a.details ->> 'to_queue', 200) AS to_queue, left(a.details ->> 'priority', 20) AS priority,
       left(a.details ->> 'run_at', 19) AS run_at, left(a.details ->> 'schedule', 200) AS schedule,
       left(a.details ->> 'copy_of', 20) AS copy_of, a.details -> 'whole' = 'true'::jsonb AS is_whole
FROM (SELECT id, at, verb, batches, details, left(reason, 500) AS reason, role, actor
      FROM batchq.audit
      WHERE batch_id = %(id)s
      ORDER BY id + 0 DESC  -- by the index of batch_id; the newest first
      LIMIT 50) a
ORDER BY a.id DESC

-- name: batch_waited
SELECT count(*) AS batches,
       CASE WHEN bool_and(s.finished_at IS NOT NULL)
            THEN to_char(max(s.finished_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') END AS ended_utc
FROM (SELECT needed_id FROM batchq.needs WHERE batch_id = %(id)s ORDER BY needed_id LIMIT %(limit)s) n
LEFT JOIN batchq.status s ON s.id = n.needed_id

-- name: batch_held
SELECT 'paused' AS by, coalesce(p.actor, p.role) AS actor, left(p.reason, 500) AS reason, p.queue, p.kind, NULL AS key,
       to_char(p.paused_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') AS at_utc,
       to_char(p.until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS until_utc
FROM batchq.pauses p
WHERE coalesce(p.queue, %(queue)s) = %(queue)s
  AND coalesce(p.kind, %(kind)s) = %(kind)s
  AND (p.until IS NULL OR p.until > now())
UNION ALL
SELECT 'throttled', t.worker, NULL, t.queue, nullif(t.kind, ''), nullif(t.key, ''),
       to_char(t.throttled_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'),
       to_char(t.until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
FROM batchq.throttles t
WHERE t.queue = %(queue)s
  AND t.kind IN ('', %(kind)s)
  AND t.key IN ('', %(key)s)
  AND t.until > now()
UNION ALL
SELECT 'limited', NULL, string_agg(DISTINCT u.held_back_by, ', '), u.queue, u.kind, NULL, NULL, NULL
FROM batchq.limits_in_use u
WHERE u.queue = %(queue)s
  AND coalesce(u.kind, %(kind)s) = %(kind)s
  AND u.held_back_by IS NOT NULL
GROUP BY u.queue, u.kind
LIMIT 10

-- name: batch_schedule
SELECT name
FROM batchq.schedules
WHERE name = %(schedule)s
   OR last_batch_id = %(id)s
ORDER BY name
LIMIT 1

-- name: raw_input
SELECT CASE %(field)s WHEN 'payload' THEN b.payload::text WHEN 'cursor' THEN b.cursor::text ELSE b.result::text END AS text
FROM batchq.all_batches b
WHERE b.id = %(id)s
  AND b.part_of IS NULL

-- name: errors
SELECT left(e.value ->> 'attempt', 20) AS attempt, left(e.value ->> 'at', 40) AS at_text,
       left(e.value ->> 'error', 2500) AS error, left(e.value ->> 'traceback', 20000) AS traceback
FROM batchq.all_batches b
CROSS JOIN LATERAL jsonb_array_elements(b.errors) WITH ORDINALITY e(value, number)
WHERE b.id = %(id)s
ORDER BY e.number DESC
LIMIT 20

-- name: failed_items
SELECT f.item_index, left(f.item::text, 500) AS item, length(f.item::text) AS item_characters,
       left(f.error, 1000) AS error, f.attempt, f.retryable
FROM batchq.failed_items_of(%(id)s, %(after)s, %(limit)s) f
ORDER BY f.item_index

-- name: held_back
SELECT q.queue, q.kind, q.ready, q.estimated, q.held_back, q.held_back_by, q.workers,
       extract(epoch FROM q.oldest_wait)::float8 AS oldest_wait_seconds,
       EXISTS (SELECT 1 FROM batchq.pauses p
               WHERE (p.queue IS NULL OR p.queue = q.queue)
                 AND (p.kind IS NULL OR p.kind = q.kind)
                 AND (p.until IS NULL OR p.until > now())) AS is_paused
FROM batchq.queues q
WHERE q.ready > 0
ORDER BY q.oldest_wait DESC NULLS LAST, q.queue, q.kind
LIMIT %(limit)s

-- name: keys
WITH counted AS MATERIALIZED (
  SELECT queue, key, waiting, scheduled, running,
         CASE WHEN oldest_at <= now() THEN extract(epoch FROM now() - oldest_at)::float8 END AS oldest_wait_seconds
  FROM batchq.count_keys(%(most)s, %(most_of_a_key)s, %(queue)s::text)
)
SELECT c.*, (SELECT count(*) FROM counted) AS keys_read, count(*) OVER () AS keys_found
FROM counted c
WHERE %(part)s::text IS NULL
   OR strpos(lower(c.key), lower(%(part)s)) > 0
ORDER BY c.oldest_wait_seconds DESC NULLS LAST, c.queue, c.key
LIMIT %(limit)s

-- name: one_key
WITH known AS MATERIALIZED (
  (SELECT k.queue FROM batchq.keyed_queues() AS k(queue) LIMIT 1000)
  UNION
  (SELECT b.queue FROM batchq.busy_queues() b LIMIT 1000)
)
SELECT batchq.whole_queue(q.queue) AS queue, %(key)s::text AS key, p.waiting, p.scheduled, r.running,
       CASE WHEN p.oldest_at <= now() THEN extract(epoch FROM now() - p.oldest_at)::float8 END AS oldest_wait_seconds
FROM known q
CROSS JOIN LATERAL (
  SELECT count(*) FILTER (WHERE w.run_at <= now()) AS waiting, count(*) FILTER (WHERE w.run_at > now()) AS scheduled,
         min(w.run_at) AS oldest_at
  FROM (SELECT b.run_at
        FROM batchq.batches_live b
        WHERE b.queue = q.queue
          AND b.status = 'pending'
          AND b.key = %(key)s
        ORDER BY b.priority, b.run_at, b.id
        LIMIT %(most_of_a_key)s + 1) w
) p
CROSS JOIN LATERAL (
  SELECT count(*) AS running
  FROM (SELECT 1
        FROM batchq.batches_live b
        WHERE b.queue = q.queue
          AND b.key = %(key)s
          AND b.claimed_at IS NOT NULL
          AND b.lease_expires_at > '-infinity'
        ORDER BY b.lease_expires_at
        LIMIT %(most_of_a_key)s + 1) b
) r
WHERE (%(queue)s::text IS NULL OR batchq.whole_queue(q.queue) = %(queue)s)
  AND p.waiting + p.scheduled + r.running > 0
ORDER BY q.queue
LIMIT 100

-- name: begun_of_keys
SELECT u.queue, u.key, b.id, b.kind, b.status
FROM unnest(%(queues)s::text[], %(keys)s::text[]) AS u(queue, key)
CROSS JOIN LATERAL unnest(batchq.shards_of(u.queue)) AS s(shard)
CROSS JOIN LATERAL (
  SELECT coalesce(l.part_of, l.id) AS id, l.kind,
         batchq.shown_status(l.status, l.run_at, l.lease_expires_at, l.errors) AS status
  FROM batchq.batches_live l
  WHERE l.queue = s.shard
    AND l.key = u.key COLLATE "C"
    AND l.claimed_at IS NOT NULL
  ORDER BY l.lease_expires_at
  LIMIT %(limit)s
) b

-- name: flow_waiting
WITH known AS MATERIALIZED (
  SELECT w.queue FROM batchq.waiting_queues() AS w(queue) LIMIT 200
), share AS MATERIALIZED (
  SELECT greatest(20, %(most)s / greatest(count(*), 1))::integer AS of_queue FROM known
)
SELECT batchq.whole_queue(q.queue) AS queue, b.id, b.kind, b.needs_left,
       CASE WHEN isfinite(b.created_at) THEN extract(epoch FROM now() - b.created_at)::float8 END AS age_seconds
FROM known q
CROSS JOIN LATERAL (
  SELECT l.id, l.kind, l.needs_left, l.created_at
  FROM batchq.batches_live l
  WHERE l.queue = q.queue
    AND l.status = 'waiting'
    AND l.claimed_at IS NULL
  ORDER BY l.queue, l.id
  LIMIT (SELECT of_queue FROM share)
) b
LIMIT 4 * %(most)s

-- name: flow_needs
SELECT n.batch_id, n.needed_id, n.ended_as,
       coalesce(n.on_failure = 'wait' AND n.ended_as <> 'completed' AND retried.id IS NULL, false) AS is_stuck
FROM unnest(%(ids)s::bigint[]) AS w(id)
CROSS JOIN LATERAL (
  SELECT * FROM batchq.needs m WHERE m.batch_id = w.id ORDER BY m.batch_id, m.needed_id LIMIT %(most_of_each)s
) n
LEFT JOIN LATERAL (  -- LIMIT keeps the planner from a hash of all live batches
  SELECT l.id
  FROM batchq.batches_live l
  WHERE l.id = CASE WHEN n.on_failure = 'wait' AND n.ended_as <> 'completed' THEN n.needed_id END
  LIMIT 1
) retried ON true
LIMIT 20000

-- name: stuck
SELECT queue, kind, batch_id, needed_id, ended_as FROM batchq.stuck_waiting() LIMIT 5000

-- name: spread
SELECT w.id, batchq.whole_queue(w.queue) AS queue, w.kind, w.items_total, w.attempt + 1 AS attempt, w.max_attempts,
       w.items_done + p.items_done AS items_done, w.items_failed + p.items_failed AS items_failed,
       p.items_done + p.items_failed AS items_of_parts, p.parts, p.ended, p.bad, p.running, p.stalled, p.workers,
       extract(epoch FROM now() - p.began_at)::float8 AS running_seconds
FROM batchq.spread_batches(%(limit)s) AS s(id)
CROSS JOIN LATERAL (
  SELECT * FROM batchq.batches_live l WHERE l.id = s.id AND l.status = 'waiting' AND l.claimed_at IS NOT NULL LIMIT 1
) w
CROSS JOIN LATERAL (
  SELECT count(*) AS parts, count(*) FILTER (WHERE b.id IS NULL) AS ended,
         count(*) FILTER (WHERE r.ended_as IN ('failed', 'cancelled')) AS bad,
         count(*) FILTER (WHERE b.status = 'processing' AND b.lease_expires_at >= now()) AS running,
         count(*) FILTER (WHERE b.status = 'processing' AND b.lease_expires_at < now()) AS stalled,
         count(DISTINCT b.claimed_by) FILTER (WHERE b.status = 'processing') AS workers,
         coalesce(sum(coalesce(b.items_done, r.items_done)), 0)::bigint AS items_done,
         coalesce(sum(coalesce(b.items_failed, r.items_failed)), 0)::bigint AS items_failed, min(r.at) AS began_at
  FROM batchq.parts r
  LEFT JOIN batchq.batches_live b ON b.queue = r.queue AND b.id = r.part_id
  WHERE r.batch_id = w.id
) p
ORDER BY w.id DESC

-- name: kind
SELECT q.queue, q.kind, q.ready, q.scheduled, q.waiting, q.processing, q.stalled, q.failed, q.workers, q.estimated,
       q.held_back, q.held_back_by, extract(epoch FROM q.oldest_wait)::float8 AS oldest_wait_seconds,
       q.finished_per_second::float8
FROM batchq.queues q
WHERE q.queue = %(queue)s
  AND q.kind = %(kind)s

-- name: kind_hour
SELECT coalesce(sum(t.completed), 0)::bigint AS completed, coalesce(sum(t.failed), 0)::bigint AS failed,
       coalesce(sum(t.cancelled), 0)::bigint AS cancelled, coalesce(sum(t.retried), 0)::bigint AS retried,
       coalesce(sum(t.items), 0)::bigint AS items,
       batchq.run_time_percentiles(batchq.sum_counts(t.run_times), '{0.50,0.95,0.99}') AS run_seconds
FROM batchq.throughput_minutes t
WHERE t.minute > date_trunc('minute', now()) - interval '60 minutes'
  AND t.queue = %(queue)s
  AND t.kind = %(kind)s

-- name: kind_pauses
SELECT queue, kind, to_char(until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS until_utc, reason,
       coalesce(actor, role) AS actor, extract(epoch FROM now() - paused_at)::float8 AS paused_seconds
FROM batchq.pauses
WHERE (until IS NULL OR until > now())
  AND (queue IS NULL OR queue = %(queue)s)
  AND (kind IS NULL OR kind = %(kind)s)
ORDER BY queue NULLS FIRST, kind NULLS FIRST
LIMIT 50

-- name: kind_limits
SELECT queue, kind, max_running, per_second, items_per_second, burst_seconds, max_running_per_key, is_set, is_declared,
       workers, running, starts_per_second_shared, items_per_second_shared, held_back_by
FROM batchq.limits_in_use
WHERE queue = %(queue)s
  AND (kind IS NULL OR kind = %(kind)s)
ORDER BY kind NULLS FIRST

-- name: kind_throttles
SELECT queue, nullif(kind, '') AS kind, nullif(key, '') AS key, worker,
       extract(epoch FROM until - now())::float8 AS left_seconds,
       extract(epoch FROM now() - throttled_at)::float8 AS throttled_seconds
FROM batchq.throttles
WHERE until > now()
  AND queue = %(queue)s
  AND kind IN ('', %(kind)s)
ORDER BY kind, key
LIMIT 50

-- name: kind_failures
SELECT id, left(error, 300) AS error, extract(epoch FROM now() - finished_at)::float8 AS seconds_ago
FROM batchq.latest_failures()
WHERE queue = %(queue)s
  AND kind = %(kind)s
ORDER BY finished_at DESC, id DESC
LIMIT %(limit)s

-- name: kind_schedules
SELECT name, left(cron, 300) AS cron, time_zone, state, next_at
FROM batchq.schedule_status
WHERE queue = %(queue)s
  AND kind = %(kind)s
ORDER BY name
LIMIT %(limit)s

-- name: worker_batches
WITH running AS MATERIALIZED (
  SELECT l.*
  FROM batchq.busy_queues() q
  CROSS JOIN LATERAL (
    SELECT b.id, b.queue, b.kind, b.part_of, b.claimed_by, b.claimed_at, b.lease_expires_at, b.items_total, b.items_done,
           b.items_failed, b.attempt, b.max_attempts
    FROM batchq.batches_live b
    WHERE b.queue = q.queue
      AND b.status = 'processing'
      AND b.lease_expires_at >= q.at
    ORDER BY b.lease_expires_at
    LIMIT 10000
  ) l
  WHERE q.at IS NOT NULL
    AND batchq.whole_queue(q.queue) = ANY (%(queues)s::text[])
  LIMIT 10000
)
SELECT r.id, batchq.whole_queue(r.queue) AS queue, r.kind, r.part_of, r.items_total, r.items_done, r.items_failed, r.attempt, r.max_attempts,
       CASE WHEN r.lease_expires_at < now() THEN 'stalled' ELSE 'processing' END AS status,
       extract(epoch FROM now() - r.claimed_at)::float8 AS running_seconds, count(*) OVER () AS claimed
FROM running r
WHERE r.claimed_by = %(worker)s
ORDER BY r.claimed_at, r.id
LIMIT %(limit)s

-- name: worker_minutes
SELECT coalesce(sum(completed), 0)::bigint AS completed, coalesce(sum(failed), 0)::bigint AS failed,
       coalesce(sum(retried), 0)::bigint AS retried, coalesce(sum(items), 0)::bigint AS items
FROM batchq.throughput_minutes
WHERE worker = %(worker)s
  AND minute >= date_trunc('minute', now()) - interval '1 minute'

-- name: schedule
SELECT name, left(cron, 300) AS cron, time_zone, queue, kind, missed, catch_up_most, overlap, state, next_at, last_batch_id,
       last_status, last_late_seconds, batches_made, ticks_missed, ticks_overlapped, left(error, 1200) AS error, is_declared,
       declaring_workers, handling_workers, left(payload::text, 20000) AS payload,
       to_char(last_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS last_utc, now() AS now
FROM batchq.schedule_status
WHERE name = %(schedule)s

-- name: chart
-- A row per time, and one per queue and kind. The newest times are not added up in spans yet.
WITH range AS MATERIALIZED (
  SELECT date_trunc('minute', now()) AS until, %(step)s * interval '1 minute' AS step,
         date_bin(%(step)s * interval '1 minute',
                  date_trunc('minute', now()) + (%(step)s - 1 - %(minutes)s) * interval '1 minute',
                  '2000-01-01 00:00:00+00') AS since,
         (SELECT max(s.starts_at) + interval '2 hours' FROM batchq.throughput_spans s WHERE s.minutes = 120) AS has_hours,
         (SELECT max(s.starts_at) + interval '15 minutes' FROM batchq.throughput_spans s WHERE s.minutes = 15) AS has_quarters
), counted AS MATERIALIZED (
  SELECT s.starts_at AS at, s.queue, s.kind, s.completed, s.failed, s.cancelled, s.retried, s.run_seconds, s.run_times,
         s.wait_times
  FROM batchq.throughput_spans s
  WHERE %(step)s = 120
    AND s.minutes = 120
    AND s.starts_at >= (SELECT since FROM range)
    AND (%(queue)s::text IS NULL OR s.queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR s.kind = %(kind)s)
  UNION ALL
  SELECT s.starts_at, s.queue, s.kind, s.completed, s.failed, s.cancelled, s.retried, s.run_seconds, s.run_times,
         s.wait_times
  FROM batchq.throughput_spans s
  WHERE %(step)s >= 15
    AND s.minutes = 15
    AND s.starts_at >= (SELECT greatest(since, CASE WHEN %(step)s = 120 THEN has_hours END) FROM range)
    AND (%(queue)s::text IS NULL OR s.queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR s.kind = %(kind)s)
  UNION ALL
  (SELECT t.minute, t.queue, t.kind, t.completed, t.failed, t.cancelled, t.retried, t.run_seconds, t.run_times,
          t.wait_times
   FROM batchq.throughput_minutes t
   WHERE t.minute >= (SELECT greatest(since, CASE WHEN %(step)s >= 15 THEN has_quarters END,
                                      CASE WHEN %(step)s = 120 THEN has_hours END)
                      FROM range)
     AND t.minute < (SELECT until FROM range)
     AND (%(queue)s::text IS NULL OR t.queue = %(queue)s)
     AND (%(kind)s::text IS NULL OR t.kind = %(kind)s)
   ORDER BY t.minute DESC
   LIMIT 20000)
), placed AS MATERIALIZED (
  SELECT date_bin(range.step, c.at, '2000-01-01 00:00:00+00') AS place, c.* FROM counted c CROSS JOIN range
), sums AS (
  SELECT place, queue, kind, sum(completed)::bigint AS completed, sum(failed)::bigint AS failed,
         sum(retried)::bigint AS retried, sum(completed + failed + cancelled + retried)::bigint AS runs,
         sum(run_seconds) AS run_seconds
  FROM placed
  GROUP BY GROUPING SETS ((place), (queue, kind))
), histograms AS (
  SELECT place, queue, kind, u.n, least(coalesce(sum(u.run), 0), 2147483647)::integer AS run,
         least(coalesce(sum(u.wait), 0), 2147483647)::integer AS wait
  FROM placed
  CROSS JOIN LATERAL unnest(run_times, wait_times) WITH ORDINALITY AS u(run, wait, n)
  GROUP BY GROUPING SETS ((place, n), (queue, kind, n))
), percentiles AS (
  SELECT place, queue, kind,
         batchq.run_time_percentiles(array_agg(run ORDER BY n), '{0.50,0.95,0.99}') AS run,
         batchq.run_time_percentiles(array_agg(wait ORDER BY n), '{0.50,0.95,0.99}') AS wait
  FROM histograms
  GROUP BY place, queue, kind
)
SELECT extract(epoch FROM s.place)::bigint AS at, s.queue, s.kind, s.completed, s.failed, s.retried, s.runs, s.run_seconds,
       p.run, p.wait, extract(epoch FROM range.since)::bigint AS since, extract(epoch FROM range.until)::bigint AS until
FROM range
LEFT JOIN sums s ON true
LEFT JOIN percentiles p ON p.place IS NOT DISTINCT FROM s.place
                       AND p.queue IS NOT DISTINCT FROM s.queue
                       AND p.kind IS NOT DISTINCT FROM s.kind
ORDER BY s.place, s.queue, s.kind

-- name: counted_names
SELECT DISTINCT queue, kind
FROM (
  (SELECT queue, kind FROM batchq.throughput_spans WHERE minutes = 120 LIMIT 20000)
  UNION ALL
  (SELECT queue, kind
   FROM batchq.throughput_minutes
   WHERE minute > now() - interval '3 hours'
   ORDER BY minute DESC
   LIMIT 5000)
) counted
ORDER BY queue, kind
LIMIT %(limit)s
