-- The checks of batchq doctor. Each query returns findings: severity, evidence, remedy. Without rows, all is well.
-- %(patience)s: seconds for which a snapshot may be held; %(ages)s: transactions after which it is old.

-- name: snapshot_held_by_a_session
SELECT CASE WHEN xact_start < now() - 12 * %(patience)s * interval '1 second' THEN 'critical' ELSE 'warning' END,
  format('session %%s (role %%s, application %%s, %%s) has held a snapshot since %%s', pid, usename, application_name, state, xact_start),
  format('end its transaction, or SELECT pg_terminate_backend(%%s); dead rows stay until then', pid)
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database()
  AND pid <> pg_backend_pid()
  AND backend_type = 'client backend'
  AND coalesce(backend_xmin, backend_xid) IS NOT NULL
  AND xact_start < now() - %(patience)s * interval '1 second'
ORDER BY xact_start
LIMIT 10

-- name: sessions_not_seen
SELECT 'note', format('%%s sessions of other roles are hidden from %%s, as are the snapshots that they hold', count(*), current_user),
  format('to check them, GRANT pg_read_all_stats TO %%I;', current_user)
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database()
  AND query = '<insufficient privilege>'
HAVING count(*) > 0

-- name: snapshot_held_by_a_prepared_transaction
SELECT CASE WHEN prepared < now() - 12 * %(patience)s * interval '1 second' THEN 'critical' ELSE 'warning' END,
  format('prepared transaction %%L of role %%s has held a snapshot since %%s', gid, owner, prepared),
  format('COMMIT PREPARED %%L; or ROLLBACK PREPARED %%1$L;', gid)
FROM pg_catalog.pg_prepared_xacts
WHERE database = current_database()
  AND prepared < now() - %(patience)s * interval '1 second'
ORDER BY prepared
LIMIT 10

-- name: replication_slot
SELECT CASE WHEN age(coalesce(xmin, catalog_xmin)) > %(ages)s THEN 'critical' ELSE 'warning' END,
  format('%%s replication slot %%s, %%s since %%s, holds xmin %%s (%%s transactions) and WAL from %%s', slot_type, slot_name,
         CASE WHEN active THEN 'active' ELSE 'inactive' END, coalesce(to_jsonb(s) ->> 'inactive_since', 'an unrecorded time'),
         coalesce(xmin, catalog_xmin), age(coalesce(xmin, catalog_xmin)), restart_lsn),
  format('resume its replica, or SELECT pg_drop_replication_slot(%%L)', slot_name)
FROM pg_catalog.pg_replication_slots s
WHERE (NOT active AND (coalesce(xmin, catalog_xmin) IS NOT NULL OR restart_lsn IS NOT NULL))
   OR age(coalesce(xmin, catalog_xmin)) > %(ages)s
LIMIT 10

-- name: snapshot_held_by_a_replica
SELECT 'warning',
  format('replica %%s (%%s) holds a snapshot that is %%s transactions old', application_name, client_addr, age(backend_xmin)),
  'end the long query there, or turn hot_standby_feedback off'
FROM pg_catalog.pg_stat_replication
WHERE age(backend_xmin) > %(ages)s
LIMIT 10

-- name: writes_stopped_by_a_publication
-- Postgres refuses UPDATE and DELETE on a published table without a replica identity, or with a column list or a row
-- filter that does not fit it. A partition is covered by a publication of any table above it.
WITH covered AS (
  SELECT p.pubname, c.oid::regclass AS relation, r.is_part,
    c.relreplident = 'f' OR EXISTS (SELECT 1 FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid
      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END) AS is_identified
  FROM pg_catalog.pg_publication p
  JOIN pg_catalog.pg_class c ON c.relnamespace = 'batchq'::regnamespace AND c.relkind = 'r'
  CROSS JOIN LATERAL (
    SELECT bool_or(r.prattrs IS NOT NULL OR r.prqual IS NOT NULL) AS is_part, count(*) AS named
    FROM pg_catalog.pg_publication_rel r
    WHERE r.prpubid = p.oid
      AND (r.prrelid = c.oid OR r.prrelid IN (SELECT a.relid FROM pg_catalog.pg_partition_ancestors(c.oid) a))
  ) r
  WHERE (p.pubupdate OR p.pubdelete)
    AND (p.puballtables OR r.named > 0
         OR EXISTS (SELECT 1 FROM pg_catalog.pg_publication_namespace n WHERE n.pnpubid = p.oid AND n.pnnspid = c.relnamespace))
)
SELECT 'critical',
  format('publication %%I covers %%s tables without a replica identity, such as %%s: Postgres refuses to change their rows',
         pubname, count(*), min(relation::text)),
  'as the owner: SELECT batchq.give_replica_identities();'
