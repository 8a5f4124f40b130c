-- Up to "most" waiting batches, and as many running ones, batchq.count_live counts each of them, however many queues and
-- priorities they lie in.

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
  -- While there are no more than "most" in all, each is counted. Only beyond does a level get no more than its share.
  counts_all boolean := most >= (
    SELECT count(*)
    FROM (
      SELECT
      FROM batchq.waiting_levels() w CROSS JOIN LATERAL (
        SELECT
        FROM batchq.batches_live b
        WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
        ORDER BY b.run_at, b.id
        LIMIT most + 1
      ) b
      WHERE w.at IS NOT NULL
      LIMIT most + 1
    ) some_waiting
  ) AND most >= (
    SELECT count(*)
    FROM (
      SELECT
      FROM batchq.busy_queues() q CROSS JOIN LATERAL (
        SELECT
        FROM batchq.batches_live b
        WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
        ORDER BY b.lease_expires_at
        LIMIT most + 1
      ) b
      WHERE q.at IS NOT NULL
      LIMIT most + 1
    ) some_busy
  );
BEGIN
  RETURN QUERY
  WITH waiting AS MATERIALIZED (
    SELECT * FROM batchq.waiting_levels() WHERE at IS NOT NULL LIMIT CASE WHEN NOT counts_all THEN 1000 END
  ), busy AS MATERIALIZED (
    SELECT * FROM batchq.busy_queues() WHERE at IS NOT NULL LIMIT CASE WHEN NOT counts_all THEN 1000 END
  ), share AS MATERIALIZED (
    SELECT
      greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM waiting), 1) END)::integer
        AS of_waiting,
      greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM busy), 1) END)::integer
        AS of_busy
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
