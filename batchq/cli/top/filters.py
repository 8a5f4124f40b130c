"""The filter of ``batchq top``: words that all must be in a row, and queue:, kind: and status: for one fact of it."""

from collections.abc import Iterator
from typing import NamedTuple

from batchq.cli.columns import Row

HELP = "words, or queue:mail kind:send status:failed; all must match"
_FACTS = {"queue": ("queue", "queues"), "kind": ("kind", "kinds"), "status": ("status", "state")}


class _Word(NamedTuple):
    """A word of a filter. fact: where it must be; "": anywhere."""

    fact: str
    text: str


def words_of(text: str) -> list[_Word]:
    """Return the words of a filter, in small letters."""
    found = []
    for word in text.lower().split():
        fact, colon, rest = word.partition(":")
        found.append(_Word(fact, rest) if colon and fact in _FACTS else _Word("", word))
    return found


def matches(words: list[_Word], row: Row, shown: str) -> bool:
    """Return whether all words are in a row. *shown*: the texts of its cells."""
    return all(
        any(word.text in found for found in _facts(row, word.fact)) if word.fact else word.text in shown.lower()
        for word in words
    )


def _facts(row: Row, fact: str) -> Iterator[str]:
    """Yield what a row has of a fact: a worker has several queues and kinds."""
    for name in _FACTS[fact]:
        value = row.get(name)
        yield from (str(each).lower() for each in (value if isinstance(value, list) else [value]) if each is not None)
    if fact == "status" and row.get("is_paused"):
        yield "paused"
