-- Where reading an index of the live table begins while dead entries fill it. Each claim and finish leaves dead entries in each
-- index, and they stay for as long as any session holds a snapshot. A new worker, a rescue or a view that reads from the start
-- walks over all of them. So a worker records up to where an index holds only dead entries.
CREATE TABLE batchq.positions (
  index text NOT NULL CONSTRAINT positions_index_is_known CHECK (index IN ('ready', 'lease')),
  queue text NOT NULL, priority smallint NOT NULL DEFAULT 0,
  at timestamptz NOT NULL DEFAULT '-infinity', id bigint NOT NULL DEFAULT 0, cost_seconds float8 NOT NULL DEFAULT 0,
  moved_at timestamptz NOT NULL DEFAULT now(), checked_at timestamptz NOT NULL DEFAULT '-infinity',
  PRIMARY KEY (index, queue, priority)
) WITH (fillfactor = 50);
COMMENT ON TABLE batchq.positions IS
  'Where reading an index of the live table begins. Workers maintain it with batchq.move_positions. A row exists only while dead '
  'entries make reading from the start expensive; without a row, reading begins at the start.';
COMMENT ON COLUMN batchq.positions.index IS
  'ready: pending batches of the queue and priority come after (at, id) in claim order. lease: leases of the queue expire after '
  '"at".';
COMMENT ON COLUMN batchq.positions.priority IS 'Priority; 0 for leases.';
COMMENT ON COLUMN batchq.positions.at IS 'A run_at for ready, a lease_expires_at for lease.';
COMMENT ON COLUMN batchq.positions.id IS 'The id of a batch for ready, 0 for lease.';
COMMENT ON COLUMN batchq.positions.cost_seconds IS 'Duration of the last read of the range before the position.';
COMMENT ON COLUMN batchq.positions.moved_at IS 'Time when a worker last moved the position.';
COMMENT ON COLUMN batchq.positions.checked_at IS
  'Time when the range before the position was last read, to find batches committed late. This takes at most a twentieth of the '
  'time.';

-- The probe of an idle worker, which is most of what an idle queue costs. A function, since its plan is kept, also by a backend
-- that serves many clients. PERFORM, since inside EXISTS Postgres drops ORDER BY and LIMIT: then a bitmap scan, which first reads
-- every entry, looks as cheap as any other plan where the statistics are those of an empty table.
CREATE FUNCTION batchq.has_ready(in_queue text, in_priority smallint, kinds text[], after_run_at float8, after_id bigint)
RETURNS boolean LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$ BEGIN
  PERFORM 1 FROM batchq.batches_live b
  WHERE b.queue = in_queue AND b.status = 'pending' AND b.priority = in_priority
    AND (b.run_at, b.id) > (to_timestamp(after_run_at), after_id) AND b.run_at <= now() AND b.kind = ANY (kinds)
  ORDER BY b.run_at, b.id LIMIT 1;
  RETURN FOUND;
END $$;
COMMENT ON FUNCTION batchq.has_ready IS
  'Returns whether a batch of one queue, one priority and some kinds is ready after a position in claim order: a run_at (seconds '
  'since 1970) and an id.';

-- Neither sequential nor bitmap scans here and below: the plans are kept, whatever the statistics were when they were made. The
-- levels between two known ones are not found by (queue, priority) > (..), which reads all entries of a queue.
CREATE FUNCTION batchq.waiting_levels()
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
             WHERE b.status = 'pending' AND b.queue = after_queue AND b.priority > after_priority
               AND b.priority < CASE WHEN known.queue = after_queue THEN known.priority ELSE 40000 END
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.queue > after_queue AND b.queue < known.queue
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.queue > after_queue AND known.is_end
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.priority, b.run_at, b.id FROM batchq.batches_live b
             WHERE b.status = 'pending' AND b.queue = known.queue AND b.priority < known.priority AND known.queue <> after_queue
             ORDER BY b.queue, b.priority, b.run_at, b.id LIMIT 1)) next
      LIMIT 1;
      is_known := queue IS NULL;
      EXIT WHEN is_known AND known.is_end;
      IF is_known THEN
        began_at := clock_timestamp();
        SELECT b.run_at, b.id INTO at, id FROM batchq.batches_live b
        WHERE b.queue = known.queue AND b.status = 'pending' AND b.priority = known.priority
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
COMMENT ON FUNCTION batchq.waiting_levels IS
  'Returns each queue and priority that has pending batches, with the position of the first in claim order and the seconds that '
  'finding it took. is_known: batchq.positions has a row for the level; "at" and "id" are null if nothing waits after it.';

