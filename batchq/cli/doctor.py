"""``batchq doctor``: what is wrong, and what to do."""

from argparse import Namespace

from rich.markup import escape

from batchq import doctor
from batchq.cli.commands import console, print_json, settings_of

COLOURS = {"ok": "green", "note": "blue", "warning": "yellow", "critical": "red"}


def run(options: Namespace) -> int:
    """Print a line for each finding; return 0 for ok and notes, 1 for warnings, 2 if anything is critical."""
    settings = settings_of(options)
    found = []
    for finding in doctor.findings(
        settings.require_dsn(), seconds=min(settings.database_timeout_seconds, doctor.SECONDS_EACH)
    ):
        found.append(finding)
        if not options.json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            mark = f"[{COLOURS[finding.severity]}]{finding.severity:<8}[/]"
            console.print(f"{mark}  {escape(f'{finding.check}: {finding.evidence}{remedy}')}", soft_wrap=True)
    if options.json:
        print_json([finding._asdict() for finding in found])
    return doctor.exit_code(found)
