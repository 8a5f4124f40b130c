-- What a person may do to a batch, from any SQL client.

CREATE FUNCTION batchq.append_error(errors jsonb, attempt integer, error jsonb)
RETURNS jsonb
LANGUAGE sql STABLE
RETURN CASE WHEN jsonb_array_length(errors) >= 10 THEN errors - 0 ELSE errors END
       || jsonb_build_array(jsonb_build_object('attempt', attempt, 'at', now()) || error);

COMMENT ON FUNCTION batchq.append_error(jsonb, integer, jsonb) IS
  'Appends one attempt''s error to batchq.batches.errors, and drops the oldest beyond 10.';

CREATE FUNCTION batchq.cancel(batch_id bigint, reason text DEFAULT 'by an operator')
RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
  its_queue text := (SELECT b.queue FROM batchq.batches_live b WHERE b.id = cancel.batch_id);
  done      text;
BEGIN
  WITH gone AS (
    DELETE FROM batchq.batches_live b
    WHERE b.queue = its_queue
      AND b.id = cancel.batch_id
    RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, status, payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_done, items_failed, cursor, result,
    errors, created_at, finished_at)
  OVERRIDING SYSTEM VALUE
  SELECT id, queue, kind, 'cancelled', payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_done, items_failed, cursor, result,
    batchq.append_error(errors, attempt, jsonb_build_object('error', 'cancelled' || coalesce(': ' || left(reason, 2000), ''))),
    created_at, now()
  FROM gone
  RETURNING status INTO done;
  IF done IS NULL THEN
    SELECT b.status INTO done FROM batchq.batches b WHERE b.id = cancel.batch_id;
  END IF;
  RETURN done;
END
$$;

COMMENT ON FUNCTION batchq.cancel(bigint, text) IS
  'Cancels a batch that is pending or processing, at once; a handler that runs it is stopped at its next checkpoint and '
  'writes nothing more. Returns the batch''s status: cancelled, or the final one it already had; null if there is none.';

CREATE FUNCTION batchq.retry(batch_id bigint, whole boolean DEFAULT false)
RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
  b batchq.batches;
BEGIN
  UPDATE batchq.batches_live l
  SET run_at = least(l.run_at, now()),
      items_done = CASE WHEN whole THEN 0 ELSE l.items_done END,
      items_failed = CASE WHEN whole THEN 0 ELSE l.items_failed END,
      cursor = CASE WHEN whole THEN NULL ELSE l.cursor END
  WHERE l.id = retry.batch_id
    AND l.queue = (SELECT q.queue FROM batchq.batches_live q WHERE q.id = retry.batch_id)
    AND l.status = 'pending';
  IF FOUND THEN
    DELETE FROM batchq.failed_items f
    WHERE whole
      AND f.batch_id = retry.batch_id
      AND f.queue = (SELECT q.queue FROM batchq.batches_live q WHERE q.id = retry.batch_id);
    RETURN 'pending';
  END IF;
  DELETE FROM batchq.batches_finished f
  WHERE f.id = retry.batch_id
    AND f.queue = (SELECT q.queue FROM batchq.batches_finished q WHERE q.id = retry.batch_id)
  RETURNING f.* INTO b;
  IF b.id IS NULL THEN
    RETURN (SELECT l.status FROM batchq.batches l WHERE l.id = retry.batch_id);
  END IF;
  IF b.status = 'completed' AND b.items_failed = 0 AND NOT whole THEN
    RAISE EXCEPTION 'batch % is completed: nothing in it is left to retry', b.id
      USING HINT = format('batchq.retry(%s, whole => true) works it again from the start.', b.id);
  END IF;
  IF whole THEN
    DELETE FROM batchq.failed_items f WHERE f.queue = b.queue AND f.batch_id = b.id;
    b.items_done := 0;
    b.items_failed := 0;
    b.cursor := NULL;
  ELSE
    UPDATE batchq.failed_items f SET attempt = 0, retryable = true WHERE f.queue = b.queue AND f.batch_id = b.id;
  END IF;
  INSERT INTO batchq.batches (id, queue, kind, payload, items, priority, unique_key, max_attempts, max_failed_items,
    timeout_seconds, items_done, items_failed, cursor, errors, created_at)
  OVERRIDING SYSTEM VALUE
  VALUES (b.id, b.queue, b.kind, b.payload, b.items, b.priority, b.unique_key, b.max_attempts, b.max_failed_items,
    b.timeout_seconds, b.items_done, b.items_failed, b.cursor, b.errors, b.created_at);
  RETURN 'pending';
EXCEPTION WHEN unique_violation THEN
  RAISE EXCEPTION 'batch % cannot be retried: another batch of kind "%" with unique_key "%" is pending or processing',
    b.id, b.kind, b.unique_key USING ERRCODE = 'unique_violation';
END
$$;

COMMENT ON FUNCTION batchq.retry(bigint, boolean) IS
  'Makes a finished batch pending again, with all its attempts. It goes on from its checkpoint: items that succeeded are '
  'not run again, items that failed are; with whole => true it starts from nothing. A pending batch runs at once; '
  'one that is processing is left alone. Returns the batch''s status; null if there is none.';
