-- What people look at, in milliseconds beside ten million live and a hundred million finished batches: what is counted is
-- bounded, and what lies beyond the bound is estimated, and says so.
CREATE FUNCTION batchq.shown_status(status text, run_at timestamptz, lease_expires_at timestamptz, errors jsonb)
RETURNS text
LANGUAGE sql STABLE
RETURN CASE
         WHEN status = 'processing' AND lease_expires_at < now() THEN 'stalled'
         WHEN status = 'pending' AND run_at <= now() THEN 'ready'
         WHEN status = 'pending' AND jsonb_array_length(errors) > 0 THEN 'retrying'
         WHEN status = 'pending' THEN 'scheduled'
         ELSE status
       END;

COMMENT ON FUNCTION batchq.shown_status(text, timestamptz, timestamptz, jsonb) IS
  'Returns the status that batchq.status shows: pending is ready, scheduled or retrying; processing may be stalled.';

-- With the reader's own rights and row security: a view made by the owner would read with his.
CREATE VIEW batchq.status WITH (security_invoker = true) AS
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

COMMENT ON VIEW batchq.status IS 'A row for each batch: where it stands.';
COMMENT ON COLUMN batchq.status.status IS
  'ready (a worker may claim it), scheduled (its run_at is to come), retrying (waits after a failed attempt), processing, '
  'stalled (its worker gave no sign of life for a whole lease; another takes it back), completed, failed, cancelled.';
COMMENT ON COLUMN batchq.status.progress_percent IS 'Items worked, in percent of all, failed ones included. Null while it cannot be told.';
COMMENT ON COLUMN batchq.status.running_time IS 'How long the latest attempt has run, or ran.';
COMMENT ON COLUMN batchq.status.next_run_at IS 'Not claimed before this time; only for pending batches.';
COMMENT ON COLUMN batchq.status.last_error IS 'The error of the latest attempt that failed.';
COMMENT ON COLUMN batchq.status.stored_status IS
  'As batchq.batches has it: pending, processing, completed, failed or cancelled. To filter by it is cheap, also beside '
  'many millions: WHERE stored_status = ''processing'' AND status = ''stalled''.';

-- Begins where batchq.positions says, so that it does not walk over what is dead. Up to 10,000 waiting batches, and as many
-- running ones, are each counted, however many queues and priorities they lie in.
CREATE FUNCTION batchq.count_live(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, state text, count bigint, late bigint, oldest_at timestamptz, is_estimate boolean,
               is_oldest_estimate boolean)
-- SECURITY DEFINER, since who may look at batchq.queues need not be allowed to read the partitions.
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  pages     float8 := pg_relation_size('batchq.batches_live') / current_setting('block_size')::integer;
  in_sample float8 := least(100, 100 * 200 / greatest(pages, 1));
