-- Doors: no role does more than its duty. What a role may do is granted by duty (batchq.duties, batchq.grant_duty), no
-- function is PUBLIC's, and no name in a function means what somebody else has made in a schema of the search path.

-- ---------------------------------------------------------------------------------------- what names in functions mean

DO $$
DECLARE
  its_name regprocedure;
BEGIN
  FOR its_name IN
    SELECT p.oid
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace = 'batchq'::regnamespace
      AND l.lanname = 'plpgsql'
      AND NOT EXISTS (SELECT FROM unnest(p.proconfig) setting WHERE setting LIKE 'search_path=%')
  LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, pg_temp', its_name);
  END LOOP;
END
$$;

-- ------------------------------------------------------------------------------------------ whose rights functions have

-- Verbs, and what workers do for all, with the rights of the schema's owner: so whoever may call one needs no right to
-- write the tables, with which he could do anything.
ALTER FUNCTION batchq.cancel(bigint, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.retry(bigint, boolean, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.retry_items(bigint, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.snooze(bigint, interval, timestamptz, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.set_priority(bigint, integer, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.move(bigint, text, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.pause(text, text, timestamptz, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.resume(text, text, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.drain_worker(text, text, text) SECURITY DEFINER;
ALTER FUNCTION batchq.bulk(text, jsonb, jsonb, jsonb, boolean, integer, text, text, bigint) SECURITY DEFINER;
ALTER FUNCTION batchq.prune(interval) SECURITY DEFINER;
ALTER FUNCTION batchq.prune_records(interval) SECURITY DEFINER;
ALTER FUNCTION batchq.merge_throughput() SECURITY DEFINER;
ALTER FUNCTION batchq.create_finished_partitions(date, integer) SECURITY DEFINER;
ALTER FUNCTION batchq.ids_given_twice(timestamptz) SECURITY DEFINER;

-- There current_user is the owner. The setting `role` stays what the caller has set.
ALTER TABLE batchq.audit ALTER COLUMN role
  SET DEFAULT CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END;
ALTER TABLE batchq.pauses ALTER COLUMN role
  SET DEFAULT CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END;
COMMENT ON COLUMN batchq.audit.role IS 'The database role: who has called the verb, by SET ROLE or by logging in.';

-- A trigger function with the owner's rights: on a table of somebody else's it would do what it is told there.
CREATE OR REPLACE FUNCTION batchq.count_items()
RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  counted integer;
BEGIN
  IF TG_TABLE_SCHEMA <> 'batchq' THEN
    RAISE EXCEPTION 'batchq.count_items is a trigger function of batchq''s own tables, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  ELSIF jsonb_typeof(NEW.items) <> 'array' THEN
    RAISE EXCEPTION 'new row for relation "%" violates check constraint "batches_items_is_array"', TG_TABLE_NAME
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_items_is_array', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            DETAIL = format('items is a JSON %s, not an array.', jsonb_typeof(NEW.items));
  END IF;
  counted := jsonb_array_length(NEW.items);
  IF counted IS DISTINCT FROM NEW.items_total THEN
    UPDATE batchq.batches b
    SET items_total = counted
    WHERE b.queue = NEW.queue
      AND b.id = NEW.id
      AND b.status = NEW.status
      AND b.finished_at IS NOT DISTINCT FROM NEW.finished_at;
  END IF;
  RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION batchq.forget_failed_items()
RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF TG_RELID <> 'batchq.batches'::regclass THEN
    RAISE EXCEPTION 'batchq.forget_failed_items is the trigger function of batchq.batches, not of %.%', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  TRUNCATE batchq.failed_items;
  RETURN NULL;
END
$$;

-- ---------------------------------------------------------------------------------------------------------------- duties

CREATE VIEW batchq.duties AS
SELECT duty, privilege, object
FROM (VALUES
  ('producer', 'INSERT (queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items, '
               'timeout_seconds, trace_context)', '{batches}'::text[]),
  ('producer', 'SELECT (id)', '{batches}'),
  ('producer', 'SELECT', '{migrations}'),

  ('worker', 'SELECT', '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,migrations}'),
  ('worker', 'UPDATE (status, attempt, claimed_by, claim_token, claimed_at, lease_expires_at, run_at, items_done, '
             'items_failed, cursor, errors)', '{batches_live}'),
  ('worker', 'DELETE', '{batches_live}'),
  ('worker', 'INSERT', '{batches_finished}'),
  ('worker', 'INSERT, UPDATE, DELETE', '{failed_items,workers}'),
  ('worker', 'INSERT, UPDATE', '{throughput_minutes}'),
  ('worker', 'EXECUTE', '{append_error,add_counts,has_ready,move_positions,try_lock,merge_throughput,prune,prune_records,'
                        'create_finished_partitions,ids_given_twice,"forget_failed_items(text,bigint)"}'),

  ('viewer', 'SELECT', '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,'
                       'migrations,audit,status,queues,throughput,failures,duties,finished_default}'),
  ('viewer', 'EXECUTE', '{shown_status,count_live,count_failed,latest_failures,run_time_percentile,run_time_percentiles,'
                        'sum_counts,add_counts,busy_queues,waiting_levels,newest_live,ids_given_twice,duty_statements}'),

  ('operator', 'EXECUTE', '{cancel,retry,retry_items,snooze,set_priority,move,pause,resume,drain_worker,bulk}')
) AS granted(duty, privilege, objects)
CROSS JOIN unnest(objects) AS object;

COMMENT ON VIEW batchq.duties IS
  'What each duty needs, and nothing more: producer, worker, viewer, operator. An operator needs what a viewer needs, too.';
COMMENT ON COLUMN batchq.duties.duty IS 'producer, worker, viewer or operator.';
COMMENT ON COLUMN batchq.duties.privilege IS 'As GRANT takes it.';
COMMENT ON COLUMN batchq.duties.object IS 'The name of a table, a view or a function in the schema batchq.';

CREATE FUNCTION batchq.duty_statements(duty text, role text)
RETURNS SETOF text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM batchq.duties d WHERE d.duty = duty_statements.duty) THEN
    RAISE EXCEPTION 'batchq knows no duty %', quote_nullable(duty)
      USING HINT = 'producer, worker, viewer, operator';
  END IF;
  RETURN NEXT format('GRANT USAGE ON SCHEMA batchq TO %I', role);
  RETURN QUERY
    SELECT format('GRANT %s ON %s TO %I', d.privilege,
                  CASE d.privilege WHEN 'EXECUTE' THEN 'FUNCTION batchq.' ELSE 'batchq.' END || d.object, role)
    FROM batchq.duties d
    WHERE d.duty = duty_statements.duty
       OR (duty_statements.duty = 'operator' AND d.duty = 'viewer');
END
$$;

COMMENT ON FUNCTION batchq.duty_statements(text, text) IS
  'The GRANT statements for a role that has a duty: producer, worker, viewer or operator.';

CREATE FUNCTION batchq.grant_duty(duty text, role text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  statement text;
BEGIN
  FOR statement IN SELECT batchq.duty_statements(duty, role) LOOP
    EXECUTE statement;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.grant_duty(text, text) IS
  'Grants a role what its duty needs: SELECT batchq.grant_duty(''worker'', ''app_worker''). For the owner of the schema.';

-- With the reader's own rights and row security: a view made by the owner would read with his.
ALTER VIEW batchq.status SET (security_invoker = true);

-- -------------------------------------------------------------------------------------------- what PUBLIC has had so far

-- A role that may read goes on with a viewer's functions; one that may change batches, with the verbs; a worker's with both.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;

DO $$
DECLARE
  had     record;
  granted text;
BEGIN
  FOR had IN
    SELECT quote_ident(pg_get_userbyid(acl.grantee)) AS role,
      CASE WHEN privilege_type = 'SELECT' THEN '{viewer}'
           WHEN has_table_privilege(acl.grantee, 'batchq.batches_live', 'DELETE')
            AND has_table_privilege(acl.grantee, 'batchq.batches_finished', 'INSERT') THEN '{viewer,worker,operator}'
           ELSE '{viewer,operator}'
      END::text[] AS duties
    FROM pg_catalog.pg_class c
    CROSS JOIN LATERAL aclexplode(c.relacl) acl
    WHERE c.relnamespace = 'batchq'::regnamespace
      AND acl.grantee NOT IN (0, c.relowner)
      AND (privilege_type = 'SELECT' OR (privilege_type = 'UPDATE' AND c.relname IN ('batches', 'batches_live')))
  LOOP
    FOR granted IN
      SELECT DISTINCT format('GRANT EXECUTE ON FUNCTION batchq.%s TO %s', d.object, had.role)
      FROM batchq.duties d
      WHERE d.privilege = 'EXECUTE'
        AND d.duty = ANY (had.duties)
    LOOP
      EXECUTE granted;
    END LOOP;
  END LOOP;
END
$$;

-- ------------------------------------------------------------------------------------------- times that no one can fake

-- An infinite lease is never rescued, and a finish that is dated ahead keeps its day's partition from being made.
ALTER TABLE batchq.batches ADD CONSTRAINT batches_times_are_finite
  CHECK (isfinite(created_at) AND coalesce(isfinite(claimed_at), true) AND coalesce(isfinite(lease_expires_at), true)) NOT VALID;

UPDATE batchq.batches_live
SET lease_expires_at = now()
WHERE status = 'processing'
  AND lease_expires_at IN ('infinity', '-infinity');

-- The CHECKs of sizes see a value as it comes. One that was compressed elsewhere (INSERT ... SELECT) is small until a worker
-- unpacks it, and 1e131071 is a number of 8 bytes until somebody reads it.
CREATE FUNCTION batchq.refuse_packed_values()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF (octet_length(NEW.payload::text) > CASE WHEN pg_column_compression(NEW.payload) IS NULL
                                            THEN 10000 + 16 * pg_column_size(NEW.payload) ELSE 8388608 END
     OR octet_length(NEW.cursor::text) > CASE WHEN pg_column_compression(NEW.cursor) IS NULL
                                              THEN 10000 + 16 * pg_column_size(NEW.cursor) ELSE 8388608 END
     OR octet_length(NEW.items::text) > CASE WHEN pg_column_compression(NEW.items) IS NULL
                                             THEN 10000 + 16 * pg_column_size(NEW.items) ELSE 67108864 END) THEN
    RAISE EXCEPTION 'batch % has % bytes of payload, % of cursor and % of items when they are unpacked', NEW.id,
        coalesce(octet_length(NEW.payload::text), 0), coalesce(octet_length(NEW.cursor::text), 0),
        coalesce(octet_length(NEW.items::text), 0)
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_unpacked_values_fit', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'As text, at most 8 MiB of payload and of cursor, 64 MiB of items; at most 16 times what is stored, plus 10 kB.';
  END IF;
  RETURN NULL;
END
$$;

COMMENT ON FUNCTION batchq.refuse_packed_values() IS 'Keeps out what is small only until it is read.';

CREATE TRIGGER refuse_packed_values AFTER INSERT ON batchq.batches_live
  FOR EACH ROW
  WHEN (octet_length(NEW.payload::text) > 10000 + 16 * pg_column_size(NEW.payload)
        OR NEW.items IS NOT NULL OR NEW.cursor IS NOT NULL)
  EXECUTE FUNCTION batchq.refuse_packed_values();

CREATE FUNCTION batchq.refuse_finish_ahead()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  IF NOT isfinite(NEW.finished_at) OR NEW.finished_at > clock_timestamp() + interval '1 hour' THEN
    RAISE EXCEPTION 'batch % cannot have finished at %', NEW.id, NEW.finished_at
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_finish_is_past', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'finished_at is when a batch was finished: leave that to the worker and the verbs.';
  END IF;
  RETURN NEW;
END
$$;

COMMENT ON FUNCTION batchq.refuse_finish_ahead() IS
  'Keeps out of the default partition what would keep the partition of a later day from being made.';

CREATE TRIGGER refuse_finish_ahead BEFORE INSERT OR UPDATE ON batchq.finished_default
  FOR EACH ROW EXECUTE FUNCTION batchq.refuse_finish_ahead();

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;

-- ---------------------------------------------------------------------------------------------------------------- owners

-- Functions with their owner's rights call each other, so all has one owner: that of the schema.
DO $$
DECLARE
  statement text;
BEGIN
  FOR statement IN
    SELECT format('ALTER TABLE %s OWNER TO %s', c.oid::regclass, n.nspowner::regrole)
    FROM pg_catalog.pg_namespace n
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v') AND c.relowner <> n.nspowner
    WHERE n.nspname = 'batchq'
    UNION ALL
    SELECT format('ALTER ROUTINE %s OWNER TO %s', p.oid::regprocedure, n.nspowner::regrole)
    FROM pg_catalog.pg_namespace n
    JOIN pg_catalog.pg_proc p ON p.pronamespace = n.oid AND p.proowner <> n.nspowner
    WHERE n.nspname = 'batchq'
  LOOP
    EXECUTE statement;
  END LOOP;
END
$$;
