"""``batchq doctor``: what is wrong, and what to do."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import settings_of
from batchq.common.terminal import put_json, put_marked
from batchq.operate import doctor

_COLORS = {"ok": "green", "note": "blue", "warning": "yellow", "critical": "red"}


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "doctor", _run, "list problems and what to do about them")
    parser.epilog = "Exits 1 if there are warnings, 2 if anything is critical."
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    settings = settings_of(options)
    seconds = min(settings.database_timeout_seconds, doctor.SECONDS_EACH)
    findings = []
    for finding in doctor.findings(settings.require_dsn(), seconds=seconds):
        findings.append(finding)
        if not options.json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            mark = f"{finding.severity:<9}"
            put_marked(mark, _COLORS[finding.severity], f"{finding.check}: {finding.evidence}{remedy}")
    if options.json:
        put_json([finding._asdict() for finding in findings])
    return doctor.exit_code(findings)
