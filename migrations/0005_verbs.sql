-- What a person may do to a batch, from any SQL client, and a record of who did what, and why.
CREATE TABLE batchq.audit (
  id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at       timestamptz NOT NULL DEFAULT now(),
  verb     text        NOT NULL,
  batches  bigint      NOT NULL DEFAULT 0,
  batch_id bigint,
  queue    text,
  kind     text,
  details  jsonb       NOT NULL DEFAULT '{}',
  reason   text,
  role     text        NOT NULL DEFAULT
             CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END,
  actor    text
);

COMMENT ON TABLE batchq.audit IS
  'A row for each verb that changed something, and one for all chunks of a verb in bulk. Rows go after 90 days.';
COMMENT ON COLUMN batchq.audit.verb IS 'cancel, retry, snooze, set_priority, move, pause, resume or drain_worker.';
COMMENT ON COLUMN batchq.audit.batches IS 'How many batches were changed.';
COMMENT ON COLUMN batchq.audit.batch_id IS 'The batch, unless in bulk.';
COMMENT ON COLUMN batchq.audit.queue IS 'The queue of the batch, or of the pause.';
COMMENT ON COLUMN batchq.audit.kind IS 'The kind of the batch, or of the pause.';
COMMENT ON COLUMN batchq.audit.details IS 'What was asked for: new values; the filter of a verb in bulk.';
COMMENT ON COLUMN batchq.audit.role IS 'The database role: who has called the verb, by SET ROLE or by logging in.';
COMMENT ON COLUMN batchq.audit.actor IS 'Who it was, as they said themselves: a name, for roles that several people use.';

CREATE INDEX audit_batch ON batchq.audit (batch_id) WHERE batch_id IS NOT NULL;

CREATE FUNCTION batchq.note_verb(verb text, batches bigint, batch_id bigint, queue text, kind text, details jsonb,
                                 reason text, actor text)
RETURNS bigint
LANGUAGE sql
BEGIN ATOMIC
  INSERT INTO batchq.audit (verb, batches, batch_id, queue, kind, details, reason, actor)
  VALUES (verb, batches, batch_id, queue, kind, details, left(reason, 2000), left(actor, 200))
  RETURNING id;
END;

COMMENT ON FUNCTION batchq.note_verb(text, bigint, bigint, text, text, jsonb, text, text) IS
  'Writes a row of batchq.audit; returns its id.';

CREATE FUNCTION batchq.append_error(errors jsonb, attempt integer, error jsonb)
RETURNS jsonb
LANGUAGE sql STABLE
RETURN CASE WHEN jsonb_array_length(errors) >= 10 THEN errors - 0 ELSE errors END
       || jsonb_build_array(jsonb_build_object('attempt', attempt, 'at', now()) || error);

COMMENT ON FUNCTION batchq.append_error(jsonb, integer, jsonb) IS
  'Appends one attempt''s error to batchq.batches.errors, and drops the oldest beyond 10.';

-- Each verb first locks the batch, wherever it is by then: one that waited for a batch which meanwhile moved to another queue,
-- or was finished or retried, would do nothing.
CREATE FUNCTION batchq.lock_batch(batch_id bigint)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  its_queue text;
BEGIN
  LOOP
    SELECT b.queue INTO its_queue FROM batchq.batches_live b WHERE b.id = lock_batch.batch_id;
    IF FOUND THEN
      PERFORM FROM batchq.batches_live b WHERE b.id = lock_batch.batch_id AND b.queue = its_queue FOR UPDATE;
      IF FOUND THEN
        RETURN its_queue;
      END IF;
    END IF;
    SELECT b.queue INTO its_queue FROM batchq.batches_finished b WHERE b.id = lock_batch.batch_id;
    IF FOUND THEN
      PERFORM FROM batchq.batches_finished b WHERE b.id = lock_batch.batch_id AND b.queue = its_queue FOR UPDATE;
      IF FOUND THEN
        RETURN its_queue;
      END IF;
    END IF;
    -- Not where it was: it has just moved, or there is none.
    IF NOT EXISTS (SELECT FROM batchq.batches b WHERE b.id = lock_batch.batch_id) THEN
      RETURN NULL;
    END IF;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.lock_batch(bigint) IS
  'Waits until nobody else changes a batch, and keeps it so until the transaction ends. Returns its queue, null if there is no such batch.';

