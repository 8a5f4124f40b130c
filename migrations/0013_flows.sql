-- Flows: a batch may wait for others (column "after"). The end of a batch that is needed is written down by a trigger, in the
-- transaction that ends it; workers then count it for those that wait (batchq.follow_flows).
ALTER TABLE batchq.batches
  ADD COLUMN after bigint[],
  ADD COLUMN on_failure text,
  ADD COLUMN needs_left integer,
  ADD COLUMN is_needed boolean;
COMMENT ON COLUMN batchq.batches.after IS
  'Optional ids of batches that must end first, at most 100,000; they must exist. Until then the batch is waiting.';
COMMENT ON COLUMN batchq.batches.on_failure IS
  'What happens when a batch of "after" fails or is cancelled: wait (also null) until it is retried and completes, run, or cancel.';
COMMENT ON COLUMN batchq.batches.needs_left IS 'Number of batches that a waiting batch still waits for. Set by a trigger.';
COMMENT ON COLUMN batchq.batches.is_needed IS 'Whether other batches wait for the end of this one. Set by batchq.';
COMMENT ON COLUMN batchq.batches.unique_key IS
  'Optional key. At most one live batch (waiting, pending or processing) per queue, kind and key exists. Insert with ON CONFLICT DO '
  'NOTHING.';
COMMENT ON COLUMN batchq.batches.status IS
  'pending, processing, then completed, failed or cancelled; before these waiting, until the batches of "after" have ended. '
  'batchq.status shows finer ones (scheduled, retrying, stalled).';

ALTER TABLE batchq.batches DETACH PARTITION batchq.batches_live;
ALTER TABLE batchq.batches ATTACH PARTITION batchq.batches_live FOR VALUES IN ('pending', 'processing', 'waiting');
COMMENT ON TABLE batchq.batches_live IS 'Batches that are waiting, pending or processing.';
-- NOT VALID: these columns are new, so nothing of the history has to be read.
ALTER TABLE batchq.batches
  ADD CONSTRAINT batches_on_failure_is_known CHECK (on_failure IN ('wait', 'run', 'cancel')) NOT VALID,
  ADD CONSTRAINT batches_waiting_is_counted CHECK (status <> 'waiting' OR coalesce(needs_left, 0) > 0) NOT VALID;
CREATE INDEX batches_live_waiting ON batchq.batches_live (queue, id) WHERE status = 'waiting';

CREATE TABLE batchq.needs (
  needed_id bigint NOT NULL, batch_id bigint NOT NULL, queue text NOT NULL, on_failure text NOT NULL, ended_as text,
  at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (needed_id, batch_id)
);
CREATE INDEX needs_batch ON batchq.needs (batch_id, needed_id);
COMMENT ON TABLE batchq.needs IS
  'Who waits for whom: one row for each id in "after". Kept as long as finished batches, so that a flow can be shown.';
COMMENT ON COLUMN batchq.needs.needed_id IS 'Batch that must end: batchq.batches.id.';
COMMENT ON COLUMN batchq.needs.batch_id IS 'Batch that waits: batchq.batches.id.';
COMMENT ON COLUMN batchq.needs.queue IS 'Queue of the batch that waits.';
COMMENT ON COLUMN batchq.needs.on_failure IS 'What happens if it fails: batchq.batches.on_failure of the batch that waits.';
COMMENT ON COLUMN batchq.needs.ended_as IS 'How the needed batch ended: completed, failed or cancelled; null: it has not, as far as that counts.';
COMMENT ON COLUMN batchq.needs.at IS 'When the batch began to wait.';

CREATE TABLE batchq.flow_events (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, needed_id bigint NOT NULL, status text
);
COMMENT ON TABLE batchq.flow_events IS 'What workers have to do for flows; each row is deleted by the worker that does it.';
COMMENT ON COLUMN batchq.flow_events.needed_id IS 'Batch that others wait for: batchq.batches.id.';
COMMENT ON COLUMN batchq.flow_events.status IS 'How that batch has ended; null: somebody has begun to wait for it.';

