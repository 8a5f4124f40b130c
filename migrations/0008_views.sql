-- What people look at, in milliseconds beside ten million live and a hundred million finished batches. So counts have an upper
-- limit; beyond the limit they are estimates and marked as such.
CREATE FUNCTION batchq.shown_status(status text, run_at timestamptz, lease_expires_at timestamptz, errors jsonb) RETURNS text
LANGUAGE sql STABLE
RETURN CASE WHEN status = 'processing' AND lease_expires_at < now() THEN 'stalled'
            WHEN status = 'pending' AND run_at <= now() THEN 'ready'
            WHEN status = 'pending' AND jsonb_array_length(errors) > 0 THEN 'retrying'
            WHEN status = 'pending' THEN 'scheduled' ELSE status END;
COMMENT ON FUNCTION batchq.shown_status IS
  'Returns the status that batchq.status shows: for pending ready, scheduled or retrying; for processing stalled, if so.';

-- security_invoker: with the rights and the row security of the reader, not of the owner. The CASE of "status" is that of
-- batchq.shown_status, which a reader of the view need not be allowed to call.
CREATE VIEW batchq.status WITH (security_invoker = true) AS
SELECT b.id, b.queue, b.kind,
  CASE WHEN b.status = 'processing' AND b.lease_expires_at < now() THEN 'stalled'
       WHEN b.status = 'pending' AND b.run_at <= now() THEN 'ready'
       WHEN b.status = 'pending' AND jsonb_array_length(b.errors) > 0 THEN 'retrying'
       WHEN b.status = 'pending' THEN 'scheduled' ELSE b.status END AS status,
  CASE WHEN b.items_total > 0 THEN floor(100.0 * (b.items_done + b.items_failed) / b.items_total)::integer
       WHEN b.status = 'completed' THEN 100 END AS progress_percent,
  b.items_total, b.items_done, b.items_failed, b.attempt, b.max_attempts, b.priority, now() - b.created_at AS age,
  CASE WHEN b.status <> 'pending' THEN coalesce(b.finished_at, now()) - b.claimed_at END AS running_time,
  CASE WHEN b.status = 'pending' THEN b.run_at END AS next_run_at,
  b.claimed_by, b.lease_expires_at, b.errors -> -1 ->> 'error' AS last_error, b.unique_key,
  b.created_at, b.claimed_at, b.finished_at, b.status AS stored_status
FROM batchq.batches b;
COMMENT ON VIEW batchq.status IS 'One row per batch, with its status and progress.';
COMMENT ON COLUMN batchq.status.status IS
  'ready (a worker may claim it), scheduled (run_at is in the future), retrying (waits after a failed attempt), processing, '
  'stalled (its lease has expired; another worker will rescue it), completed, failed, cancelled.';
COMMENT ON COLUMN batchq.status.progress_percent IS 'Percentage of items processed, including failed ones; null while unknown.';
COMMENT ON COLUMN batchq.status.running_time IS 'Duration of the latest attempt so far, or until it ended.';
COMMENT ON COLUMN batchq.status.next_run_at IS 'Earliest time of the next claim; null unless pending.';
COMMENT ON COLUMN batchq.status.last_error IS 'Error of the latest failed attempt.';
COMMENT ON COLUMN batchq.status.stored_status IS
  'Status in batchq.batches: pending, processing, completed, failed or cancelled. Filtering by it is cheap, even beside many '
  'millions: WHERE stored_status = ''processing'' AND status = ''stalled''.';

