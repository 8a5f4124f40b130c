-- Shards: a busy queue is split into queues that are stored apart, so that in a distributed Postgres it spreads over nodes. To
-- producers and people it stays one queue. A queue that is not split has no row, no trigger and no index here, and pays nothing.
CREATE TABLE batchq.split_queues (
  queue text PRIMARY KEY, number integer GENERATED ALWAYS AS IDENTITY,
  shards integer NOT NULL CONSTRAINT split_queues_shards_are_some CHECK (shards BETWEEN 2 AND 64),
  version integer NOT NULL DEFAULT 1, split_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE batchq.split_queues IS 'Queues that are split into shards, a row each. batchq.split_queue writes it.';
COMMENT ON COLUMN batchq.split_queues.number IS 'Number in the names of the trigger and the index of the queue.';
COMMENT ON COLUMN batchq.split_queues.shards IS 'Number of shards. It never shrinks.';
COMMENT ON COLUMN batchq.split_queues.version IS 'How often the queue was split. A transaction with an older snapshot is refused.';
COMMENT ON COLUMN batchq.split_queues.split_at IS 'Time of the last split.';

CREATE TABLE batchq.shard_pins (queue text NOT NULL, key text COLLATE "C" NOT NULL, shard text NOT NULL, PRIMARY KEY (queue, key));
COMMENT ON TABLE batchq.shard_pins IS
  'Keys that had live batches when a shard was added, and so stay on their shard: the order within a key is kept. The next split '
  'forgets those that have no live batches any more.';
COMMENT ON COLUMN batchq.shard_pins.queue IS 'Queue that is split: batchq.split_queues.queue.';
COMMENT ON COLUMN batchq.shard_pins.shard IS 'Stored name of the shard on which batches with the key are.';

-- ------------------------------------------------------------------------------------------------------------------ names

CREATE FUNCTION batchq.shard_name(queue text, number integer) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE number WHEN 0 THEN queue ELSE queue || '#' || number END;
COMMENT ON FUNCTION batchq.shard_name IS
  'Returns the stored name of a shard: that of the queue itself for number 0, else the queue, # and the number.';

CREATE FUNCTION batchq.shard_names(queue text, shards integer) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ARRAY(SELECT batchq.shard_name(queue, n) FROM generate_series(0, shards - 1) n);
COMMENT ON FUNCTION batchq.shard_names IS 'Returns the stored names of that many shards.';

CREATE FUNCTION batchq.whole_of_shard(stored text) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  RETURN coalesce((SELECT s.queue FROM batchq.split_queues s
                   WHERE s.queue = substring(stored FROM '^(.+)#(?:[1-9]|[1-5][0-9]|6[0-3])$')), stored);
END $$;
COMMENT ON FUNCTION batchq.whole_of_shard IS 'Returns the queue that a shard belongs to; any other name as it is.';

-- Inlined where it is called: a name without # costs one comparison.
CREATE FUNCTION batchq.whole_queue(stored text) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE WHEN strpos(stored, '#') = 0 THEN stored ELSE batchq.whole_of_shard(stored) END;
COMMENT ON FUNCTION batchq.whole_queue IS
  'Returns the queue as people know it for a stored name: the whole for a shard, any other name as it is.';

CREATE FUNCTION batchq.shards_of(of_queue text) RETURNS text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  RETURN coalesce((SELECT batchq.shard_names(s.queue, s.shards) FROM batchq.split_queues s WHERE s.queue = of_queue),
                  ARRAY[of_queue]);
END $$;
COMMENT ON FUNCTION batchq.shards_of IS
  'Returns the stored names of a queue: those of its shards or, if it is not split, its own; an array of null for null.';

CREATE FUNCTION batchq.shards_of_queues(of_queues text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  RETURN (SELECT jsonb_object_agg(s.queue, batchq.shard_names(s.queue, s.shards))
          FROM batchq.split_queues s WHERE s.queue = ANY (of_queues));
END $$;
COMMENT ON FUNCTION batchq.shards_of_queues IS
  'Returns a JSON object: the stored names of the shards of each of these queues that is split; null if none is.';

CREATE VIEW batchq.shards AS
SELECT s.queue, n.number, batchq.shard_name(s.queue, n.number) AS shard
FROM batchq.split_queues s CROSS JOIN LATERAL generate_series(0, s.shards - 1) AS n(number);
COMMENT ON VIEW batchq.shards IS 'The shards of the queues that are split.';
COMMENT ON COLUMN batchq.shards.number IS 'Number of the shard, from 0.';
COMMENT ON COLUMN batchq.shards.shard IS 'Stored name of the shard: batchq.batches.queue of its rows.';

-- ---------------------------------------------------------------------------------------------------------------- routing

CREATE FUNCTION batchq.shard_number(of_text text, shards integer) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ((hashtextextended(of_text, 0) & 9223372036854775807) % shards)::integer;
COMMENT ON FUNCTION batchq.shard_number IS 'Returns the number of the shard for a key or unique key.';

-- Why no order is lost: split_queue replaces this trigger, with its arguments, under a lock that waits until every transaction has
-- ended that has written to batches_live, and that lets none begin to. So each INSERT runs entirely before a split, and then its
-- key is pinned if it is still live, or entirely after it. Then its statements see the pins: at READ COMMITTED each query of this
-- function has a newer snapshot than the lock, and a transaction with an older one is refused by the version. A batch that comes
-- back (a retry, a move) passes through here, too, and so joins the others of its key; parts stay beside their whole.
CREATE FUNCTION batchq.choose_shard() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  whole  constant text := TG_ARGV[0];
  shards constant integer := TG_ARGV[1];
  seen   integer;
  pinned text;
BEGIN
  IF TG_TABLE_SCHEMA <> 'batchq' THEN
    RAISE EXCEPTION 'batchq.choose_shard is a trigger function of batchq''s own tables, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  ELSIF NEW.part_of IS NOT NULL THEN
    RETURN NEW;
  ELSIF NEW.key IS NOT NULL THEN
    SELECT s.version, p.shard INTO seen, pinned
    FROM batchq.split_queues s LEFT JOIN batchq.shard_pins p ON p.queue = s.queue AND p.key = NEW.key
    WHERE s.queue = whole;
    IF seen IS DISTINCT FROM TG_ARGV[2]::integer THEN
      RAISE EXCEPTION 'queue "%" was split after this transaction began, and its snapshot does not show on which shard the key is', whole
        USING ERRCODE = 'serialization_failure', HINT = 'Run the transaction again.';
    END IF;
    NEW.queue := coalesce(pinned, batchq.shard_name(whole, batchq.shard_number(NEW.key, shards)));
  ELSIF NEW.unique_key IS NOT NULL THEN
    NEW.queue := batchq.shard_name(whole, batchq.shard_number(NEW.unique_key, shards));
  ELSIF NEW.queue = whole OR NEW.queue <> ALL (batchq.shard_names(whole, shards)) THEN
    -- 32 ids in a row: a finish names its batches by ranges of ids (with every eighth id, a queue had 0.8 of its rate).
    NEW.queue := batchq.shard_name(whole, (NEW.id / 32 % shards)::integer);
  END IF;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION batchq.choose_shard IS
  'Trigger function: gives a batch of a split queue its shard. Batches with the same key are on one shard; those without a key are '
  'spread by their id, 32 in a row.';

CREATE FUNCTION batchq.shard_of(of_queue text, of_key text DEFAULT NULL, of_unique_key text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE split record; pinned text;
BEGIN
  SELECT s.queue, s.shards INTO split FROM batchq.split_queues s WHERE s.queue = batchq.whole_queue(of_queue);
  IF NOT FOUND THEN RETURN of_queue; END IF;
  SELECT p.shard INTO pinned FROM batchq.shard_pins p WHERE p.queue = split.queue AND p.key = of_key;
  RETURN coalesce(pinned, batchq.shard_name(split.queue, coalesce(batchq.shard_number(coalesce(of_key, of_unique_key), split.shards),
                                                                  floor(random() * split.shards)::integer)));
END $$;
COMMENT ON FUNCTION batchq.shard_of IS
  'Returns the stored name of the shard for a batch with this key or unique_key; without both, any shard of the queue; for a queue '
  'that is not split, its name. Only a distributed Postgres needs it, where no trigger does this: INSERT with the name it returns.';

-- ---------------------------------------------------------------------------------------------------------------- to split

-- The names of all 64 shards are reserved at once, so that neither the index nor the condition of the trigger ever changes. To
-- replace the trigger takes the same lock (SHARE ROW EXCLUSIVE) as the LOCK here: readers go on. To drop it would stop readers, too.
CREATE FUNCTION batchq.split_queue(of_queue text, into_shards integer, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS integer LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
DECLARE
  known record;
  reserved constant text[] := batchq.shard_names(of_queue, 64);
  is_distributed boolean := false;  -- also where Citus is installed, but has not got batchq's tables
  pinned bigint;
BEGIN
  IF to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
    EXECUTE 'SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_dist_partition p WHERE p.logicalrelid = $1)'
    INTO is_distributed USING 'batchq.batches'::regclass;
  END IF;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'batchq.split_queue needs a transaction that is READ COMMITTED: it must see what was just committed';
  END IF;
  BEGIN
    LOCK TABLE batchq.batches_live IN SHARE ROW EXCLUSIVE MODE;
  EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'queue "%" cannot be split now: a transaction that has written batches has not ended for 1 s', of_queue
      USING ERRCODE = 'lock_not_available', HINT = 'Try again; if that does not help, look for long transactions of producers.';
  END;
  PERFORM batchq.check_split(of_queue, into_shards);
  SELECT s.* INTO known FROM batchq.split_queues s WHERE s.queue = of_queue;
  IF into_shards <= known.shards THEN
    IF into_shards = known.shards THEN RETURN known.shards; END IF;
    RAISE EXCEPTION 'queue "%" has % shards: their number cannot shrink to %', of_queue, known.shards, into_shards
      USING HINT = 'An empty shard costs an idle worker one more look into an index.';
  END IF;
  INSERT INTO batchq.split_queues AS s (queue, shards) VALUES (of_queue, into_shards)
  ON CONFLICT (queue) DO UPDATE SET shards = excluded.shards, version = s.version + 1, split_at = now()
  RETURNING * INTO known;
  DELETE FROM batchq.shard_pins p WHERE p.queue = of_queue;
  INSERT INTO batchq.shard_pins (queue, key, shard)
  SELECT DISTINCT ON (b.key) of_queue, b.key, b.queue FROM batchq.batches_live b
  WHERE b.queue = ANY (reserved) AND b.key IS NOT NULL
    AND b.queue <> batchq.shard_name(of_queue, batchq.shard_number(b.key, into_shards))
  ORDER BY b.key, b.queue;
  GET DIAGNOSTICS pinned = ROW_COUNT;
  IF NOT is_distributed THEN
    EXECUTE format('CREATE OR REPLACE TRIGGER %I BEFORE INSERT ON batchq.batches_live FOR EACH ROW WHEN (NEW.queue = ANY (%L::text[])) '
                   'EXECUTE FUNCTION batchq.choose_shard(%L, %L, %L)',
                   'choose_shard_' || known.number, reserved, of_queue, into_shards, known.version);
  END IF;
  IF NOT is_distributed AND known.version = 1 THEN
    EXECUTE format('CREATE UNIQUE INDEX %I ON batchq.batches_live (kind, unique_key) '
                   'WHERE unique_key IS NOT NULL AND queue = ANY (%L::text[])', 'batches_live_unique_key_' || known.number, reserved);
  END IF;
  PERFORM batchq.show_wholes();
  PERFORM batchq.note_verb('split_queue', 0, NULL, of_queue, NULL,
                           jsonb_build_object('shards', into_shards, 'pinned_keys', pinned), reason, actor);
  RETURN known.shards;
END $$;
COMMENT ON FUNCTION batchq.split_queue IS
  'Splits a queue into shards, or adds shards to one that is split: SELECT batchq.split_queue(''mail'', 8). Their number never '
  'shrinks. Writers of batches wait meanwhile: for the keys of the queue to be read, and before that for at most 1 s until the '
  'transactions of other writers have ended; if they have not, it raises lock_not_available and has changed nothing: try again. '
  'Returns the number of shards. Only for the owner of the schema, or whom he grants EXECUTE.';

-- Not before a queue is split: the planner has no statistics of an expression, so a filter by it reads more rows. A later migration
-- that replaces the view calls this if batchq.split_queues has a row.
CREATE FUNCTION batchq.show_wholes() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF position('whole_queue' IN pg_get_viewdef('batchq.status'::regclass)) = 0 THEN
    PERFORM batchq.amend_view('batchq.status', ARRAY['b.queue,', 'batchq.whole_queue(b.queue) AS queue,']);
    PERFORM batchq.grant_to_readers('batchq.status',
      'EXECUTE ON FUNCTION batchq.progress_of_parts(bigint), batchq.whole_queue(text), batchq.whole_of_shard(text)');
  END IF;
END $$;
COMMENT ON FUNCTION batchq.show_wholes IS 'Makes the column "queue" of batchq.status that of the whole queue, instead of the stored one.';

CREATE FUNCTION batchq.check_split(of_queue text, into_shards integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE names constant text[] := (batchq.shard_names(of_queue, 64))[2:]; taken text;
BEGIN
  IF into_shards BETWEEN 2 AND 64 IS NOT TRUE THEN
    RAISE EXCEPTION 'a queue can be split into 2 to 64 shards, not %', coalesce(into_shards::text, 'null');
  ELSIF octet_length(of_queue) BETWEEN 1 AND 125 IS NOT TRUE THEN
    RAISE EXCEPTION 'the name of a queue that is split must have 1 to 125 bytes';
  ELSIF batchq.whole_queue(of_queue) <> of_queue THEN
    RAISE EXCEPTION 'queue "%" is a shard of queue "%"', of_queue, batchq.whole_queue(of_queue)
      USING HINT = format('SELECT batchq.split_queue(%L, ...) adds shards to the whole.', batchq.whole_queue(of_queue));
  ELSIF EXISTS (SELECT 1 FROM batchq.split_queues s WHERE s.queue = of_queue) THEN
    RETURN;  -- the names are its own
  END IF;
  SELECT format('%s "%s"', t.what, t.name) INTO taken
  FROM (
    SELECT 'live batches are in queue' AS what, n AS name FROM unnest(names) n
    WHERE EXISTS (SELECT 1 FROM batchq.batches_live b WHERE b.queue = n)
    UNION ALL SELECT 'failed batches are in queue', n FROM unnest(names) n
    WHERE EXISTS (SELECT 1 FROM batchq.batches_finished b WHERE b.status = 'failed' AND b.queue = n)
    UNION ALL SELECT 'a limit is for queue', l.queue FROM batchq.limits_in_force l WHERE l.queue = ANY (names)
    UNION ALL SELECT 'a pause is for queue', p.queue FROM batchq.pauses p WHERE p.queue = ANY (names)
    UNION ALL SELECT 'a throttle is for queue', t.queue FROM batchq.throttles t WHERE t.queue = ANY (names)
    UNION ALL SELECT 'a schedule is for queue', s.queue FROM batchq.schedules s WHERE s.queue = ANY (names)
    UNION ALL SELECT format('worker %s serves queue', w.id), n FROM batchq.workers w JOIN unnest(names) n ON n = ANY (w.queues)
    WHERE w.heartbeat_at > now() - interval '1 minute'
    UNION ALL SELECT 'it would rename the split queue', s.queue FROM batchq.split_queues s WHERE s.queue = ANY (names)
  ) t LIMIT 1;
  IF taken IS NOT NULL THEN
    RAISE EXCEPTION 'queue "%" cannot be split: %, and "%" to "%" would be the names of its shards', of_queue, taken, names[1], names[63]
      USING HINT = 'Rename that queue: move its batches, and what else names it.';
  END IF;
END $$;
COMMENT ON FUNCTION batchq.check_split IS
  'Refuses, with the reason, a queue that cannot be split into so many shards: one that is a shard, or whose names are in use.';

-- --------------------------------------------------------------------------------------- what was there before, with shards

-- Limits, throttles and the audit know the whole.
SELECT batchq.amend('batchq.ready_of_keys', ARRAY['t.queue = in_queue', 't.queue = batchq.whole_queue(in_queue)']);
SELECT batchq.amend('batchq.spread_batch', ARRAY['f.queue = in_queue', 'f.queue = batchq.whole_queue(in_queue)']);
CREATE OR REPLACE FUNCTION batchq.note_verb(verb text, batches bigint, batch_id bigint, queue text, kind text, details jsonb,
                                            reason text, actor text)
RETURNS bigint LANGUAGE sql
BEGIN ATOMIC
  INSERT INTO batchq.audit (verb, batches, batch_id, queue, kind, details, reason, actor)
  VALUES (verb, batches, batch_id, batchq.whole_queue(queue), kind, details, left(reason, 2000), left(actor, 200))
  RETURNING id;
END;
COMMENT ON COLUMN batchq.audit.verb IS
  'cancel, retry, snooze, set_priority, move, pause, resume, drain_worker, set_limit, end_throttle, set_schedule, pause_schedule, '
  'resume_schedule, run_schedule, remove_schedule, copy or split_queue.';

CREATE FUNCTION batchq.refuse_shard() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF batchq.whole_queue(NEW.queue) <> NEW.queue THEN
    RAISE EXCEPTION 'queue "%" is a shard of queue "%": limits, pauses and schedules are for the whole', NEW.queue, batchq.whole_queue(NEW.queue)
      USING ERRCODE = 'check_violation', CONSTRAINT = TG_TABLE_NAME || '_queue_is_whole', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = format('Use the queue %s.', batchq.whole_queue(NEW.queue));
  END IF;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION batchq.refuse_shard IS 'Trigger function: refuses the name of a shard where only the whole queue has an effect.';
CREATE TRIGGER refuse_shard BEFORE INSERT OR UPDATE OF queue ON batchq.limits
  FOR EACH ROW WHEN (NEW.queue LIKE '%#%') EXECUTE FUNCTION batchq.refuse_shard();
CREATE TRIGGER refuse_shard BEFORE INSERT OR UPDATE OF queue ON batchq.pauses
  FOR EACH ROW WHEN (NEW.queue LIKE '%#%') EXECUTE FUNCTION batchq.refuse_shard();
CREATE TRIGGER refuse_shard BEFORE INSERT OR UPDATE OF queue ON batchq.schedules
  FOR EACH ROW WHEN (NEW.queue LIKE '%#%') EXECUTE FUNCTION batchq.refuse_shard();

-- A filter by queue finds the batches of all its shards, and a move within the whole is none.
SELECT batchq.amend('batchq.bulk_find', ARRAY['queue = in_queue', 'batchq.whole_queue(queue) = in_queue']);
SELECT batchq.amend('batchq.bulk', ARRAY['b.queue <> change', 'batchq.whole_queue(b.queue) <> change']);
SELECT batchq.amend('batchq.change_pending', ARRAY['b.queue <> new_queue', 'batchq.whole_queue(b.queue) <> new_queue']);
SELECT batchq.amend('batchq.newest_live', ARRAY['b.queue = in_queue', 'batchq.whole_queue(b.queue) = in_queue']);

-- A batch that is moved or retried may come to another shard than was asked for. What belongs to it comes along.
CREATE FUNCTION batchq.follow_to_shard(from_queue text, ids bigint[], queues text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
BEGIN
  WITH gone AS (
    DELETE FROM batchq.failed_items f USING unnest(ids, queues) AS u(id, queue)
    WHERE f.queue = from_queue AND f.batch_id = u.id AND u.queue <> from_queue
    RETURNING f.*, u.queue AS new_queue
  )
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, retryable, failed_at, run_at)
  SELECT g.new_queue, g.batch_id, g.item_index, g.item, g.error, g.attempt, g.retryable, g.failed_at, g.run_at FROM gone g;
  UPDATE batchq.parts p SET queue = u.queue FROM unnest(ids, queues) AS u(id, queue) WHERE p.batch_id = u.id AND p.queue <> u.queue;
END $$;
COMMENT ON FUNCTION batchq.follow_to_shard IS
  'Gives the failed items, which have from_queue, and the parts of these batches the queues in which the batches are now.';

SELECT batchq.amend('batchq.move_pending', ARRAY['moved integer;', 'moved integer; new_ids bigint[]; new_queues text[];',
  E'RETURNING b.*\n  )\n  INSERT INTO batchq.batches', E'RETURNING b.*\n  ), inserted AS (\n  INSERT INTO batchq.batches',
  E'FROM gone g;\n  GET DIAGNOSTICS moved = ROW_COUNT;',
  E'FROM gone g\n  RETURNING id, queue\n  )\n  SELECT array_agg(i.id), array_agg(i.queue), count(*) INTO new_ids, new_queues, moved FROM inserted i;',
  'RETURN moved;', E'PERFORM batchq.follow_to_shard(new_queue, new_ids, new_queues);\n  RETURN moved;']);
SELECT batchq.amend('batchq.revive', ARRAY['total integer;', 'total integer; new_queues text[];',
  E'RETURNING id\n  ), gone AS', E'RETURNING id, queue\n  ), gone AS',
  'SELECT (SELECT array_agg(g.id) FROM gone g), (SELECT count(*) FROM chosen c) INTO done, total;',
  E'SELECT (SELECT array_agg(i.id ORDER BY i.id) FROM inserted i JOIN gone g ON g.id = i.id), (SELECT count(*) FROM chosen c),\n'
  '    (SELECT array_agg(i.queue ORDER BY i.id) FROM inserted i JOIN gone g ON g.id = i.id) INTO done, total, new_queues;\n'
  '  IF in_queue <> ANY (new_queues) THEN\n'
  '    PERFORM batchq.follow_to_shard(in_queue, done, new_queues);\n'
  '  END IF;',
  'WHERE b.queue = in_queue AND b.id = ANY (done) AND b.id', 'WHERE b.queue = ANY (new_queues) AND b.id = ANY (done) AND b.id',
  'f.queue = in_queue AND f.batch_id = ANY (done)', 'f.queue = ANY (new_queues) AND f.batch_id = ANY (done)']);

-- Counts and lists for people: by the whole.
SELECT batchq.amend('batchq.latest_failures', ARRAY['SELECT b.id, b.queue,', 'SELECT b.id, batchq.whole_queue(b.queue),']);
SELECT batchq.amend('batchq.stuck_waiting', ARRAY['SELECT u.queue, u.kind', 'SELECT batchq.whole_queue(u.queue), u.kind']);
SELECT batchq.amend('batchq.count_waiting', ARRAY['SELECT s.queue, s.kind, count(*)', 'SELECT batchq.whole_queue(s.queue), s.kind, count(*)',
  'GROUP BY s.queue, s.kind', 'GROUP BY batchq.whole_queue(s.queue), s.kind']);
SELECT batchq.amend('batchq.count_failed', ARRAY['SELECT p.queue, p.kind, least(n.count, share), n.count > share',
  'SELECT batchq.whole_queue(p.queue), p.kind, sum(least(n.count, share))::bigint, bool_or(n.count > share)',
  'LIMIT share + 1) first_ones) n;', E'LIMIT share + 1) first_ones) n\n  GROUP BY batchq.whole_queue(p.queue), p.kind;']);
SELECT batchq.amend('batchq.count_live', ARRAY['SELECT queue, kind, state, greatest(c.count, s.count), coalesce(c.late, 0), least(c.oldest_at, s.oldest_at),',
  'SELECT batchq.whole_queue(queue), kind, state, sum(greatest(c.count, s.count))::bigint, sum(coalesce(c.late, 0))::bigint, min(least(c.oldest_at, s.oldest_at)),',
  'cut.queue IS NOT NULL OR EXISTS (SELECT 1 FROM batchq.positions p WHERE p.queue = c.queue),',
  'bool_or(cut.queue IS NOT NULL OR EXISTS (SELECT 1 FROM batchq.positions p WHERE p.queue = c.queue)),',
  'cut.known_until IS NOT NULL AND (c.oldest_at IS NULL OR c.oldest_at > cut.known_until)',
  'bool_or(cut.known_until IS NOT NULL AND (c.oldest_at IS NULL OR c.oldest_at > cut.known_until))',
  'LEFT JOIN cut USING (queue, state);', E'LEFT JOIN cut USING (queue, state)\n  GROUP BY batchq.whole_queue(queue), kind, state;']);

-- The view of schedules finds the latest batch where it was stored.
SELECT batchq.amend('batchq.run_schedule', ARRAY['made bigint;', 'made bigint; made_in text;',
  'RETURNING id INTO made;', 'RETURNING id, queue INTO made, made_in;', 'last_queue = s.queue', 'last_queue = made_in']);
SELECT batchq.amend('batchq.fire_schedules', ARRAY['newest bigint;', 'newest bigint; newest_in text;',
  E'RETURNING id\n', E'RETURNING id, queue\n', 'SELECT count(*), max(i.id) INTO made, newest FROM',
  'SELECT count(*), max(i.id), (array_agg(i.queue ORDER BY i.id DESC))[1] INTO made, newest, newest_in FROM',
  'THEN s.queue ELSE', 'THEN newest_in ELSE']);

-- The keys of a queue are those of its shards, one after the other; a key is on one shard.
SELECT batchq.amend('batchq.count_keys', ARRAY['queue := last_queue;', 'queue := batchq.whole_queue(last_queue);']);
SELECT batchq.amend('batchq.count_keys', ARRAY['FUNCTION batchq.count_keys(', 'FUNCTION batchq.count_stored_keys(']);
CREATE OR REPLACE FUNCTION batchq.count_keys(most_keys integer DEFAULT 1000, most_per_key integer DEFAULT 100, in_queue text DEFAULT NULL)
RETURNS TABLE (queue text, key text, waiting bigint, scheduled bigint, running bigint, oldest_at timestamptz, is_estimate boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RETURN QUERY
  SELECT k.* FROM unnest(batchq.shards_of(in_queue)) AS s(shard)
  CROSS JOIN LATERAL batchq.count_stored_keys(most_keys, most_per_key, s.shard) k
  LIMIT most_keys;
END $$;
COMMENT ON FUNCTION batchq.count_stored_keys IS 'batchq.count_keys for one stored queue, or for all.';

-- Workers in other languages claim from the whole, too: from its shards, beginning with any of them. Expired leases are rescued alike.
SELECT batchq.amend('batchq.claim', ARRAY['free text[]; level', 'free text[]; shard text; first integer; level',
  'WHILE wanted > 0 AND free <> ''{}'' LOOP',
  E'first := floor(random() * 64)::integer;\n'
  '  FOR shard IN\n'
  '    SELECT s.shard FROM unnest(batchq.shards_of(claim.queue)) WITH ORDINALITY AS s(shard, number)\n'
  '    ORDER BY (s.number + first) % cardinality(batchq.shards_of(claim.queue))\n'
  '  LOOP\n  level := -32768;\n  WHILE wanted > 0 AND free <> ''{}'' LOOP',
  'b.queue = claim.queue', 'b.queue = shard',
  E'level := level + 1;\n  END LOOP;', E'level := level + 1;\n  END LOOP;\n  END LOOP;']);
SELECT batchq.amend('batchq.rescue', ARRAY['error text;', 'error text; shard text;',
  E'BEGIN\n  FOR b IN', E'BEGIN\n  FOREACH shard IN ARRAY batchq.shards_of(rescue.queue) LOOP\n  FOR b IN',
  'WHERE l.queue = rescue.queue AND', 'WHERE l.queue = shard AND',
  'LIMIT rescue.most', 'LIMIT rescue.most - rescued',
  'batchq.requeue_claim(rescue.queue,', 'batchq.requeue_claim(shard,',
  'batchq.finish_claim(rescue.queue,', 'batchq.finish_claim(shard,',
  E'END LOOP;\n  RETURN rescued;', E'END LOOP;\n  END LOOP;\n  RETURN rescued;']);

SELECT batchq.amend_view('batchq.status', ARRAY[E'b.spread\n   FROM', E'b.spread,\n    b.queue AS shard\n   FROM']);
COMMENT ON COLUMN batchq.status.shard IS
  'Stored name of the queue: that of the shard in a queue that is split, else the same as queue. batchq.batches.queue of the row.';

-- --------------------------------------------------------------------------------------------------------------------- rights

SELECT batchq.amend_view('batchq.duties', ARRAY[
  '{append_error,', '{shards_of_queues,shards_of,whole_queue,whole_of_shard,append_error,',
  '{shown_status,', '{shards_of,whole_queue,whole_of_shard,shard_name,shown_status,',
  ',schedule_status,', ',schedule_status,split_queues,shard_pins,shards,',
  'VALUES (''producer''', 'VALUES (''producer''::text,''EXECUTE''::text,''{shard_of}''::text[]), (''producer''']);
SELECT batchq.renew_duties();

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.grant_to_readers('batchq.status',
  'EXECUTE ON FUNCTION batchq.progress_of_parts(bigint), batchq.whole_queue(text), batchq.whole_of_shard(text)');
SELECT batchq.give_replica_identities();