-- An enqueue changes no row of a batch that it waits for, so it neither waits nor makes anybody wait. A worker marks those as needed
-- later. Only the batches of the same transaction, which nobody else sees yet, are marked here.
CREATE FUNCTION batchq.begin_waiting() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE ids bigint[]; own bigint[]; unknown bigint[]; marked bigint[] := '{}'; one record;
BEGIN
  IF TG_TABLE_SCHEMA <> 'batchq' THEN
    RAISE EXCEPTION 'batchq.begin_waiting is a trigger function of batchq''s own tables, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  ELSIF cardinality(NEW.after) > 100000 OR array_position(NEW.after, NULL) IS NOT NULL OR NEW.status <> 'pending' THEN
    RAISE EXCEPTION 'after must have at most 100,000 ids, not %, no null among them, and the status be left out (batches_after_fits)',
        cardinality(NEW.after)
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_after_fits', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'For more, let a batch for each part of them wait, and one for all of these.';
  ELSIF NEW.id = ANY (NEW.after) THEN
    RAISE EXCEPTION 'batch % cannot wait for itself (batches_after_is_not_itself)', NEW.id
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_after_is_not_itself', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME, HINT = 'Wait for batches that exist already.';
  END IF;
  ids := ARRAY(SELECT DISTINCT u FROM unnest(NEW.after) u ORDER BY u);
  own := ARRAY(SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (ids));
  unknown := ARRAY(SELECT u FROM unnest(ids) u EXCEPT SELECT u FROM unnest(own) u);
  unknown := ARRAY(SELECT u FROM unnest(unknown) u EXCEPT SELECT f.id FROM batchq.batches_finished f WHERE f.id = ANY (unknown));
  IF unknown <> '{}' AND NEW.created_at = now() THEN  -- a batch that is retried may have outlived them
    RAISE EXCEPTION 'a batch cannot wait for %: no batch has that id (batches_after_exist)', array_to_string(unknown[1:5], ', ')
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_after_exist', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'The batch was never committed, or it was deleted a while after its end. Leave it out.';
  END IF;
  FOR one IN
    SELECT b.queue, array_agg(b.id) AS ids FROM batchq.batches_live b
    WHERE b.id = ANY (own) AND b.xmin = pg_current_xact_id()::xid GROUP BY b.queue
  LOOP
    UPDATE batchq.batches_live b SET is_needed = true WHERE b.queue = one.queue AND b.id = ANY (one.ids);
    marked := marked || one.ids;
  END LOOP;
  INSERT INTO batchq.needs (needed_id, batch_id, queue, on_failure)
  SELECT u, NEW.id, NEW.queue, coalesce(NEW.on_failure, 'wait') FROM unnest(ids) u
  ON CONFLICT (needed_id, batch_id) DO UPDATE  -- it is retried, and waits again
  SET queue = excluded.queue, on_failure = excluded.on_failure, ended_as = NULL, at = now();
  INSERT INTO batchq.flow_events (needed_id) SELECT u FROM unnest(ids) u EXCEPT SELECT u FROM unnest(marked) u;
  UPDATE batchq.batches_live b
  SET status = CASE WHEN ids = '{}' THEN 'pending' ELSE 'waiting' END, needs_left = cardinality(ids)
  WHERE b.queue = NEW.queue AND b.id = NEW.id;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.begin_waiting IS
  'Trigger function: a new batch with "after" waits for those batches; refuses ids that do not exist.';
CREATE TRIGGER begin_waiting AFTER INSERT ON batchq.batches_live
  FOR EACH ROW WHEN (NEW.after IS NOT NULL AND NEW.needs_left IS NULL) EXECUTE FUNCTION batchq.begin_waiting();

-- On the DELETE from batches_live, since whatever ends a batch does that: a worker of any version, a rescue, a verb, a person.
CREATE FUNCTION batchq.note_end() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE ended_as text;
BEGIN
  IF TG_TABLE_SCHEMA <> 'batchq' THEN
    RAISE EXCEPTION 'batchq.note_end is a trigger function of batchq''s own tables, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  PERFORM 1 FROM batchq.batches_live b WHERE b.id = OLD.id;
  IF FOUND THEN RETURN NULL; END IF;  -- moved to another queue
  SELECT f.status INTO ended_as FROM batchq.batches_finished f
  WHERE f.queue = OLD.queue AND f.id = OLD.id AND f.finished_at > now() - interval '1 day';
  INSERT INTO batchq.flow_events (needed_id, status)  -- completed batches may be deleted instead of kept
  VALUES (OLD.id, coalesce(ended_as, CASE OLD.status WHEN 'processing' THEN 'completed' ELSE 'cancelled' END));
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.note_end IS 'Trigger function: writes down in batchq.flow_events that a needed batch has ended.';
CREATE TRIGGER note_end AFTER DELETE ON batchq.batches_live FOR EACH ROW WHEN (OLD.is_needed) EXECUTE FUNCTION batchq.note_end();

CREATE FUNCTION batchq.forget_flows() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_RELID <> 'batchq.batches'::regclass THEN
    RAISE EXCEPTION 'batchq.forget_flows is the trigger function of batchq.batches, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  TRUNCATE batchq.needs, batchq.flow_events;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.forget_flows IS 'Trigger function: TRUNCATE of batchq.batches empties what belongs to flows.';
CREATE TRIGGER forget_flows AFTER TRUNCATE ON batchq.batches FOR EACH STATEMENT EXECUTE FUNCTION batchq.forget_flows();

-- ------------------------------------------------------------------------------------------------------------ for workers

