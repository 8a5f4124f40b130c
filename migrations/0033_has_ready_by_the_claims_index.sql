-- Inside EXISTS, Postgres drops ORDER BY and LIMIT; a bitmap scan, which reads every entry first, then looks as cheap as
-- any other plan where the statistics are those of an empty table.

CREATE OR REPLACE FUNCTION batchq.has_ready(in_queue text, in_priority smallint, kinds text[], after_run_at float8, after_id bigint)
RETURNS boolean
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
BEGIN
  PERFORM
  FROM batchq.batches_live b
  WHERE b.queue = in_queue
    AND b.status = 'pending'
    AND b.priority = in_priority
    AND (b.run_at, b.id) > (to_timestamp(after_run_at), after_id)
    AND b.run_at <= now()
    AND b.kind = ANY (kinds)
  ORDER BY b.run_at, b.id
  LIMIT 1;
  RETURN FOUND;
END
$$;
