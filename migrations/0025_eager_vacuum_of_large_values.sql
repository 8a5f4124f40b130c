-- What is too large for its row (payloads and items over some 2 kB) lies in a TOAST table of its own, which the settings of
-- batches_live do not reach: a batch that moves to the finished leaves its chunks dead there, and the default vacuum waits
-- for a fifth of the table and pauses after each few pages. Clean it as eagerly as the rows.
ALTER TABLE batchq.batches_live
  SET (toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_cost_delay = 0);
