"""The passwords that batchq knows, and how it keeps them out of logs, errors and stored texts."""

import re
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

# A port, and a path with an @ in it, are not a password: http://host:8080/users/me@there.
# The word "password" as a whole password is an example of batchq's own.
_IN_AN_ADDRESS = re.compile(
    r"(://[^:/?#@\s]{0,500}):(?!\d{1,5}/)(?!password@[^@\s]{0,500}(?!\S))(?:(?:(?!://)[^@\s]){0,2000}@)+"
)
# password=x as in a DSN or a list of variables; 'password': 'x' as in a dict.
_AFTER_ITS_NAME = re.compile(
    r"""(password["']?\s*(?:=|:(?=\s*["']))\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&]+)""", re.IGNORECASE
)
_LEAST_KNOWN_CHARACTERS = 6
_NO_SECRETS = ("batchq", "postgres", "password")  # passwords for experiments, which are words in many messages
SECRET_VARIABLES = ("PGPASSWORD", "BATCHQ_WEB_PASSWORD", "BATCHQ_WEB_TOKEN")
known_passwords: dict[str, re.Pattern[str]] = {}
# Of the batch that runs in this context, if fields are hidden: returns their values; see `hidden.BatchValues`.
values_to_hide: ContextVar[Callable[[], list[str]] | None] = ContextVar("batchq_values_to_hide", default=None)


def hide_password(text: str) -> str:
    """Return *text* with *** for every password: in a DSN, after the word password, and known to `know_password`; and
    for every hidden value of the batch that runs."""
    if (values := values_to_hide.get()) is not None:
        for value in values():
            text = text.replace(value, "***")
    for known in tuple(known_passwords.values()):
        text = known.sub("***", text)
    return _AFTER_ITS_NAME.sub(r"\1***", _IN_AN_ADDRESS.sub(r"\1:***@", text))


def know_password(password: str, *names: str) -> None:
    """Let `hide_password` hide a password in any text, percent-encoded or escaped as well.

    Not if it is shorter than 6 characters, one of *names* (of its user, its database), or a common example: it would
    hide half of many messages.
    """
    if len(password) >= _LEAST_KNOWN_CHARACTERS and password not in (*names, *_NO_SECRETS, *known_passwords):
        known_passwords[password] = re.compile("".join(spellings(char) for char in password))


def know_passwords_of(dsn: str) -> None:
    """Let `hide_password` hide the password of a DSN. A text that is not a DSN fails later, when it is used."""
    with suppress(ProgrammingError):
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
        know_password(parts.get("password", ""), parts.get("user", ""), parts.get("dbname", ""))


def know_keys(text: str) -> None:
    """Let `hide_password` hide the keys of a list such as ``NAME:KEY,NAME:KEY``."""
    for part in text.split(","):
        know_password(part.partition(":")[2].strip())


# Limited: otherwise a text of backslashes would be searched from each of them to its end.
_ESCAPES = r"\\{1,16}"


def spellings(char: str) -> str:
    """Return a pattern for a character: also after backslashes (repr, JSON, DSN), percent-encoded, or as a code."""
    encoded = "".join(f"%{byte:02x}" for byte in char.encode(errors="surrogateescape"))
    ways = [re.escape(char), rf"{_ESCAPES}{re.escape(char)}", encoded, encoded.upper()]
    if char == " ":
        ways.append(r"\+")
    if not char.isascii():
        ways += [rf"{_ESCAPES}u{ord(char):04x}", rf"{_ESCAPES}x{ord(char):02x}"]
    return f"(?:{'|'.join(ways)})"
