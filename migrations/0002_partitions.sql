-- Maintenance: the partitions of the finished batches, and locks for what one worker does for all. Called by every worker's
-- keeper, with a short lock_timeout: DDL that queued behind a long transaction would stop all that queue behind it.

-- An advisory lock may be taken by any role that may log in, and held: no partition would be made again. A row can be
-- locked only by a role that may update it, and by the functions below.
CREATE TABLE batchq.locks (
  name text PRIMARY KEY
);

COMMENT ON TABLE batchq.locks IS 'Rows that are locked, and never changed, by the one worker that does what their name says.';
COMMENT ON COLUMN batchq.locks.name IS 'partitions, positions or throughput.';

INSERT INTO batchq.locks (name) VALUES ('partitions'), ('positions'), ('throughput');

CREATE FUNCTION batchq.take_lock(lock text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  PERFORM FROM batchq.locks WHERE name = lock FOR UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'batchq.locks has no row %', quote_literal(lock)
      USING HINT = format('INSERT INTO batchq.locks (name) VALUES (%L);', lock);
  END IF;
END
$$;

COMMENT ON FUNCTION batchq.take_lock(text) IS 'Takes a lock of batchq.locks, until the end of the transaction; waits for it.';

CREATE FUNCTION batchq.try_lock(lock text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  PERFORM FROM batchq.locks WHERE name = lock FOR UPDATE SKIP LOCKED;
  IF FOUND THEN
    RETURN true;
  ELSIF NOT EXISTS (SELECT FROM batchq.locks WHERE name = lock) THEN
    RAISE EXCEPTION 'batchq.locks has no row %', quote_literal(lock)
      USING HINT = format('INSERT INTO batchq.locks (name) VALUES (%L);', lock);
  END IF;
  RETURN false;
END
$$;

COMMENT ON FUNCTION batchq.try_lock(text) IS
  'Takes a lock of batchq.locks, until the end of the transaction, if it is free; returns whether it was.';

CREATE FUNCTION batchq.create_finished_partitions(first_day date, days integer)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  day      date;
  name     text;
  created  integer := 0;
BEGIN
  PERFORM batchq.take_lock('partitions');
  FOR offset_days IN 0 .. days - 1 LOOP
    day  := first_day + offset_days;
    name := 'finished_' || to_char(day, 'YYYYMMDD');
    CONTINUE WHEN to_regclass('batchq.' || name) IS NOT NULL;
    BEGIN
      -- Made alone and then attached: that takes no lock which finishing workers would wait for.
      EXECUTE format('CREATE TABLE batchq.%I (LIKE batchq.batches_finished INCLUDING ALL EXCLUDING INDEXES EXCLUDING IDENTITY)', name);
      -- A finished batch is only deleted by a retry, so the whole row may serve; a unique index would cost each finish.
      EXECUTE format('ALTER TABLE batchq.%I REPLICA IDENTITY FULL', name);
      EXECUTE format('ALTER TABLE batchq.batches_finished ATTACH PARTITION batchq.%I FOR VALUES FROM (%L) TO (%L)',
                     name, to_char(day, 'YYYY-MM-DD 00:00:00+00'), to_char(day + 1, 'YYYY-MM-DD 00:00:00+00'));
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

SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, 8);

-- A DROP of a partition takes a dozen locks, and a look over all days five for each of them: with 409 days, one transaction ran
-- out of shared memory for locks. So a call drops ten, the oldest first. The pattern has no backslash: with
-- standard_conforming_strings off, \d was d. Days are counted in UTC, not in a time zone whose days may have 23 hours.
CREATE FUNCTION batchq.prune(older_than interval)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
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
  PERFORM batchq.take_lock('partitions');
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

-- Postgres refuses UPDATE and DELETE on a table without a replica identity as soon as a publication covers it. One
-- CREATE PUBLICATION ... FOR ALL TABLES (logical replication, change capture) stopped every claim. With wal_level below
-- logical, a replica identity costs nothing.
CREATE FUNCTION batchq.give_replica_identities()
RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  bare  record;
  given integer := 0;
BEGIN
  -- relreplident stays 'i' when the index that it named is dropped, and 'd' without a primary key: both identify nothing.
  FOR bare IN
    SELECT c.oid::regclass AS relation, u.name AS unique_index
    FROM pg_catalog.pg_class c
    LEFT JOIN LATERAL (
      SELECT ic.relname AS name
      FROM pg_catalog.pg_index i
      JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
      WHERE i.indrelid = c.oid
        AND i.indisunique AND i.indisvalid AND i.indimmediate
        AND i.indpred IS NULL AND i.indexprs IS NULL
        AND NOT EXISTS (SELECT FROM generate_series(0, i.indnkeyatts - 1) k
                        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[k]
                        WHERE NOT a.attnotnull)
      ORDER BY i.indnkeyatts, ic.relname
      LIMIT 1
    ) u ON true
    WHERE c.relnamespace = 'batchq'::regnamespace
      AND c.relkind = 'r'
      AND c.relreplident <> 'f'
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END)
  LOOP
    EXECUTE format('ALTER TABLE %s REPLICA IDENTITY ', bare.relation)
      || CASE WHEN bare.unique_index IS NULL THEN 'FULL' ELSE format('USING INDEX %I', bare.unique_index) END;
    given := given + 1;
  END LOOP;
  RETURN given;
END
$$;

COMMENT ON FUNCTION batchq.give_replica_identities() IS
  'Gives a replica identity to each table of schema batchq that has none, and returns how many there were. The identity is '
  'a unique index over columns that are not null, else the whole row.';
