-- Invariants of committed rows. Each query returns the rows that violate one: an id and the problem. It is a single
-- statement and so reads one snapshot; that is why it reports nothing wrong while workers run.
--
-- Constraints and the fence enforce most of them. A violation shows that one of those was missing, or bypassed.

-- name: live_is_not_final
-- coalesce, here and in the next: otherwise the planner trusts the partitioning, and reads nothing.
SELECT id, 'status is ' || status
FROM batchq.batches_live
WHERE coalesce(status, '') NOT IN ('pending', 'processing', 'waiting')

-- name: waiting_counts_what_it_needs
SELECT b.id, format('waits for %s, and %s rows of batchq.needs say so', b.needs_left, n.count)
FROM batchq.batches_live b
CROSS JOIN LATERAL (
  SELECT count(*)
  FROM batchq.needs n
  WHERE n.batch_id = b.id
    AND (n.ended_as IS NULL OR n.on_failure = 'wait' AND n.ended_as <> 'completed')) n
WHERE b.status = 'waiting'
  AND b.claimed_at IS NULL
  AND n.count <> b.needs_left

-- name: end_of_what_is_needed_will_be_noticed
-- By the trigger note_end, or by a worker that deals with a row of batchq.flow_events.
WITH n AS MATERIALIZED (
  SELECT n.needed_id, n.batch_id, n.ended_as, n.on_failure
  FROM batchq.batches_live b
  JOIN batchq.needs n ON n.queue = b.queue AND n.batch_id = b.id
  WHERE b.status = 'waiting'
    AND b.claimed_at IS NULL
), l AS MATERIALIZED (
  SELECT id, is_needed
  FROM batchq.batches_live
  WHERE id = ANY (ARRAY(SELECT needed_id FROM n))
)
SELECT n.batch_id, format('waits for %s, whose end nobody would notice', n.needed_id)
FROM n
LEFT JOIN l ON l.id = n.needed_id
WHERE (n.ended_as IS NULL OR n.on_failure = 'wait' AND n.ended_as <> 'completed' AND l.id IS NOT NULL)
  AND l.is_needed IS NOT TRUE
  AND NOT EXISTS (SELECT 1 FROM batchq.flow_events e WHERE e.needed_id = n.needed_id)

-- name: spread_counts_its_parts
-- A batch that is spread waits for its parts. Unlike one that waits for others, it was claimed.
SELECT b.id, format('waits for %s parts, and %s rows of batchq.parts say so', b.needs_left, p.count)
FROM batchq.batches_live b
CROSS JOIN LATERAL (
  SELECT count(*) FROM batchq.parts p WHERE p.batch_id = b.id AND p.part_id IS NOT NULL AND NOT p.is_gathered) p
WHERE b.status = 'waiting'
  AND b.claimed_at IS NOT NULL
  AND p.count <> b.needs_left

-- name: open_part_is_worked_or_has_ended
SELECT p.batch_id, format('items %s to %s: batch %s neither works them, nor has its end been written down', p.first_item,
  p.first_item + p.items - 1, p.part_id)
FROM batchq.parts p
WHERE p.part_id IS NOT NULL
  AND NOT p.is_gathered
  AND NOT EXISTS (SELECT 1 FROM batchq.batches_live b WHERE b.id = p.part_id AND b.part_of = p.batch_id AND b.is_needed)
  AND NOT EXISTS (SELECT 1 FROM batchq.flow_events e WHERE e.needed_id = p.part_id AND e.status IS NOT NULL)

-- name: open_part_has_a_waiting_whole
SELECT p.batch_id, format('is %s, and batch %s is a part of it', coalesce(b.status, 'not live'), p.part_id)
FROM batchq.parts p
LEFT JOIN batchq.batches_live b ON b.id = p.batch_id
WHERE p.part_id IS NOT NULL
  AND NOT p.is_gathered
  AND (b.status IS DISTINCT FROM 'waiting' OR b.claimed_at IS NULL)

-- name: live_part_has_its_range
SELECT b.id, format('is a part of batch %s, which has no such range', b.part_of)
FROM batchq.batches_live b
WHERE b.part_of IS NOT NULL
  AND NOT EXISTS (
    SELECT 1
    FROM batchq.parts p
    WHERE p.part_id = b.id AND p.batch_id = b.part_of AND p.items = b.items_total AND p.queue = b.queue AND NOT p.is_gathered)

