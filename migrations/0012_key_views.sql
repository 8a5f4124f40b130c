-- What people see of keys: a view of them, and a filter by key in bulk actions.
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
    (SELECT b.id, b.queue, b.kind, b.key, b.status, b.created_at AS at, b.errors, b.items_failed
     FROM batchq.batches_live b
     WHERE is_live AND b.id > after_id
     ORDER BY b.id LIMIT examined)
    UNION ALL
    (SELECT b.id, b.queue, b.kind, b.key, b.status, b.finished_at, b.errors, b.items_failed
     FROM batchq.batches_finished b
     WHERE from_status = 'failed' AND b.status = 'failed'
       AND b.finished_at >= after_at AND (b.finished_at, b.id) > (after_at, after_id)
     ORDER BY b.finished_at, b.id LIMIT examined)
    UNION ALL
    (SELECT b.id, b.queue, b.kind, b.key, b.status, b.finished_at, b.errors, b.items_failed
     FROM batchq.batches_finished b
     WHERE from_status IN ('completed', 'cancelled') AND b.id > after_id
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

CREATE OR REPLACE FUNCTION batchq.bulk(verb text, filter jsonb DEFAULT '{}', change jsonb DEFAULT '{}', place jsonb DEFAULT NULL,
  dry_run boolean DEFAULT false, most integer DEFAULT 1000, reason text DEFAULT NULL, actor text DEFAULT NULL,
  audit_id bigint DEFAULT NULL)
RETURNS TABLE (matched integer, changed integer, next_place jsonb, audit bigint, keyed integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
  filters     constant text[] := '{queue,kind,key,status,error_like,older_than_seconds,before}';
  is_change   boolean := verb IN ('snooze', 'set_priority', 'move');
  is_retry    boolean := verb IN ('retry', 'retry_items');
  whole       boolean := coalesce((change ->> 'whole')::boolean, false);
  statuses    text[] := CASE WHEN verb = 'cancel' THEN '{live,pending,processing,waiting}' WHEN is_change THEN '{pending}'
                             WHEN is_retry THEN '{failed,cancelled,completed}' END;
  from_status text := coalesce(filter ->> 'status', statuses[1]);
  began_at    timestamptz := coalesce((filter ->> 'before')::timestamptz, (place ->> 2)::timestamptz, now());
  -- Relative to the beginning: a batch that becomes old enough during the action was not counted.
  older_than  float8 := coalesce((filter ->> 'older_than_seconds')::float8, 0) + extract(epoch FROM now() - began_at);
  new_run_at  timestamptz := coalesce((change ->> 'until')::timestamptz,
                                      began_at + (change ->> 'delay_seconds')::float8 * interval '1 second');
  found       record;
  part        record;
  done        record;
BEGIN
  IF statuses IS NULL THEN
    RAISE EXCEPTION 'batchq.bulk has no verb %', quote_nullable(verb)
      USING HINT = 'cancel, retry, retry_items, snooze, set_priority, move';
  ELSIF filter - filters <> '{}' THEN
    RAISE EXCEPTION 'batchq.bulk has no filter %', filter - filters USING HINT = array_to_string(filters, ', ');
  ELSIF num_nonnulls(change ->> 'delay_seconds', change ->> 'until') <> (verb = 'snooze')::integer
     OR (change ->> 'priority' IS NOT NULL) <> (verb = 'set_priority')
     OR (change ->> 'to_queue' IS NOT NULL) <> (verb = 'move') THEN
    RAISE EXCEPTION 'batchq.bulk: % does not fit the verb %', change, verb
      USING HINT = 'snooze takes delay_seconds or until, set_priority takes priority, move takes to_queue';
  ELSIF NOT from_status = ANY (statuses) THEN
    RAISE EXCEPTION 'batchq.bulk: % does not apply to batches that are %', verb, from_status
      USING HINT = 'It applies to those that are ' || array_to_string(array_remove(statuses, 'live'), ' or ');
  END IF;

  found := batchq.bulk_find(filter - 'before' || jsonb_build_object('older_than_seconds', older_than::numeric), from_status,
    verb = 'retry_items' OR (verb = 'retry' AND from_status = 'completed' AND NOT whole),
    coalesce((place ->> 0)::timestamptz, '-infinity'), coalesce((place ->> 1)::bigint, 0), most);
  matched := cardinality(found.ids);
  IF is_change THEN  -- a batch that is already as requested does not match
    matched := (SELECT count(*) FROM batchq.batches_live b WHERE b.id = ANY (found.ids)
                AND (b.run_at <> new_run_at OR b.priority <> (change ->> 'priority')::integer OR b.queue <> change ->> 'to_queue'));
  END IF;
  changed := 0;
  keyed := 0;
  FOR part IN
    SELECT u.queue, array_agg(u.id) AS ids
    FROM unnest(found.ids, found.queues) AS u(id, queue)
    WHERE NOT dry_run AND matched > 0
    GROUP BY u.queue
    ORDER BY u.queue  -- in one order, so that two bulk actions do not wait for each other
  LOOP
    IF is_change THEN
      done := batchq.change_pending(part.queue, part.ids, new_run_at, (change ->> 'priority')::integer, change ->> 'to_queue');
    ELSIF is_retry THEN
      done := batchq.revive(part.queue, part.ids, from_status, whole, found.first_at, found.last_at);
    ELSE
      SELECT batchq.cancel_live(part.queue, part.ids, CASE from_status WHEN 'live' THEN '{pending,processing,waiting}'
                                ELSE ARRAY[from_status] END, coalesce(reason, 'in bulk')) AS changed, 0 AS keyed INTO done;
    END IF;
    changed := changed + done.changed;
    keyed := keyed + done.keyed;
  END LOOP;
  IF changed > 0 AND audit_id IS NULL THEN
    audit_id := batchq.note_verb(verb, changed, NULL, filter ->> 'queue', filter ->> 'kind',
                                 jsonb_build_object('filter', filter) || change, reason, actor);
  ELSIF changed > 0 THEN
    UPDATE batchq.audit a SET batches = a.batches + changed WHERE a.id = audit_id;
  END IF;
  next_place := CASE WHEN NOT found.is_end THEN jsonb_build_array(found.next_at, found.next_id, began_at) END;
  audit := audit_id;
  RETURN NEXT;
END $$;

COMMENT ON FUNCTION batchq.bulk IS
  'Runs one step of a bulk action: acts on the next batches that a filter matches, "most" of them, among the next 20,000. '
  'verb: cancel, retry, retry_items, snooze, set_priority, move. filter: queue, kind, key, status, error_like (part of the last '
  'error, or a pattern with %), older_than_seconds (since the batch finished or, while it is live, was inserted), before '
  '(only what finished or was inserted before this time; default: the time of the first call). change: whole; '
  'delay_seconds or until; priority; to_queue. Continue with the next_place and the audit that are returned, until '
  'next_place is null; make each call in a transaction of its own. For another pass over what was left out, pass the time of '
  'the first call as "before". Batches that are locked, or that meet a live batch with their unique_key, are left out: they count in '
  'matched, not in changed; "keyed" counts the latter. With dry_run, nothing is changed.';

-- From key to key by the indexes of keys. SECURITY DEFINER, since a reader of batchq.keys need not be allowed to read partitions.
CREATE FUNCTION batchq.count_keys(most_keys integer DEFAULT 1000, most_per_key integer DEFAULT 100, in_queue text DEFAULT NULL)
RETURNS TABLE (queue text, key text, waiting bigint, scheduled bigint, running bigint, oldest_at timestamptz, is_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE found record; last_queue text := coalesce(in_queue, ''); last_key text := '';
BEGIN
  FOR i IN 1 .. most_keys LOOP
    SELECT n.queue, n.key INTO found
    FROM ((SELECT b.queue, b.key FROM batchq.batches_live b
           WHERE b.status = 'pending' AND b.key IS NOT NULL AND (b.queue, b.key) > (last_queue, last_key)
           ORDER BY b.queue, b.key LIMIT 1)
          UNION ALL
          (SELECT b.queue, b.key FROM batchq.batches_live b
           WHERE b.claimed_at IS NOT NULL AND b.key IS NOT NULL AND (b.queue, b.key) > (last_queue, last_key)
           ORDER BY b.queue, b.key LIMIT 1)) n
    ORDER BY n.queue, n.key COLLATE "C" LIMIT 1;
    EXIT WHEN found.queue IS NULL OR found.queue <> in_queue;
    last_queue := found.queue;
    queue := last_queue;
    last_key := found.key;
    key := last_key;
    SELECT count(*) FILTER (WHERE p.run_at <= now()), count(*) FILTER (WHERE p.run_at > now()), min(p.run_at), count(*) > most_per_key
    INTO waiting, scheduled, oldest_at, is_estimate
    FROM (SELECT b.run_at FROM batchq.batches_live b
          WHERE b.queue = last_queue AND b.status = 'pending' AND b.key = last_key
          ORDER BY b.priority, b.run_at, b.id LIMIT most_per_key + 1) p;
    SELECT count(*) INTO running
    FROM (SELECT 1 FROM batchq.batches_live b
          WHERE b.queue = last_queue AND b.key = last_key AND b.claimed_at IS NOT NULL AND b.lease_expires_at > '-infinity'
          ORDER BY b.lease_expires_at LIMIT most_per_key + 1) r;
    is_estimate := is_estimate OR running > most_per_key;
    RETURN NEXT;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.count_keys IS
  'Counts the live batches of the first most_keys keys (of one queue, or of all), up to most_per_key of each; is_estimate: there are more.';

CREATE VIEW batchq.keys AS
SELECT queue, key, waiting, scheduled, running, CASE WHEN oldest_at <= now() THEN now() - oldest_at END AS oldest_wait, is_estimate
FROM batchq.count_keys();
COMMENT ON VIEW batchq.keys IS 'The first 1,000 keys that have live batches, in the order of queue and key; at most 100 of each are counted.';
COMMENT ON COLUMN batchq.keys.key IS 'Key of the batches: batchq.batches.key.';
COMMENT ON COLUMN batchq.keys.waiting IS 'Pending batches that are ready, but for the limits of the key.';
COMMENT ON COLUMN batchq.keys.scheduled IS 'Pending batches with a run_at in the future, including retries.';
COMMENT ON COLUMN batchq.keys.running IS 'Batches that are processing.';
COMMENT ON COLUMN batchq.keys.oldest_wait IS 'Waiting time of the batch that has been ready for longest, of those counted.';
COMMENT ON COLUMN batchq.keys.is_estimate IS 'Whether there are more batches of the key than were counted.';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.give_replica_identities();
