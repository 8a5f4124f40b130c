-- The steps of `batchq distribute`, in this order. Each is idempotent, or has a condition in distribute.py.

-- name: lock
LOCK TABLE batchq.batches IN ACCESS EXCLUSIVE MODE

-- name: separate_finished
-- Citus refuses partitions of partitions. So batches keeps the live ones alone, and batches_finished its days. The CHECK lets the
-- planner leave out finished batches where a statement names a live status.
ALTER TABLE batchq.batches_finished
  ADD CONSTRAINT batches_finished_is_final CHECK (status IN ('completed', 'failed', 'cancelled'));
ALTER TABLE batchq.batches DETACH PARTITION batchq.batches_finished

-- name: join_in_view
CREATE OR REPLACE VIEW batchq.all_batches WITH (security_invoker = true) AS
SELECT {columns} FROM batchq.batches
UNION ALL
SELECT {columns} FROM batchq.batches_finished

-- name: indexes
-- A unique index must have the column by which a table is distributed. Ids stay unique: they come from one sequence.
DROP INDEX batchq.batches_live_id;
CREATE INDEX batches_live_id ON batchq.batches_live (id) WITH (fillfactor = 48);
ALTER TABLE batchq.batches_live REPLICA IDENTITY FULL;
ALTER TABLE batchq.needs DROP CONSTRAINT needs_pkey, ADD PRIMARY KEY (needed_id, batch_id, queue);
-- For batchq.collect_flows.
CREATE INDEX batches_live_unregistered ON batchq.batches_live (queue, id) WHERE status = 'waiting' AND needs_left < 0;
CREATE INDEX batches_finished_needed ON batchq.batches_finished (queue, id) WHERE is_needed

-- name: forget_noted_ends
-- Triggers have written down the ends of these already.
UPDATE batchq.batches_finished f SET is_needed = NULL WHERE f.is_needed

-- name: drop_triggers
-- A trigger of a distributed table fires on a node, where it can neither read nor write another table.
DROP TRIGGER count_items ON batchq.batches_live;
DROP TRIGGER count_changed_items ON batchq.batches_live;
DROP TRIGGER begin_waiting ON batchq.batches_live;
DROP TRIGGER note_end ON batchq.batches_live;
DROP TRIGGER count_items ON batchq.batches_finished;
DROP TRIGGER forget_failed_items ON batchq.batches;
DROP TRIGGER forget_flows ON batchq.batches;
DROP TRIGGER forget_parts ON batchq.batches

-- name: waiting_may_be_unregistered
ALTER TABLE batchq.batches DROP CONSTRAINT batches_waiting_is_counted;
ALTER TABLE batchq.batches
  ADD CONSTRAINT batches_waiting_is_counted CHECK (status <> 'waiting' OR coalesce(needs_left, 0) <> 0) NOT VALID;
COMMENT ON COLUMN batchq.batches.needs_left IS
  'Number of batches that a waiting batch still waits for; negative: no worker has registered yet that it waits.'

-- name: count_own_items
CREATE OR REPLACE FUNCTION batchq.count_own_items() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF jsonb_typeof(NEW.items) <> 'array' THEN
    RAISE EXCEPTION 'new row for relation "%" violates check constraint "batches_items_is_array"', TG_TABLE_NAME
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_items_is_array', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            DETAIL = format('items is a JSON %s, not an array.', jsonb_typeof(NEW.items));
  END IF;
  NEW.items_total := jsonb_array_length(NEW.items);
  RETURN NEW;
END $$;
COMMENT ON FUNCTION batchq.count_own_items IS
  'Trigger function: sets items_total of the row to the length of items, and refuses items that are not an array.';
REVOKE ALL ON FUNCTION batchq.count_own_items FROM PUBLIC;
CREATE OR REPLACE TRIGGER count_items BEFORE INSERT ON batchq.batches_live
  FOR EACH ROW WHEN (NEW.items IS NOT NULL OR NEW.items_total IS NOT NULL) EXECUTE FUNCTION batchq.count_own_items();
