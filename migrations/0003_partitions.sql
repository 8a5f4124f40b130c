-- Maintenance of the finished partitions. Called by every worker's keeper, with a short lock_timeout: DDL that queued
-- behind a long transaction would stop all that queue behind it.

CREATE FUNCTION batchq.create_finished_partitions(first_day date, days integer)
RETURNS integer
LANGUAGE plpgsql
AS $$
DECLARE
  day      date;
  name     text;
  created  integer := 0;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('batchq.partitions', 0));
  FOR offset_days IN 0 .. days - 1 LOOP
    day  := first_day + offset_days;
    name := 'finished_' || to_char(day, 'YYYYMMDD');
    CONTINUE WHEN to_regclass('batchq.' || name) IS NOT NULL;
    BEGIN
      -- Made alone and then attached: that takes no lock which finishing workers would wait for.
      EXECUTE format('CREATE TABLE batchq.%I (LIKE batchq.batches_finished INCLUDING ALL EXCLUDING INDEXES EXCLUDING IDENTITY)', name);
      EXECUTE format('ALTER TABLE batchq.batches_finished ATTACH PARTITION batchq.%I FOR VALUES FROM (%L) TO (%L)',
                     name, day || ' 00:00:00+00', day + 1 || ' 00:00:00+00');
      created := created + 1;
    EXCEPTION WHEN check_violation THEN
      RAISE NOTICE 'batchq: finished_default already has batches of %, so they stay there', day;
    END;
  END LOOP;
  RETURN created;
END
$$;

COMMENT ON FUNCTION batchq.create_finished_partitions(date, integer) IS
  'Creates the missing partitions of batchq.batches_finished for "days" days (UTC) from "first_day"; returns how many. '
  'A day whose batches already lie in finished_default is left there.';

CREATE FUNCTION batchq.prune(older_than interval)
RETURNS integer
LANGUAGE plpgsql
AS $$
DECLARE
  first_kept_day date := (now() - older_than) AT TIME ZONE 'UTC';
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
      AND c.relname ~ '^finished_\d{8}$'
      AND to_date(right(c.relname, 8), 'YYYYMMDD') < first_kept_day
    ORDER BY c.relname
  LOOP
    EXECUTE format('DROP TABLE batchq.%I', partition.relname);
    dropped := dropped + 1;
  END LOOP;
  DELETE FROM batchq.finished_default f
  WHERE f.ctid = ANY (ARRAY(SELECT d.ctid FROM batchq.finished_default d
                            WHERE d.finished_at < first_kept_day::timestamp AT TIME ZONE 'UTC' LIMIT 10000));
  DELETE FROM batchq.failed_items f
  WHERE f.ctid = ANY (ARRAY(SELECT o.ctid FROM batchq.failed_items o
                            WHERE o.failed_at < first_kept_day::timestamp AT TIME ZONE 'UTC'
                              AND NOT EXISTS (SELECT FROM batchq.batches b WHERE b.id = o.batch_id) LIMIT 10000));
  RETURN dropped;
END
$$;

COMMENT ON FUNCTION batchq.prune(interval) IS
  'Drops the finished partitions that lie wholly before now() - older_than (whole days, UTC), and returns how many; '
  'with them goes what else is as old: up to 10,000 rows each of finished_default and of failed items without a batch.';

SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, 8);
