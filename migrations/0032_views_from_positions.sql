-- The views begin where batchq.positions says: they do not walk over what is dead. And up to 10,000 waiting batches, and as
-- many running ones, each is counted, however many queues and priorities they lie in.

CREATE OR REPLACE FUNCTION batchq.count_live(most integer DEFAULT 10000)
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
