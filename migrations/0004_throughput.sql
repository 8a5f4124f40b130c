-- What was worked in each minute, as the workers count it: batchq.throughput. Nothing is decided by it. A worker writes
-- what it has counted once a second, in a row of its own for each minute, queue and kind, so that none waits for
-- another; what a killed worker had not written, a second's counts, is missing.
CREATE TABLE batchq.throughput_minutes (
  minute      timestamptz NOT NULL,
  queue       text        NOT NULL,
  kind        text        NOT NULL,
  worker      text        NOT NULL,
  completed   bigint      NOT NULL,
  failed      bigint      NOT NULL,
  cancelled   bigint      NOT NULL,
  retried     bigint      NOT NULL,
  items       bigint      NOT NULL,
  run_seconds float8      NOT NULL,
  run_times   integer[]   NOT NULL,
  PRIMARY KEY (minute, queue, kind, worker)
) WITH (fillfactor = 50);

COMMENT ON TABLE batchq.throughput_minutes IS 'What lies under batchq.throughput: a row a minute, queue, kind and worker. Kept for 7 days.';
COMMENT ON COLUMN batchq.throughput_minutes.worker IS 'Who counted: batchq.workers.id. Empty: all workers, merged when the minute is over.';
COMMENT ON COLUMN batchq.throughput_minutes.run_seconds IS 'The sum of the run times of completed, failed, cancelled and retried.';
COMMENT ON COLUMN batchq.throughput_minutes.run_times IS
  'How many of those ran for how long: number n, from 1, is below 2 ^ ((n - 1) / 2 - 16) s, and not below the one before. Without trailing zeros.';

CREATE INDEX throughput_minutes_unmerged ON batchq.throughput_minutes (minute) WHERE worker <> '';

-- Most sums have one term: an hour of fifteen kinds takes half the time.
CREATE FUNCTION batchq.add_counts(counts integer[], more integer[])
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF cardinality(counts) = 0 THEN
    RETURN more;
  ELSIF cardinality(more) = 0 THEN
    RETURN counts;
  END IF;
  RETURN (SELECT array_agg(coalesce(u.a, 0) + coalesce(u.b, 0) ORDER BY u.n)
          FROM unnest(counts, more) WITH ORDINALITY AS u(a, b, n));
END
$$;

COMMENT ON FUNCTION batchq.add_counts(integer[], integer[]) IS 'Adds two lists of counts, number by number; the shorter one ends in zeros.';

CREATE AGGREGATE batchq.sum_counts(integer[]) (SFUNC = batchq.add_counts, STYPE = integer[], INITCOND = '{}');

COMMENT ON AGGREGATE batchq.sum_counts(integer[]) IS 'The sum of lists of counts, number by number.';

-- All percentiles of a minute in one pass.
CREATE FUNCTION batchq.run_time_percentiles(run_times integer[], fractions float8[])
RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
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

CREATE FUNCTION batchq.merge_throughput()
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  merged integer;
BEGIN
  IF NOT batchq.try_lock('throughput') THEN
    RETURN 0;
  END IF;
  DELETE FROM batchq.throughput_minutes t WHERE t.minute < now() - interval '7 days';
  WITH parts AS (
    DELETE FROM batchq.throughput_minutes t
    WHERE t.worker <> ''
      AND t.minute < date_trunc('minute', now()) - interval '1 minute'
    RETURNING t.*
  )
  INSERT INTO batchq.throughput_minutes AS t (minute, queue, kind, worker, completed, failed, cancelled, retried, items,
    run_seconds, run_times)
  SELECT minute, queue, kind, '', sum(completed), sum(failed), sum(cancelled), sum(retried), sum(items),
    sum(run_seconds), batchq.sum_counts(run_times)
  FROM parts
  GROUP BY minute, queue, kind
  ON CONFLICT (minute, queue, kind, worker) DO UPDATE
  SET completed = t.completed + excluded.completed,
      failed = t.failed + excluded.failed,
      cancelled = t.cancelled + excluded.cancelled,
      retried = t.retried + excluded.retried,
      items = t.items + excluded.items,
      run_seconds = t.run_seconds + excluded.run_seconds,
      run_times = batchq.add_counts(t.run_times, excluded.run_times);
  GET DIAGNOSTICS merged = ROW_COUNT;
  RETURN merged;
END
$$;

COMMENT ON FUNCTION batchq.merge_throughput() IS
  'Makes one row of the rows of all workers, for each minute that is over, and drops what is older than 7 days. Each '
  'worker calls it each minute; returns how many rows were made, 0 where another one is at it.';

CREATE VIEW batchq.throughput AS
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

COMMENT ON VIEW batchq.throughput IS
  'A row for each minute, queue and kind in which workers ended something, for the last 7 days. As the workers counted '
  'it: a second or so late, and without what one that was killed had not written yet.';
COMMENT ON COLUMN batchq.throughput.completed IS 'Batches that completed, those that are not kept included.';
COMMENT ON COLUMN batchq.throughput.failed IS 'Batches that failed for good, as their worker said; not those whose worker died.';
COMMENT ON COLUMN batchq.throughput.cancelled IS 'Batches whose handler raised Cancel; not those that somebody else cancelled.';
COMMENT ON COLUMN batchq.throughput.retried IS 'Attempts that failed and that another one follows.';
COMMENT ON COLUMN batchq.throughput.items IS 'Items worked for the first time, failed ones included, when they were saved by a checkpoint.';
COMMENT ON COLUMN batchq.throughput.run_seconds_mean IS 'How long those four ran, in the mean.';
COMMENT ON COLUMN batchq.throughput.run_seconds_p50 IS 'Half of them ran no longer; to within 19 %, as the other percentiles.';
COMMENT ON COLUMN batchq.throughput.run_seconds_p95 IS 'All but a twentieth of them ran no longer.';
COMMENT ON COLUMN batchq.throughput.run_seconds_p99 IS 'All but a hundredth of them ran no longer.';
