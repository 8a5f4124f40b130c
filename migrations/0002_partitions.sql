-- Maintenance: partitions for finished batches, and locks for work that one worker does for all. The housekeeper
-- thread of every worker calls these functions with a short lock_timeout: DDL that waits behind a long transaction blocks
-- everybody after it.

-- Not advisory locks: any role that may log in can take one and hold it, and no partition would be made again. A row can be
-- locked only by a role that may update it, and by the functions below.
CREATE TABLE batchq.locks (name text PRIMARY KEY);
COMMENT ON TABLE batchq.locks IS 'One row per job that one worker does at a time; it locks the row and never changes it.';
COMMENT ON COLUMN batchq.locks.name IS 'partitions, positions or throughput.';
INSERT INTO batchq.locks (name) VALUES ('partitions'), ('positions'), ('throughput');

CREATE FUNCTION batchq.take_lock(lock text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  PERFORM 1 FROM batchq.locks WHERE name = lock FOR UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'batchq.locks has no row %', quote_literal(lock)
      USING HINT = format('INSERT INTO batchq.locks (name) VALUES (%L);', lock);
  END IF;
END $$;
COMMENT ON FUNCTION batchq.take_lock IS 'Locks a row of batchq.locks until the end of the transaction; waits for it.';

CREATE FUNCTION batchq.try_lock(lock text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  PERFORM 1 FROM batchq.locks WHERE name = lock FOR UPDATE SKIP LOCKED;
  IF FOUND THEN
    RETURN true;
  ELSIF NOT EXISTS (SELECT 1 FROM batchq.locks WHERE name = lock) THEN
    RAISE EXCEPTION 'batchq.locks has no row %', quote_literal(lock)
      USING HINT = format('INSERT INTO batchq.locks (name) VALUES (%L);', lock);
  END IF;
  RETURN false;
END $$;
COMMENT ON FUNCTION batchq.try_lock IS
  'Locks a row of batchq.locks until the end of the transaction, if it is free; returns whether it was.';

CREATE FUNCTION batchq.create_finished_partitions(first_day date, days integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE day date; name text; created integer := 0;
BEGIN
  IF days BETWEEN 1 AND 400 IS NOT TRUE THEN
    RAISE EXCEPTION 'batchq.create_finished_partitions: days must be between 1 and 400, not %', days;
  END IF;
  PERFORM batchq.take_lock('partitions');
  FOR offset_days IN 0 .. days - 1 LOOP
    day  := first_day + offset_days;
    name := 'finished_' || to_char(day, 'YYYYMMDD');
    CONTINUE WHEN to_regclass('batchq.' || name) IS NOT NULL;
    BEGIN
      -- CREATE and then ATTACH takes no lock that finishing workers would wait for.
      EXECUTE format('CREATE TABLE batchq.%I (LIKE batchq.batches_finished INCLUDING ALL EXCLUDING INDEXES EXCLUDING IDENTITY)',
                     name);
      -- FULL, since only a retry deletes a finished batch, while a unique index would make each finish more expensive.
      EXECUTE format('ALTER TABLE batchq.%I REPLICA IDENTITY FULL', name);
      EXECUTE format('ALTER TABLE batchq.batches_finished ATTACH PARTITION batchq.%I FOR VALUES FROM (%L) TO (%L)',
                     name, to_char(day, 'YYYY-MM-DD 00:00:00+00'), to_char(day + 1, 'YYYY-MM-DD 00:00:00+00'));
      created := created + 1;
    EXCEPTION WHEN check_violation THEN
      RAISE NOTICE 'batchq: finished_default already has batches of %; they stay there', day;
    END;
  END LOOP;
  RETURN created;
END $$;
COMMENT ON FUNCTION batchq.create_finished_partitions IS
  'Creates the missing partitions of batchq.batches_finished for "days" days (UTC, 1 to 400) from "first_day"; returns how many. '
  'A day that has batches in batchq.finished_default gets no partition: its batches stay there.';

SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, 8);

-- DROP of a partition takes a dozen locks, and a query over all days takes five for each. With 409 days, one transaction ran out
-- of shared memory for locks, so one call drops ten, the oldest first. The pattern has no backslash: with
-- standard_conforming_strings off, \d is d. Days are in UTC: in other time zones, some have 23 hours.
CREATE FUNCTION batchq.prune(older_than interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE most constant integer := 10; first_kept_day date := (now() AT TIME ZONE 'UTC') - older_than; partition record;
  dropped integer := 0; cutoff timestamptz := first_kept_day::timestamp AT TIME ZONE 'UTC'; one text;
BEGIN
  IF older_than < interval '0' THEN
    RAISE EXCEPTION 'batchq.prune: older_than must be zero or more, not %', older_than;
  END IF;
  PERFORM batchq.take_lock('partitions');
  FOR partition IN
    SELECT c.relname
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'batchq.batches_finished'::regclass AND c.relname ~ '^finished_[0-9]{8}$'
      AND to_date(right(c.relname, 8), 'YYYYMMDD') < first_kept_day
    ORDER BY c.relname
    LIMIT most
  LOOP
    EXECUTE format('DROP TABLE batchq.%I', partition.relname);
    dropped := dropped + 1;
  END LOOP;
  -- These read all days that are left, so only once few old ones are.
  IF dropped < most THEN
    FOR one IN SELECT DISTINCT d.queue FROM batchq.finished_default d WHERE d.finished_at < cutoff LOOP
      DELETE FROM batchq.finished_default f
      WHERE f.queue = one AND f.ctid = ANY (ARRAY(SELECT d.ctid FROM batchq.finished_default d
                                                  WHERE d.queue = one AND d.finished_at < cutoff LIMIT 10000));
    END LOOP;
    FOR one IN SELECT DISTINCT i.queue FROM batchq.failed_items i WHERE i.failed_at < cutoff LOOP
      DELETE FROM batchq.failed_items f
      WHERE f.queue = one AND f.ctid = ANY (ARRAY(
        SELECT i.ctid FROM batchq.failed_items i
        WHERE i.queue = one AND i.failed_at < cutoff
          AND NOT EXISTS (SELECT 1 FROM batchq.batches b WHERE b.queue = one AND b.id = i.batch_id) LIMIT 10000));
    END LOOP;
  END IF;
  RETURN dropped;
END $$;
COMMENT ON FUNCTION batchq.prune IS
  'Drops up to 10 finished partitions, the oldest first, that lie wholly before now() - older_than (whole days, UTC); returns '
  'how many. Call it until it returns 0, each call in a transaction of its own. A call that drops fewer than 10 also deletes, '
  'per queue, up to 10,000 rows as old from batchq.finished_default, and up to 10,000 from batchq.failed_items whose batch is gone.';

-- Postgres refuses UPDATE and DELETE on a table without a replica identity as soon as a publication covers it: one CREATE
-- PUBLICATION ... FOR ALL TABLES (logical replication, change capture) stopped every claim. With wal_level below logical, a
-- replica identity costs nothing.
CREATE FUNCTION batchq.give_replica_identities() RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE bare record; given integer := 0;
BEGIN
  -- relreplident stays 'i' when the index that it names is dropped, and 'd' without a primary key: both identify nothing.
  FOR bare IN
    SELECT c.oid::regclass AS relation, (
        SELECT ic.relname
        FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
          AND i.indpred IS NULL AND i.indexprs IS NULL
          AND NOT EXISTS (SELECT 1 FROM generate_series(0, i.indnkeyatts - 1) k
                          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[k] WHERE NOT a.attnotnull)
        ORDER BY i.indnkeyatts, ic.relname
        LIMIT 1) AS unique_index
    FROM pg_class c
    WHERE c.relnamespace = 'batchq'::regnamespace AND c.relkind = 'r' AND c.relreplident <> 'f'
      AND NOT EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.oid
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END)
  LOOP
    EXECUTE format('ALTER TABLE %s REPLICA IDENTITY ', bare.relation)
      || CASE WHEN bare.unique_index IS NULL THEN 'FULL' ELSE format('USING INDEX %I', bare.unique_index) END;
    given := given + 1;
  END LOOP;
  RETURN given;
END $$;
COMMENT ON FUNCTION batchq.give_replica_identities IS
  'Gives a replica identity to each table of schema batchq that has none: a unique index over columns that are not null, else '
  'the whole row. Returns how many tables got one.';