FROM covered
WHERE NOT is_identified
GROUP BY pubname
UNION ALL
SELECT 'warning',
  format('publication %%I has a column list or a row filter for %%s tables, such as %%s', pubname, count(*), min(relation::text)),
  'publish whole tables: Postgres refuses to change rows where the list or the filter does not fit the replica identity'
FROM covered
WHERE is_part
GROUP BY pubname

-- name: triggers_of_others
SELECT 'note', format('trigger %%I on %%s calls %%s', t.tgname, t.tgrelid::regclass, t.tgfoid::regprocedure),
  'make sure that it never fails: its errors stop the writes of workers, and its time adds to each write'
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid AND c.relnamespace = 'batchq'::regnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid AND p.pronamespace <> c.relnamespace
WHERE NOT t.tgisinternal
  AND t.tgparentid = 0
  AND t.tgenabled <> 'D'
UNION ALL
SELECT 'warning', format('rule %%I on %%s rewrites what is written', r.rulename, r.ev_class::regclass),
  'drop the rule'
FROM pg_catalog.pg_rewrite r
JOIN pg_catalog.pg_class c ON c.oid = r.ev_class AND c.relnamespace = 'batchq'::regnamespace AND c.relkind IN ('r', 'p')
UNION ALL
SELECT 'warning', format('foreign key %%I of %%s references %%s: batches cannot finish while it does', f.conname,
                         f.conrelid::regclass, f.confrelid::regclass),
  'drop the constraint: a batch leaves its partition when it finishes'
FROM pg_catalog.pg_constraint f
JOIN pg_catalog.pg_class c ON c.oid = f.confrelid AND c.relnamespace = 'batchq'::regnamespace
WHERE f.contype = 'f'
LIMIT 20

-- name: row_level_security
SELECT 'critical', format('row-level security hides rows of %%s from %%s', string_agg(c.oid::regclass::text, ', ' ORDER BY c.oid), current_user),
  'disable it for these tables, or give the role BYPASSRLS; until then the role neither sees nor runs their batches'
FROM pg_catalog.pg_class c
WHERE c.relnamespace = 'batchq'::regnamespace
  AND c.relkind IN ('r', 'p')
  AND row_security_active(c.oid)
  AND NOT EXISTS (  -- a policy that shows this role every row
    SELECT 1
    FROM pg_catalog.pg_policy p
    WHERE p.polrelid = c.oid
      AND p.polpermissive
      AND p.polcmd IN ('*', 'r')
      AND pg_get_expr(p.polqual, p.polrelid) = 'true'
      AND EXISTS (SELECT 1 FROM unnest(p.polroles) r WHERE r = 0 OR pg_has_role(r, 'USAGE')))
HAVING count(*) > 0

-- name: ids_given_twice
SELECT 'critical',
  format('the last id given in batchq.%%s is %%s, and %%s is in use: new rows get ids of old ones', relation, last_given, newest),
  format('as the owner: SELECT setval(pg_get_serial_sequence(''batchq.%%s'', ''id''), %%s);', relation, newest)
FROM batchq.ids_given_twice()

-- name: autovacuum_off
SELECT 'critical', format('%%s is off on the server', name), 'turn it on: dead rows are never removed'
FROM pg_catalog.pg_settings
WHERE name IN ('autovacuum', 'track_counts')
  AND setting = 'off'
