"""Migrations that stand in for those to come: each changes something that workers use while they work.

`known(directory, version)` writes the files up to a version, the project's own first.
"""

from pathlib import Path

from tests.support.databases import MIGRATIONS

BASE = 9  # the last file of the schema that people begin with
TO_COME = {
    "9001_more": """
        ALTER TABLE batchq.batches ADD COLUMN more text;
        ALTER TABLE batchq.workers ADD COLUMN more integer NOT NULL DEFAULT 0;
        COMMENT ON COLUMN batchq.batches.more IS 'More.';
    """,
    "9002_checked": """
        ALTER TABLE batchq.batches ADD CONSTRAINT more_fits CHECK (octet_length(more) < 100) NOT VALID;
        CREATE INDEX batches_live_more ON batchq.batches_live (more) WHERE more IS NOT NULL;
    """,
    "9003_told": """
        CREATE FUNCTION batchq.tell() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          NEW.more := 'told';
          RETURN NEW;
        END
        $$;
        CREATE TRIGGER tell BEFORE INSERT ON batchq.batches_live FOR EACH ROW EXECUTE FUNCTION batchq.tell();
        CREATE OR REPLACE VIEW batchq.failures AS
        SELECT kind, error, failures, latest_at, first_at, example_id, example, queues
        FROM (SELECT kind, left(error, 300) AS error, count(*) AS failures, max(finished_at) AS latest_at,
                min(finished_at) AS first_at, max(id) AS example_id, max(error) AS example,
                array_agg(DISTINCT queue) AS queues
              FROM batchq.latest_failures() GROUP BY 1, 2) latest;
    """,
    "9004_forgotten": """
        DROP TRIGGER tell ON batchq.batches_live;
        DROP INDEX batchq.batches_live_more;
    """,
}
LATEST = max(int(name[:4]) for name in TO_COME)


def known(directory: Path, version: int) -> Path:
    """Write all migrations up to *version* into a directory, which is made; return it."""
    directory.mkdir()
    texts = {file.stem: file.read_text(encoding="utf-8") for file in MIGRATIONS.glob("*.sql")} | TO_COME
    for name, text in texts.items():
        if int(name[:4]) <= version:
            (directory / f"{name}.sql").write_text(text, encoding="utf-8")
    return directory
