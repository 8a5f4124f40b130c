-- Schedules: batches that are made at certain times. No leader: any worker makes the batch of a due row and sets its next time, in
-- one transaction (batchq.fire_schedules). Workers compute times, since the rules of cron expressions are not Postgres'.
CREATE TABLE batchq.schedules (
  name              text        PRIMARY KEY CONSTRAINT schedules_name_fits CHECK (octet_length(name) BETWEEN 1 AND 200),
  cron              text        NOT NULL
    CONSTRAINT schedules_cron_fits CHECK (octet_length(cron) <= 300)
    CONSTRAINT schedules_cron_has_5_or_6_fields CHECK
      (cron ~ '^\s*@' OR array_length(regexp_split_to_array(btrim(cron, E' \t\n\r'), '\s+'), 1) IN (5, 6))
    CONSTRAINT schedules_cron_is_readable CHECK
      (cron ~* '^\s*(@every\s+\d{1,9}\s*(s|m|h|d)(ec|econd|in|inute|our|ay)?s?|@(hourly|daily|weekly|monthly|yearly)|[0-9a-z*,/#\s-]+)\s*$'),
  time_zone         text        NOT NULL DEFAULT 'UTC',
  queue             text        NOT NULL DEFAULT 'default'
                                CONSTRAINT schedules_queue_is_named CHECK (octet_length(queue) BETWEEN 1 AND 128),
  kind              text        NOT NULL CONSTRAINT schedules_kind_is_named CHECK (octet_length(kind) BETWEEN 1 AND 200),
  payload           jsonb       NOT NULL DEFAULT '{}'
                                CONSTRAINT schedules_payload_fits CHECK (octet_length(payload::text) <= 1048576),
  missed            text        NOT NULL DEFAULT 'coalesce'
                                CONSTRAINT schedules_missed_is_known CHECK (missed IN ('coalesce', 'skip', 'catch_up')),
  catch_up_most     integer     NOT NULL DEFAULT 100 CONSTRAINT schedules_catch_up_is_bounded CHECK (catch_up_most BETWEEN 1 AND 1000),
  overlap           text        NOT NULL DEFAULT 'allow' CONSTRAINT schedules_overlap_is_known CHECK (overlap IN ('allow', 'skip')),
  paused            boolean     NOT NULL DEFAULT false,
  is_declared       boolean     NOT NULL DEFAULT false,
  declared_at       timestamptz,
  changed_at        timestamptz NOT NULL DEFAULT now(),
  revision          integer     NOT NULL DEFAULT 0,
  next_at           timestamptz,
  last_at           timestamptz,
  last_batch_id     bigint,
  last_queue        text,
  last_late_seconds float8,
  batches_made      bigint      NOT NULL DEFAULT 0,
  ticks_missed      bigint      NOT NULL DEFAULT 0,
  ticks_overlapped  bigint      NOT NULL DEFAULT 0,
  error             text
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.1);
COMMENT ON TABLE batchq.schedules IS
  'Schedules: each makes batches of one kind at certain times. INSERT, UPDATE and DELETE change them, or batchq.set_schedule and its '
  'like; workers follow within two seconds. Each tick makes exactly one batch, or is counted in ticks_missed or ticks_overlapped.';
COMMENT ON COLUMN batchq.schedules.name IS 'Name of the schedule, chosen by people or by code.';
COMMENT ON COLUMN batchq.schedules.cron IS
  'When it is due: a cron expression of 5 fields (minute, hour, day of month, month, day of week), of 6 with seconds first, @hourly, '
  '@daily, @weekly, @monthly, @yearly, or @every with a period: @every 30 s, 5 m, 2 h, 1 d.';
COMMENT ON COLUMN batchq.schedules.time_zone IS
  'Time zone in which the cron expression is read, such as Europe/Berlin. Where clocks change, Debian''s rules of cron apply.';
COMMENT ON COLUMN batchq.schedules.queue IS 'Queue of the batches.';
COMMENT ON COLUMN batchq.schedules.kind IS 'Kind of the batches.';
COMMENT ON COLUMN batchq.schedules.payload IS
  'Payload of the batches, at most 1 MiB as text. If it has a key "tick" with the value null, that becomes the time of the tick.';
