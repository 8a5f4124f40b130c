-- For workers that keep no completed batches: what has failed in a batch goes with it, also what a checkpoint of the
-- same claim committed while the DELETE of the batch waited for it. That statement itself sees what there was when it
-- began, and left those items behind, of a batch that does not exist; a function's statement sees what there is.

CREATE FUNCTION batchq.forget_failed_items(in_queue text, of_batch bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
  DELETE FROM batchq.failed_items f
  WHERE f.queue = in_queue
    AND f.batch_id = of_batch;
  RETURN true;
END
$$;

COMMENT ON FUNCTION batchq.forget_failed_items(text, bigint) IS
  'Deletes the failed items of a batch that is deleted in the same transaction; returns true.';
