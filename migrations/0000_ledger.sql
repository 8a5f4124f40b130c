-- Applied first on a database without batchq, and not recorded itself: where the other files are recorded.

-- An administrator may have made the schema already, for a role that must not make schemas.
DO $$
BEGIN
  IF to_regnamespace('batchq') IS NULL THEN
    CREATE SCHEMA batchq;
    COMMENT ON SCHEMA batchq IS
      'batchq, a job queue. Insert rows into batchq.batches; look at batchq.status and batchq.queues.';
  END IF;
END
$$;

CREATE TABLE batchq.migrations (
  version    integer     PRIMARY KEY,
  name       text        NOT NULL,
  breaking   boolean     NOT NULL DEFAULT false,
  applied_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE batchq.migrations IS
  'One row for each applied file of migrations/, written by "batchq migrate".';
COMMENT ON COLUMN batchq.migrations.breaking IS
  'True: workers that do not know this version refuse to start. False: older workers go on beside it.';
