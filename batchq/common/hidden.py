"""Hidden fields: values of payloads, items and results that logs, errors, the web UI and the command line do not show.

The names are those of BATCHQ_HIDDEN_FIELDS. They hold at any depth, in any case of letters; `*` stands for any letters.
The database and the handler have the values; see docs/sealed.md.
"""

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from batchq.common import sealed
from batchq.common.secrets import values_to_hide

VARIABLE = "BATCHQ_HIDDEN_FIELDS"
HIDDEN = "***"
_LEAST_CHARACTERS = 3  # a shorter value is in half of all texts
_PIECE_CHARACTERS = 1000
_MOST_PIECES = 5000
_TOKEN = re.compile(
    r'(?P<key>"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*)|(?P<text>"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$))|(?P<open>[\[{])|(?P<close>[\]}])'
    r'|(?P<rest>[^"\[\]{}]+)',
    re.DOTALL,
)
_SEALED_TEXT = re.compile(
    r'\s*\{\s*(?:"tick":\s*(?:null|"[^"]{0,40}"),\s*)?"batchq:sealed":\s*\{\s*"key":\s*"([A-Za-z0-9._-]{1,50})"'
)


class Fields:
    """The names of hidden fields, as patterns."""

    def __init__(self, names: Sequence[str]) -> None:
        self._name = re.compile("|".join(fnmatch.translate(name.lower()) for name in names))

    def has(self, name: str) -> bool:
        """Return whether the field of this name is hidden."""
        return self._name.match(name.lower()) is not None

    def in_value(self, value: Any) -> Any:
        """Return a JSON value with *** for each hidden one. One that is nested too deeply is hidden as a whole."""
        try:
            return self._in_value(value)
        except RecursionError:
            return HIDDEN

    def _in_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: HIDDEN if self.has(str(name)) else self._in_value(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._in_value(part) for part in value]
        return value

    def in_text(self, text: str) -> str:
        """Return a JSON text, which may end anywhere, with *** for each hidden value."""
        return "".join(self._shown(text))

    def _shown(self, text: str) -> Iterator[str]:
        is_hidden, depth = False, 0  # whether the value that comes next is hidden; how deep within such a value
        for found in _TOKEN.finditer(text):
            kind, token = found.lastgroup, found[0]
            if depth:
                depth += (kind == "open") - (kind == "close")
            elif is_hidden:
                is_hidden, depth = False, int(kind == "open")
                yield f'"{HIDDEN}"'
                if kind == "rest":
                    yield re.sub(r"^[^,\s]*", "", token)  # what follows a number
            else:
                yield token
                is_hidden = kind == "key" and self.has(_name_in(token))

    def values(self, value: Any) -> set[str]:
        """Return the texts and numbers in the hidden fields of a JSON value, each of at least 3 characters."""
        found: set[str] = set()
        todo: list[tuple[Any, bool]] = [(value, False)]  # not recursive: it may be nested deeper than Python's limit
        while todo:
            part, is_hidden = todo.pop()
            if isinstance(part, dict):
                todo += [(inner, is_hidden or self.has(str(name))) for name, inner in part.items()]
            elif isinstance(part, list):
                todo += [(inner, is_hidden) for inner in part]
            elif is_hidden and not isinstance(part, bool) and part is not None:
                found.add(str(part))
        return {text for text in found if len(text) >= _LEAST_CHARACTERS}


def _name_in(token: str) -> str:
    try:
        return str(json.loads(token.rstrip().removesuffix(":")))
    except ValueError:
        return token


class _OfThisProgram:
    """The hidden fields, None without any. "unread" until the environment was read: so a run needs one check only."""

    def __init__(self) -> None:
        self.fields: Fields | Literal["unread"] | None = "unread"


OF_THIS_PROGRAM = _OfThisProgram()


