-- Actions on batches ("verbs"), for any SQL client, and a record of who did what, and why.
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
  -- Within a verb current_user is the owner of the schema; the setting "role" stays what the caller has set.
  role     text        NOT NULL DEFAULT
             CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END,
  actor    text
);
COMMENT ON TABLE batchq.audit IS
  'Record of actions: one row for each that changed something, and one for all steps of a bulk action. Kept for 90 days.';
COMMENT ON COLUMN batchq.audit.verb IS 'cancel, retry, snooze, set_priority, move, pause, resume or drain_worker.';
COMMENT ON COLUMN batchq.audit.batches IS 'Number of batches changed.';
COMMENT ON COLUMN batchq.audit.batch_id IS 'The batch; null for bulk actions, pauses and workers.';
COMMENT ON COLUMN batchq.audit.queue IS 'Queue of the batch, of the pause, or of the filter of a bulk action.';
COMMENT ON COLUMN batchq.audit.kind IS 'Kind of the batch, of the pause, or of the filter of a bulk action.';
COMMENT ON COLUMN batchq.audit.details IS 'What was requested: new values, and the filter of a bulk action.';
COMMENT ON COLUMN batchq.audit.role IS 'Database role of the caller, from SET ROLE or from the login.';
COMMENT ON COLUMN batchq.audit.actor IS 'Name that the caller gave, for roles that several people use.';

CREATE INDEX audit_batch ON batchq.audit (batch_id) WHERE batch_id IS NOT NULL;

CREATE FUNCTION batchq.note_verb(verb text, batches bigint, batch_id bigint, queue text, kind text, details jsonb,
                                 reason text, actor text)
RETURNS bigint LANGUAGE sql
BEGIN ATOMIC
  INSERT INTO batchq.audit (verb, batches, batch_id, queue, kind, details, reason, actor)
  VALUES (verb, batches, batch_id, queue, kind, details, left(reason, 2000), left(actor, 200))
  RETURNING id;
END;
COMMENT ON FUNCTION batchq.note_verb IS
  'Adds a row to batchq.audit and returns its id.';

CREATE FUNCTION batchq.append_error(errors jsonb, attempt integer, error jsonb)
RETURNS jsonb LANGUAGE sql STABLE
RETURN CASE WHEN error IS NULL THEN errors
            ELSE CASE WHEN jsonb_array_length(errors) >= 10 THEN errors - 0 ELSE errors END
                 || jsonb_build_array(jsonb_build_object('attempt', attempt, 'at', now()) || error) END;
COMMENT ON FUNCTION batchq.append_error IS
  'Appends the error of one attempt to a value of batchq.batches.errors, and drops the oldest beyond 10. Null: no error.';

-- ------------------------------------------------------------------------------------------------------------- the engine

-- Three functions change batches of one queue; actions on one batch and bulk actions call them. They wait for no row: the
-- caller holds the lock already, or rows that others have locked are skipped. Plans use the indexes whatever the statistics say.

CREATE FUNCTION batchq.cancel_live(in_queue text, ids bigint[], statuses text[], reason text)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE changed integer;
BEGIN
  -- The columns that a batch takes along when it ends: here, in batchq.revive, and in the statements of the workers.
  WITH chosen AS MATERIALIZED (
    SELECT b.id FROM batchq.batches_live b
    WHERE b.queue = in_queue AND b.id = ANY (ids) AND b.status = ANY (statuses)
    FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM batchq.batches_live b WHERE b.queue = in_queue AND b.id = ANY (ARRAY(SELECT c.id FROM chosen c)) RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, status, payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    result, created_at, trace_context, finished_at, errors)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, g.queue, g.kind, 'cancelled', g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts,
    g.max_failed_items, g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done, g.items_failed,
    g.cursor, g.result, g.created_at, g.trace_context, now(), batchq.append_error(g.errors, g.attempt,
      jsonb_build_object('error', 'cancelled' || coalesce(': ' || left(reason, 2000), '')))
  FROM gone g;
  GET DIAGNOSTICS changed = ROW_COUNT;
  RETURN changed;
END $$;
COMMENT ON FUNCTION batchq.cancel_live IS
  'Cancels the live batches of one queue that have these ids and statuses and that nobody else has locked. Returns how many.';

