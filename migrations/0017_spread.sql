-- Spread: one batch with a long list of items, worked by many workers. The worker that claims it first makes n batches of it, its
-- parts, each with a slice of the items (batchq.spread_batch); it waits for them. To people it stays one batch.
ALTER TABLE batchq.batches ADD COLUMN spread smallint, ADD COLUMN part_of bigint;
ALTER TABLE batchq.batches
  ADD CONSTRAINT batches_spread_fits CHECK (spread BETWEEN 1 AND 1000) NOT VALID,
  ADD CONSTRAINT batches_spread_has_items CHECK (spread IS NULL OR items IS NOT NULL) NOT VALID;
COMMENT ON COLUMN batchq.batches.spread IS
  'Optional number of parts, 1 to 1,000, in which the items are worked at the same time. Null: what the item handler says.';
COMMENT ON COLUMN batchq.batches.part_of IS 'Batch that this one is a part of. Set by batchq.';

CREATE TABLE batchq.parts (
  batch_id bigint NOT NULL, first_item integer NOT NULL, items integer NOT NULL, queue text NOT NULL, part_id bigint,
  items_done integer NOT NULL DEFAULT 0, items_failed integer NOT NULL DEFAULT 0, ended_as text, error text,
  is_gathered boolean NOT NULL DEFAULT false, at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (batch_id, first_item)
);
CREATE UNIQUE INDEX parts_part ON batchq.parts (part_id);
CREATE INDEX parts_open ON batchq.parts (batch_id) WHERE part_id IS NOT NULL AND NOT is_gathered;
COMMENT ON TABLE batchq.parts IS 'The parts of batches that are spread: a row for each range of items. Kept as long as the batch.';
COMMENT ON COLUMN batchq.parts.batch_id IS 'Batch that is spread: batchq.batches.id.';
COMMENT ON COLUMN batchq.parts.first_item IS 'Index of the first item of the range in the whole list, from 0.';
COMMENT ON COLUMN batchq.parts.items IS 'Number of items in the range.';
COMMENT ON COLUMN batchq.parts.queue IS 'Queue of both batches.';
COMMENT ON COLUMN batchq.parts.part_id IS 'Batch that works the range: batchq.batches.id. Null: none, until the whole is claimed again.';
COMMENT ON COLUMN batchq.parts.items_done IS
  'Number of items that had succeeded when the part ended; 0 once the whole has counted them.';
COMMENT ON COLUMN batchq.parts.items_failed IS
  'Number of items that had failed when the part ended; 0 once the whole has counted them.';
COMMENT ON COLUMN batchq.parts.ended_as IS 'How the part ended: completed, failed or cancelled; null: it has not.';
COMMENT ON COLUMN batchq.parts.error IS 'Last error of the part, if it ended otherwise than completed.';
COMMENT ON COLUMN batchq.parts.is_gathered IS 'Whether the part was gathered after its end: its failed items are those of the whole now.';
COMMENT ON COLUMN batchq.parts.at IS 'When the range was first given to a part.';

CREATE FUNCTION batchq.forget_parts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_RELID <> 'batchq.batches'::regclass THEN
    RAISE EXCEPTION 'batchq.forget_parts is the trigger function of batchq.batches, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  TRUNCATE batchq.parts;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.forget_parts IS 'Trigger function: TRUNCATE of batchq.batches empties batchq.parts.';
CREATE TRIGGER forget_parts AFTER TRUNCATE ON batchq.batches FOR EACH STATEMENT EXECUTE FUNCTION batchq.forget_parts();

-- As before; the end of a part is written down in batchq.parts, too: its own row may be deleted before it is gathered.
CREATE OR REPLACE FUNCTION batchq.note_end() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE ended_as text; done integer; failed integer; last_error text;
BEGIN
  IF TG_TABLE_SCHEMA <> 'batchq' THEN
    RAISE EXCEPTION 'batchq.note_end is a trigger function of batchq''s own tables, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  PERFORM 1 FROM batchq.batches_live b WHERE b.id = OLD.id;
  IF FOUND THEN RETURN NULL; END IF;  -- moved to another queue
  SELECT f.status, f.items_done, f.items_failed, f.errors -> -1 ->> 'error' INTO ended_as, done, failed, last_error
  FROM batchq.batches_finished f
  WHERE f.queue = OLD.queue AND f.id = OLD.id AND f.finished_at > now() - interval '1 day';
  IF ended_as IS NULL THEN  -- completed batches may be deleted instead of kept, but no parts are
    ended_as := CASE WHEN OLD.status = 'processing' AND OLD.part_of IS NULL THEN 'completed' ELSE 'cancelled' END;
    done := OLD.items_done;
    failed := OLD.items_failed;
  END IF;
  IF OLD.part_of IS NOT NULL THEN
    UPDATE batchq.parts p SET ended_as = ended_as, items_done = done, items_failed = failed, error = left(last_error, 2000)
    WHERE p.part_id = OLD.id;
  END IF;
  INSERT INTO batchq.flow_events (needed_id, status) VALUES (OLD.id, ended_as);
  RETURN NULL;
END $$;

-- ------------------------------------------------------------------------------------------------------------ for workers

