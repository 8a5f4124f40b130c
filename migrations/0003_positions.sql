-- Where reading an index of the live table begins while dead entries fill it. A claim or a finish leaves dead entries in
-- each index, and they stay for as long as any session holds a snapshot. Whoever reads from the beginning then walks over
-- all of them: a new worker, a rescue, a view. So a worker records up to where an index holds dead entries only.
CREATE TABLE batchq.positions (
  index        text        NOT NULL,
  queue        text        NOT NULL,
  priority     smallint    NOT NULL DEFAULT 0,
  at           timestamptz NOT NULL DEFAULT '-infinity',
  id           bigint      NOT NULL DEFAULT 0,
  cost_seconds float8      NOT NULL DEFAULT 0,
  moved_at     timestamptz NOT NULL DEFAULT now(),
  checked_at   timestamptz NOT NULL DEFAULT '-infinity',
  PRIMARY KEY (index, queue, priority),
  CONSTRAINT positions_index_is_known CHECK (index IN ('ready', 'lease'))
) WITH (fillfactor = 50);

COMMENT ON TABLE batchq.positions IS
  'Where reading an index of the live table begins. A row exists only while dead entries make reading from the beginning '
  'expensive. Workers keep it (batchq.move_positions); without a row, reading begins at the beginning.';
COMMENT ON COLUMN batchq.positions.index IS
  'ready: the pending batches of a queue and priority come after (at, id) in claim order. lease: the leases of a queue '
  'expire after "at".';
COMMENT ON COLUMN batchq.positions.queue IS 'The queue.';
COMMENT ON COLUMN batchq.positions.priority IS 'The priority; 0 for leases.';
COMMENT ON COLUMN batchq.positions.at IS 'A run_at for ready, a lease_expires_at for lease.';
COMMENT ON COLUMN batchq.positions.id IS 'The id of a batch for ready; 0 for leases.';
COMMENT ON COLUMN batchq.positions.cost_seconds IS 'How long reading the part before the position took when it was last checked.';
COMMENT ON COLUMN batchq.positions.moved_at IS 'When a worker last moved it.';
COMMENT ON COLUMN batchq.positions.checked_at IS
  'When the part before the position was last read, which takes at most a twentieth of the time. It finds what was '
  'committed late.';

-- The look of an idle worker, which is most of what an idle queue costs: a function, since its plan is kept (on a backend that
-- serves many clients, too). PERFORM, since inside EXISTS Postgres drops ORDER BY and LIMIT; a bitmap scan, which reads every
-- entry first, then looks as cheap as any other plan where the statistics are those of an empty table.
CREATE FUNCTION batchq.has_ready(in_queue text, in_priority smallint, kinds text[], after_run_at float8, after_id bigint)
RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
BEGIN
  PERFORM
  FROM batchq.batches_live b
  WHERE b.queue = in_queue
    AND b.status = 'pending'
    AND b.priority = in_priority
    AND (b.run_at, b.id) > (to_timestamp(after_run_at), after_id)
    AND b.run_at <= now()
    AND b.kind = ANY (kinds)
  ORDER BY b.run_at, b.id
  LIMIT 1;
  RETURN FOUND;
END
$$;

COMMENT ON FUNCTION batchq.has_ready(text, smallint, text[], float8, bigint) IS
  'Tells whether a batch of one queue, one priority and some kinds is ready, behind a place in the order of claims: '
  'run_at in seconds since 1970, then the id.';

CREATE FUNCTION batchq.waiting_levels()
RETURNS TABLE (queue text, priority smallint, at timestamptz, id bigint, seconds float8, is_known boolean)
-- Neither sequential nor bitmap scans: the plans are kept, whatever the statistics were when they were made.
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  known          record;
  began_at       timestamptz;
  after_queue    text := '';
  after_priority integer := -40000;