-- name: ranges_of_parts_fit_together
-- From what the batch itself has counted to its last item, without a gap; once all is counted, from wherever it was.
SELECT r.batch_id, format('items %s to %s follow item %s', r.first_item, r.first_item + r.items - 1, r.before - 1)
FROM (
  SELECT p.batch_id, p.first_item, p.items, lag(p.first_item + p.items) OVER ranges AS before,
    lead(p.first_item) OVER ranges IS NULL AS is_last
  FROM batchq.parts p
  WINDOW ranges AS (PARTITION BY p.batch_id ORDER BY p.first_item)) r
JOIN batchq.all_batches b ON b.id = r.batch_id
WHERE r.items < 1
   OR r.first_item <> coalesce(r.before, CASE WHEN b.items_done + b.items_failed < b.items_total
                                          THEN b.items_done + b.items_failed ELSE r.first_item END)
   OR r.is_last AND r.first_item + r.items <> b.items_total

-- name: items_of_parts_are_within_their_range
SELECT batch_id, format('items %s to %s: items_done %s, items_failed %s', first_item, first_item + items - 1, items_done,
  items_failed)
FROM batchq.parts
WHERE least(items_done, items_failed) < 0
   OR items_done + items_failed > items

-- name: finished_is_final
SELECT id, 'status is ' || status
FROM batchq.batches_finished
WHERE coalesce(status, '') NOT IN ('completed', 'failed', 'cancelled')

-- name: no_other_status
SELECT id, 'status is ' || status
FROM batchq.batches_refused

-- name: processing_is_claimed
SELECT id, 'processing, with claimed_by ' || coalesce(claimed_by, 'null') || ', claim_token '
  || coalesce(claim_token::text, 'null') || ', claimed_at ' || coalesce(claimed_at::text, 'null')
FROM batchq.batches_live
WHERE status = 'processing'
  AND num_nulls(claimed_by, claim_token, claimed_at) > 0

-- name: processing_has_a_lease
SELECT id, 'processing, with lease_expires_at ' || coalesce(lease_expires_at::text, 'null')
FROM batchq.batches_live
WHERE status = 'processing'
  AND coalesce(NOT isfinite(lease_expires_at), true)

-- name: pending_or_waiting_is_unclaimed
SELECT id, status || ', but claimed by ' || coalesce(claimed_by, 'null') || ', claim_token ' || coalesce(claim_token::text, 'null')
FROM batchq.batches_live
WHERE status IN ('pending', 'waiting')
  AND (num_nonnulls(claimed_by, claim_token, lease_expires_at) > 0
       OR claimed_at IS NOT NULL AND key IS NULL AND status = 'pending')

-- name: finished_is_unclaimed
SELECT id, status || ', with claim_token ' || coalesce(claim_token::text, 'null') || ', lease_expires_at '
  || coalesce(lease_expires_at::text, 'null')
FROM batchq.batches_finished
WHERE num_nonnulls(claim_token, lease_expires_at) > 0

-- name: live_has_not_finished
SELECT id, status || ', with finished_at ' || finished_at
FROM batchq.batches_live
WHERE finished_at IS NOT NULL

-- name: finished_has_finished_at
SELECT id, status || ', with finished_at ' || coalesce(finished_at::text, 'null')
FROM batchq.batches_finished
WHERE coalesce(NOT isfinite(finished_at), true)

-- name: attempt_within_limits
SELECT id, format('%s, attempt %s of %s', status, attempt, max_attempts)
FROM batchq.all_batches
WHERE max_attempts < 1
   OR attempt NOT BETWEEN 0 AND max_attempts
   OR (status = 'pending' AND attempt = max_attempts)
   OR (status = 'processing' AND attempt = 0)

-- name: counters_are_not_negative
SELECT id, format('items_done %s, items_failed %s', items_done, items_failed)
FROM batchq.all_batches
WHERE items_done < 0
   OR items_failed < 0

