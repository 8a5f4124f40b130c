"""``batchq doctor``: what is wrong, and what to do; with one database or with several."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import one_or_several
from batchq.common.terminal import put_json, put_marked
from batchq.operate import doctor
from batchq.postgres.databases import Database

_COLORS = {"ok": "green", "note": "blue", "warning": "yellow", "critical": "red"}


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "doctor", _run, "list problems and what to do about them")
    parser.epilog = "Exits 1 if there are warnings, 2 if anything is critical."
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    settings, databases = one_or_several(options)
    seconds = min(settings.database_timeout_seconds, doctor.SECONDS_EACH)
    if databases:
        return _run_several(databases, seconds, options.json)
    findings = []
    for finding in doctor.findings(settings.require_dsn(), seconds=seconds):
        findings.append(finding)
        if not options.json:
            _put(finding)
    if options.json:
        put_json([finding._asdict() for finding in findings])
    return doctor.exit_code(findings)


def _run_several(databases: list[Database], seconds: float, is_json: bool) -> int:
    """Check all databases concurrently, and print the findings of one after the other."""
    found: list[tuple[str, doctor.Finding]] = []
    with ThreadPoolExecutor(len(databases)) as pool:
        runs = [pool.submit(lambda dsn: list(doctor.findings(dsn, seconds=seconds)), each.dsn) for each in databases]
        for database, run in zip(databases, runs, strict=True):
            for finding in run.result():
                evidence, remedy = database.advice(finding.evidence), database.advice(finding.remedy)
                named = finding._replace(evidence=evidence, remedy=remedy)
                found.append((database.name, named))
                if not is_json:
                    _put(named, f"{database.name}: ")
    if is_json:
        put_json([{"database": name, **finding._asdict()} for name, finding in found])
    return doctor.exit_code([finding for _, finding in found])


def _put(finding: doctor.Finding, name: str = "") -> None:
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    mark = f"{finding.severity:<9}"
    put_marked(mark, _COLORS[finding.severity], f"{name}{finding.check}: {finding.evidence}{remedy}")