BEGIN
  FOR known IN
    SELECT p.queue, p.priority, p.at, p.id, false AS is_end FROM batchq.positions p WHERE p.index = 'ready'
    UNION ALL
    SELECT NULL, NULL, NULL, NULL, true
    ORDER BY is_end, queue, priority
  LOOP
    LOOP -- The levels between the last known one and this one. Not by (queue, priority) > (..): that reads all entries of a queue.
      began_at := clock_timestamp();
      IF known.is_end THEN
        SELECT * INTO queue, priority, at, id
        FROM ((SELECT b.queue, b.priority, b.run_at, b.id
               FROM batchq.batches_live b
               WHERE b.status = 'pending' AND b.queue = after_queue AND b.priority > after_priority
               ORDER BY b.queue, b.priority, b.run_at, b.id
               LIMIT 1)
              UNION ALL
              (SELECT b.queue, b.priority, b.run_at, b.id
               FROM batchq.batches_live b
               WHERE b.status = 'pending' AND b.queue > after_queue
               ORDER BY b.queue, b.priority, b.run_at, b.id
               LIMIT 1)) next
        LIMIT 1;
      ELSE
        SELECT * INTO queue, priority, at, id
        FROM ((SELECT b.queue, b.priority, b.run_at, b.id
               FROM batchq.batches_live b
               WHERE b.status = 'pending' AND b.queue = after_queue AND b.priority > after_priority
                 AND b.priority < CASE WHEN known.queue = after_queue THEN known.priority ELSE 40000 END
               ORDER BY b.queue, b.priority, b.run_at, b.id
               LIMIT 1)
              UNION ALL
              (SELECT b.queue, b.priority, b.run_at, b.id
               FROM batchq.batches_live b
               WHERE b.status = 'pending' AND b.queue > after_queue AND b.queue < known.queue
               ORDER BY b.queue, b.priority, b.run_at, b.id
               LIMIT 1)
              UNION ALL
              (SELECT b.queue, b.priority, b.run_at, b.id
               FROM batchq.batches_live b
               WHERE b.status = 'pending' AND b.queue = known.queue AND b.priority < known.priority
                 AND known.queue <> after_queue
               ORDER BY b.queue, b.priority, b.run_at, b.id
               LIMIT 1)) next
        LIMIT 1;
      END IF;
      EXIT WHEN queue IS NULL;
      seconds := extract(epoch FROM clock_timestamp() - began_at);
      is_known := false;
      RETURN NEXT;
      after_queue := queue;
      after_priority := priority;
    END LOOP;
    EXIT WHEN known.is_end;
    began_at := clock_timestamp();
    SELECT b.run_at, b.id INTO at, id
    FROM batchq.batches_live b
    WHERE b.queue = known.queue
      AND b.status = 'pending'
      AND b.priority = known.priority
      AND (b.run_at, b.id) > (known.at, known.id)
    ORDER BY b.run_at, b.id
    LIMIT 1;
    queue := known.queue;
    priority := known.priority;
    seconds := extract(epoch FROM clock_timestamp() - began_at);
    is_known := true;
    RETURN NEXT;
    after_queue := known.queue;
    after_priority := known.priority;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.waiting_levels() IS
  'Returns each queue and priority that has pending batches, with the place of the first one in claim order and the seconds '
  'that it took to find it. is_known: batchq.positions has the level; its place is null if nothing waits after the position.';

