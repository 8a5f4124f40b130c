-- Logical replication copies rows and not sequences, so on a copy the ids begin again at 1. An INSERT was accepted, and
-- its batch failed later, on the failed items of the batch that had its id before.

-- STABLE: with the caller's snapshot, every id that is seen had been given when the sequence is read.
CREATE FUNCTION batchq.ids_given_twice(since timestamptz DEFAULT '-infinity')
RETURNS TABLE (relation text, last_given bigint, newest bigint)
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET jit = off
AS $$
DECLARE
  sequence regclass;
BEGIN
  FOREACH relation IN ARRAY '{batches,audit}'::text[] LOOP
    sequence := pg_get_serial_sequence('batchq.' || relation, 'id');
    CONTINUE WHEN NOT (has_sequence_privilege(sequence, 'USAGE, SELECT') AND has_table_privilege('batchq.' || relation, 'SELECT'));
    last_given := coalesce(pg_sequence_last_value(sequence), 0);
    IF relation = 'audit' THEN
      newest := (SELECT max(a.id) FROM batchq.audit a WHERE a.id > last_given);
    ELSE
      -- By EXECUTE, whose plan leaves out the partitions before "since", and so does not lock them.
      EXECUTE 'SELECT max(f.id) FROM batchq.batches_finished f WHERE f.id > $1 AND f.finished_at >= $2'
        INTO newest USING last_given, since;
      newest := greatest(newest,
        (SELECT max(b.id) FROM batchq.batches_live b WHERE b.id > last_given),
        (SELECT max(i.batch_id) FROM batchq.failed_items i WHERE i.batch_id > last_given));
    END IF;
    IF newest IS NOT NULL THEN
      RETURN NEXT;
    END IF;
  END LOOP;
END
$$;

COMMENT ON FUNCTION batchq.ids_given_twice(timestamptz) IS
  'Returns a row for batches or audit if it has rows with larger ids than the last one given ("last_given"; 0: none yet), '
  'up to "newest". New rows would get ids that are in use. Looks at what finished after "since" only. To fix it: '
  'set the sequence of the id to it by setval; batchq doctor prints the statement.';
