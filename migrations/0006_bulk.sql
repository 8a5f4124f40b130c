-- Verbs in bulk: by filter, in chunks, each a short transaction of its caller's that waits for no row.
CREATE FUNCTION batchq.bulk_find(filter jsonb, from_status text, is_with_items boolean, after_at timestamptz, after_id bigint,
  most integer, OUT ids bigint[], OUT first_at timestamptz, OUT last_at timestamptz, OUT next_at timestamptz,
  OUT next_id bigint, OUT is_end boolean)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
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
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
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

COMMENT ON FUNCTION batchq.bulk_retry(bigint[], text, timestamptz, timestamptz, boolean) IS
  'Does as batchq.retry does for finished batches that nobody has locked, but for those that meet a live batch of their '
  'unique_key; returns how many.';

CREATE FUNCTION batchq.bulk_cancel(ids bigint[], statuses text[], reason text)
RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
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

COMMENT ON FUNCTION batchq.bulk_cancel(bigint[], text[], text) IS
  'Does as batchq.cancel does for batches that nobody has locked; returns how many.';

CREATE FUNCTION batchq.bulk_change(ids bigint[], new_run_at timestamptz, new_priority integer, new_queue text)
RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
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

-- A verb in bulk makes up to three passes, for what was locked. "before" in the filter is one time for the count and for all
-- passes: else a retry of batches that fail again at once would take them again.
CREATE FUNCTION batchq.bulk(verb text, filter jsonb DEFAULT '{}', change jsonb DEFAULT '{}', place jsonb DEFAULT NULL,
  dry_run boolean DEFAULT false, most integer DEFAULT 1000, reason text DEFAULT NULL, actor text DEFAULT NULL,
  audit_id bigint DEFAULT NULL)
