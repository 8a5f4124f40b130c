-- Beside the batches: their items that failed, and the workers that live.

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
  heartbeat_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

COMMENT ON TABLE batchq.workers IS
  'The worker processes, for people and to share out idle polling. Nothing is decided by it: batches come back by their lease.';
COMMENT ON COLUMN batchq.workers.id IS 'Host, process id and a random part; batchq.batches.claimed_by.';
COMMENT ON COLUMN batchq.workers.kinds IS 'The kinds that its app has handlers for.';
COMMENT ON COLUMN batchq.workers.concurrency IS 'How many batches it runs at once, in threads and in its event loop together.';
COMMENT ON COLUMN batchq.workers.in_hand IS 'Batches claimed and not finished at the last heartbeat.';
COMMENT ON COLUMN batchq.workers.heartbeat_at IS 'Its last sign of life. A worker silent for a minute counts as gone; its row goes after an hour.';
