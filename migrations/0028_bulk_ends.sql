-- A verb in bulk ends: what has finished, or was inserted, since its first chunk is not its own. Without that, a retry of
-- batches that fail again at once found them again for ever.

CREATE OR REPLACE FUNCTION batchq.bulk(verb text, filter jsonb DEFAULT '{}', change jsonb DEFAULT '{}', place jsonb DEFAULT NULL,
  dry_run boolean DEFAULT false, most integer DEFAULT 1000, reason text DEFAULT NULL, actor text DEFAULT NULL,
  audit_id bigint DEFAULT NULL)
RETURNS TABLE (matched integer, changed integer, next_place jsonb, audit bigint)
LANGUAGE plpgsql
AS $$
#variable_conflict use_variable
DECLARE
  whole       boolean := coalesce((change ->> 'whole')::boolean, false);
  known       text[];
  from_status text;
  found       record;
  began_at    timestamptz := coalesce((place ->> 2)::timestamptz, now());
  older_than  float8 := greatest((filter ->> 'older_than_seconds')::float8, extract(epoch FROM now() - began_at));
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
  IF filter - '{queue,kind,status,error_like,older_than_seconds}'::text[] <> '{}' THEN
    RAISE EXCEPTION 'batchq.bulk knows no filter %', filter - '{queue,kind,status,error_like,older_than_seconds}'::text[]
      USING HINT = 'queue, kind, status, error_like, older_than_seconds';
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

  found := batchq.bulk_find(filter || jsonb_build_object('older_than_seconds', older_than), from_status,
    verb = 'retry_items' OR (verb = 'retry' AND from_status = 'completed' AND NOT whole),
    coalesce((place ->> 0)::timestamptz, '-infinity'), coalesce((place ->> 1)::bigint, 0), most);
  matched := cardinality(found.ids);
  IF verb IN ('set_priority', 'move') THEN  -- what is as wanted already is no match: done again, a verb leaves nothing out
    matched := (SELECT count(*) FROM batchq.batches_live b WHERE b.id = ANY (found.ids)
                AND (b.priority <> (change ->> 'priority')::integer OR b.queue <> change ->> 'to_queue'));
  END IF;
  changed := 0;
  IF NOT dry_run AND matched > 0 THEN
    changed := CASE
      WHEN verb = 'cancel' THEN batchq.bulk_cancel(found.ids,
        CASE from_status WHEN 'live' THEN '{pending,processing}' ELSE ARRAY[from_status] END, coalesce(reason, 'in bulk'))
      WHEN verb IN ('retry', 'retry_items') THEN batchq.bulk_retry(found.ids, from_status, found.first_at, found.last_at, whole)
      ELSE batchq.bulk_change(found.ids,
        coalesce((change ->> 'until')::timestamptz, now() + (change ->> 'delay_seconds')::float8 * interval '1 second'),
        (change ->> 'priority')::integer, change ->> 'to_queue')
    END;
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
