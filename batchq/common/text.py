"""Texts that Postgres takes (JSON, and errors cut to a size that people read), and texts in which nothing hides."""

import inspect
import json
import re
import traceback
from typing import Any
from unicodedata import category

from pydantic import BaseModel

from batchq.common.secrets import hide_password
from batchq.errors import InvalidInput

MOST_ERROR_BYTES = 2_000
MOST_MESSAGE_BYTES = 1_800
MOST_TRACEBACK_BYTES = 6_000
MOST_RESULT_BYTES = 1_000_000
MOST_SEARCHED = 40_000  # characters of an error: a password is looked for in no more, and no more is kept
SECONDS_A_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

# \u0000 that is not itself escaped: jsonb has no NUL.
NUL_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

# Control characters, marks that turn the direction of text, characters without width: they would hide or disguise, and
# a terminal obeys some of them. A line break and a tab are fine within a block of text, and forge a row within a line.
HIDDEN_CHARACTERS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U00013440\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff"
)
JOINED = re.compile("[\u0620-\u064a\u066e-\u06d3\u0750-\u077f\u0900-\u0dff]")
HIDDEN = re.compile(f"[{HIDDEN_CHARACTERS}]")
HIDDEN_IN_A_LINE = re.compile(f"[\t\n{HIDDEN_CHARACTERS}]")


def visible(text: str) -> str:
    """Return *text* with its hidden characters spelled out, such as ⟨U+202E⟩; line breaks and tabs are kept."""
    return HIDDEN.sub(spelled_out, text)


def visible_line(text: str) -> str:
    """Do as `visible` does, line breaks and tabs included: the result is one line."""
    return HIDDEN_IN_A_LINE.sub(spelled_out, text)


def visible_json(text: str) -> str:
    """Return JSON text with an escape (``\\u202e``) for each hidden character in its texts: to a program, the same."""
    return HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def spelled_out(found: re.Match[str]) -> str:
    """Return a hidden character as people read it; as it is where it changes how its neighbors look, and so hides
    nothing: the style of a symbol, the joints of an emoji, the forms of Arabic and Indic letters."""
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    if found[0] in "\ufe0e\ufe0f" and is_symbol(before):
        return found[0]
    if found[0] == "\u200d" and (before == "\ufe0f" or is_symbol(before)) and is_symbol(after):
        return found[0]
    if found[0] in "\u200c\u200d" and JOINED.match(before) and JOINED.match(after):
        return found[0]
    return f"⟨U+{ord(found[0]):04X}⟩"


def is_symbol(char: str) -> bool:
    """Return whether a character is a symbol such as ❤ or an emoji, or a color of skin."""
    return char != "" and (category(char) == "So" or "\U0001f3fb" <= char <= "\U0001f3ff")


def json_text(value: Any, what: str) -> str:
    """Return *value* (JSON types, pydantic models within) as JSON text that jsonb takes.

    Raises InvalidInput that begins with *what*, for NaN, NUL characters, lone surrogates and what is no JSON.
    """
    try:
        text = encoder.encode(value)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{what} cannot be stored as JSON: {cut(clean(str(error)), 300)}") from None
    if "\\u0000" in text and NUL_ESCAPE.search(text):
        raise InvalidInput(f"{what} cannot be stored as JSON: it has a NUL character (\\u0000), which Postgres refuses")
    return text


def model_value(value: Any) -> Any:
    """Return what stands for a pydantic model in JSON."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    close_coroutine(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def close_coroutine(value: Any) -> bool:
    """Return whether *value* is a coroutine; close it: nobody will await it, and where the collector found it, Python
    would warn of that in the middle of something else."""
    if not inspect.iscoroutine(value):
        return False
    value.close()
    return True


encoder = json.JSONEncoder(default=model_value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def clean(text: str) -> str:
    """Return *text* without what Postgres refuses: NUL characters and lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def cut(text: str, most_bytes: int, left_out: int = 0) -> str:
    """Return *text*, its middle left out where it is longer than *most_bytes* in UTF-8; *left_out* are gone already."""
    data = text.encode()
    if len(data) <= most_bytes:
        return text
    half = (most_bytes - 40) // 2
    left, right = data[:half].decode(errors="ignore"), data[-half:].decode(errors="ignore")
    return f"{left} [... {len(data) + left_out - 2 * half} bytes ...] {right}"


