-- What the duties may do with limits, keys, flows and schedules.
CREATE OR REPLACE VIEW batchq.duties AS
SELECT duty, privilege, object
FROM (VALUES
  ('producer', 'INSERT (queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items, '
               'timeout_seconds, trace_context, key, after, on_failure)', '{batches}'::text[]),
  ('producer', 'SELECT (id)', '{batches}'), ('producer', 'SELECT', '{migrations}'),
  ('worker', 'SELECT',
   '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,migrations,'
   'limits_in_force,throttles,flow_events,needs,schedules}'),
  ('worker', 'UPDATE (status, attempt, claimed_by, claim_token, claimed_at, lease_expires_at, run_at, items_done, '
             'items_failed, cursor, errors)', '{batches_live}'),
  ('worker', 'DELETE', '{batches_live}'), ('worker', 'INSERT', '{batches_finished}'),
  ('worker', 'INSERT, UPDATE, DELETE', '{failed_items,workers}'), ('worker', 'INSERT, UPDATE', '{throughput_minutes}'),
  ('worker', 'EXECUTE', '{append_error,add_counts,has_ready,move_positions,try_lock,merge_throughput,prune,prune_records,'
                        'create_finished_partitions,ids_given_twice,"forget_failed_items(text,bigint)",take_shares,return_shares,declare_limits,throttle,'
                        'ready_of_keys,has_keyed,follow_flows,prune_needs,fire_schedules,declare_schedules}'),
  ('viewer', 'SELECT', '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,'
                       'migrations,audit,status,queues,throughput,failures,duties,finished_default,'
                       'limits,declared_limits,limits_in_force,limits_in_use,keys,limit_shares,throttles,needs,flow_events,schedules,schedule_status}'),
  ('viewer', 'EXECUTE', '{shown_status,count_live,count_failed,latest_failures,run_time_percentiles,'
                        'sum_counts,add_counts,busy_queues,waiting_levels,newest_live,ids_given_twice,duty_statements,'
                        'keyed_queues,count_keys,count_waiting,waiting_queues,stuck_waiting,flow}'),
  ('operator', 'EXECUTE', '{cancel,retry,retry_items,snooze,set_priority,move,pause,resume,drain_worker,bulk,set_limit,end_throttle,run_anyway,cancel_with_dependents,'
                          'set_schedule,pause_schedule,resume_schedule,run_schedule,remove_schedule}'),
  ('operator', 'INSERT, UPDATE, DELETE', '{limits}'), ('operator', 'DELETE', '{schedules}'),
  ('operator', 'INSERT (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, paused)', '{schedules}'),
  ('operator', 'UPDATE (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, paused)', '{schedules}')
) AS granted(duty, privilege, objects)
CROSS JOIN unnest(objects) AS object;

-- Roles that have a duty already get what is new in it.
DO $$
DECLARE known record;
BEGIN
  FOR known IN
    SELECT DISTINCT d.duty, r.rolname AS role
    FROM (VALUES ('worker', 'has_ready'), ('operator', 'retry')) AS d(duty, function)
    JOIN pg_proc p ON p.pronamespace = 'batchq'::regnamespace AND p.proname = d.function
    CROSS JOIN LATERAL aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE a.grantee <> p.proowner
    UNION
    SELECT d.duty, r.rolname
    FROM (VALUES ('producer', 'batchq.batches'::regclass, 'INSERT'), ('viewer', 'batchq.queues', 'SELECT')) AS d(duty, relation, privilege)
    JOIN pg_class c ON c.oid = d.relation JOIN pg_attribute t ON t.attrelid = c.oid AND t.attname = 'kind'
    CROSS JOIN LATERAL (SELECT * FROM aclexplode(c.relacl) UNION ALL SELECT * FROM aclexplode(t.attacl)) a
    JOIN pg_roles r ON r.oid = a.grantee
    WHERE a.grantee <> c.relowner AND a.privilege_type = d.privilege
  LOOP
    PERFORM batchq.grant_duty(known.duty, known.role);
  END LOOP;
END $$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA batchq FROM PUBLIC;
