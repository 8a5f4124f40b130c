"""``batchq doctor``: what is wrong, and what to do."""

from argparse import Namespace

from batchq.cli.commands import settings_of
from batchq.common.terminal import put_json, put_marked
from batchq.operate import doctor

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
            mark = f"{finding.severity:<9}"
            put_marked(mark, COLOURS[finding.severity], f"{finding.check}: {finding.evidence}{remedy}")
    if options.json:
        put_json([finding._asdict() for finding in found])
    return doctor.exit_code(found)
