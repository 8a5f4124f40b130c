-- A batch that is being processed stays what it is: a worker has its id, its queue and its items in memory.
--
-- The trigger names columns that no worker ever sets, so that no statement of a worker's calls it.

CREATE FUNCTION batchq.keep_processing()
RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
  RAISE EXCEPTION 'batch % is being processed: it cannot be made another', OLD.id
    USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_processing_is_kept', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
          HINT = format('SELECT batchq.cancel(%s) first, or wait.', OLD.id);
END
$$;

COMMENT ON FUNCTION batchq.keep_processing() IS
  'Trigger function: refuses another id, queue, kind or items for a batch that is being processed.';

CREATE TRIGGER keep_processing
  BEFORE UPDATE OF id, queue, kind, items ON batchq.batches_live
  FOR EACH ROW
  WHEN (OLD.status = 'processing' AND (NEW.id <> OLD.id OR NEW.queue <> OLD.queue OR NEW.kind <> OLD.kind
                                       OR NEW.items IS DISTINCT FROM OLD.items))
  EXECUTE FUNCTION batchq.keep_processing();

-- With the batches go their failed items: their ids may be given again.
CREATE FUNCTION batchq.forget_failed_items()
RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  TRUNCATE batchq.failed_items;
  RETURN NULL;
END
$$;

COMMENT ON FUNCTION batchq.forget_failed_items() IS
  'Trigger function: TRUNCATE of batchq.batches empties batchq.failed_items as well.';

CREATE TRIGGER forget_failed_items
  AFTER TRUNCATE ON batchq.batches
  FOR EACH STATEMENT
  EXECUTE FUNCTION batchq.forget_failed_items();
