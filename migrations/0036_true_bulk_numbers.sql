-- A verb in bulk makes up to three passes, for what was locked. Each pass took its own time as its beginning, so a retry of
-- batches that fail again at once took most of them twice, and counted them twice. "before" in the filter is one time
-- for the count and for all passes. What was left out is reported by its reason. An age keeps all of its digits, whatever
-- extra_float_digits the session has: at -15, 7,000 s became 7,200.

DROP FUNCTION batchq.bulk(text, jsonb, jsonb, jsonb, boolean, integer, text, text, bigint);

CREATE FUNCTION batchq.bulk(verb text, filter jsonb DEFAULT '{}', change jsonb DEFAULT '{}', place jsonb DEFAULT NULL,
  dry_run boolean DEFAULT false, most integer DEFAULT 1000, reason text DEFAULT NULL, actor text DEFAULT NULL,
  audit_id bigint DEFAULT NULL)
RETURNS TABLE (matched integer, changed integer, next_place jsonb, audit bigint, keyed integer)
LANGUAGE plpgsql
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
