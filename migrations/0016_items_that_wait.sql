-- A batch with "after" is waiting as soon as begin_waiting has fired, before this trigger fires. Found by its status when it was
-- inserted, it was not found: its items were not counted, and so none was worked.
CREATE OR REPLACE FUNCTION batchq.count_items() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE counted integer;
BEGIN
  IF TG_TABLE_SCHEMA <> 'batchq' THEN
    RAISE EXCEPTION 'batchq.count_items is a trigger function of batchq''s own tables, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  ELSIF jsonb_typeof(NEW.items) <> 'array' THEN
    RAISE EXCEPTION 'new row for relation "%" violates check constraint "batches_items_is_array"', TG_TABLE_NAME
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_items_is_array', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            DETAIL = format('items is a JSON %s, not an array.', jsonb_typeof(NEW.items));
  END IF;
  counted := jsonb_array_length(NEW.items);
  IF counted IS NOT DISTINCT FROM NEW.items_total THEN
    RETURN NULL;
  ELSIF NEW.finished_at IS NULL THEN
    UPDATE batchq.batches_live b SET items_total = counted WHERE b.queue = NEW.queue AND b.id = NEW.id;
  ELSE
    UPDATE batchq.batches b SET items_total = counted
    WHERE b.queue = NEW.queue AND b.id = NEW.id AND b.status = NEW.status AND b.finished_at = NEW.finished_at;
  END IF;
  RETURN NULL;
END $$;

-- Those that have not begun are put right.
UPDATE batchq.batches_live b SET items_total = jsonb_array_length(b.items)
WHERE b.after IS NOT NULL AND b.items IS NOT NULL AND b.items_total IS NULL AND b.status <> 'processing';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