-- name: position_within_items
SELECT id, format('items_done %s and items_failed %s of %s', items_done, items_failed, coalesce(items_total, 0))
FROM batchq.all_batches
WHERE items_done + items_failed > coalesce(items_total, 0)

-- name: items_total_is_length_of_items
SELECT id, format('items_total is %s, items %s', coalesce(items_total::text, 'null'), CASE jsonb_typeof(items)
  WHEN 'array' THEN 'has ' || jsonb_array_length(items) ELSE 'is ' || coalesce('a JSON ' || jsonb_typeof(items), 'null') END)
FROM batchq.all_batches
WHERE items_total IS DISTINCT FROM CASE jsonb_typeof(items) WHEN 'array' THEN jsonb_array_length(items) END
   OR jsonb_typeof(items) <> 'array'

-- name: items_failed_is_number_of_failed_items
-- Those of parts are the whole's as soon as they are gathered, and it counts them when all are.
SELECT b.id, format('items_failed is %s, that of gathered parts %s, failed_items has %s', b.items_failed,
  coalesce(p.failed, 0), coalesce(f.failed, 0))
FROM batchq.all_batches b
LEFT JOIN (SELECT queue, batch_id, count(*) AS failed FROM batchq.failed_items GROUP BY queue, batch_id) f
  ON f.queue = b.queue AND f.batch_id = b.id
LEFT JOIN (SELECT batch_id, sum(items_failed) AS failed FROM batchq.parts WHERE is_gathered GROUP BY batch_id) p
  ON p.batch_id = b.id
WHERE b.items_failed + coalesce(p.failed, 0) <> coalesce(f.failed, 0)

-- name: failed_item_has_a_batch
-- Items that failed before the oldest kept day may remain for a while: prune deletes 10,000 at a time.
SELECT f.batch_id, format('failed item %s in queue %s belongs to no batch', f.item_index, f.queue)
FROM batchq.failed_items f
WHERE NOT EXISTS (SELECT 1 FROM batchq.all_batches b WHERE b.id = f.batch_id AND b.queue = f.queue)
  AND (f.failed_at AT TIME ZONE 'UTC')::date >= (
    SELECT coalesce(min(to_date(right(c.relname, 8), 'YYYYMMDD')), '-infinity')
    FROM pg_catalog.pg_inherits i
    JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'batchq.batches_finished'::regclass
      AND c.relname ~ '^finished_[0-9]{8}$')

-- name: failed_item_was_worked
SELECT b.id, format('item %s failed, and the batch is at item %s', f.item_index, b.items_done + b.items_failed)
FROM batchq.failed_items f
JOIN batchq.all_batches b ON b.id = f.batch_id AND b.queue = f.queue
WHERE f.item_index < 0
   OR f.item_index >= b.items_done + b.items_failed
      AND NOT EXISTS (
        SELECT 1
        FROM batchq.parts p
        WHERE p.batch_id = b.id
          AND p.is_gathered
          AND f.item_index BETWEEN p.first_item AND p.first_item + p.items_done + p.items_failed - 1)

-- name: failed_item_is_the_batchs
SELECT b.id, format('item %s differs between items and failed_items', f.item_index)
FROM batchq.all_batches b
CROSS JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(b.items) WHEN 'array' THEN b.items END)
  WITH ORDINALITY AS own(item, number)
JOIN batchq.failed_items f ON f.queue = b.queue AND f.batch_id = b.id AND f.item_index = own.number - 1
WHERE b.items_failed > 0
  AND f.item <> own.item

-- name: failed_item_attempt_within_limits
SELECT b.id, format('item %s failed in attempt %s of %s', f.item_index, f.attempt, b.max_attempts)
FROM batchq.failed_items f
JOIN batchq.all_batches b ON b.id = f.batch_id AND b.queue = f.queue
WHERE f.attempt NOT BETWEEN 0 AND b.max_attempts

-- name: live_id_is_unique
SELECT id, format('%s live batches have this id', count(*))
FROM batchq.batches_live
GROUP BY id
HAVING count(*) > 1

-- name: not_live_and_finished
WITH l AS MATERIALIZED (
  SELECT id, status
  FROM batchq.batches_live
)
SELECT l.id, format('%s, and %s since %s', l.status, f.status, f.finished_at)
FROM l
JOIN batchq.batches_finished f ON f.id = l.id

