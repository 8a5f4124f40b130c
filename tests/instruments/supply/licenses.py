"""The licenses of what users of batchq install with it: read from the metadata of the installed distributions."""

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.instruments.supply import locks

NOT_FOR_USERS = {"dev", "docs"}  # the extras for those who change batchq

# Licenses that let anybody use, change and sell a program that depends on the library, whatever its own license.
ALLOWED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU",
    "PostgreSQL", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip
# Others, each for one family of packages and with its reason.
EXCEPTIONS = {
    "psycopg": ("LGPL-3.0-only", "imported unchanged, as a package of its own that anybody can replace"),
    "psycopg-binary": ("LGPL-3.0-only", "as psycopg"),
    "psycopg-pool": ("LGPL-3.0-only", "as psycopg"),
    "shtab": ("MPL-2.0", "imported unchanged; MPL asks to share changes to its own files"),
}
# What older metadata says instead of an SPDX expression.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "PSF": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
CLASSIFIER = "License :: OSI Approved :: "


def main() -> int:
    """Print the license of every dependency; return 1 if one is not allowed, else 0."""
    found = {dist.metadata["Name"]: license_of(dist) for dist in dependencies()}
    refused = {name: text for name, text in found.items() if not is_allowed(name, text)}
    width = max(map(len, found))
    for name, text in sorted(found.items(), key=lambda each: each[0].lower()):
        print(f"{name:{width}}  {text}{'  NOT ALLOWED' if name in refused else ''}")
    return 1 if refused else 0


def user_extras() -> list[str]:
    """Return the extras that users install."""
    return sorted(locks.project()["project"]["optional-dependencies"].keys() - NOT_FOR_USERS)


def direct() -> list[Requirement]:
    """Return what batchq and its extras for users ask for."""
    found = [Requirement(text) for text in locks.project()["project"]["dependencies"]]
    return found + [each for extra in user_extras() for each in locks.of_extra(extra)]


def dependencies() -> list[Distribution]:
    """Return what users install with batchq and its extras, directly or not, as far as it is for this system."""
    found: dict[str, Distribution] = {}
    waiting, seen = direct(), set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found[name] = installed(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += list(needs(found[name], extra))
    return list(found.values())


def installed(name: str) -> Distribution:
    """Return a distribution. Raises PackageNotFoundError with advice."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise PackageNotFoundError(f"{name} is not installed; run: pip install -e '.[dev]'") from None


def needs(dist: Distribution, extra: str) -> Iterator[Requirement]:
    """Yield what a distribution needs with one extra, or with none if *extra* is empty."""
    for text in dist.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            yield requirement


def license_of(dist: Distribution) -> str:
    """Return the license as an SPDX expression, or as the metadata has it, or `unknown`."""
    metadata = dist.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    names = [text.removeprefix(CLASSIFIER) for text in metadata.get_all("Classifier") or () if CLASSIFIER in text]
    if not names:
        names = [(metadata.get("License") or "unknown").partition("\n")[0]]
    return " AND ".join(sorted({SPDX.get(name, name) for name in names}))


def is_allowed(name: str, text: str) -> bool:
    """Return whether a program of any license may depend on a package with this license.

    An expression with parentheses is not understood, and so not allowed.
    """
    allowed = ALLOWED | {EXCEPTIONS.get(canonicalize_name(name), ("",))[0]}
    return any(allowed.issuperset(choice.split(" AND ")) for choice in text.split(" OR "))
