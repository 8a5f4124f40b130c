-- The index by id serves lookups by id and nothing else. With the queue as its second column the planner could take it
-- for statements that name the queue: where the statistics are those of an empty table and dead entries are many, it
-- did, and read all of them (87,600 buffers where the index of the claim needs 9).
-- At once what DROP INDEX needs: who reads the table and then writes it would deadlock with a lock that is made stronger.
LOCK TABLE batchq.batches_live IN ACCESS EXCLUSIVE MODE;
CREATE UNIQUE INDEX batches_live_only_id ON batchq.batches_live (id) WITH (fillfactor = 48);
DROP INDEX batchq.batches_live_id;
ALTER INDEX batchq.batches_live_only_id RENAME TO batches_live_id;
