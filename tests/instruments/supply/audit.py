"""Known vulnerabilities in the locked versions, by pip-audit. No answer is not a good answer."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.instruments.supply import locks, tools

# A version with vulnerabilities that every advisory service has listed for years. If a service does not report it, then
# what answered is a mirror of packages without advisories.
CANARY = ("jinja2", "2.4.1")
SERVICES = (["--vulnerability-service", "pypi"], ["--vulnerability-service", "osv"])
NOTHING_FOUND, FOUND, NOT_AUDITED = 0, 1, 3

Version = tuple[str, str]


class NoAnswer(Exception):
    """A service cannot be reached, or has no advisories; the text says why."""


def main(osv_url: str | None = None) -> int:
    """Audit every lock with the first service that answers, or with the one at *osv_url*; return the exit code."""
    services = [["--vulnerability-service", "osv", "--osv-url", osv_url]] if osv_url else SERVICES
    versions = sorted({(pin.name, pin.version) for name in locks.LOCKS for pin in locks.read(name)})
    for service in services:
        try:
            check_canary(service)
            return report(audited(service, versions))
        except NoAnswer as error:
            print(f"audit: {service[1]}: {error}", file=sys.stderr)
    print(f"audit: NOT AUDITED: no advisory service answers, so nothing is known about {len(versions)} locked versions")
    return NOT_AUDITED


def check_canary(service: list[str]) -> None:
    """Raise NoAnswer unless a service reports vulnerabilities that are there."""
    [found] = audited(service, [CANARY])
    if not found.get("vulns"):
        raise NoAnswer(f"it does not report the known vulnerabilities of {'=='.join(CANARY)}")


def report(found: Iterable[dict[str, Any]]) -> int:
    """Print what is wrong with which version; return the exit code."""
    code, clean = NOTHING_FOUND, 0
    for each in found:
        for vulnerability in each.get("vulns", ()):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            print(f"{each['name']} {each['version']}: {vulnerability['id']}, fixed in {fixed}")
            code = FOUND
        if "skip_reason" in each:
            print(f"{each['name']}: not audited: {each['skip_reason']}")
            code = code or NOT_AUDITED
        clean += not each.get("vulns") and "skip_reason" not in each
    print(f"audit: {clean} locked versions without a known vulnerability")
    return code


def audited(service: list[str], versions: Iterable[Version]) -> list[dict[str, Any]]:
    """Return what pip-audit says about each version. Raises NoAnswer."""
    found: list[dict[str, Any]] = []
    for group in groups(versions):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.writelines(f"{name}=={version}\n" for name, version in group)
            file.flush()
            found += pip_audit(service, Path(file.name))
    return found


def groups(versions: Iterable[Version]) -> Iterator[list[Version]]:
    """Yield the versions in lists that name no package twice, which pip-audit refuses."""
    waiting = list(versions)
    while waiting:
        group = dict(reversed(waiting))
        yield list(group.items())
        waiting = [each for each in waiting if group[each[0]] != each[1]]


def pip_audit(service: list[str], file: Path) -> list[dict[str, Any]]:
    """Return pip-audit's answer: a record per package, with `vulns`, or with `skip_reason`. Raises NoAnswer."""
    command = [tools.program("pip-audit"), *service, "--requirement", file, "--timeout", "15"]
    command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)["dependencies"]
    except ValueError:
        raise NoAnswer((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]) from None
    return list(answer)