CREATE FUNCTION batchq.busy_queues()
RETURNS TABLE (queue text, at timestamptz, seconds float8, is_known boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  known       record;
  began_at    timestamptz;
  after_queue text := '';
BEGIN
  FOR known IN
    SELECT p.queue, p.at, false AS is_end FROM batchq.positions p WHERE p.index = 'lease'
    UNION ALL
    SELECT NULL, NULL, true
    ORDER BY is_end, queue
  LOOP
    LOOP
      began_at := clock_timestamp();
      IF known.is_end THEN
        SELECT b.queue, b.lease_expires_at INTO queue, at
        FROM batchq.batches_live b
        WHERE b.status = 'processing'
          AND b.queue > after_queue
        ORDER BY b.queue, b.lease_expires_at
        LIMIT 1;
      ELSE
        SELECT b.queue, b.lease_expires_at INTO queue, at
        FROM batchq.batches_live b
        WHERE b.status = 'processing'
          AND b.queue > after_queue
          AND b.queue < known.queue
        ORDER BY b.queue, b.lease_expires_at
        LIMIT 1;
      END IF;
      EXIT WHEN queue IS NULL;
      seconds := extract(epoch FROM clock_timestamp() - began_at);
      is_known := false;
      RETURN NEXT;
      after_queue := queue;
    END LOOP;
    EXIT WHEN known.is_end;
    began_at := clock_timestamp();
    SELECT b.lease_expires_at INTO at
    FROM batchq.batches_live b
    WHERE b.queue = known.queue
      AND b.status = 'processing'
      AND b.lease_expires_at > known.at
    ORDER BY b.lease_expires_at
    LIMIT 1;
    queue := known.queue;
    seconds := extract(epoch FROM clock_timestamp() - began_at);
    is_known := true;
    RETURN NEXT;
    after_queue := known.queue;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.busy_queues() IS
  'Returns each queue that has processing batches, with the lease that expires first and the seconds that it took to find '
  'it. is_known: batchq.positions has the queue; the lease is null if none lies after the position.';

CREATE FUNCTION batchq.move_positions(queues text[], priorities smallint[], lease_seconds float8, cheap_seconds float8 DEFAULT 0.002)
RETURNS integer
-- SECURITY DEFINER: a worker needs no rights on the table of positions.
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
  -- A transaction that began before this may still commit batches with an earlier run_at.
  horizon CONSTANT timestamptz := now() - interval '1 second';
  found   record;
BEGIN
  IF NOT batchq.try_lock('positions') THEN
    RETURN NULL;
  END IF;
  -- The caller names what it serves, since dead entries do not tell of which queue and priority they were.
  INSERT INTO batchq.positions (index, queue, priority)
  SELECT 'ready', q, p FROM unnest(queues) q, unnest(priorities) p
  UNION ALL
  SELECT 'lease', q, 0 FROM unnest(queues) q
  ON CONFLICT DO NOTHING;
  FOR found IN SELECT * FROM batchq.waiting_levels() LOOP
    CONTINUE WHEN NOT found.is_known AND found.seconds < cheap_seconds;
    IF found.at IS NULL OR found.at > horizon THEN
      found.at := horizon;
      found.id := 1;
    END IF;
    INSERT INTO batchq.positions AS p (index, queue, priority, at, id)
    VALUES ('ready', found.queue, found.priority, found.at, found.id - 1)
    ON CONFLICT (index, queue, priority) DO UPDATE
    SET at = excluded.at,
        id = excluded.id,
        moved_at = now()
    WHERE (p.at, p.id) < (excluded.at, excluded.id);
  END LOOP;
  FOR found IN SELECT * FROM batchq.busy_queues() LOOP
    CONTINUE WHEN NOT found.is_known AND found.seconds < cheap_seconds;
    -- Where nothing is processing: no claim from now on has a lease that ends earlier than this.
    INSERT INTO batchq.positions AS p (index, queue, at)
    VALUES ('lease', found.queue, coalesce(found.at - interval '1 microsecond',
                                           horizon + lease_seconds * interval '1 second'))
    ON CONFLICT (index, queue, priority) DO UPDATE
    SET at = excluded.at,
        moved_at = now()
    WHERE p.at < excluded.at;
  END LOOP;
  PERFORM batchq.check_positions(cheap_seconds);
  RETURN (SELECT count(*) FROM batchq.positions);
END
$$;

COMMENT ON FUNCTION batchq.move_positions(text[], smallint[], float8, float8) IS
  'Moves batchq.positions up to the first live batch of each index, for the given queues and priorities and for all others '
  'whose first batch is expensive to find; forgets the positions that are no longer needed. lease_seconds: the lease of a '
  'claim; cheap_seconds: how long finding the first batch may take without a position. Returns how many positions there are; null if another worker is doing it.';

CREATE FUNCTION batchq.check_positions(cheap_seconds float8)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
  known    batchq.positions;
  began_at timestamptz;
  seconds  float8;
  late_at  timestamptz;
  late_id  bigint;
BEGIN
  FOR known IN
    SELECT * FROM batchq.positions p WHERE p.checked_at < clock_timestamp() - 20 * p.cost_seconds * interval '1 second'
  LOOP
    began_at := clock_timestamp();
    late_at := NULL;
    late_id := NULL;
    IF known.index = 'ready' THEN
      SELECT b.run_at, b.id - 1 INTO late_at, late_id
      FROM batchq.batches_live b
      WHERE b.queue = known.queue
        AND b.status = 'pending'
        AND b.priority = known.priority
        AND (b.run_at, b.id) <= (known.at, known.id)
      ORDER BY b.run_at, b.id
      LIMIT 1;
    ELSE
      SELECT b.lease_expires_at - interval '1 microsecond', known.id INTO late_at, late_id
      FROM batchq.batches_live b
      WHERE b.queue = known.queue
        AND b.status = 'processing'
        AND b.lease_expires_at <= known.at
      ORDER BY b.lease_expires_at
      LIMIT 1;
    END IF;
    seconds := extract(epoch FROM clock_timestamp() - began_at);
    IF late_id IS NULL AND seconds < cheap_seconds THEN
      DELETE FROM batchq.positions WHERE index = known.index AND queue = known.queue AND priority = known.priority;
    ELSE
      UPDATE batchq.positions
      SET at = coalesce(late_at, at),
          id = coalesce(late_id, id),
          cost_seconds = seconds,
          checked_at = clock_timestamp()
      WHERE index = known.index
        AND queue = known.queue
        AND priority = known.priority;
    END IF;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.check_positions(float8) IS
  'Called by batchq.move_positions: reads the part before each position, at most a twentieth of the time. A batch that '
  'became live there moves the position back; where reading the part is cheap, the position is forgotten.';
