-- The bell: NOTIFY at each INSERT, for workers that listen on a direct connection (BATCHQ_LISTEN_DSN). Off by default:
-- workers find batches by polling, within 20 ms, and a NOTIFY makes commits wait for each other.

CREATE FUNCTION batchq.ring()
RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
  PERFORM pg_notify('batchq', '');
  RETURN NULL;
END
$$;

COMMENT ON FUNCTION batchq.ring() IS 'Trigger function: NOTIFY batchq. See batchq.bell.';

CREATE FUNCTION batchq.bell(is_wanted boolean)
RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
  DROP TRIGGER IF EXISTS ring ON batchq.batches;
  IF is_wanted THEN
    CREATE TRIGGER ring AFTER INSERT ON batchq.batches FOR EACH STATEMENT EXECUTE FUNCTION batchq.ring();
  END IF;
END
$$;

COMMENT ON FUNCTION batchq.bell(boolean) IS
  'Has each INSERT into batchq.batches ring a bell (NOTIFY batchq) at its commit, or, with false, no longer. Workers '
  'with BATCHQ_LISTEN_DSN hear it and begin a batch within some 3 ms; the others poll. Only for the schema''s owner.';