-- Marks batches as needed, so that their end is noticed. One that has ended already counts as ended now.
CREATE FUNCTION batchq.mark_needed(ids bigint[], OUT ended bigint[], OUT ended_as text[], OUT locked bigint[])
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE one record; found record; free bigint[]; marked bigint[] := '{}'; rest bigint[];
BEGIN
  ended := '{}';
  ended_as := '{}';
  FOR one IN
    SELECT b.queue, array_agg(b.id) AS ids FROM batchq.batches_live b WHERE b.id = ANY (ids) GROUP BY b.queue
  LOOP
    free := ARRAY(SELECT b.id FROM batchq.batches_live b
                  WHERE b.queue = one.queue AND b.id = ANY (one.ids) FOR NO KEY UPDATE SKIP LOCKED);
    UPDATE batchq.batches_live b SET is_needed = true
    WHERE b.queue = one.queue AND b.id = ANY (free) AND b.is_needed IS NOT TRUE;
    marked := marked || free;
  END LOOP;
  rest := ARRAY(SELECT u FROM unnest(ids) u EXCEPT SELECT u FROM unnest(marked) u);
  locked := ARRAY(SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (rest));
  rest := ARRAY(SELECT u FROM unnest(rest) u EXCEPT SELECT u FROM unnest(locked) u);
  -- Locked, so that none is being retried at this moment: batchq.revive marks what it finds in batchq.needs.
  FOR one IN
    SELECT f.queue, array_agg(f.id) AS ids FROM batchq.batches_finished f WHERE f.id = ANY (rest) GROUP BY f.queue
  LOOP
    FOR found IN
      SELECT f.id, f.status FROM batchq.batches_finished f
      WHERE f.queue = one.queue AND f.id = ANY (one.ids) FOR UPDATE SKIP LOCKED
    LOOP
      ended := ended || found.id;
      ended_as := ended_as || found.status;
    END LOOP;
  END LOOP;
  rest := ARRAY(SELECT u FROM unnest(rest) u EXCEPT SELECT u FROM unnest(ended) u);
  IF rest = '{}' THEN RETURN; END IF;
  locked := locked || ARRAY(SELECT f.id FROM batchq.batches_finished f WHERE f.id = ANY (rest))
                   || ARRAY(SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (rest));
  rest := ARRAY(SELECT u FROM unnest(rest) u EXCEPT SELECT u FROM unnest(locked) u);
  ended := ended || rest;  -- it existed when the other began to wait: completed, and deleted instead of kept
  ended_as := ended_as || array_fill('completed'::text, ARRAY[cardinality(rest)]);
END $$;
COMMENT ON FUNCTION batchq.mark_needed IS
  'Marks batches as needed. Returns those that have ended, how they ended, and those that others have locked: try these again.';

