"""``python -m tests.soak``: the soak."""

import sys

from tests.soak.cli import main

if __name__ == "__main__":
    sys.exit(main())
