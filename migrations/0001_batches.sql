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
  -- Kept as a column, and not looked up in the checks below, because every UPDATE of a row evaluates its checks
  -- again: a check that reads items would unpack the whole array at each checkpoint.
  items_total      integer     GENERATED ALWAYS AS
                     (CASE WHEN jsonb_typeof(items) = 'array' THEN jsonb_array_length(items) END) STORED,
  items_done       integer     NOT NULL DEFAULT 0,
  items_failed     integer     NOT NULL DEFAULT 0,
  cursor           jsonb,
  result           jsonb,
  errors           jsonb       NOT NULL DEFAULT '[]',
  created_at       timestamptz NOT NULL DEFAULT now(),
  finished_at      timestamptz,

  CONSTRAINT batches_queue_is_named       CHECK (octet_length(queue) BETWEEN 1 AND 128),
  CONSTRAINT batches_kind_is_named        CHECK (octet_length(kind) BETWEEN 1 AND 200),
  CONSTRAINT batches_payload_fits         CHECK (pg_column_size(payload) <= 4194304),
  CONSTRAINT batches_items_is_array       CHECK ((items IS NULL) = (items_total IS NULL)),
  CONSTRAINT batches_items_fit            CHECK (items_total <= 1000000 AND pg_column_size(items) <= 67108864),
  CONSTRAINT batches_run_at_is_finite     CHECK (isfinite(run_at)),
  CONSTRAINT batches_unique_key_fits      CHECK (octet_length(unique_key) BETWEEN 1 AND 1000),
  CONSTRAINT batches_max_attempts_is_positive        CHECK (max_attempts >= 1),
  CONSTRAINT batches_max_failed_items_is_not_negative CHECK (max_failed_items >= 0),
  CONSTRAINT batches_timeout_is_positive  CHECK (timeout_seconds >= 1),
  CONSTRAINT batches_attempts_are_left    CHECK (max_attempts < 1 OR (attempt BETWEEN 0 AND max_attempts
                                                 AND (status <> 'pending' OR attempt < max_attempts))),
  CONSTRAINT batches_counters_fit_items   CHECK (items_done >= 0 AND items_failed >= 0
                                                 AND items_done + items_failed <= coalesce(items_total, 0)),
  CONSTRAINT batches_errors_is_array      CHECK (jsonb_typeof(errors) = 'array'),
  CONSTRAINT batches_claim_is_whole       CHECK (CASE WHEN status = 'processing'
                                                   THEN num_nulls(claimed_by, claim_token, claimed_at, lease_expires_at) = 0
                                                   ELSE claim_token IS NULL AND lease_expires_at IS NULL END),
  CONSTRAINT batches_finish_is_whole      CHECK ((status IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
) PARTITION BY LIST (status);

-- What workers touch. Room on each page, and an eager vacuum: every batch leaves two dead rows here.
CREATE TABLE batchq.batches_live PARTITION OF batchq.batches
  FOR VALUES IN ('pending', 'processing')
  WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- The past, in a partition for each day (UTC): retention is DROP TABLE. See batchq.create_finished_partitions.
CREATE TABLE batchq.batches_finished PARTITION OF batchq.batches
  FOR VALUES IN ('completed', 'failed', 'cancelled')
  PARTITION BY RANGE (finished_at);

CREATE TABLE batchq.finished_default PARTITION OF batchq.batches_finished DEFAULT;

-- Where a row with any other status would go: it exists to refuse it by name.
CREATE TABLE batchq.batches_refused PARTITION OF batchq.batches DEFAULT;
ALTER TABLE batchq.batches_refused ADD CONSTRAINT batches_status_is_known CHECK (false);

-- The id comes first so that a person's WHERE id = 7 is one probe on every version (without skip scans, before
-- PostgreSQL 18, an index on (queue, id) is read whole); the queue is in it for a table distributed by queue.
CREATE UNIQUE INDEX batches_live_id ON batchq.batches_live (id, queue);
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

COMMENT ON TABLE batchq.batches IS
  'The queue. A row is a batch: one unit of claiming. To enqueue: INSERT INTO batchq.batches (kind, payload) VALUES (...). '
  'To change a batch, use batchq.cancel(id) and batchq.retry(id): workers own the other columns.';
COMMENT ON TABLE batchq.batches_live IS 'Batches that are pending or processing.';
COMMENT ON TABLE batchq.batches_finished IS 'Batches that are completed, failed or cancelled; a partition for each day, UTC.';
COMMENT ON TABLE batchq.finished_default IS 'Finished batches of days that had no partition. Normally empty.';
COMMENT ON TABLE batchq.batches_refused IS 'Always empty: refuses a status that does not exist.';
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
COMMENT ON COLUMN batchq.batches.items_total IS 'The length of items; null without items.';
COMMENT ON COLUMN batchq.batches.items_done IS 'Items that succeeded. Items are first worked in order: the next is number items_done + items_failed, from 0.';
COMMENT ON COLUMN batchq.batches.items_failed IS 'Items that failed and have not succeeded since: the rows of batchq.failed_items.';
COMMENT ON COLUMN batchq.batches.cursor IS 'The checkpoint of a handler that keeps its own: any JSON value, handed back at the next attempt.';
COMMENT ON COLUMN batchq.batches.result IS 'What the handler returned.';
COMMENT ON COLUMN batchq.batches.errors IS
  'One object for each attempt that failed: attempt, at, error, traceback. The newest 10.';
