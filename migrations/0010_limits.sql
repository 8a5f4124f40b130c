-- Limits of a queue or kind, that hold for all workers together: how many batches run at the same time, how many batches and items
-- begin per second. Each worker holds a leased share of a limit, and asks nobody while it uses it; see batchq.take_shares.
CREATE TABLE batchq.limits (
  queue               text    NOT NULL DEFAULT 'default'
                              CONSTRAINT limits_queue_is_named CHECK (octet_length(queue) BETWEEN 1 AND 128),
  kind                text    CONSTRAINT limits_kind_is_named CHECK (octet_length(kind) BETWEEN 1 AND 200),
  max_running         integer CONSTRAINT limits_max_running_is_not_negative CHECK (max_running >= 0),
  per_second          float8  CONSTRAINT limits_per_second_is_not_negative CHECK (per_second >= 0 AND per_second <> 'NaN'),
  items_per_second    float8  CONSTRAINT limits_items_per_second_is_not_negative
                              CHECK (items_per_second >= 0 AND items_per_second <> 'NaN'),
  burst_seconds       float8  NOT NULL DEFAULT 1 CONSTRAINT limits_burst_is_positive CHECK (burst_seconds BETWEEN 0.001 AND 3600),
  max_running_per_key integer CONSTRAINT limits_max_running_per_key_is_not_negative CHECK (max_running_per_key >= 0),
  CONSTRAINT limits_one_each UNIQUE NULLS NOT DISTINCT (queue, kind),
  CONSTRAINT limits_limit_something CHECK (num_nonnulls(max_running, per_second, items_per_second, max_running_per_key) > 0)
);
COMMENT ON TABLE batchq.limits IS
  'Limits, at most one row per queue and kind. INSERT, UPDATE and DELETE change them, or batchq.set_limit; workers follow within two '
  'seconds. A number here is valid instead of the one that the code declares (batchq.declared_limits); null: the code''s is valid. '
  'The limits of a kind and of its whole queue are valid together. 0 pauses; ''infinity'' or 2147483647 lifts a declared limit.';
COMMENT ON COLUMN batchq.limits.queue IS 'Queue that is limited.';
COMMENT ON COLUMN batchq.limits.kind IS 'Kind that is limited within the queue; null: all kinds of the queue together.';
COMMENT ON COLUMN batchq.limits.max_running IS 'How many batches run at the same time, counted from the claim until the finish.';
COMMENT ON COLUMN batchq.limits.per_second IS 'How many batches begin per second.';
COMMENT ON COLUMN batchq.limits.items_per_second IS 'For how many items per second an item handler is called.';
COMMENT ON COLUMN batchq.limits.burst_seconds IS
  'For how many seconds what per_second and items_per_second leave unused can be made up for: at most this many seconds'' worth '
  'begins at once, but at least one.';
COMMENT ON COLUMN batchq.limits.max_running_per_key IS
  'How many batches with the same batchq.batches.key run at the same time. 1: they run strictly in order.';

-- What the code of workers declares, as of the worker that started last.
CREATE TABLE batchq.declared_limits (
  queue text NOT NULL, kind text NOT NULL, max_running integer, per_second float8, items_per_second float8,
  burst_seconds float8 NOT NULL DEFAULT 1, max_running_per_key integer, declared_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (queue, kind)
);
COMMENT ON TABLE batchq.declared_limits IS
  'Limits that handlers declare in code, written by each worker when it starts; the worker that started last is right. A number in '
  'batchq.limits is valid instead.';
COMMENT ON COLUMN batchq.declared_limits.declared_at IS 'Time when a worker last declared it.';

-- "Throttled": a handler was told to slow down (429), so its kind, or one key, waits everywhere.
CREATE TABLE batchq.throttles (
  queue text NOT NULL, kind text NOT NULL DEFAULT '', key text NOT NULL DEFAULT '', until timestamptz NOT NULL,
  throttled_at timestamptz NOT NULL DEFAULT now(), worker text,
  PRIMARY KEY (queue, kind, key)
);
COMMENT ON TABLE batchq.throttles IS
  'Pauses that handlers asked for by raising batchq.Throttled. They end by themselves; batchq.end_throttle ends one earlier.';
