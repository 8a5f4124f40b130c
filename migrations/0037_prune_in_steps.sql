-- A DROP of a partition takes a dozen locks, and a look over all days five for each of them. With 409 days, 379 of them to
-- drop, one transaction ran out of shared memory for locks, and dropped nothing. Now a call drops ten, the oldest first.
-- The pattern has no backslash: with standard_conforming_strings off, \d was d, and prune found no partition. Days are counted in
-- UTC, not in a time zone whose days may have 23 hours.

CREATE OR REPLACE FUNCTION batchq.prune(older_than interval)
RETURNS integer
LANGUAGE plpgsql
AS $$
DECLARE
  most           constant integer := 10;
  first_kept_day date := (now() AT TIME ZONE 'UTC') - older_than;
  partition      record;
  dropped        integer := 0;
BEGIN
  IF older_than < interval '0' THEN
    RAISE EXCEPTION 'batchq.prune takes an interval from 0 up, not %', older_than;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtextextended('batchq.partitions', 0));
  FOR partition IN
    SELECT c.relname
    FROM pg_inherits i
    JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'batchq.batches_finished'::regclass
      AND c.relname ~ '^finished_[0-9]{8}$'
      AND to_date(right(c.relname, 8), 'YYYYMMDD') < first_kept_day
    ORDER BY c.relname
    LIMIT most
  LOOP
    EXECUTE format('DROP TABLE batchq.%I', partition.relname);
    dropped := dropped + 1;
  END LOOP;
  -- This looks over all days that are left, so only once they are few.
  IF dropped < most THEN
    DELETE FROM batchq.finished_default f
    WHERE f.ctid = ANY (ARRAY(SELECT d.ctid FROM batchq.finished_default d
                              WHERE d.finished_at < first_kept_day::timestamp AT TIME ZONE 'UTC' LIMIT 10000));
    DELETE FROM batchq.failed_items f
    WHERE f.ctid = ANY (ARRAY(SELECT o.ctid FROM batchq.failed_items o
                              WHERE o.failed_at < first_kept_day::timestamp AT TIME ZONE 'UTC'
                                AND NOT EXISTS (SELECT FROM batchq.batches b WHERE b.id = o.batch_id) LIMIT 10000));
  END IF;
  RETURN dropped;
END
$$;

COMMENT ON FUNCTION batchq.prune(interval) IS
  'Drops up to 10 finished partitions, the oldest first, that lie wholly before now() - older_than (whole days, UTC), and '
  'returns how many. Call it until it returns 0, each call in a transaction of its own. Once fewer than 10 are left, it also '
  'deletes what else is as old: up to 10,000 rows each of finished_default and of failed items without a batch.';