UNION ALL
SELECT 'critical', format('autovacuum is off for %%s', c.oid::regclass),
  'reset its storage parameter autovacuum_enabled'
FROM pg_catalog.pg_class c
WHERE c.relnamespace = 'batchq'::regnamespace
  AND 'autovacuum_enabled=false' = ANY (c.reloptions)

-- name: autovacuum_behind
SELECT 'warning',
  format('%%s has %%s dead rows beside %%s live ones; last autovacuum %%s', relid::regclass, n_dead_tup, n_live_tup,
         coalesce(last_autovacuum::text, 'never')),
  'check what holds a snapshot; if nothing does, raise autovacuum_max_workers, or VACUUM it now'
FROM pg_catalog.pg_stat_all_tables
WHERE relid = 'batchq.batches_live'::regclass
  AND n_dead_tup > 50000 + n_live_tup / 5

-- name: dead_rows_in_the_way
SELECT CASE WHEN max(cost_seconds) > 1 THEN 'critical' ELSE 'warning' END,
  format('reading the queue from its beginning takes %%s ms: dead rows fill its indexes%%s',
         ceil(1000 * max(cost_seconds)),
         (SELECT format('; session %%s has held a snapshot for %%s', pid, date_trunc('second', now() - xact_start))
          FROM pg_catalog.pg_stat_activity
          WHERE datname = current_database()
            AND pid <> pg_backend_pid()
            AND coalesce(backend_xmin, backend_xid) IS NOT NULL
          ORDER BY xact_start
          LIMIT 1)),
  'end what holds a snapshot (a session, a prepared transaction, a replication slot, a replica); until then workers '
  'and views begin at batchq.positions, and counts may leave out batches that were committed late'
FROM batchq.positions
HAVING max(cost_seconds) > 0.005

-- name: rows_in_the_default_partition
SELECT 'warning', format('finished batches of %%s are in finished_default', string_agg(DISTINCT d.day::text, ', ')),
  'run a worker, or SELECT batchq.create_finished_partitions(current_date, 8) daily; prune removes these rows'
FROM (SELECT (finished_at AT TIME ZONE 'UTC')::date AS day FROM batchq.finished_default LIMIT 10000) d
HAVING count(*) > 0

-- name: locks_near_limit
-- A query over all days locks each day's table and indexes. Three concurrent ones should fit.
SELECT CASE WHEN held >= room THEN 'critical' ELSE 'warning' END,
  format('a query over the %%s days of finished batches takes %%s locks, of %%s that the server has room for', days, held, room),
  'lower BATCHQ_KEEP_FINISHED_DAYS and run batchq prune, or raise max_locks_per_transaction'
FROM (
  SELECT count(DISTINCT i.inhrelid) AS days, count(DISTINCT i.inhrelid) + count(x.indexrelid) AS held,
    current_setting('max_locks_per_transaction')::bigint
      * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint) AS room
  FROM pg_catalog.pg_inherits i
  LEFT JOIN pg_catalog.pg_index x ON x.indrelid = i.inhrelid
  WHERE i.inhparent = 'batchq.batches_finished'::regclass
) locks
WHERE 3 * held >= room

-- name: partitions_missing
SELECT CASE WHEN min(d.day) = (now() AT TIME ZONE 'UTC')::date THEN 'critical' ELSE 'warning' END,
  format('no partition for batches that finish on %%s', string_agg(d.day::text, ', ' ORDER BY d.day)),
  'as the owner: SELECT batchq.create_finished_partitions(current_date, 8); a worker does it automatically'
FROM (SELECT (now() AT TIME ZONE 'UTC')::date + n AS day FROM generate_series(0, 2) n) d
WHERE NOT EXISTS (SELECT 1 FROM pg_catalog.pg_class c WHERE c.relnamespace = 'batchq'::regnamespace AND c.relispartition
                    AND c.relname = 'finished_' || to_char(d.day, 'YYYYMMDD'))