COMMENT ON COLUMN batchq.throttles.queue IS 'Queue of the batches that wait.';
COMMENT ON COLUMN batchq.throttles.kind IS 'Kind that waits; empty: all kinds of the queue.';
COMMENT ON COLUMN batchq.throttles.key IS 'Key that waits; empty: batches with and without a key.';
COMMENT ON COLUMN batchq.throttles.until IS 'Time when batches may begin again.';
COMMENT ON COLUMN batchq.throttles.throttled_at IS 'Time of the latest request.';
COMMENT ON COLUMN batchq.throttles.worker IS 'Worker whose handler asked for it: batchq.workers.id.';

CREATE TABLE batchq.limit_shares (
  queue text NOT NULL, kind text NOT NULL DEFAULT '', worker text NOT NULL,
  running integer NOT NULL DEFAULT 0, starts_per_second float8 NOT NULL DEFAULT 0, items_per_second float8 NOT NULL DEFAULT 0,
  wanted_running integer NOT NULL DEFAULT 0, wanted_starts float8 NOT NULL DEFAULT 0, wanted_items float8 NOT NULL DEFAULT 0,
  in_use integer NOT NULL DEFAULT 0, held_back_by text,
  lease_seconds float8 NOT NULL, refreshed_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (queue, kind, worker)
) WITH (fillfactor = 50);
COMMENT ON TABLE batchq.limit_shares IS
  'The share of a limit that each worker holds. The shares of all workers never exceed the limit; see batchq.take_shares.';
COMMENT ON COLUMN batchq.limit_shares.kind IS 'Kind of the limit; empty: the whole queue.';
COMMENT ON COLUMN batchq.limit_shares.worker IS 'Worker that holds the share: batchq.workers.id.';
COMMENT ON COLUMN batchq.limit_shares.running IS 'How many batches the worker may have running.';
COMMENT ON COLUMN batchq.limit_shares.starts_per_second IS 'How many batches per second the worker may begin.';
COMMENT ON COLUMN batchq.limit_shares.items_per_second IS 'How many items per second the worker may begin.';
COMMENT ON COLUMN batchq.limit_shares.wanted_running IS 'How many batches the worker could run now; wanted_starts, wanted_items: alike.';
COMMENT ON COLUMN batchq.limit_shares.in_use IS 'How many batches the worker had running when it last refreshed its share.';
COMMENT ON COLUMN batchq.limit_shares.held_back_by IS
  'Columns of batchq.limits that held back batches or items of the worker in the last seconds, separated by commas; null: none.';
COMMENT ON COLUMN batchq.limit_shares.refreshed_at IS
  'Time of the last refresh. Rates return to the others after 5 s without one; running batches after lease_seconds and 2 s more.';

-- An item that was snoozed waits as a failed one does, but is none.
ALTER TABLE batchq.failed_items ADD COLUMN run_at timestamptz;
COMMENT ON COLUMN batchq.failed_items.run_at IS 'Time before which a snoozed item does not run again; null: the item failed.';

INSERT INTO batchq.locks (name) VALUES ('limits');
COMMENT ON COLUMN batchq.locks.name IS 'partitions, positions, throughput or limits.';

CREATE VIEW batchq.limits_in_force AS
SELECT coalesce(l.queue, d.queue) AS queue, coalesce(l.kind, d.kind) AS kind,
  coalesce(l.max_running, d.max_running) AS max_running,
  coalesce(l.per_second, d.per_second) AS per_second,
  coalesce(l.items_per_second, d.items_per_second) AS items_per_second,
  CASE WHEN d.queue IS NULL OR num_nonnulls(l.per_second, l.items_per_second) > 0 THEN l.burst_seconds
       ELSE d.burst_seconds END AS burst_seconds,
  coalesce(l.max_running_per_key, d.max_running_per_key) AS max_running_per_key,
  l.queue IS NOT NULL AS is_set, d.queue IS NOT NULL AS is_declared
