-- The demo's own table. It has no unique key, so that a file recorded twice would show.

DROP SCHEMA IF EXISTS batchq_demo CASCADE;
CREATE SCHEMA batchq_demo;

CREATE TABLE batchq_demo.files (
  path        text        NOT NULL,
  bytes       integer     NOT NULL,
  lines       integer     NOT NULL,
  functions   integer     NOT NULL,
  classes     integer     NOT NULL,
  sha256      text        NOT NULL,
  worker_pid  integer     NOT NULL,
  recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