HAVING count(*) > 0

-- name: kind_without_a_worker
SELECT 'warning', format('kind %%s in queue %%s: %%s ready, and no live worker has a handler for it', kind, queue, ready),
  'start a worker for the queue whose app has a handler of that name; or batchq cancel'
FROM batchq.queues
WHERE ready > 0
  AND workers = 0
ORDER BY ready DESC
LIMIT 10

-- name: limit_that_nothing_can_pass
WITH waiting AS MATERIALIZED (
  SELECT queue, kind, ready, processing FROM batchq.queues WHERE ready + processing > 0
)
SELECT 'warning',
  CASE WHEN n.column_name = 'max_running_per_key' THEN format('%%s of %%s is 0: its batches with a key never run', n.column_name, f.name)
       ELSE format('%%s of %%s is 0 while %%s batches are ready and %%s are processing', n.column_name, f.name, w.ready, w.processing) END,
  format('batchq limit %%s --%%s N raises it; to pause on purpose, batchq pause is clearer', f.flags, replace(n.column_name, '_', '-'))
FROM (
  SELECT *, CASE WHEN kind IS NULL THEN format('queue %%s', queue) ELSE format('kind %%s in queue %%s', kind, queue) END AS name,
    format('--queue %%L', queue) || CASE WHEN kind <> '' THEN format(' --kind %%L', kind) ELSE '' END AS flags
  FROM batchq.limits_in_force
) f
CROSS JOIN LATERAL (VALUES ('max_running', f.max_running::float8), ('per_second', f.per_second), ('items_per_second', f.items_per_second),
                           ('max_running_per_key', f.max_running_per_key)) AS n(column_name, number)
CROSS JOIN LATERAL (SELECT coalesce(sum(ready), 0) AS ready, coalesce(sum(processing), 0) AS processing
                    FROM waiting WHERE queue = f.queue AND (f.kind IS NULL OR kind = f.kind)) w
WHERE n.number = 0
  AND (n.column_name = 'max_running_per_key' OR w.ready > 0 OR (n.column_name = 'items_per_second' AND w.processing > 0))
ORDER BY w.ready DESC
LIMIT 10

-- name: limit_without_a_use
SELECT 'note',
  format('the limit of %%s limits nothing: no live worker serves it, and it has no batches',
         CASE WHEN l.kind IS NULL THEN format('queue %%s', l.queue) ELSE format('kind %%s in queue %%s', l.kind, l.queue) END),
  format('if the name is a mistake: batchq limit --queue %%L%%s --remove', l.queue, CASE WHEN l.kind <> '' THEN format(' --kind %%L', l.kind) ELSE '' END)
FROM batchq.limits l
WHERE NOT EXISTS (SELECT 1 FROM batchq.workers w WHERE w.heartbeat_at > now() - interval '1 minute' AND l.queue = ANY (w.queues)
                    AND (l.kind IS NULL OR l.kind = ANY (w.kinds)))
  AND NOT EXISTS (SELECT 1 FROM batchq.queues q WHERE q.queue = l.queue AND (l.kind IS NULL OR q.kind = l.kind))
ORDER BY l.queue, l.kind
LIMIT 10

-- name: held_up_by_a_limit
SELECT 'warning',
  format('kind %%s in queue %%s: %%s ready batches are held back by %%s; the oldest has waited for %%s', kind, queue, held_back,
         held_back_by, date_trunc('second', oldest_wait)),
  'batchq limit shows what is in use; raise the limit, or cancel batches that are no longer needed'
FROM batchq.queues
WHERE held_back > 0
  AND oldest_wait > interval '1 hour'
ORDER BY oldest_wait DESC
LIMIT 10