-- Begins at batchq.positions, to skip dead entries. Counts up to 10,000 pending and up to 10,000 processing batches exactly,
-- however many queues and priorities they have. SECURITY DEFINER, since a reader of batchq.queues need not be allowed to read
-- partitions.
CREATE FUNCTION batchq.count_live(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, state text, count bigint, late bigint, oldest_at timestamptz, is_estimate boolean,
               is_oldest_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  pages     float8 := pg_relation_size('batchq.batches_live') / current_setting('block_size')::integer;
  in_sample float8 := least(100, 100 * 200 / greatest(pages, 1));
BEGIN
  RETURN QUERY
  WITH all_waiting AS MATERIALIZED (SELECT * FROM batchq.waiting_levels() WHERE at IS NOT NULL),
  all_busy AS MATERIALIZED (SELECT * FROM batchq.busy_queues() WHERE at IS NOT NULL),
  few AS MATERIALIZED (
    -- If there are at most "most", all are counted. If there are more, each level gets a share of "most".
    SELECT most >= (SELECT count(*) FROM (
        SELECT 1 FROM all_waiting w CROSS JOIN LATERAL (
          SELECT 1 FROM batchq.batches_live b
          WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
          ORDER BY b.run_at, b.id LIMIT most + 1) b LIMIT most + 1) some_waiting)
      AND most >= (SELECT count(*) FROM (
        SELECT 1 FROM all_busy q CROSS JOIN LATERAL (
          SELECT 1 FROM batchq.batches_live b
          WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
          ORDER BY b.lease_expires_at LIMIT most + 1) b LIMIT most + 1) some_busy) AS counts_all
  ),
  waiting AS MATERIALIZED (SELECT * FROM all_waiting LIMIT (SELECT CASE WHEN NOT counts_all THEN 1000 END FROM few)),
  busy AS MATERIALIZED (SELECT * FROM all_busy LIMIT (SELECT CASE WHEN NOT counts_all THEN 1000 END FROM few)),
  share AS MATERIALIZED (
    SELECT greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM waiting), 1) END)::integer
        AS of_waiting,
      greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM busy), 1) END)::integer AS of_busy
    FROM few
  ), entry AS MATERIALIZED (
    SELECT w.queue, w.priority, 'ready' AS state, b.kind, b.run_at AS at, share.of_waiting AS share
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND b.run_at <= now()
        AND (b.run_at, b.id) >= (w.at, w.id)
      ORDER BY b.run_at, b.id LIMIT share.of_waiting + 1) b
    UNION ALL
    SELECT w.queue, w.priority, 'scheduled', b.kind, b.run_at, share.of_waiting
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND b.run_at > now()
        AND (b.run_at, b.id) >= (w.at, w.id)
      ORDER BY b.run_at, b.id LIMIT share.of_waiting + 1) b
    UNION ALL
    SELECT q.queue, 0, 'processing', b.kind, b.lease_expires_at, share.of_busy
    FROM busy q CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.lease_expires_at FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
      ORDER BY b.lease_expires_at LIMIT share.of_busy + 1) b
  ), cut AS MATERIALIZED (
    SELECT queue, state, min(until) AS known_until
    FROM (SELECT queue, state, max(at) AS until FROM entry GROUP BY queue, state, priority, share HAVING count(*) > share) heads
    GROUP BY queue, state
  ), counted AS (
    SELECT queue, kind, state, count(*) AS count, count(*) FILTER (WHERE at < now()) AS late, min(at) AS oldest_at
    FROM entry GROUP BY queue, kind, state
  ), sampled AS (
    SELECT queue, kind, state, ceil(count(*) * 100 / in_sample)::bigint AS count, min(at) AS oldest_at
    FROM (
      SELECT b.queue, b.kind, coalesce(b.lease_expires_at, b.run_at) AS at,
        CASE WHEN b.status = 'processing' THEN 'processing' WHEN b.run_at <= now() THEN 'ready' ELSE 'scheduled' END AS state
      FROM batchq.batches_live b TABLESAMPLE SYSTEM (in_sample) REPEATABLE (1)
      WHERE EXISTS (SELECT 1 FROM cut)) rows
    JOIN cut USING (queue, state) GROUP BY queue, kind, state
  )
  SELECT queue, kind, state, greatest(c.count, s.count), coalesce(c.late, 0), least(c.oldest_at, s.oldest_at),
    -- A batch committed late, before a position, is not counted until the position is checked.
    cut.queue IS NOT NULL OR EXISTS (SELECT 1 FROM batchq.positions p WHERE p.queue = c.queue),
    cut.known_until IS NOT NULL AND (c.oldest_at IS NULL OR c.oldest_at > cut.known_until)
  FROM counted c FULL JOIN sampled s USING (queue, kind, state) LEFT JOIN cut USING (queue, state);
