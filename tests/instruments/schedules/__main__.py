"""Tries schedules on a private server: ``python -m tests.instruments.schedules killed punctual --minutes 10``."""

import argparse
import sys
import tempfile
from pathlib import Path

from batchq.postgres import embedded
from batchq.postgres.migrate import migrate
from tests.instruments.schedules import works
from tests.instruments.schedules.works import Place

WORKS = ("killed", "punctual")


def main() -> int:
    """Run what is asked for, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.schedules", description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: both)")
    parser.add_argument("--minutes", type=float, default=1, help="of each (default: 1)")
    parser.add_argument("--schedules", type=int, default=1000, help="for killed (default: 1000)")
    options = parser.parse_args()
    faults = 0
    for name in options.works or WORKS:
        with tempfile.TemporaryDirectory(prefix="batchq-schedules-") as directory:
            Path(directory).chmod(0o755)
            with embedded.start(Path(directory) / "data", {"max_connections": "300"}) as server:
                migrate(server.dsn())
                place, seconds = Place(server.dsn()), 60 * options.minutes
                if name == "killed":
                    seen = works.killed(place, seconds=seconds, schedules=options.schedules)
                else:
                    seen = works.punctual(place, seconds=seconds)
        faults += len(seen.faults)
        print(f"{'FAULT' if seen.faults else 'ok'}: {name}: {seen.figures} {'; '.join(seen.faults[:20])}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
