-- batchq.status can be filtered by the status that is stored, which opens the partitions that have it alone; and an
-- index finds the newest of the finished batches that did not complete, cancelled ones too: 0012 had it for failed ones.

DROP INDEX batchq.batches_finished_failed_at;
CREATE INDEX batches_finished_uncompleted ON ONLY batchq.batches_finished (status, finished_at, id) WHERE status <> 'completed';

DO $$
DECLARE
  partition regclass;
  name      text;
BEGIN
  FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'batchq.batches_finished'::regclass LOOP
    CONTINUE WHEN pg_relation_size(partition) > 64 * 1024 * 1024;  -- as in 0012
    name := (SELECT relname FROM pg_class WHERE oid = partition) || '_uncompleted';
    EXECUTE format('CREATE INDEX %I ON %s (status, finished_at, id) WHERE status <> ''completed''', name, partition);
    EXECUTE format('ALTER INDEX batchq.batches_finished_uncompleted ATTACH PARTITION batchq.%I', name);
  END LOOP;
END
$$;

CREATE INDEX audit_batch ON batchq.audit (batch_id) WHERE batch_id IS NOT NULL;

CREATE OR REPLACE VIEW batchq.status AS
SELECT
  b.id,
  b.queue,
  b.kind,
  CASE
    WHEN b.status = 'processing' AND b.lease_expires_at < now() THEN 'stalled'
    WHEN b.status = 'pending' AND b.run_at <= now() THEN 'ready'
    WHEN b.status = 'pending' AND jsonb_array_length(b.errors) > 0 THEN 'retrying'
    WHEN b.status = 'pending' THEN 'scheduled'
    ELSE b.status
  END AS status,
  CASE
    WHEN b.items_total > 0 THEN floor(100.0 * (b.items_done + b.items_failed) / b.items_total)::integer
    WHEN b.status = 'completed' THEN 100
  END AS progress_percent,
  b.items_total,
  b.items_done,
  b.items_failed,
  b.attempt,
  b.max_attempts,
  b.priority,
  now() - b.created_at AS age,
  CASE WHEN b.status <> 'pending' THEN coalesce(b.finished_at, now()) - b.claimed_at END AS running_time,
  CASE WHEN b.status = 'pending' THEN b.run_at END AS next_run_at,
  b.claimed_by,
  b.lease_expires_at,
  b.errors -> -1 ->> 'error' AS last_error,
  b.unique_key,
  b.created_at,
  b.claimed_at,
  b.finished_at,
  b.status AS stored_status
FROM batchq.batches b;

COMMENT ON COLUMN batchq.status.stored_status IS
  'As batchq.batches has it: pending, processing, completed, failed or cancelled. To filter by it is cheap, also beside '
  'many millions: WHERE stored_status = ''processing'' AND status = ''stalled''.';

-- All percentiles of a minute in one pass: an hour of fifteen kinds took 40 ms, and takes 10.
CREATE FUNCTION batchq.run_time_percentiles(run_times integer[], fractions float8[])
RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
AS $$
DECLARE
  found      float8[] := '{}';
  total      bigint := 0;
  up_to_here bigint := 0;
  counted    integer;
  place      integer := 0;
  next       integer := 1;
BEGIN
  FOREACH counted IN ARRAY run_times LOOP
    total := total + counted;
  END LOOP;
  IF total = 0 THEN
    RETURN NULL;
  END IF;
  FOREACH counted IN ARRAY run_times LOOP
    place := place + 1;
    up_to_here := up_to_here + counted;
    WHILE up_to_here >= fractions[next] * total AND counted > 0 LOOP
      found[next] := round(power(2, (place - 2) / 2.0 - 15.75)::numeric, 6)::float8;
      next := next + 1;
    END LOOP;
  END LOOP;
  RETURN found;
END
$$;

COMMENT ON FUNCTION batchq.run_time_percentiles(integer[], float8[]) IS
  'Does as batchq.run_time_percentile does, for several fractions in rising order.';

CREATE OR REPLACE VIEW batchq.throughput AS
SELECT
  minute,
  queue,
  kind,
  completed,
  failed,
  cancelled,
  retried,
  items,
  round((run_seconds / nullif(completed + failed + cancelled + retried, 0))::numeric, 6)::float8 AS run_seconds_mean,
  percentiles[1] AS run_seconds_p50,
  percentiles[2] AS run_seconds_p95,
  percentiles[3] AS run_seconds_p99
FROM (
  SELECT minute, queue, kind, sum(completed)::bigint AS completed, sum(failed)::bigint AS failed,
    sum(cancelled)::bigint AS cancelled, sum(retried)::bigint AS retried, sum(items)::bigint AS items,
    sum(run_seconds) AS run_seconds, batchq.sum_counts(run_times) AS run_times
  FROM batchq.throughput_minutes
  GROUP BY minute, queue, kind
) merged
CROSS JOIN LATERAL (
  SELECT batchq.run_time_percentiles(run_times, '{0.50,0.95,0.99}') AS percentiles
  OFFSET 0  -- or they would be computed once for each of the three
) times;
