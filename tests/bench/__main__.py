"""``python -m tests.bench``: the benchmark."""

import sys

from tests.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
