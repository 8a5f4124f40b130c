-- Keys: batches with a key are claimed key by key, in turn. A limit per key (batchq.limits.max_running_per_key) is kept by a lock on
-- the key, and by a count in a statement that begins after the lock was taken. INSERT takes no lock that another INSERT waits for.
ALTER TABLE batchq.batches ADD COLUMN key text COLLATE "C";  -- so that keys are compared as Python compares them
-- NOT VALID: no row has a key yet, so nothing of the history has to be read.
ALTER TABLE batchq.batches
  ADD CONSTRAINT batches_key_fits CHECK (key IS NULL OR octet_length(key) BETWEEN 1 AND 500) NOT VALID;
COMMENT ON COLUMN batchq.batches.key IS
  'Optional key, such as a customer: batches with a key are claimed key by key, in turn, so that no key waits for another. See '
  'batchq.limits.max_running_per_key. Within a key, the lowest priority number comes first, then the earliest run_at.';
COMMENT ON COLUMN batchq.batches.claimed_at IS
  'Time of the latest claim. A pending batch with a key keeps it: once begun, a batch comes before the others of its key.';

-- Batches with a key have indexes of their own, and are left out of the one for claims. The second has what runs of a key and, with
-- a null lease, what began and waits to continue.
DROP INDEX batchq.batches_live_ready;
CREATE INDEX batches_live_ready ON batchq.batches_live (queue, priority, run_at, id) WHERE status = 'pending' AND key IS NULL;
CREATE INDEX batches_live_keyed ON batchq.batches_live (queue, key, priority, run_at, id)
  WHERE key IS NOT NULL AND status = 'pending';
CREATE INDEX batches_live_key_begun ON batchq.batches_live (queue, key, lease_expires_at)
  WHERE key IS NOT NULL AND claimed_at IS NOT NULL;

-- Rows to lock instead of keys: a key is the row of its hash. Not advisory locks, which any role could hold, and which fill the
-- server's lock table: a claim locks hundreds of keys.
CREATE TABLE batchq.key_locks (number integer PRIMARY KEY);
COMMENT ON TABLE batchq.key_locks IS 'Claims of keys with a limit lock the row of the key''s hash, and never change it.';
COMMENT ON COLUMN batchq.key_locks.number IS 'Hash of queue and key, from 0 to 4095.';
INSERT INTO batchq.key_locks (number) SELECT n FROM generate_series(0, 4095) n;