CREATE FUNCTION batchq.cancel(batch_id bigint, reason text DEFAULT 'by an operator', actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  its_queue text := batchq.lock_batch(batch_id);
  its_kind  text;
BEGIN
  WITH gone AS (
    DELETE FROM batchq.batches_live b
    WHERE b.queue = its_queue
      AND b.id = cancel.batch_id
    RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, status, payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    result, errors, created_at, finished_at, trace_context)
  OVERRIDING SYSTEM VALUE
  SELECT id, queue, kind, 'cancelled', payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    result, batchq.append_error(errors, attempt, jsonb_build_object('error', 'cancelled' || coalesce(': ' || left(reason, 2000), ''))),
    created_at, now(), trace_context
  FROM gone
  RETURNING kind INTO its_kind;
  IF its_kind IS NULL THEN
    RETURN (SELECT b.status FROM batchq.batches b WHERE b.id = cancel.batch_id);
  END IF;
  PERFORM batchq.note_verb('cancel', 1, batch_id, its_queue, its_kind, '{}', reason, actor);
  RETURN 'cancelled';
END
$$;

COMMENT ON FUNCTION batchq.cancel(bigint, text, text) IS
  'Cancels a batch that is pending or processing, at once; a handler that runs it is stopped at its next checkpoint and '
  'writes nothing more. Returns the batch''s status: cancelled, or the final one it already had; null if there is none.';

CREATE FUNCTION batchq.retry(batch_id bigint, whole boolean DEFAULT false, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  b       batchq.batches;
  changed boolean;
BEGIN
  PERFORM batchq.lock_batch(batch_id);
  SELECT l.* INTO b FROM batchq.batches_live l WHERE l.id = retry.batch_id;
  UPDATE batchq.batches_live l
  SET run_at = least(l.run_at, now()),
      items_done = CASE WHEN whole THEN 0 ELSE l.items_done END,
      items_failed = CASE WHEN whole THEN 0 ELSE l.items_failed END,
      cursor = CASE WHEN whole THEN NULL ELSE l.cursor END
  WHERE l.id = retry.batch_id
    AND l.queue = b.queue
    AND l.status = 'pending'
  RETURNING b.run_at > now() OR (whole AND (b.items_done + b.items_failed > 0 OR b.cursor IS NOT NULL)) INTO changed;
  IF FOUND THEN
    DELETE FROM batchq.failed_items f WHERE whole AND f.batch_id = retry.batch_id AND f.queue = b.queue;
    IF changed THEN
      PERFORM batchq.note_verb('retry', 1, batch_id, b.queue, b.kind, jsonb_build_object('whole', whole), reason, actor);
    END IF;
    RETURN 'pending';
  END IF;
  DELETE FROM batchq.batches_finished f
  WHERE f.id = retry.batch_id
    AND f.queue = (SELECT q.queue FROM batchq.batches_finished q WHERE q.id = retry.batch_id)
  RETURNING f.* INTO b;
  IF NOT FOUND THEN
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
    timeout_seconds, items_total, items_done, items_failed, cursor, errors, created_at, trace_context)
  OVERRIDING SYSTEM VALUE
  VALUES (b.id, b.queue, b.kind, b.payload, b.items, b.priority, b.unique_key, b.max_attempts, b.max_failed_items,
    b.timeout_seconds, b.items_total, b.items_done, b.items_failed, b.cursor, b.errors, b.created_at, b.trace_context);
  PERFORM batchq.note_verb('retry', 1, batch_id, b.queue, b.kind, jsonb_build_object('whole', whole), reason, actor);
  RETURN 'pending';
EXCEPTION WHEN unique_violation THEN
  RAISE EXCEPTION 'batch % cannot be retried: another batch of kind "%" with unique_key "%" is pending or processing',
    b.id, b.kind, b.unique_key USING ERRCODE = 'unique_violation';
END
$$;

COMMENT ON FUNCTION batchq.retry(bigint, boolean, text, text) IS
  'Makes a finished batch pending again, with all its attempts. It goes on from its checkpoint: items that succeeded are '
  'not run again, items that failed are; with whole => true it starts from nothing. A pending batch runs at once; '
  'one that is processing is left alone. Returns the batch''s status; null if there is none.';

CREATE FUNCTION batchq.retry_items(batch_id bigint, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  b record;
BEGIN
  PERFORM batchq.lock_batch(batch_id);
  SELECT f.status, f.items_failed INTO b FROM batchq.batches f WHERE f.id = retry_items.batch_id;
  IF b.status IN ('completed', 'failed', 'cancelled') AND b.items_failed > 0 THEN
    RETURN batchq.retry(batch_id, false, reason, actor);
  END IF;
  RETURN b.status;
END
$$;

COMMENT ON FUNCTION batchq.retry_items(bigint, text, text) IS
  'Does as batchq.retry does for a finished batch some of whose items failed, and nothing for any other.';

CREATE FUNCTION batchq.snooze(batch_id bigint, delay interval DEFAULT NULL, until timestamptz DEFAULT NULL,
                              reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  b        record;
  new_time timestamptz := coalesce(until, now() + delay);
BEGIN
  PERFORM batchq.lock_batch(batch_id);
  IF num_nonnulls(delay, until) <> 1 THEN
    RAISE EXCEPTION 'batchq.snooze takes a delay, or a time with until'
      USING HINT = 'SELECT batchq.snooze(7, ''1 hour''); SELECT batchq.snooze(7, until => ''2030-01-01 06:00+00'');';
  END IF;
  UPDATE batchq.batches_live l
  SET run_at = new_time
  WHERE l.id = snooze.batch_id
    AND l.queue = (SELECT q.queue FROM batchq.batches_live q WHERE q.id = snooze.batch_id)
    AND l.status = 'pending'
    AND l.run_at <> new_time
  RETURNING l.queue, l.kind INTO b;
  IF FOUND THEN
    PERFORM batchq.note_verb('snooze', 1, batch_id, b.queue, b.kind, jsonb_build_object('run_at', new_time), reason, actor);
  END IF;
  RETURN (SELECT l.status FROM batchq.batches l WHERE l.id = snooze.batch_id);
END
$$;

COMMENT ON FUNCTION batchq.snooze(bigint, interval, timestamptz, text, text) IS
  'Moves the run_at of a pending batch: to so long from now, or to a time. Any other is left alone. Returns the batch''s '
  'status; null if there is none.';

CREATE FUNCTION batchq.set_priority(batch_id bigint, priority integer, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  b record;
BEGIN
  PERFORM batchq.lock_batch(batch_id);
  UPDATE batchq.batches_live l
  SET priority = set_priority.priority
  WHERE l.id = set_priority.batch_id
    AND l.queue = (SELECT q.queue FROM batchq.batches_live q WHERE q.id = set_priority.batch_id)
    AND l.status = 'pending'
    AND l.priority <> set_priority.priority
  RETURNING l.queue, l.kind INTO b;
  IF FOUND THEN
    PERFORM batchq.note_verb('set_priority', 1, batch_id, b.queue, b.kind, jsonb_build_object('priority', set_priority.priority),
                             reason, actor);
  END IF;
  RETURN (SELECT l.status FROM batchq.batches l WHERE l.id = set_priority.batch_id);
END
$$;

COMMENT ON FUNCTION batchq.set_priority(bigint, integer, text, text) IS
  'Changes the priority of a pending batch; lower is first. Any other is left alone. Returns its status; null if there is none.';

CREATE FUNCTION batchq.move(batch_id bigint, to_queue text, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  b record;
BEGIN
  PERFORM batchq.lock_batch(batch_id);
  SELECT l.id, l.queue, l.kind, l.unique_key INTO b
  FROM batchq.batches_live l
  WHERE l.id = move.batch_id
    AND l.queue = (SELECT q.queue FROM batchq.batches_live q WHERE q.id = move.batch_id)
    AND l.status = 'pending'
    AND l.queue <> to_queue
  FOR UPDATE;
  IF FOUND THEN
    UPDATE batchq.batches_live l SET queue = to_queue WHERE l.id = b.id AND l.queue = b.queue;
    UPDATE batchq.failed_items f SET queue = to_queue WHERE f.batch_id = b.id AND f.queue = b.queue;
    PERFORM batchq.note_verb('move', 1, batch_id, b.queue, b.kind, jsonb_build_object('to_queue', to_queue), reason, actor);
  END IF;
  RETURN (SELECT l.status FROM batchq.batches l WHERE l.id = move.batch_id);
EXCEPTION WHEN unique_violation THEN
  RAISE EXCEPTION 'batch % cannot be moved: another batch of kind "%" with unique_key "%" is pending or processing in queue "%"',
    b.id, b.kind, b.unique_key, to_queue USING ERRCODE = 'unique_violation';
END
$$;

COMMENT ON FUNCTION batchq.move(bigint, text, text, text) IS
  'Moves a pending batch to another queue. Any other is left alone. Returns its status; null if there is none.';
