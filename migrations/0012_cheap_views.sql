-- batchq.queues and batchq.failures, in milliseconds beside ten million live and a hundred million finished batches:
-- what is counted is bounded, and what lies beyond the bound is estimated, and says so.

-- The newest failures. Only on the parent: the migration must not hold up finishing workers while it reads what is
-- there. A partition gets it when it is attached; those that exist and are small get it here. Without it the newest
-- failures are found among all of the partition's failures, which are indexed already.
CREATE INDEX batches_finished_failed_at ON ONLY batchq.batches_finished (finished_at, id) WHERE status = 'failed';

DO $$
DECLARE
  partition regclass;
  name      text;
BEGIN
  FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'batchq.batches_finished'::regclass LOOP
    CONTINUE WHEN pg_relation_size(partition) > 64 * 1024 * 1024;
    name := (SELECT relname FROM pg_class WHERE oid = partition) || '_failed_at';
    EXECUTE format('CREATE INDEX %I ON %s (finished_at, id) WHERE status = ''failed''', name, partition);
    EXECUTE format('ALTER INDEX batchq.batches_finished_failed_at ATTACH PARTITION batchq.%I', name);
  END LOOP;
END
$$;

CREATE FUNCTION batchq.count_live(most integer DEFAULT 20000)
RETURNS TABLE (queue text, kind text, state text, count bigint, late bigint, oldest_at timestamptz, is_estimate boolean,
               is_oldest_estimate boolean)
-- SECURITY DEFINER, since who may look at batchq.queues need not be allowed to read the partitions.
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  pages     float8 := pg_relation_size('batchq.batches_live') / current_setting('block_size')::integer;
  in_sample float8 := least(100, 100 * 500 / greatest(pages, 1));
BEGIN
  RETURN QUERY
  WITH RECURSIVE waiting_level AS (
    (SELECT b.queue, b.priority FROM batchq.batches_live b WHERE b.status = 'pending' ORDER BY b.queue, b.priority LIMIT 1)
    UNION ALL
    SELECT next.queue, next.priority
    FROM waiting_level l
    CROSS JOIN LATERAL (
      SELECT b.queue, b.priority
      FROM batchq.batches_live b
      WHERE b.status = 'pending' AND (b.queue, b.priority) > (l.queue, l.priority)
      ORDER BY b.queue, b.priority
      LIMIT 1
    ) next
  ), busy_queue AS (
    (SELECT b.queue FROM batchq.batches_live b WHERE b.status = 'processing' ORDER BY b.queue LIMIT 1)
    UNION ALL
    SELECT next.queue
    FROM busy_queue q
    CROSS JOIN LATERAL (
      SELECT b.queue FROM batchq.batches_live b WHERE b.status = 'processing' AND b.queue > q.queue ORDER BY b.queue LIMIT 1
    ) next
  ), waiting AS MATERIALIZED (
    SELECT * FROM waiting_level LIMIT 1000
  ), busy AS MATERIALIZED (
    SELECT * FROM busy_queue LIMIT 1000
  ), share AS MATERIALIZED (
    SELECT greatest(100, most / greatest((SELECT count(*) FROM waiting), 1))::integer AS of_waiting,
           greatest(100, most / greatest((SELECT count(*) FROM busy), 1))::integer AS of_busy
  ), entry AS MATERIALIZED (
    SELECT w.queue, w.priority, 'ready' AS state, b.kind, b.run_at AS at, share.of_waiting AS share
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at
      FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND b.run_at <= now()
      ORDER BY b.run_at, b.id
      LIMIT share.of_waiting + 1
    ) b
    UNION ALL
    SELECT w.queue, w.priority, 'scheduled', b.kind, b.run_at, share.of_waiting
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at
      FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.priority = w.priority AND b.run_at > now()
      ORDER BY b.run_at, b.id
      LIMIT share.of_waiting + 1
    ) b
    UNION ALL
    SELECT q.queue, 0, 'processing', b.kind, b.lease_expires_at, share.of_busy
    FROM busy q CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.lease_expires_at
      FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing'
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
    cut.queue IS NOT NULL, cut.known_until IS NOT NULL AND (c.oldest_at IS NULL OR c.oldest_at > cut.known_until)
  FROM counted c
  FULL JOIN sampled s USING (queue, kind, state)
  LEFT JOIN cut USING (queue, state);
END
$$;

COMMENT ON FUNCTION batchq.count_live(integer) IS
  'Counts live batches by queue, kind and state (ready, scheduled, processing), with the oldest run_at or lease and how '
  'many of those are past. It reads the first "most" of each state, the oldest of each queue and priority; where there '
  'are more, the count is an estimate from 500 pages of the table, and rare kinds that only lie behind may be missing.';

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
