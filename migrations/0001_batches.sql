-- The queue: one table for people, in partitions so that the part that workers touch stays small.
CREATE TABLE batchq.batches (
  id               bigint      GENERATED ALWAYS AS IDENTITY,
  queue            text        NOT NULL DEFAULT 'default',
  kind             text        NOT NULL,
  status           text        NOT NULL DEFAULT 'pending',
  payload          jsonb       NOT NULL DEFAULT '{}',
  items            jsonb,
  priority         smallint    NOT NULL DEFAULT 0,
  run_at           timestamptz NOT NULL DEFAULT now(),
  unique_key       text,
  max_attempts     smallint    NOT NULL DEFAULT 5,
  max_failed_items integer     NOT NULL DEFAULT 0,
  timeout_seconds  integer,
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
  errors           jsonb       NOT NULL DEFAULT '[]',
  created_at       timestamptz NOT NULL DEFAULT now(),
  finished_at      timestamptz,
  trace_context    text,

  CONSTRAINT batches_queue_is_named       CHECK (octet_length(queue) BETWEEN 1 AND 128),
  CONSTRAINT batches_kind_is_named        CHECK (octet_length(kind) BETWEEN 1 AND 200),
  CONSTRAINT batches_payload_fits         CHECK (pg_column_size(payload) <= 4194304),
  CONSTRAINT batches_items_fit            CHECK (items_total <= 1000000 AND pg_column_size(items) <= 67108864),
  CONSTRAINT batches_run_at_is_finite     CHECK (isfinite(run_at)),
  CONSTRAINT batches_unique_key_fits      CHECK (octet_length(unique_key) BETWEEN 1 AND 1000),
  CONSTRAINT batches_max_attempts_is_positive        CHECK (max_attempts >= 1),
  CONSTRAINT batches_max_failed_items_is_not_negative CHECK (max_failed_items >= 0),
  CONSTRAINT batches_timeout_is_positive  CHECK (timeout_seconds >= 1),
  CONSTRAINT batches_attempts_are_left    CHECK (max_attempts < 1 OR (attempt BETWEEN 0 AND max_attempts
                                                 AND (status <> 'pending' OR attempt < max_attempts))),
  CONSTRAINT batches_counters_fit_items   CHECK (items_done >= 0 AND items_failed >= 0 AND items_done + items_failed
                                                 <= CASE WHEN items IS NULL THEN 0 ELSE coalesce(items_total, 1000000) END),
  CONSTRAINT batches_errors_is_array      CHECK (jsonb_typeof(errors) = 'array'),
  CONSTRAINT batches_claim_is_whole       CHECK (CASE WHEN status = 'processing'
                                                   THEN num_nulls(claimed_by, claim_token, claimed_at, lease_expires_at) = 0
                                                   ELSE claim_token IS NULL AND lease_expires_at IS NULL END),
  CONSTRAINT batches_finish_is_whole      CHECK ((status IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
  CONSTRAINT batches_trace_context_fits   CHECK (octet_length(trace_context) BETWEEN 1 AND 200),
  -- An infinite lease is never rescued.
  CONSTRAINT batches_times_are_finite     CHECK (isfinite(created_at) AND coalesce(isfinite(claimed_at), true)
                                                 AND coalesce(isfinite(lease_expires_at), true))
) PARTITION BY LIST (status);

COMMENT ON TABLE batchq.batches IS
  'The queue. A row is a batch: one unit of claiming. To enqueue: INSERT INTO batchq.batches (kind, payload) VALUES (...). '
  'To change a batch, use batchq.cancel(id) and batchq.retry(id): workers own the other columns.';
COMMENT ON COLUMN batchq.batches.queue IS 'Workers serve queues by name; each claim is within one queue.';
COMMENT ON COLUMN batchq.batches.kind IS 'The name of the handler that works this batch. A kind that no worker knows stays pending.';
COMMENT ON COLUMN batchq.batches.status IS
  'pending, processing; then completed, failed or cancelled. batchq.status shows finer ones (scheduled, retrying, stalled).';
COMMENT ON COLUMN batchq.batches.payload IS 'The input: any JSON value, at most 4 MiB.';
COMMENT ON COLUMN batchq.batches.items IS
  'Optional JSON array of the items to work through, at most 1,000,000 and 64 MiB. With items come progress, errors an item, checkpoints.';
COMMENT ON COLUMN batchq.batches.priority IS 'Lower first.';
COMMENT ON COLUMN batchq.batches.run_at IS 'Not claimed before this time. Within a priority, the earliest is first.';
COMMENT ON COLUMN batchq.batches.unique_key IS
  'At most one pending or processing batch of a kind in a queue has this key. Insert with ON CONFLICT DO NOTHING.';
COMMENT ON COLUMN batchq.batches.max_attempts IS 'How many attempts may fail before the batch is failed.';
COMMENT ON COLUMN batchq.batches.max_failed_items IS 'The batch is completed if at most this many items have failed after the last attempt.';
COMMENT ON COLUMN batchq.batches.timeout_seconds IS 'An attempt that runs for longer has failed. Null: the handler''s own limit, or none.';
COMMENT ON COLUMN batchq.batches.attempt IS 'Attempts begun, the running one included. Given back when a worker stops or the handler snoozes.';
COMMENT ON COLUMN batchq.batches.claimed_by IS 'The worker that has the batch, or had it last: batchq.workers.id.';
COMMENT ON COLUMN batchq.batches.claim_token IS 'Proves who has the batch now: every write of a worker matches it, or changes nothing.';
COMMENT ON COLUMN batchq.batches.lease_expires_at IS 'Until then the batch belongs to its worker, who extends it; afterwards any worker may take it back.';
COMMENT ON COLUMN batchq.batches.items_total IS 'The length of items; null without items. Filled in by a trigger.';
COMMENT ON COLUMN batchq.batches.items_done IS 'Items that succeeded. Items are first worked in order: the next is number items_done + items_failed, from 0.';
COMMENT ON COLUMN batchq.batches.items_failed IS 'Items that failed and have not succeeded since: the rows of batchq.failed_items.';
COMMENT ON COLUMN batchq.batches.cursor IS 'The checkpoint of a handler that keeps its own: any JSON value, handed back at the next attempt.';
COMMENT ON COLUMN batchq.batches.result IS 'What the handler returned.';
COMMENT ON COLUMN batchq.batches.errors IS
  'One object for each attempt that failed: attempt, at, error, traceback. The newest 10.';
COMMENT ON COLUMN batchq.batches.trace_context IS
  'Optional: the span that enqueued the batch, as a traceparent of W3C Trace Context (00-TRACE-SPAN-01). A worker with BATCHQ_TRACES links the span of each run to it.';

-- What workers touch. Room on each page, and an eager vacuum, of large values as well: every batch leaves two dead rows here.
CREATE TABLE batchq.batches_live PARTITION OF batchq.batches
  FOR VALUES IN ('pending', 'processing')
  WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_cost_delay = 0);

COMMENT ON TABLE batchq.batches_live IS 'Batches that are pending or processing.';

-- The past, in a partition for each day (UTC): retention is DROP TABLE. See batchq.create_finished_partitions.
CREATE TABLE batchq.batches_finished PARTITION OF batchq.batches
  FOR VALUES IN ('completed', 'failed', 'cancelled')
  PARTITION BY RANGE (finished_at);

COMMENT ON TABLE batchq.batches_finished IS 'Batches that are completed, failed or cancelled; a partition for each day, UTC.';

CREATE TABLE batchq.finished_default PARTITION OF batchq.batches_finished DEFAULT;

COMMENT ON TABLE batchq.finished_default IS 'Finished batches of days that had no partition. Normally empty.';

-- Where a row with any other status would go: it exists to refuse it by name.
CREATE TABLE batchq.batches_refused PARTITION OF batchq.batches (
  CONSTRAINT batches_status_is_known CHECK (false)
) DEFAULT;

COMMENT ON TABLE batchq.batches_refused IS 'Always empty: refuses a status that does not exist.';

-- Lookups by id, and nothing else. With the queue as its second column the planner could take it for statements that name
-- the queue: where the statistics are those of an empty table and dead entries are many, it did, and read all of them
-- (87,600 buffers where the index of the claim needs 9). Each claim writes a second entry beside the first: where there is
-- room for it, no page is split or searched for dead entries, a twelfth of what a claim costs.
CREATE UNIQUE INDEX batches_live_id ON batchq.batches_live (id) WITH (fillfactor = 48);

CREATE UNIQUE INDEX batches_live_unique_key ON batchq.batches_live (queue, kind, unique_key)
  WHERE unique_key IS NOT NULL;

-- The claim: equality on queue and priority, then the order of the index. No sort.
CREATE INDEX batches_live_ready ON batchq.batches_live (queue, priority, run_at, id) WHERE status = 'pending';

-- The rescue.
CREATE INDEX batches_live_lease ON batchq.batches_live (queue, lease_expires_at) WHERE status = 'processing';

CREATE INDEX batches_finished_id ON batchq.batches_finished (id);

-- "What finished in the last minute": rows lie in the order of finished_at, so a few hundred bytes of BRIN do.
CREATE INDEX batches_finished_at ON batchq.batches_finished USING brin (finished_at) WITH (pages_per_range = 32);

CREATE INDEX batches_finished_failed ON batchq.batches_finished (queue, kind) WHERE status = 'failed';

-- The newest of the finished batches that did not complete.
CREATE INDEX batches_finished_uncompleted ON batchq.batches_finished (status, finished_at, id) WHERE status <> 'completed';

-- An ordinary column that a trigger fills in: since PostgreSQL 16 an UPDATE that touches no input of a generated column parses
-- that column's expression again for each row (a claim of 500 batches took 33 us of processor a batch, and 23 us without,
-- PostgreSQL 18.6). An AFTER trigger, since a BEFORE trigger keeps COPY from inserting many rows at once; its condition
-- leaves batches without items alone. With the owner's rights, since who may insert need not be allowed to update: so it
-- checks where it fires, or anybody could put it on a table of his own.
CREATE FUNCTION batchq.count_items()
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

