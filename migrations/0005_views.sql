-- What people look at.

CREATE VIEW batchq.status AS
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
  b.finished_at
FROM batchq.batches b;

COMMENT ON VIEW batchq.status IS 'A row for each batch: where it stands.';
COMMENT ON COLUMN batchq.status.status IS
  'ready (a worker may claim it), scheduled (its run_at is to come), retrying (waits after a failed attempt), processing, '
  'stalled (its worker gave no sign of life for a whole lease; another takes it back), completed, failed, cancelled.';
COMMENT ON COLUMN batchq.status.progress_percent IS 'Items worked, in percent of all, failed ones included. Null while it cannot be told.';
COMMENT ON COLUMN batchq.status.running_time IS 'How long the latest attempt has run, or ran.';
COMMENT ON COLUMN batchq.status.next_run_at IS 'Not claimed before this time; only for pending batches.';
COMMENT ON COLUMN batchq.status.last_error IS 'The error of the latest attempt that failed.';

CREATE VIEW batchq.queues AS
WITH live AS (
  SELECT
    queue,
    kind,
    count(*) FILTER (WHERE status = 'pending' AND run_at <= now()) AS ready,
    count(*) FILTER (WHERE status = 'pending' AND run_at > now()) AS scheduled,
    count(*) FILTER (WHERE status = 'processing') AS processing,
    count(*) FILTER (WHERE status = 'processing' AND lease_expires_at < now()) AS stalled,
    now() - min(run_at) FILTER (WHERE status = 'pending' AND run_at <= now()) AS oldest_wait
  FROM batchq.batches_live
  GROUP BY queue, kind
), last_minute AS (
  SELECT queue, kind, count(*) AS finished
  FROM batchq.batches_finished
  WHERE finished_at > now() - interval '1 minute'
  GROUP BY queue, kind
), failed AS (
  SELECT queue, kind, count(*) AS failed
  FROM batchq.batches_finished
  WHERE status = 'failed'
  GROUP BY queue, kind
)
SELECT
  queue,
  kind,
  coalesce(ready, 0) AS ready,
  coalesce(scheduled, 0) AS scheduled,
  coalesce(processing, 0) AS processing,
  coalesce(stalled, 0) AS stalled,
  coalesce(failed, 0) AS failed,
  oldest_wait,
  round(coalesce(finished, 0) / 60.0, 2) AS finished_per_second,
  (SELECT count(*)
   FROM batchq.workers w
   WHERE w.heartbeat_at > now() - interval '1 minute'
     AND queue = ANY (w.queues)
     AND kind = ANY (w.kinds)) AS workers
FROM live
FULL JOIN last_minute USING (queue, kind)
FULL JOIN failed USING (queue, kind);

COMMENT ON VIEW batchq.queues IS 'A row for each queue and kind that has batches: what waits, what runs, what failed.';
COMMENT ON COLUMN batchq.queues.ready IS 'Pending batches that a worker may claim now.';
COMMENT ON COLUMN batchq.queues.scheduled IS 'Pending batches whose run_at is to come, retries included.';
COMMENT ON COLUMN batchq.queues.stalled IS 'Those of "processing" whose worker gave no sign of life for a whole lease.';
COMMENT ON COLUMN batchq.queues.failed IS 'Failed batches that have not been pruned.';
COMMENT ON COLUMN batchq.queues.oldest_wait IS 'How long the batch that has been ready for longest has waited.';
COMMENT ON COLUMN batchq.queues.finished_per_second IS 'Completed, failed and cancelled, over the last minute.';
COMMENT ON COLUMN batchq.queues.workers IS 'Live workers that serve this queue and know this kind. 0: nobody will work these batches.';