END $$;
COMMENT ON FUNCTION batchq.count_live IS
  'Counts live batches by queue, kind and state, exactly while at most "most" are pending and at most "most" processing. '
  'Otherwise each queue and priority, of at most 1,000, gets a share of "most"; what exceeds the share is estimated from 200 '
  'pages of the table, and rare kinds that come after it may be missing.';

CREATE FUNCTION batchq.count_failed(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, count bigint, is_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE queues text[] := '{}'; kinds text[] := '{}'; last_queue text := ''; last_kind text := ''; share bigint;
BEGIN
  -- From one pair to the next by the index; not recursive, since a distributed Postgres takes that only within a queue.
  WHILE cardinality(queues) < 500 LOOP
    SELECT b.queue, b.kind INTO last_queue, last_kind FROM batchq.batches_finished b
    WHERE b.status = 'failed' AND (b.queue, b.kind) > (last_queue, last_kind)
    ORDER BY b.queue, b.kind LIMIT 1;
    EXIT WHEN NOT FOUND;
    queues := queues || last_queue;
    kinds := kinds || last_kind;
  END LOOP;
  share := greatest(100, most / greatest(cardinality(queues), 1));
  RETURN QUERY
  SELECT p.queue, p.kind, least(n.count, share), n.count > share
  FROM unnest(queues, kinds) AS p(queue, kind) CROSS JOIN LATERAL (
    SELECT count(*) AS count
    FROM (SELECT 1 FROM batchq.batches_finished b WHERE b.status = 'failed' AND b.queue = p.queue AND b.kind = p.kind
          LIMIT share + 1) first_ones) n;
END $$;
COMMENT ON FUNCTION batchq.count_failed IS 'Counts failed batches by queue and kind, "most" in all. is_estimate: there are more.';

CREATE FUNCTION batchq.latest_failures(most integer DEFAULT 500)
RETURNS TABLE (id bigint, queue text, kind text, finished_at timestamptz, error text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE since timestamptz;
BEGIN
  FOREACH since IN ARRAY ARRAY[now() - interval '1 hour', now() - interval '1 day', now() - interval '7 days', '-infinity'] LOOP
    CONTINUE WHEN since > '-infinity' AND most > (
      SELECT count(*)
      FROM (SELECT 1 FROM batchq.batches_finished b WHERE b.status = 'failed' AND b.finished_at >= since LIMIT most) newest);
    RETURN QUERY
    SELECT b.id, b.queue, b.kind, b.finished_at, coalesce(b.errors -> -1 ->> 'error', '')
    FROM batchq.batches_finished b WHERE b.status = 'failed' AND b.finished_at >= since
    ORDER BY b.finished_at DESC, b.id DESC LIMIT most;
    RETURN;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.latest_failures IS
  'Returns the latest "most" failed batches with their last error. Reads the last hour, day, then week first, and opens earlier '
  'partitions only if these have too few.';

CREATE VIEW batchq.queues AS
WITH live AS (
  SELECT queue, kind,
    max(count) FILTER (WHERE state = 'ready') AS ready,
    max(count) FILTER (WHERE state = 'scheduled') AS scheduled,
    max(count) FILTER (WHERE state = 'processing') AS processing,
    max(late) FILTER (WHERE state = 'processing') AS stalled,
    now() - min(oldest_at) FILTER (WHERE state = 'ready') AS oldest_wait,
    array_agg(state) FILTER (WHERE is_estimate)
      || array_agg('oldest_wait'::text) FILTER (WHERE state = 'ready' AND is_oldest_estimate) AS estimated
  FROM batchq.count_live() GROUP BY queue, kind
), last_hour AS (
  SELECT queue, kind,
    sum((completed + failed + cancelled) * CASE minute
          WHEN date_trunc('minute', now()) THEN 1
          WHEN date_trunc('minute', now()) - interval '1 minute' THEN 1 - extract(second FROM now()) / 60 ELSE 0 END) AS finished
  FROM batchq.throughput_minutes WHERE minute > now() - interval '1 hour' GROUP BY queue, kind
), failed AS (
  SELECT queue, kind, count AS failed, CASE WHEN is_estimate THEN 'failed' END AS estimated FROM batchq.count_failed()
)
SELECT queue, kind, coalesce(ready, 0) AS ready, coalesce(scheduled, 0) AS scheduled, coalesce(processing, 0) AS processing,
  coalesce(stalled, 0) AS stalled, coalesce(failed, 0) AS failed, oldest_wait,
  round(coalesce(finished, 0) / 60.0, 2) AS finished_per_second,
  (SELECT count(*) FROM batchq.workers w
   WHERE w.heartbeat_at > now() - interval '1 minute' AND queue = ANY (w.queues) AND kind = ANY (w.kinds)) AS workers,
  array_remove(coalesce(live.estimated, '{}') || failed.estimated, NULL) AS estimated
FROM live FULL JOIN last_hour USING (queue, kind) FULL JOIN failed USING (queue, kind);
COMMENT ON VIEW batchq.queues IS
  'One row per queue and kind that has batches or had some in the last hour. Counts are exact up to a limit; "estimated" names '
  'the columns that are not.';
COMMENT ON COLUMN batchq.queues.ready IS 'Pending batches that a worker may claim now.';
COMMENT ON COLUMN batchq.queues.scheduled IS 'Pending batches with a run_at in the future, including retries.';
COMMENT ON COLUMN batchq.queues.stalled IS
  'Processing batches whose lease has expired; a lower bound if "processing" is estimated.';
COMMENT ON COLUMN batchq.queues.failed IS 'Failed batches that have not been pruned; a lower bound if estimated.';
COMMENT ON COLUMN batchq.queues.oldest_wait IS 'Waiting time of the batch that has been ready for longest.';
COMMENT ON COLUMN batchq.queues.finished_per_second IS
  'Batches completed, failed or cancelled per second over the last minute, as counted by workers: see batchq.throughput.';
COMMENT ON COLUMN batchq.queues.workers IS
  'Number of live workers that serve this queue and have a handler for this kind. With 0, nobody will run these batches.';
COMMENT ON COLUMN batchq.queues.estimated IS
  'Names of the columns whose value is an estimate: ready, scheduled, processing, failed, oldest_wait. Empty: all are exact.';

CREATE VIEW batchq.failures AS
SELECT kind, left(split_part(error, E'\n', 1), 300) AS error, count(*) AS failures, max(finished_at) AS latest_at,
  min(finished_at) AS first_at, (array_agg(id ORDER BY finished_at DESC, id DESC))[1] AS example_id
FROM batchq.latest_failures() GROUP BY 1, 2;
COMMENT ON VIEW batchq.failures IS 'The latest 500 failed batches, grouped by kind and the first line of their last error.';
COMMENT ON COLUMN batchq.failures.error IS 'First line of the last error, cut at 300 characters.';
COMMENT ON COLUMN batchq.failures.failures IS 'Number of failures among the latest 500.';
COMMENT ON COLUMN batchq.failures.first_at IS 'Time of the first of these failures; there may be earlier ones.';
COMMENT ON COLUMN batchq.failures.example_id IS 'Batch that last failed with this error.';

-- SECURITY DEFINER, since a reader of batchq.status need not be allowed to read the partitions.
CREATE FUNCTION batchq.newest_live(in_queue text DEFAULT NULL, in_kind text DEFAULT NULL, in_status text DEFAULT NULL,
  before_id bigint DEFAULT 9223372036854775807, most integer DEFAULT 100) RETURNS SETOF bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$ BEGIN
  IF NOT EXISTS (SELECT 1 FROM batchq.positions) THEN
    RETURN QUERY
    SELECT b.id FROM batchq.batches_live b
    WHERE b.id < before_id AND (in_queue IS NULL OR b.queue = in_queue) AND (in_kind IS NULL OR b.kind = in_kind)
      AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
    ORDER BY b.id DESC LIMIT most;
    RETURN;
  END IF;
  -- The newest of each level, by the indexes of claims and leases, since batchq.positions has where these begin. "b.id + 0" keeps
  -- the planner from the index of ids, whose dead entries are unknown.
  RETURN QUERY
  SELECT b.id
  FROM (
    SELECT b.id, b.queue
    FROM batchq.waiting_levels() w CROSS JOIN LATERAL (
      SELECT b.id, b.queue FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.run_at DESC, b.id DESC LIMIT most) b
    WHERE w.at IS NOT NULL AND (in_status IS NULL OR in_status NOT IN ('processing', 'stalled'))
    UNION ALL
    SELECT b.id, b.queue
    FROM batchq.busy_queues() q CROSS JOIN LATERAL (
      SELECT b.id, b.queue FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.lease_expires_at DESC LIMIT most) b
    WHERE q.at IS NOT NULL AND (in_status IS NULL OR in_status IN ('processing', 'stalled'))
  ) b
  WHERE in_queue IS NULL OR b.queue = in_queue
  ORDER BY b.id DESC LIMIT most;
END $$;
COMMENT ON FUNCTION batchq.newest_live IS
  'Returns the ids of the newest live batches below before_id, at most "most", newest first. in_queue, in_kind and in_status (as '
  'in batchq.status) filter; null does not. While dead entries fill the indexes, it begins at batchq.positions and takes the '
  'newest of each queue and priority by run_at.';

-- Logical replication copies rows but not sequences, so on a copy the ids begin again at 1. An INSERT was accepted, and its batch
-- failed later, on the failed items of the batch that had its id before. STABLE, so that it uses the snapshot of the caller:
-- every id visible in it had been given when the sequence is read.
CREATE FUNCTION batchq.ids_given_twice(since timestamptz DEFAULT '-infinity')
RETURNS TABLE (relation text, last_given bigint, newest bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE sequence regclass;
BEGIN
  FOREACH relation IN ARRAY '{batches,audit}'::text[] LOOP
    sequence := pg_get_serial_sequence('batchq.' || relation, 'id');
    CONTINUE WHEN NOT has_sequence_privilege(sequence, 'USAGE, SELECT')
      OR NOT has_table_privilege('batchq.' || relation, 'SELECT');
    last_given := coalesce(pg_sequence_last_value(sequence), 0);
    IF relation = 'audit' THEN
      newest := (SELECT max(a.id) FROM batchq.audit a WHERE a.id > last_given);
    ELSE
      -- EXECUTE, since its plan leaves out the partitions before "since" and so does not lock them.
      EXECUTE 'SELECT max(f.id) FROM batchq.batches_finished f WHERE f.id > $1 AND f.finished_at >= $2'
        INTO newest USING last_given, since;
      newest := greatest(newest, (SELECT max(b.id) FROM batchq.batches_live b WHERE b.id > last_given),
                         (SELECT max(i.batch_id) FROM batchq.failed_items i WHERE i.batch_id > last_given));
    END IF;
    IF newest IS NOT NULL THEN RETURN NEXT; END IF;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.ids_given_twice IS
  'Returns a row for batches or audit if it has rows with larger ids, up to "newest", than the last one given ("last_given"; 0: '
  'none yet): new rows would get ids that are in use. Of finished batches, reads only those that finished after "since". To fix '
  'it, set the sequence of the id to "newest" with setval; batchq doctor prints the statement.';