FROM batchq.limits l FULL JOIN batchq.declared_limits d ON d.queue = l.queue AND d.kind = l.kind;
COMMENT ON VIEW batchq.limits_in_force IS
  'The limits that are valid: the numbers of batchq.limits and, where those are null, of batchq.declared_limits.';
COMMENT ON COLUMN batchq.limits_in_force.kind IS 'Kind that is limited within the queue; null: all kinds of the queue together.';
COMMENT ON COLUMN batchq.limits_in_force.is_set IS 'Whether batchq.limits has a row for the queue and kind.';
COMMENT ON COLUMN batchq.limits_in_force.is_declared IS 'Whether code declares a limit for the queue and kind.';

CREATE VIEW batchq.limits_in_use AS
SELECT f.*, coalesce(shares.workers, 0) AS workers, coalesce(shares.running, 0) AS running,
  coalesce(shares.starts_per_second, 0) AS starts_per_second_shared, coalesce(shares.items_per_second, 0) AS items_per_second_shared,
  (SELECT string_agg(DISTINCT r.reason, ', ') FROM unnest(string_to_array(shares.reasons, ',')) AS r(reason)) AS held_back_by
FROM batchq.limits_in_force f
LEFT JOIN (
  SELECT s.queue, s.kind, count(*) FILTER (WHERE is_live) AS workers, sum(s.in_use) AS running,
    sum(s.starts_per_second) FILTER (WHERE is_live) AS starts_per_second,
    sum(s.items_per_second) FILTER (WHERE is_live) AS items_per_second,
    string_agg(s.held_back_by, ',') FILTER (WHERE is_live) AS reasons
  FROM batchq.limit_shares s
  CROSS JOIN LATERAL (SELECT s.refreshed_at > now() - interval '5 seconds' AS is_live) age
  WHERE s.refreshed_at > now() - (s.lease_seconds + 2) * interval '1 second'
  GROUP BY s.queue, s.kind
) shares ON shares.queue = f.queue AND shares.kind = coalesce(f.kind, '');
COMMENT ON VIEW batchq.limits_in_use IS
  'The limits of batchq.limits_in_force with what workers use of them now. Workers report it about once per second.';
COMMENT ON COLUMN batchq.limits_in_use.kind IS 'Kind that is limited within the queue; null: all kinds of the queue together.';
COMMENT ON COLUMN batchq.limits_in_use.queue IS 'Queue that is limited.';
COMMENT ON COLUMN batchq.limits_in_use.max_running IS 'How many batches run at the same time; null: no limit.';
COMMENT ON COLUMN batchq.limits_in_use.per_second IS 'How many batches begin per second; null: no limit.';
COMMENT ON COLUMN batchq.limits_in_use.items_per_second IS 'For how many items per second an item handler is called; null: no limit.';
COMMENT ON COLUMN batchq.limits_in_use.burst_seconds IS 'For how many seconds an unused rate can be made up for.';
COMMENT ON COLUMN batchq.limits_in_use.max_running_per_key IS 'How many batches with the same key run at the same time; null: no limit.';
COMMENT ON COLUMN batchq.limits_in_use.is_set IS 'Whether batchq.limits has a row for the queue and kind.';
COMMENT ON COLUMN batchq.limits_in_use.is_declared IS 'Whether code declares a limit for the queue and kind.';
COMMENT ON COLUMN batchq.limits_in_use.workers IS 'Workers that hold a share of the limit and have refreshed it in the last 5 s.';
COMMENT ON COLUMN batchq.limits_in_use.running IS
  'Batches that run, to compare with max_running. Those of a dead worker count until its share expires.';
COMMENT ON COLUMN batchq.limits_in_use.starts_per_second_shared IS 'Part of per_second that workers hold as their shares.';
COMMENT ON COLUMN batchq.limits_in_use.items_per_second_shared IS 'Part of items_per_second that workers hold as their shares.';
COMMENT ON COLUMN batchq.limits_in_use.held_back_by IS
  'Columns of batchq.limits that held back batches or items in the last seconds, separated by commas; null: none.';

