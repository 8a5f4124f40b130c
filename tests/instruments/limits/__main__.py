"""Tries limits, keys and shards on a private server: ``python -m tests.instruments.limits running ordered shards``."""

import argparse
import sys

from tests.instruments.limits import works
from tests.support.trials import Place, Seen, private_place

WORKS = ("running", "items", "ordered", "shards", "shard_rates", "keys", "throttled")


def main() -> int:
    """Run what is asked for, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.limits", description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=1, help="of running and items (default: 1)")
    parser.add_argument(
        "--scale", type=float, default=0.1, help="of ordered and keys; 1: 100,000 batches, 100,000 keys"
    )
    options = parser.parse_args()
    faults = 0
    with private_place(works.APP) as place:
        for name in options.works or WORKS:
            faults += run(name, place, options.minutes, options.scale).tell(name)
    return 1 if faults else 0


def run(name: str, place: Place, minutes: float, scale: float) -> Seen:
    """Run one of the works."""
    match name:
        case "running":
            return works.running(place, seconds=60 * minutes, fault_every_seconds=25)
        case "items":
            return works.items(place, seconds=60 * minutes)
        case "ordered":
            return works.ordered(place, batches=int(100_000 * scale), workers=8, kill_every_seconds=8)
        case "shards":
            batches = int(20_000 * scale)
            return works.shards(place, batches=batches, workers=4, kill_every_seconds=6, splits=(2, 4, 5, 8, 9, 12))
        case "shard_rates":
            return works.shard_rates(place, batches=int(500_000 * scale), rounds=4)
        case "keys":
            return works.keys(place, small_keys=int(100_000 * scale), hot_batches=int(1_000_000 * scale))
        case "throttled":
            return works.throttled(place)
    sys.exit(f"there is no work {name!r}; there are {', '.join(WORKS)}")


if __name__ == "__main__":
    sys.exit(main())