def fields() -> Fields | None:
    """Return this program's hidden fields: those of its settings, else of BATCHQ_HIDDEN_FIELDS; None without any."""
    if OF_THIS_PROGRAM.fields == "unread":
        use(os.environ.get(VARIABLE, "").split(","))
    return OF_THIS_PROGRAM.fields  # type: ignore[return-value]


def use(names: Sequence[str]) -> None:
    """Hide the fields of these names from now on."""
    given = [name.strip() for name in names if name.strip()]
    OF_THIS_PROGRAM.fields = Fields(given) if given else None


# ----------------------------------------------------------------------------------------- errors and logs of a batch


class BatchValues:
    """The hidden values of the batch that runs, for the texts of its errors and logs. Read at the first such text.

    payload: JSON text. items: those of its chunk.
    """

    def __init__(self, hidden: Fields, payload: str) -> None:
        self.items: Sequence[Any] = ()
        self._fields = hidden
        self._payload = payload
        self._known: tuple[Sequence[Any] | None, list[str]] = (None, [])

    def __call__(self) -> list[str]:
        """Return the values in every way of writing them, the longest first."""
        items, values = self._known
        if items is not self.items:
            items = self.items
            values = self._read(items)
            self._known = (items, values)
        return values

    def _read(self, items: Sequence[Any]) -> list[str]:
        try:
            payload = json.loads(self._payload)
        except (ValueError, RecursionError):  # no handler can have read it
            payload = None
        from urllib.parse import quote  # only here: programs that enqueue import this module, and start sooner

        texts = self._fields.values(payload) | self._fields.values(list(items))
        pieces = {piece for text in texts for piece in _pieces(text)}
        ways = {way for piece in pieces for way in (piece, repr(piece)[1:-1], json.dumps(piece)[1:-1], quote(piece))}
        return sorted(ways, key=len, reverse=True)[:_MOST_PIECES]


def _pieces(text: str) -> Iterator[str]:
    """Yield the parts of a long text that are searched for: an error may have only some of it."""
    for start in range(0, len(text), _PIECE_CHARACTERS):
        if len(piece := text[start : start + _PIECE_CHARACTERS]) >= _LEAST_CHARACTERS:
            yield piece


def hide_values_of(payload: str) -> None:
    """From now on, mask the hidden values of this batch in logs and stored errors. *payload*: JSON text."""
    if (hidden := fields()) is not None:
        values_to_hide.set(BatchValues(hidden, payload))


def hide_no_values() -> None:
    """Hide no batch's values any more."""
    values_to_hide.set(None)


def note_items(items: Sequence[Any]) -> None:
    """Note the items that are worked next: their hidden values are hidden, too."""
    values: Callable[[], list[str]] | None = values_to_hide.get()
    if isinstance(values, BatchValues):
        values.items = items


# -------------------------------------------------------------------------------------------------- what people see


def shown_value(value: Any) -> Any:
    """Return a JSON value for people: hidden fields as ***, and for a sealed value the name of its key."""
    key = sealed.key_of(value)
    return without_hidden(value) if key is None else f"sealed with key {key}"


def shown_text(text: str) -> str:
    """Return a JSON text for people, as `shown_value` does. The text may end anywhere."""
    if (found := _SEALED_TEXT.match(text)) is not None:
        return f'"sealed with key {found[1]}"'
    return text_without_hidden(text)


def without_hidden(value: Any) -> Any:
    """Return a JSON value with *** for hidden fields; what is sealed stays as it is."""
    hidden = fields()
    return value if hidden is None else hidden.in_value(value)


def text_without_hidden(text: str) -> str:
    """Return a JSON text as `without_hidden` does. The text may end anywhere."""
    hidden = fields()
    return text if hidden is None else hidden.in_text(text)


def shown_item(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of batchq.failed_items for people."""
    return row | {"item": shown_value(row["item"]), "error": sealed.shortened(row["error"])}


def is_changed(text: str) -> bool:
    """Return whether people see another text than this JSON text."""
    return shown_text(text) != text
