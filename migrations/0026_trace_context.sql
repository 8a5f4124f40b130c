-- Where a batch was enqueued, for OpenTelemetry: the run's span links to it. Null for who does not trace, and then it
-- takes no room. It goes along with the batch: the verbs below are as before, but for this column.

-- A worker's finish locks the partitions first and the parent last, this the other way round: give way long before
-- Postgres looks for deadlocks, whose victim might be the worker.
SELECT set_config('lock_timeout', '100ms', true);

ALTER TABLE batchq.batches ADD COLUMN trace_context text;
-- Not validated: every row has null, and to read them all would hold up everybody.
ALTER TABLE batchq.batches
  ADD CONSTRAINT batches_trace_context_fits CHECK (octet_length(trace_context) BETWEEN 1 AND 200) NOT VALID;

COMMENT ON COLUMN batchq.batches.trace_context IS
  'Optional: the span that enqueued the batch, as a traceparent of W3C Trace Context (00-TRACE-SPAN-01). A worker with BATCHQ_TRACES links the span of each run to it.';

CREATE OR REPLACE FUNCTION batchq.cancel(batch_id bigint, reason text DEFAULT 'by an operator', actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql
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

CREATE OR REPLACE FUNCTION batchq.retry(batch_id bigint, whole boolean DEFAULT false, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql
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

CREATE OR REPLACE FUNCTION batchq.bulk_retry(ids bigint[], from_status text, first_at timestamptz, last_at timestamptz, whole boolean)
RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_variable
DECLARE
  done bigint[];
BEGIN
  -- What meets a live batch of its unique_key is not inserted, and so not deleted.
  WITH chosen AS MATERIALIZED (
    SELECT f.*
    FROM batchq.batches_finished f
    WHERE f.id = ANY (ids)
      AND f.finished_at BETWEEN first_at AND last_at
      AND f.status = from_status
      AND (f.status <> 'completed' OR f.items_failed > 0 OR whole)
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
    WHERE f.id = ANY (ARRAY(SELECT i.id FROM inserted i))
      AND f.finished_at BETWEEN first_at AND last_at
    RETURNING f.id
  )
  SELECT array_agg(g.id) INTO done FROM gone g;
  IF whole THEN
    DELETE FROM batchq.failed_items f WHERE f.batch_id = ANY (done);
  ELSE
    UPDATE batchq.failed_items f SET attempt = 0, retryable = true WHERE f.batch_id = ANY (done);
  END IF;
  RETURN coalesce(array_length(done, 1), 0);
END
$$;

CREATE OR REPLACE FUNCTION batchq.bulk_cancel(ids bigint[], statuses text[], reason text)
RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_variable
DECLARE
  done integer;
BEGIN
  WITH chosen AS MATERIALIZED (
    SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (ids) AND b.status = ANY (statuses) FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM batchq.batches_live b WHERE b.id = ANY (ARRAY(SELECT c.id FROM chosen c)) RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, status, payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    result, errors, created_at, finished_at, trace_context)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, g.queue, g.kind, 'cancelled', g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts,
    g.max_failed_items, g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done,
    g.items_failed, g.cursor, g.result, batchq.append_error(g.errors, g.attempt,
      jsonb_build_object('error', 'cancelled' || coalesce(': ' || left(reason, 2000), ''))), g.created_at, now(),
    g.trace_context
  FROM gone g;
  GET DIAGNOSTICS done = ROW_COUNT;
  RETURN done;
END
$$;
