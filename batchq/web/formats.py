"""How the web UI shows values: numbers, durations, and texts in which nothing hides."""

from typing import Any
from urllib.parse import urlencode

from batchq.common import text as texts

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def visible(value: Any) -> Any:
    """Return a text with its hidden characters spelled out, such as ⟨U+202E⟩; markup and other values unchanged."""
    if type(value) is not str:
        return "" if value is None else value
    return texts.visible(value)


def duration(seconds: float | None) -> str:
    """Return a duration in one or two units: 850 ms, 12 s, 3 min 20 s, 2 d 4 h."""
    if seconds is None:
        return "–"
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds > 1e11:
        return "forever"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for size, unit in _UNITS:
        if left >= size or parts:
            parts.append((left // size, unit))
            left %= size
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


def number(value: float | None) -> str:
    """Return a number with thin spaces between its thousands, or – for None."""
    if value is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return text.replace(",", "\N{NARROW NO-BREAK SPACE}")


def count(row: dict[str, Any], name: str) -> str:
    """Return a count of batchq.queues; an estimate is marked with ~ (about) or ≥ (at least)."""
    text = number(row[name])
    if ("ready" if name == "held_back" else name) not in row["estimated"]:
        return text
    return f"≥\N{NARROW NO-BREAK SPACE}{text}" if name in ("failed", "waiting") else f"~{text}"


def processed(batch: dict[str, Any]) -> int:
    """Return how many items of a batch are processed, failed ones included."""
    return int(batch["items_done"] + batch["items_failed"])


def percent(batch: dict[str, Any]) -> int | None:
    """Return a batch's progress; None if it has no items."""
    return 100 * processed(batch) // batch["items_total"] if batch["items_total"] else None


def query(**given: Any) -> str:
    """Return the query string of an address, without empty values."""
    return urlencode({name: value for name, value in given.items() if value not in (None, "")})