CREATE FUNCTION batchq.revive(in_queue text, ids bigint[], from_status text, whole boolean, first_at timestamptz,
                              last_at timestamptz, OUT changed integer, OUT keyed integer)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE done bigint[]; total integer;
BEGIN
  -- A batch that meets a live batch with its unique_key is not inserted, and so not deleted.
  WITH chosen AS MATERIALIZED (
    SELECT f.* FROM batchq.batches_finished f
    WHERE f.queue = in_queue AND f.id = ANY (ids) AND f.finished_at BETWEEN first_at AND last_at AND f.status = from_status
      AND (f.status <> 'completed' OR f.items_failed > 0 OR whole IS DISTINCT FROM false)
    FOR UPDATE SKIP LOCKED
  ), inserted AS (
    INSERT INTO batchq.batches (id, queue, kind, payload, items, priority, unique_key, max_attempts, max_failed_items,
      timeout_seconds, items_total, items_done, items_failed, cursor, errors, created_at, trace_context)
    OVERRIDING SYSTEM VALUE
    SELECT c.id, c.queue, c.kind, c.payload, c.items, c.priority, c.unique_key, c.max_attempts, c.max_failed_items,
      c.timeout_seconds, c.items_total, CASE WHEN whole THEN 0 ELSE c.items_done END,
      CASE WHEN whole THEN 0 ELSE c.items_failed END, CASE WHEN whole THEN NULL ELSE c.cursor END, c.errors, c.created_at,
      c.trace_context
    FROM chosen c
    ON CONFLICT DO NOTHING
    RETURNING id
  ), gone AS (
    DELETE FROM batchq.batches_finished f
    WHERE f.queue = in_queue AND f.id = ANY (ARRAY(SELECT i.id FROM inserted i)) AND f.finished_at BETWEEN first_at AND last_at
    RETURNING f.id
  )
  SELECT (SELECT array_agg(g.id) FROM gone g), (SELECT count(*) FROM chosen c) INTO done, total;
  changed := coalesce(cardinality(done), 0);
  keyed := total - changed;
  IF whole THEN
    DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (done);
  ELSE
    UPDATE batchq.failed_items f SET attempt = 0, retryable = true WHERE f.queue = in_queue AND f.batch_id = ANY (done);
  END IF;
END $$;
COMMENT ON FUNCTION batchq.revive IS
  'Makes finished batches of one queue pending again, with all their attempts: those with these ids and this status that '
  'finished in this time and that nobody else has locked. With "whole" they start from the beginning. Returns how many '
  'were changed, and how many were not because a live batch has their unique_key.';

CREATE FUNCTION batchq.change_pending(in_queue text, ids bigint[], new_run_at timestamptz DEFAULT NULL,
                                      new_priority integer DEFAULT NULL, new_queue text DEFAULT NULL,
                                      OUT changed integer, OUT keyed integer)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE free bigint[]; with_key bigint[]; one bigint;
BEGIN
  free := ARRAY(
    SELECT b.id FROM batchq.batches_live b
    WHERE b.queue = in_queue AND b.id = ANY (ids) AND b.status = 'pending'
      AND (b.run_at <> new_run_at OR b.priority <> new_priority OR b.queue <> new_queue)
    FOR UPDATE SKIP LOCKED);
  changed := 0;
  keyed := 0;
  IF free = '{}' THEN RETURN; END IF;  -- before the new priority is cast: one that is out of range changes nothing here
  IF new_queue IS NULL THEN
    UPDATE batchq.batches_live b
    SET run_at = coalesce(new_run_at, b.run_at), priority = coalesce(new_priority, b.priority)
    WHERE b.queue = in_queue AND b.id = ANY (free);
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN;
  END IF;
  with_key := ARRAY(SELECT b.id FROM batchq.batches_live b
                    WHERE b.queue = in_queue AND b.id = ANY (free) AND b.unique_key IS NOT NULL);
  changed := batchq.move_pending(in_queue, ARRAY(SELECT unnest(free) EXCEPT SELECT unnest(with_key)), new_queue);
  FOREACH one IN ARRAY with_key LOOP
    BEGIN
      changed := changed + batchq.move_pending(in_queue, ARRAY[one], new_queue);
    EXCEPTION WHEN unique_violation THEN
      keyed := keyed + 1;  -- stays where it is
    END;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.change_pending IS
  'Changes the run_at, the priority or the queue of pending batches of one queue that have these ids and that nobody else has '
  'locked. Returns how many were changed, and how many were not moved because a live batch there has their unique_key.';