-- name: long_throttle
SELECT 'warning',
  format('%%s of queue %%s%%s is throttled until %%s, at the request of a handler of worker %%s',
         CASE kind WHEN '' THEN 'every kind' ELSE format('kind %%s', kind) END, queue,
         CASE key WHEN '' THEN '' ELSE format(', key %%s,', key) END, until, coalesce(worker, '(unknown)')),
  format('check the seconds that the handler passes to batchq.Throttled; to end it now: batchq unthrottle --queue %%L%%s%%s', queue,
         CASE kind WHEN '' THEN '' ELSE format(' --kind %%L', kind) END, CASE key WHEN '' THEN '' ELSE format(' --key %%L', key) END)
FROM batchq.throttles
WHERE until > now() + interval '1 day'
ORDER BY until DESC
LIMIT 10

-- name: limit_that_differs_from_code
SELECT 'note',
  format('%%s of kind %%s in queue %%s: %%s is set, and code declares %%s; the number that is set holds', n.column_name, l.kind, l.queue,
         n.of_table, n.of_code),
  CASE WHEN n.column_name = 'burst_seconds' THEN format('to follow the code: batchq limit --queue %%L --kind %%L --burst-seconds %%s', l.queue, l.kind, n.of_code)
       ELSE format('to follow the code: batchq limit --queue %%L --kind %%L --%%s none', l.queue, l.kind, replace(n.column_name, '_', '-')) END
FROM batchq.limits l
JOIN batchq.declared_limits d ON d.queue = l.queue AND d.kind = l.kind
CROSS JOIN LATERAL (VALUES
  ('max_running', l.max_running::float8, d.max_running::float8), ('per_second', l.per_second, d.per_second),
  ('items_per_second', l.items_per_second, d.items_per_second), ('burst_seconds', CASE WHEN num_nonnulls(l.per_second, l.items_per_second) > 0 THEN l.burst_seconds END, d.burst_seconds),
  ('max_running_per_key', l.max_running_per_key, d.max_running_per_key)
) AS n(column_name, of_table, of_code)
WHERE n.of_table <> n.of_code
ORDER BY l.queue, l.kind, n.column_name
LIMIT 10

-- name: schedule_with_an_error
SELECT CASE WHEN state = 'error' THEN 'critical' ELSE 'warning' END,
  format('schedule %%s (%%s): %%s', name, cron, error),
  CASE WHEN state = 'error' THEN format('it makes no batches; correct it: batchq schedule add %%L CRON --kind %%L', name, kind)
       ELSE 'remove what refuses the batch; the next tick tries again' END
FROM batchq.schedule_status
WHERE error IS NOT NULL
ORDER BY name
LIMIT 10

-- name: schedule_that_nobody_declares
SELECT 'warning',
  format('schedule %%s (%%s) was declared in code, and no live worker declares it: it makes no batches', name, cron),
  format('start a worker with that code; if it is no longer needed: batchq schedule remove %%L', name)
FROM batchq.schedule_status
WHERE state = 'undeclared'
ORDER BY name
LIMIT 10

-- name: schedule_without_a_worker
SELECT 'warning', format('schedule %%s makes batches of kind %%s in queue %%s, and no live worker has a handler for it', name, kind, queue),
  'start a worker for the queue whose app has a handler of that name; or correct the schedule'
FROM batchq.schedule_status
WHERE handling_workers = 0
  AND state IN ('active', 'overdue', 'new')
ORDER BY name
LIMIT 10

-- name: schedule_overdue
SELECT 'warning',
  CASE WHEN state = 'new' THEN format('no worker has computed when schedule %%s is due', name)
       ELSE format('schedule %%s has been due since %%s, and no worker has made its batch', name, next_at) END,
  'start a worker; if workers run, check their logs, and whether a transaction holds the row of batchq.schedules'
FROM (SELECT t.name, t.state, t.next_at, s.changed_at
      FROM batchq.schedule_status t
      JOIN batchq.schedules s ON s.name = t.name) shown
WHERE state = 'overdue'
   OR (state = 'new' AND changed_at < now() - interval '10 seconds')
ORDER BY name
LIMIT 10