-- AFTER, since a BEFORE trigger makes Postgres read and lock each updated row once more. So it can refuse only.
CREATE OR REPLACE FUNCTION batchq.refuse_other_total() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF jsonb_typeof(NEW.items) <> 'array' OR jsonb_array_length(NEW.items) IS DISTINCT FROM NEW.items_total THEN
    RAISE EXCEPTION 'items_total must be the length of items' USING ERRCODE = 'check_violation',
      CONSTRAINT = 'batches_items_total_fits', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
      HINT = 'Set both: items = x, items_total = jsonb_array_length(x).';
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.refuse_other_total IS 'Trigger function: refuses an items_total that is not the length of items.';
REVOKE ALL ON FUNCTION batchq.refuse_other_total FROM PUBLIC;
CREATE OR REPLACE TRIGGER count_changed_items AFTER UPDATE OF items, items_total ON batchq.batches_live
  FOR EACH ROW EXECUTE FUNCTION batchq.refuse_other_total()

-- name: wait_unregistered
CREATE OR REPLACE FUNCTION batchq.wait_unregistered() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF cardinality(NEW.after) > 100000 OR array_position(NEW.after, NULL) IS NOT NULL OR NEW.status <> 'pending' THEN
    RAISE EXCEPTION 'after must have at most 100,000 ids, not %, no null among them, and the status be left out (batches_after_fits)',
        cardinality(NEW.after)
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_after_fits', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'For more, let a batch for each part of them wait, and one for all of these.';
  ELSIF NEW.id = ANY (NEW.after) THEN
    RAISE EXCEPTION 'batch % cannot wait for itself (batches_after_is_not_itself)', NEW.id
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_after_is_not_itself', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'Wait for batches that exist already.';
  END IF;
  NEW.needs_left := -cardinality(ARRAY(SELECT DISTINCT u FROM unnest(NEW.after) u));
  NEW.status := CASE WHEN NEW.needs_left = 0 THEN 'pending' ELSE 'waiting' END;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION batchq.wait_unregistered IS
  'Trigger function: a new batch with "after" waits until a worker has registered for what (batchq.collect_flows).';
REVOKE ALL ON FUNCTION batchq.wait_unregistered FROM PUBLIC;
CREATE OR REPLACE TRIGGER begin_waiting BEFORE INSERT ON batchq.batches_live
  FOR EACH ROW WHEN (NEW.after IS NOT NULL AND NEW.needs_left IS NULL) EXECUTE FUNCTION batchq.wait_unregistered()

