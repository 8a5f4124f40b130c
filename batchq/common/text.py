"""Texts that Postgres accepts (JSON, and errors cut to a readable size), and texts in which nothing is hidden."""

import inspect
import json
import re
import traceback
from typing import Any

from batchq.common.secrets import hide_password
from batchq.errors import InvalidInput

MOST_ERROR_BYTES = 2_000
_MOST_MESSAGE_BYTES = 1_800
_MOST_TRACEBACK_BYTES = 6_000
MOST_RESULT_BYTES = 1_000_000
_MOST_SEARCHED = 40_000  # characters of an error: no more are searched for passwords, and no more are kept
_SECONDS_A_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

# \u0000 that is not itself escaped: jsonb has no NUL.
_NUL_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

# Control characters, marks that change the direction of text, characters without width: they hide or disguise text, and
# some control a terminal. A line break or a tab is fine within a block of text, but within a line it forges a row.
_HIDDEN_CHARACTERS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U00013440\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff"
)
_JOINED = re.compile("[\u0620-\u064a\u066e-\u06d3\u0750-\u077f\u0900-\u0dff]")
_HIDDEN = re.compile(f"[{_HIDDEN_CHARACTERS}]")
_HIDDEN_IN_A_LINE = re.compile(f"[\t\n{_HIDDEN_CHARACTERS}]")


def visible(text: str) -> str:
    """Return *text* with its hidden characters spelled out, such as ⟨U+202E⟩; line breaks and tabs are kept."""
    return _HIDDEN.sub(_spelled_out, text)


def visible_line(text: str) -> str:
    """Return *text* as `visible` does, with line breaks and tabs spelled out, too: the result is one line."""
    return _HIDDEN_IN_A_LINE.sub(_spelled_out, text)


def visible_json(text: str) -> str:
    """Return JSON text with an escape (``\\u202e``) for each hidden character: its value is the same."""
    return _HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _spelled_out(found: re.Match[str]) -> str:
    # Some only change how their neighbors look: the style of a symbol, parts of an emoji, Arabic and Indic letters.
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    if found[0] in "\ufe0e\ufe0f" and _is_symbol(before):
        return found[0]
    if found[0] == "\u200d" and (before == "\ufe0f" or _is_symbol(before)) and _is_symbol(after):
        return found[0]
    if found[0] in "\u200c\u200d" and _JOINED.match(before) and _JOINED.match(after):
        return found[0]
    return f"⟨U+{ord(found[0]):04X}⟩"


def _is_symbol(char: str) -> bool:
    """Return whether a character is a symbol such as ❤, an emoji, or a skin color."""
    from unicodedata import category  # only here: its tables take 0.7 MB, and few texts need them

    return char != "" and (category(char) == "So" or "\U0001f3fb" <= char <= "\U0001f3ff")


def json_text(value: Any, what: str) -> str:
    """Return *value* (JSON types and pydantic models) as JSON text that jsonb accepts.

    Raises InvalidInput, which begins with *what*, for NaN, NUL characters, lone surrogates and what is not JSON.
    """
    try:
        text = _encoder.encode(value)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{what} cannot be stored as JSON: {cut(clean(str(error)), 300)}") from None
    if "\\u0000" in text and _NUL_ESCAPE.search(text):
        raise InvalidInput(f"{what} cannot be stored as JSON: it has a NUL character (\\u0000), which Postgres refuses")
    return text


def result_text(result: Any, what: str) -> str | None:
    """Return the result of a batch as JSON text, None for None. Raises InvalidInput for what is not JSON, or too
    large."""
    if result is None:
        return None
    text = json_text(result, what)
    if (size := len(text.encode())) > MOST_RESULT_BYTES:
        raise InvalidInput(f"{what} is {size:,} bytes of JSON; at most {MOST_RESULT_BYTES:,}")
    return text


