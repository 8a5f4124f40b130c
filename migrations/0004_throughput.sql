-- What ended in each minute, as the workers count it: batchq.throughput. No decision depends on it. Each worker writes its counts
-- once per second, into its own row per minute, queue and kind, so that no worker waits for another. When a worker is killed, the
-- counts of its last second are missing.
CREATE TABLE batchq.throughput_minutes (
  minute timestamptz NOT NULL, queue text NOT NULL, kind text NOT NULL, worker text NOT NULL,
  completed bigint NOT NULL, failed bigint NOT NULL, cancelled bigint NOT NULL, retried bigint NOT NULL, items bigint NOT NULL,
  run_seconds float8 NOT NULL, run_times integer[] NOT NULL,
  PRIMARY KEY (minute, queue, kind, worker)
) WITH (fillfactor = 50);
COMMENT ON TABLE batchq.throughput_minutes IS
  'One row per minute, queue, kind and worker, kept for 7 days: see batchq.throughput.';
COMMENT ON COLUMN batchq.throughput_minutes.worker IS 'Worker that counted (batchq.workers.id); empty once the minute is merged.';
COMMENT ON COLUMN batchq.throughput_minutes.run_seconds IS 'Sum of the run times of all attempts counted in the row.';
COMMENT ON COLUMN batchq.throughput_minutes.run_times IS
  'Histogram of the run times: element n, from 1, counts those below 2 ^ ((n - 1) / 2 - 16) s, but not below the limit of the '
  'element before. Trailing zeros are left out.';
CREATE INDEX throughput_minutes_unmerged ON batchq.throughput_minutes (minute) WHERE worker <> '';

-- Most sums have one term. The shortcuts halve the time for an hour of fifteen kinds.
CREATE FUNCTION batchq.add_counts(counts integer[], more integer[]) RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF cardinality(counts) = 0 THEN RETURN more; END IF;
  IF cardinality(more) = 0 THEN RETURN counts; END IF;
  RETURN (SELECT array_agg(coalesce(u.a, 0) + coalesce(u.b, 0) ORDER BY u.n)
          FROM unnest(counts, more) WITH ORDINALITY AS u(a, b, n));
END $$;
COMMENT ON FUNCTION batchq.add_counts IS 'Adds two lists of counts, element by element; missing elements count as 0.';
CREATE AGGREGATE batchq.sum_counts(integer[]) (SFUNC = batchq.add_counts, STYPE = integer[], INITCOND = '{}');
COMMENT ON AGGREGATE batchq.sum_counts(integer[]) IS 'Sums lists of counts, element by element.';

-- One pass computes all percentiles of a minute.
CREATE FUNCTION batchq.run_time_percentiles(run_times integer[], fractions float8[]) RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE found float8[] := '{}'; total bigint := 0; up_to_here bigint := 0; counted integer; place integer := 0;
  next integer := 1;
BEGIN
  FOREACH counted IN ARRAY run_times LOOP
    total := total + counted;
  END LOOP;
  IF total = 0 THEN RETURN NULL; END IF;
  FOREACH counted IN ARRAY run_times LOOP
    place := place + 1;
    up_to_here := up_to_here + counted;
    WHILE up_to_here >= fractions[next] * total AND counted > 0 LOOP
      found[next] := round(power(2, (place - 2) / 2.0 - 15.75)::numeric, 6)::float8;
      next := next + 1;
    END LOOP;
  END LOOP;
  RETURN found;
END $$;
COMMENT ON FUNCTION batchq.run_time_percentiles IS
  'Returns, for each fraction in ascending order (0.5: the median), the run time in seconds that this fraction of a histogram '
  '(batchq.throughput_minutes.run_times) does not exceed, to within 19 %; null for an empty histogram.';

CREATE FUNCTION batchq.merge_throughput() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE merged integer := 0; made integer; one text; too_old timestamptz := now() - interval '7 days';
  is_over timestamptz := date_trunc('minute', now()) - interval '1 minute';
