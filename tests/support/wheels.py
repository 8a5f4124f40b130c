"""The wheel of this checkout, and new environments that have only it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.steps import step

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "pgbatchq"
MOST_SECONDS = 600
OURS = ("BATCHQ_", "PG", "PYTHON", "VIRTUAL_ENV")
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def environment(programs: Path | None = None, dsn: str | None = None) -> dict[str, str]:
    """Return an environment in which nothing leads to this checkout, with *programs* first on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    here = str(Path(sys.executable).parent)
    places = [place for place in kept["PATH"].split(os.pathsep) if place != here]
    path = os.pathsep.join([str(programs), *places] if programs else places)
    return kept | {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | ({"BATCHQ_DSN": dsn} if dsn else {})


def run(*command: object, cwd: Path, dsn: str | None = None, code: int = 0) -> str:
    """Run a command, that ends with *code*, where nothing leads to this checkout; return all that it wrote."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(dsn=dsn),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    assert ended.returncode == code, ended.stdout
    return ended.stdout


def build_wheel(directory: Path) -> Path:
    """Build the wheel in *directory*; return its path."""
    step("build the wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", directory, ROOT, cwd=directory)
    [wheel] = directory.glob("*.whl")
    return wheel


def new_environment(directory: Path, python: str = sys.executable) -> Path:
    """Make a virtual environment in *directory* that has pip and nothing else; return the folder of its programs."""
    run(python, "-m", "venv", directory, cwd=directory.parent)
    return directory / "bin"


def install(programs: Path, wheel: Path, *extras: str) -> None:
    """Install the wheel, with extras, in an environment."""
    step("install %s[%s]", wheel.name, ",".join(extras))
    run(programs / "pip", "install", "--quiet", f"{wheel}[{','.join(extras)}]", cwd=programs.parent)


def pythons() -> dict[str, str]:
    """Return the Pythons that batchq supports and this machine has, by version: on the path, or pyenv's."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {version: _find(version) for version in VERSIONS} | {own: sys.executable}
    return {version: path for version, path in found.items() if path}


def _find(version: str) -> str | None:
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, versions.glob(f"{version}.*/bin/python"))]
    return next((path for path in candidates if path and _starts(path)), None)


def _starts(python: str) -> bool:
    return subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0
