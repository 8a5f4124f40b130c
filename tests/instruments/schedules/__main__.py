"""Tries schedules on a private server: ``python -m tests.instruments.schedules killed punctual --minutes 10``."""

import argparse
import sys

from tests.instruments.schedules import works
from tests.support.trials import private_place

WORKS = ("killed", "punctual")


def main() -> int:
    """Run what is asked for, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.schedules", description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: both)")
    parser.add_argument("--minutes", type=float, default=1, help="of each (default: 1)")
    parser.add_argument("--schedules", type=int, default=1000, help="for killed (default: 1000)")
    options = parser.parse_args()
    faults, seconds = 0, 60 * options.minutes
    for name in options.works or WORKS:
        with private_place(works.APP) as place:
            if name == "killed":
                seen = works.killed(place, seconds=seconds, schedules=options.schedules)
            else:
                seen = works.punctual(place, seconds=seconds)
        faults += seen.tell(name)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
