-- Most sums of batchq.throughput have one term: an hour of fifteen kinds takes half the time.

CREATE OR REPLACE FUNCTION batchq.add_counts(counts integer[], more integer[])
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
AS $$
BEGIN
  IF cardinality(counts) = 0 THEN
    RETURN more;
  ELSIF cardinality(more) = 0 THEN
    RETURN counts;
  END IF;
  RETURN (SELECT array_agg(coalesce(u.a, 0) + coalesce(u.b, 0) ORDER BY u.n)
          FROM unnest(counts, more) WITH ORDINALITY AS u(a, b, n));
END
$$;
