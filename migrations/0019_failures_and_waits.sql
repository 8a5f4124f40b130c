-- Failures in groups, and how long batches waited.
CREATE FUNCTION batchq.error_group(error text) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  line text COLLATE "C" := btrim(regexp_replace(left(split_part(ltrim(error, E' \t\r\n'), E'\n', 1), 500), '\s+', ' ', 'g'));
BEGIN
  IF line ~ '^worker died: ' THEN
    RETURN left(regexp_replace(line, '^worker died: [^ ]+', 'worker died: <worker>'), 300);
  END IF;
  IF line ~ '[''"`]' THEN  -- an apostrophe within a word, as in "can't", begins no value
    line := regexp_replace(line, '(?<![[:alnum:]])[bBeEnNrRuU]?(?:"[^"]*(?:"|$)|`[^`]*(?:`|$)'
      '|''(?:[^'']|''''|(?<=[[:alnum:]])''(?=[[:alnum:]]))*(?:''|$))', '<value>', 'g');
    line := regexp_replace(line, '<value>(?:, ?<value>)+', '<value>, ...', 'g');
  END IF;
  IF line ~ '\)=\(' THEN  -- Key (email)=(...)
    line := regexp_replace(line, '\)=\([^()]*(?:\)|$)', ')=(<value>)', 'g');
  END IF;
  IF line ~ '://' THEN
    line := regexp_replace(line, '\m[a-zA-Z][a-zA-Z0-9+.-]{1,20}://[^\s<>"'']*[^\s<>"''.,:;)\]]', '<url>', 'g');
  END IF;
  IF line ~ '@' THEN
    line := regexp_replace(line, '[[:alnum:]._%+-]{1,64}@[[:alnum:].-]{1,255}', '<email>', 'g');
  END IF;
  IF line ~ '[0-9]-[0-9]' THEN
    line := regexp_replace(line, '\m[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?'
      '(?: ?(?:Z|UTC|[+-][0-9]{2}:?(?:[0-9]{2})?))?)?\M', '<time>', 'g');
  END IF;
  IF line ~ '[0-9a-fA-F:][.:][0-9a-fA-F:]' THEN
    line := regexp_replace(line, '\m[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?:[:/][0-9]+)?\M|(?<![[:alnum:]:])(?:'
      '(?:[0-9a-fA-F]{1,4}:){3,7}[0-9a-fA-F]{1,4}|(?:[0-9a-fA-F]{1,4}:){1,6}(?::[0-9a-fA-F]{1,4}){1,6}'
      '|::[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4}){0,6})(?![[:alnum:]:])', '<address>', 'g');
    line := regexp_replace(line, '\m[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?\M', '<time>', 'g');
  END IF;
  IF line ~ '[0-9]' THEN
    -- UUIDs; hexadecimal numbers, from 8 digits on; names of 16 letters and digits with 3 digits or more.
    line := regexp_replace(line, '(?<![[:alnum:]])(?:[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|0[xX][0-9a-fA-F]+'
      '|(?=[0-9]*[a-fA-F])(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}'
      '|(?=(?:[a-zA-Z]*[0-9]){3})(?=[0-9]*[a-zA-Z])[0-9a-zA-Z]{16,})(?![[:alnum:]])', '<id>', 'g');
    -- Numbers, except codes of errors and one or two digits after a letter ("HTTP 404", "utf8").
    line := regexp_replace(line, '(?<![0-9])(?<![0-9]\.)(?:[0-9]{4,}|(?<!(?:errno|status|code|signal|http|http error|http/[0-9.]{1,4}'
      '|response \[)[ :=]{0,2})(?:(?<![[:alpha:]])[0-9]+|[0-9]{3,}))(?![0-9])(?:[.,_][0-9]+)*(?:[a-z]{1,3}[0-9]+)*'
      '(?! (?:Client|Server) Error)', '<n>', 'gi');
    line := regexp_replace(line, '<n>(?:, ?<n>)+', '<n>, ...', 'g');
  END IF;
  RETURN left(line, 300);
END $$;
COMMENT ON FUNCTION batchq.error_group IS
  'Returns what an error has in common with others like it: its first line, with <n>, <value>, <id>, <time>, <email>, <address>, '
  '<url> and <worker> in the place of numbers, quoted values and so on; at most 300 characters. Codes such as "HTTP 404" and '
  '"[Errno 111]" stay.';

CREATE OR REPLACE VIEW batchq.failures AS
SELECT kind, batchq.error_group(error) AS error, count(*) AS failures, max(finished_at) AS latest_at,
  min(finished_at) AS first_at, (array_agg(id ORDER BY finished_at DESC, id DESC))[1] AS example_id,
  (array_agg(left(error, 2000) ORDER BY finished_at DESC, id DESC))[1] AS example,
  array_agg(DISTINCT queue ORDER BY queue) AS queues
FROM batchq.latest_failures() GROUP BY 1, 2;
COMMENT ON VIEW batchq.failures IS
  'The latest 500 failed batches, grouped by kind and by what their last errors have in common: batchq.error_group.';
COMMENT ON COLUMN batchq.failures.error IS
  'What the last errors have in common: batchq.error_group. The filter error_group of batchq.bulk takes it.';
COMMENT ON COLUMN batchq.failures.example IS 'Last error of the batch example_id, cut at 2,000 characters.';
COMMENT ON COLUMN batchq.failures.queues IS 'Queues of these failures.';

-- As before; also by the group of the last error.
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
  in_group   text := filter ->> 'error_group';
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
      AND (in_group IS NULL OR batchq.error_group(coalesce(errors -> -1 ->> 'error', '')) = in_group)
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
  filters     constant text[] := '{queue,kind,key,status,error_like,error_group,older_than_seconds,before}';
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
  'error, or a pattern with %), error_group (as in batchq.failures.error), older_than_seconds (since the batch finished or, while it is live, was inserted), before '
  '(only what finished or was inserted before this time; default: the time of the first call). change: whole; '
  'delay_seconds or until; priority; to_queue. Continue with the next_place and the audit that are returned, until '
  'next_place is null; make each call in a transaction of its own. For another pass over what was left out, pass the time of '
  'the first call as "before". Batches that are locked, or that meet a live batch with their unique_key, are left out: they count in '
  'matched, not in changed; "keyed" counts the latter. With dry_run, nothing is changed.';

-- The same histogram of the times that batches waited. Workers of before know nothing of it: they add nothing to it.
ALTER TABLE batchq.throughput_minutes ADD COLUMN wait_times integer[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN batchq.throughput_minutes.wait_times IS
  'Histogram of the times from run_at until the handler began, of the attempts counted in the row; elements as in run_times.';

-- A chart of a day would read 1,440 minutes of each queue and kind, and one of a week 10,080.
CREATE TABLE batchq.throughput_spans (
  minutes smallint NOT NULL, starts_at timestamptz NOT NULL, queue text NOT NULL, kind text NOT NULL,
  completed bigint NOT NULL, failed bigint NOT NULL, cancelled bigint NOT NULL, retried bigint NOT NULL, items bigint NOT NULL,
  run_seconds float8 NOT NULL, run_times integer[] NOT NULL, wait_times integer[] NOT NULL,
  PRIMARY KEY (minutes, starts_at, queue, kind)
);
COMMENT ON TABLE batchq.throughput_spans IS
  'Sums of batchq.throughput_minutes for charts: one row per span of 15 or 120 minutes, queue and kind. Those of 15 minutes are '
  'kept for 2 days, the others for 7.';
COMMENT ON COLUMN batchq.throughput_spans.minutes IS 'Length of the span: 15 or 120 minutes.';
COMMENT ON COLUMN batchq.throughput_spans.starts_at IS 'Begin of the span, at a whole quarter of an hour or a whole even hour in UTC.';
COMMENT ON COLUMN batchq.throughput_spans.run_seconds IS 'Sum of the run times of all attempts counted in the row.';
COMMENT ON COLUMN batchq.throughput_spans.run_times IS 'Histogram of the run times: see batchq.throughput_minutes.';
COMMENT ON COLUMN batchq.throughput_spans.wait_times IS 'Histogram of the waits: see batchq.throughput_minutes.';

-- Called under the lock of batchq.merge_throughput. A span is added up once, when its minutes can change no more.
CREATE FUNCTION batchq.add_up_throughput() RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE span record; from_minute timestamptz; starts timestamptz; is_done boolean; made integer := 0;
  is_over timestamptz := date_trunc('minute', now()) - interval '2 minutes';
BEGIN
  FOR span IN
    SELECT minutes, minutes * interval '1 minute' AS length, kept, most
    FROM (VALUES (120, interval '7 days', 8), (15, interval '2 days', 50)) AS v(minutes, kept, most)
    ORDER BY minutes DESC  -- long spans first: those of 15 minutes then begin after them
  LOOP
    is_done := false;
    DELETE FROM batchq.throughput_spans s WHERE s.minutes = span.minutes AND s.starts_at < now() - span.kept;
    FOR n IN 1 .. span.most LOOP
      from_minute := (SELECT max(s.starts_at) + span.length FROM batchq.throughput_spans s WHERE s.minutes = span.minutes);
      from_minute := (SELECT min(t.minute) FROM batchq.throughput_minutes t
                      WHERE t.minute >= coalesce(from_minute, now() - span.kept));
      starts := date_bin(span.length, from_minute, '2000-01-01 00:00:00+00');
      is_done := starts IS NULL OR starts + span.length > is_over;
      EXIT WHEN is_done;
      INSERT INTO batchq.throughput_spans (minutes, starts_at, queue, kind, completed, failed, cancelled, retried, items,
        run_seconds, run_times, wait_times)
      SELECT span.minutes, starts, t.queue, t.kind, sum(t.completed), sum(t.failed), sum(t.cancelled), sum(t.retried), sum(t.items),
        sum(t.run_seconds), batchq.sum_counts(t.run_times), batchq.sum_counts(t.wait_times)
      FROM batchq.throughput_minutes t
      WHERE t.minute >= starts AND t.minute < starts + span.length
      GROUP BY t.queue, t.kind;
      made := made + 1;
    END LOOP;
    EXIT WHEN NOT is_done;
  END LOOP;
  RETURN made;
END $$;
COMMENT ON FUNCTION batchq.add_up_throughput IS
  'Adds up the minutes of finished spans into batchq.throughput_spans, and deletes old spans: a part of batchq.merge_throughput. '
  'Returns how many spans it added up: at most 58, so that after an upgrade a week takes some calls.';

-- As before; with the waits, and the spans.
CREATE OR REPLACE FUNCTION batchq.merge_throughput() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE merged integer := 0; made integer; one text; too_old timestamptz := now() - interval '7 days';
  is_over timestamptz := date_trunc('minute', now()) - interval '1 minute';
BEGIN
  IF NOT batchq.try_lock('throughput') THEN RETURN 0; END IF;
  FOR one IN SELECT DISTINCT t.queue FROM batchq.throughput_minutes t WHERE t.minute < too_old LOOP
    DELETE FROM batchq.throughput_minutes t WHERE t.queue = one AND t.minute < too_old;
  END LOOP;
  FOR one IN SELECT DISTINCT t.queue FROM batchq.throughput_minutes t WHERE t.worker <> '' AND t.minute < is_over LOOP
    WITH parts AS (
      DELETE FROM batchq.throughput_minutes t WHERE t.queue = one AND t.worker <> '' AND t.minute < is_over RETURNING t.*
    )
    INSERT INTO batchq.throughput_minutes AS t (minute, queue, kind, worker, completed, failed, cancelled, retried, items,
      run_seconds, run_times, wait_times)
    SELECT minute, queue, kind, '', sum(completed), sum(failed), sum(cancelled), sum(retried), sum(items),
      sum(run_seconds), batchq.sum_counts(run_times), batchq.sum_counts(wait_times)
    FROM parts GROUP BY minute, queue, kind
    ON CONFLICT (minute, queue, kind, worker) DO UPDATE
    SET completed = t.completed + excluded.completed, failed = t.failed + excluded.failed,
        cancelled = t.cancelled + excluded.cancelled, retried = t.retried + excluded.retried, items = t.items + excluded.items,
        run_seconds = t.run_seconds + excluded.run_seconds, run_times = batchq.add_counts(t.run_times, excluded.run_times),
        wait_times = batchq.add_counts(t.wait_times, excluded.wait_times);
    GET DIAGNOSTICS made = ROW_COUNT;
    merged := merged + made;
  END LOOP;
  PERFORM batchq.add_up_throughput();
  RETURN merged;
END $$;

CREATE OR REPLACE VIEW batchq.throughput AS
SELECT minute, queue, kind, completed, failed, cancelled, retried, items,
  round((run_seconds / nullif(completed + failed + cancelled + retried, 0))::numeric, 6)::float8 AS run_seconds_mean,
  percentiles[1] AS run_seconds_p50, percentiles[2] AS run_seconds_p95, percentiles[3] AS run_seconds_p99,
  waits[1] AS wait_seconds_p50, waits[2] AS wait_seconds_p95, waits[3] AS wait_seconds_p99
FROM (
  SELECT minute, queue, kind, sum(completed)::bigint AS completed, sum(failed)::bigint AS failed,
    sum(cancelled)::bigint AS cancelled, sum(retried)::bigint AS retried, sum(items)::bigint AS items,
    sum(run_seconds) AS run_seconds, batchq.sum_counts(run_times) AS run_times,
    batchq.sum_counts(wait_times) AS wait_times
  FROM batchq.throughput_minutes GROUP BY minute, queue, kind
) merged
CROSS JOIN LATERAL (
  SELECT batchq.run_time_percentiles(run_times, '{0.50,0.95,0.99}') AS percentiles,
    batchq.run_time_percentiles(wait_times, '{0.50,0.95,0.99}') AS waits
  OFFSET 0  -- otherwise each of the six columns would compute them again
) times;
COMMENT ON COLUMN batchq.throughput.wait_seconds_p50 IS 
  'Time from run_at until the handler began that half of the attempts did not exceed, to within 19 %.';
COMMENT ON COLUMN batchq.throughput.wait_seconds_p95 IS 'The same for 95 % of the attempts.';
COMMENT ON COLUMN batchq.throughput.wait_seconds_p99 IS 'The same for 99 % of the attempts.';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.grant_to_readers('batchq.failures', 'EXECUTE ON FUNCTION batchq.error_group(text)');
