"""The locks fit pyproject.toml and name no registry, and no dependency of users has a license that binds them."""

import re
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.instruments.supply import audit, licenses, locks
from tests.support.alone import run_alone

PYTHONS = ("3.11", "3.12", "3.13")
PAGE = locks.ROOT / "docs" / "supply-chain.md"
DIRECT = re.compile(rf"{locks.PROJECT} \(pyproject\.toml(:\w+)?\)")


@pytest.mark.parametrize("name", locks.LOCKS)
def test_a_lock_satisfies_pyproject_on_every_python(name: str) -> None:
    found = [each for python in PYTHONS for each in locks.misfits(locks.wanted(name), locks.read(name), python)]
    assert found == [], "run: bin/supply lock"


@pytest.mark.parametrize("name", locks.LOCKS)
def test_a_lock_has_nothing_that_pyproject_asks_for_no_longer(name: str) -> None:
    wanted = {canonicalize_name(each.name) for each in locks.wanted(name)}
    direct = {pin.name for pin in locks.read(name) if any(map(DIRECT.fullmatch, pin.needed_by))}
    assert direct <= wanted, "run: bin/supply lock"
    assert direct or not locks.LOCKS[name].has_project


@pytest.mark.parametrize("name", locks.LOCKS)
def test_a_lock_has_a_hash_for_every_version_and_names_no_host(name: str) -> None:
    pins, text = locks.read(name), (locks.FOLDER / f"{name}.lock").read_text(encoding="utf-8")
    assert [pin.name for pin in pins] == re.findall(r"^([\w.-]+)==", text, re.MULTILINE)
    assert [pin.name for pin in pins if not pin.hashes] == []
    assert re.findall(r"://|^--(?!hash)\S+|@ ", text, re.MULTILINE) == []


def test_a_lock_that_does_not_fit_is_described() -> None:
    text = "psycopg==3.1 \\\n    --hash=sha256:" + "0" * 64 + "\n    # via pgbatchq (pyproject.toml)\n"
    pins = list(locks.parse(text))
    assert [(pin.name, pin.version, pin.hashes, pin.needed_by) for pin in pins] == [
        ("psycopg", "3.1", 1, ("pgbatchq (pyproject.toml)",))
    ]
    asked = [Requirement(each) for each in ("psycopg>=3.2.2", "rich", "tzdata; sys_platform == 'win32'")]
    assert list(locks.misfits(asked, pins, "3.12")) == [
        "Python 3.12: psycopg>=3.2.2 is asked for, 3.1 is locked",
        "Python 3.12: rich is missing",
    ]


def test_no_dependency_of_users_has_a_license_that_binds_them() -> None:
    found = {dist.metadata["Name"]: licenses.license_of(dist) for dist in licenses.dependencies()}
    assert len(found) > 20
    assert {name: text for name, text in found.items() if not licenses.is_allowed(name, text)} == {}


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("any", "MIT", True),
        ("any", "Apache-2.0 OR GPL-3.0-only", True),
        ("any", "MIT AND GPL-3.0-only", False),
        ("any", "MIT AND (BSD-3-Clause OR GPL-3.0-only)", False),
        ("any", "LGPL-3.0-only", False),
        ("psycopg", "LGPL-3.0-only", True),
        ("any", "unknown", False),
    ],
)
def test_an_unknown_license_is_refused_and_so_is_one_that_spreads(name: str, text: str, allowed: bool) -> None:
    assert licenses.is_allowed(name, text) is allowed


def test_the_docs_list_the_license_of_every_direct_dependency_and_the_reason_of_every_exception() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| ([\w .-]+) \|", text, re.MULTILINE))
    names = {canonicalize_name(each.name) for each in licenses.direct() if each.marker is None}
    assert {name: rows.get(name) for name in names} == {name: licenses.license_of(distribution(name)) for name in names}
    for name, (license_name, reason) in licenses.EXCEPTIONS.items():
        assert rows[name] == license_name
        assert reason in text or reason.startswith("as ")


def test_an_audit_asks_for_every_locked_version_although_a_package_may_have_two() -> None:
    versions = [("a", "1"), ("a", "2"), ("b", "1"), ("a", "3")]
    groups = list(audit.groups(versions))
    assert all(len(dict(group)) == len(group) for group in groups)
    assert sorted(each for group in groups for each in group) == sorted(versions)


def test_a_version_that_was_not_audited_is_not_clean(capsys: pytest.CaptureFixture[str]) -> None:
    clean, skipped = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    assert audit.report([clean]) == audit.NOTHING_FOUND
    assert audit.report([clean, skipped]) == audit.NOT_AUDITED
    assert "b: not audited: not found\n" in capsys.readouterr().out


if __name__ == "__main__":
    run_alone(__file__)
