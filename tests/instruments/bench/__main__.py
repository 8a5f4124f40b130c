"""``python -m tests.instruments.bench``: the benchmark."""

import sys

from tests.instruments.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
