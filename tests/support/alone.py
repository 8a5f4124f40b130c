"""Run one test file with `python tests/LAYER/test_x.py`."""

from typing import NoReturn

import pytest


def run_alone(file: str) -> NoReturn:
    """Run the tests of *file* with their steps shown, and exit with pytest's exit code."""
    raise SystemExit(pytest.main([file, "-o", "log_cli=true"]))