def error_text(text: str, most_bytes: int) -> str:
    """Return the text of an error as it is stored: passwords hidden, cleaned, cut. Hidden first: half a password, where
    the text is cut, would no longer be known as one."""
    left_out = max(0, len(text) - MOST_SEARCHED)
    if left_out:
        text = text[: MOST_SEARCHED // 2] + text[-MOST_SEARCHED // 2 :]
    return cut(clean(hide_password(text)), most_bytes, left_out)


def one_line(error: BaseException) -> str:
    """Return the error as ``Type: message`` on one line, at most 2,000 bytes, whatever its ``str()`` does."""
    message = message_of(error)
    line = f"{name_of_type(error)}: {message}" if message else name_of_type(error)
    return error_text(" ".join(line.split()), MOST_ERROR_BYTES)


def message_of(error: BaseException) -> str:
    """Return what the error says on one line, at most 1,800 bytes, whatever its ``str()`` does."""
    try:
        message = str.__str__(str(error))  # a plain str: one of a class of the handler's own might do anything
    except BaseException as second:
        return f"(its str() raised {name_of_type(second)})"
    if len(message) > 10 * MOST_ERROR_BYTES:
        message = error_text(message, MOST_MESSAGE_BYTES)
    return cut(" ".join(clean(hide_password(message)).split()), MOST_MESSAGE_BYTES)


def name_of_type(error: BaseException) -> str:
    """Return the name of the error's class, whatever its metaclass says."""
    return clean(str(type.__dict__["__name__"].__get__(type(error))))


def error_object(error: BaseException) -> str:
    """Return the JSON object of batchq.batches.errors for *error*: error and traceback, 8 KB in all."""
    try:
        lines = traceback.format_exception(error, limit=-20)
        trace = error_text("".join(lines), MOST_TRACEBACK_BYTES)
    except BaseException as second:
        trace = f"(its traceback raised {name_of_type(second)})"
    return json.dumps({"error": one_line(error), "traceback": trace}, ensure_ascii=False)


def message_object(message: str) -> str:
    """Return the JSON object of batchq.batches.errors for an error without an exception."""
    line = " ".join(hide_password(message).split())
    return json.dumps({"error": error_text(line, MOST_ERROR_BYTES)}, ensure_ascii=False)


def in_letters_of(text: str, encoding: str) -> str:
    """Return *text* with an escape (``\\u20ac``) for each letter that *encoding*, by Postgres' name, may not have."""
    if encoding in ("UTF8", "SQL_ASCII"):  # SQL_ASCII takes any bytes
        return text
    name = encoding.replace("WIN", "cp")
    try:
        return text.encode(name, "backslashreplace").decode(name)
    except LookupError:  # unknown to Python
        return text.encode("ascii", "backslashreplace").decode()


def plain_object(text: str) -> str:
    """Return the JSON object *text*, its values texts, with an escape for each letter that is not ASCII."""
    values = json.loads(text)
    return json.dumps({name: value.encode("ascii", "backslashreplace").decode() for name, value in values.items()})


def period_seconds(text: str) -> float:
    """Read a length of time, such as 90s, 15m, 2h or 3d; return it in seconds. Raises ValueError, which says more."""
    unit = SECONDS_A_UNIT.get(text[-1:])
    try:
        number = float(text[:-1]) if unit else float(text)
    except ValueError:
        raise ValueError(f"must be such as 90s, 15m, 2h or 3d, not {text!r}") from None
    seconds = number * (unit or 1)
    if not 0 <= seconds < 1e10:
        raise ValueError(f"must be from 0 to 300 years, not {text!r}")
    return seconds
