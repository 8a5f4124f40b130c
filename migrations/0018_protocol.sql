-- The protocol by which programs in any language work batches: functions that a worker calls on its own connection, in its own
-- transaction. They keep nothing in the session, so they work through a pooler that gives each transaction another one. Whatever
-- writes for a claim is fenced by its token: if the claim is lost, it writes nothing and returns false. docs/protocol.md specifies it.
-- All run with the rights of the caller: the duty "worker" has them.

-- Two statements: writes and locks name the queue, and a worker knows the id only.
CREATE FUNCTION batchq.lock_claim(batch_id bigint, token uuid, OUT queue text, OUT attempt integer, OUT max_attempts integer,
  OUT items_total integer, OUT items_done integer, OUT items_failed integer, OUT max_failed_items integer, OUT part_of bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$ BEGIN
  SELECT b.queue INTO queue FROM batchq.batches_live b WHERE b.id = batch_id;
  SELECT b.queue, b.attempt, b.max_attempts, b.items_total, b.items_done, b.items_failed, b.max_failed_items, b.part_of
  INTO queue, attempt, max_attempts, items_total, items_done, items_failed, max_failed_items, part_of
  FROM batchq.batches_live b
  WHERE b.queue = lock_claim.queue AND b.id = batch_id AND b.claim_token = token
  FOR UPDATE;
END $$;
COMMENT ON FUNCTION batchq.lock_claim IS
  'Locks a claimed batch until the transaction ends. Returns what an outcome needs to know of it; nulls if the claim is lost.';

CREATE FUNCTION batchq.finish_claim(in_queue text, batch_id bigint, token uuid, new_status text, all_done boolean DEFAULT false,
                                    new_result jsonb DEFAULT NULL, new_error text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$ BEGIN
  WITH gone AS (
    DELETE FROM batchq.batches_live b
    WHERE b.queue = in_queue AND b.id = batch_id AND b.claim_token = token
    RETURNING b.*
  )
  INSERT INTO batchq.batches_finished (id, queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items,
    timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_failed, cursor, created_at, trace_context, key, after,
    on_failure, is_needed, spread, part_of, status, items_done, result, errors, finished_at)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, g.queue, g.kind, g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts, g.max_failed_items,
    g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_failed, g.cursor, g.created_at, g.trace_context,
    g.key, g.after, g.on_failure, g.is_needed, g.spread, g.part_of, new_status,
    CASE WHEN all_done THEN coalesce(g.items_total, 0) - g.items_failed ELSE g.items_done END, new_result,
    batchq.append_error(g.errors, g.attempt, CASE WHEN new_error IS NOT NULL THEN jsonb_build_object('error', left(new_error, 2000)) END),
    clock_timestamp()
  FROM gone g;
END $$;
COMMENT ON FUNCTION batchq.finish_claim IS 'Moves a claimed batch to its final status, if the claim is held.';

CREATE FUNCTION batchq.requeue_claim(in_queue text, batch_id bigint, token uuid, is_release boolean, next_run_at timestamptz DEFAULT NULL,
                                     new_error text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE entry jsonb := CASE WHEN new_error IS NOT NULL THEN jsonb_build_object('error', left(new_error, 2000)) END;
BEGIN
  UPDATE batchq.batches_live b
  SET status = 'pending', run_at = coalesce(next_run_at, b.run_at), attempt = greatest(b.attempt - is_release::integer, 0),
      claimed_by = NULL, claim_token = NULL, claimed_at = CASE WHEN b.key IS NOT NULL THEN b.claimed_at END, lease_expires_at = NULL,
      errors = batchq.append_error(b.errors, b.attempt, entry)
  WHERE b.queue = in_queue AND b.id = batch_id AND b.claim_token = token;
END $$;
COMMENT ON FUNCTION batchq.requeue_claim IS
  'Makes a claimed batch pending again, if the claim is held. is_release: its attempt is not counted. Null next_run_at keeps run_at.';

CREATE FUNCTION batchq.lease_end(lease_seconds float8) RETURNS timestamptz
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF lease_seconds > 0 AND lease_seconds <= 86400 THEN
    RETURN statement_timestamp() + lease_seconds * interval '1 second';
  END IF;
  RAISE EXCEPTION 'lease_seconds must be more than 0 and at most 86400, not %', coalesce(lease_seconds::text, 'null')
    USING ERRCODE = 'invalid_parameter_value';
END $$;
COMMENT ON FUNCTION batchq.lease_end IS 'Returns the end of a lease that begins now. Raises an error if lease_seconds is not from 0 to 86400.';

-- ---------------------------------------------------------------------------------------------------------------- the protocol

-- One priority after the other, so that batches scheduled for later in one do not have to be read on the way to the next.
CREATE FUNCTION batchq.claim(queue text, kinds text[], worker text, most integer DEFAULT 1, lease_seconds float8 DEFAULT 60)
RETURNS TABLE (id bigint, kind text, payload jsonb, items_total integer, items_done integer, items_failed integer, attempt smallint,
  max_attempts smallint, max_failed_items integer, timeout_seconds integer, cursor jsonb, key text, part_of bigint,
  trace_context text, claim_token uuid, lease_expires_at timestamptz)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  at timestamptz := statement_timestamp(); until timestamptz := batchq.lease_end(claim.lease_seconds);
  token uuid := gen_random_uuid(); free text[]; level integer := -32768; wanted integer := claim.most; claimed integer;
BEGIN
  IF octet_length(claim.worker) BETWEEN 1 AND 200 IS NOT TRUE THEN
    RAISE EXCEPTION 'batchq.claim: worker must be a name of 1 to 200 bytes, not %', coalesce(quote_literal(claim.worker), 'null')
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  free := ARRAY(
    SELECT u.kind FROM unnest(claim.kinds) AS u(kind)
    WHERE NOT EXISTS (SELECT 1 FROM batchq.pauses p
                      WHERE coalesce(p.queue, claim.queue) = claim.queue AND coalesce(p.kind, u.kind) = u.kind
                        AND (p.until IS NULL OR p.until > at))
      AND NOT EXISTS (SELECT 1 FROM batchq.limits_in_force f
                      WHERE f.queue = claim.queue AND coalesce(f.kind, u.kind) = u.kind
                        AND (f.max_running < 2147483647 OR f.per_second < 'infinity' OR f.items_per_second < 'infinity'))
      AND NOT EXISTS (SELECT 1 FROM batchq.throttles t
                      WHERE t.queue = claim.queue AND t.kind IN ('', u.kind) AND t.key = '' AND t.until > at));
  WHILE wanted > 0 AND free <> '{}' LOOP
    SELECT b.priority INTO level FROM batchq.batches_live b
    WHERE b.queue = claim.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority >= level
    ORDER BY b.priority LIMIT 1;
    EXIT WHEN NOT FOUND;
    RETURN QUERY
    WITH ready AS (
      SELECT b.id FROM batchq.batches_live b
      WHERE b.queue = claim.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = level AND b.run_at <= at
        AND b.kind = ANY (free)
        -- Once a batch was spread, only those who know its parts may go on.
        AND NOT EXISTS (SELECT 1 FROM batchq.parts p WHERE p.batch_id = b.id)
      ORDER BY b.run_at, b.id LIMIT wanted
      FOR UPDATE OF b SKIP LOCKED
    ), mine AS (
      UPDATE batchq.batches_live b
      SET status = 'processing', attempt = b.attempt + 1, claimed_by = claim.worker, claim_token = token, claimed_at = at,
          lease_expires_at = until
      WHERE b.queue = claim.queue AND b.id = ANY (ARRAY(SELECT r.id FROM ready r))
      RETURNING b.*
    )
    SELECT m.id, m.kind, m.payload, m.items_total, m.items_done, m.items_failed, m.attempt, m.max_attempts, m.max_failed_items,
      m.timeout_seconds, m.cursor, m.key, m.part_of, m.trace_context, m.claim_token, m.lease_expires_at
    FROM mine m ORDER BY m.run_at, m.id;
    GET DIAGNOSTICS claimed = ROW_COUNT;
    wanted := wanted - claimed;
    level := level + 1;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.claim IS
  'Claims up to "most" ready batches of one queue and some kinds for a worker, by priority, then run_at, and counts the attempt. All '
  'that one call returns have the same claim_token. Skips what is paused or throttled, kinds with a limit, batches with a key, and '
  'batches that were spread before: workers of batchq claim those. Commit at once.';

-- Never waits: a row that is locked by another transaction of its worker is not rescued either.
CREATE FUNCTION batchq.extend(id bigint, claim_token uuid, lease_seconds float8) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE until timestamptz := batchq.lease_end(extend.lease_seconds); in_queue text;
BEGIN
  SELECT b.queue INTO in_queue FROM batchq.batches_live b WHERE b.id = extend.id AND b.claim_token = extend.claim_token;
  PERFORM 1 FROM batchq.batches_live b
  WHERE b.queue = in_queue AND b.id = extend.id AND b.claim_token = extend.claim_token FOR UPDATE SKIP LOCKED;
  IF FOUND THEN
    UPDATE batchq.batches_live b SET lease_expires_at = greatest(b.lease_expires_at, until)
    WHERE b.queue = in_queue AND b.id = extend.id AND b.claim_token = extend.claim_token;
  ELSE
    PERFORM 1 FROM batchq.batches_live b WHERE b.queue = in_queue AND b.id = extend.id AND b.claim_token = extend.claim_token;
  END IF;
  RETURN FOUND;
END $$;
COMMENT ON FUNCTION batchq.extend IS
  'Extends the lease of a claimed batch to lease_seconds from now. Does not wait for a transaction that has locked the batch. Returns '
  'whether the claim is held; if it is not, stop the work: the batch was cancelled, rescued or finished.';

CREATE FUNCTION batchq.items(id bigint, claim_token uuid, first integer, count integer) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE page jsonb;
BEGIN
  IF items.first < 0 OR items.count < 1 THEN
    RAISE EXCEPTION 'batchq.items: first must be 0 or more and count 1 or more, not % and %', items.first, items.count
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  SELECT jsonb_path_query_array(coalesce(b.items, '[]'), '$[$first to $last]',
                                jsonb_build_object('first', items.first, 'last', items.first::bigint + items.count - 1)) INTO page
  FROM batchq.batches_live b WHERE b.id = items.id AND b.claim_token = items.claim_token;
  RETURN page;
END $$;
COMMENT ON FUNCTION batchq.items IS
  'Returns up to "count" items of a claimed batch from index "first" on, as a JSON array; null if the claim is lost.';

CREATE FUNCTION batchq.items_to_retry(id bigint, claim_token uuid, most integer DEFAULT 500) RETURNS TABLE (item_index integer, item jsonb)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE b record;
BEGIN
  SELECT l.queue, l.attempt, l.claimed_at INTO b FROM batchq.batches_live l
  WHERE l.id = items_to_retry.id AND l.claim_token = items_to_retry.claim_token;
  RETURN QUERY
  SELECT f.item_index, f.item FROM batchq.failed_items f
  WHERE f.queue = b.queue AND f.batch_id = items_to_retry.id AND f.retryable AND f.attempt < b.attempt
    AND (f.run_at IS NULL OR f.run_at <= b.claimed_at)
  ORDER BY f.item_index LIMIT items_to_retry.most;
END $$;
COMMENT ON FUNCTION batchq.items_to_retry IS
  'Returns index and value of up to "most" items of a claimed batch that failed in an earlier attempt and may succeed in this one. No '
  'rows: none are left, or the claim is lost.';

CREATE FUNCTION batchq.checkpoint(id bigint, claim_token uuid, items_done integer DEFAULT 0, failed_items jsonb DEFAULT '[]',
  cursor jsonb DEFAULT NULL, lease_seconds float8 DEFAULT 60, recovered integer[] DEFAULT '{}') RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  until timestamptz := batchq.lease_end(checkpoint.lease_seconds); at timestamptz := statement_timestamp();
  b record; next integer; ended integer; failed integer; again integer; cured integer; wrong integer;
BEGIN
  b := batchq.lock_claim(checkpoint.id, checkpoint.claim_token);
  IF b.queue IS NULL THEN RETURN false; END IF;
  next := b.items_done + b.items_failed;
  SELECT count(*) FILTER (WHERE r.index >= next), count(*) FILTER (WHERE r.index < next) INTO failed, again
  FROM jsonb_to_recordset(checkpoint.failed_items) AS r(index integer);
  ended := next + checkpoint.items_done + failed;
  SELECT coalesce(r.index, -1) INTO wrong FROM jsonb_to_recordset(checkpoint.failed_items) AS r(index integer)
  WHERE coalesce(r.index, -1) < 0 OR r.index >= ended LIMIT 1;
  IF checkpoint.items_done >= 0 IS NOT TRUE OR wrong IS NOT NULL OR ended > coalesce(b.items_total, 0) THEN
    RAISE EXCEPTION 'batchq.checkpoint: % items done and % failed ones do not fit batch %', checkpoint.items_done,
        jsonb_array_length(checkpoint.failed_items), checkpoint.id
      USING ERRCODE = 'invalid_parameter_value',
            DETAIL = format('The next item has index %s of %s.', next, coalesce(b.items_total, 0)),
            HINT = 'First runs are in order: the items done and the failed ones of a checkpoint follow the last one without a gap.';
  END IF;
  DELETE FROM batchq.failed_items f
  WHERE f.queue = b.queue AND f.batch_id = checkpoint.id AND f.item_index = ANY (checkpoint.recovered);
  GET DIAGNOSTICS cured = ROW_COUNT;
  IF again > 0 THEN
    UPDATE batchq.failed_items f
    SET error = r.error, retryable = r.retryable, attempt = r.attempt, run_at = r.run_at, failed_at = at
    FROM (SELECT g.index, left(translate(coalesce(g.error, 'failed'), E'\n\r\t', '   '), 2000) AS error,
            coalesce(g.retryable, true) AS retryable, CASE WHEN g.delay_seconds IS NULL THEN b.attempt ELSE 0 END AS attempt,
            at + g.delay_seconds * interval '1 second' AS run_at
          FROM jsonb_to_recordset(checkpoint.failed_items) AS g(index integer, error text, retryable boolean, delay_seconds float8)
          WHERE g.index < next) r
    WHERE f.queue = b.queue AND f.batch_id = checkpoint.id AND f.item_index = r.index;
  END IF;
  IF failed > 0 THEN
    INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, retryable, attempt, run_at)
    SELECT l.queue, l.id, r.index, slice.item, left(translate(coalesce(r.error, 'failed'), E'\n\r\t', '   '), 2000),
      coalesce(r.retryable, true), CASE WHEN r.delay_seconds IS NULL THEN l.attempt ELSE 0 END, at + r.delay_seconds * interval '1 second'
    FROM batchq.batches_live l
    CROSS JOIN LATERAL jsonb_array_elements(jsonb_path_query_array(l.items, '$[$first to $last]',
      jsonb_build_object('first', next, 'last', ended - 1))) WITH ORDINALITY AS slice(item, number)
    JOIN jsonb_to_recordset(checkpoint.failed_items) AS r(index integer, error text, retryable boolean, delay_seconds float8)
      ON r.index = next + slice.number - 1
    WHERE l.queue = b.queue AND l.id = checkpoint.id AND l.claim_token = checkpoint.claim_token;
  END IF;
  UPDATE batchq.batches_live l
  SET items_done = l.items_done + checkpoint.items_done + cured, items_failed = l.items_failed + failed - cured,
      cursor = coalesce(checkpoint.cursor, l.cursor), lease_expires_at = greatest(l.lease_expires_at, until)
  WHERE l.queue = b.queue AND l.id = checkpoint.id AND l.claim_token = checkpoint.claim_token;
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.checkpoint IS
  'Saves the progress of a claimed batch and extends its lease. items_done: how many of the next items succeeded. failed_items: an '
  'array of objects with index, error and retryable (default: true), or with delay_seconds for an item that is to run again later and '
  'has not failed; those that failed before are allowed, too. recovered: indexes of items that had failed and succeeded now. cursor: '
  'any JSON; null keeps the last one. Call it in the transaction of your own rows. Returns whether the claim is held; if not, it '
  'has written nothing: roll back.';

CREATE FUNCTION batchq.complete(id bigint, claim_token uuid, result jsonb DEFAULT NULL, with_failed_items boolean DEFAULT false,
                                keep boolean DEFAULT true) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE b record; failed record; error text;
BEGIN
  IF octet_length(complete.result::text) > 1000000 THEN
    RAISE EXCEPTION 'batchq.complete: the result has % bytes of JSON; at most 1000000', octet_length(complete.result::text)
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  b := batchq.lock_claim(complete.id, complete.claim_token);
  IF b.queue IS NULL THEN RETURN false; END IF;
  IF b.items_failed > 0 AND NOT with_failed_items THEN
    SELECT count(*) FILTER (WHERE f.retryable AND f.run_at IS NULL) AS retryable, min(f.run_at) AS delayed_until,
      (array_agg(f.error ORDER BY f.run_at IS NOT NULL, f.item_index))[1] AS error INTO failed
    FROM batchq.failed_items f WHERE f.queue = b.queue AND f.batch_id = complete.id;
    error := format('%s of %s items failed; the first: %s', b.items_failed, b.items_total, failed.error);
    IF failed.delayed_until IS NOT NULL THEN
      PERFORM batchq.requeue_claim(b.queue, complete.id, complete.claim_token, true, greatest(failed.delayed_until, statement_timestamp()));
      RETURN true;
    ELSIF b.items_failed > b.max_failed_items OR failed.retryable > 0 AND b.attempt < b.max_attempts THEN
      RETURN batchq.fail(complete.id, complete.claim_token, error, NULL, failed.retryable = 0);
    END IF;
  END IF;
  IF keep OR b.part_of IS NOT NULL THEN
    PERFORM batchq.finish_claim(b.queue, complete.id, complete.claim_token, 'completed', true, complete.result);
  ELSE
    PERFORM batchq.forget_failed_items(b.queue, complete.id);
    DELETE FROM batchq.batches_live l WHERE l.queue = b.queue AND l.id = complete.id AND l.claim_token = complete.claim_token;
  END IF;
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.complete IS
  'Completes a claimed batch; items that no checkpoint has counted count as done. If items have failed, it decides as workers of '
  'batchq do: another attempt for those that may succeed, otherwise completed or failed by max_failed_items; with_failed_items: '
  'completes in any case. keep: false deletes the batch instead. Returns whether the claim was held; if not, it has written nothing.';

CREATE FUNCTION batchq.fail(id bigint, claim_token uuid, error text, retry_in interval DEFAULT NULL, is_final boolean DEFAULT false)
RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE b record := batchq.lock_claim(fail.id, fail.claim_token); text text := coalesce(fail.error, 'no error was given');
BEGIN
  IF b.queue IS NULL THEN
    RETURN false;
  ELSIF is_final OR b.attempt >= b.max_attempts THEN
    PERFORM batchq.finish_claim(b.queue, fail.id, fail.claim_token, 'failed', false, NULL, text);
  ELSE
    PERFORM batchq.requeue_claim(b.queue, fail.id, fail.claim_token, false, statement_timestamp() + coalesce(retry_in,
      least(3600, 5 * 2 ^ least(b.attempt - 1, 20)) * (0.5 + random()) * interval '1 second'), text);
  END IF;
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.fail IS
  'Ends an attempt as failed, with an error. The batch runs again after retry_in (null: 5 s, doubled with each attempt up to an hour, '
  'times 0.5 to 1.5), or is failed if this was its last attempt or is_final. Returns whether the claim was held; if not, it has '
  'written nothing.';

CREATE FUNCTION batchq.release(id bigint, claim_token uuid, retry_in interval DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE b record := batchq.lock_claim(release.id, release.claim_token);
BEGIN
  IF b.queue IS NULL THEN RETURN false; END IF;
  PERFORM batchq.requeue_claim(b.queue, release.id, release.claim_token, true, statement_timestamp() + retry_in);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.release IS
  'Makes a claimed batch pending again without counting the attempt: at its old run_at, or after retry_in. For a worker that stops. '
  'Returns whether the claim was held; if not, it has written nothing.';

CREATE FUNCTION batchq.rescue(queue text, most integer DEFAULT 100) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE b record; rescued integer := 0; error text;
BEGIN
  FOR b IN
    SELECT l.id, l.claim_token, l.claimed_by, l.attempt, l.max_attempts FROM batchq.batches_live l
    WHERE l.queue = rescue.queue AND l.status = 'processing' AND l.lease_expires_at < statement_timestamp()
    ORDER BY l.lease_expires_at LIMIT rescue.most
    FOR UPDATE SKIP LOCKED
  LOOP
    error := format('worker died: %s did not renew its lease', b.claimed_by);
    IF b.attempt < b.max_attempts THEN
      PERFORM batchq.requeue_claim(rescue.queue, b.id, b.claim_token, false,
        CASE WHEN b.attempt > 1 THEN statement_timestamp() + random() * 2 ^ least(b.attempt, 8) * interval '1 second' END, error);
    ELSE
      PERFORM batchq.finish_claim(rescue.queue, b.id, b.claim_token, 'failed', false, NULL, error || '; no attempts left');
    END IF;
    rescued := rescued + 1;
  END LOOP;
  RETURN rescued;
END $$;
COMMENT ON FUNCTION batchq.rescue IS
  'Frees up to "most" batches of a queue whose lease has expired, so that they run again; failed, if no attempts are left. Workers of '
  'batchq do this for their queues. Returns how many.';

-- What workers in other languages may do.
CREATE OR REPLACE VIEW batchq.duties AS
SELECT duty, privilege, object
FROM (VALUES
  ('producer', 'INSERT (queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items, '
               'timeout_seconds, trace_context, key, after, on_failure, spread)', '{batches}'::text[]),
  ('producer', 'SELECT (id)', '{batches}'), ('producer', 'SELECT', '{migrations}'),
  ('worker', 'SELECT',
   '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,migrations,'
   'limits_in_force,throttles,flow_events,needs,schedules,parts}'),
  ('worker', 'UPDATE (status, attempt, claimed_by, claim_token, claimed_at, lease_expires_at, run_at, items_done, '
             'items_failed, cursor, errors)', '{batches_live}'),
  ('worker', 'DELETE', '{batches_live}'), ('worker', 'INSERT', '{batches_finished}'),
  ('worker', 'INSERT, UPDATE, DELETE', '{failed_items,workers}'), ('worker', 'INSERT, UPDATE', '{throughput_minutes}'),
  ('worker', 'EXECUTE', '{append_error,add_counts,has_ready,move_positions,try_lock,merge_throughput,prune,prune_records,'
                        'create_finished_partitions,ids_given_twice,"forget_failed_items(text,bigint)",take_shares,return_shares,declare_limits,throttle,'
                        'ready_of_keys,has_keyed,follow_flows,prune_needs,fire_schedules,declare_schedules,'
                        'spread_batch,prune_parts,'
                        'claim,extend,items,items_to_retry,checkpoint,complete,fail,release,rescue,'
                        'lock_claim,finish_claim,requeue_claim,lease_end}'),
  ('viewer', 'SELECT', '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,'
                       'migrations,audit,status,queues,throughput,failures,duties,finished_default,'
                       'limits,declared_limits,limits_in_force,limits_in_use,keys,limit_shares,throttles,needs,flow_events,schedules,schedule_status,'
                       'parts}'),
  ('viewer', 'EXECUTE', '{shown_status,count_live,count_failed,latest_failures,run_time_percentiles,'
                        'sum_counts,add_counts,busy_queues,waiting_levels,newest_live,ids_given_twice,duty_statements,'
                        'keyed_queues,count_keys,count_waiting,waiting_queues,stuck_waiting,flow,progress_of_parts,failed_items_of,spread_batches}'),
  ('operator', 'EXECUTE', '{cancel,retry,retry_items,snooze,set_priority,move,pause,resume,drain_worker,bulk,set_limit,end_throttle,run_anyway,cancel_with_dependents,'
                          'set_schedule,pause_schedule,resume_schedule,run_schedule,remove_schedule}'),
  ('operator', 'INSERT, UPDATE, DELETE', '{limits}'), ('operator', 'DELETE', '{schedules}'),
  ('operator', 'INSERT (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, paused)', '{schedules}'),
  ('operator', 'UPDATE (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, paused)', '{schedules}')
) AS granted(duty, privilege, objects)
CROSS JOIN unnest(objects) AS object;

-- Roles that have a duty already get what is new in it.
CREATE FUNCTION batchq.renew_duties() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE known record;
BEGIN
  FOR known IN
    SELECT DISTINCT d.duty, r.rolname AS role
    FROM (VALUES ('worker', 'has_ready'), ('operator', 'retry')) AS d(duty, function)
    JOIN pg_proc p ON p.pronamespace = 'batchq'::regnamespace AND p.proname = d.function
    CROSS JOIN LATERAL aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE a.grantee <> p.proowner
    UNION
    SELECT d.duty, r.rolname
    FROM (VALUES ('producer', 'batchq.batches'::regclass, 'INSERT'), ('viewer', 'batchq.queues', 'SELECT')) AS d(duty, relation, privilege)
    JOIN pg_class c ON c.oid = d.relation JOIN pg_attribute t ON t.attrelid = c.oid AND t.attname = 'kind'
    CROSS JOIN LATERAL (SELECT * FROM aclexplode(c.relacl) UNION ALL SELECT * FROM aclexplode(t.attacl)) a
    JOIN pg_roles r ON r.oid = a.grantee
    WHERE a.grantee <> c.relowner AND a.privilege_type = d.privilege
  LOOP
    PERFORM batchq.grant_duty(known.duty, known.role);
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.renew_duties IS 'Grants to each role with a duty what has become part of it. For migrations that change batchq.duties.';
SELECT batchq.renew_duties();

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.grant_to_readers('batchq.status', 'EXECUTE ON FUNCTION batchq.progress_of_parts(bigint)');