-- Not an UPDATE of the queue: in a distributed Postgres that column decides where a row is stored.
CREATE FUNCTION batchq.move_pending(in_queue text, ids bigint[], new_queue text)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE moved integer;
BEGIN
  WITH gone AS (
    DELETE FROM batchq.batches_live b WHERE b.queue = in_queue AND b.id = ANY (ids) RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items,
    timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor, errors, created_at,
    trace_context)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, new_queue, g.kind, g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts, g.max_failed_items,
    g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done, g.items_failed, g.cursor, g.errors,
    g.created_at, g.trace_context
  FROM gone g;
  GET DIAGNOSTICS moved = ROW_COUNT;
  WITH gone AS (
    DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (ids) RETURNING f.*
  )
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, retryable, failed_at)
  SELECT new_queue, g.batch_id, g.item_index, g.item, g.error, g.attempt, g.retryable, g.failed_at FROM gone g;
  RETURN moved;
END $$;
COMMENT ON FUNCTION batchq.move_pending IS
  'Moves pending batches that the caller has locked to another queue, with their failed items. Returns how many.';

-- ----------------------------------------------------------------------------------------------- actions on one batch

CREATE FUNCTION batchq.lock_batch(batch_id bigint, OUT queue text, OUT kind text, OUT status text, OUT unique_key text,
                                  OUT items_failed integer)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  LOOP
    SELECT b.queue INTO queue FROM batchq.batches_live b WHERE b.id = batch_id;
    SELECT b.kind, b.status, b.unique_key, b.items_failed INTO kind, status, unique_key, items_failed
    FROM batchq.batches_live b
    WHERE b.queue = lock_batch.queue AND b.id = batch_id
    FOR UPDATE;
    EXIT WHEN FOUND;
    SELECT b.queue INTO queue FROM batchq.batches_finished b WHERE b.id = batch_id;
    SELECT b.kind, b.status, b.unique_key, b.items_failed INTO kind, status, unique_key, items_failed
    FROM batchq.batches_finished b
    WHERE b.queue = lock_batch.queue AND b.id = batch_id
    FOR UPDATE;
    EXIT WHEN FOUND;
    -- Not where it was: either there is no such batch, or somebody has just moved, finished or retried it.
    EXIT WHEN NOT EXISTS (SELECT 1 FROM batchq.batches b WHERE b.id = batch_id);
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.lock_batch IS
  'Locks a batch until the transaction ends, wherever it is by then: waits until nobody else changes it. Returns what an '
  'action needs to know of the batch; nulls if there is no such batch.';

