"""``python -m tests.mutants``, which `bin/mutants` runs."""

import sys

from tests.mutants.cli import main

sys.exit(main())
