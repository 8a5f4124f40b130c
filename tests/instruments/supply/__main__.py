"""The supply chain, by commands: ``bin/supply lock``, ``audit``, ``licenses``, ``sbom``; see docs/supply-chain.md."""

import argparse
import sys
from pathlib import Path

from tests.instruments.supply import audit, licenses, locks, sbom


def main() -> int:
    """Run one command; return its exit code."""
    parser = argparse.ArgumentParser(prog="bin/supply", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    lock = commands.add_parser("lock", help="write requirements/*.lock anew, so that they fit pyproject.toml")
    lock.add_argument("--upgrade", action="store_true", help="take the newest versions (default: keep those that fit)")
    look = commands.add_parser("audit", help="look for known vulnerabilities in the locked versions")
    look.epilog = "Exit code: 0 none is known, 1 some are, 3 no advisory service answers for all versions."
    look.add_argument("--osv-url", metavar="URL", help="service with the interface of OSV (default: public services)")
    commands.add_parser("licenses", help="list the licenses of all dependencies, and refuse those that are not allowed")
    bill = commands.add_parser("sbom", help="write what the container contains, as CycloneDX JSON")
    bill.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: standard output)")
    options = parser.parse_args()
    match options.command:
        case "lock":
            return locks.main(upgrade=options.upgrade)
        case "audit":
            return audit.main(options.osv_url)
        case "licenses":
            return licenses.main()
        case _:
            return sbom.main(options.out)


if __name__ == "__main__":
    sys.exit(main())