CREATE FUNCTION batchq.lock_key(in_queue text, of_key text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  PERFORM 1 FROM batchq.key_locks l
  WHERE l.number = (hashtextextended(in_queue || '/' || of_key, 0) & 4095)::integer FOR UPDATE SKIP LOCKED;
  RETURN FOUND;
END $$;
COMMENT ON FUNCTION batchq.lock_key IS
  'Locks a key until the end of the transaction, if it is free; returns whether it was. A few other keys are locked with it.';

CREATE FUNCTION batchq.has_keyed(in_queue text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$ BEGIN
  PERFORM 1 FROM batchq.batches_live b WHERE b.queue = in_queue AND b.status = 'pending' AND b.key > '' ORDER BY b.key LIMIT 1;
  RETURN FOUND;
END $$;
COMMENT ON FUNCTION batchq.has_keyed IS 'Returns whether a queue has pending batches with a key, ready or not.';

CREATE FUNCTION batchq.keyed_queues() RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE found_queue text := '';
BEGIN
  LOOP
    SELECT b.queue INTO found_queue FROM batchq.batches_live b
    WHERE b.queue > found_queue AND b.status = 'pending' AND b.key > '' ORDER BY b.queue, b.key LIMIT 1;
    EXIT WHEN NOT FOUND;
    RETURN NEXT found_queue;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.keyed_queues IS 'Returns the queues that have pending batches with a key.';

-- VOLATILE, so that each statement has its own snapshot: the counts must see what the last holder of the lock has committed.
CREATE FUNCTION batchq.ready_of_key(in_queue text, of_key text, of_kinds text[], per_kind integer[], per_queue integer, most integer,
  after_priority smallint, after_run_at float8, after_id bigint, leases_after timestamptz, OUT ids bigint[],
  OUT last_priority smallint, OUT last_run_at float8, OUT last_id bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  one    record;
  room   integer := most;
  number integer;
  free   integer[] := per_kind;  -- of each kind; null: no limit
  running integer := 0;
BEGIN
  ids := '{}';
  IF per_queue IS NOT NULL OR num_nonnulls(VARIADIC per_kind) > 0 THEN
    FOR one IN
      SELECT b.kind, count(*) AS running FROM batchq.batches_live b
      WHERE b.queue = in_queue AND b.key = of_key AND b.claimed_at IS NOT NULL AND b.lease_expires_at > leases_after
      GROUP BY b.kind
    LOOP
      running := running + one.running;
      number := array_position(of_kinds, one.kind);
      IF number IS NOT NULL THEN
        free[number] := free[number] - one.running;
      END IF;
    END LOOP;
    room := least(room, per_queue - running);
    -- With a limit of one, a batch that has begun and waits to continue keeps all others of its key waiting.
    FOR one IN
      SELECT b.id, b.kind, b.run_at <= now() AS is_ready FROM batchq.batches_live b
      WHERE b.queue = in_queue AND b.key = of_key AND b.claimed_at IS NOT NULL AND b.lease_expires_at IS NULL
      ORDER BY b.priority, b.run_at, b.id
    LOOP
      number := array_position(of_kinds, one.kind);
      CONTINUE WHEN (per_queue = 1 OR per_kind[number] = 1) IS NOT TRUE;
      IF one.is_ready AND number IS NOT NULL AND room > 0 AND (free[number] > 0) IS NOT FALSE THEN
        ids := ids || one.id;
        room := room - 1;
      END IF;
      IF per_queue = 1 THEN RETURN; END IF;
      free[number] := 0;
    END LOOP;
    IF room <= 0 OR 0 >= ALL (free) THEN RETURN; END IF;
  END IF;
  FOR one IN
    SELECT b.id, b.kind, b.priority, date_part('epoch', b.run_at) AS run_at FROM batchq.batches_live b
    WHERE b.queue = in_queue AND b.status = 'pending' AND b.key = of_key AND b.run_at <= now()
      AND (b.priority, b.run_at, b.id) > (after_priority, to_timestamp(after_run_at), after_id)
      AND (per_queue = 1 OR b.kind = ANY (of_kinds) AND (free[array_position(of_kinds, b.kind)] > 0) IS NOT FALSE)
    ORDER BY b.priority, b.run_at, b.id
    LIMIT room
  LOOP
    number := array_position(of_kinds, one.kind);
    IF number IS NULL OR free[number] <= 0 THEN CONTINUE; END IF;
    ids := ids || one.id;
    free[number] := free[number] - 1;
    last_priority := one.priority;
    last_run_at := one.run_at;
    last_id := one.id;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.ready_of_key IS
  'Returns the ids of up to "most" batches of a key that may run now, in their order, and the position of the last. per_kind: the '
  'most that may run of the key, for each of of_kinds; per_queue: for all kinds together. Where there are limits, the caller has '
  'locked the key. It reads from a position on, and leases that expire after leases_after.';

-- From key to key by the index (a "loose index scan"), not recursive: a distributed Postgres takes that only within a queue.
CREATE FUNCTION batchq.ready_of_keys(in_queue text, of_kinds text[], per_kind integer[], per_queue integer, after_key text,
  until_key text, most_keys integer, most integer, per_turn integer, positions jsonb)
RETURNS TABLE (key text, ids bigint[], last_priority smallint, last_run_at float8, last_id bigint, seconds float8)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  is_limited    constant boolean := per_queue IS NOT NULL OR num_nonnulls(VARIADIC per_kind) > 0;
  any_throttled constant boolean := EXISTS (
    SELECT 1 FROM batchq.throttles t WHERE t.queue = in_queue AND t.key <> '' AND t.until > now());
  -- An hour before the position: a claim whose transaction or lease is shorter than others' commits behind it.
  leases_after  constant timestamptz := coalesce((SELECT least(p.at, now()) - interval '1 hour' FROM batchq.positions p
                                                  WHERE p.index = 'lease' AND p.queue = in_queue), '-infinity');
  first_at      constant timestamptz := clock_timestamp();
  known_keys    constant text[] := ARRAY(SELECT k FROM jsonb_object_keys(positions) k ORDER BY k COLLATE "C");
  -- The first text after all keys of a range: chr(1) is the least letter that a text may have.
  end_of_range  constant text := coalesce(until_key || chr(1),
    CASE WHEN getdatabaseencoding() = 'UTF8' THEN repeat(chr(1114111), 126) ELSE repeat(chr(255), 501) END);
  began_at      timestamptz;
  visited       integer := 0;
  per_kind_now  integer[] := per_kind;
  next_known    integer := 1;
  stop_key      text;
  is_known      boolean;
  head          record;
  found         record;
  at            jsonb;
  slow_rows     integer := 0;
BEGIN
  LOOP
    -- A key with a position is not searched for, since its dead entries would be in the way: the search ends before it.
    WHILE known_keys[next_known] COLLATE "C" <= after_key LOOP
      next_known := next_known + 1;
    END LOOP;
    is_known := coalesce(known_keys[next_known] COLLATE "C" < end_of_range, false);
    stop_key := CASE WHEN is_known THEN known_keys[next_known] ELSE end_of_range END;
    began_at := clock_timestamp();
    FOR head IN
      WITH RECURSIVE heads AS (
        (SELECT b.key, b.id, b.kind, b.priority, b.run_at FROM batchq.batches_live b
         WHERE b.queue = in_queue AND b.status = 'pending' AND b.key > after_key AND b.key < stop_key
         ORDER BY b.key, b.priority, b.run_at, b.id LIMIT 1)
        UNION ALL
        SELECT n.key, n.id, n.kind, n.priority, n.run_at
        FROM heads h CROSS JOIN LATERAL (
          SELECT b.key, b.id, b.kind, b.priority, b.run_at FROM batchq.batches_live b
          WHERE b.queue = in_queue AND b.status = 'pending' AND b.key > h.key AND b.key < stop_key
          ORDER BY b.key, b.priority, b.run_at, b.id LIMIT 1) n
      )
      SELECT h.key, h.id, h.kind, h.priority, h.run_at FROM heads h
      UNION ALL
      SELECT stop_key, NULL, NULL, NULL, NULL WHERE is_known
    LOOP
      EXIT WHEN visited = most_keys OR most <= 0;
      after_key := head.key;
      visited := visited + 1;
      seconds := extract(epoch FROM clock_timestamp() - began_at);
      -- The heads come up to 50 at a time, so any of these may be the one that was expensive to find.
      slow_rows := CASE WHEN seconds >= 0.002 THEN 50 ELSE slow_rows - 1 END;
      began_at := clock_timestamp();
      CONTINUE WHEN is_limited AND NOT batchq.lock_key(in_queue, head.key);
      IF any_throttled THEN
        per_kind_now := ARRAY(
          SELECT CASE WHEN EXISTS (SELECT 1 FROM batchq.throttles t WHERE t.queue = in_queue AND t.kind IN ('', u.kind)
                                   AND t.key = head.key AND t.until > now()) THEN 0 ELSE u.most END
          FROM unnest(of_kinds, per_kind) WITH ORDINALITY AS u(kind, most, number) ORDER BY u.number);
      END IF;
      key := head.key;
      IF per_turn = 1 AND NOT is_limited AND NOT any_throttled AND head.run_at <= now() AND head.kind = ANY (of_kinds) THEN
        ids := ARRAY[head.id];
        last_priority := head.priority;
        last_run_at := date_part('epoch', head.run_at);
        last_id := head.id;
        seconds := CASE WHEN slow_rows > 0 THEN 0.002 ELSE 0 END;
      ELSE
        at := CASE WHEN head.id IS NULL THEN positions -> head.key END;
        found := batchq.ready_of_key(in_queue, head.key, of_kinds, per_kind_now, per_queue, least(per_turn, most),
          coalesce((at ->> 0)::smallint, '-32768'::smallint), coalesce((at ->> 1)::float8, '-infinity'),
          coalesce((at ->> 2)::bigint, 0), leases_after);
        ids := found.ids;
        last_priority := found.last_priority;
        last_run_at := found.last_run_at;
        last_id := found.last_id;
        seconds := extract(epoch FROM clock_timestamp() - began_at);
        began_at := clock_timestamp();
      END IF;
      most := most - cardinality(ids);
      IF ids <> '{}' OR seconds >= 0.002 THEN RETURN NEXT; END IF;
    END LOOP;
    EXIT WHEN visited = most_keys OR most <= 0 OR NOT is_known;
  END LOOP;
  key := CASE WHEN visited = most_keys OR most <= 0 THEN after_key END;
  ids := NULL;
  last_id := visited;
  seconds := extract(epoch FROM clock_timestamp() - first_at);
  RETURN NEXT;
END $$;
COMMENT ON FUNCTION batchq.ready_of_keys IS
  'Goes through the keys of a queue, from after_key on, up to until_key if that is given, and returns for each the batches that a '
  'claim may take: up to per_turn of each key and "most" in all. Keys with a limit (per_kind, in the order of of_kinds, and '
  'per_queue) are locked until the transaction ends; those that another claim has locked are left out. positions: a JSON object, '
  'an array of priority, run_at and id for keys that are read from there on. The last row has no ids: its key is the last one '
  'visited, null at the end of the range; last_id is the number of keys visited, and seconds the time of all.';

-- As before, but for batches without a key: those with one are not in the index of claims.
CREATE OR REPLACE FUNCTION batchq.has_ready(in_queue text, in_priority smallint, kinds text[], after_run_at float8, after_id bigint)
RETURNS boolean LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$ BEGIN
  PERFORM 1 FROM batchq.batches_live b
  WHERE b.queue = in_queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = in_priority
    AND (b.run_at, b.id) > (to_timestamp(after_run_at), after_id) AND b.run_at <= now() AND b.kind = ANY (kinds)
  ORDER BY b.run_at, b.id LIMIT 1;
  RETURN FOUND;
END $$;

CREATE OR REPLACE FUNCTION batchq.waiting_levels()
RETURNS TABLE (queue text, priority smallint, at timestamptz, id bigint, seconds float8, is_known boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE known record; began_at timestamptz; after_queue text := ''; after_priority integer := -40000;
BEGIN
  FOR known IN
    SELECT p.queue, p.priority, p.at, p.id, false AS is_end FROM batchq.positions p WHERE p.index = 'ready'
    UNION ALL SELECT NULL, NULL, NULL, NULL, true
    ORDER BY is_end, queue, priority
  LOOP
    LOOP -- The levels between the last known one and this one, then this one.
      began_at := clock_timestamp();
      SELECT * INTO queue, priority, at, id
      FROM ((SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.key IS NULL AND b.queue = after_queue AND b.priority > after_priority
               AND b.priority < CASE WHEN known.queue = after_queue THEN known.priority ELSE 40000 END
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.key IS NULL AND b.queue > after_queue AND b.queue < known.queue
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.key IS NULL AND b.queue > after_queue AND known.is_end
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.key IS NULL AND b.queue = known.queue AND b.priority < known.priority AND known.queue <> after_queue
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)) next
      LIMIT 1;
      is_known := queue IS NULL;
      EXIT WHEN is_known AND known.is_end;
      IF is_known THEN
        began_at := clock_timestamp();
        SELECT b.run_at, b.id INTO at, id FROM batchq.batches_live b
        WHERE b.queue = known.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = known.priority
          AND (b.run_at, b.id) > (known.at, known.id)
        ORDER BY b.run_at, b.id LIMIT 1;
        queue := known.queue;
        priority := known.priority;
      END IF;
      seconds := extract(epoch FROM clock_timestamp() - began_at);
      RETURN NEXT;
      after_queue := queue;
      after_priority := priority;
      EXIT WHEN is_known;
    END LOOP;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION batchq.check_positions(cheap_seconds float8) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE known batchq.positions; began_at timestamptz; seconds float8; late_at timestamptz; late_id bigint;
BEGIN
  FOR known IN
    SELECT * FROM batchq.positions p WHERE p.checked_at < clock_timestamp() - 20 * p.cost_seconds * interval '1 second'
  LOOP
    began_at := clock_timestamp();
    IF known.index = 'ready' THEN
      SELECT b.run_at, b.id - 1 INTO late_at, late_id FROM batchq.batches_live b
      WHERE b.queue = known.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = known.priority
        AND (b.run_at, b.id) <= (known.at, known.id)
      ORDER BY b.run_at, b.id LIMIT 1;
    ELSE
      SELECT b.lease_expires_at - interval '1 microsecond', known.id INTO late_at, late_id FROM batchq.batches_live b
      WHERE b.queue = known.queue AND b.status = 'processing' AND b.lease_expires_at <= known.at
      ORDER BY b.lease_expires_at LIMIT 1;
    END IF;
    seconds := extract(epoch FROM clock_timestamp() - began_at);
    IF late_id IS NULL AND seconds < cheap_seconds THEN
      DELETE FROM batchq.positions WHERE index = known.index AND queue = known.queue AND priority = known.priority;
    ELSE
      UPDATE batchq.positions
      SET at = coalesce(late_at, at), id = coalesce(late_id, id), cost_seconds = seconds, checked_at = clock_timestamp()
      WHERE index = known.index AND queue = known.queue AND priority = known.priority;
    END IF;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION batchq.count_live(most integer DEFAULT 10000)
RETURNS TABLE (queue text, kind text, state text, count bigint, late bigint, oldest_at timestamptz, is_estimate boolean,
               is_oldest_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  pages     float8 := pg_relation_size('batchq.batches_live') / current_setting('block_size')::integer;
  in_sample float8 := least(100, 100 * 200 / greatest(pages, 1));
BEGIN
  RETURN QUERY
  WITH all_waiting AS MATERIALIZED (SELECT * FROM batchq.waiting_levels() WHERE at IS NOT NULL),
  all_busy AS MATERIALIZED (SELECT * FROM batchq.busy_queues() WHERE at IS NOT NULL),
  few AS MATERIALIZED (
    -- If there are at most "most", all are counted. If there are more, each level gets a share of "most".
    SELECT most >= (SELECT count(*) FROM (
        SELECT 1 FROM all_waiting w CROSS JOIN LATERAL (
          SELECT 1 FROM batchq.batches_live b
          WHERE b.queue = w.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = w.priority AND (b.run_at, b.id) >= (w.at, w.id)
          ORDER BY b.run_at, b.id LIMIT most + 1) b LIMIT most + 1) some_waiting)
      AND most >= (SELECT count(*) FROM (
        SELECT 1 FROM all_busy q CROSS JOIN LATERAL (
          SELECT 1 FROM batchq.batches_live b
          WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
          ORDER BY b.lease_expires_at LIMIT most + 1) b LIMIT most + 1) some_busy) AS counts_all
  ),
  waiting AS MATERIALIZED (SELECT * FROM all_waiting LIMIT (SELECT CASE WHEN NOT counts_all THEN 1000 END FROM few)),
  busy AS MATERIALIZED (SELECT * FROM all_busy LIMIT (SELECT CASE WHEN NOT counts_all THEN 1000 END FROM few)),
  share AS MATERIALIZED (
    SELECT greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM waiting), 1) END)::integer
        AS of_waiting,
      greatest(100, CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM busy), 1) END)::integer AS of_busy
    FROM few
  ), keyed AS MATERIALIZED (
    SELECT q.queue, b.kind, b.run_at, count(*) OVER (PARTITION BY q.queue) > share.of_waiting AS is_cut
    FROM batchq.keyed_queues() AS q(queue) CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'pending' AND b.key > ''
      ORDER BY b.key, b.priority, b.run_at, b.id LIMIT share.of_waiting + 1) b
  ), entry AS MATERIALIZED (
    SELECT w.queue, w.priority, 'ready' AS state, b.kind, b.run_at AS at, share.of_waiting AS share
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = w.priority AND b.run_at <= now()
        AND (b.run_at, b.id) >= (w.at, w.id)
      ORDER BY b.run_at, b.id LIMIT share.of_waiting + 1) b
    UNION ALL
    SELECT w.queue, w.priority, 'scheduled', b.kind, b.run_at, share.of_waiting
    FROM waiting w CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.run_at FROM batchq.batches_live b
      WHERE b.queue = w.queue AND b.status = 'pending' AND b.key IS NULL AND b.priority = w.priority AND b.run_at > now()
        AND (b.run_at, b.id) >= (w.at, w.id)
      ORDER BY b.run_at, b.id LIMIT share.of_waiting + 1) b
    UNION ALL
    SELECT q.queue, 0, 'processing', b.kind, b.lease_expires_at, share.of_busy
    FROM busy q CROSS JOIN share CROSS JOIN LATERAL (
      SELECT b.kind, b.lease_expires_at FROM batchq.batches_live b
      WHERE b.queue = q.queue AND b.status = 'processing' AND b.lease_expires_at >= q.at
      ORDER BY b.lease_expires_at LIMIT share.of_busy + 1) b
    UNION ALL
    SELECT queue, 0, CASE WHEN run_at <= now() THEN 'ready' ELSE 'scheduled' END, kind, run_at, NULL FROM keyed
  ), cut AS MATERIALIZED (
    SELECT queue, state, min(until) AS known_until
    FROM (
      SELECT queue, state, max(at) AS until FROM entry GROUP BY queue, state, priority, share HAVING count(*) > share
      UNION ALL
      SELECT DISTINCT queue, state, '-infinity'::timestamptz FROM keyed, unnest('{ready,scheduled}'::text[]) AS state WHERE is_cut
    ) heads
    GROUP BY queue, state
  ), counted AS (
    SELECT queue, kind, state, count(*) AS count, count(*) FILTER (WHERE at < now()) AS late, min(at) AS oldest_at
    FROM entry GROUP BY queue, kind, state
  ), sampled AS (
    SELECT queue, kind, state, ceil(count(*) * 100 / in_sample)::bigint AS count, min(at) AS oldest_at
    FROM (
      SELECT b.queue, b.kind, coalesce(b.lease_expires_at, b.run_at) AS at,
        CASE WHEN b.status = 'processing' THEN 'processing' WHEN b.run_at <= now() THEN 'ready' ELSE 'scheduled' END AS state
      FROM batchq.batches_live b TABLESAMPLE SYSTEM (in_sample) REPEATABLE (1)
      WHERE EXISTS (SELECT 1 FROM cut)) rows
    JOIN cut USING (queue, state) GROUP BY queue, kind, state
  )
  SELECT queue, kind, state, greatest(c.count, s.count), coalesce(c.late, 0), least(c.oldest_at, s.oldest_at),
    -- A batch committed late, before a position, is not counted until the position is checked.
    cut.queue IS NOT NULL OR EXISTS (SELECT 1 FROM batchq.positions p WHERE p.queue = c.queue),
    cut.known_until IS NOT NULL AND (c.oldest_at IS NULL OR c.oldest_at > cut.known_until)
  FROM counted c FULL JOIN sampled s USING (queue, kind, state) LEFT JOIN cut USING (queue, state);
END $$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
