-- What people decide while work goes on: pauses, drained workers, the bell.
CREATE TABLE batchq.pauses (
  queue     text,
  kind      text,
  until     timestamptz,
  paused_at timestamptz NOT NULL DEFAULT now(),
  reason    text,
  role      text        NOT NULL DEFAULT
             CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END,
  actor     text,
  CONSTRAINT pauses_name_something CHECK (num_nonnulls(queue, kind) > 0),
  CONSTRAINT pauses_one_each UNIQUE NULLS NOT DISTINCT (queue, kind)
);

COMMENT ON TABLE batchq.pauses IS
  'What is not claimed: see batchq.pause. Workers look once a second; what they have claimed runs to its end.';
COMMENT ON COLUMN batchq.pauses.queue IS 'The queue; null: any.';
COMMENT ON COLUMN batchq.pauses.kind IS 'The kind; null: any.';
COMMENT ON COLUMN batchq.pauses.until IS 'When it resumes by itself; null: not before batchq.resume.';
COMMENT ON COLUMN batchq.pauses.role IS 'The database role that paused it.';
COMMENT ON COLUMN batchq.pauses.actor IS 'Who it was, as they said themselves.';

CREATE FUNCTION batchq.pause(queue text DEFAULT NULL, kind text DEFAULT NULL, until timestamptz DEFAULT NULL,
                             reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF num_nonnulls(queue, kind) = 0 THEN
    RAISE EXCEPTION 'batchq.pause takes a queue, a kind, or both'
      USING HINT = 'SELECT batchq.pause(queue => ''mail''); SELECT batchq.pause(kind => ''send_receipt'');';
  ELSIF until <= now() THEN
    RAISE EXCEPTION 'batchq.pause: % is past', until;
  END IF;
  INSERT INTO batchq.pauses AS p (queue, kind, until, reason, actor)
  VALUES (pause.queue, pause.kind, pause.until, left(pause.reason, 2000), left(pause.actor, 200))
  ON CONFLICT ON CONSTRAINT pauses_one_each DO UPDATE
  SET until = excluded.until,
      paused_at = CASE WHEN p.until <= now() THEN now() ELSE p.paused_at END,
      reason = excluded.reason,
      role = excluded.role,
      actor = excluded.actor
  WHERE p.until IS DISTINCT FROM excluded.until
     OR p.until <= now();
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM batchq.note_verb('pause', 0, NULL, queue, kind, jsonb_strip_nulls(jsonb_build_object('until', until)), reason, actor);
  RETURN true;
END
$$;

COMMENT ON FUNCTION batchq.pause(text, text, timestamptz, text, text) IS
  'Has workers claim nothing of a queue, of a kind in any queue, or of a kind in a queue, within about a second; what is '
  'claimed runs to its end. With "until" it resumes by itself. Said again, it changes "until" alone. Returns whether '
  'anything changed.';

CREATE FUNCTION batchq.resume(queue text DEFAULT NULL, kind text DEFAULT NULL, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  was_paused boolean;
BEGIN
  DELETE FROM batchq.pauses p
  WHERE p.queue IS NOT DISTINCT FROM resume.queue
    AND p.kind IS NOT DISTINCT FROM resume.kind
  RETURNING p.until IS NULL OR p.until > now() INTO was_paused;
  IF was_paused IS NOT TRUE THEN
    RETURN false;
  END IF;
  PERFORM batchq.note_verb('resume', 0, NULL, queue, kind, '{}', reason, actor);
  RETURN true;
END
$$;

COMMENT ON FUNCTION batchq.resume(text, text, text, text) IS
  'Ends a pause: the one that batchq.pause made with the same queue and kind. Returns whether there was one.';

CREATE FUNCTION batchq.drain_worker(worker_id text, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  asked_before boolean;
BEGIN
  SELECT w.drain_asked_at IS NOT NULL INTO asked_before FROM batchq.workers w WHERE w.id = worker_id FOR UPDATE;
  IF asked_before IS NULL THEN
    RETURN NULL;
  ELSIF NOT asked_before THEN
    UPDATE batchq.workers w SET drain_asked_at = now() WHERE w.id = worker_id;
    PERFORM batchq.note_verb('drain_worker', 0, NULL, NULL, NULL, jsonb_build_object('worker', worker_id), reason, actor);
  END IF;
  RETURN 'draining';
END
$$;

COMMENT ON FUNCTION batchq.drain_worker(text, text, text) IS
  'Asks a worker to claim no more, to finish what it runs, however long that takes, and to end. Returns draining, or '
  'null if there is no such worker. Whoever supervises it may start another one in its place.';

CREATE FUNCTION batchq.prune_records(older_than interval DEFAULT '90 days')
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  pruned integer;
BEGIN
  DELETE FROM batchq.pauses p WHERE p.until < now() - interval '1 day';
  DELETE FROM batchq.audit a
  WHERE a.id IN (SELECT o.id FROM batchq.audit o WHERE o.at < now() - older_than ORDER BY o.id LIMIT 10000);
  GET DIAGNOSTICS pruned = ROW_COUNT;
  RETURN pruned;
END
$$;

COMMENT ON FUNCTION batchq.prune_records(interval) IS
  'Drops up to 10,000 rows of batchq.audit that are older, and pauses that ended more than a day ago. Each worker calls it '
  'each hour; returns how many rows of batchq.audit were dropped.';

-- The bell: NOTIFY at each INSERT, for workers that listen on a direct connection (BATCHQ_LISTEN_DSN). Off by default: workers
-- find batches by polling, within 20 ms, and a NOTIFY makes commits wait for each other.
CREATE FUNCTION batchq.ring()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF pg_notification_queue_usage() < 0.5 THEN  -- workers poll as well
    PERFORM pg_notify('batchq', '');
  END IF;
  RETURN NULL;
END
$$;

COMMENT ON FUNCTION batchq.ring() IS 'Trigger function: NOTIFY batchq. See batchq.bell.';

CREATE FUNCTION batchq.bell(is_wanted boolean)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  DROP TRIGGER IF EXISTS ring ON batchq.batches;
  IF is_wanted THEN
    CREATE TRIGGER ring AFTER INSERT ON batchq.batches FOR EACH STATEMENT EXECUTE FUNCTION batchq.ring();
  END IF;
END
$$;

COMMENT ON FUNCTION batchq.bell(boolean) IS
  'Has each INSERT into batchq.batches ring a bell (NOTIFY batchq) at its commit, or, with false, no longer. Workers '
  'with BATCHQ_LISTEN_DSN hear it and begin a batch within some 3 ms; the others poll. Only for the schema''s owner.';
