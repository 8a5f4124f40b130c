"""The programs that tests start and pip does not install: where they are, and how a Debian machine gets them.

`python -m tests.support.programs` installs all of them; `bin/test` does the same before it runs anything.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest

PACKAGES = {
    "chromium": ("chromium", "fonts-dejavu-core", "libatomic1"),  # the last for the node that drives it
    "fish": ("fish",),
    "nginx": ("nginx-light",),
    "node": ("nodejs",),  # for the worker in TypeScript, which npm gets the compiler for
    "npm": ("npm",),
    "pgbouncer": ("pgbouncer",),
    "prometheus": ("prometheus",),
    "promtool": ("prometheus",),
    "ps": ("procps",),
    "zsh": ("zsh",),
}
SERVICES = {
    "nginx",
    "pgbouncer",
    "prometheus",
}  # those whose packages start a service, on a port that somebody may need
LEFT_OUT = "left out: "
WHY_MISSING = "BATCHQ_TEST_WHY_MISSING"
LOCK_SECONDS = 600
LOCKED = "Could not get lock"


def path_of(name: str) -> str:
    """Return the path of a program. Where it is not installed, leave out the test that asks for it."""
    if (path := find(name)) is None:
        pytest.skip(f"{LEFT_OUT}needs {name} ({os.environ.get(WHY_MISSING) or 'not installed'})")
    return path


def find(name: str) -> str | None:
    """Return the path of a program, or None. Debian keeps some of them where only root's PATH leads."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")


def missing() -> list[str]:
    """Return the names of the programs that are not installed."""
    return [name for name in PACKAGES if find(name) is None]


def install() -> str:
    """Install what is missing, where that is possible, and return why something is still missing, or nothing."""
    if not (names := missing()):
        return ""
    packages = sorted({package for name in names for package in PACKAGES[name]})
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"not installed, and only root on Debian can: apt-get install {' '.join(packages)}"
    print(f"installing {', '.join(packages)}, which tests need", file=sys.stderr, flush=True)
    problem = _install_packages(packages)
    for service in SERVICES.intersection(names):
        _stop_service(service)
    return problem if missing() else ""


def _install_packages(packages: list[str]) -> str:
    """Return what apt says is wrong, or nothing. A package list that cannot be updated may still do."""
    apt_get("update", "-qq")
    return apt_get("install", "-qq", "-y", "--no-install-recommends", *packages)


def apt_get(*arguments: str, lock_seconds: float = LOCK_SECONDS, pause_seconds: float = 2) -> str:
    """Run apt-get and return the first error that it prints, or nothing.

    Wait while another apt runs: the option makes apt-get wait for the lock on dpkg only, not for the other two.
    """
    command = ["apt-get", "-o", f"DPkg::Lock::Timeout={lock_seconds:.0f}", *arguments]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    give_up_at = time.monotonic() + lock_seconds
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if LOCKED not in done.stderr or time.monotonic() > give_up_at:
            break
        time.sleep(pause_seconds)
    return "" if done.returncode == 0 else _first_error(done.stderr, done.returncode)


def _first_error(text: str, exit_code: int) -> str:
    errors = [line.removeprefix("E: ") for line in text.splitlines() if line.startswith("E: ")]
    return f"apt-get failed: {errors[0] if errors else f'exit code {exit_code}'}"


def _stop_service(name: str) -> None:
    """Stop the service that a package has just started, if the machine starts services."""
    if shutil.which("service"):
        subprocess.run(["service", name, "stop"], capture_output=True, check=False)


if __name__ == "__main__":
    why = install()
    for program in PACKAGES:
        print(f"{program}: {find(program) or f'missing ({why})'}")
    sys.exit(1 if missing() else 0)