-- The new batches begin now: claims continue after the position of the last one, and find what becomes ready at the end at once.
CREATE FUNCTION batchq.spread_batch(in_queue text, batch_id bigint, token uuid, most integer, OUT parts integer, OUT error text,
                                    OUT is_left boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE b record; first integer; one record; firsts integer[]; ends integer[]; ids bigint[];
BEGIN
  SELECT l.* INTO b FROM batchq.batches_live l
  WHERE l.queue = in_queue AND l.id = batch_id AND l.claim_token = token FOR UPDATE;
  IF NOT FOUND THEN RETURN; END IF;
  first := b.items_done + b.items_failed;
  -- In the strict order of a key, nothing may overtake the rest of the list.
  IF b.key IS NOT NULL AND EXISTS (SELECT 1 FROM batchq.limits_in_force f WHERE f.queue = in_queue
                                   AND coalesce(f.kind, b.kind) = b.kind AND f.max_running_per_key = 1) THEN
    most := 1;
  END IF;
  SELECT p.first_item, p.items, p.part_id, p.ended_as, p.error INTO one FROM batchq.parts p
  WHERE p.batch_id = b.id AND p.part_id IS NOT NULL AND p.items_done + p.items_failed < p.items ORDER BY p.first_item LIMIT 1;
  IF FOUND THEN
    parts := 0;
    error := format('items %s to %s (batch %s): %s', one.first_item, one.first_item + one.items - 1, one.part_id,
                    coalesce(one.error, one.ended_as));
    RETURN;
  END IF;
  IF NOT EXISTS (SELECT 1 FROM batchq.parts p WHERE p.batch_id = b.id) THEN
    parts := least(most, b.items_total - first);
    IF parts <= 1 THEN RETURN; END IF;
    INSERT INTO batchq.parts (batch_id, queue, first_item, items)
    SELECT b.id, in_queue, first + share.first_of, share.end_of - share.first_of
    FROM (SELECT (b.items_total - first)::bigint * n / parts AS first_of, (b.items_total - first)::bigint * (n + 1) / parts AS end_of
          FROM generate_series(0, parts - 1) n) share;
  ELSE  -- it was cancelled or has failed, and is retried: what is left of each range
    INSERT INTO batchq.parts (batch_id, queue, first_item, items)
    SELECT p.batch_id, in_queue, p.first_item + p.items_done + p.items_failed, p.items - p.items_done - p.items_failed
    FROM batchq.parts p
    WHERE p.batch_id = b.id AND p.items_done + p.items_failed BETWEEN 1 AND p.items - 1;
    UPDATE batchq.parts p SET items = p.items_done + p.items_failed
    WHERE p.batch_id = b.id AND p.items_done + p.items_failed BETWEEN 1 AND p.items - 1;
  END IF;
  SELECT array_agg(p.first_item ORDER BY p.first_item), array_agg(p.first_item + p.items ORDER BY p.first_item), count(*)
  INTO firsts, ends, parts
  FROM batchq.parts p WHERE p.batch_id = b.id AND p.items_done + p.items_failed < p.items;
  is_left := true;
  IF parts = 0 THEN  -- it was cancelled after the last item, before anybody had counted
    PERFORM batchq.count_parts(in_queue, b.id, true);
    RETURN;
  END IF;
  WITH made AS (
    INSERT INTO batchq.batches (queue, kind, payload, items, priority, run_at, max_attempts, max_failed_items, timeout_seconds,
      trace_context, key, part_of, is_needed)
    SELECT b.queue, b.kind, b.payload, s.items, b.priority, clock_timestamp(), b.max_attempts,
      ends[s.number] - firsts[s.number], b.timeout_seconds, b.trace_context, b.key, b.id, true
    FROM (SELECT width_bucket((e.number - 1)::integer, firsts) AS number, jsonb_agg(e.item ORDER BY e.number) AS items
          FROM jsonb_array_elements(b.items) WITH ORDINALITY AS e(item, number)
          WHERE e.number > firsts[1] AND e.number <= ends[width_bucket((e.number - 1)::integer, firsts)]
          GROUP BY 1) s
    ORDER BY s.number  -- in which the ids are given
    RETURNING id
  )
  SELECT array_agg(m.id ORDER BY m.id) INTO ids FROM made m;
  UPDATE batchq.parts p SET part_id = u.id, ended_as = NULL, error = NULL, is_gathered = false
  FROM unnest(ids, firsts) u(id, first_item)
  WHERE p.batch_id = b.id AND p.first_item = u.first_item;
  UPDATE batchq.batches_live l
  SET status = 'waiting', needs_left = parts, spread = coalesce(l.spread, most), attempt = greatest(l.attempt - 1, 0),
      claimed_by = NULL, claim_token = NULL, lease_expires_at = NULL
  WHERE l.queue = in_queue AND l.id = b.id;
END $$;
COMMENT ON FUNCTION batchq.spread_batch IS
  'Makes parts of a claimed batch, "most" at most, for the items that have not been worked; it waits for them, and the attempt is '
  'not counted. Returns how many, null if the claim is lost. is_left: the claim is over; if no items were left, the batch is pending. '
  'Otherwise nothing was changed: it has too few items, or a key in whose order it must stay; or, as the error says, a part has ended '
  'before all its items were worked.';

-- The caller has locked the whole. Moves the failed items of parts that have ended to it, with their indexes in the whole list.
CREATE FUNCTION batchq.gather(in_queue text, whole_id bigint, part_ids bigint[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
BEGIN
  WITH gone AS (
    DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (part_ids) RETURNING f.*
  )
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, retryable, failed_at)
  SELECT in_queue, whole_id, p.first_item + g.item_index, g.item, g.error, g.attempt, false, g.failed_at
  FROM gone g JOIN batchq.parts p ON p.part_id = g.batch_id
  ON CONFLICT (queue, batch_id, item_index) DO UPDATE
  SET error = excluded.error, attempt = excluded.attempt, failed_at = excluded.failed_at;
  DELETE FROM batchq.batches_finished f
  WHERE f.queue = in_queue AND f.id = ANY (part_ids) AND f.finished_at > now() - interval '1 day';
  UPDATE batchq.parts p SET is_gathered = true WHERE p.part_id = ANY (part_ids);
END $$;
COMMENT ON FUNCTION batchq.gather IS
  'Gathers parts that have ended: their failed items become those of the whole, and the parts themselves are deleted.';

-- The caller has locked the whole.
CREATE FUNCTION batchq.count_parts(in_queue text, whole_id bigint, is_claimed boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE sums record;
BEGIN
  SELECT sum(p.items_done) AS done, sum(p.items_failed) AS failed, bool_and(p.items_done + p.items_failed = p.items) AS is_whole
  INTO sums
  FROM batchq.parts p WHERE p.batch_id = whole_id;
  UPDATE batchq.batches_live b
  SET needs_left = 0, status = 'pending', claimed_at = NULL, run_at = greatest(b.run_at, now()),
      attempt = b.attempt - is_claimed::integer, claimed_by = NULL, claim_token = NULL, lease_expires_at = NULL,
      items_done = b.items_done + CASE WHEN sums.is_whole THEN sums.done ELSE 0 END,
      items_failed = b.items_failed + CASE WHEN sums.is_whole THEN sums.failed ELSE 0 END
  WHERE b.queue = in_queue AND b.id = whole_id;
  UPDATE batchq.parts p SET items_done = 0, items_failed = 0 WHERE p.batch_id = whole_id AND sums.is_whole;
END $$;
COMMENT ON FUNCTION batchq.count_parts IS
  'Makes a batch pending whose parts have all ended, and counts their items for it if all were worked. is_claimed: it had been claimed '
  'in vain, and the attempt is not counted.';

CREATE FUNCTION batchq.gather_parts(ended bigint[], OUT released integer, OUT locked bigint[])
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE one record; reason text; open integer;
BEGIN
  released := 0;
  locked := '{}';
  FOR one IN
    SELECT p.batch_id, p.queue, array_agg(p.part_id) AS ids FROM batchq.parts p
    WHERE p.part_id = ANY (ended) AND NOT p.is_gathered GROUP BY p.batch_id, p.queue ORDER BY p.batch_id
  LOOP
    PERFORM 1 FROM batchq.batches_live b
    WHERE b.queue = one.queue AND b.id = one.batch_id AND b.status = 'waiting' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN  -- whoever has it locked gathers its parts, or cancels them
      locked := locked || ARRAY(SELECT i FROM unnest(one.ids) i WHERE EXISTS (
        SELECT 1 FROM batchq.batches_live b WHERE b.queue = one.queue AND b.id = one.batch_id AND b.status = 'waiting'));
      CONTINUE;
    END IF;
    SELECT min(coalesce(p.error, 'a part was cancelled')) INTO reason
    FROM batchq.parts p WHERE p.part_id = ANY (one.ids) AND p.ended_as = 'cancelled';
    IF reason IS NOT NULL THEN
      IF batchq.cancel_live(one.queue, ARRAY[one.batch_id], '{waiting}', regexp_replace(reason, '^cancelled: ', '')) = 0 THEN
        locked := locked || one.ids;  -- a part is
      END IF;
      CONTINUE;
    END IF;
    PERFORM batchq.gather(one.queue, one.batch_id, one.ids);
    SELECT count(*) INTO open FROM batchq.parts p WHERE p.batch_id = one.batch_id AND p.part_id IS NOT NULL AND NOT p.is_gathered;
    -- Not counted before the last is gathered: others may have ended meanwhile, and are counted with their own event.
    IF open > 0 THEN
      UPDATE batchq.batches_live b SET needs_left = open WHERE b.queue = one.queue AND b.id = one.batch_id;
    ELSE
      PERFORM batchq.count_parts(one.queue, one.batch_id, false);
    END IF;
    released := released + (open = 0)::integer;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.gather_parts IS
  'Gathers those of these batches that are parts and have ended. A whole whose last part has ended becomes pending, and one with a '
  'cancelled part is cancelled. Returns how many became pending, and the parts whose whole others have locked: try these again.';

CREATE FUNCTION batchq.prune_parts(older_than interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE deleted integer;
BEGIN
  DELETE FROM batchq.parts p
  WHERE (p.batch_id, p.first_item) IN (
    SELECT o.batch_id, o.first_item FROM batchq.parts o
    WHERE o.at < now() - older_than AND NOT EXISTS (SELECT 1 FROM batchq.batches b WHERE b.id = o.batch_id) LIMIT 10000);
  GET DIAGNOSTICS deleted = ROW_COUNT;
  RETURN deleted;
END $$;
COMMENT ON FUNCTION batchq.prune_parts IS
  'Deletes up to 10,000 rows of batchq.parts older than that whose batch is not stored any more. Returns how many.';

-- As before, with parts.
CREATE OR REPLACE FUNCTION batchq.follow_flows(after_id bigint, most integer DEFAULT 500, OUT seen integer, OUT released integer,
                                    OUT last_id bigint, OUT left_over integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  most_needs constant integer := 10 * most;
  events bigint[]; needed bigint[]; statuses text[]; marked record; ended bigint[]; ended_as text[]; kept bigint[];
  met_by bigint[]; waiting bigint[]; queues text[]; met_as text[]; one record; free bigint[]; gathered record;
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

  gathered := batchq.gather_parts(ended);
  released := gathered.released;
  kept := kept || gathered.locked;

  -- Who waits for them, and not for its own parts because it was run anyway. One that fails and is waited for nevertheless is only noted.
  SELECT array_agg(n.needed_id), array_agg(n.batch_id), array_agg(n.queue), array_agg(n.status)
  INTO met_by, waiting, queues, met_as
  FROM (SELECT n.needed_id, n.batch_id, n.queue, e.status
        FROM unnest(ended, ended_as) e(id, status) CROSS JOIN LATERAL (
          SELECT n.needed_id, n.batch_id, n.queue FROM batchq.needs n
          WHERE n.needed_id = e.id
            AND (n.ended_as IS NULL OR n.on_failure = 'wait' AND n.ended_as <> 'completed' AND n.ended_as <> e.status)
            AND EXISTS (SELECT 1 FROM batchq.batches_live b
                        WHERE b.queue = n.queue AND b.id = n.batch_id AND b.status = 'waiting' AND b.claimed_at IS NULL)
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
                  WHERE b.queue = one.queue AND b.id = ANY (one.ids) AND b.status = 'waiting' AND b.claimed_at IS NULL
                  FOR UPDATE SKIP LOCKED);
    kept := kept || ARRAY(
      SELECT DISTINCT u.needed_id FROM unnest(met_by, waiting) u(needed_id, id)
      WHERE u.id IN (SELECT b.id FROM batchq.batches_live b
                     WHERE b.queue = one.queue AND b.id = ANY (one.ids) AND b.status = 'waiting' AND b.claimed_at IS NULL
                     EXCEPT SELECT f FROM unnest(free) f));
    released := released + batchq.count_needs(one.queue, free, met_by, waiting, met_as);
  END LOOP;
  events := ARRAY(SELECT u.id FROM unnest(events, needed) u(id, needed_id) WHERE u.needed_id <> ALL (kept));
  DELETE FROM batchq.flow_events e WHERE e.id = ANY (events);
  left_over := (SELECT count(*) FROM unnest(needed) u WHERE u = ANY (kept));
END $$;

-- ------------------------------------------------------------------------------------------------------------- for people

CREATE FUNCTION batchq.progress_of_parts(of_batch bigint, OUT items_done bigint, OUT items_failed bigint, OUT began_at timestamptz)
LANGUAGE plpgsql STABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF NOT has_table_privilege('batchq.parts', 'SELECT') OR NOT has_table_privilege('batchq.batches_live', 'SELECT') THEN
    RETURN;
  END IF;
  SELECT coalesce(sum(coalesce(b.items_done, p.items_done)), 0), coalesce(sum(coalesce(b.items_failed, p.items_failed)), 0), min(p.at)
  INTO items_done, items_failed, began_at
  FROM batchq.parts p LEFT JOIN batchq.batches_live b ON b.queue = p.queue AND b.id = p.part_id
  WHERE p.batch_id = of_batch;
END $$;
COMMENT ON FUNCTION batchq.progress_of_parts IS
  'Returns how many items of a batch''s parts are done, how many have failed, and when the first part was made; nulls if the role '
  'may not read parts.';

CREATE FUNCTION batchq.failed_items_of(of_batch bigint, after_index integer DEFAULT -1, most integer DEFAULT 1000)
RETURNS TABLE (queue text, batch_id bigint, item_index integer, item jsonb, error text, attempt smallint, retryable boolean,
               failed_at timestamptz, run_at timestamptz)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  SELECT i.* FROM (
    (SELECT f.queue, f.batch_id, f.item_index, f.item, f.error, f.attempt, f.retryable, f.failed_at, f.run_at
     FROM batchq.failed_items f WHERE f.batch_id = of_batch AND f.item_index > after_index ORDER BY f.item_index LIMIT most)
    UNION ALL
    (SELECT f.queue, p.batch_id, p.first_item + f.item_index, f.item, f.error, f.attempt, f.retryable, f.failed_at, f.run_at
     FROM batchq.parts p JOIN batchq.failed_items f ON f.queue = p.queue AND f.batch_id = p.part_id
     WHERE p.batch_id = of_batch AND NOT p.is_gathered AND p.first_item + f.item_index > after_index
     ORDER BY p.first_item + f.item_index LIMIT most)) i
  ORDER BY i.item_index LIMIT most;
END $$;
COMMENT ON FUNCTION batchq.failed_items_of IS
  'Returns the failed items of a batch and of its parts, by their index in the whole list, the first "most" after an index.';
-- As before; refuses parts, and locks the parts of a batch that is spread.
CREATE OR REPLACE FUNCTION batchq.lock_batch(batch_id bigint, OUT queue text, OUT kind text, OUT status text, OUT unique_key text,
                                  OUT items_failed integer)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE whole bigint;
BEGIN
  LOOP
    SELECT b.queue INTO queue FROM batchq.batches_live b WHERE b.id = batch_id;
    SELECT b.kind, b.status, b.unique_key, b.items_failed, b.part_of INTO kind, status, unique_key, items_failed, whole
    FROM batchq.batches_live b
    WHERE b.queue = lock_batch.queue AND b.id = batch_id
    FOR UPDATE;
    EXIT WHEN FOUND;
    SELECT b.queue INTO queue FROM batchq.batches_finished b WHERE b.id = batch_id;
    SELECT b.kind, b.status, b.unique_key, b.items_failed, b.part_of INTO kind, status, unique_key, items_failed, whole
    FROM batchq.batches_finished b
    WHERE b.queue = lock_batch.queue AND b.id = batch_id
    FOR UPDATE;
    EXIT WHEN FOUND;
    -- Not where it was: either there is no such batch, or somebody has just moved, finished or retried it.
    EXIT WHEN NOT EXISTS (SELECT 1 FROM batchq.batches b WHERE b.id = batch_id);
  END LOOP;
  IF whole IS NOT NULL THEN
    RAISE EXCEPTION 'batch % is a part of batch %: only the whole can be changed', batch_id, whole
      USING HINT = format('Use %s instead of %s.', whole, batch_id);
  END IF;
  -- What changes a batch that is spread changes its parts. In the order of their ids, as everybody does who waits for them.
  PERFORM 1 FROM batchq.parts p JOIN batchq.batches_live b ON b.queue = p.queue AND b.id = p.part_id
  WHERE p.batch_id = lock_batch.batch_id AND NOT p.is_gathered ORDER BY b.id FOR UPDATE OF b;
END $$;

-- As before, with parts. Nothing is changed of a batch of whose parts others have locked one: it is left out, like one that is locked.
CREATE OR REPLACE FUNCTION batchq.cancel_live(in_queue text, ids bigint[], statuses text[], reason text)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE changed integer; chosen bigint[]; of_parts bigint[]; wholes bigint[]; part_ids bigint[]; free bigint[]; one bigint;
BEGIN
  IF 'processing' = ANY (statuses) THEN statuses := statuses || 'waiting'::text; END IF;  -- so is a processing one stored that is spread
  chosen := ARRAY(SELECT b.id FROM batchq.batches_live b
                  WHERE b.queue = in_queue AND b.id = ANY (ids) AND b.status = ANY (statuses) FOR UPDATE SKIP LOCKED);
  SELECT array_agg(p.part_id), array_agg(p.batch_id) INTO part_ids, of_parts
  FROM batchq.parts p WHERE p.batch_id = ANY (chosen) AND p.part_id IS NOT NULL AND NOT p.is_gathered;
  IF part_ids IS NOT NULL THEN
    free := ARRAY(SELECT b.id FROM batchq.batches_live b WHERE b.queue = in_queue AND b.id = ANY (part_ids) FOR UPDATE SKIP LOCKED);
    wholes := ARRAY(SELECT DISTINCT u.whole FROM unnest(part_ids, of_parts) u(id, whole)
                    JOIN batchq.batches_live b ON b.queue = in_queue AND b.id = u.id WHERE u.id <> ALL (free));
    chosen := ARRAY(SELECT c FROM unnest(chosen) c WHERE c <> ALL (wholes));
    PERFORM batchq.cancel_live(in_queue, ARRAY(SELECT u.id FROM unnest(part_ids, of_parts) u(id, whole) WHERE u.whole = ANY (chosen)),
                               '{pending,processing}', reason);
    FOR one IN SELECT DISTINCT u.whole FROM unnest(of_parts) u(whole) WHERE u.whole = ANY (chosen) LOOP
      PERFORM batchq.gather(in_queue, one, ARRAY(SELECT u.id FROM unnest(part_ids, of_parts) u(id, whole) WHERE u.whole = one));
    END LOOP;
  END IF;
  -- The columns that a batch takes along when it ends: here, in batchq.revive, and in the statements of the workers.
  WITH gone AS (
    DELETE FROM batchq.batches_live b WHERE b.queue = in_queue AND b.id = ANY (chosen) RETURNING b.*
  )
  INSERT INTO batchq.batches (id, queue, kind, status, payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    result, created_at, trace_context, key, after, on_failure, needs_left, spread, part_of, finished_at, errors)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, g.queue, g.kind, 'cancelled', g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts,
    g.max_failed_items, g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done, g.items_failed,
    g.cursor, g.result, g.created_at, g.trace_context, g.key, g.after, g.on_failure, g.needs_left, g.spread, g.part_of, now(),
    batchq.append_error(g.errors, g.attempt,
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
      AND f.part_of IS NULL
      AND (f.status <> 'completed' OR f.items_failed > 0 OR whole IS DISTINCT FROM false)
    FOR UPDATE SKIP LOCKED
  ), inserted AS (
    INSERT INTO batchq.batches (id, queue, kind, payload, items, priority, unique_key, max_attempts, max_failed_items,
      timeout_seconds, key, items_total, items_done, items_failed, cursor, errors, created_at, trace_context, after, on_failure,
      spread, needs_left)
    OVERRIDING SYSTEM VALUE
    SELECT c.id, c.queue, c.kind, c.payload, c.items, c.priority, c.unique_key, c.max_attempts, c.max_failed_items,
      c.timeout_seconds, c.key, c.items_total, CASE WHEN whole THEN 0 ELSE c.items_done END,
      CASE WHEN whole THEN 0 ELSE c.items_failed END, CASE WHEN whole THEN NULL ELSE c.cursor END, c.errors, c.created_at,
      c.trace_context, c.after, c.on_failure, c.spread,
      CASE WHEN c.after IS NULL OR (c.needs_left > 0 AND c.claimed_at IS NULL) THEN NULL ELSE 0 END  -- ended while it waited: it waits again
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
  UPDATE batchq.parts p SET part_id = NULL WHERE p.batch_id = ANY (done) AND p.part_id IS NOT NULL;
  IF whole THEN
    DELETE FROM batchq.parts p WHERE p.batch_id = ANY (done);
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
    trace_context, key, after, on_failure, needs_left, is_needed, spread)
  OVERRIDING SYSTEM VALUE
  SELECT g.id, new_queue, g.kind, g.payload, g.items, g.priority, g.run_at, g.unique_key, g.max_attempts, g.max_failed_items,
    g.timeout_seconds, g.attempt, g.claimed_by, g.claimed_at, g.items_total, g.items_done, g.items_failed, g.cursor, g.errors,
    g.created_at, g.trace_context, g.key, g.after, g.on_failure, g.needs_left, g.is_needed, g.spread
  FROM gone g;
  GET DIAGNOSTICS moved = ROW_COUNT;
  WITH gone AS (
    DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (ids) RETURNING f.*
  )
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, retryable, failed_at,
    run_at)
  SELECT new_queue, g.batch_id, g.item_index, g.item, g.error, g.attempt, g.retryable, g.failed_at, g.run_at FROM gone g;
  UPDATE batchq.parts p SET queue = new_queue WHERE p.batch_id = ANY (ids);
  RETURN moved;
END $$;

CREATE OR REPLACE FUNCTION batchq.bulk_find(filter jsonb, from_status text, is_with_items boolean, after_at timestamptz, after_id bigint,
  most integer, OUT ids bigint[], OUT queues text[], OUT first_at timestamptz, OUT last_at timestamptz,
  OUT next_at timestamptz, OUT next_id bigint, OUT is_end boolean)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE
  examined   constant integer := 20000;
  in_queue   text := filter ->> 'queue';
  of_kind    text := filter ->> 'kind';
  of_key     text := filter ->> 'key';
  before     timestamptz := now() - (filter ->> 'older_than_seconds')::float8 * interval '1 second';
  error_like text := filter ->> 'error_like';
  statuses   text[] := CASE from_status WHEN 'live' THEN '{pending,processing,waiting}' ELSE ARRAY[from_status] END;
  is_live    boolean := from_status IN ('live', 'pending', 'processing', 'waiting');
BEGIN
  IF position('%' IN error_like) = 0 THEN
    error_like := '%' || error_like || '%';
  END IF;
  WITH seen AS MATERIALIZED (
    (SELECT b.id, b.queue, b.kind, b.key,
       CASE WHEN b.status = 'waiting' AND b.claimed_at IS NOT NULL THEN 'processing' ELSE b.status END AS status,  -- as it is shown
       b.created_at AS at, b.errors, b.items_failed
     FROM batchq.batches_live b
     WHERE is_live AND b.id > after_id AND b.part_of IS NULL
     ORDER BY b.id LIMIT examined)
    UNION ALL
    (SELECT b.id, b.queue, b.kind, b.key, b.status, b.finished_at, b.errors, b.items_failed
     FROM batchq.batches_finished b
     WHERE from_status = 'failed' AND b.status = 'failed' AND b.part_of IS NULL
       AND b.finished_at >= after_at AND (b.finished_at, b.id) > (after_at, after_id)
     ORDER BY b.finished_at, b.id LIMIT examined)
    UNION ALL
    (SELECT b.id, b.queue, b.kind, b.key, b.status, b.finished_at, b.errors, b.items_failed
     FROM batchq.batches_finished b
     WHERE from_status IN ('completed', 'cancelled') AND b.id > after_id AND b.part_of IS NULL
     ORDER BY b.id LIMIT examined)
  ), numbered AS MATERIALIZED (
    SELECT *, row_number() OVER () AS number FROM seen
  ), matching AS MATERIALIZED (
    SELECT id, queue, at, number
    FROM numbered
    WHERE status = ANY (statuses)
      AND (in_queue IS NULL OR queue = in_queue)
      AND (of_kind IS NULL OR kind = of_kind)
      AND (of_key IS NULL OR key = of_key)
      AND (before IS NULL OR at < before)
      AND (NOT is_with_items OR items_failed > 0)
      AND (error_like IS NULL OR errors -> -1 ->> 'error' ILIKE error_like)
    ORDER BY number
    LIMIT most
  ), found AS (
    SELECT array_agg(id ORDER BY number) AS ids, array_agg(queue ORDER BY number) AS queues, min(at) AS first_at,
      max(at) AS last_at, count(*) AS count, max(number) AS last
    FROM matching
  ), place AS (
    SELECT CASE WHEN found.count = most THEN found.last ELSE (SELECT count(*) FROM numbered) END AS number FROM found
  )
  SELECT coalesce(found.ids, '{}'), coalesce(found.queues, '{}'), found.first_at, found.last_at, n.at, n.id,
    found.count < most AND (SELECT count(*) FROM numbered) < examined
  INTO ids, queues, first_at, last_at, next_at, next_id, is_end
  FROM found CROSS JOIN place LEFT JOIN numbered n ON n.number = place.number;
END $$;

CREATE OR REPLACE FUNCTION batchq.retry(batch_id bigint, whole boolean DEFAULT false, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id); began_at timestamptz := now();
BEGIN
  IF b.status IN ('processing', 'waiting') OR b.status IS NULL THEN
    RETURN b.status;
  ELSIF b.status = 'pending' THEN
    DELETE FROM batchq.failed_items f WHERE whole AND f.queue = b.queue AND f.batch_id = retry.batch_id;
    DELETE FROM batchq.parts p WHERE whole AND p.batch_id = retry.batch_id;
    UPDATE batchq.batches_live l
    SET run_at = least(l.run_at, began_at),
        items_done = CASE WHEN whole THEN 0 ELSE l.items_done END,
        items_failed = CASE WHEN whole THEN 0 ELSE l.items_failed END,
        cursor = CASE WHEN whole THEN NULL ELSE l.cursor END
    WHERE l.queue = b.queue AND l.id = batch_id
      AND (l.run_at > began_at OR whole AND (l.items_done + l.items_failed > 0 OR l.cursor IS NOT NULL OR l.spread > 1));
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

CREATE OR REPLACE FUNCTION batchq.set_priority(batch_id bigint, priority integer, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  IF (batchq.change_pending(b.queue, batch_id || ARRAY(
        SELECT p.part_id FROM batchq.parts p WHERE p.batch_id = set_priority.batch_id AND p.part_id IS NOT NULL AND NOT p.is_gathered),
      new_priority => priority)).changed > 0 THEN
    PERFORM batchq.note_verb('set_priority', 1, batch_id, b.queue, b.kind, jsonb_build_object('priority', priority), reason, actor);
  END IF;
  RETURN b.status;
END $$;

-- As before; a batch that was run anyway and waits for its own parts is no dependent any more.
CREATE OR REPLACE FUNCTION batchq.cancel_with_dependents(batch_id bigint, reason text DEFAULT 'by an operator', actor text DEFAULT NULL)
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
      SELECT l.queue, array_agg(l.id) AS ids FROM batchq.batches_live l WHERE l.id = ANY (following) AND l.status = 'waiting' AND l.claimed_at IS NULL
      GROUP BY l.queue ORDER BY l.queue
    LOOP
      PERFORM 1 FROM batchq.batches_live l
      WHERE l.queue = part.queue AND l.id = ANY (part.ids) AND l.status = 'waiting' AND l.claimed_at IS NULL ORDER BY l.id FOR UPDATE;
      total := total + batchq.cancel_live(part.queue, part.ids, '{waiting}', reason);
    END LOOP;
    reached := reached || following;
  END LOOP;
  IF total > 0 THEN
    PERFORM batchq.note_verb('cancel_with_dependents', total, batch_id, b.queue, b.kind, '{}', reason, actor);
  END IF;
  RETURN ended_as;
END $$;
CREATE OR REPLACE FUNCTION batchq.run_anyway(batch_id bigint, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE b record := batchq.lock_batch(batch_id);
BEGIN
  UPDATE batchq.batches_live l SET status = 'pending', needs_left = 0, run_at = greatest(l.run_at, now())
  WHERE l.queue = b.queue AND l.id = batch_id AND l.status = 'waiting' AND l.claimed_at IS NULL;  -- not for its own parts
  IF NOT FOUND THEN RETURN b.status; END IF;
  PERFORM batchq.note_verb('run_anyway', 1, batch_id, b.queue, b.kind, '{}', reason, actor);
  RETURN 'pending';
END $$;

-- A batch that is spread waits for its parts and is shown as processing: unlike one that waits for others, it was claimed.
CREATE OR REPLACE FUNCTION batchq.count_waiting(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, count bigint, is_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  WITH first AS MATERIALIZED (
    SELECT b.queue, b.kind FROM batchq.batches_live b WHERE b.status = 'waiting' AND b.claimed_at IS NULL ORDER BY b.queue, b.id LIMIT most + 1
  )
  SELECT s.queue, s.kind, count(*), (SELECT count(*) FROM first) > most FROM first s GROUP BY s.queue, s.kind;
END $$;

-- As before, without those that wait for their own parts.
CREATE OR REPLACE FUNCTION batchq.stuck_waiting(most integer DEFAULT 1000)
RETURNS TABLE (queue text, kind text, batch_id bigint, needed_id bigint, ended_as text, is_stored boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE queues text[]; kinds text[]; ids bigint[]; needed bigint[]; ends text[]; gone bigint[]; stored bigint[]; reported bigint[];
BEGIN
  SELECT array_agg(n.queue), array_agg(n.kind), array_agg(n.id), array_agg(n.needed_id), array_agg(n.ended_as)
  INTO queues, kinds, ids, needed, ends
  FROM (SELECT w.queue, w.kind, w.id, n.needed_id, n.on_failure, n.ended_as
        FROM (SELECT b.queue, b.kind, b.id FROM batchq.batches_live b
              WHERE b.status = 'waiting' AND b.claimed_at IS NULL ORDER BY b.queue, b.id LIMIT most) w
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
CREATE FUNCTION batchq.spread_batches(most integer DEFAULT 1000) RETURNS SETOF bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
  SELECT DISTINCT p.batch_id FROM batchq.parts p WHERE p.part_id IS NOT NULL AND NOT p.is_gathered ORDER BY p.batch_id DESC LIMIT most
$$;
COMMENT ON FUNCTION batchq.spread_batches IS 'Returns the batches whose parts are being worked, the newest first.';

-- As before, without parts, and with the batches that they are parts of.
CREATE OR REPLACE FUNCTION batchq.newest_live(in_queue text DEFAULT NULL, in_kind text DEFAULT NULL, in_status text DEFAULT NULL,
  before_id bigint DEFAULT 9223372036854775807, most integer DEFAULT 100) RETURNS SETOF bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$ BEGIN
  IF NOT EXISTS (SELECT 1 FROM batchq.positions) THEN
    RETURN QUERY
    SELECT b.id FROM batchq.batches_live b
    WHERE b.id < before_id AND b.part_of IS NULL AND (in_queue IS NULL OR b.queue = in_queue) AND (in_kind IS NULL OR b.kind = in_kind)
      AND (in_status IS NULL OR in_status = CASE WHEN b.status = 'waiting' AND b.claimed_at IS NOT NULL THEN 'processing'
             ELSE batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors) END)
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
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.part_of IS NULL AND b.key IS NULL AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.run_at DESC, b.id DESC LIMIT most) b
    WHERE w.at IS NOT NULL AND (in_status IS NULL OR in_status NOT IN ('processing', 'stalled', 'waiting'))
    UNION ALL
    SELECT b.id, q.queue
    FROM batchq.keyed_queues() AS q(queue) CROSS JOIN LATERAL (
      SELECT b.id FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'pending' AND b.part_of IS NULL AND b.key > ''
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.key, b.priority, b.run_at, b.id LIMIT 10 * most) b
    WHERE in_status IS NULL OR in_status NOT IN ('processing', 'stalled', 'waiting')
    UNION ALL
    SELECT b.id, b.queue
    FROM batchq.busy_queues() q CROSS JOIN LATERAL (
      SELECT b.id, b.queue FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing' AND b.part_of IS NULL AND b.lease_expires_at >= q.at
        AND b.id + 0 < before_id AND (in_kind IS NULL OR b.kind = in_kind)
        AND (in_status IS NULL OR in_status = batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors))
      ORDER BY b.lease_expires_at DESC LIMIT most) b
    WHERE q.at IS NOT NULL AND (in_status IS NULL OR in_status IN ('processing', 'stalled'))
    UNION ALL
    SELECT b.id, q.queue
    FROM batchq.waiting_queues() AS q(queue) CROSS JOIN LATERAL (
      SELECT b.id FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'waiting' AND b.claimed_at IS NULL AND b.id < before_id
        AND (in_kind IS NULL OR b.kind = in_kind)
      ORDER BY b.queue DESC, b.id DESC LIMIT most) b
    WHERE in_status IS NULL OR in_status = 'waiting'
    UNION ALL
    SELECT b.id, b.queue
    FROM batchq.spread_batches() AS s(id) JOIN batchq.batches_live b ON b.id = s.id AND b.status = 'waiting'
    WHERE b.id < before_id AND (in_kind IS NULL OR b.kind = in_kind) AND (in_status IS NULL OR in_status = 'processing')
  ) b
  WHERE in_queue IS NULL OR b.queue = in_queue
  ORDER BY b.id DESC LIMIT most;
END $$;

CREATE OR REPLACE VIEW batchq.status WITH (security_invoker = true) AS
SELECT b.id, b.queue, b.kind,
  CASE WHEN b.status = 'processing' AND b.lease_expires_at < now() THEN 'stalled'
       WHEN b.status = 'pending' AND b.run_at <= now() THEN 'ready'
       WHEN b.status = 'pending' AND jsonb_array_length(b.errors) > 0 THEN 'retrying'
       WHEN b.status = 'pending' THEN 'scheduled'
       WHEN b.status = 'waiting' AND b.claimed_at IS NOT NULL THEN 'processing' ELSE b.status END AS status,
  CASE WHEN b.items_total > 0 THEN floor(100.0 * (b.items_done + coalesce(s.items_done, 0)
                                                  + b.items_failed + coalesce(s.items_failed, 0)) / b.items_total)::integer
       WHEN b.status = 'completed' THEN 100 END AS progress_percent,
  b.items_total, (b.items_done + coalesce(s.items_done, 0))::integer AS items_done,
  (b.items_failed + coalesce(s.items_failed, 0))::integer AS items_failed,
  (CASE WHEN b.status = 'waiting' AND b.claimed_at IS NOT NULL THEN b.attempt + 1 ELSE b.attempt END)::smallint AS attempt,
  b.max_attempts, b.priority, now() - b.created_at AS age,
  CASE WHEN b.status <> 'pending' THEN coalesce(b.finished_at, now()) - least(b.claimed_at, s.began_at) END AS running_time,
  CASE WHEN b.status = 'pending' THEN b.run_at END AS next_run_at,
  b.claimed_by, b.lease_expires_at, b.errors -> -1 ->> 'error' AS last_error, b.unique_key,
  b.created_at, b.claimed_at, b.finished_at, b.status AS stored_status, b.key, b.needs_left, b.spread
FROM batchq.batches b
LEFT JOIN LATERAL batchq.progress_of_parts(CASE WHEN b.spread > 1 THEN b.id END) s ON true
WHERE b.part_of IS NULL;
COMMENT ON COLUMN batchq.status.needs_left IS
  'Number of batches that a waiting batch still waits for; of one that is spread, the number of its parts that have not ended.';
COMMENT ON COLUMN batchq.status.spread IS 'Number of parts in which the items are worked at the same time; null: the batch is not spread.';

-- A view calls functions with the rights of its reader. Whoever may read one gets what it needs, and with it still reads only what
-- his own rights let him read.
CREATE FUNCTION batchq.grant_to_readers(relation regclass, granted text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE reader text;
BEGIN
  FOR reader IN
    SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
    FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
    WHERE c.oid = relation AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner
  LOOP
    EXECUTE format('GRANT %s TO %s', granted, reader);
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.grant_to_readers IS 'Grants something to whoever may read a relation: what it calls or reads. For migrations.';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.grant_to_readers('batchq.status', 'EXECUTE ON FUNCTION batchq.progress_of_parts(bigint)');
