"""Tries spread on a private server: ``python -m tests.instruments.spread rate kills retry cancel``."""

import argparse
import sys

from tests.instruments.spread import works
from tests.support.trials import Place, Seen, private_place

WORKS = ("rate", "kills", "retry", "cancel")


def main() -> int:
    """Run what is asked for, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.spread", description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: all)")
    parser.add_argument("--scale", type=float, default=0.1, help="1: lists of 1,000,000 items")
    options = parser.parse_args()
    faults = 0
    with private_place(works.APP) as place:
        for name in options.works or WORKS:
            faults += run(name, place, int(1_000_000 * options.scale)).tell(name)
    return 1 if faults else 0


def run(name: str, place: Place, items: int) -> Seen:
    """Run one of the works."""
    match name:
        case "rate":
            return works.rate(place, items=items)
        case "kills":
            return works.kills(place, items=items)
        case "retry":
            return works.retry(place, items=items)
        case "cancel":
            return works.cancel(place, items=items)
    sys.exit(f"there is no work {name!r}; there are {', '.join(WORKS)}")


if __name__ == "__main__":
    sys.exit(main())