-- name: stalled
SELECT 'warning',
  format('batch %%s of kind %%s%%s: the lease of %%s expired at %%s', id, kind, ', a part of batch ' || part_of, claimed_by, lease_expires_at),
  format('start a worker for queue %%s: it rescues the batch', batchq.whole_queue(b.queue))
FROM batchq.busy_queues() q
CROSS JOIN LATERAL (
  SELECT id, kind, queue, claimed_by, lease_expires_at, part_of
  FROM batchq.batches_live
  WHERE queue = q.queue
    AND status = 'processing'
    AND lease_expires_at >= q.at
    AND lease_expires_at < now() - interval '10 seconds'
  ORDER BY lease_expires_at
  LIMIT 10
) b
WHERE q.at IS NOT NULL
ORDER BY lease_expires_at
LIMIT 10

-- name: waits_for_a_failed_batch
SELECT 'warning',
  format('%%s waiting %%s for batch %%s, which %%s; the first is batch %%s of kind %%s in queue %%s', batches,
         CASE batches WHEN 1 THEN 'batch waits' ELSE 'batches wait' END, needed_id,
         CASE ended_as WHEN 'failed' THEN 'failed' ELSE 'was cancelled' END, first_id, kind, queue),
  format('fix the cause, then: batchq retry %%s; or, for each waiting batch: batchq run-anyway %%s, or batchq cancel %%s --with-dependents',
         needed_id, first_id, first_id)
FROM (
  SELECT needed_id, ended_as, count(*) AS batches, min(batch_id) AS first_id, (array_agg(kind ORDER BY batch_id))[1] AS kind,
    (array_agg(queue ORDER BY batch_id))[1] AS queue
  FROM batchq.stuck_waiting(10000)
  WHERE is_stored
  GROUP BY needed_id, ended_as
) stuck
ORDER BY batches DESC, needed_id
LIMIT 10

-- name: waits_for_a_batch_that_is_gone
SELECT 'warning',
  format('batch %%s of kind %%s in queue %%s waits for batch %%s, which %%s and is not stored any more', batch_id, kind, queue, needed_id,
         CASE ended_as WHEN 'failed' THEN 'failed' WHEN 'cancelled' THEN 'was cancelled' ELSE 'has gone' END),
  format('nothing can retry what is gone: batchq run-anyway %%s, or batchq cancel %%s --with-dependents', batch_id, batch_id)
FROM batchq.stuck_waiting(10000)
WHERE NOT is_stored
ORDER BY batch_id, needed_id
LIMIT 10

-- name: poisoned
SELECT 'warning', format('batch %%s of kind %%s: its worker died %%s times, attempt %%s of %%s%%s', coalesce(part_of, id), kind, died, attempt, max_attempts,
                         ', with items ' || p.first_item || ' to ' || p.first_item + p.items - 1),
  format('batchq logs %%s; check memory limits, and its handler for crashes; batchq cancel %%1$s stops it', coalesce(part_of, id))
FROM batchq.batches_live
JOIN unnest(ARRAY(SELECT batchq.newest_live(NULL, NULL, NULL, 9223372036854775807, 10000))
            || ARRAY(SELECT part_id FROM batchq.parts WHERE part_id IS NOT NULL AND NOT is_gathered LIMIT 10000)) newest(id) USING (id)
LEFT JOIN batchq.parts p ON p.part_id = id
CROSS JOIN LATERAL (SELECT count(*) AS died FROM jsonb_array_elements(errors) e WHERE e ->> 'error' LIKE 'worker died%%') d
WHERE errors <> '[]'
  AND died >= 2
LIMIT 10

-- name: parts_that_nobody_counts
WITH ended AS MATERIALIZED (
  SELECT b.id, b.queue, b.kind, b.claimed_at
  FROM batchq.spread_batches() AS s(id)
  JOIN batchq.batches_live b ON b.id = s.id
  WHERE b.status = 'waiting'
    AND b.claimed_at < now() - interval '1 minute'
    AND NOT EXISTS (SELECT 1
                    FROM batchq.parts p
                    JOIN batchq.batches_live l ON l.queue = p.queue AND l.id = p.part_id
                    WHERE p.batch_id = b.id AND NOT p.is_gathered)
  ORDER BY b.id
  LIMIT 10
)
SELECT 'warning', format('batch %%s of kind %%s: all its parts have ended, and no worker has counted them', id, kind),
  format('start a worker for queue %%s: it counts them and goes on with the batch', batchq.whole_queue(queue))