-- name: finished_id_is_unique
SELECT id, format('%s finished batches have this id', count(*))
FROM batchq.batches_finished
GROUP BY id
HAVING count(*) > 1

-- name: unique_key_is_unique
SELECT min(id), format('%s live batches of kind %s in queue %s have unique_key %s', count(*), kind, batchq.whole_queue(queue), unique_key)
FROM batchq.batches_live
WHERE unique_key IS NOT NULL
GROUP BY batchq.whole_queue(queue), kind, unique_key
HAVING count(*) > 1

-- name: key_is_on_one_shard
-- Parts of a batch that is spread stay beside it.
SELECT min(id), format('the live batches of key %s in queue %s are on shards %s', key, batchq.whole_queue(queue),
  string_agg(DISTINCT queue, ', '))
FROM batchq.batches_live
WHERE key IS NOT NULL
  AND part_of IS NULL
GROUP BY batchq.whole_queue(queue), key
HAVING count(DISTINCT queue) > 1

-- name: finished_lies_in_its_day
-- By the name of the partition, which prune relies on.
SELECT f.id, format('finished at %s (UTC), in partition %s', f.finished_at AT TIME ZONE 'UTC', c.relname)
FROM batchq.batches_finished f
JOIN pg_catalog.pg_class c ON c.oid = f.tableoid
WHERE c.relname <> 'finished_default'
  AND c.relname <> 'finished_' || to_char(f.finished_at AT TIME ZONE 'UTC', 'YYYYMMDD')

-- name: input_within_limits
SELECT id, format('queue of %s bytes, kind of %s, unique_key of %s, run_at %s, max_failed_items %s, timeout_seconds %s',
  octet_length(queue), octet_length(kind), octet_length(unique_key), run_at, max_failed_items, timeout_seconds)
FROM batchq.all_batches
WHERE octet_length(queue) NOT BETWEEN 1 AND 128
   OR octet_length(kind) NOT BETWEEN 1 AND 200
   OR octet_length(unique_key) NOT BETWEEN 1 AND 1000
   OR NOT isfinite(run_at)
   OR max_failed_items < 0
   OR timeout_seconds < 1

-- name: errors_are_ten_at_most
SELECT id, CASE jsonb_typeof(errors) WHEN 'array' THEN format('errors has %s', jsonb_array_length(errors))
  ELSE 'errors is a JSON ' || jsonb_typeof(errors) END
FROM batchq.all_batches
WHERE errors <> '[]'
  AND CASE jsonb_typeof(errors) WHEN 'array' THEN jsonb_array_length(errors) > 10 ELSE true END

-- name: worker_is_sane
SELECT id, format('pid %s, concurrency %s, in_hand %s, %s queues, started %s, heartbeat %s', pid, concurrency, in_hand,
  cardinality(queues), started_at, heartbeat_at)
FROM batchq.workers
WHERE id = ''
   OR pid < 1
   OR concurrency < 1
   OR in_hand < 0
   OR cardinality(queues) = 0
   OR heartbeat_at < started_at
   OR heartbeat_at > clock_timestamp() + interval '1 minute'

-- name: pause_names_something
SELECT paused_at, 'a pause without queue and kind'
FROM batchq.pauses
WHERE num_nonnulls(queue, kind) = 0

-- name: throughput_is_not_negative
SELECT minute, format('queue %s, kind %s: completed %s, failed %s, cancelled %s, retried %s, items %s, run_seconds %s', queue,
  kind, completed, failed, cancelled, retried, items, run_seconds)
FROM batchq.throughput_minutes
WHERE least(completed, failed, cancelled, retried, items, run_seconds) < 0

-- name: audit_is_not_negative
SELECT id, format('%s of %s batches', verb, batches)
FROM batchq.audit
WHERE batches < 0

-- name: migrations_have_no_gap
SELECT m.version, format('%s is applied, but version %s is not', m.name, m.version - 1)
FROM batchq.migrations m
WHERE m.version > 1
  AND NOT EXISTS (SELECT 1 FROM batchq.migrations before WHERE before.version = m.version - 1)