BEGIN
  RETURN QUERY
  WITH all_waiting AS MATERIALIZED (
    SELECT * FROM batchq.waiting_levels() WHERE at IS NOT NULL
  ), all_busy AS MATERIALIZED (
    SELECT * FROM batchq.busy_queues() WHERE at IS NOT NULL
  ), few AS MATERIALIZED (
    -- If there are no more than "most", all are counted. If there are more, each level gets a share of "most".
    SELECT most >= (
        SELECT count(*)
        FROM (
          SELECT
          FROM all_waiting w CROSS JOIN LATERAL (
            SELECT
            FROM batchq.batches_live b
            WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
            ORDER BY b.run_at, b.id
            LIMIT most + 1
          ) b
          LIMIT most + 1
        ) some_waiting
      ) AND most >= (
        SELECT count(*)
        FROM (
          SELECT
          FROM all_busy q CROSS JOIN LATERAL (
            SELECT
            FROM batchq.batches_live b
            WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
            ORDER BY b.lease_expires_at
            LIMIT most + 1
          ) b
          LIMIT most + 1
        ) some_busy
      ) AS counts_all
  ), waiting AS MATERIALIZED (
    SELECT * FROM all_waiting LIMIT (SELECT CASE WHEN NOT counts_all THEN 1000 END FROM few)
  ), busy AS MATERIALIZED (
    SELECT * FROM all_busy LIMIT (SELECT CASE WHEN NOT counts_all THEN 1000 END FROM few)
  ), share AS MATERIALIZED (
    SELECT
      greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM waiting), 1) END)::integer
        AS of_waiting,
      greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM busy), 1) END)::integer
        AS of_busy
    FROM few
  ), entry AS MATERIALIZED (
    SELECT w.queue, w.priority, 'ready' AS state, b.kind, b.run_at AS at, share.of_waiting AS share
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at
      FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND b.run_at <= now()
        AND (b.run_at, b.id) >= (w.at, w.id)
      ORDER BY b.run_at, b.id
      LIMIT share.of_waiting + 1
    ) b
    UNION ALL
    SELECT w.queue, w.priority, 'scheduled', b.kind, b.run_at, share.of_waiting
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at
      FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND b.run_at > now()
        AND (b.run_at, b.id) >= (w.at, w.id)
      ORDER BY b.run_at, b.id
      LIMIT share.of_waiting + 1
    ) b
    UNION ALL
    SELECT q.queue, 0, 'processing', b.kind, b.lease_expires_at, share.of_busy
    FROM busy q CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.lease_expires_at
      FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
      ORDER BY b.lease_expires_at
      LIMIT share.of_busy + 1
    ) b
  ), cut AS MATERIALIZED (
    SELECT queue, state, min(until) AS known_until
    FROM (SELECT queue, state, max(at) AS until FROM entry GROUP BY queue, state, priority, share HAVING count(*) > share) heads
    GROUP BY queue, state
  ), counted AS (
    SELECT queue, kind, state, count(*) AS count, count(*) FILTER (WHERE at < now()) AS late, min(at) AS oldest_at
    FROM entry
    GROUP BY queue, kind, state
  ), sampled AS (
    SELECT queue, kind, state, ceil(count(*) * 100 / in_sample)::bigint AS count, min(at) AS oldest_at
    FROM (
      SELECT b.queue, b.kind, coalesce(b.lease_expires_at, b.run_at) AS at,
        CASE WHEN b.status = 'processing' THEN 'processing' WHEN b.run_at <= now() THEN 'ready' ELSE 'scheduled' END AS state
      FROM batchq.batches_live b TABLESAMPLE SYSTEM (in_sample) REPEATABLE (1)
      WHERE EXISTS (SELECT FROM cut)
    ) rows
    JOIN cut USING (queue, state)
    GROUP BY queue, kind, state
  )
  SELECT queue, kind, state, greatest(c.count, s.count), coalesce(c.late, 0), least(c.oldest_at, s.oldest_at),
    -- What was committed late, with a place before a position, is not counted until the position is checked.
    cut.queue IS NOT NULL OR EXISTS (SELECT FROM batchq.positions p WHERE p.queue = c.queue),
    cut.known_until IS NOT NULL AND (c.oldest_at IS NULL OR c.oldest_at > cut.known_until)
  FROM counted c
  FULL JOIN sampled s USING (queue, kind, state)
  LEFT JOIN cut USING (queue, state);
END
$$;

COMMENT ON FUNCTION batchq.count_live(integer) IS
  'Counts live batches by queue, kind and state. Exact while no more than "most" wait and no more than "most" run. '
  'Beyond, each queue and priority gets its share of "most"; what lies in one that has more is an estimate from 200 pages '
  'of the table, and rare kinds that only lie behind may be missing. Then no more than 1,000 queues and priorities are counted.';

