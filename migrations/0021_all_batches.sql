-- One name for all batches, live and finished: batchq.all_batches. What reads both reads it, and what writes names batches_live or
-- batches_finished. So a layout in which finished batches are a table of their own needs other tables, and no other statements
-- (batchq distribute, for Citus). Here batchq.batches has both, and the view costs nothing.
CREATE VIEW batchq.all_batches WITH (security_invoker = true) AS
SELECT * FROM batchq.batches;
COMMENT ON VIEW batchq.all_batches IS
  'All batches, live and finished: the columns of batchq.batches. To read; to enqueue, INSERT INTO batchq.batches.';
-- Whoever may read batchq.batches reads it here, with his own rights: row security stays what it is.
SELECT batchq.grant_to_readers('batchq.batches', 'SELECT ON batchq.all_batches');

-- ---------------------------------------------------------------------------------------------------------------- for migrations

-- A function or view is changed by its text where few words of many lines are different. What it becomes is in \sf, \sv and \d+.
CREATE FUNCTION batchq.amended(definition text, changes text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  FOR i IN 1 .. cardinality(changes) BY 2 LOOP
    IF position(changes[i] IN definition) = 0 THEN
      RAISE EXCEPTION 'this migration knows another definition: here is no text "%"', changes[i] USING DETAIL = definition;
    END IF;
    definition := replace(definition, changes[i], changes[i + 1]);
  END LOOP;
  RETURN definition;
END $$;
COMMENT ON FUNCTION batchq.amended IS
  'Returns a definition with texts changed: each text that is there, followed by what comes in its place. Refuses one that is not there.';

CREATE FUNCTION batchq.amend(function regproc, changes text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET quote_all_identifiers = off AS $$ BEGIN
  EXECUTE batchq.amended(pg_get_functiondef(function), changes);
END $$;
COMMENT ON FUNCTION batchq.amend IS 'Changes texts in the definition of a function; see batchq.amended. For migrations.';

CREATE FUNCTION batchq.amend_view(relation regclass, changes text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET quote_all_identifiers = off AS $$
DECLARE options text := (SELECT 'WITH (' || array_to_string(c.reloptions, ', ') || ')' FROM pg_class c WHERE c.oid = relation);
BEGIN
  EXECUTE format('CREATE OR REPLACE VIEW %s %s AS ', relation, options) || batchq.amended(pg_get_viewdef(relation), changes);
END $$;
COMMENT ON FUNCTION batchq.amend_view IS 'Changes texts in the definition of a view; see batchq.amended. For migrations.';

-- ------------------------------------------------------------------------------------------------- what reads live and finished

SELECT batchq.amend('batchq.prune', ARRAY['FROM batchq.batches b', 'FROM batchq.all_batches b']);
SELECT batchq.amend('batchq.lock_batch', ARRAY['FROM batchq.batches b', 'FROM batchq.all_batches b',
  'NOT p.is_gathered ORDER BY b.id', 'NOT p.is_gathered AND b.queue = lock_batch.queue ORDER BY b.id']);
SELECT batchq.amend('batchq.prune_parts', ARRAY['FROM batchq.batches b', 'FROM batchq.all_batches b']);
SELECT batchq.amend('batchq.enqueue_copy', ARRAY['FROM batchq.batches b', 'FROM batchq.all_batches b']);
-- Where no trigger can count, needs_left is negative until a worker has registered for what the batch waits.
SELECT batchq.amend_view('batchq.status', ARRAY['batchq.batches b', 'batchq.all_batches b',
  'b.needs_left,', 'abs(b.needs_left) AS needs_left,']);
SELECT batchq.amend_view('batchq.schedule_status', ARRAY['batchq.batches b', 'batchq.all_batches b']);

-- ----------------------------------------------------------------------------------------------------------------- what writes

-- What is finished goes into batches_finished, as the workers write it, and says whether others need it.
SELECT batchq.amend('batchq.cancel_live', ARRAY['INSERT INTO batchq.batches (', 'INSERT INTO batchq.batches_finished (',
  'needs_left, spread, part_of, finished_at', 'needs_left, is_needed, spread, part_of, finished_at',
  'g.needs_left, g.spread', 'g.needs_left, g.is_needed, g.spread',
  '    FOR one IN SELECT DISTINCT u.whole', E'    PERFORM batchq.collect_ends(in_queue, part_ids);\n    FOR one IN SELECT DISTINCT u.whole']);
SELECT batchq.amend('batchq.count_items', ARRAY['UPDATE batchq.batches b', 'UPDATE batchq.batches_finished b']);
-- Each write names the queue of the batch that waits.
SELECT batchq.amend('batchq.count_needs', ARRAY['WHERE e.batch_id = ANY (free) AND n.needed_id = e.id',
  'WHERE n.queue = in_queue AND e.batch_id = ANY (free) AND n.needed_id = e.id']);

CREATE OR REPLACE FUNCTION batchq.prune_needs(older_than interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE deleted integer := 0; more integer; one text; cutoff timestamptz := now() - older_than;
BEGIN
  FOR one IN SELECT DISTINCT n.queue FROM batchq.needs n WHERE n.at < cutoff LOOP
    DELETE FROM batchq.needs n
    WHERE n.queue = one AND n.ctid = ANY (ARRAY(
      SELECT o.ctid FROM batchq.needs o
      WHERE o.queue = one AND o.at < cutoff
        AND NOT EXISTS (SELECT 1 FROM batchq.batches_live b WHERE b.queue = one AND b.id = o.batch_id) LIMIT 10000));
    GET DIAGNOSTICS more = ROW_COUNT;
    deleted := deleted + more;
  END LOOP;
  RETURN deleted;
END $$;
COMMENT ON FUNCTION batchq.prune_needs IS
  'Deletes rows of batchq.needs, up to 10,000 per queue, of batches that began to wait before now() - older_than and are not live. '
  'Returns how many.';

-- The second statement has a newer snapshot than the locks of the first: it sees what a checkpoint of the same claim committed while
-- the first waited for it.
CREATE FUNCTION batchq.complete_and_forget(in_queue text, firsts bigint[], lengths integer[], numbers integer[], tokens uuid[])
RETURNS SETOF bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE done bigint[]; needed bigint[];
BEGIN
  WITH given AS (
    SELECT generate_series(run.first, run.first + run.length - 1) AS id, tokens[run.number] AS token
    FROM unnest(firsts, lengths, numbers) AS run(first, length, number)
  ), gone AS (
    DELETE FROM batchq.batches_live b
    USING given g
    WHERE b.queue = in_queue AND b.id = ANY (ARRAY(SELECT i.id FROM given i)) AND b.id = g.id AND b.claim_token = g.token
    RETURNING b.id, b.is_needed
  )
  SELECT array_agg(g.id), array_agg(g.id) FILTER (WHERE g.is_needed) INTO done, needed FROM gone g;
  DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = ANY (done);
  RETURN QUERY SELECT CASE WHEN d = ANY (needed) THEN -d ELSE d END FROM unnest(done) d;
END $$;
COMMENT ON FUNCTION batchq.complete_and_forget IS
  'Deletes batches that have completed, with their failed items, if the claims are held. Runs of ids: the first, how many, and which of '
  'the tokens they have. Returns the ids, negative for those that others wait for.';
SELECT batchq.amend('batchq.complete', ARRAY[
  E'PERFORM batchq.forget_failed_items(b.queue, complete.id);\n    DELETE FROM batchq.batches_live l WHERE l.queue = b.queue '
  'AND l.id = complete.id AND l.claim_token = complete.claim_token;',
  'PERFORM batchq.complete_and_forget(b.queue, ARRAY[complete.id], ''{1}'', ''{1}'', ARRAY[complete.claim_token]);']);

-- --------------------------------------------------------------------------------------------- flows, where no trigger can help

CREATE FUNCTION batchq.collect_ends(in_queue text, ids bigint[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  -- Here the trigger note_end has written them down.
END $$;
COMMENT ON FUNCTION batchq.collect_ends IS
  'Writes down the ends of needed batches of a queue, where no trigger has; see batchq.collect_flows.';

CREATE FUNCTION batchq.collect_flows(most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  RETURN 0;
END $$;
COMMENT ON FUNCTION batchq.collect_flows IS
  'Writes down in batchq.flow_events what workers have to do for flows. Here there is nothing: triggers did it at once. batchq '
  'distribute replaces it, since no trigger of a distributed table may do so.';
-- What no trigger has written down comes first.
SELECT batchq.amend('batchq.follow_flows', ARRAY[E'BEGIN\n', E'BEGIN\n  PERFORM batchq.collect_flows(most);\n']);
SELECT batchq.amend('batchq.run_anyway', ARRAY[E'BEGIN\n', E'BEGIN\n  PERFORM batchq.collect_flows(10000);\n']);
SELECT batchq.amend('batchq.cancel_with_dependents', ARRAY[E'BEGIN\n', E'BEGIN\n  PERFORM batchq.collect_flows(10000);\n']);

-- ---------------------------------------------------------------------------------------------------------------------- rights

SELECT batchq.amend_view('batchq.duties', ARRAY['batches_finished,failed_items', 'batches_finished,all_batches,failed_items',
  'spread_batch,prune_parts,', 'spread_batch,prune_parts,complete_and_forget,collect_flows,']);
SELECT batchq.renew_duties();
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
