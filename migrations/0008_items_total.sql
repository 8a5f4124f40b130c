-- items_total becomes an ordinary column that a trigger fills in.
--
-- Since PostgreSQL 16 an UPDATE that touches no input of a generated column parses that column's expression again for
-- each row: a claim of 500 batches took 33 us of processor a batch, and 23 us without it (PostgreSQL 18.6). The trigger
-- is an AFTER trigger, since a BEFORE trigger would keep COPY from inserting many rows at once, and its condition leaves
-- batches without items alone. Workers from before this migration go on: their finish does not name items_total, so the
-- finished partitions fill it in, too.

-- DROP EXPRESSION does not reach through two levels of partitions in every minor version, so each is done alone.
ALTER TABLE batchq.batches DETACH PARTITION batchq.batches_finished;
ALTER TABLE batchq.batches_finished ALTER COLUMN items_total DROP EXPRESSION;
ALTER TABLE batchq.batches ALTER COLUMN items_total DROP EXPRESSION;
ALTER TABLE batchq.batches ATTACH PARTITION batchq.batches_finished FOR VALUES IN ('completed', 'failed', 'cancelled');
ALTER TABLE batchq.batches_finished DROP CONSTRAINT batches_finished_status;

ALTER TABLE batchq.batches
  DROP CONSTRAINT batches_items_is_array,  -- now raised by batchq.count_items, under this name
  DROP CONSTRAINT batches_counters_fit_items,
  ADD CONSTRAINT batches_counters_fit_items
    CHECK (items_done >= 0 AND items_failed >= 0
           AND items_done + items_failed <= CASE WHEN items IS NULL THEN 0 ELSE coalesce(items_total, 1000000) END)
    NOT VALID;

CREATE FUNCTION batchq.count_items()
RETURNS trigger
-- SECURITY DEFINER, since who may insert batches need not be allowed to update them.
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  counted integer;
BEGIN
  IF jsonb_typeof(NEW.items) <> 'array' THEN
    RAISE EXCEPTION 'new row for relation "%" violates check constraint "batches_items_is_array"', TG_TABLE_NAME
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_items_is_array', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            DETAIL = format('items is a JSON %s, not an array.', jsonb_typeof(NEW.items));
  END IF;
  counted := jsonb_array_length(NEW.items);
  IF counted IS DISTINCT FROM NEW.items_total THEN
    UPDATE batchq.batches b
    SET items_total = counted
    WHERE b.queue = NEW.queue
      AND b.id = NEW.id
      AND b.status = NEW.status
      AND b.finished_at IS NOT DISTINCT FROM NEW.finished_at;
  END IF;
  RETURN NULL;
END
$$;

COMMENT ON FUNCTION batchq.count_items() IS
  'Trigger function: sets batchq.batches.items_total to the length of items, and refuses items that are no array.';

CREATE TRIGGER count_items
  AFTER INSERT ON batchq.batches_live
  FOR EACH ROW WHEN (NEW.items IS NOT NULL OR NEW.items_total IS NOT NULL)
  EXECUTE FUNCTION batchq.count_items();

CREATE TRIGGER count_changed_items
  AFTER UPDATE OF items, items_total ON batchq.batches_live
  FOR EACH ROW
  EXECUTE FUNCTION batchq.count_items();

CREATE TRIGGER count_items
  AFTER INSERT ON batchq.batches_finished
  FOR EACH ROW WHEN (NEW.items IS NOT NULL AND NEW.items_total IS NULL)
  EXECUTE FUNCTION batchq.count_items();

COMMENT ON COLUMN batchq.batches.items_total IS 'The length of items; null without items. Filled in by a trigger.';