CREATE FUNCTION batchq.follow_flows(after_id bigint, most integer DEFAULT 500, OUT seen integer, OUT released integer,
                                    OUT last_id bigint, OUT left_over integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  most_needs constant integer := 10 * most;
  events bigint[]; needed bigint[]; statuses text[]; marked record; ended bigint[]; ended_as text[]; kept bigint[];
  met_by bigint[]; waiting bigint[]; queues text[]; met_as text[]; one record; free bigint[]; counts record;
BEGIN
  SELECT array_agg(e.id), array_agg(e.needed_id), array_agg(e.status), count(*), max(e.id)
  INTO events, needed, statuses, seen, last_id
  FROM (SELECT e.id, e.needed_id, e.status FROM batchq.flow_events e
        WHERE e.id > after_id ORDER BY e.id LIMIT most FOR UPDATE SKIP LOCKED) e;
  released := 0;
  left_over := 0;
  IF seen = 0 THEN RETURN; END IF;
  marked := batchq.mark_needed(ARRAY(SELECT DISTINCT u.id FROM unnest(needed, statuses) u(id, status) WHERE u.status IS NULL));
  kept := marked.locked;
  SELECT array_agg(u.id), array_agg(u.status) INTO ended, ended_as
  FROM (SELECT DISTINCT ON (u.id) u.id, u.status
        FROM unnest(marked.ended || needed, marked.ended_as || statuses) WITH ORDINALITY u(id, status, number)
        WHERE u.status IS NOT NULL ORDER BY u.id, u.number DESC) u;

  -- Who waits for them. One that fails and is waited for nevertheless is only noted.
  SELECT array_agg(n.needed_id), array_agg(n.batch_id), array_agg(n.queue), array_agg(n.status)
  INTO met_by, waiting, queues, met_as
  FROM (SELECT n.needed_id, n.batch_id, n.queue, e.status
        FROM unnest(ended, ended_as) e(id, status) CROSS JOIN LATERAL (
          SELECT n.needed_id, n.batch_id, n.queue FROM batchq.needs n
          WHERE n.needed_id = e.id
            AND (n.ended_as IS NULL OR n.on_failure = 'wait' AND n.ended_as <> 'completed' AND n.ended_as <> e.status)
            AND EXISTS (SELECT 1 FROM batchq.batches_live b
                        WHERE b.queue = n.queue AND b.id = n.batch_id AND b.status = 'waiting')
          ORDER BY n.batch_id LIMIT most_needs) n
        ORDER BY n.needed_id, n.batch_id LIMIT most_needs) n;
  IF cardinality(waiting) = most_needs THEN  -- there may be more
    kept := kept || ARRAY(SELECT u FROM unnest(ended) u WHERE u >= met_by[most_needs]);
  END IF;

  FOR one IN
    SELECT u.queue, array_agg(DISTINCT u.id) AS ids FROM unnest(waiting, queues) u(id, queue) GROUP BY u.queue ORDER BY u.queue
  LOOP
    -- Whoever has locked a waiting batch counts for it. Each statement below begins after the lock was taken, so it sees what
    -- the last one who held it has committed.
    free := ARRAY(SELECT b.id FROM batchq.batches_live b
                  WHERE b.queue = one.queue AND b.id = ANY (one.ids) AND b.status = 'waiting' FOR UPDATE SKIP LOCKED);
    kept := kept || ARRAY(
      SELECT DISTINCT u.needed_id FROM unnest(met_by, waiting) u(needed_id, id)
      WHERE u.id IN (SELECT b.id FROM batchq.batches_live b
                     WHERE b.queue = one.queue AND b.id = ANY (one.ids) AND b.status = 'waiting'
                     EXCEPT SELECT f FROM unnest(free) f));
    released := released + batchq.count_needs(one.queue, free, met_by, waiting, met_as);
  END LOOP;
  events := ARRAY(SELECT u.id FROM unnest(events, needed) u(id, needed_id) WHERE u.needed_id <> ALL (kept));
  DELETE FROM batchq.flow_events e WHERE e.id = ANY (events);
  left_over := (SELECT count(*) FROM unnest(needed) u WHERE u = ANY (kept));
END $$;
COMMENT ON FUNCTION batchq.follow_flows IS
  'Does what the next rows of batchq.flow_events after an id ask for: marks batches as needed, and counts the ends of batches for '
  'those that wait. Rows, and waiting batches, that others have locked are left for later (left_over). Returns how many rows '
  'were seen, how many batches became pending, and the last id seen.';

-- The caller has locked the waiting batches. By nested loops, so that each pair is one search of the primary key.
CREATE FUNCTION batchq.count_needs(in_queue text, free bigint[], needed bigint[], waiting bigint[], ended_as text[]) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE ready integer; one record; earliest_at timestamptz := now();
BEGIN
  UPDATE batchq.needs n SET ended_as = e.status  -- and it waits on
  FROM unnest(needed, waiting, ended_as) e(id, batch_id, status)
  WHERE e.batch_id = ANY (free) AND n.needed_id = e.id AND n.batch_id = e.batch_id
    AND e.status <> 'completed' AND n.on_failure = 'wait' AND n.ended_as IS DISTINCT FROM 'completed';
  FOR one IN
    SELECT e.id, e.status, array_agg(n.batch_id) AS ids
    FROM unnest(needed, waiting, ended_as) e(id, batch_id, status)
    JOIN batchq.needs n ON n.needed_id = e.id AND n.batch_id = e.batch_id
    WHERE e.batch_id = ANY (free) AND e.status <> 'completed' AND n.on_failure = 'cancel' AND n.ended_as IS NULL
    GROUP BY e.id, e.status ORDER BY e.id
  LOOP
    PERFORM batchq.cancel_live(in_queue, one.ids, '{waiting}', format('batch %s, which it waited for, %s', one.id,
      CASE one.status WHEN 'failed' THEN 'failed' ELSE 'was cancelled' END));
  END LOOP;
  WITH met AS (
    UPDATE batchq.needs n SET ended_as = e.status
    FROM unnest(needed, waiting, ended_as) e(id, batch_id, status)
    WHERE e.batch_id = ANY (free) AND n.needed_id = e.id AND n.batch_id = e.batch_id
      AND CASE n.on_failure WHEN 'wait' THEN e.status = 'completed' AND n.ended_as IS DISTINCT FROM 'completed'
                            ELSE n.ended_as IS NULL END
    RETURNING n.batch_id
  ), counted AS (
    SELECT m.batch_id, count(*)::integer AS met FROM met m GROUP BY m.batch_id
  ), changed AS (
    -- Now at the earliest: claims continue after the position of the last one, and find what becomes ready at the end at once.
    UPDATE batchq.batches_live b
    SET needs_left = b.needs_left - c.met,
        status = CASE WHEN b.needs_left > c.met THEN 'waiting' ELSE 'pending' END,
        run_at = CASE WHEN b.needs_left > c.met THEN b.run_at ELSE greatest(b.run_at, earliest_at) END
    FROM counted c
    WHERE b.queue = in_queue AND b.id = c.batch_id AND b.status = 'waiting'
    RETURNING b.id, b.status
  )
  SELECT count(*) INTO ready FROM changed c WHERE c.status = 'pending';
  RETURN ready;
END $$;
COMMENT ON FUNCTION batchq.count_needs IS
  'Counts batches that have ended for waiting batches of one queue that the caller has locked: each becomes pending when none is '
  'left, or is cancelled if on_failure says so. Returns how many became pending.';

-- ------------------------------------------------------------------------------------------------------------- for people

-- As before, with keys and flows.
CREATE OR REPLACE FUNCTION batchq.cancel_live(in_queue text, ids bigint[], statuses text[], reason text)
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
    result, created_at, trace_context, key, after, on_failure, needs_left, finished_at, errors)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, g.queue, g.kind, 'cancelled', g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts,
    g.max_failed_items, g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done, g.items_failed,
    g.cursor, g.result, g.created_at, g.trace_context, g.key, g.after, g.on_failure, g.needs_left, now(), batchq.append_error(g.errors, g.attempt,
      jsonb_build_object('error', 'cancelled' || coalesce(': ' || left(reason, 2000), '')))
  FROM gone g;
  GET DIAGNOSTICS changed = ROW_COUNT;
  RETURN changed;
