"""``python -m tests.instruments.soak``: the soak."""

import sys

from tests.instruments.soak.cli import main

if __name__ == "__main__":
    sys.exit(main())
