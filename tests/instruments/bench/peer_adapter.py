"""batchq in the form of a harness that runs several job queues at the same work.

The harness starts this file as ``describe``, ``setup``, ``produce`` and ``work``, and brings `common` with it. Only
batchq's public interface is used, with its default settings. With ``PEER_OPTS='{"roles": true}'`` producer
and worker log in as roles that have the grants of their duty and own nothing.
"""

import asyncio
import contextlib
import os

import psycopg
from common import Adapter, main, payload, record  # type: ignore[import-not-found]  # the harness's
from psycopg.conninfo import make_conninfo

import batchq
from batchq.postgres.migrate import migrate


def is_pick_up() -> bool:
    """Tell whether the harness measures the time until a batch begins, for which the bell is."""
    return os.environ.get("PEER_WORK") == "W4"


def grant(dsn: str, duty: str) -> None:
    """Make the role of a duty, if it is missing, and grant it in this database."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        with contextlib.suppress(psycopg.errors.DuplicateObject):
            conn.execute(f"CREATE ROLE batchq_bench_{duty} LOGIN PASSWORD 'for the benchmark'".encode())
        conn.execute("SELECT batchq.grant_duty(%s, %s)", [duty, f"batchq_bench_{duty}"])


class Batchq(Adapter):  # type: ignore[misc]
    """batchq's defaults: `def` handlers in 8 threads, polling."""

    config = "enqueue_many (COPY, 1000 a call), enqueue; batchq.Worker with its default settings, history kept"
    wake = {"default": "the bell, listen_dsn", "poll": "polling, 54 a second for all workers"}  # noqa: RUF012
    remaining_sql = "SELECT count(*) FROM batchq.batches_live"

    async def setup(self, dsn: str, wake: str) -> None:
        """Install the schema, and the bell where it is the bell that is measured."""
        migrate(dsn)
        if wake == "default" and is_pick_up():
            with psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute("SELECT batchq.bell(true)")
        if self.opts.get("roles"):
            for duty in ("producer", "worker"):
                grant(dsn, duty)

    def dsn_for(self, duty: str, dsn: str) -> str:
        """Return how to log in."""
        if not self.opts.get("roles"):
            return dsn
        return make_conninfo(dsn, user=f"batchq_bench_{duty}", password="for the benchmark")

    async def open_producer(self, dsn: str) -> None:
        """Connect."""
        self.conn = psycopg.connect(self.dsn_for("producer", dsn), autocommit=True, prepare_threshold=None)

    async def bulk(self, seqs: range) -> None:
        """Enqueue a batch for each number, in one transaction."""
        batchq.enqueue_many(self.conn, "job", (payload(seq) for seq in seqs))

    async def single(self, seq: int) -> None:
        """Enqueue one batch, in its own transaction."""
        batchq.enqueue(self.conn, "job", payload(seq))

    async def work(self, dsn: str, wake: str, index: int) -> None:  # noqa: ARG002
        """Work until killed."""
        app = batchq.App()

        @app.handler("job")
        def job(batch: batchq.Batch) -> None:
            record(batch.payload["seq"])

        dsn = self.dsn_for("worker", dsn)
        listen_dsn = dsn if wake == "default" and is_pick_up() else None
        own = {name: value for name, value in self.opts.items() if name != "roles"}
        settings = batchq.Settings.load(dsn=dsn, listen_dsn=listen_dsn, log_level="warning", **own)
        await asyncio.to_thread(batchq.Worker(app, settings).run)


if __name__ == "__main__":
    os.environ.pop("BATCHQ_DSN", None)
    main(Batchq())