COMMENT ON FUNCTION batchq.count_items() IS
  'Trigger function: sets batchq.batches.items_total to the length of items, and refuses items that are no array.';

CREATE TRIGGER count_items
  AFTER INSERT ON batchq.batches_live
  FOR EACH ROW WHEN (NEW.items IS NOT NULL OR NEW.items_total IS NOT NULL)
  EXECUTE FUNCTION batchq.count_items();

CREATE TRIGGER count_changed_items
  AFTER UPDATE OF items, items_total ON batchq.batches_live
  FOR EACH ROW
  EXECUTE FUNCTION batchq.count_items();

CREATE TRIGGER count_items
  AFTER INSERT ON batchq.batches_finished
  FOR EACH ROW WHEN (NEW.items IS NOT NULL AND NEW.items_total IS NULL)
  EXECUTE FUNCTION batchq.count_items();

-- A batch that is being processed stays what it is: a worker has its id, its queue and its items in memory. The trigger names
-- columns that no worker ever sets, so that no statement of a worker's calls it. An AFTER trigger, since a BEFORE trigger has
-- each row that is updated read and locked once more, whatever columns it is for.
CREATE FUNCTION batchq.keep_processing()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  RAISE EXCEPTION 'batch % is being processed: it cannot be made another', OLD.id
    USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_processing_is_kept', SCHEMA = 'batchq', TABLE = TG_TABLE_NAME,
          HINT = format('SELECT batchq.cancel(%s) first, or wait.', OLD.id);
