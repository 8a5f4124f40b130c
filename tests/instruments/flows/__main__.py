"""Tries flows on a private server: ``python -m tests.instruments.flows fan-in rounds chains graph``."""

import argparse
import sys

from tests.instruments.flows import works
from tests.support.trials import Place, Seen, private_place

WORKS = ("fan-in", "rounds", "chains", "graph")


def main() -> int:
    """Run what is asked for, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.flows", description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: all)")
    parser.add_argument("--scale", type=float, default=0.1, help="1: 100,000 batches, 10,000 rounds, 10,000 chains")
    options = parser.parse_args()
    faults = 0
    with private_place(works.APP) as place:
        for name in options.works or WORKS:
            faults += run(name, place, options.scale).tell(name)
    return 1 if faults else 0


def run(name: str, place: Place, scale: float) -> Seen:
    """Run one of the works."""
    match name:
        case "fan-in":
            return works.fan_in(place, batches=int(100_000 * scale))
        case "rounds":
            return works.rounds(place, fan_ins=50, times=max(1, int(200 * scale)))
        case "chains":
            return works.chains(place, count=int(10_000 * scale), length=10)
        case "graph":
            return works.graph(place, batches=int(10_000 * scale))
    sys.exit(f"there is no work {name!r}; there are {', '.join(WORKS)}")


if __name__ == "__main__":
    sys.exit(main())
