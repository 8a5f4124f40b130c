-- Verbs in bulk: by filter, in chunks, each a short transaction of its caller's that waits for no row.

CREATE FUNCTION batchq.bulk_find(filter jsonb, from_status text, is_with_items boolean, after_at timestamptz, after_id bigint,
  most integer, OUT ids bigint[], OUT first_at timestamptz, OUT last_at timestamptz, OUT next_at timestamptz,
  OUT next_id bigint, OUT is_end boolean)
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET jit = off
AS $$
DECLARE
  examined   constant integer := 20000;
  in_queue   text := filter ->> 'queue';
  of_kind    text := filter ->> 'kind';
  before     timestamptz := now() - (filter ->> 'older_than_seconds')::float8 * interval '1 second';
  error_like text := filter ->> 'error_like';
  statuses   text[] := CASE from_status WHEN 'live' THEN '{pending,processing}' ELSE ARRAY[from_status] END;
  is_live    boolean := from_status IN ('live', 'pending', 'processing');
BEGIN
  IF position('%' IN error_like) = 0 THEN
    error_like := '%' || error_like || '%';
  END IF;
  WITH seen AS MATERIALIZED (
    (SELECT b.id, b.queue, b.kind, b.status, b.created_at AS at, b.errors, b.items_failed
     FROM batchq.batches_live b
     WHERE is_live AND b.id > after_id
     ORDER BY b.id
     LIMIT examined)
    UNION ALL
    (SELECT b.id, b.queue, b.kind, b.status, b.finished_at, b.errors, b.items_failed
     FROM batchq.batches_finished b
     WHERE from_status = 'failed' AND b.status = 'failed'
       AND b.finished_at >= after_at AND (b.finished_at, b.id) > (after_at, after_id)
     ORDER BY b.finished_at, b.id
     LIMIT examined)
    UNION ALL
    (SELECT b.id, b.queue, b.kind, b.status, b.finished_at, b.errors, b.items_failed
     FROM batchq.batches_finished b
     WHERE from_status IN ('completed', 'cancelled') AND b.id > after_id
     ORDER BY b.id
     LIMIT examined)
  ), numbered AS MATERIALIZED (
    SELECT *, row_number() OVER () AS number FROM seen
  ), matching AS MATERIALIZED (
    SELECT id, at, number
    FROM numbered
    WHERE status = ANY (statuses)
      AND (in_queue IS NULL OR queue = in_queue)
      AND (of_kind IS NULL OR kind = of_kind)
      AND (before IS NULL OR at < before)
      AND (NOT is_with_items OR items_failed > 0)
      AND (error_like IS NULL OR errors -> -1 ->> 'error' ILIKE error_like)
    ORDER BY number
    LIMIT most
  ), found AS (
    SELECT array_agg(id ORDER BY number) AS ids, min(at) AS first_at, max(at) AS last_at, count(*) AS count, max(number) AS last
    FROM matching
  ), place AS (
    SELECT CASE WHEN found.count = most THEN found.last ELSE (SELECT count(*) FROM numbered) END AS number FROM found
  )
  SELECT coalesce(found.ids, '{}'), found.first_at, found.last_at, n.at, n.id,
    found.count < most AND (SELECT count(*) FROM numbered) < examined
  INTO ids, first_at, last_at, next_at, next_id, is_end
  FROM found CROSS JOIN place LEFT JOIN numbered n ON n.number = place.number;
END
$$;

COMMENT ON FUNCTION batchq.bulk_find(jsonb, text, boolean, timestamptz, bigint, integer) IS
  'Finds the next batches for batchq.bulk: up to "most", among the 20,000 that come after a place in the order of ids or, '
  'for failed ones, of finished_at. Returns their ids, the span of their times, and the place to go on from.';

CREATE FUNCTION batchq.bulk_retry(ids bigint[], from_status text, first_at timestamptz, last_at timestamptz, whole boolean)
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
      timeout_seconds, items_total, items_done, items_failed, cursor, errors, created_at)
    OVERRIDING SYSTEM VALUE
    SELECT c.id, c.queue, c.kind, c.payload, c.items, c.priority, c.unique_key, c.max_attempts, c.max_failed_items,
      c.timeout_seconds, c.items_total, CASE WHEN whole THEN 0 ELSE c.items_done END,
      CASE WHEN whole THEN 0 ELSE c.items_failed END, CASE WHEN whole THEN NULL ELSE c.cursor END, c.errors, c.created_at
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

COMMENT ON FUNCTION batchq.bulk_retry(bigint[], text, timestamptz, timestamptz, boolean) IS
  'Does as batchq.retry does for finished batches that nobody has locked, but for those that meet a live batch of their '
  'unique_key; returns how many.';

CREATE FUNCTION batchq.bulk_cancel(ids bigint[], statuses text[], reason text)
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
    result, errors, created_at, finished_at)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, g.queue, g.kind, 'cancelled', g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts,
    g.max_failed_items, g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done,
    g.items_failed, g.cursor, g.result, batchq.append_error(g.errors, g.attempt,
      jsonb_build_object('error', 'cancelled' || coalesce(': ' || left(reason, 2000), ''))), g.created_at, now()
  FROM gone g;
  GET DIAGNOSTICS done = ROW_COUNT;
  RETURN done;
END
$$;

COMMENT ON FUNCTION batchq.bulk_cancel(bigint[], text[], text) IS
  'Does as batchq.cancel does for batches that nobody has locked; returns how many.';

CREATE FUNCTION batchq.bulk_change(ids bigint[], new_run_at timestamptz, new_priority integer, new_queue text)
RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_variable
DECLARE
  free   bigint[];
  keyed  bigint;
  done   integer;
BEGIN
  free := ARRAY(
    SELECT b.id
    FROM batchq.batches_live b
    WHERE b.id = ANY (ids)
      AND b.status = 'pending'
      AND (b.run_at <> new_run_at OR b.priority <> new_priority OR b.queue <> new_queue)
    FOR UPDATE SKIP LOCKED);
  UPDATE batchq.batches_live b
  SET run_at = coalesce(new_run_at, b.run_at),
      priority = coalesce(new_priority, b.priority),
      queue = coalesce(new_queue, b.queue)
  WHERE b.id = ANY (free)
    AND (new_queue IS NULL OR b.unique_key IS NULL);
  GET DIAGNOSTICS done = ROW_COUNT;
  IF new_queue IS NOT NULL THEN
    FOR keyed IN SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (free) AND b.unique_key IS NOT NULL AND b.queue <> new_queue LOOP
      BEGIN
        UPDATE batchq.batches_live b SET queue = new_queue WHERE b.id = keyed;
        done := done + 1;
      EXCEPTION WHEN unique_violation THEN
        NULL;  -- it stays where it is, beside the live batch of its key
      END;
    END LOOP;
    UPDATE batchq.failed_items f
    SET queue = new_queue
    FROM batchq.batches_live b
    WHERE f.batch_id = ANY (free)
      AND b.id = f.batch_id
      AND b.queue = new_queue
      AND f.queue <> new_queue;
  END IF;
  RETURN done;
END
$$;

COMMENT ON FUNCTION batchq.bulk_change(bigint[], timestamptz, integer, text) IS
  'Does as batchq.snooze, batchq.set_priority or batchq.move does for pending batches that nobody has locked; returns how many.';
