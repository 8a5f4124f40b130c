-- Applied first to a database without batchq. It is not recorded itself: it makes the table that records the other files.

-- An administrator may have made the schema already, for a role that may not make schemas.
DO $$
BEGIN
  IF to_regnamespace('batchq') IS NULL THEN
    CREATE SCHEMA batchq;
    COMMENT ON SCHEMA batchq IS 'batchq, a job queue. Insert rows into batchq.batches; see batchq.status and batchq.queues.';
  END IF;
END
$$;

CREATE TABLE batchq.migrations (
  version integer PRIMARY KEY, name text NOT NULL, breaking boolean NOT NULL DEFAULT false,
  applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE batchq.migrations IS 'One row per applied file of migrations/, written by "batchq migrate".';
COMMENT ON COLUMN batchq.migrations.breaking IS 'Whether workers that do not know this version refuse to start, or keep running.';