FROM ended
WHERE NOT EXISTS (SELECT 1
                  FROM batchq.parts p
                  JOIN batchq.batches_finished f ON f.id = p.part_id AND f.finished_at > now() - interval '1 minute'
                  WHERE p.batch_id = ended.id AND NOT p.is_gathered)
ORDER BY id

-- name: connections_near_limit
SELECT CASE WHEN used >= 0.95 * most THEN 'critical' ELSE 'warning' END, format('%%s of %%s connections of %%s are in use', used, most, what),
  'use fewer workers, a smaller BATCHQ_POOL_SIZE, a transaction-mode pooler, or a higher limit'
FROM (
  SELECT 'the server' AS what, count(*) AS used,
    current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer AS most
  FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend'
  UNION ALL
  SELECT 'role ' || r.rolname, (SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usename = r.rolname), r.rolconnlimit
  FROM pg_catalog.pg_roles r WHERE r.rolname = current_user AND r.rolconnlimit > 0
  UNION ALL
  SELECT 'database ' || d.datname, (SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.datname = d.datname
                                      AND a.backend_type = 'client backend'), d.datconnlimit
  FROM pg_catalog.pg_database d WHERE d.datname = current_database() AND d.datconnlimit > 0
) limits
WHERE used >= 0.8 * most

-- name: rights
SELECT 'note', format('role %%s cannot %%s', current_user, what),
  format('if it should: SELECT batchq.grant_duty(%%L, %%L)', duty, current_user)
FROM (VALUES
  ('enqueue', 'producer', has_any_column_privilege('batchq.batches', 'INSERT')),
  ('claim and finish', 'worker',
     has_table_privilege('batchq.batches_live', 'SELECT') AND has_any_column_privilege('batchq.batches_live', 'UPDATE')
     AND has_table_privilege('batchq.batches_live', 'DELETE') AND has_table_privilege('batchq.batches_finished', 'INSERT')
     AND has_table_privilege('batchq.failed_items', 'INSERT') AND has_table_privilege('batchq.workers', 'INSERT')),
  ('make and drop partitions', 'worker', has_function_privilege('batchq.create_finished_partitions(date, integer)', 'EXECUTE')
     AND has_function_privilege('batchq.prune(interval)', 'EXECUTE'))
) AS r(what, duty, has_it)
WHERE NOT has_it

