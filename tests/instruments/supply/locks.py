"""The files requirements/*.lock: exact versions with hashes, for every Python that batchq supports and every system."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.instruments.supply import tools

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "requirements"
PROJECT = "pgbatchq"
OLDEST_PYTHON = "3.11"
EDITABLE = "editables"  # hatchling asks for it while it builds an editable installation


@dataclass(frozen=True)
class Lock:
    """What a lock is made from, and who installs from it."""

    purpose: str
    extras: tuple[str, ...] = ()
    group: str = ""
    has_project: bool = True
    has_build: bool = False


LOCKS = {
    "build": Lock("what builds the wheel", has_project=False, has_build=True),
    "container": Lock("the image that Dockerfile builds", extras=("binary", "metrics", "web", "crypto")),
    "dev": Lock("CI: BATCHQ_LOCKED=1 bin/test", extras=("dev",), has_build=True),
    "docs": Lock("the documentation site", extras=("docs",)),
    "tools": Lock("bin/supply itself, and releases", group="tools", has_project=False),
}


@dataclass(frozen=True)
class Pin:
    """One version in a lock, where its marker holds."""

    name: str
    version: str
    marker: str
    hashes: int
    needed_by: tuple[str, ...]


def main(*, upgrade: bool) -> int:
    """Write every lock; return the exit code."""
    FOLDER.mkdir(exist_ok=True)
    for name in LOCKS:
        write(name, FOLDER, upgrade=upgrade)
        print(f"requirements/{name}.lock: {len(read(name))} versions")
    return 0


def write(name: str, folder: Path, *, upgrade: bool) -> None:
    """Write a lock into *folder*. Versions of the lock that is there are kept if they still fit, but for *upgrade*."""
    lock, command = LOCKS[name], [tools.program("uv"), "pip", "compile", "--quiet", "--generate-hashes", "--universal"]
    command += ["--python-version", OLDEST_PYTHON, "--no-header"]
    command += ["--upgrade"] if upgrade else []
    command += ["pyproject.toml"] if lock.has_project else []
    command += [word for extra in lock.extras for word in ("--extra", extra)]
    command += ["--group", lock.group] if lock.group else []
    command += ["-"] if lock.has_build else []
    file = folder / f"{name}.lock"
    requires = "\n".join(build_requires())
    subprocess.run([*command, "--output-file", file], cwd=ROOT, input=requires, text=True, check=True)
    header = f"# For {lock.purpose}. Written by bin/supply lock; do not edit.\n"
    file.write_text(header + file.read_text(encoding="utf-8"), encoding="utf-8")


def build_requires() -> list[str]:
    """Return what a build needs."""
    return [*project()["build-system"]["requires"], EDITABLE]


def project() -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> list[Pin]:
    """Return the versions of a lock."""
    return list(parse((FOLDER / f"{name}.lock").read_text(encoding="utf-8")))


def parse(text: str) -> Iterator[Pin]:
    """Yield the versions in the text of a lock. Raises ValueError for a line that is neither version nor comment."""
    for block in re.split(r"^(?=\w)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE):
        if not block.strip():
            continue
        found = re.match(r"(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?: ; (?P<marker>[^\\\n]+?))?(?: \\)?\n", block)
        if found is None:
            raise ValueError(f"not a locked version: {block.splitlines()[0]}")
        comments = re.findall(r"^ +#(?: via)? +(\S.*)$", block, flags=re.MULTILINE)
        hashes = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
        needed_by = tuple(comment.strip() for comment in comments if comment.strip() != "via")
        yield Pin(found["name"], found["version"], found["marker"] or "", hashes, needed_by)


def wanted(name: str) -> list[Requirement]:
    """Return what pyproject.toml asks for directly in a lock, with the extras of the project itself resolved."""
    lock, toml = LOCKS[name], project()
    texts: list[str] = list(toml["project"]["dependencies"]) if lock.has_project else []
    texts += build_requires() if lock.has_build else []
    texts += toml["dependency-groups"][lock.group] if lock.group else []
    found = [Requirement(text) for text in texts]
    for extra in lock.extras:
        found += of_extra(extra)
    return found


def of_extra(extra: str) -> Iterator[Requirement]:
    """Yield what an extra asks for, and the extras that it names."""
    for text in project()["project"]["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == PROJECT:
            for other in sorted(requirement.extras):
                yield from of_extra(other)
        else:
            yield requirement


def misfits(requirements: list[Requirement], pins: list[Pin], python: str) -> Iterator[str]:
    """Yield in words each requirement that no version in a lock satisfies on Linux with *python*, such as `3.12`."""
    where = environment(python)
    there = {canonicalize_name(pin.name): pin.version for pin in pins if holds(pin.marker, where)}
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate(where):
            continue
        version = there.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"Python {python}: {requirement.name} is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"Python {python}: {requirement} is asked for, {version} is locked"


def environment(python: str) -> dict[str, str]:
    """Return what markers compare with, for *python* on Linux."""
    return {
        "python_version": python, "python_full_version": f"{python}.9", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "sys_platform": "linux", "os_name": "posix",
        "platform_system": "Linux", "platform_machine": "x86_64", "extra": "",
    }  # fmt: skip


def holds(marker: str, where: dict[str, str]) -> bool:
    """Return whether a marker is true there; an empty one always is."""
    return not marker or Marker(marker).evaluate(where)  # type: ignore[arg-type]