COMMENT ON COLUMN batchq.schedules.missed IS
  'What happens to ticks at which no worker ran: coalesce (one batch for all of them), skip (no batch, if the latest is more than a '
  'minute ago), catch_up (a batch for each of the latest catch_up_most).';
COMMENT ON COLUMN batchq.schedules.catch_up_most IS 'Most batches that catch_up makes for missed ticks, from 1 to 1000.';
COMMENT ON COLUMN batchq.schedules.overlap IS
  'Whether a tick makes a batch while an earlier one is pending or processing: allow, or skip. With skip, batches have the '
  'unique_key "schedule:" and the name.';
COMMENT ON COLUMN batchq.schedules.paused IS 'Whether ticks pass without a batch. They are not counted as missed.';
COMMENT ON COLUMN batchq.schedules.is_declared IS
  'Whether the row is what code declares. It becomes false when a person changes the row, whose word then counts. A declared schedule '
  'is due only while a live worker declares it (batchq.workers.schedules).';
COMMENT ON COLUMN batchq.schedules.declared_at IS 'Time when a worker last changed the row to what its code declares.';
COMMENT ON COLUMN batchq.schedules.changed_at IS 'Time of the last change of the definition, or of the last resume. Ticks count from here.';
COMMENT ON COLUMN batchq.schedules.revision IS 'Number of changes of the definition. What a worker planned for an earlier one does nothing.';
COMMENT ON COLUMN batchq.schedules.next_at IS 'Time of the next tick; null until a worker has computed it.';
COMMENT ON COLUMN batchq.schedules.last_at IS 'Tick of the latest batch.';
COMMENT ON COLUMN batchq.schedules.last_batch_id IS 'The latest batch, also one of batchq.run_schedule: batchq.batches.id.';
COMMENT ON COLUMN batchq.schedules.last_queue IS 'Queue in which the latest batch was made.';
COMMENT ON COLUMN batchq.schedules.last_late_seconds IS 'Seconds between the tick and the insert of the latest batch.';
COMMENT ON COLUMN batchq.schedules.batches_made IS 'Number of batches that ticks have made.';
COMMENT ON COLUMN batchq.schedules.ticks_missed IS
  'Number of ticks without a batch by the rule of missed, or because the database refused the batch (see error).';
COMMENT ON COLUMN batchq.schedules.ticks_overlapped IS 'Number of ticks without a batch because an earlier batch was still live.';
COMMENT ON COLUMN batchq.schedules.error IS
  'Why the schedule does not work, found by a worker; null: it works. Without next_at, it waits for a change; with next_at, the latest '
  'batch was refused, and the next tick tries again.';