-- Max-min fairness ("water-filling"; Bertsekas and Gallager, Data Networks, section 6.5.2): who wants less than an equal part gets
-- all that it wants, and the others share the rest equally.
CREATE FUNCTION batchq.fair_part(total float8, wanted float8, wanted_by_others float8[]) RETURNS float8
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE one float8; left_over float8 := total; sharers integer := cardinality(wanted_by_others) + 1;
BEGIN
  FOR one IN SELECT u.part FROM unnest(wanted_by_others || wanted) AS u(part) ORDER BY 1 LOOP
    EXIT WHEN one > left_over / sharers;
    left_over := left_over - one;
    sharers := sharers - 1;
  END LOOP;
  RETURN CASE WHEN sharers = 0 THEN wanted ELSE least(wanted, left_over / sharers) END;
END $$;
COMMENT ON FUNCTION batchq.fair_part IS
  'Returns the fair part of a total for somebody who wants "wanted", beside others. Whoever wants little leaves the rest to the '
  'others.';

-- least_part: the smallest part that is of use. That is one batch at a time or, of a rate, as much as lets one batch or item begin
-- within a burst.
CREATE FUNCTION batchq.grant_part(total float8, wanted float8, wanted_by_others float8[], held_by_others float8, least_part float8)
RETURNS float8 LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE part float8;
BEGIN
  IF total IS NULL OR total <= 0 OR wanted <= 0 THEN RETURN 0; END IF;
  -- As many as can hold such a part share all, so that nothing is left that is too small for one more.
  least_part := CASE WHEN total = 'infinity' THEN least_part ELSE total / greatest(1, floor(total / least_part)) END;
  part := least(greatest(0, total - held_by_others), wanted,
                greatest(batchq.fair_part(total, wanted, wanted_by_others), least(least_part, total)));
  RETURN CASE WHEN part < least(least_part, total, wanted) THEN 0 ELSE part END;
END $$;
COMMENT ON FUNCTION batchq.grant_part IS
  'Returns how much of a limit somebody may have, beside what others hold: the fair part, but at least least_part or nothing.';

-- Called by each worker about once a second, and when its share runs out. The lock makes the shares those of one moment. A share
-- that is to shrink is stored at its old size until the worker reports that it uses no more than the new one.
CREATE FUNCTION batchq.take_shares(worker_id text, worker_lease_seconds float8, reports jsonb)
RETURNS TABLE (queue text, kind text, running integer, starts float8, items float8)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE report record; valid record; others record;
BEGIN
  PERFORM batchq.take_lock('limits');
  FOR report IN
    SELECT * FROM jsonb_to_recordset(reports) AS r(queue text, kind text, running integer, wanted_running integer, starts float8,
      wanted_starts float8, items float8, wanted_items float8, in_use integer, held_back_by text)
  LOOP
    SELECT f.max_running, f.per_second, f.items_per_second, 1 / f.burst_seconds AS least_rate INTO valid
    FROM batchq.limits_in_force f WHERE f.queue = report.queue AND coalesce(f.kind, '') = report.kind;
    DELETE FROM batchq.limit_shares s
    WHERE s.queue = report.queue AND s.kind = report.kind AND s.worker <> worker_id
      AND s.refreshed_at < now() - (s.lease_seconds + 2) * interval '1 second';
    SELECT coalesce(sum(s.running), 0) AS running,
      coalesce(sum(s.starts_per_second) FILTER (WHERE is_live), 0) AS starts,
      coalesce(sum(s.items_per_second) FILTER (WHERE is_live), 0) AS items,
      coalesce(array_agg(s.wanted_running::float8) FILTER (WHERE is_live), '{}') AS wanted_running,
      coalesce(array_agg(s.wanted_starts) FILTER (WHERE is_live), '{}') AS wanted_starts,
      coalesce(array_agg(s.wanted_items) FILTER (WHERE is_live), '{}') AS wanted_items
    INTO others
    FROM batchq.limit_shares s CROSS JOIN LATERAL (SELECT s.refreshed_at > now() - interval '5 seconds' AS is_live) age
    WHERE s.queue = report.queue AND s.kind = report.kind AND s.worker <> worker_id;
    queue := report.queue;
    kind := report.kind;
    running := ceil(batchq.grant_part(valid.max_running, report.wanted_running, others.wanted_running, others.running, 1));
    starts := batchq.grant_part(valid.per_second, report.wanted_starts, others.wanted_starts, others.starts, valid.least_rate);
    items := batchq.grant_part(valid.items_per_second, report.wanted_items, others.wanted_items, others.items, valid.least_rate);
    INSERT INTO batchq.limit_shares AS s (queue, kind, worker, running, starts_per_second, items_per_second, wanted_running,
      wanted_starts, wanted_items, in_use, held_back_by, lease_seconds, refreshed_at)
    VALUES (report.queue, report.kind, worker_id, greatest(running, report.running), greatest(starts, report.starts),
      greatest(items, report.items), report.wanted_running, report.wanted_starts, report.wanted_items, report.in_use,
      report.held_back_by, worker_lease_seconds, now())
    ON CONFLICT (queue, kind, worker) DO UPDATE
    SET running = excluded.running, starts_per_second = excluded.starts_per_second, items_per_second = excluded.items_per_second,
      wanted_running = excluded.wanted_running, wanted_starts = excluded.wanted_starts, wanted_items = excluded.wanted_items,
      in_use = excluded.in_use, held_back_by = excluded.held_back_by, lease_seconds = excluded.lease_seconds,
      refreshed_at = excluded.refreshed_at;
    RETURN NEXT;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.take_shares IS
  'Refreshes the shares of a worker, and returns what it may use from now on. reports: a JSON array, an object for each limit: queue, '
  'kind (empty for the whole queue); running, starts and items, which the worker holds itself to; wanted_running, wanted_starts and '
  'wanted_items, which it could use; in_use, held_back_by. If less is returned than reported, the worker uses no more than that as '
  'soon as it can, and reports again.';

