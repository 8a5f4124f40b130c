"""How much room batches take."""

from collections.abc import Iterator

from batchq import enqueue_many
from tests.instruments.bench import filling
from tests.instruments.bench.draining import drain_all
from tests.instruments.bench.records import one_row
from tests.instruments.bench.server import Database
from tests.instruments.bench.work import Bench, Run, work

SIZE = """
SELECT sum(pg_relation_size(relid)), sum(pg_total_relation_size(relid)) FROM pg_partition_tree('{}') WHERE isleaf
"""
PARTS = {"waiting": "batchq.batches_live", "finished": "batchq.batches_finished"}


@work
def storage(bench: Bench) -> Iterator[Run]:
    """Bytes per batch on disk: while it waits, and after it has finished; the table, and with its indexes.

    Batches of about 100 bytes, and others with 1,000 bytes more, which Postgres does not compress. They are enqueued
    into an empty database, measured, drained by one process, and measured again. The room of the waiting batches is
    used again; that of the finished ones is returned when their day is dropped.
    """
    count = bench.sizes.number("storage.batches")
    for _ in bench.times("storage"):
        for variant, extra in (("100 bytes", 0), ("1,100 bytes", 1000)):
            yield one_storage(bench, variant, count, extra)


def one_storage(bench: Bench, variant: str, count: int, extra: int) -> Run:
    """Fill a fresh database, drain it, and measure before, between and after."""
    with bench.database() as database:
        empty = {name: sizes(database, table) for name, table in PARTS.items()}
        fill(database, count, extra)
        full = {"waiting": sizes(database, PARTS["waiting"])}
        drained = drain_all(database, count)
        full["finished"] = sizes(database, PARTS["finished"])
    figures = {"wal_bytes_per_batch": drained.figures()["wal_bytes_per_batch"]}
    for name in PARTS:
        table, total = (round((after - before) / count) for after, before in zip(full[name], empty[name], strict=True))
        figures |= {f"{name}_table_bytes": table, f"{name}_total_bytes": total}
    return Run("storage", variant, figures, drained.problems)


def fill(database: Database, count: int, extra: int) -> None:
    """Enqueue batches, each with *extra* bytes more."""
    if extra:
        rows = (filling.payload(number) | {"extra": "x" * extra} for number in range(count))
        enqueue_many(database.conn, "noop", rows)
    else:
        enqueue_many(database.conn, "noop", map(filling.payload, range(count)))
    database.settle()


def sizes(database: Database, table: str) -> tuple[int, int]:
    """Return the bytes of a partition and those below it: of the tables, and with their indexes and large values."""
    table_bytes, total_bytes = one_row(database.conn, SIZE.format(table))
    return int(table_bytes), int(total_bytes)