CREATE FUNCTION batchq.cancel(batch_id bigint, reason text DEFAULT 'by an operator', actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  IF batchq.cancel_live(b.queue, ARRAY[batch_id], '{pending,processing}', reason) = 0 THEN RETURN b.status; END IF;
  PERFORM batchq.note_verb('cancel', 1, batch_id, b.queue, b.kind, '{}', reason, actor);
  RETURN 'cancelled';
END $$;
COMMENT ON FUNCTION batchq.cancel IS
  'Cancels a batch that is pending or processing, immediately; a running handler is stopped at its next checkpoint and '
  'writes nothing more. Returns the status of the batch: cancelled, or the final one that it already had; null if there is none.';

CREATE FUNCTION batchq.retry(batch_id bigint, whole boolean DEFAULT false, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id); began_at timestamptz := now();
BEGIN
  IF b.status = 'processing' OR b.status IS NULL THEN
    RETURN b.status;
  ELSIF b.status = 'pending' THEN
    DELETE FROM batchq.failed_items f WHERE whole AND f.queue = b.queue AND f.batch_id = retry.batch_id;
    UPDATE batchq.batches_live l
    SET run_at = least(l.run_at, began_at),
        items_done = CASE WHEN whole THEN 0 ELSE l.items_done END,
        items_failed = CASE WHEN whole THEN 0 ELSE l.items_failed END,
        cursor = CASE WHEN whole THEN NULL ELSE l.cursor END
    WHERE l.queue = b.queue AND l.id = batch_id
      AND (l.run_at > began_at OR whole AND (l.items_done + l.items_failed > 0 OR l.cursor IS NOT NULL));
    IF NOT FOUND THEN RETURN 'pending'; END IF;
  ELSIF b.status = 'completed' AND b.items_failed = 0 AND NOT whole THEN
    RAISE EXCEPTION 'batch % is completed: nothing in it is left to retry', batch_id
      USING HINT = format('batchq.retry(%s, whole => true) runs it again from the beginning.', batch_id);
  ELSIF (batchq.revive(b.queue, ARRAY[batch_id], b.status, whole, '-infinity', 'infinity')).changed = 0 THEN
    RAISE EXCEPTION 'batch % cannot be retried: another batch of kind "%" with unique_key "%" is pending or processing',
      batch_id, b.kind, b.unique_key USING ERRCODE = 'unique_violation';
  END IF;
  PERFORM batchq.note_verb('retry', 1, batch_id, b.queue, b.kind, jsonb_build_object('whole', whole), reason, actor);
  RETURN 'pending';
END $$;
COMMENT ON FUNCTION batchq.retry IS
  'Makes a finished batch pending again, with all its attempts. It continues from its checkpoint: items that succeeded are '
  'not run again, items that failed are; with whole => true it starts from the beginning. A pending batch becomes ready '
  'immediately; one that is processing stays as it is. Returns the status of the batch; null if there is none.';

CREATE FUNCTION batchq.retry_items(batch_id bigint, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  IF b.status IN ('completed', 'failed', 'cancelled') AND b.items_failed > 0 THEN
    RETURN batchq.retry(batch_id, false, reason, actor);
  END IF;
  RETURN b.status;
END $$;
COMMENT ON FUNCTION batchq.retry_items IS
  'Retries a finished batch if some of its items failed, and leaves any other as it is. Returns the status of the batch; null '
  'if there is none.';

CREATE FUNCTION batchq.snooze(batch_id bigint, delay interval DEFAULT NULL, until timestamptz DEFAULT NULL,
                              reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id); new_time timestamptz := coalesce(until, now() + delay);
BEGIN
  IF num_nonnulls(delay, until) <> 1 THEN
    RAISE EXCEPTION 'batchq.snooze takes either a delay or a time (until)'
      USING HINT = 'SELECT batchq.snooze(7, ''1 hour''); SELECT batchq.snooze(7, until => ''2030-01-01 06:00+00'');';
  END IF;
  IF (batchq.change_pending(b.queue, ARRAY[batch_id], new_run_at => new_time)).changed > 0 THEN
    PERFORM batchq.note_verb('snooze', 1, batch_id, b.queue, b.kind, jsonb_build_object('run_at', new_time), reason, actor);
  END IF;
  RETURN b.status;
END $$;
COMMENT ON FUNCTION batchq.snooze IS
  'Moves the run_at of a pending batch: to a delay from now, or to a time. Leaves any other batch as it is. Returns the '
  'status of the batch; null if there is none.';

CREATE FUNCTION batchq.set_priority(batch_id bigint, priority integer, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  IF (batchq.change_pending(b.queue, ARRAY[batch_id], new_priority => priority)).changed > 0 THEN
    PERFORM batchq.note_verb('set_priority', 1, batch_id, b.queue, b.kind, jsonb_build_object('priority', priority), reason, actor);
  END IF;
  RETURN b.status;
END $$;
COMMENT ON FUNCTION batchq.set_priority IS
  'Changes the priority of a pending batch; lower runs first. Leaves any other batch as it is. Returns the status of the '
  'batch; null if there is none.';

CREATE FUNCTION batchq.move(batch_id bigint, to_queue text, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  b     record := batchq.lock_batch(batch_id);
  moved record := batchq.change_pending(b.queue, ARRAY[batch_id], new_queue => to_queue);
BEGIN
  IF moved.keyed > 0 THEN
    RAISE EXCEPTION 'batch % cannot be moved: another batch of kind "%" with unique_key "%" is pending or processing in queue "%"',
      batch_id, b.kind, b.unique_key, to_queue USING ERRCODE = 'unique_violation';
  ELSIF moved.changed > 0 THEN
    PERFORM batchq.note_verb('move', 1, batch_id, b.queue, b.kind, jsonb_build_object('to_queue', to_queue), reason, actor);
  END IF;
  RETURN b.status;
END $$;
COMMENT ON FUNCTION batchq.move IS
  'Moves a pending batch to another queue. Leaves any other batch as it is. Returns the status of the batch; null if there '
  'is none.';