CREATE FUNCTION batchq.busy_queues() RETURNS TABLE (queue text, at timestamptz, seconds float8, is_known boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE known record; began_at timestamptz; after_queue text := '';
BEGIN
  FOR known IN
    SELECT p.queue, p.at, false AS is_end FROM batchq.positions p WHERE p.index = 'lease'
    UNION ALL SELECT NULL, NULL, true
    ORDER BY is_end, queue
  LOOP
    LOOP -- The queues between the last known one and this one, then this one.
      began_at := clock_timestamp();
      SELECT * INTO queue, at
      FROM ((SELECT b.queue, b.lease_expires_at FROM batchq.batches_live b
             WHERE b.status = 'processing' AND b.queue > after_queue AND b.queue < known.queue
             ORDER BY b.queue, b.lease_expires_at LIMIT 1)
            UNION ALL
            (SELECT b.queue, b.lease_expires_at FROM batchq.batches_live b
             WHERE b.status = 'processing' AND b.queue > after_queue AND known.is_end
             ORDER BY b.queue, b.lease_expires_at LIMIT 1)) next;
      is_known := queue IS NULL;
      EXIT WHEN is_known AND known.is_end;
      IF is_known THEN
        began_at := clock_timestamp();
        SELECT b.lease_expires_at INTO at FROM batchq.batches_live b
        WHERE b.queue = known.queue AND b.status = 'processing' AND b.lease_expires_at > known.at
        ORDER BY b.lease_expires_at LIMIT 1;
        queue := known.queue;
      END IF;
      seconds := extract(epoch FROM clock_timestamp() - began_at);
      RETURN NEXT;
      after_queue := queue;
      EXIT WHEN is_known;
    END LOOP;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.busy_queues IS
  'Returns each queue that has processing batches, with the first lease to expire and the seconds that finding it took. '
  'is_known: batchq.positions has a row for the queue; "at" is null if no lease expires after it.';

-- SECURITY DEFINER, so that a worker needs no rights on batchq.positions.
CREATE FUNCTION batchq.move_positions(queues text[], priorities smallint[], lease_seconds float8,
  cheap_seconds float8 DEFAULT 0.002) RETURNS integer LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
  -- A transaction that began earlier may still commit batches with an earlier run_at.
  horizon CONSTANT timestamptz := now() - interval '1 second';
  found   record;
BEGIN
  IF NOT batchq.try_lock('positions') THEN RETURN NULL; END IF;
  -- The caller names what it serves, since dead entries do not show which queue and priority they belonged to.
  INSERT INTO batchq.positions (index, queue, priority)
  SELECT 'ready', q, p FROM unnest(queues) q, unnest(priorities) p
  UNION ALL SELECT 'lease', q, 0 FROM unnest(queues) q
  ON CONFLICT DO NOTHING;
  FOR found IN SELECT * FROM batchq.waiting_levels() LOOP
    CONTINUE WHEN NOT found.is_known AND found.seconds < cheap_seconds;
    IF found.at IS NULL OR found.at > horizon THEN
      found.at := horizon;
      found.id := 1;
    END IF;
    INSERT INTO batchq.positions AS p (index, queue, priority, at, id)
    VALUES ('ready', found.queue, found.priority, found.at, found.id - 1)
    ON CONFLICT (index, queue, priority) DO UPDATE SET at = excluded.at, id = excluded.id, moved_at = now()
    WHERE (p.at, p.id) < (excluded.at, excluded.id);
  END LOOP;
  FOR found IN SELECT * FROM batchq.busy_queues() LOOP
    CONTINUE WHEN NOT found.is_known AND found.seconds < cheap_seconds;
    -- If nothing is processing: no claim from now on has a lease that expires earlier than this.
    INSERT INTO batchq.positions AS p (index, queue, at)
    VALUES ('lease', found.queue, coalesce(found.at - interval '1 microsecond', horizon + lease_seconds * interval '1 second'))
    ON CONFLICT (index, queue, priority) DO UPDATE SET at = excluded.at, moved_at = now()
    WHERE p.at < excluded.at;
  END LOOP;
  PERFORM batchq.check_positions(cheap_seconds);
  RETURN (SELECT count(*) FROM batchq.positions);
END $$;
COMMENT ON FUNCTION batchq.move_positions IS
  'Moves batchq.positions up to the first live batch of each index, for the given queues and priorities and for all others whose '
  'first batch is expensive to find; deletes positions that are no longer needed. lease_seconds: the lease of a claim. '
  'cheap_seconds: how long finding the first batch may take without a position. Returns the number of positions, or null if '
  'another worker is moving them.';

CREATE FUNCTION batchq.check_positions(cheap_seconds float8) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE known batchq.positions; began_at timestamptz; seconds float8; late_at timestamptz; late_id bigint;
BEGIN
  FOR known IN
    SELECT * FROM batchq.positions p WHERE p.checked_at < clock_timestamp() - 20 * p.cost_seconds * interval '1 second'
  LOOP
    began_at := clock_timestamp();
    IF known.index = 'ready' THEN
      SELECT b.run_at, b.id - 1 INTO late_at, late_id FROM batchq.batches_live b
      WHERE b.queue = known.queue AND b.status = 'pending' AND b.priority = known.priority
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
COMMENT ON FUNCTION batchq.check_positions IS
  'Reads the range before each position, at most a twentieth of the time; called by batchq.move_positions. A batch that became '
  'live there moves the position back. Where reading the range is cheap, the position is deleted.';