ALTER TABLE batchq.workers ADD COLUMN schedules text[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN batchq.workers.schedules IS 'Schedules that the worker''s app declares: batchq.schedules.name.';

-- A person's change of a declared row makes the row that person's. Workers are told apart by declared_at, which only they set.
CREATE FUNCTION batchq.check_schedule() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE is_new constant boolean := TG_OP = 'INSERT'; hint text;
BEGIN
  IF NEW.time_zone <> 'UTC' AND (is_new OR NEW.time_zone <> OLD.time_zone)
     AND NOT EXISTS (SELECT 1 FROM batchq.schedules s WHERE s.time_zone = NEW.time_zone AND s.error IS NULL)
     AND NOT EXISTS (SELECT 1 FROM pg_timezone_names n WHERE n.name = NEW.time_zone) THEN
    SELECT 'Perhaps ' || string_agg(n.name, ', ') || '?' INTO hint
    FROM pg_timezone_names n
    WHERE (lower(n.name) = lower(NEW.time_zone) OR n.name ILIKE '%/' || NEW.time_zone)
      AND n.name !~ '^(posix|right)/';  -- second names, where the system's zones are used
    RAISE EXCEPTION 'there is no time zone %', quote_literal(NEW.time_zone)
      USING ERRCODE = 'check_violation', CONSTRAINT = 'schedules_time_zone_is_known', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = coalesce(hint, 'Names are such as Europe/Berlin, or UTC; SELECT name FROM pg_timezone_names lists them.');
  END IF;
  IF is_new THEN RETURN NEW; END IF;
  IF (NEW.cron, NEW.time_zone, NEW.queue, NEW.kind, NEW.payload, NEW.missed, NEW.catch_up_most, NEW.overlap)
     IS DISTINCT FROM (OLD.cron, OLD.time_zone, OLD.queue, OLD.kind, OLD.payload, OLD.missed, OLD.catch_up_most, OLD.overlap) THEN
    NEW.revision := OLD.revision + 1;
    NEW.is_declared := NEW.is_declared AND NEW.declared_at IS DISTINCT FROM OLD.declared_at;
    NEW.error := NULL;
  END IF;
  IF (NEW.cron, NEW.time_zone) IS DISTINCT FROM (OLD.cron, OLD.time_zone) OR (OLD.paused AND NOT NEW.paused)
     OR (OLD.next_at IS NULL AND OLD.error IS NOT NULL AND NEW.error IS NULL) THEN
    NEW.revision := OLD.revision + 1;
    NEW.next_at := NULL;
    NEW.error := NULL;
    NEW.changed_at := clock_timestamp();
  END IF;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION batchq.check_schedule IS
  'Trigger function of batchq.schedules: refuses a time zone that Postgres does not know; makes workers compute the next time again '
  'after a change or a resume; lets what a person writes count instead of what code declares.';
CREATE TRIGGER check_schedule BEFORE INSERT OR UPDATE ON batchq.schedules
  FOR EACH ROW EXECUTE FUNCTION batchq.check_schedule();

CREATE FUNCTION batchq.schedule_payload(payload jsonb, tick timestamptz) RETURNS jsonb
LANGUAGE sql STABLE
RETURN CASE WHEN payload -> 'tick' = 'null'::jsonb
            THEN payload || jsonb_build_object('tick', to_char(tick AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
            ELSE payload END;
COMMENT ON FUNCTION batchq.schedule_payload IS
  'Returns the payload of the batch of a tick: a key "tick" with the value null becomes the time of the tick, in UTC.';

-- SECURITY DEFINER, since a worker may not insert batches. A batch that the database refuses (by a constraint or somebody's trigger)
-- fails only its own schedule; other errors, such as a full disk, undo all, and the worker tries again.
CREATE FUNCTION batchq.fire_schedules(plans jsonb) RETURNS TABLE (name text, batches integer, late_seconds float8, refused text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE plan record; due record; made integer; newest bigint; refusal text; wanted integer; last_tick timestamptz;
BEGIN
  FOR plan IN
    SELECT * FROM jsonb_to_recordset(plans) AS p(name text, revision integer, due_at timestamptz, ticks timestamptz[], missed bigint,
      next_at timestamptz, error text)
  LOOP
    SELECT s.* INTO due
    FROM batchq.schedules s
    WHERE s.name = plan.name AND s.revision = plan.revision AND s.next_at IS NOT DISTINCT FROM plan.due_at AND NOT s.paused
      AND (s.next_at IS NULL OR s.next_at <= clock_timestamp())
      AND (NOT s.is_declared OR EXISTS (SELECT 1 FROM batchq.workers w WHERE w.heartbeat_at > now() - interval '1 minute'
                                          AND s.name = ANY (w.schedules)))
    FOR UPDATE SKIP LOCKED;
    CONTINUE WHEN NOT FOUND;
    made := 0;
    newest := NULL;
    refusal := plan.error;
    wanted := coalesce(cardinality(plan.ticks), 0);
    last_tick := plan.ticks[wanted];
    IF wanted > 0 THEN
      BEGIN
        WITH inserted AS (
          INSERT INTO batchq.batches (queue, kind, payload, unique_key)
          SELECT due.queue, due.kind, batchq.schedule_payload(due.payload, t.tick),
            CASE due.overlap WHEN 'skip' THEN 'schedule:' || due.name END
          FROM unnest(plan.ticks) AS t(tick) ORDER BY t.tick
          ON CONFLICT DO NOTHING
          RETURNING id
        )
        SELECT count(*), max(i.id) INTO made, newest FROM inserted i;
      EXCEPTION WHEN raise_exception OR data_exception OR integrity_constraint_violation OR insufficient_privilege
                  OR undefined_table OR undefined_column OR undefined_function THEN
        refusal := 'the batch was refused: ' || left(SQLERRM, 1000);
      END;
    END IF;
    UPDATE batchq.schedules s
    SET next_at = plan.next_at, error = refusal, batches_made = s.batches_made + made,
      ticks_missed = s.ticks_missed + coalesce(plan.missed, 0) + CASE WHEN refusal IS NULL THEN 0 ELSE wanted END,
      ticks_overlapped = s.ticks_overlapped + CASE WHEN refusal IS NULL THEN wanted - made ELSE 0 END,
      last_at = CASE WHEN made > 0 THEN last_tick ELSE s.last_at END, last_batch_id = coalesce(newest, s.last_batch_id),
      last_queue = CASE WHEN made > 0 THEN s.queue ELSE s.last_queue END,
      last_late_seconds = CASE WHEN made > 0 THEN date_part('epoch', clock_timestamp() - last_tick) ELSE s.last_late_seconds END
    WHERE s.name = plan.name;
    name := plan.name;
    batches := made;
    late_seconds := date_part('epoch', clock_timestamp() - last_tick);
    refused := refusal;
    RETURN NEXT;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.fire_schedules IS
  'Carries out what a worker has planned for schedules, and returns those for which it did: how many batches it made, how late, and why '
  'a batch was refused. plans: a JSON array, an object each: name, revision and due_at (as the worker read them; if the row differs, '
  'or another worker holds it, nothing happens), ticks (a batch for each), missed (ticks without one), next_at, error.';

CREATE FUNCTION batchq.declare_schedules(declared jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE one record;
BEGIN
  FOR one IN
    SELECT * FROM jsonb_to_recordset(declared) AS d(name text, cron text, time_zone text, queue text, kind text, payload jsonb, missed text,
      catch_up_most integer, overlap text) ORDER BY d.name  -- in one order, so that two workers do not wait for each other in a circle
  LOOP
    CONTINUE WHEN EXISTS (
      SELECT 1 FROM batchq.schedules s
      WHERE s.name = one.name AND (NOT s.is_declared OR
        (s.cron, s.time_zone, s.queue, s.kind, s.payload, s.missed, s.catch_up_most, s.overlap)
        IS NOT DISTINCT FROM (one.cron, one.time_zone, one.queue, one.kind, one.payload, one.missed, one.catch_up_most, one.overlap)));
    INSERT INTO batchq.schedules AS s (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, is_declared, declared_at)
    VALUES (one.name, one.cron, one.time_zone, one.queue, one.kind, one.payload, one.missed, one.catch_up_most, one.overlap, true,
            clock_timestamp())
    ON CONFLICT ON CONSTRAINT schedules_pkey DO UPDATE
    SET cron = excluded.cron, time_zone = excluded.time_zone, queue = excluded.queue, kind = excluded.kind, payload = excluded.payload,
        missed = excluded.missed, catch_up_most = excluded.catch_up_most, overlap = excluded.overlap, declared_at = excluded.declared_at
    WHERE s.is_declared;
  END LOOP;
END $$;
COMMENT ON FUNCTION batchq.declare_schedules IS
  'Writes the schedules that code declares, a JSON array of rows of batchq.schedules, where no person has written the row. Each worker '
  'calls it when it starts; the worker that started last is right.';

-- --------------------------------------------------------------------------------------------------------------- verbs

CREATE FUNCTION batchq.set_schedule(name text, cron text, kind text, time_zone text DEFAULT 'UTC', queue text DEFAULT 'default',
  payload jsonb DEFAULT '{}', missed text DEFAULT 'coalesce', catch_up_most integer DEFAULT 100, overlap text DEFAULT 'allow',
  reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  INSERT INTO batchq.schedules AS s (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap)
  VALUES (set_schedule.name, set_schedule.cron, set_schedule.time_zone, set_schedule.queue, set_schedule.kind, set_schedule.payload,
          set_schedule.missed, set_schedule.catch_up_most, set_schedule.overlap)
  ON CONFLICT ON CONSTRAINT schedules_pkey DO UPDATE
  SET cron = excluded.cron, time_zone = excluded.time_zone, queue = excluded.queue, kind = excluded.kind, payload = excluded.payload,
      missed = excluded.missed, catch_up_most = excluded.catch_up_most, overlap = excluded.overlap
  WHERE (s.cron, s.time_zone, s.queue, s.kind, s.payload, s.missed, s.catch_up_most, s.overlap) IS DISTINCT FROM
    (excluded.cron, excluded.time_zone, excluded.queue, excluded.kind, excluded.payload, excluded.missed, excluded.catch_up_most,
     excluded.overlap);
  IF NOT FOUND THEN RETURN false; END IF;
  PERFORM batchq.note_verb('set_schedule', 0, NULL, queue, kind, jsonb_build_object('schedule', name, 'cron', cron, 'time_zone', time_zone,
    'missed', missed, 'overlap', overlap), reason, actor);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.set_schedule IS
  'Adds a schedule, or replaces the definition of the one with this name. Returns whether anything changed.';

CREATE FUNCTION batchq.pause_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE known record;
BEGIN
  SELECT s.queue, s.kind, s.paused INTO known FROM batchq.schedules s WHERE s.name = pause_schedule.name FOR UPDATE;
  IF NOT FOUND THEN RETURN NULL; END IF;
  IF known.paused THEN RETURN false; END IF;
  UPDATE batchq.schedules s SET paused = true WHERE s.name = pause_schedule.name;
  PERFORM batchq.note_verb('pause_schedule', 0, NULL, known.queue, known.kind, jsonb_build_object('schedule', name), reason, actor);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.pause_schedule IS
  'Pauses a schedule: its ticks pass without a batch. Returns whether that changed anything; null: there is no such schedule.';

CREATE FUNCTION batchq.resume_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE known record;
BEGIN
  SELECT s.queue, s.kind, s.paused, s.error, s.next_at INTO known
  FROM batchq.schedules s WHERE s.name = resume_schedule.name FOR UPDATE;
  IF NOT FOUND THEN RETURN NULL; END IF;
  IF NOT known.paused AND (known.error IS NULL OR known.next_at IS NOT NULL) THEN RETURN false; END IF;
  UPDATE batchq.schedules s SET paused = false, error = NULL WHERE s.name = resume_schedule.name;
  PERFORM batchq.note_verb('resume_schedule', 0, NULL, known.queue, known.kind, jsonb_build_object('schedule', name), reason, actor);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.resume_schedule IS
  'Ends the pause of a schedule, or lets workers try one with an error again. Ticks that have passed are not made up for. Returns '
  'whether that changed anything; null: there is no such schedule.';

CREATE FUNCTION batchq.run_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE known record; made bigint;
BEGIN
  SELECT s.queue, s.kind, s.payload, s.overlap INTO known FROM batchq.schedules s WHERE s.name = run_schedule.name FOR UPDATE;
  IF NOT FOUND THEN RETURN NULL; END IF;
  INSERT INTO batchq.batches (queue, kind, payload, unique_key)
  VALUES (known.queue, known.kind, batchq.schedule_payload(known.payload, clock_timestamp()),
          CASE known.overlap WHEN 'skip' THEN 'schedule:' || name END)
  ON CONFLICT DO NOTHING RETURNING id INTO made;
  IF made IS NULL THEN
    RAISE EXCEPTION 'a batch of schedule % is pending or processing', name
      USING HINT = 'Its overlap is skip: wait for the batch, or cancel it.';
  END IF;
  UPDATE batchq.schedules s SET last_batch_id = made, last_queue = s.queue WHERE s.name = run_schedule.name;
  PERFORM batchq.note_verb('run_schedule', 1, made, known.queue, known.kind, jsonb_build_object('schedule', name), reason, actor);
  RETURN made;
END $$;
COMMENT ON FUNCTION batchq.run_schedule IS
  'Makes a batch of a schedule now, beside its ticks, also of a paused one. Returns its id; null: there is no such schedule.';

CREATE FUNCTION batchq.remove_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE known record;
BEGIN
  DELETE FROM batchq.schedules s WHERE s.name = remove_schedule.name RETURNING s.queue, s.kind, s.cron INTO known;
  IF NOT FOUND THEN RETURN NULL; END IF;
  PERFORM batchq.note_verb('remove_schedule', 0, NULL, known.queue, known.kind, jsonb_build_object('schedule', name, 'cron', known.cron),
                           reason, actor);
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.remove_schedule IS
  'Deletes a schedule; its batches stay. One that code declares is written again by the next worker that starts: pause that instead. '
  'Returns true; null: there is no such schedule.';
COMMENT ON COLUMN batchq.audit.verb IS
  'cancel, retry, snooze, set_priority, move, pause, resume, drain_worker, set_limit, end_throttle, set_schedule, pause_schedule, '
  'resume_schedule, run_schedule or remove_schedule.';

-- ---------------------------------------------------------------------------------------------------------- what is shown

CREATE VIEW batchq.schedule_status WITH (security_invoker = true) AS
SELECT s.name, s.cron, s.time_zone, s.queue, s.kind, s.payload, s.missed, s.catch_up_most, s.overlap,
  CASE WHEN s.error IS NOT NULL AND s.next_at IS NULL THEN 'error'
       WHEN s.paused THEN 'paused'
       WHEN s.is_declared AND declarers.workers = 0 THEN 'undeclared'
       WHEN s.next_at IS NULL THEN 'new'
       WHEN s.next_at < now() - interval '10 seconds' THEN 'overdue'
       ELSE 'active' END AS state,
  s.next_at, s.last_at, s.last_batch_id, latest.status AS last_status, s.last_late_seconds,
  s.batches_made, s.ticks_missed, s.ticks_overlapped, s.error, s.is_declared, declarers.workers AS declaring_workers,
  handlers.workers AS handling_workers
FROM batchq.schedules s
CROSS JOIN LATERAL (SELECT count(*)::integer AS workers FROM batchq.workers w
                    WHERE w.heartbeat_at > now() - interval '1 minute' AND s.name = ANY (w.schedules)) declarers
CROSS JOIN LATERAL (SELECT count(*)::integer AS workers FROM batchq.workers w
                    WHERE w.heartbeat_at > now() - interval '1 minute' AND s.queue = ANY (w.queues) AND s.kind = ANY (w.kinds)) handlers
LEFT JOIN LATERAL (SELECT b.status FROM batchq.batches b WHERE b.queue = s.last_queue AND b.id = s.last_batch_id LIMIT 1) latest ON true;
COMMENT ON VIEW batchq.schedule_status IS 'Schedules as people see them: their state, the next tick, and the outcome of the latest batch.';
COMMENT ON COLUMN batchq.schedule_status.name IS 'Name of the schedule.';
COMMENT ON COLUMN batchq.schedule_status.state IS
  'active; new (no worker has computed its next time yet); overdue (due for more than 10 s); paused; undeclared (code declared it, and '
  'no live worker does any longer; it makes no batches); error (see the column error; it makes no batches).';
COMMENT ON COLUMN batchq.schedule_status.next_at IS 'Time of the next tick.';
COMMENT ON COLUMN batchq.schedule_status.last_at IS 'Tick of the latest batch.';
COMMENT ON COLUMN batchq.schedule_status.last_batch_id IS 'The latest batch.';
COMMENT ON COLUMN batchq.schedule_status.last_status IS 'Status of the latest batch; null if there is none, or it was deleted.';
COMMENT ON COLUMN batchq.schedule_status.last_late_seconds IS 'Seconds between the tick and the insert of the latest batch.';
COMMENT ON COLUMN batchq.schedule_status.batches_made IS 'Number of batches that ticks have made.';
COMMENT ON COLUMN batchq.schedule_status.ticks_missed IS 'Number of ticks without a batch by the rule of missed, or because the batch was refused.';
COMMENT ON COLUMN batchq.schedule_status.ticks_overlapped IS 'Number of ticks without a batch because an earlier batch was still live.';
COMMENT ON COLUMN batchq.schedule_status.error IS 'Why the schedule does not work; null: it works.';
COMMENT ON COLUMN batchq.schedule_status.is_declared IS 'Whether the definition is what code declares.';
COMMENT ON COLUMN batchq.schedule_status.declaring_workers IS 'Live workers that declare a schedule of this name.';
COMMENT ON COLUMN batchq.schedule_status.handling_workers IS 'Live workers that serve the queue and handle the kind.';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
SELECT batchq.give_replica_identities();
