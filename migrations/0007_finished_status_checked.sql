-- Reads every finished batch once, without a lock that anybody would wait for.

ALTER TABLE batchq.batches_finished VALIDATE CONSTRAINT batches_finished_status;
