"""Tries flows on a private server: ``python -m tests.instruments.flows fan-in rounds chains graph``."""

import argparse
import sys
import tempfile
from pathlib import Path

from batchq.postgres import embedded
from batchq.postgres.migrate import migrate
from tests.instruments.flows import works
from tests.instruments.flows.works import Place

WORKS = ("fan-in", "rounds", "chains", "graph")


def main() -> int:
    """Run what is asked for, print what was seen; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.instruments.flows", description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: all)")
    parser.add_argument("--scale", type=float, default=0.1, help="1: 100,000 batches, 10,000 rounds, 10,000 chains")
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="batchq-flows-") as directory:
        Path(directory).chmod(0o755)
        with embedded.start(Path(directory) / "data", {"max_connections": "300"}) as server:
            dsn = server.dsn()
            migrate(dsn)
            for name in options.works or WORKS:
                seen = run(name, Place(dsn, dsn), options.scale)
                faults += len(seen.faults)
                print(
                    f"{'FAULT' if seen.faults else 'ok'}: {name}: {seen.figures} {'; '.join(seen.faults)}", flush=True
                )
    return 1 if faults else 0


def run(name: str, place: Place, scale: float) -> works.Seen:
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
