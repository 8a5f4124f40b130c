"""The bill of materials of the container: CycloneDX JSON, made from an environment that its lock fills."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from batchq.common.version import __version__
from tests.instruments.supply import locks, tools

SPECIFICATION = "1.6"


def main(out: Path | None) -> int:
    """Write the bill to *out*, or to standard output; return the exit code."""
    bill = make()
    if out is None:
        sys.stdout.write(bill)
    else:
        out.write_text(bill, encoding="utf-8")
        print(f"wrote {out}")
    return 0


def make() -> str:
    """Return the bill: each package of the container with version, license and dependencies, valid by its schema."""
    with tempfile.TemporaryDirectory(prefix="batchq-sbom-") as directory:
        environment, file = Path(directory, "venv"), Path(directory, "sbom.json")
        tools.make_environment(environment, locks.FOLDER / "container.lock")
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "pip", "setuptools"], check=True)
        command = [tools.program("cyclonedx-py"), "environment", python, "--pyproject", locks.ROOT / "pyproject.toml"]
        command += ["--mc-type", "application", "--spec-version", SPECIFICATION, "--validate"]
        subprocess.run([*command, "--output-format", "JSON", "--output-file", file], check=True, capture_output=True)
        bill = json.loads(file.read_text(encoding="utf-8"))
    bill["metadata"]["component"]["version"] = __version__  # pyproject.toml leaves it to the build
    return json.dumps(bill, indent=2) + "\n"
