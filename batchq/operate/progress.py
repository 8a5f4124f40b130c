"""The progress of a batch, in the same words and shares on the command line and in the web UI."""

from collections.abc import Callable, Mapping
from typing import Any


def items_text(row: Mapping[str, Any], number: Callable[[int], str] = "{:,}".format) -> str:
    """Return how many items are done and how many failed, such as "1,485 done, 15 failed, of 1,500"; without failed
    ones "620 of 1,500"; empty without items. *number*: makes the text of a number."""
    if row["items_total"] is None:
        return ""
    done, failed, total = (number(row[name] or 0) for name in ("items_done", "items_failed", "items_total"))
    return f"{done} done, {failed} failed, of {total}" if row["items_failed"] else f"{done} of {total}"


def shares(row: Mapping[str, Any], width: int, least: int = 1) -> tuple[int, int]:
    """Return how much of a bar of *width* is done, and how much failed: at least *least* if any item failed.

    Together they fill the bar only if every item is processed.
    """
    done, failed, total = row["items_done"] or 0, row["items_failed"] or 0, row["items_total"]
    if not total:
        return 0, 0
    of_failed = max(least, width * failed // total) if failed else 0
    ended = max(width * (done + failed) // total, of_failed)
    return ended - of_failed, of_failed
