"""The types of handlers as two type checkers see them: good.py has no error, bad.py has one on each marked line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.alone import run_alone
from tests.support.steps import step

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "types"
MARK = "# E"

Errors = dict[int, str]


def output_of(*words: str) -> str:
    """Return what a type checker prints: Python's module and its arguments. Its exit code may be 0 or 1."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(file: Path) -> Errors:
    """Return the errors of mypy by line."""
    lines = map(
        json.loads, output_of("mypy", "--strict", "--no-error-summary", "--output=json", str(file)).splitlines()
    )
    return {line["line"]: line["message"] for line in lines if line["severity"] == "error"}


def pyright(file: Path) -> Errors:
    """Return the errors of pyright by line."""
    found = json.loads(output_of("basedpyright", "--pythonpath", sys.executable, "--outputjson", str(file)))
    assert found["summary"]["filesAnalyzed"] == 1
    errors = [one for one in found["generalDiagnostics"] if one["severity"] == "error"]
    return {one["range"]["start"]["line"] + 1: one["message"] for one in errors}


CHECKERS = pytest.mark.parametrize("errors_in", [mypy, pyright])


@CHECKERS
def test_what_is_right_has_no_error(errors_in: Callable[[Path], Errors]) -> None:
    assert errors_in(CASES / "good.py") == {}


@CHECKERS
def test_each_mistake_is_reported_on_its_line(errors_in: Callable[[Path], Errors]) -> None:
    file = CASES / "bad.py"
    lines = file.read_text(encoding="utf-8").splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith(MARK)}
    errors = errors_in(file)
    step("%s mistakes, %s reported", len(marked), len(errors))
    assert len(marked) >= 20
    assert {lines[number - 1]: message for number, message in errors.items() if number not in marked} == {}
    assert [lines[number - 1] for number in sorted(marked - errors.keys())] == []


if __name__ == "__main__":
    run_alone(__file__)