BEGIN
  IF NOT batchq.try_lock('throughput') THEN RETURN 0; END IF;
  FOR one IN SELECT DISTINCT t.queue FROM batchq.throughput_minutes t WHERE t.minute < too_old LOOP
    DELETE FROM batchq.throughput_minutes t WHERE t.queue = one AND t.minute < too_old;
  END LOOP;
  FOR one IN SELECT DISTINCT t.queue FROM batchq.throughput_minutes t WHERE t.worker <> '' AND t.minute < is_over LOOP
    WITH parts AS (
      DELETE FROM batchq.throughput_minutes t WHERE t.queue = one AND t.worker <> '' AND t.minute < is_over RETURNING t.*
    )
    INSERT INTO batchq.throughput_minutes AS t (minute, queue, kind, worker, completed, failed, cancelled, retried, items,
      run_seconds, run_times)
    SELECT minute, queue, kind, '', sum(completed), sum(failed), sum(cancelled), sum(retried), sum(items),
      sum(run_seconds), batchq.sum_counts(run_times)
    FROM parts GROUP BY minute, queue, kind
    ON CONFLICT (minute, queue, kind, worker) DO UPDATE
    SET completed = t.completed + excluded.completed, failed = t.failed + excluded.failed,
        cancelled = t.cancelled + excluded.cancelled, retried = t.retried + excluded.retried, items = t.items + excluded.items,
        run_seconds = t.run_seconds + excluded.run_seconds, run_times = batchq.add_counts(t.run_times, excluded.run_times);
    GET DIAGNOSTICS made = ROW_COUNT;
    merged := merged + made;
  END LOOP;
  RETURN merged;
END $$;
COMMENT ON FUNCTION batchq.merge_throughput IS
  'Merges the rows of all workers into one row per finished minute, queue and kind, and deletes rows older than 7 days. Each '
  'worker calls it once per minute. Returns how many rows it made; 0 while another worker merges.';

CREATE VIEW batchq.throughput AS
SELECT minute, queue, kind, completed, failed, cancelled, retried, items,
  round((run_seconds / nullif(completed + failed + cancelled + retried, 0))::numeric, 6)::float8 AS run_seconds_mean,
  percentiles[1] AS run_seconds_p50, percentiles[2] AS run_seconds_p95, percentiles[3] AS run_seconds_p99
FROM (
  SELECT minute, queue, kind, sum(completed)::bigint AS completed, sum(failed)::bigint AS failed,
    sum(cancelled)::bigint AS cancelled, sum(retried)::bigint AS retried, sum(items)::bigint AS items,
    sum(run_seconds) AS run_seconds, batchq.sum_counts(run_times) AS run_times
  FROM batchq.throughput_minutes GROUP BY minute, queue, kind
) merged
CROSS JOIN LATERAL (
  SELECT batchq.run_time_percentiles(run_times, '{0.50,0.95,0.99}') AS percentiles
  OFFSET 0  -- otherwise each of the three columns would compute them again
) times;
COMMENT ON VIEW batchq.throughput IS
  'One row per minute, queue and kind in which workers ended attempts, for the last 7 days. Workers count: the numbers are about '
  'a second late, and lack what a killed worker had not written yet.';
COMMENT ON COLUMN batchq.throughput.completed IS 'Batches that completed, including those that are not kept.';
COMMENT ON COLUMN batchq.throughput.failed IS 'Batches that failed permanently; not those whose worker died.';
COMMENT ON COLUMN batchq.throughput.cancelled IS 'Batches whose handler raised Cancel; not those cancelled by somebody else.';
COMMENT ON COLUMN batchq.throughput.retried IS 'Failed attempts that another attempt follows.';
COMMENT ON COLUMN batchq.throughput.items IS 'Items processed for the first time, failed ones too, once a checkpoint saved them.';
COMMENT ON COLUMN batchq.throughput.run_seconds_mean IS 'Mean run time of the completed, failed, cancelled and retried attempts.';
COMMENT ON COLUMN batchq.throughput.run_seconds_p50 IS 'Run time that half of the attempts did not exceed, to within 19 %.';
COMMENT ON COLUMN batchq.throughput.run_seconds_p95 IS 'Run time that 95 % of the attempts did not exceed, to within 19 %.';
COMMENT ON COLUMN batchq.throughput.run_seconds_p99 IS 'Run time that 99 % of the attempts did not exceed, to within 19 %.';
