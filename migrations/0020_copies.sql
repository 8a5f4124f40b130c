-- A copy of a batch, for people: the same work once more, perhaps with another payload.
CREATE FUNCTION batchq.enqueue_copy(batch_id bigint, payload jsonb DEFAULT NULL, queue text DEFAULT NULL, priority integer DEFAULT NULL,
                                    delay interval DEFAULT NULL, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE known record; made bigint; into_queue text; begins_at timestamptz := now() + coalesce(delay, interval '0');
BEGIN
  SELECT b.queue, b.kind, b.payload, b.items, b.items_total, b.priority, b.key, b.max_attempts, b.max_failed_items, b.timeout_seconds,
    b.spread, b.part_of
  INTO known FROM batchq.batches b WHERE b.id = batch_id;
  IF NOT FOUND THEN
    RETURN NULL;
  ELSIF known.part_of IS NOT NULL THEN
    RAISE EXCEPTION 'batch % is a part of batch %: only the whole can be copied', batch_id, known.part_of;
  ELSIF known.items_total > 10000 THEN
    RAISE EXCEPTION 'batch % has % items: a batch with more than 10000 cannot be copied', batch_id, known.items_total
      USING HINT = 'Enqueue it as it was enqueued the first time.';
  END IF;
  into_queue := coalesce(queue, known.queue);
  INSERT INTO batchq.batches (queue, kind, payload, items, priority, run_at, key, max_attempts, max_failed_items, timeout_seconds, spread)
  VALUES (into_queue, known.kind, coalesce(payload, known.payload), known.items, coalesce(priority, known.priority), begins_at,
          known.key, known.max_attempts, known.max_failed_items, known.timeout_seconds, known.spread)
  RETURNING id INTO made;
  PERFORM batchq.note_verb('copy', 1, made, into_queue, known.kind,
    jsonb_build_object('copy_of', batch_id, 'payload_changed', coalesce(payload <> known.payload, false)), reason, actor);
  RETURN made;
END $$;
COMMENT ON FUNCTION batchq.enqueue_copy IS
  'Enqueues a batch like another one: with its kind, items, key and limits, and with its payload, queue and priority unless others are '
  'given. The unique_key, what it waited for and its progress are not copied. Returns the id of the new batch; null: there is no such '
  'batch. Refuses a batch with more than 10,000 items.';
COMMENT ON COLUMN batchq.audit.verb IS
  'cancel, retry, snooze, set_priority, move, pause, resume, drain_worker, set_limit, end_throttle, set_schedule, pause_schedule, '
  'resume_schedule, run_schedule, remove_schedule or copy.';

CREATE OR REPLACE VIEW batchq.duties AS
SELECT duty, privilege, object
FROM (VALUES
  ('producer', 'INSERT (queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items, '
               'timeout_seconds, trace_context, key, after, on_failure, spread)', '{batches}'::text[]),
  ('producer', 'SELECT (id)', '{batches}'), ('producer', 'SELECT', '{migrations}'),
  ('worker', 'SELECT',
   '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,migrations,'
   'limits_in_force,throttles,flow_events,needs,schedules,parts}'),
  ('worker', 'UPDATE (status, attempt, claimed_by, claim_token, claimed_at, lease_expires_at, run_at, items_done, '
             'items_failed, cursor, errors)', '{batches_live}'),
  ('worker', 'DELETE', '{batches_live}'), ('worker', 'INSERT', '{batches_finished}'),
  ('worker', 'INSERT, UPDATE, DELETE', '{failed_items,workers}'), ('worker', 'INSERT, UPDATE', '{throughput_minutes}'),
  ('worker', 'EXECUTE', '{append_error,add_counts,has_ready,move_positions,try_lock,merge_throughput,prune,prune_records,'
                        'create_finished_partitions,ids_given_twice,"forget_failed_items(text,bigint)",take_shares,return_shares,declare_limits,throttle,'
                        'ready_of_keys,has_keyed,follow_flows,prune_needs,fire_schedules,declare_schedules,'
                        'spread_batch,prune_parts,'
                        'claim,extend,items,items_to_retry,checkpoint,complete,fail,release,rescue,'
                        'lock_claim,finish_claim,requeue_claim,lease_end}'),
  ('viewer', 'SELECT', '{batches,batches_live,batches_finished,failed_items,workers,throughput_minutes,pauses,positions,'
                       'migrations,audit,status,queues,throughput,failures,duties,finished_default,'
                       'limits,declared_limits,limits_in_force,limits_in_use,keys,limit_shares,throttles,needs,flow_events,schedules,schedule_status,'
                       'parts,throughput_spans}'),
  ('viewer', 'EXECUTE', '{shown_status,count_live,count_failed,latest_failures,run_time_percentiles,'
                        'sum_counts,add_counts,busy_queues,waiting_levels,newest_live,ids_given_twice,duty_statements,'
                        'keyed_queues,count_keys,count_waiting,waiting_queues,stuck_waiting,flow,progress_of_parts,failed_items_of,spread_batches,error_group}'),
  ('operator', 'EXECUTE', '{cancel,retry,retry_items,snooze,set_priority,move,pause,resume,drain_worker,bulk,set_limit,end_throttle,run_anyway,cancel_with_dependents,'
                          'set_schedule,pause_schedule,resume_schedule,run_schedule,remove_schedule,'
                          'enqueue_copy}'),
  ('operator', 'INSERT, UPDATE, DELETE', '{limits}'), ('operator', 'DELETE', '{schedules}'),
  ('operator', 'INSERT (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, paused)', '{schedules}'),
  ('operator', 'UPDATE (name, cron, time_zone, queue, kind, payload, missed, catch_up_most, overlap, paused)', '{schedules}')
) AS granted(duty, privilege, objects)
CROSS JOIN unnest(objects) AS object;

-- Roles that have a duty already get what is new in it.
SELECT batchq.renew_duties();

REVOKE ALL ON FUNCTION batchq.enqueue_copy FROM PUBLIC;
