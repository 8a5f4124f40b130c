-- batchq.queues on what 0012 counts, and its rate on batchq.throughput.

CREATE OR REPLACE VIEW batchq.queues AS
WITH live AS (
  SELECT
    queue,
    kind,
    max(count) FILTER (WHERE state = 'ready') AS ready,
    max(count) FILTER (WHERE state = 'scheduled') AS scheduled,
    max(count) FILTER (WHERE state = 'processing') AS processing,
    max(late) FILTER (WHERE state = 'processing') AS stalled,
    now() - min(oldest_at) FILTER (WHERE state = 'ready') AS oldest_wait,
    array_agg(state) FILTER (WHERE is_estimate)
      || array_agg('oldest_wait'::text) FILTER (WHERE state = 'ready' AND is_oldest_estimate) AS estimated
  FROM batchq.count_live()
  GROUP BY queue, kind
), last_hour AS (
  SELECT
    queue,
    kind,
    sum((completed + failed + cancelled)
        * CASE minute
            WHEN date_trunc('minute', now()) THEN 1
            WHEN date_trunc('minute', now()) - interval '1 minute' THEN 1 - extract(second FROM now()) / 60
            ELSE 0
          END) AS finished
  FROM batchq.throughput_minutes
  WHERE minute > now() - interval '1 hour'
  GROUP BY queue, kind
), failed AS (
  SELECT queue, kind, count AS failed, CASE WHEN is_estimate THEN 'failed' END AS estimated
  FROM batchq.count_failed()
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
     AND kind = ANY (w.kinds)) AS workers,
  array_remove(coalesce(live.estimated, '{}') || failed.estimated, NULL) AS estimated
FROM live
FULL JOIN last_hour USING (queue, kind)
FULL JOIN failed USING (queue, kind);

COMMENT ON VIEW batchq.queues IS
  'A row for each queue and kind that has batches, or had some in the last hour: what waits, what runs, what failed. '
  'Counts are exact up to a bound; the column "estimated" tells which are not.';
COMMENT ON COLUMN batchq.queues.stalled IS
  'Those of "processing" whose worker gave no sign of life for a whole lease: at least so many, where "processing" is estimated.';
COMMENT ON COLUMN batchq.queues.failed IS 'Failed batches that have not been pruned; at least so many, where it is estimated.';
COMMENT ON COLUMN batchq.queues.finished_per_second IS
  'Completed, failed and cancelled over the last minute, as the workers counted them: see batchq.throughput.';
COMMENT ON COLUMN batchq.queues.estimated IS
  'The names of the columns whose value is an estimate: ready, scheduled, processing, failed, oldest_wait. Empty: all are exact.';