END $$;

CREATE OR REPLACE FUNCTION batchq.revive(in_queue text, ids bigint[], from_status text, whole boolean, first_at timestamptz,
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
      timeout_seconds, key, items_total, items_done, items_failed, cursor, errors, created_at, trace_context, after, on_failure,
      needs_left)
    OVERRIDING SYSTEM VALUE
    SELECT c.id, c.queue, c.kind, c.payload, c.items, c.priority, c.unique_key, c.max_attempts, c.max_failed_items,
      c.timeout_seconds, c.key, c.items_total, CASE WHEN whole THEN 0 ELSE c.items_done END,
      CASE WHEN whole THEN 0 ELSE c.items_failed END, CASE WHEN whole THEN NULL ELSE c.cursor END, c.errors, c.created_at,
      c.trace_context, c.after, c.on_failure,
      CASE WHEN c.after IS NULL OR c.needs_left > 0 THEN NULL ELSE 0 END  -- ended while it waited: it waits again
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
  -- With a newer snapshot than the lock on the finished batch: one that began to wait meanwhile is seen.
  UPDATE batchq.batches_live b SET is_needed = true
  WHERE b.queue = in_queue AND b.id = ANY (done) AND b.id = ANY (ARRAY(SELECT n.needed_id FROM batchq.needs n WHERE n.needed_id = ANY (done)));
  IF whole THEN
    DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (done);
  ELSE
    UPDATE batchq.failed_items f SET attempt = 0, retryable = true, run_at = NULL WHERE f.queue = in_queue AND f.batch_id = ANY (done);
  END IF;
END $$;

CREATE OR REPLACE FUNCTION batchq.move_pending(in_queue text, ids bigint[], new_queue text)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE moved integer;
BEGIN
  WITH gone AS (
    DELETE FROM batchq.batches_live b WHERE b.queue = in_queue AND b.id = ANY (ids) RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items,
    timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor, errors, created_at,
    trace_context, key, after, on_failure, needs_left, is_needed)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, new_queue, g.kind, g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts, g.max_failed_items,
    g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done, g.items_failed, g.cursor, g.errors,
    g.created_at, g.trace_context, g.key, g.after, g.on_failure, g.needs_left, g.is_needed
  FROM gone g;
  GET DIAGNOSTICS moved = ROW_COUNT;
  WITH gone AS (
    DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (ids) RETURNING f.*
  )
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, retryable, failed_at,
    run_at)
  SELECT new_queue, g.batch_id, g.item_index, g.item, g.error, g.attempt, g.retryable, g.failed_at, g.run_at FROM gone g;
  RETURN moved;
END $$;