CREATE FUNCTION batchq.return_shares(worker_id text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  DELETE FROM batchq.limit_shares s WHERE s.worker = worker_id OR s.refreshed_at < now() - interval '1 day';
END $$;
COMMENT ON FUNCTION batchq.return_shares IS
  'Returns all shares of a worker that has stopped; deletes those that were not refreshed for a day.';

CREATE FUNCTION batchq.declare_limits(of_queues text[], of_kinds text[], declared jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  PERFORM batchq.take_lock('limits');
  DELETE FROM batchq.declared_limits d
  WHERE d.queue = ANY (of_queues) AND d.kind = ANY (of_kinds)
    AND d.kind NOT IN (SELECT r.kind FROM jsonb_to_recordset(declared) AS r(kind text));
  INSERT INTO batchq.declared_limits AS d (queue, kind, max_running, per_second, items_per_second, burst_seconds,
    max_running_per_key)
  SELECT q, r.kind, r.max_running, r.per_second, r.items_per_second, coalesce(r.burst_seconds, 1), r.max_running_per_key
  FROM unnest(of_queues) q CROSS JOIN jsonb_to_recordset(declared) AS r(kind text, max_running integer, per_second float8,
    items_per_second float8, burst_seconds float8, max_running_per_key integer)
  ON CONFLICT (queue, kind) DO UPDATE
  SET max_running = excluded.max_running, per_second = excluded.per_second, items_per_second = excluded.items_per_second,
    burst_seconds = excluded.burst_seconds, max_running_per_key = excluded.max_running_per_key, declared_at = now();
END $$;
COMMENT ON FUNCTION batchq.declare_limits IS
  'Replaces what code declares for these queues and kinds. declared: a JSON array, an object for each kind that has a limit: kind, '
  'max_running, per_second, items_per_second, burst_seconds, max_running_per_key. Each worker calls it when it starts.';

CREATE FUNCTION batchq.throttle(of_queue text, of_kind text, of_key text, seconds float8, worker_id text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  DELETE FROM batchq.throttles t WHERE t.queue = of_queue AND t.until < now() - interval '1 minute';
  INSERT INTO batchq.throttles AS t (queue, kind, key, until, worker)
  VALUES (of_queue, coalesce(of_kind, ''), coalesce(of_key, ''), clock_timestamp() + seconds * interval '1 second', worker_id)
  ON CONFLICT (queue, kind, key) DO UPDATE
  SET until = greatest(t.until, excluded.until), throttled_at = now(), worker = excluded.worker;
END $$;
COMMENT ON FUNCTION batchq.throttle IS
  'Lets a kind (null: a whole queue), or one key of it, wait everywhere for so many seconds. A longer pause that is valid already '
  'stays. Workers call it when a handler raises batchq.Throttled.';

CREATE FUNCTION batchq.set_limit(queue text DEFAULT 'default', kind text DEFAULT NULL, max_running integer DEFAULT NULL,
  per_second float8 DEFAULT NULL, items_per_second float8 DEFAULT NULL, burst_seconds float8 DEFAULT 1,
  max_running_per_key integer DEFAULT NULL, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  details    jsonb;
  is_removed constant boolean := num_nonnulls(max_running, per_second, items_per_second, max_running_per_key) = 0;
BEGIN
  IF is_removed THEN
    DELETE FROM batchq.limits l WHERE l.queue = set_limit.queue AND l.kind IS NOT DISTINCT FROM set_limit.kind;
  ELSE
    INSERT INTO batchq.limits AS l (queue, kind, max_running, per_second, items_per_second, burst_seconds, max_running_per_key)
    VALUES (set_limit.queue, set_limit.kind, set_limit.max_running, set_limit.per_second, set_limit.items_per_second,
            set_limit.burst_seconds, set_limit.max_running_per_key)
    ON CONFLICT ON CONSTRAINT limits_one_each DO UPDATE
    SET max_running = excluded.max_running, per_second = excluded.per_second, items_per_second = excluded.items_per_second,
        burst_seconds = excluded.burst_seconds, max_running_per_key = excluded.max_running_per_key
    WHERE (l.max_running, l.per_second, l.items_per_second, l.burst_seconds, l.max_running_per_key)
      IS DISTINCT FROM (excluded.max_running, excluded.per_second, excluded.items_per_second, excluded.burst_seconds,
                        excluded.max_running_per_key);
  END IF;
  IF NOT FOUND THEN RETURN false; END IF;
  details := CASE WHEN is_removed THEN '{"removed": true}' ELSE jsonb_strip_nulls(jsonb_build_object('max_running', max_running,
    'per_second', per_second::text, 'items_per_second', items_per_second::text, 'burst_seconds', burst_seconds::text,
    'max_running_per_key', max_running_per_key)) END;
  PERFORM batchq.note_verb('set_limit', 0, NULL, queue, kind, details, reason, actor);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.set_limit IS
  'Sets the limits of a queue, or of a kind within it: all of them, so that one that is not given is removed, and without any, the '
  'row is deleted. Returns whether anything changed.';

CREATE FUNCTION batchq.end_throttle(queue text DEFAULT NULL, kind text DEFAULT NULL, key text DEFAULT NULL,
  reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE was_throttled boolean;
BEGIN
  IF queue IS NULL THEN
    RAISE EXCEPTION 'batchq.end_throttle takes a queue'
      USING HINT = 'SELECT queue, kind, key, until FROM batchq.throttles lists the throttles; kind and key are those of its row';
  END IF;
  DELETE FROM batchq.throttles t
  WHERE t.queue = end_throttle.queue AND t.kind = coalesce(end_throttle.kind, '') AND t.key = coalesce(end_throttle.key, '')
  RETURNING t.until > now() INTO was_throttled;
  IF was_throttled IS NOT TRUE THEN RETURN false; END IF;
  PERFORM batchq.note_verb('end_throttle', 0, NULL, queue, kind, jsonb_strip_nulls(jsonb_build_object('key', key)), reason, actor);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.end_throttle IS
  'Ends a throttle before its time: that of a kind in a queue, of the whole queue (kind null), or of a key. Workers follow within '
  'two seconds. Returns whether there was one.';
COMMENT ON COLUMN batchq.audit.verb IS
  'cancel, retry, snooze, set_priority, move, pause, resume, drain_worker, set_limit or end_throttle.';
