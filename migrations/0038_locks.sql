-- What whoever may log in can hold or fill stops nobody: locks for what one worker does for all, and the bell.

DO $$
DECLARE
  foreign_table regclass;
BEGIN
  SELECT c.oid INTO foreign_table
  FROM pg_catalog.pg_class c
  WHERE c.relnamespace = 'batchq'::regnamespace
    AND c.relkind IN ('r', 'p', 'v')
    AND NOT pg_has_role(c.relowner, 'USAGE')
  LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'table % does not belong to %, who migrates', foreign_table, current_user
      USING HINT = 'A worker made it: as its role, or as a superuser, give it to the owner of the schema by ALTER TABLE ... OWNER TO, '
                   'or run batchq migrate once as a superuser.';
  END IF;
END
$$;

-- Whoever may log in can fill the server's queue of notifications, and then NOTIFY fails, and with it each INSERT.
CREATE OR REPLACE FUNCTION batchq.ring()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF pg_notification_queue_usage() < 0.5 THEN  -- workers poll as well
    PERFORM pg_notify('batchq', '');
  END IF;
  RETURN NULL;
END
$$;

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

DO $$
DECLARE
  made text;
BEGIN
  FOR made IN
    SELECT regexp_replace(
             regexp_replace(pg_get_functiondef(p.oid), 'pg_try_advisory_xact_lock' || argument, 'batchq.try_lock(''\1'')'),
             'pg_advisory_xact_lock' || argument, 'batchq.take_lock(''\1'')')
    FROM pg_catalog.pg_proc p
    CROSS JOIN (VALUES ('\(hashtextextended\(''batchq\.(\w+)'', 0\)\)')) AS a(argument)
    WHERE p.pronamespace = 'batchq'::regnamespace
      AND p.prosrc LIKE '%advisory_xact_lock(%'
  LOOP
    EXECUTE made;
  END LOOP;
END
$$;
