"""Type checkers accept right calls of enqueue on every connection, and refuse wrong options and wrong connections."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.alone import run_alone
from tests.support.markdown import ROOT
from tests.support.steps import step

CALLS = Path(__file__).with_name("enqueue_calls")
FILES = [str(CALLS / name) for name in ("right.py", "wrong.py")]


def mypy(directory: Path) -> dict[str, set[int]]:
    """Return the lines of each file in which mypy --strict finds an error."""
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--ignore-missing-imports", "--no-color-output"]
    printed = run([sys.executable, "-m", "mypy", *options, f"--cache-dir={directory}", *FILES])
    found: dict[str, set[int]] = {}
    for line in printed.splitlines():
        name, _, rest = line.partition(":")
        number, _, message = rest.partition(":")
        if message.startswith(" error"):
            found.setdefault(Path(name).name, set()).add(int(number))
    return found


def pyright(directory: Path) -> dict[str, set[int]]:
    """Return the lines of each file in which pyright finds an error."""
    settings = directory / "pyrightconfig.json"
    given = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "extraPaths": [str(ROOT)], "include": FILES}
    settings.write_text(json.dumps(given))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p"]
    found: dict[str, set[int]] = {}
    for error in json.loads(run([*command, str(settings)]))["generalDiagnostics"]:
        if error["severity"] == "error":
            found.setdefault(Path(error["file"]).name, set()).add(error["range"]["start"]["line"] + 1)
    return found


def run(command: list[str]) -> str:
    """Run a type checker; return what it printed. It must exit 1, as it does after errors in what it has read."""
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    step("%s", done.stdout[-2000:])
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_type_checker_finds_every_wrong_call_and_nothing_else(checker, tmp_path: Path) -> None:
    lines = (CALLS / "wrong.py").read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# bad")}
    assert len(wrong) > 30
    assert checker(tmp_path) == {"wrong.py": wrong}


if __name__ == "__main__":
    run_alone(__file__)
