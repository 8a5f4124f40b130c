"""How large each work is: in full, and with --short, which proves that the checks hold and measures nothing."""

import argparse

Size = int | float | tuple[int, ...]

SIZES: dict[str, tuple[Size, Size]] = {
    "enqueue.batches": (100_000, 3_000),
    "enqueue.single": (5_000, 200),
    "drain.batches": (100_000, 2_000),
    "ceiling.batches": (100_000, 4_000),
    "pickup.inserts": (200, 20),
    "pickup.pause_ms": (50, 20),
    "pickup.workers": ((1, 10, 100), (1, 3)),
    "pickup.idle_seconds": (10.0, 1.0),
    "pickup.settle_seconds": (11.0, 0.5),
    "backlog.sizes": ((10_000, 100_000, 1_000_000, 10_000_000), (500, 5_000, 20_000)),
    "backlog.batches": (100_000, 5_000),
    "backlog.seconds": (10.0, 1.0),
    "history.rows": ((0, 10_000_000), (0, 20_000)),
    "history.batches": (100_000, 1_000),
    "snapshot.free_seconds": (15.0, 2.0),
    "snapshot.held_seconds": (60.0, 3.0),
    "snapshot.window_seconds": (10.0, 1.0),
    "snapshot.backlog": (4_000, 1_000),
    "snapshot.at_once": (0, 1),
    "steady.full_seconds": (20.0, 2.0),
    "steady.free_seconds": (20.0, 1.0),
    "steady.held_seconds": (600.0, 3.0),
    "steady.window_seconds": (60.0, 1.0),
    "steady.share": (0.8, 0.5),
    "burst.seconds": (60.0, 1.0),
    "burst.per_s": (5_000, 1_000),
    "burst.calm_seconds": (120.0, 2.0),
    "burst.calm_per_s": (800, 200),
    "burst.span_seconds": (5.0, 0.5),
    "bulk.batches": (1_000_000, 3_000),
    "bulk.free_seconds": (15.0, 1.0),
    "bulk.backlog": (4_000, 1_000),
    "network.batches": (100_000, 1_000),
    "network.round_trips_ms": ((0, 1, 5, 20), (0, 20)),
    "pooler.batches": (100_000, 1_000),
    "items.items": (1_000_000, 20_000),
    "seal.batches": (100_000, 2_000),
    "seal.values": (20_000, 200),
    "handlers.seconds": (10.0, 1.0),
    "memory.batches": (1_000_000, 3_000),
    "storage.batches": (100_000, 1_000),
    "idle.workers": (100, 3),
    "idle.minutes": (10.0, 0.03),
}
RUNS = {"enqueue": 3, "drain": 3, "seal": 3, "ceiling": 3, "history": 3, "network": 3, "pooler": 3, "items": 3}


class Sizes:
    """The sizes of this time: full or short, and what was set by hand."""

    def __init__(self, is_short: bool, given: dict[str, Size]) -> None:
        self.values = {name: pair[is_short] for name, pair in SIZES.items()} | given

    def number(self, name: str) -> int:
        """Return a size that is a whole number."""
        value = self.values[name]
        assert isinstance(value, int)
        return value

    def seconds(self, name: str) -> float:
        """Return a size that is a length of time."""
        value = self.values[name]
        assert not isinstance(value, tuple)
        return float(value)

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return a size that is several numbers."""
        value = self.values[name]
        assert isinstance(value, tuple)
        return value


def given_size(text: str) -> tuple[str, Size]:
    """Read NAME=VALUE, as in ``backlog.sizes=10_000,1_000_000``."""
    name, _, value = text.partition("=")
    if name not in SIZES:
        raise argparse.ArgumentTypeError(f"{name!r} is no size; bin/bench --list shows them")
    kind = type(SIZES[name][0])
    if kind is tuple:
        return name, tuple(int(part) for part in value.split(","))
    return name, kind(value)