CREATE FUNCTION batchq.count_failed(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, count bigint, is_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  WITH RECURSIVE known_pair AS (
    (SELECT b.queue, b.kind FROM batchq.batches_finished b WHERE b.status = 'failed' ORDER BY b.queue, b.kind LIMIT 1)
    UNION ALL
    SELECT next.queue, next.kind
    FROM known_pair p
    CROSS JOIN LATERAL (
      SELECT b.queue, b.kind
      FROM batchq.batches_finished b
      WHERE b.status = 'failed' AND (b.queue, b.kind) > (p.queue, p.kind)
      ORDER BY b.queue, b.kind
      LIMIT 1
    ) next
  ), pair AS MATERIALIZED (
    SELECT * FROM known_pair LIMIT 500
  ), share AS MATERIALIZED (
    SELECT greatest(100, most / greatest(count(*), 1)) AS share FROM pair
  )
  SELECT p.queue, p.kind, least(n.count, share.share), n.count > share.share
  FROM pair p
  CROSS JOIN share
  CROSS JOIN LATERAL (
    SELECT count(*) AS count
    FROM (SELECT FROM batchq.batches_finished b
          WHERE b.status = 'failed' AND b.queue = p.queue AND b.kind = p.kind
          LIMIT share.share + 1) first_ones
  ) n;
END
$$;

COMMENT ON FUNCTION batchq.count_failed(integer) IS
  'Counts failed batches by queue and kind, "most" in all; where is_estimate, there are more of them than it says.';

CREATE FUNCTION batchq.latest_failures(most integer DEFAULT 500)
RETURNS TABLE (id bigint, queue text, kind text, finished_at timestamptz, error text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  since timestamptz;
BEGIN
  FOREACH since IN ARRAY ARRAY[now() - interval '1 hour', now() - interval '1 day', now() - interval '7 days', '-infinity'] LOOP
    CONTINUE WHEN since > '-infinity' AND most > (
      SELECT count(*)
      FROM (SELECT FROM batchq.batches_finished b WHERE b.status = 'failed' AND b.finished_at >= since LIMIT most) newest);
    RETURN QUERY
    SELECT b.id, b.queue, b.kind, b.finished_at, coalesce(b.errors -> -1 ->> 'error', '')
    FROM batchq.batches_finished b
    WHERE b.status = 'failed'
      AND b.finished_at >= since
    ORDER BY b.finished_at DESC, b.id DESC
    LIMIT most;
    RETURN;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.latest_failures(integer) IS
  'The batches that failed last, "most" of them, with their last error. It looks at the last hour, then day, then week '
  'first: so partitions before that are not opened where there is enough.';

CREATE VIEW batchq.queues AS
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
COMMENT ON COLUMN batchq.queues.ready IS 'Pending batches that a worker may claim now.';
COMMENT ON COLUMN batchq.queues.scheduled IS 'Pending batches whose run_at is to come, retries included.';
COMMENT ON COLUMN batchq.queues.stalled IS
  'Those of "processing" whose worker gave no sign of life for a whole lease: at least so many, where "processing" is estimated.';
COMMENT ON COLUMN batchq.queues.failed IS 'Failed batches that have not been pruned; at least so many, where it is estimated.';
COMMENT ON COLUMN batchq.queues.oldest_wait IS 'How long the batch that has been ready for longest has waited.';
COMMENT ON COLUMN batchq.queues.finished_per_second IS
  'Completed, failed and cancelled over the last minute, as the workers counted them: see batchq.throughput.';
COMMENT ON COLUMN batchq.queues.workers IS 'Live workers that serve this queue and know this kind. 0: nobody will work these batches.';
COMMENT ON COLUMN batchq.queues.estimated IS
  'The names of the columns whose value is an estimate: ready, scheduled, processing, failed, oldest_wait. Empty: all are exact.';

CREATE VIEW batchq.failures AS
SELECT
  kind,
  left(split_part(error, E'\n', 1), 300) AS error,
  count(*) AS failures,
  max(finished_at) AS latest_at,
  min(finished_at) AS first_at,
  (array_agg(id ORDER BY finished_at DESC, id DESC))[1] AS example_id
FROM batchq.latest_failures()
GROUP BY 1, 2;

COMMENT ON VIEW batchq.failures IS 'The latest 500 batches that failed, grouped by kind and the first line of their last error.';
COMMENT ON COLUMN batchq.failures.error IS 'That first line, cut at 300 characters.';
COMMENT ON COLUMN batchq.failures.failures IS 'How many of the latest 500.';
COMMENT ON COLUMN batchq.failures.first_at IS 'When the first of these failed; there may be earlier ones.';
COMMENT ON COLUMN batchq.failures.example_id IS 'The batch that failed last with it.';

CREATE FUNCTION batchq.newest_live(in_queue text DEFAULT NULL, in_kind text DEFAULT NULL, in_status text DEFAULT NULL,
                                   before_id bigint DEFAULT 9223372036854775807, most integer DEFAULT 100)
RETURNS SETOF bigint
-- SECURITY DEFINER, since who may look at batchq.status need not be allowed to read the partitions.
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
SET enable_bitmapscan = off SET jit = off
AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM batchq.positions) THEN
    RETURN QUERY
    SELECT b.id
    FROM batchq.batches_live b
    WHERE b.id < before_id
      AND (in_queue IS NULL OR b.queue = in_queue)
      AND (in_kind IS NULL OR b.kind = in_kind)
      AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
    ORDER BY b.id DESC
    LIMIT most;
    RETURN;
  END IF;
  -- By the indexes of the claim and of the leases, since those know where to begin: the newest of each level.
  RETURN QUERY
  SELECT b.id
  FROM (
    SELECT b.id, b.queue, b.kind, b.status, b.run_at, b.lease_expires_at, b.errors
    FROM batchq.waiting_levels() w
    CROSS JOIN LATERAL (
      SELECT *
      FROM batchq.batches_live b
      WHERE b.queue = w.queue
        AND b.status = 'pending'
        AND b.priority = w.priority
        AND (b.run_at, b.id) >= (w.at, w.id)
        AND b.id + 0 < before_id -- not by the index of ids, whose dead entries are unknown
        AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.run_at DESC, b.id DESC
      LIMIT most
    ) b
    WHERE w.at IS NOT NULL
      AND (in_status IS NULL OR in_status NOT IN ('processing', 'stalled'))
    UNION ALL
    SELECT b.id, b.queue, b.kind, b.status, b.run_at, b.lease_expires_at, b.errors
    FROM batchq.busy_queues() q
    CROSS JOIN LATERAL (
      SELECT *
      FROM batchq.batches_live b
      WHERE b.queue = q.queue
        AND b.status = 'processing'
        AND b.lease_expires_at >= q.at
        AND b.id + 0 < before_id -- not by the index of ids, whose dead entries are unknown
        AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.lease_expires_at DESC
      LIMIT most
    ) b
    WHERE q.at IS NOT NULL
      AND (in_status IS NULL OR in_status IN ('processing', 'stalled'))
  ) b
  WHERE in_queue IS NULL
     OR b.queue = in_queue
  ORDER BY b.id DESC
  LIMIT most;
END
$$;

COMMENT ON FUNCTION batchq.newest_live(text, text, text, bigint, integer) IS
  'Returns the ids of the newest live batches below before_id, at most "most", newest first; in_queue, in_kind and '
  'in_status (as batchq.status shows it) filter, null does not. While dead entries fill the indexes it begins at '
  'batchq.positions, and takes the newest of each queue and priority by run_at.';

-- Logical replication copies rows and not sequences, so on a copy the ids begin again at 1. An INSERT was accepted, and its
-- batch failed later, on the failed items of the batch that had its id before. STABLE: with the caller's snapshot, every id
-- that is seen had been given when the sequence is read.
CREATE FUNCTION batchq.ids_given_twice(since timestamptz DEFAULT '-infinity')
RETURNS TABLE (relation text, last_given bigint, newest bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
DECLARE
  sequence regclass;
BEGIN
  FOREACH relation IN ARRAY '{batches,audit}'::text[] LOOP
    sequence := pg_get_serial_sequence('batchq.' || relation, 'id');
    CONTINUE WHEN NOT (has_sequence_privilege(sequence, 'USAGE, SELECT') AND has_table_privilege('batchq.' || relation, 'SELECT'));
    last_given := coalesce(pg_sequence_last_value(sequence), 0);
    IF relation = 'audit' THEN
      newest := (SELECT max(a.id) FROM batchq.audit a WHERE a.id > last_given);
    ELSE
      -- By EXECUTE, whose plan leaves out the partitions before "since", and so does not lock them.
      EXECUTE 'SELECT max(f.id) FROM batchq.batches_finished f WHERE f.id > $1 AND f.finished_at >= $2'
        INTO newest USING last_given, since;
      newest := greatest(newest,
        (SELECT max(b.id) FROM batchq.batches_live b WHERE b.id > last_given),
        (SELECT max(i.batch_id) FROM batchq.failed_items i WHERE i.batch_id > last_given));
    END IF;
    IF newest IS NOT NULL THEN
      RETURN NEXT;
    END IF;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.ids_given_twice(timestamptz) IS
  'Returns a row for batches or audit if it has rows with larger ids than the last one given ("last_given"; 0: none yet), '
  'up to "newest". New rows would get ids that are in use. Looks at what finished after "since" only. To fix it: '
  'set the sequence of the id to it by setval; batchq doctor prints the statement.';