-- name: collect_flows
-- A finished batch that is needed is itself the note of its end.
CREATE OR REPLACE FUNCTION batchq.collect_ends(in_queue text, ids bigint[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE found record; noted bigint[] := '{}';
BEGIN
  FOR found IN
    SELECT f.id, f.status, f.part_of, f.items_done, f.items_failed, f.errors -> -1 ->> 'error' AS error
    FROM batchq.batches_finished f
    WHERE f.queue = in_queue AND f.id = ANY (ids) AND f.is_needed FOR UPDATE SKIP LOCKED
  LOOP
    IF found.part_of IS NOT NULL THEN
      UPDATE batchq.parts p
      SET ended_as = found.status, items_done = found.items_done, items_failed = found.items_failed, error = left(found.error, 2000)
      WHERE p.part_id = found.id;
    END IF;
    INSERT INTO batchq.flow_events (needed_id, status) VALUES (found.id, found.status);
    noted := noted || found.id;
  END LOOP;
  UPDATE batchq.batches_finished f SET is_needed = NULL WHERE f.queue = in_queue AND f.id = ANY (noted) AND f.is_needed;
END $$;
-- Both are found by an index that has nothing else. A batch that is locked is left for the next time, and counts: a worker that drains
-- the queue must look again.
CREATE OR REPLACE FUNCTION batchq.collect_flows(most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE one record; found record; seen integer := 0;
BEGIN
  FOR one IN
    SELECT n.queue, array_agg(n.id) AS ids
    FROM (SELECT f.queue, f.id FROM batchq.batches_finished f WHERE f.is_needed LIMIT most) n GROUP BY n.queue
  LOOP
    PERFORM batchq.collect_ends(one.queue, one.ids);
    seen := seen + cardinality(one.ids);
  END LOOP;
  FOR one IN
    SELECT w.queue, array_agg(w.id) AS ids
    FROM (SELECT b.queue, b.id FROM batchq.batches_live b WHERE b.status = 'waiting' AND b.needs_left < 0 LIMIT most) w GROUP BY w.queue
  LOOP
    FOR found IN
      SELECT b.id, b.after, coalesce(b.on_failure, 'wait') AS on_failure FROM batchq.batches_live b
      WHERE b.queue = one.queue AND b.id = ANY (one.ids) AND b.status = 'waiting' AND b.needs_left < 0 FOR UPDATE SKIP LOCKED
    LOOP
      PERFORM batchq.register_waiting(one.queue, found.id, found.after, found.on_failure);
    END LOOP;
    seen := seen + cardinality(one.ids);
  END LOOP;
  RETURN seen;
END $$;
-- The caller has locked the batch. What is not there any more was completed and deleted meanwhile, unless its id is a later one.
CREATE OR REPLACE FUNCTION batchq.register_waiting(in_queue text, batch_id bigint, after bigint[], on_failure text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE ids bigint[] := ARRAY(SELECT DISTINCT u FROM unnest(after) u ORDER BY u); unknown bigint[];
BEGIN
  unknown := ARRAY(SELECT u FROM unnest(ids) u WHERE u NOT BETWEEN 1 AND batch_id
                   EXCEPT SELECT b.id FROM batchq.batches_live b WHERE b.id = ANY (ids)
                   EXCEPT SELECT f.id FROM batchq.batches_finished f WHERE f.id = ANY (ids));
  IF unknown <> '{}' THEN
    PERFORM batchq.cancel_live(in_queue, ARRAY[batch_id], '{waiting}',
      format('it cannot wait for %s: no batch has that id (batches_after_exist)', array_to_string(unknown[1:5], ', ')));
    RETURN;
  END IF;
  INSERT INTO batchq.needs (needed_id, batch_id, queue, on_failure)
  SELECT u, batch_id, in_queue, on_failure FROM unnest(ids) u
  ON CONFLICT ON CONSTRAINT needs_pkey DO UPDATE SET on_failure = excluded.on_failure, ended_as = NULL, at = now();
  INSERT INTO batchq.flow_events (needed_id) SELECT u FROM unnest(ids) u;
  UPDATE batchq.batches_live b SET needs_left = cardinality(ids) WHERE b.queue = in_queue AND b.id = batch_id;
END $$;
COMMENT ON FUNCTION batchq.register_waiting IS
  'Writes down in batchq.needs for which batches a locked batch waits; cancels it if one of them does not exist.';
REVOKE ALL ON FUNCTION batchq.register_waiting FROM PUBLIC

-- name: keep_what_is_needed
-- A batch that others wait for is kept, since its row is the note of its end.
CREATE OR REPLACE FUNCTION batchq.complete_and_forget(in_queue text, firsts bigint[], lengths integer[], numbers integer[], tokens uuid[])
RETURNS SETOF bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE one record; done bigint[];
BEGIN
  FOR one IN
    SELECT b.id, b.claim_token FROM batchq.batches_live b
    WHERE b.queue = in_queue AND b.is_needed AND b.claim_token = ANY (tokens)
      AND b.id = ANY (ARRAY(SELECT generate_series(r.first, r.first + r.length - 1) FROM unnest(firsts, lengths) AS r(first, length)))
    FOR UPDATE
  LOOP
    PERFORM batchq.finish_claim(in_queue, one.id, one.claim_token, 'completed', true);
    RETURN NEXT -one.id;
  END LOOP;
  WITH given AS (
    SELECT generate_series(run.first, run.first + run.length - 1) AS id, tokens[run.number] AS token
    FROM unnest(firsts, lengths, numbers) AS run(first, length, number)
  ), gone AS (
    DELETE FROM batchq.batches_live b
    USING given g
    WHERE b.queue = in_queue AND b.id = ANY (ARRAY(SELECT i.id FROM given i)) AND b.id = g.id AND b.claim_token = g.token
    RETURNING b.id
  )
  SELECT array_agg(g.id) INTO done FROM gone g;
  DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (done);
  RETURN QUERY SELECT d FROM unnest(done) d;
END $$

-- name: owners
-- A superuser may have made them. What is SECURITY DEFINER runs as the owner of the tables, and calls what is his.
DO $$
DECLARE one record;
BEGIN
  FOR one IN
    SELECT p.oid::regprocedure AS function, c.relowner::regrole AS owner
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_class c ON c.oid = 'batchq.batches'::regclass
    WHERE p.pronamespace = 'batchq'::regnamespace
      AND p.proowner <> c.relowner
  LOOP
    EXECUTE format('ALTER FUNCTION %s OWNER TO %s', one.function, one.owner);
  END LOOP;
END $$

-- name: settings_reach_nodes
DO $$ BEGIN
  EXECUTE format('ALTER DATABASE %I SET citus.propagate_set_commands = ''local''', current_database());
END $$

-- name: distribute_live
SELECT create_distributed_table('batchq.batches', 'queue', colocate_with => 'none')

-- name: distribute_finished
SELECT create_distributed_table('batchq.batches_finished', 'queue', colocate_with => 'batchq.batches')

-- name: distribute_failed_items
SELECT create_distributed_table('batchq.failed_items', 'queue', colocate_with => 'batchq.batches')

-- name: distribute_throughput
SELECT create_distributed_table('batchq.throughput_minutes', 'queue', colocate_with => 'batchq.batches')

-- name: distribute_needs
SELECT create_distributed_table('batchq.needs', 'queue', colocate_with => 'batchq.batches')

-- name: refusals
-- What keeps a database from being distributed: what it is, and what to do.
SELECT 'the bell is on: it is a trigger of batchq.batches', 'run: SELECT batchq.bell(false)'
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = 'batchq.batches'::regclass
  AND t.tgname = 'ring'
UNION ALL
SELECT format('queue %%s is split into shards', q.queue), 'this cannot be undone: restore a dump into a database that is distributed first'
FROM batchq.split_queues q
WHERE NOT %(is_distributed)s
UNION ALL
SELECT format('worker %%s is running', w.id), 'stop all workers first'
FROM batchq.workers w
WHERE w.heartbeat_at > now() - interval '1 minute'
UNION ALL
SELECT format('%%s has a trigger of yours: %%s', t.tgrelid::regclass, t.tgname), 'drop it: on a node it could reach no other table'
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = ANY (%(tables)s::regclass[])
  AND NOT t.tgisinternal
  AND t.tgparentid = 0
  AND t.tgname <> ALL (%(triggers)s)
  AND t.tgname NOT LIKE 'choose_shard_%%'
UNION ALL
SELECT format('%%s has row security', c.oid::regclass), format('run: ALTER TABLE %%s DISABLE ROW LEVEL SECURITY', c.oid::regclass)
FROM pg_catalog.pg_class c
WHERE c.oid = ANY (%(tables)s::regclass[])
  AND c.relrowsecurity
UNION ALL
SELECT format('foreign key %%s of %%s refers to %%s', f.conname, f.conrelid::regclass, f.confrelid::regclass), 'drop it'
FROM pg_catalog.pg_constraint f
WHERE f.contype = 'f'
  AND f.conparentid = 0
  AND (f.conrelid = ANY (%(tables)s::regclass[]) OR f.confrelid = ANY (%(tables)s::regclass[]))
UNION ALL
SELECT format('unique index %%s of %%s lacks the column queue', i.indexrelid::regclass, i.indrelid::regclass), 'drop it'
FROM pg_catalog.pg_index i
WHERE i.indrelid = ANY (%(tables)s::regclass[])
  AND i.indisunique
  AND i.indexrelid::regclass::text <> ALL (%(indexes)s)
  AND i.indexrelid::regclass::text NOT LIKE 'batchq.batches_live_unique_key_%%'
  AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = i.indrelid AND a.attname = 'queue' AND a.attnum = ANY (i.indkey))
ORDER BY 1

-- name: citus
-- Whether Citus is there, whether triggers are allowed, and how many nodes may hold data.
SELECT current_setting('citus.enable_unsafe_triggers', true) = 'on',
  (SELECT count(*) FROM pg_catalog.pg_dist_node n WHERE n.isactive AND n.shouldhaveshards)

-- name: distributed_tables
SELECT p.logicalrelid::regclass::text
FROM pg_catalog.pg_dist_partition p
WHERE p.partmethod = 'h'

-- name: is_owner
SELECT pg_has_role(c.relowner, 'USAGE')
FROM pg_catalog.pg_class c
WHERE c.oid = to_regclass('batchq.batches')

-- name: has_citus
SELECT count(*) > 0
FROM pg_catalog.pg_extension
WHERE extname = 'citus'

-- name: columns
-- Of a batch, as the view has them.
SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum)
FROM pg_catalog.pg_attribute
WHERE attrelid = 'batchq.batches'::regclass
  AND attnum > 0
  AND NOT attisdropped
