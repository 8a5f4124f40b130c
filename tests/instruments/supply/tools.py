"""The tools of bin/supply: in a virtual environment of their own, .venv-supply, filled from requirements/tools.lock."""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENVIRONMENT = ROOT / ".venv-supply"
LOCK = ROOT / "requirements" / "tools.lock"


def program(name: str) -> Path:
    """Return the path of a tool. The first call on a machine installs all of them."""
    stamp, wanted = ENVIRONMENT / ".stamp", hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing the tools of {LOCK.name} into {ENVIRONMENT.name}", file=sys.stderr, flush=True)
        make_environment(ENVIRONMENT, LOCK)
        stamp.write_text(wanted)
    return ENVIRONMENT / "bin" / name


def make_environment(directory: Path, lock: Path) -> None:
    """Make a virtual environment with exactly what a lock says."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-compile", "--no-deps", "--require-hashes", "--requirement", lock], check=True)
