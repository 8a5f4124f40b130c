-- Says of the finished partitions, as a constraint, what their place in the table says already: so that 0008 can take
-- them out and put them back without reading them. 0007 checks it, beside running workers.

ALTER TABLE batchq.batches_finished
  ADD CONSTRAINT batches_finished_status CHECK (status IN ('completed', 'failed', 'cancelled')) NOT VALID;
