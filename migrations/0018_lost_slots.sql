-- How many of its slots a worker has lost to handlers that do not end.

ALTER TABLE batchq.workers ADD COLUMN lost_slots integer NOT NULL DEFAULT 0;

COMMENT ON COLUMN batchq.workers.lost_slots IS
  'Slots whose handlers were told to end (they ran into their time limit, or their batch was cancelled) and did not. When '
  'half of them are lost, the process is replaced.';
