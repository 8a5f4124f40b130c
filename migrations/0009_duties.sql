-- What a role may do is granted by duty, and no function is PUBLIC's: verbs, and what workers do for all, have the rights of
-- the schema's owner, so that whoever may call one needs no right to write the tables, with which he could do anything.

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
  ('viewer', 'EXECUTE', '{shown_status,count_live,count_failed,latest_failures,run_time_percentiles,'
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

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;

SELECT batchq.give_replica_identities();
