"""What sealed payloads cost: in the program that enqueues, in the worker, and in the database."""

import time
from collections.abc import Iterator

from batchq import enqueue_many
from batchq.common import sealed
from batchq.testing import encryption_keys
from tests.instruments.bench import filling
from tests.instruments.bench.draining import drain_all
from tests.instruments.bench.records import one_row
from tests.instruments.bench.work import Bench, Figures, Run, work

_TIMED_BYTES = (100, 1_000, 10_000)


@work
def seal(bench: Bench) -> Iterator[Run]:
    """No-op batches of about 100 bytes in the clear and sealed: enqueued by enqueue_many, and drained by one process.

    *bytes*: of a payload as stored. Then the time to seal and to open a payload, of 100 bytes to 10 kB, in a loop.
    """
    count = bench.sizes.number("seal.batches")
    for _ in bench.times("seal"):
        for variant, keys in (("in the clear", None), ("sealed", sealed.new_key("bench"))):
            yield one_drain(bench, count, variant, keys)
    for size in _TIMED_BYTES:
        yield Run("seal", f"a payload of {size:,} bytes", timed(size, bench.sizes.number("seal.values")))


def one_drain(bench: Bench, count: int, variant: str, keys: str | None) -> Run:
    """Enqueue and drain batches in a fresh database."""
    with bench.database() as database, encryption_keys(keys):
        began_at = time.monotonic()
        enqueue_many(database.conn, "noop", map(filling.payload, range(count)))
        seconds = time.monotonic() - began_at
        [size] = one_row(database.conn, "SELECT avg(pg_column_size(payload))::float8 FROM batchq.batches")
        database.settle()
        drained = drain_all(database, count, settings={"encryption_keys": keys or ""})
    figures = {"enqueue_us": round(1e6 * seconds / count, 1), "bytes": round(size), **drained.figures()}
    return Run("seal", variant, figures, drained.problems)


def timed(size: int, count: int) -> Figures:
    """Return the microseconds that it takes to seal and to open a value."""
    keys, text = sealed.Keys.read(sealed.new_key("bench")), f'"{"x" * (size - 2)}"'
    began_at = time.perf_counter()
    envelopes = [keys.seal(text, "noop", "payload") for _ in range(count)]
    sealed_at = time.perf_counter()
    with encryption_keys(None):
        sealed.put_keys(keys)
        texts = [sealed.opened_text(envelope, "noop", "payload") for envelope in envelopes]
    opened_at = time.perf_counter()
    assert texts == [text] * count
    return {
        "seal_us": round(1e6 * (sealed_at - began_at) / count, 1),
        "open_us": round(1e6 * (opened_at - sealed_at) / count, 1),
        "bytes": len(envelopes[0]),
    }