RETURNS TABLE (matched integer, changed integer, next_place jsonb, audit bigint, keyed integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
  whole       boolean := coalesce((change ->> 'whole')::boolean, false);
  known       text[];
  from_status text;
  found       record;
  began_at    timestamptz := coalesce((filter ->> 'before')::timestamptz, (place ->> 2)::timestamptz, now());
  -- By the clock of the beginning: what grows old enough while it goes on was not counted.
  older_than  float8 := coalesce((filter ->> 'older_than_seconds')::float8, 0) + extract(epoch FROM now() - began_at);
  new_run_at  timestamptz := coalesce((change ->> 'until')::timestamptz,
                                      began_at + (change ->> 'delay_seconds')::float8 * interval '1 second');
BEGIN
  known := CASE
    WHEN verb = 'cancel' THEN '{live,pending,processing}'
    WHEN verb IN ('snooze', 'set_priority', 'move') THEN '{pending}'
    WHEN verb IN ('retry', 'retry_items') THEN '{failed,cancelled,completed}'
  END;
  IF known IS NULL THEN
    RAISE EXCEPTION 'batchq.bulk knows no verb %', quote_nullable(verb)
      USING HINT = 'cancel, retry, retry_items, snooze, set_priority, move';
  END IF;
  IF filter - '{queue,kind,status,error_like,older_than_seconds,before}'::text[] <> '{}' THEN
    RAISE EXCEPTION 'batchq.bulk knows no filter %', filter - '{queue,kind,status,error_like,older_than_seconds,before}'::text[]
      USING HINT = 'queue, kind, status, error_like, older_than_seconds, before';
  END IF;
  IF num_nonnulls(change ->> 'delay_seconds', change ->> 'until') <> (verb = 'snooze')::integer
     OR (change ->> 'priority' IS NOT NULL) <> (verb = 'set_priority')
     OR (change ->> 'to_queue' IS NOT NULL) <> (verb = 'move') THEN
    RAISE EXCEPTION 'batchq.bulk: % does not fit the verb %', change, verb
      USING HINT = 'snooze takes delay_seconds or until, set_priority takes priority, move takes to_queue';
  END IF;
  from_status := coalesce(filter ->> 'status', known[1]);
  IF NOT from_status = ANY (known) THEN
    RAISE EXCEPTION 'batchq.bulk: % takes no batches that are %', verb, from_status
      USING HINT = 'It takes those that are ' || array_to_string(array_remove(known, 'live'), ' or ');
  END IF;

  found := batchq.bulk_find(filter - 'before' || jsonb_build_object('older_than_seconds', older_than::numeric), from_status,
    verb = 'retry_items' OR (verb = 'retry' AND from_status = 'completed' AND NOT whole),
    coalesce((place ->> 0)::timestamptz, '-infinity'), coalesce((place ->> 1)::bigint, 0), most);
  matched := cardinality(found.ids);
  IF verb IN ('snooze', 'set_priority', 'move') THEN  -- a batch that is already as wanted does not match
    matched := (SELECT count(*) FROM batchq.batches_live b WHERE b.id = ANY (found.ids)
                AND (b.run_at <> new_run_at OR b.priority <> (change ->> 'priority')::integer OR b.queue <> change ->> 'to_queue'));
  END IF;
  changed := 0;
  IF NOT dry_run AND matched > 0 THEN
    changed := CASE
      WHEN verb = 'cancel' THEN batchq.bulk_cancel(found.ids,
        CASE from_status WHEN 'live' THEN '{pending,processing}' ELSE ARRAY[from_status] END, coalesce(reason, 'in bulk'))
      WHEN verb IN ('retry', 'retry_items') THEN batchq.bulk_retry(found.ids, from_status, found.first_at, found.last_at, whole)
      ELSE batchq.bulk_change(found.ids, new_run_at, (change ->> 'priority')::integer, change ->> 'to_queue')
    END;
  END IF;
  keyed := 0;
  IF NOT dry_run AND changed < matched THEN
    keyed := (SELECT count(*) FROM batchq.batches b
              WHERE b.id = ANY (found.ids)
                AND (b.status = from_status AND verb IN ('retry', 'retry_items') AND b.finished_at BETWEEN found.first_at AND found.last_at
                     OR b.status = 'pending' AND b.queue <> change ->> 'to_queue')
                AND EXISTS (SELECT FROM batchq.batches_live l WHERE l.queue = coalesce(change ->> 'to_queue', b.queue)
                              AND l.kind = b.kind AND l.unique_key = b.unique_key));
  END IF;
  IF changed > 0 AND audit_id IS NULL THEN
    audit_id := batchq.note_verb(verb, changed, NULL, filter ->> 'queue', filter ->> 'kind',
                                 jsonb_build_object('filter', filter) || change, reason, actor);
  ELSIF changed > 0 THEN
    UPDATE batchq.audit a SET batches = a.batches + changed WHERE a.id = audit_id;
  END IF;
  next_place := CASE WHEN NOT found.is_end THEN jsonb_build_array(found.next_at, found.next_id, began_at) END;
  audit := audit_id;
  RETURN NEXT;
END
$$;

COMMENT ON FUNCTION batchq.bulk(text, jsonb, jsonb, jsonb, boolean, integer, text, text, bigint) IS
  'Does a verb for the next batches that a filter matches: "most" of them, among 20,000 that are looked at. verb: cancel, '
  'retry, retry_items, snooze, set_priority, move. filter: queue, kind, status, error_like (part of the last error, or a '
  'pattern with %), older_than_seconds (since it finished or, while it is live, was inserted), before (only what finished '
  'or was inserted before this time; default: the time of the first call). change: whole; delay_seconds or until; priority; '
  'to_queue. Continue with the next_place and audit that it returns, until next_place is null; each call in a transaction '
  'of its own. For another pass over what was left out, give "before" the time of the first call. Batches that are locked, '
  'or would meet a live one of their unique_key, are left out: they count in matched, not in changed; "keyed" counts the '
  'latter. With dry_run, nothing is changed.';
