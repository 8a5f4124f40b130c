-- Postgres refuses UPDATE and DELETE on a table without a replica identity as soon as a publication covers it. One
-- CREATE PUBLICATION ... FOR ALL TABLES (logical replication, change capture) stopped every claim. With wal_level below
-- logical, a replica identity costs nothing. The bounds of a new partition no longer depend on the session's DateStyle: under
-- 'SQL, YMD' they were not read as they were written.

CREATE FUNCTION batchq.give_replica_identities()
RETURNS integer
LANGUAGE plpgsql
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

SELECT batchq.give_replica_identities();

CREATE OR REPLACE FUNCTION batchq.create_finished_partitions(first_day date, days integer)
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