-- name: grants_beyond_duties
-- Compares the privileges granted to each role with those that any duty needs (batchq.duties).
WITH held AS (
  SELECT acl.grantee, c.relname::text AS object, acl.privilege_type AS privilege, NULL AS of_column,
    acl.is_grantable
  FROM pg_catalog.pg_class c
  CROSS JOIN LATERAL aclexplode(c.relacl) acl
  WHERE c.relnamespace = 'batchq'::regnamespace
    AND acl.grantee <> c.relowner
  UNION ALL
  SELECT acl.grantee, c.relname, acl.privilege_type, a.attname, acl.is_grantable
  FROM pg_catalog.pg_class c
  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
  CROSS JOIN LATERAL aclexplode(a.attacl) acl
  WHERE c.relnamespace = 'batchq'::regnamespace
    AND acl.grantee <> c.relowner
  UNION ALL
  SELECT acl.grantee, p.oid::regprocedure::text, acl.privilege_type, NULL, acl.is_grantable
  FROM pg_catalog.pg_proc p
  CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) acl
  WHERE p.pronamespace = 'batchq'::regnamespace
    AND acl.grantee <> p.proowner
  UNION ALL
  SELECT acl.grantee, 'schema batchq', acl.privilege_type, NULL, acl.is_grantable
  FROM pg_catalog.pg_namespace n
  CROSS JOIN LATERAL aclexplode(n.nspacl) acl
  WHERE n.nspname = 'batchq'
    AND acl.grantee <> n.nspowner
  UNION ALL
  SELECT m.member, 'role ' || m.roleid::regrole, 'membership', NULL, true
  FROM pg_catalog.pg_auth_members m
  JOIN pg_catalog.pg_roles r ON r.oid = m.member AND NOT r.rolsuper
  JOIN pg_catalog.pg_namespace n ON n.nspname = 'batchq' AND n.nspowner <> m.member
  WHERE m.roleid IN (n.nspowner, 'pg_read_all_data'::regrole, 'pg_write_all_data'::regrole)
), needed AS (
  SELECT d.object, p.privilege, NULL AS of_columns
  FROM batchq.duties d
  CROSS JOIN LATERAL unnest(string_to_array(d.privilege, ', ')) AS p(privilege)
  WHERE strpos(d.privilege, '(') = 0
  UNION ALL
  SELECT d.object, split_part(d.privilege, ' (', 1), split_part(d.privilege, ' (', 2)
  FROM batchq.duties d
  WHERE strpos(d.privilege, '(') > 0
  UNION ALL
  SELECT 'schema batchq', 'USAGE', NULL
), beyond AS (
  SELECT grantee, h.privilege,
    format('%%s on %%s', h.privilege, h.object || coalesce('.' || h.of_column, ''))
      || CASE WHEN h.is_grantable AND h.privilege <> 'membership' THEN ' with grant option' ELSE '' END AS granted
  FROM held h
  WHERE h.grantee = 0
     OR h.is_grantable
     OR NOT EXISTS (
       SELECT 1
       FROM needed n
       WHERE n.privilege = h.privilege
         AND (n.object = h.object OR 'batchq.' || n.object = h.object OR 'batchq.' || n.object = split_part(h.object, '(', 1))
         AND (n.of_columns IS NULL
              OR h.of_column = ANY (string_to_array(replace(n.of_columns, ')', ''), ', '))))
)
SELECT CASE WHEN grantee = 0 OR 'CREATE' = ANY (array_agg(privilege)) OR 'TRUNCATE' = ANY (array_agg(privilege))
              OR 'TRIGGER' = ANY (array_agg(privilege)) THEN 'warning' ELSE 'note' END,
  format('%%s has more than any duty needs: %%s', CASE grantee WHEN 0 THEN 'PUBLIC' ELSE 'role ' || pg_get_userbyid(grantee) END,
         string_agg(granted, ', ' ORDER BY granted) FILTER (WHERE number <= 5)
           || CASE WHEN count(*) > 5 THEN format(' and %%s more', count(*) - 5) ELSE '' END),
  CASE grantee WHEN 0 THEN 'REVOKE it, and grant each role its duty: docs/security.md'
    ELSE format('REVOKE it, then SELECT batchq.grant_duty(duty, %%L): docs/security.md', pg_get_userbyid(grantee)) END
FROM (SELECT *, row_number() OVER (PARTITION BY grantee ORDER BY granted) AS number FROM beyond) counted
GROUP BY grantee

-- name: wraparound
SELECT CASE WHEN age(datfrozenxid) > 9 * %(ages)s THEN 'critical' ELSE 'warning' END,
  format('the oldest transaction id of the database is %%s transactions old', age(datfrozenxid)),
  'end what holds a snapshot, then VACUUM FREEZE; at 2 billion the server refuses to write'
FROM pg_catalog.pg_database
WHERE datname = current_database()
  AND age(datfrozenxid) > 5 * %(ages)s

-- name: server
SELECT 'critical', 'the server is older than PostgreSQL 15', 'upgrade it' WHERE current_setting('server_version_num')::integer < 150000
UNION ALL
SELECT 'note', 'jit is on: the server may compile statements of people for a second; those of workers turn it off',
  'ALTER DATABASE ... SET jit = off'
WHERE current_setting('jit') = 'on'

