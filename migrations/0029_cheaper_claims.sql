-- Each claim writes a second version of a row, with an entry of its own in the index by id, beside the first one's. Where
-- the index leaves room for it, no page of it is split or searched for dead entries: a twelfth of what a claim costs.
ALTER INDEX batchq.batches_live_id SET (fillfactor = 48);

-- A BEFORE trigger has each row that is updated read and locked once more, whatever columns it is for.
CREATE OR REPLACE TRIGGER keep_processing
  AFTER UPDATE OF id, queue, kind, items ON batchq.batches_live
  FOR EACH ROW
  WHEN (OLD.status = 'processing' AND (NEW.id <> OLD.id OR NEW.queue <> OLD.queue OR NEW.kind <> OLD.kind
                                       OR NEW.items IS DISTINCT FROM OLD.items))
  EXECUTE FUNCTION batchq.keep_processing();
