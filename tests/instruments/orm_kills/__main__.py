"""Kills workers whose handlers complete batches in transactions of SQLAlchemy: ``python -m tests.instruments.orm_kills
--kills 1000``."""

import argparse
import sys

from tests.instruments.orm_kills import works
from tests.support.trials import private_place


def main() -> int:
    """Run it on a private server, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.orm_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="worker processes to kill (default: 1000)")
    parser.add_argument("--workers", type=int, default=3, help="worker processes at a time (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random points (default: 1)")
    options = parser.parse_args()
    with private_place(works.APP) as place:
        seen = works.kills(place, options.kills, workers=options.workers, seed=options.seed)
    return 1 if seen.tell("orm kills") else 0


if __name__ == "__main__":
    sys.exit(main())
