-- The queue: one table for people, partitioned so that the part that workers read and write stays small.
CREATE TABLE batchq.batches (
  id               bigint      GENERATED ALWAYS AS IDENTITY,
  queue            text        NOT NULL DEFAULT 'default'
                               CONSTRAINT batches_queue_is_named CHECK (octet_length(queue) BETWEEN 1 AND 128),
  kind             text        NOT NULL CONSTRAINT batches_kind_is_named CHECK (octet_length(kind) BETWEEN 1 AND 200),
  status           text        NOT NULL DEFAULT 'pending',
  payload          jsonb       NOT NULL DEFAULT '{}' CONSTRAINT batches_payload_fits CHECK (pg_column_size(payload) <= 4194304),
  items            jsonb,
  priority         smallint    NOT NULL DEFAULT 0,
  run_at           timestamptz NOT NULL DEFAULT now() CONSTRAINT batches_run_at_is_finite CHECK (isfinite(run_at)),
  unique_key       text        CONSTRAINT batches_unique_key_fits CHECK (octet_length(unique_key) BETWEEN 1 AND 1000),
  max_attempts     smallint    NOT NULL DEFAULT 5 CONSTRAINT batches_max_attempts_is_positive CHECK (max_attempts >= 1),
  max_failed_items integer     NOT NULL DEFAULT 0
                               CONSTRAINT batches_max_failed_items_is_not_negative CHECK (max_failed_items >= 0),
  timeout_seconds  integer     CONSTRAINT batches_timeout_is_positive CHECK (timeout_seconds >= 1),
  attempt          smallint    NOT NULL DEFAULT 0,
  claimed_by       text,
  claim_token      uuid,
  claimed_at       timestamptz,
  lease_expires_at timestamptz,
  items_total      integer,
  items_done       integer     NOT NULL DEFAULT 0,
  items_failed     integer     NOT NULL DEFAULT 0,
  cursor           jsonb,
  result           jsonb,
  errors           jsonb       NOT NULL DEFAULT '[]' CONSTRAINT batches_errors_is_array CHECK (jsonb_typeof(errors) = 'array'),
  created_at       timestamptz NOT NULL DEFAULT now(),
  finished_at      timestamptz,
  trace_context    text        CONSTRAINT batches_trace_context_fits CHECK (octet_length(trace_context) BETWEEN 1 AND 200),
  CONSTRAINT batches_items_fit CHECK (items_total <= 1000000 AND pg_column_size(items) <= 67108864),
  CONSTRAINT batches_attempts_are_left CHECK
    (max_attempts < 1 OR (attempt BETWEEN 0 AND max_attempts AND (status <> 'pending' OR attempt < max_attempts))),
  CONSTRAINT batches_counters_fit_items CHECK
    (items_done >= 0 AND items_failed >= 0
     AND items_done + items_failed <= CASE WHEN items IS NULL THEN 0 ELSE coalesce(items_total, 1000000) END),
  CONSTRAINT batches_claim_is_whole CHECK
    (CASE WHEN status = 'processing' THEN num_nulls(claimed_by, claim_token, claimed_at, lease_expires_at) = 0
          ELSE claim_token IS NULL AND lease_expires_at IS NULL END),
  CONSTRAINT batches_finish_is_whole CHECK ((status IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
  CONSTRAINT batches_times_are_finite CHECK -- an infinite lease is never rescued
    (isfinite(created_at) AND coalesce(isfinite(claimed_at), true) AND coalesce(isfinite(lease_expires_at), true))
) PARTITION BY LIST (status);
COMMENT ON TABLE batchq.batches IS
  'The queue: one row per batch, the unit of claiming. To enqueue: INSERT INTO batchq.batches (kind, payload) VALUES (...). To '
  'change a batch, call batchq.cancel(id) or batchq.retry(id): workers own the other columns.';
COMMENT ON COLUMN batchq.batches.queue IS 'Name of the queue. Workers serve queues by name; each claim is within one queue.';
COMMENT ON COLUMN batchq.batches.kind IS 'Name of the handler. A kind that no worker has a handler for stays pending.';
COMMENT ON COLUMN batchq.batches.status IS
  'pending, processing, then completed, failed or cancelled. batchq.status shows finer ones (scheduled, retrying, stalled).';
COMMENT ON COLUMN batchq.batches.payload IS 'Input of the handler: any JSON value, at most 4 MiB.';
COMMENT ON COLUMN batchq.batches.items IS
  'Optional JSON array of items, at most 1,000,000 and 64 MiB. With items come progress, an error per failed item, checkpoints.';
COMMENT ON COLUMN batchq.batches.priority IS 'Claim order: lower values are claimed first.';
COMMENT ON COLUMN batchq.batches.run_at IS 'Earliest time of a claim. Within a priority, the earliest run_at is claimed first.';
COMMENT ON COLUMN batchq.batches.unique_key IS
  'Optional key. At most one pending or processing batch per queue, kind and key exists. Insert with ON CONFLICT DO NOTHING.';
COMMENT ON COLUMN batchq.batches.max_attempts IS 'Number of attempts that may fail before the batch is failed.';
COMMENT ON COLUMN batchq.batches.max_failed_items IS
  'Number of tolerated failed items: with no more than these after the last attempt, the batch is completed.';
COMMENT ON COLUMN batchq.batches.timeout_seconds IS
  'Timeout of an attempt; one that runs longer fails. Null: the timeout of the handler, if it has one.';
COMMENT ON COLUMN batchq.batches.attempt IS
  'Number of attempts begun, including the running one. An attempt is not counted if its worker stops or its handler snoozes.';
COMMENT ON COLUMN batchq.batches.claimed_by IS 'Worker that has the batch, or had it last: batchq.workers.id.';
COMMENT ON COLUMN batchq.batches.claim_token IS 'Proof of the claim: each write of a worker matches it, or changes nothing.';
COMMENT ON COLUMN batchq.batches.lease_expires_at IS
  'End of the lease. Until then the batch belongs to its worker, which extends it; afterwards any worker may rescue the batch.';
COMMENT ON COLUMN batchq.batches.items_total IS 'Length of items, set by a trigger; null without items.';
COMMENT ON COLUMN batchq.batches.items_done IS
  'Number of items that succeeded. Items first run in order: the next has index items_done + items_failed, counted from 0.';
COMMENT ON COLUMN batchq.batches.items_failed IS
  'Number of items that failed and have not succeeded since, each with a row in batchq.failed_items.';
COMMENT ON COLUMN batchq.batches.cursor IS 'Checkpoint saved by the handler itself: any JSON value, passed to the next attempt.';
COMMENT ON COLUMN batchq.batches.result IS 'Return value of the handler.';
COMMENT ON COLUMN batchq.batches.errors IS 'The newest 10 failed attempts, an object each: attempt, at, error, traceback.';
COMMENT ON COLUMN batchq.batches.trace_context IS
  'Optional W3C traceparent of the span that enqueued it (00-TRACE-SPAN-01). Workers with BATCHQ_TRACES link each run to it.';

-- Every batch leaves two dead rows here. So pages keep free space, and vacuum runs early and without a cost delay, for large
-- values (TOAST) as well.
CREATE TABLE batchq.batches_live PARTITION OF batchq.batches FOR VALUES IN ('pending', 'processing')
  WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_cost_delay = 0);
COMMENT ON TABLE batchq.batches_live IS 'Batches that are pending or processing.';

-- One partition per day, so that retention is DROP TABLE. See batchq.create_finished_partitions.
CREATE TABLE batchq.batches_finished PARTITION OF batchq.batches
  FOR VALUES IN ('completed', 'failed', 'cancelled') PARTITION BY RANGE (finished_at);
COMMENT ON TABLE batchq.batches_finished IS 'Batches that are completed, failed or cancelled; one partition per day (UTC).';

CREATE TABLE batchq.finished_default PARTITION OF batchq.batches_finished DEFAULT;
COMMENT ON TABLE batchq.finished_default IS 'Finished batches of days that had no partition. Normally empty.';

-- A row with any other status would go here. The table refuses it with a constraint that has a name.
CREATE TABLE batchq.batches_refused PARTITION OF batchq.batches (CONSTRAINT batches_status_is_known CHECK (false)) DEFAULT;
COMMENT ON TABLE batchq.batches_refused IS 'Always empty: refuses a status that does not exist.';

-- Only for lookups by id. With the queue as its second column, the planner took this index for statements that name the queue
-- when the statistics were those of an empty table, and read all of its many dead entries (87,600 buffers, where the index of
-- claims needs 9). Each claim writes a second entry beside the first. The low fillfactor leaves room for it: no page is split or
-- searched for dead entries, which saves a twelfth of a claim's cost.
CREATE UNIQUE INDEX batches_live_id ON batchq.batches_live (id) WITH (fillfactor = 48);

CREATE UNIQUE INDEX batches_live_unique_key ON batchq.batches_live (queue, kind, unique_key) WHERE unique_key IS NOT NULL;
-- For claims (equality on queue and priority, then the order of the index, so no sort) and for rescues.
CREATE INDEX batches_live_ready ON batchq.batches_live (queue, priority, run_at, id) WHERE status = 'pending';
CREATE INDEX batches_live_lease ON batchq.batches_live (queue, lease_expires_at) WHERE status = 'processing';

CREATE INDEX batches_finished_id ON batchq.batches_finished (id);
-- For "what finished in the last minute". Rows are stored in the order of finished_at, so a BRIN of a few hundred bytes suffices.
CREATE INDEX batches_finished_at ON batchq.batches_finished USING brin (finished_at) WITH (pages_per_range = 32);
CREATE INDEX batches_finished_failed ON batchq.batches_finished (queue, kind) WHERE status = 'failed';
-- For the newest finished batches that did not complete.
CREATE INDEX batches_finished_uncompleted ON batchq.batches_finished (status, finished_at, id) WHERE status <> 'completed';

-- Not a generated column: since PostgreSQL 16 an UPDATE parses a generated column's expression again for each row, even if it
-- changes no input of it (a claim of 500 batches took 33 us of processor time per batch, and 23 us without; PostgreSQL 18.6). An
-- AFTER trigger, since a BEFORE trigger keeps COPY from inserting many rows together; its condition skips batches without items.
-- SECURITY DEFINER, since a role that may insert need not have the right to update. So the function checks which table it fires
-- on: otherwise anybody could put it on a table of his own.
CREATE FUNCTION batchq.count_items() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE counted integer;
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
    UPDATE batchq.batches b SET items_total = counted
    WHERE b.queue = NEW.queue AND b.id = NEW.id AND b.status = NEW.status AND b.finished_at IS NOT DISTINCT FROM NEW.finished_at;
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.count_items IS
  'Trigger function: sets batchq.batches.items_total to the length of items, and refuses items that are not an array.';
CREATE TRIGGER count_items AFTER INSERT ON batchq.batches_live
  FOR EACH ROW WHEN (NEW.items IS NOT NULL OR NEW.items_total IS NOT NULL) EXECUTE FUNCTION batchq.count_items();
CREATE TRIGGER count_changed_items AFTER UPDATE OF items, items_total ON batchq.batches_live
  FOR EACH ROW EXECUTE FUNCTION batchq.count_items();
CREATE TRIGGER count_items AFTER INSERT ON batchq.batches_finished
  FOR EACH ROW WHEN (NEW.items IS NOT NULL AND NEW.items_total IS NULL) EXECUTE FUNCTION batchq.count_items();

-- A worker holds the id, queue, kind and items of a batch in memory while it runs. The trigger names only columns that no worker
-- ever sets, so no worker's statement fires it. An AFTER trigger, since a BEFORE trigger makes Postgres read and lock each
-- updated row once more, whichever columns it names.
CREATE FUNCTION batchq.keep_processing() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  RAISE EXCEPTION 'batch % is being processed: its id, queue, kind and items cannot be changed', OLD.id
    USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_processing_is_kept', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
          HINT = format('SELECT batchq.cancel(%s) first, or wait until it has finished.', OLD.id);
END $$;
COMMENT ON FUNCTION batchq.keep_processing IS
  'Trigger function: refuses a new id, queue, kind or items for a batch that is being processed.';
CREATE TRIGGER keep_processing AFTER UPDATE OF id, queue, kind, items ON batchq.batches_live FOR EACH ROW
  WHEN (OLD.status = 'processing' AND (NEW.id <> OLD.id OR NEW.queue <> OLD.queue OR NEW.kind <> OLD.kind
                                       OR NEW.items IS DISTINCT FROM OLD.items))
  EXECUTE FUNCTION batchq.keep_processing();

-- The CHECKs of sizes measure a value as it is stored. One that was compressed elsewhere (INSERT ... SELECT) is small until a
-- worker unpacks it, and 1e131071 is a number of 8 bytes until somebody reads it.
CREATE FUNCTION batchq.refuse_packed_values() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF (octet_length(NEW.payload::text) > CASE WHEN pg_column_compression(NEW.payload) IS NULL
                                            THEN 10000 + 16 * pg_column_size(NEW.payload) ELSE 8388608 END
     OR octet_length(NEW.cursor::text) > CASE WHEN pg_column_compression(NEW.cursor) IS NULL
                                              THEN 10000 + 16 * pg_column_size(NEW.cursor) ELSE 8388608 END
     OR octet_length(NEW.items::text) > CASE WHEN pg_column_compression(NEW.items) IS NULL
                                             THEN 10000 + 16 * pg_column_size(NEW.items) ELSE 67108864 END) THEN
    RAISE EXCEPTION 'batch % has % bytes of payload, % of cursor and % of items when unpacked', NEW.id,
        coalesce(octet_length(NEW.payload::text), 0), coalesce(octet_length(NEW.cursor::text), 0),
        coalesce(octet_length(NEW.items::text), 0)
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_unpacked_values_fit', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'As text, at most 8 MiB of payload and of cursor, 64 MiB of items; at most 16 times as stored, plus 10 kB.';
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.refuse_packed_values IS 'Trigger function: refuses values that are small only until they are read.';
CREATE TRIGGER refuse_packed_values AFTER INSERT ON batchq.batches_live FOR EACH ROW
  WHEN (octet_length(NEW.payload::text) > 10000 + 16 * pg_column_size(NEW.payload)
        OR NEW.items IS NOT NULL OR NEW.cursor IS NOT NULL) EXECUTE FUNCTION batchq.refuse_packed_values();

-- A batch in the default partition keeps the partition of its day from being made.
CREATE FUNCTION batchq.refuse_finish_ahead() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF NOT isfinite(NEW.finished_at) OR NEW.finished_at > clock_timestamp() + interval '1 hour' THEN
    RAISE EXCEPTION 'batch % cannot have finished at %', NEW.id, NEW.finished_at
      USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_finish_is_past', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
            HINT = 'Leave finished_at, the time when a batch finished, to the worker and to batchq.cancel.';
  END IF;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION batchq.refuse_finish_ahead IS
  'Trigger function: keeps batches with a future finished_at out of batchq.finished_default, where they would keep the partition '
  'of that day from being made.';
CREATE TRIGGER refuse_finish_ahead BEFORE INSERT OR UPDATE ON batchq.finished_default
  FOR EACH ROW EXECUTE FUNCTION batchq.refuse_finish_ahead();

CREATE TABLE batchq.failed_items (
  queue text NOT NULL, batch_id bigint NOT NULL, item_index integer NOT NULL,
  item jsonb NOT NULL, error text NOT NULL, attempt smallint NOT NULL,
  retryable boolean NOT NULL DEFAULT true, failed_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (batch_id, queue, item_index)
);
COMMENT ON TABLE batchq.failed_items IS 'One row per item that failed and has not succeeded since, committed with a checkpoint.';
COMMENT ON COLUMN batchq.failed_items.batch_id IS 'Batch of the item: batchq.batches.id.';
COMMENT ON COLUMN batchq.failed_items.item_index IS 'Index of the item in batchq.batches.items, from 0.';
COMMENT ON COLUMN batchq.failed_items.item IS 'The item itself.';
COMMENT ON COLUMN batchq.failed_items.error IS 'Error in one line, cut at 2,000 bytes.';
COMMENT ON COLUMN batchq.failed_items.attempt IS
  'Attempt in which the item last failed; a later attempt runs the item again. 0 after batchq.retry.';
COMMENT ON COLUMN batchq.failed_items.retryable IS
  'False if another attempt would fail as well (the item does not fit its model): then only batchq.retry runs the item again.';

-- For workers that delete completed batches: the failed items go with the batch, including those that a checkpoint of the same
-- claim commits while the DELETE of the batch waits for it. The DELETE itself sees only what was committed before it began, and
-- would leave those items behind; a statement in a function sees them.
CREATE FUNCTION batchq.forget_failed_items(in_queue text, of_batch bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  DELETE FROM batchq.failed_items f WHERE f.queue = in_queue AND f.batch_id = of_batch;
  RETURN true;
END $$;
COMMENT ON FUNCTION batchq.forget_failed_items(text, bigint) IS
  'Deletes the failed items of a batch that is deleted in the same transaction; returns true.';

CREATE FUNCTION batchq.forget_failed_items() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ BEGIN
  IF TG_RELID <> 'batchq.batches'::regclass THEN
    RAISE EXCEPTION 'batchq.forget_failed_items is the trigger function of batchq.batches, not of %.%',
      TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
  END IF;
  TRUNCATE batchq.failed_items;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION batchq.forget_failed_items() IS 'Trigger function: TRUNCATE of batchq.batches empties batchq.failed_items.';
CREATE TRIGGER forget_failed_items AFTER TRUNCATE ON batchq.batches
  FOR EACH STATEMENT EXECUTE FUNCTION batchq.forget_failed_items();

CREATE TABLE batchq.workers (
  id text PRIMARY KEY, hostname text NOT NULL, pid integer NOT NULL, version text NOT NULL,
  queues text[] NOT NULL, kinds text[] NOT NULL, concurrency integer NOT NULL,
  in_hand integer NOT NULL DEFAULT 0, stopping boolean NOT NULL DEFAULT false,
  started_at timestamptz NOT NULL DEFAULT now(), heartbeat_at timestamptz NOT NULL DEFAULT now(),
  drain_asked_at timestamptz, lost_slots integer NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
COMMENT ON TABLE batchq.workers IS
  'Worker processes, for people to see and for idle workers to share polling. Rescues go by the lease, not by this table.';
COMMENT ON COLUMN batchq.workers.id IS 'Host, process id and a random part; the value in batchq.batches.claimed_by.';
COMMENT ON COLUMN batchq.workers.kinds IS 'Kinds that the worker''s app has handlers for.';
COMMENT ON COLUMN batchq.workers.concurrency IS 'Most batches that run at the same time, in threads and event loop together.';
COMMENT ON COLUMN batchq.workers.in_hand IS 'Number of batches claimed, outcome not yet written, at the last heartbeat.';
COMMENT ON COLUMN batchq.workers.heartbeat_at IS
  'Time of the last heartbeat. A worker without a heartbeat for a minute counts as gone; its row is deleted after an hour.';
COMMENT ON COLUMN batchq.workers.drain_asked_at IS
  'Time when batchq.drain_worker asked the worker to drain. The worker sees the request at its next heartbeat, within 5 s.';
COMMENT ON COLUMN batchq.workers.lost_slots IS
  'Slots whose handlers did not stop when told to, after a timeout or because their batch was cancelled. When half of the slots '
  'are lost, the process is replaced.';
