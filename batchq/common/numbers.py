"""Whole numbers and lengths of time as people write them, counted nouns, and names that somebody probably meant."""

import re
from collections.abc import Iterable

# As batchq prints them (5,562), and as people copy them: with spaces (also those that do not break), or underscores.
_GROUPED = re.compile("[0-9]{1,3}([,_ \u00a0\u2009\u202f])[0-9]{3}(?:\\1[0-9]{3})*")
_MOST_NAMES = 10
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def read_whole(text: str) -> int:
    """Return a whole number; its thousands may be set apart: 5562, 5,562, 5 562, 5_562. Raises ValueError."""
    stripped = text.strip()
    unsigned = stripped.lstrip("-+")
    if found := _GROUPED.fullmatch(unsigned):
        stripped = stripped.replace(found[1], "")
    elif "_" in stripped:
        raise ValueError(f"not a whole number: {text!r}")
    return int(stripped)


def counted(count: int, noun: str) -> str:
    """Return a count and its noun: 1 batch, 1,500 batches."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return the plural of a regular noun: batches, days."""
    return noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")


def listed(names: Iterable[object], most: int = _MOST_NAMES) -> str:
    """Return names in a row, with commas; of many, the first ones and how many more there are."""
    found = list(map(str, names))
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with the known name that is like *name*, to append to a sentence; empty if none is."""
    import difflib  # only here: workers and programs that enqueue have no use for it

    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


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