END
$$;

COMMENT ON FUNCTION batchq.keep_processing() IS
  'Trigger function: refuses another id, queue, kind or items for a batch that is being processed.';

CREATE TRIGGER keep_processing
  AFTER UPDATE OF id, queue, kind, items ON batchq.batches_live
  FOR EACH ROW
  WHEN (OLD.status = 'processing' AND (NEW.id <> OLD.id OR NEW.queue <> OLD.queue OR NEW.kind <> OLD.kind
                                       OR NEW.items IS DISTINCT FROM OLD.items))
  EXECUTE FUNCTION batchq.keep_processing();

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

-- A finish that is dated ahead would keep its day's partition from being made.
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

CREATE TABLE batchq.failed_items (
  queue      text        NOT NULL,
  batch_id   bigint      NOT NULL,
  item_index integer     NOT NULL,
  item       jsonb       NOT NULL,
  error      text        NOT NULL,
  attempt    smallint    NOT NULL,
  retryable  boolean     NOT NULL DEFAULT true,
  failed_at  timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (batch_id, queue, item_index)
);

COMMENT ON TABLE batchq.failed_items IS
  'A row for each item that failed and has not succeeded since. Written in the transaction of the batch''s checkpoint.';
COMMENT ON COLUMN batchq.failed_items.batch_id IS 'batchq.batches.id.';
COMMENT ON COLUMN batchq.failed_items.item_index IS 'The item''s place in batchq.batches.items, from 0.';
COMMENT ON COLUMN batchq.failed_items.item IS 'The item itself.';
COMMENT ON COLUMN batchq.failed_items.error IS 'The error in one line, cut at 8 KB.';
COMMENT ON COLUMN batchq.failed_items.attempt IS
  'The attempt in which it last failed: a later attempt works it again. 0 after batchq.retry.';
