"""``python -m tests.instruments.chaos``."""

import sys

from tests.instruments.chaos.cli import main

sys.exit(main())
