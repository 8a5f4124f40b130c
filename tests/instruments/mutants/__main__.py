"""``python -m tests.instruments.mutants``, which `bin/mutants` runs."""

import sys

from tests.instruments.mutants.cli import main

sys.exit(main())