COMMENT ON COLUMN batchq.failed_items.retryable IS
  'False: another attempt would fail as well (the item does not fit its model), so only batchq.retry brings it back.';

-- For workers that keep no completed batches: what has failed in a batch goes with it, also what a checkpoint of the same
-- claim committed while the DELETE of the batch waited for it. That statement itself sees what there was when it began, and
-- would leave those items behind; a function's statement sees what there is.
CREATE FUNCTION batchq.forget_failed_items(in_queue text, of_batch bigint)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
  DELETE FROM batchq.failed_items f
  WHERE f.queue = in_queue
    AND f.batch_id = of_batch;
  RETURN true;
END
$$;

COMMENT ON FUNCTION batchq.forget_failed_items(text, bigint) IS
  'Deletes the failed items of a batch that is deleted in the same transaction; returns true.';

CREATE FUNCTION batchq.forget_failed_items()
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

COMMENT ON FUNCTION batchq.forget_failed_items() IS
  'Trigger function: TRUNCATE of batchq.batches empties batchq.failed_items as well.';

CREATE TRIGGER forget_failed_items
  AFTER TRUNCATE ON batchq.batches
  FOR EACH STATEMENT
  EXECUTE FUNCTION batchq.forget_failed_items();

CREATE TABLE batchq.workers (
  id           text        PRIMARY KEY,
  hostname     text        NOT NULL,
  pid          integer     NOT NULL,
  version      text        NOT NULL,
  queues       text[]      NOT NULL,
  kinds        text[]      NOT NULL,
  concurrency  integer     NOT NULL,
  in_hand      integer     NOT NULL DEFAULT 0,
  stopping     boolean     NOT NULL DEFAULT false,
  started_at   timestamptz NOT NULL DEFAULT now(),
  heartbeat_at timestamptz NOT NULL DEFAULT now(),
  drain_asked_at timestamptz,
  lost_slots   integer     NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

COMMENT ON TABLE batchq.workers IS
  'The worker processes, for people and to share out idle polling. Nothing is decided by it: batches come back by their lease.';
COMMENT ON COLUMN batchq.workers.id IS 'Host, process id and a random part; batchq.batches.claimed_by.';
COMMENT ON COLUMN batchq.workers.kinds IS 'The kinds that its app has handlers for.';
COMMENT ON COLUMN batchq.workers.concurrency IS 'How many batches it runs at once, in threads and in its event loop together.';
COMMENT ON COLUMN batchq.workers.in_hand IS 'Batches claimed and not finished at the last heartbeat.';
COMMENT ON COLUMN batchq.workers.heartbeat_at IS 'Its last sign of life. A worker silent for a minute counts as gone; its row goes after an hour.';
COMMENT ON COLUMN batchq.workers.drain_asked_at IS
  'Since when it is asked to end: see batchq.drain_worker. It sees that at its next heartbeat, within 5 s.';
COMMENT ON COLUMN batchq.workers.lost_slots IS
  'Slots whose handlers were told to end (they ran into their time limit, or their batch was cancelled) and did not. When '
  'half of them are lost, the process is replaced.';