def _model_value(value: Any) -> Any:
    from pydantic import BaseModel  # only here: most values are plain JSON, and programs that enqueue start sooner

    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    close_coroutine(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def close_coroutine(value: Any) -> bool:
    """Return whether *value* is a coroutine; close it, or Python would warn later that nobody awaited it."""
    if not inspect.iscoroutine(value):
        return False
    value.close()
    return True


_encoder = json.JSONEncoder(default=_model_value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def clean(text: str) -> str:
    """Return *text* without NUL characters and lone surrogates, which Postgres refuses."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def cut(text: str, most_bytes: int, left_out: int = 0) -> str:
    """Return *text* without its middle if it exceeds *most_bytes* in UTF-8; *left_out* bytes are missing already."""
    data = text.encode()
    if len(data) <= most_bytes:
        return text
    half = (most_bytes - 40) // 2
    left, right = data[:half].decode(errors="ignore"), data[-half:].decode(errors="ignore")
    return f"{left} [... {len(data) + left_out - 2 * half} bytes ...] {right}"


def error_text(text: str, most_bytes: int) -> str:
    """Return the text of an error for storage: passwords hidden (first: a cut one is not recognized), cleaned, cut."""
    left_out = max(0, len(text) - _MOST_SEARCHED)
    if left_out:
        text = text[: _MOST_SEARCHED // 2] + text[-_MOST_SEARCHED // 2 :]
    return cut(clean(hide_password(text)), most_bytes, left_out)


def one_line(error: BaseException) -> str:
    """Return the error as ``Type: message`` on one line, at most 2,000 bytes, even if its ``str()`` fails."""
    message = message_of(error)
    line = f"{_name_of_type(error)}: {message}" if message else _name_of_type(error)
    return error_text(" ".join(line.split()), MOST_ERROR_BYTES)


def message_of(error: BaseException) -> str:
    """Return the message of the error on one line, at most 1,800 bytes, even if its ``str()`` fails."""
    try:
        message = str.__str__(str(error))  # a plain str: a handler's own subclass might do anything
    except BaseException as second:
        return f"(its str() raised {_name_of_type(second)})"
    if len(message) > 10 * MOST_ERROR_BYTES:
        message = error_text(message, _MOST_MESSAGE_BYTES)
    return cut(" ".join(clean(hide_password(message)).split()), _MOST_MESSAGE_BYTES)


def _name_of_type(error: BaseException) -> str:
    """Return the name of the error's class, even if its metaclass hides it."""
    return clean(str(type.__dict__["__name__"].__get__(type(error))))


def error_object(error: BaseException) -> str:
    """Return the JSON object of batchq.batches.errors for *error*: error and traceback, 8 KB together."""
    try:
        lines = traceback.format_exception(error, limit=-20)
        trace = error_text("".join(lines), _MOST_TRACEBACK_BYTES)
    except BaseException as second:
        trace = f"(its traceback raised {_name_of_type(second)})"
    return json.dumps({"error": one_line(error), "traceback": trace}, ensure_ascii=False)


def message_object(message: str) -> str:
    """Return the JSON object of batchq.batches.errors for an error without an exception."""
    line = " ".join(hide_password(message).split())
    return json.dumps({"error": error_text(line, MOST_ERROR_BYTES)}, ensure_ascii=False)


def in_letters_of(text: str, encoding: str) -> str:
    """Return *text* with an escape (``\\u20ac``) for each character that *encoding* (Postgres' name) may lack."""
    if encoding in ("UTF8", "SQL_ASCII"):  # SQL_ASCII takes any bytes
        return text
    name = encoding.replace("WIN", "cp")
    try:
        return text.encode(name, "backslashreplace").decode(name)
    except LookupError:  # unknown to Python
        return text.encode("ascii", "backslashreplace").decode()


def plain_object(text: str) -> str:
    """Return the JSON object *text* with an escape for each character outside ASCII in the texts that it has."""
    values = json.loads(text)
    texts = {name: in_letters_of(value, "ascii") for name, value in values.items() if isinstance(value, str)}
    return json.dumps(values | texts)


def period_seconds(text: str) -> float:
    """Return the seconds of a duration such as 90s, 15m, 2h or 3d. Raises ValueError with what is wrong."""
    unit = _SECONDS_A_UNIT.get(text[-1:])
    try:
        number = float(text[:-1]) if unit else float(text)
    except ValueError:
        raise ValueError(f"must be a length of time, for example 90s, 15m, 2h or 3d, not {text!r}") from None
    seconds = number * (unit or 1)
    if not 0 <= seconds < 1e10:
        raise ValueError(f"must be from 0 to 300 years, not {text!r}")
    return seconds
