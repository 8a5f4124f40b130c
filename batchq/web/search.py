"""The search field of the list of batches: what its text means.

A text is made of terms such as ``key:customer-7`` or ``payload.customer.id = 42``, and of words, which are searched for
in ids, keys, unique keys, kinds, queues and errors.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from batchq.postgres.statements.views import HIGHEST_ID, STATUSES

MOST_CHARACTERS = 300
EXAMPLE = 'key:customer-7, error:"timed out" or payload.customer.id = 42'
_FIELDS = ("id", "queue", "kind", "status", "key", "unique_key", "worker", "error")
_TERM = re.compile(r'([A-Za-z_][\w-]*(?:\.(?:[\w-]+|"(?:[^"\\]|\\.)*"))*)(?::(?=[^\s/])|\s*=\s*(?=[^\s=]))')
_PART = re.compile(r'[\w-]+|"(?:[^"\\]|\\.)*"')
_PLAIN = re.compile(r'[^\s"{\[][^\s"]*')


@dataclass(frozen=True)
class InPayload:
    """A value that a payload has at a path; an empty path is the whole payload.

    text: the value as text, None for an object or a list. json: the JSON that the payload contains there.
    """

    path: tuple[str, ...]
    text: str | None
    json: str


@dataclass(frozen=True)
class Terms:
    """What is searched for; None: anything. words: what is in no term."""

    id: int | None = None
    queue: str | None = None
    kind: str | None = None
    status: str | None = None
    key: str | None = None
    unique_key: str | None = None
    worker: str | None = None
    error: str | None = None
    words: str | None = None
    payload: InPayload | None = None

    @property
    def is_any(self) -> bool:
        """Whether anything is searched for."""
        return any(getattr(self, field.name) is not None for field in fields(self))


def parse(text: str) -> Terms:
    """Return what a text means. Raises ValueError, whose text says what is wrong and gives an example."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the search has {len(text)} characters; at most {MOST_CHARACTERS} are allowed")
    found: dict[str, Any] = {}
    words: list[str] = []
    for name, value, _ in _pieces(text):
        if name == "words":
            words.append(value)
        elif name in found:
            raise ValueError(f"the search has {name} twice; once is enough{_one_payload(name)}")
        else:
            found[name] = value
    if words:
        found["words"] = " ".join(words)
    if any("\0" in value for value in found.values() if isinstance(value, str)):
        raise ValueError("the search contains a NUL character, which no batch can have")
    return Terms(**found)


def without(text: str, name: str) -> str:
    """Return a text without its term of a field. Raises ValueError."""
    return " ".join(piece for field, _, piece in _pieces(text) if field != name)


def term(name: str, value: str) -> str:
    """Return the text of a term."""
    return f"{name}:{value if _PLAIN.fullmatch(value) and value[0] != '/' else json.dumps(value, ensure_ascii=False)}"


def _pieces(text: str) -> Iterator[tuple[str, Any, str]]:
    """Yield each term and word: its field ("words" for a word), what it means, and its own text. Raises ValueError."""
    value: Any
    at = 0
    while (begin := _after_space(text, at)) < len(text):
        if not (found := _TERM.match(text, begin)):
            value, at = _value(text, begin, "the text") if text[begin] == '"' else _bare(text, begin)
            yield "words", value, text[begin:at]
            continue
        name = "payload" if "." in found[1] else found[1]
        value, at = _in_payload(found[1], text, found.end()) if name == "payload" else _field(name, text, found)
        yield name, value, text[begin:at]


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _bare(text: str, at: int) -> tuple[str, int]:
    end = at
    while end < len(text) and not text[end].isspace():
        end += 1
    return text[at:end], end


def _value(text: str, at: int, name: str) -> tuple[str, int]:
    """Return the value that begins at a place, and the place after it."""
    if text[at] != '"':
        return _bare(text, at)
    value, end = _json(text, at, name)
    return str(value), end


def _json(text: str, at: int, name: str) -> tuple[Any, int]:
    """Return the JSON value that begins at a place, and the place after it. Raises ValueError."""
    try:
        value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(text, at)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        shown = text[at : at + 40]
        missing = "it needs a closing quote" if text[at] == '"' else 'for example payload:{"customer": {"id": 42}}'
        raise ValueError(f"after {name} comes {shown}, which is not valid JSON; {missing}") from None
    if end < len(text) and not text[end].isspace():
        raise ValueError(f"put a space between {text[at:end]} and {text[end : end + 20]}")
    return value, end


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _field(name: str, text: str, found: re.Match[str]) -> tuple[Any, int]:
    if name not in _FIELDS:
        whole = _bare(text, found.start())[0].replace('"', "")
        raise ValueError(
            f"there is no field {name}; use {', '.join(_FIELDS)} or payload.NAME, for example {EXAMPLE}. "
            f'Put a text with ":" or "=" in quotes: "{whole}"'
        )
    value, at = _value(text, found.end(), name)
    if name == "status" and value not in STATUSES:
        raise ValueError(f"there is no status {value}; use {', '.join(STATUSES)}")
    if name == "id":
        if not (value.isascii() and value.isdecimal() and 0 < int(value) <= HIGHEST_ID):
            raise ValueError(f"an id is a whole number, not {value}; for example id:42")
        return int(value), at
    if not value:
        raise ValueError(f"after {name} comes an empty text; for example {name}:abc")
    return value, at


def _in_payload(name: str, text: str, at: int) -> tuple[InPayload, int]:
    parts = [json.loads(part) if part[0] == '"' else part for part in _PART.findall(name)]
    path = tuple(parts[1:] if parts[0] == "payload" else parts)
    if any("\0" in part for part in path):
        raise ValueError("the path contains a NUL character, which no payload can have")
    if text[at] in '{["':
        value, end = _json(text, at, name)
        if "\\u0000" in text[at:end]:
            raise ValueError(f"after {name} comes a NUL character, which no payload can have")
        return InPayload(path, value if isinstance(value, str) else None, text[at:end]), end
    word, end = _bare(text, at)
    if not path:
        raise ValueError(
            f'no field is named before {word}; write payload.NAME = {word} or payload:{{"NAME": "{word}"}}'
        )
    return InPayload(path, word, _scalar(word)), end


def _scalar(word: str) -> str:
    """Return a word as JSON: a number, true, false or null as such, anything else as a string."""
    if word in ("true", "false", "null") or re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d{1,3})?", word, re.ASCII):
        return word
    return json.dumps(word, ensure_ascii=False)


def _one_payload(name: str) -> str:
    return '. For several values, write payload:{"a": 1, "b": 2}' if name == "payload" else ""
