-- What a function does must not depend on how its caller's session writes and reads values. Under
-- standard_conforming_strings = off, \d in a pattern was d: batchq.prune found no partition, and said nothing. It counts days
-- in UTC, not in a time zone whose days may have 23 hours. Under DateStyle = 'SQL, YMD' no partition could be made: its
-- bounds, written as that says, were not read so. Under extra_float_digits = -15, batchq.bulk took 7,200 s for 7,000 s.

CREATE OR REPLACE FUNCTION batchq.prune(older_than interval)
RETURNS integer
LANGUAGE plpgsql
AS $$
DECLARE
  most           constant integer := 10;
  first_kept_day date := (now() AT TIME ZONE 'UTC') - older_than;
  partition      record;
  dropped        integer := 0;
BEGIN
  IF older_than < interval '0' THEN
    RAISE EXCEPTION 'batchq.prune takes an interval from 0 up, not %', older_than;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtextextended('batchq.partitions', 0));
  FOR partition IN
    SELECT c.relname
    FROM pg_inherits i
    JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'batchq.batches_finished'::regclass
      AND c.relname ~ '^finished_[0-9]{8}$'
      AND to_date(right(c.relname, 8), 'YYYYMMDD') < first_kept_day
    ORDER BY c.relname
    LIMIT most
  LOOP
    EXECUTE format('DROP TABLE batchq.%I', partition.relname);
    dropped := dropped + 1;
  END LOOP;
  -- This looks over all days that are left, so only once they are few.
  IF dropped < most THEN
    DELETE FROM batchq.finished_default f
    WHERE f.ctid = ANY (ARRAY(SELECT d.ctid FROM batchq.finished_default d
                              WHERE d.finished_at < first_kept_day::timestamp AT TIME ZONE 'UTC' LIMIT 10000));
    DELETE FROM batchq.failed_items f
    WHERE f.ctid = ANY (ARRAY(SELECT o.ctid FROM batchq.failed_items o
                              WHERE o.failed_at < first_kept_day::timestamp AT TIME ZONE 'UTC'
                                AND NOT EXISTS (SELECT FROM batchq.batches b WHERE b.id = o.batch_id) LIMIT 10000));
  END IF;
  RETURN dropped;
END
$$;

CREATE OR REPLACE FUNCTION batchq.create_finished_partitions(first_day date, days integer)
RETURNS integer
LANGUAGE plpgsql
AS $$
DECLARE
  day      date;
  name     text;
  created  integer := 0;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('batchq.partitions', 0));
  FOR offset_days IN 0 .. days - 1 LOOP
    day  := first_day + offset_days;
    name := 'finished_' || to_char(day, 'YYYYMMDD');
    CONTINUE WHEN to_regclass('batchq.' || name) IS NOT NULL;
    BEGIN
      -- Made alone and then attached: that takes no lock which finishing workers would wait for.
      EXECUTE format('CREATE TABLE batchq.%I (LIKE batchq.batches_finished INCLUDING ALL EXCLUDING INDEXES EXCLUDING IDENTITY)', name);
      -- A finished batch is only deleted by a retry, so the whole row may serve; a unique index would cost each finish.
      EXECUTE format('ALTER TABLE batchq.%I REPLICA IDENTITY FULL', name);
      EXECUTE format('ALTER TABLE batchq.batches_finished ATTACH PARTITION batchq.%I FOR VALUES FROM (%L) TO (%L)',
                     name, to_char(day, 'YYYY-MM-DD 00:00:00+00'), to_char(day + 1, 'YYYY-MM-DD 00:00:00+00'));
      created := created + 1;
    EXCEPTION WHEN check_violation THEN
      RAISE NOTICE 'batchq: finished_default already has batches of %, so they stay there', day;
    END;
  END LOOP;
  RETURN created;
END
$$;

CREATE OR REPLACE FUNCTION batchq.bulk(verb text, filter jsonb DEFAULT '{}', change jsonb DEFAULT '{}', place jsonb DEFAULT NULL,
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
  IF verb IN ('snooze', 'set_priority', 'move') THEN  -- what is as wanted already is no match: done again, a verb leaves nothing out
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
