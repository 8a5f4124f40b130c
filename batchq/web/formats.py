"""How the web UI shows values: numbers, durations, and texts in which nothing hides."""

from typing import Any
from urllib.parse import urlencode

from batchq.common import text as texts
from batchq.common.numbers import duration as duration
from batchq.operate import progress


def visible(value: Any) -> Any:
    """Return a text with its hidden characters spelled out, such as ⟨U+202E⟩; markup and other values unchanged."""
    if type(value) is not str:
        return "" if value is None else value
    return texts.visible(value)


def number(value: float | None) -> str:
    """Return a number with commas between its thousands, as the command line writes it, or – for None."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def count(row: dict[str, Any], name: str) -> str:
    """Return a count of batchq.queues; an estimate is marked with ~ (about) or ≥ (at least)."""
    text = number(row[name])
    if ("ready" if name == "held_back" else name) not in row["estimated"]:
        return text
    return f"≥\N{NARROW NO-BREAK SPACE}{text}" if name in ("failed", "waiting") else f"~{text}"


def ago(seconds: float | None) -> str:
    """Return how long ago something was: 12 s ago, just now, or – for None."""
    if seconds is None:
        return "–"
    return "just now" if seconds < 1 else f"{duration(seconds)} ago"


def processed(batch: dict[str, Any]) -> int:
    """Return how many items of a batch are processed, failed ones included."""
    return int(batch["items_done"] + batch["items_failed"])


def percent(batch: dict[str, Any]) -> int | None:
    """Return a batch's progress; None if it has no items."""
    return 100 * processed(batch) // batch["items_total"] if batch["items_total"] else None


def items(batch: dict[str, Any]) -> str:
    """Return how many items are done and how many failed, in the words of the command line."""
    return progress.items_text(batch, number)


def shares(batch: dict[str, Any]) -> tuple[int, int]:
    """Return how much of a bar that is 1,000 wide is done, and how much failed; a failed item can always be seen."""
    return progress.shares(batch, 1000, least=12)


def query(**given: Any) -> str:
    """Return the query string of an address, without empty values."""
    return urlencode({name: value for name, value in given.items() if value not in (None, "")})