CREATE OR REPLACE FUNCTION batchq.cancel(batch_id bigint, reason text DEFAULT 'by an operator', actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  IF batchq.cancel_live(b.queue, ARRAY[batch_id], '{pending,processing,waiting}', reason) = 0 THEN RETURN b.status; END IF;
  PERFORM batchq.note_verb('cancel', 1, batch_id, b.queue, b.kind, '{}', reason, actor);
  RETURN 'cancelled';
END $$;
COMMENT ON FUNCTION batchq.cancel IS
  'Cancels a batch that is waiting, pending or processing, immediately; a running handler is stopped at its next checkpoint and '
  'writes nothing more. Returns the status of the batch: cancelled, or the final one that it already had; null if there is none.';

CREATE FUNCTION batchq.cancel_with_dependents(batch_id bigint, reason text DEFAULT 'by an operator', actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  b record := batchq.lock_batch(batch_id); ended_as text := b.status; reached bigint[] := ARRAY[batch_id];
  following bigint[] := reached; total bigint; part record;
BEGIN
  total := batchq.cancel_live(b.queue, reached, '{pending,processing,waiting}', reason);
  IF total > 0 THEN ended_as := 'cancelled'; END IF;
  WHILE following <> '{}' AND b.status IS NOT NULL LOOP
    following := ARRAY(SELECT DISTINCT n.batch_id FROM batchq.needs n
                       WHERE n.needed_id = ANY (following) AND n.batch_id <> ALL (reached) ORDER BY n.batch_id);
    FOR part IN
      SELECT l.queue, array_agg(l.id) AS ids FROM batchq.batches_live l WHERE l.id = ANY (following) AND l.status = 'waiting'
      GROUP BY l.queue ORDER BY l.queue
    LOOP
      PERFORM 1 FROM batchq.batches_live l
      WHERE l.queue = part.queue AND l.id = ANY (part.ids) AND l.status = 'waiting' ORDER BY l.id FOR UPDATE;
      total := total + batchq.cancel_live(part.queue, part.ids, '{waiting}', reason);
    END LOOP;
    reached := reached || following;
  END LOOP;
  IF total > 0 THEN
    PERFORM batchq.note_verb('cancel_with_dependents', total, batch_id, b.queue, b.kind, '{}', reason, actor);
  END IF;
  RETURN ended_as;
END $$;
COMMENT ON FUNCTION batchq.cancel_with_dependents IS
  'Cancels a batch as batchq.cancel does, all batches that wait for it, and all that wait for these. Returns the status of the '
  'batch; null if there is none.';

CREATE FUNCTION batchq.run_anyway(batch_id bigint, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  UPDATE batchq.batches_live l SET status = 'pending', needs_left = 0, run_at = greatest(l.run_at, now())
  WHERE l.queue = b.queue AND l.id = batch_id AND l.status = 'waiting';
  IF NOT FOUND THEN RETURN b.status; END IF;
  PERFORM batchq.note_verb('run_anyway', 1, batch_id, b.queue, b.kind, '{}', reason, actor);
  RETURN 'pending';
END $$;
COMMENT ON FUNCTION batchq.run_anyway IS
  'Makes a waiting batch pending, whatever it waits for. Leaves any other batch as it is. Returns the status of the batch; null '
  'if there is none.';

-- What people see of a flow: up from a batch to what it needs, down to what needs it, a level at a time.
CREATE FUNCTION batchq.flow(of_batch bigint, most integer DEFAULT 1000)
RETURNS TABLE (needed_id bigint, batch_id bigint, on_failure text, ended_as text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE reached bigint[] := ARRAY[of_batch]; edge bigint[] := reached; found bigint[];
BEGIN
  WHILE edge <> '{}' AND cardinality(reached) < most LOOP
    SELECT array_agg(u.id) INTO found
    FROM (SELECT x.id FROM (
            (SELECT n.needed_id AS id FROM batchq.needs n WHERE n.batch_id = ANY (edge) ORDER BY n.batch_id, n.needed_id LIMIT 2 * most)
            UNION
            (SELECT n.batch_id FROM batchq.needs n WHERE n.needed_id = ANY (edge) ORDER BY n.needed_id, n.batch_id LIMIT 2 * most)) x
          WHERE x.id <> ALL (reached) ORDER BY x.id LIMIT most - cardinality(reached)) u;
    edge := coalesce(found, '{}');
    reached := reached || edge;
  END LOOP;
  RETURN QUERY
  SELECT n.needed_id, n.batch_id, n.on_failure, n.ended_as FROM batchq.needs n
  WHERE n.batch_id = ANY (reached) AND n.needed_id = ANY (reached) ORDER BY n.needed_id, n.batch_id LIMIT 10 * most;
END $$;
COMMENT ON FUNCTION batchq.flow IS
  'Returns who waits for whom among the batches that are connected with a batch, the nearest first, up to "most" batches.';

CREATE FUNCTION batchq.prune_needs(older_than interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE deleted integer;
BEGIN
  DELETE FROM batchq.needs n
  WHERE n.ctid = ANY (ARRAY(
    SELECT o.ctid FROM batchq.needs o
    WHERE o.at < now() - older_than AND NOT EXISTS (SELECT 1 FROM batchq.batches_live b WHERE b.id = o.batch_id) LIMIT 10000));
  GET DIAGNOSTICS deleted = ROW_COUNT;
  RETURN deleted;
END $$;
COMMENT ON FUNCTION batchq.prune_needs IS
  'Deletes up to 10,000 rows of batchq.needs of batches that began to wait before now() - older_than and are not live. Returns how many.';

CREATE FUNCTION batchq.count_waiting(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, count bigint, is_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  WITH first AS MATERIALIZED (
    SELECT b.queue, b.kind FROM batchq.batches_live b WHERE b.status = 'waiting' ORDER BY b.queue, b.id LIMIT most + 1
  )
  SELECT s.queue, s.kind, count(*), (SELECT count(*) FROM first) > most FROM first s GROUP BY s.queue, s.kind;
END $$;
COMMENT ON FUNCTION batchq.count_waiting IS
  'Counts the waiting batches of each queue and kind, "most" in all; is_estimate: there are more.';

CREATE OR REPLACE VIEW batchq.status WITH (security_invoker = true) AS
SELECT b.id, b.queue, b.kind,
  CASE WHEN b.status = 'processing' AND b.lease_expires_at < now() THEN 'stalled'
       WHEN b.status = 'pending' AND b.run_at <= now() THEN 'ready'
       WHEN b.status = 'pending' AND jsonb_array_length(b.errors) > 0 THEN 'retrying'
       WHEN b.status = 'pending' THEN 'scheduled' ELSE b.status END AS status,
  CASE WHEN b.items_total > 0 THEN floor(100.0 * (b.items_done + b.items_failed) / b.items_total)::integer
       WHEN b.status = 'completed' THEN 100 END AS progress_percent,
  b.items_total, b.items_done, b.items_failed, b.attempt, b.max_attempts, b.priority, now() - b.created_at AS age,
  CASE WHEN b.status <> 'pending' THEN coalesce(b.finished_at, now()) - b.claimed_at END AS running_time,
  CASE WHEN b.status = 'pending' THEN b.run_at END AS next_run_at,
  b.claimed_by, b.lease_expires_at, b.errors -> -1 ->> 'error' AS last_error, b.unique_key,
  b.created_at, b.claimed_at, b.finished_at, b.status AS stored_status, b.key, b.needs_left
FROM batchq.batches b;

COMMENT ON COLUMN batchq.status.key IS 'Key of the batch: batchq.batches.key.';
COMMENT ON COLUMN batchq.status.needs_left IS 'Number of batches that a waiting batch still waits for.';

CREATE OR REPLACE VIEW batchq.queues AS
WITH live AS (
  SELECT queue, kind,
    max(count) FILTER (WHERE state = 'ready') AS ready,
    max(count) FILTER (WHERE state = 'scheduled') AS scheduled,
    max(count) FILTER (WHERE state = 'processing') AS processing,
    max(late) FILTER (WHERE state = 'processing') AS stalled,
    now() - min(oldest_at) FILTER (WHERE state = 'ready') AS oldest_wait,
    array_agg(state) FILTER (WHERE is_estimate)
      || array_agg('oldest_wait'::text) FILTER (WHERE state = 'ready' AND is_oldest_estimate) AS estimated
  FROM batchq.count_live() GROUP BY queue, kind
), waiting AS (
  SELECT queue, kind, count AS waiting, CASE WHEN is_estimate THEN 'waiting' END AS waiting_estimated FROM batchq.count_waiting()
), last_hour AS (
  SELECT queue, kind,
    sum((completed + failed + cancelled) * CASE minute
          WHEN date_trunc('minute', now()) THEN 1
          WHEN date_trunc('minute', now()) - interval '1 minute' THEN 1 - extract(second FROM now()) / 60 ELSE 0 END) AS finished
  FROM batchq.throughput_minutes WHERE minute > now() - interval '1 hour' GROUP BY queue, kind
), failed AS (
  SELECT queue, kind, count AS failed, CASE WHEN is_estimate THEN 'failed' END AS estimated FROM batchq.count_failed()
)
SELECT queue, kind, coalesce(ready, 0) AS ready, coalesce(scheduled, 0) AS scheduled, coalesce(processing, 0) AS processing,
  coalesce(stalled, 0) AS stalled, coalesce(failed, 0) AS failed, oldest_wait,
  round(coalesce(finished, 0) / 60.0, 2) AS finished_per_second,
  (SELECT count(*) FROM batchq.workers w
   WHERE w.heartbeat_at > now() - interval '1 minute' AND queue = ANY (w.queues) AND kind = ANY (w.kinds)) AS workers,
  array_remove(coalesce(live.estimated, '{}') || failed.estimated || waiting_estimated, NULL) AS estimated,
  CASE WHEN held_back_by IS NULL THEN 0 ELSE coalesce(ready, 0) END AS held_back, held_back_by,
  coalesce(waiting, 0) AS waiting
FROM live FULL JOIN waiting USING (queue, kind) FULL JOIN last_hour USING (queue, kind) FULL JOIN failed USING (queue, kind)
CROSS JOIN LATERAL (SELECT queue AS of_queue, kind AS of_kind) named
CROSS JOIN LATERAL (
  SELECT string_agg(DISTINCT b.reason, ', ') AS held_back_by
  FROM (
    SELECT unnest(string_to_array(s.held_back_by, ',')) AS reason FROM batchq.limit_shares s
    WHERE s.queue = of_queue AND s.kind IN ('', of_kind) AND s.refreshed_at > now() - interval '5 seconds'
    UNION ALL
    SELECT 'throttled' FROM batchq.throttles t
    WHERE t.queue = of_queue AND t.kind IN ('', of_kind) AND t.key = '' AND t.until > now()
  ) b
) held;

COMMENT ON COLUMN batchq.queues.held_back IS 'Ready batches that a limit or a throttle holds back; 0 if none does.';
COMMENT ON COLUMN batchq.queues.held_back_by IS
  'What holds back batches or items, as of the last seconds: columns of batchq.limits, or "throttled"; null: nothing.';
COMMENT ON COLUMN batchq.queues.waiting IS 'Batches that wait for others to end.';

CREATE FUNCTION batchq.waiting_queues() RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE found_queue text := '';
BEGIN
  LOOP
    SELECT b.queue INTO found_queue FROM batchq.batches_live b
    WHERE b.queue > found_queue AND b.status = 'waiting' ORDER BY b.queue, b.id LIMIT 1;
    EXIT WHEN NOT FOUND;
    RETURN NEXT found_queue;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.waiting_queues IS 'Returns the queues that have waiting batches.';

-- As before, with keys and waiting batches.
CREATE OR REPLACE FUNCTION batchq.newest_live(in_queue text DEFAULT NULL, in_kind text DEFAULT NULL, in_status text DEFAULT NULL,
  before_id bigint DEFAULT 9223372036854775807, most integer DEFAULT 100) RETURNS SETOF bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$ BEGIN
  IF NOT EXISTS (SELECT 1 FROM batchq.positions) THEN
    RETURN QUERY
    SELECT b.id FROM batchq.batches_live b
    WHERE b.id < before_id AND (in_queue IS NULL OR b.queue = in_queue) AND (in_kind IS NULL OR b.kind = in_kind)
      AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
    ORDER BY b.id DESC LIMIT most;
    RETURN;
  END IF;
  -- The newest of each level, by the indexes of claims and leases, since batchq.positions has where these begin. "b.id + 0" keeps
  -- the planner from the index of ids, whose dead entries are unknown.
  RETURN QUERY
  SELECT b.id
  FROM (
    SELECT b.id, b.queue
    FROM batchq.waiting_levels() w CROSS JOIN LATERAL (
      SELECT b.id, b.queue FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.run_at DESC, b.id DESC LIMIT most) b
    WHERE w.at IS NOT NULL AND (in_status IS NULL OR in_status NOT IN ('processing', 'stalled', 'waiting'))
    UNION ALL
    SELECT b.id, q.queue
    FROM batchq.keyed_queues() AS q(queue) CROSS JOIN LATERAL (
      SELECT b.id FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'pending' AND b.key > ''
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.key, b.priority, b.run_at, b.id LIMIT 10 * most) b
    WHERE in_status IS NULL OR in_status NOT IN ('processing', 'stalled', 'waiting')
    UNION ALL
    SELECT b.id, b.queue
    FROM batchq.busy_queues() q CROSS JOIN LATERAL (
      SELECT b.id, b.queue FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.lease_expires_at DESC LIMIT most) b
    WHERE q.at IS NOT NULL AND (in_status IS NULL OR in_status IN ('processing', 'stalled'))
    UNION ALL
    SELECT b.id, q.queue
    FROM batchq.waiting_queues() AS q(queue) CROSS JOIN LATERAL (
      SELECT b.id FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'waiting' AND b.id < before_id AND (in_kind IS NULL OR b.kind = in_kind)
      ORDER BY b.queue DESC, b.id DESC LIMIT most) b
    WHERE in_status IS NULL OR in_status = 'waiting'
  ) b
  WHERE in_queue IS NULL OR b.queue = in_queue
  ORDER BY b.id DESC LIMIT most;
END $$;

-- Reads 20 rows of batchq.needs for each waiting batch, in all: one batch may have 100,000. A needed batch that is live is being
-- retried. One whose end a row of batchq.flow_events reports is left to the workers.
CREATE FUNCTION batchq.stuck_waiting(most integer DEFAULT 1000)
RETURNS TABLE (queue text, kind text, batch_id bigint, needed_id bigint, ended_as text, is_stored boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE queues text[]; kinds text[]; ids bigint[]; needed bigint[]; ends text[]; gone bigint[]; stored bigint[]; reported bigint[];
BEGIN
  SELECT array_agg(n.queue), array_agg(n.kind), array_agg(n.id), array_agg(n.needed_id), array_agg(n.ended_as)
  INTO queues, kinds, ids, needed, ends
  FROM (SELECT w.queue, w.kind, w.id, n.needed_id, n.on_failure, n.ended_as
        FROM (SELECT b.queue, b.kind, b.id FROM batchq.batches_live b WHERE b.status = 'waiting' ORDER BY b.queue, b.id LIMIT most) w
        CROSS JOIN LATERAL (SELECT n.needed_id, n.on_failure, n.ended_as FROM batchq.needs n WHERE n.batch_id = w.id) n
        LIMIT 20 * most) n
  WHERE n.ended_as IS NULL OR n.on_failure = 'wait' AND n.ended_as <> 'completed';
  gone := ARRAY(SELECT u FROM unnest(needed) u EXCEPT SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (needed));
  IF gone = '{}' THEN RETURN; END IF;
  stored := ARRAY(SELECT f.id FROM batchq.batches_finished f WHERE f.id = ANY (gone));
  reported := ARRAY(SELECT e.needed_id FROM batchq.flow_events e ORDER BY e.id LIMIT 20 * most);
  RETURN QUERY
  SELECT u.queue, u.kind, u.id, u.needed_id, u.ended_as, u.needed_id IN (SELECT s FROM unnest(stored) s)
  FROM unnest(queues, kinds, ids, needed, ends) u(queue, kind, id, needed_id, ended_as)
  WHERE u.needed_id IN (SELECT g FROM unnest(gone) g)
    AND u.needed_id NOT IN (SELECT r FROM unnest(reported) r)
    AND (u.ended_as IS NOT NULL OR cardinality(reported) < 20 * most AND u.needed_id NOT IN (SELECT s FROM unnest(stored) s));
END $$;
COMMENT ON FUNCTION batchq.stuck_waiting IS
  'Returns batches that wait for one that has failed, was cancelled, or is not stored any more, and is not being retried: a row for '
  'each pair. Reads the first "most" waiting batches, by queue and id. ended_as: how the needed one ended, null if that is unknown.';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.give_replica_identities();
