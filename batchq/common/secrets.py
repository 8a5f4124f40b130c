"""Passwords that batchq knows, and how it keeps them out of logs, errors and stored texts."""

import re
from contextlib import suppress

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

# A port and a path with an @ in it are no password: http://host:8080/users/me@there.
IN_AN_ADDRESS = re.compile(r"(://[^:/?#@\s]{0,500}):(?!\d{1,5}/)(?:(?:(?!://)[^@\s]){0,2000}@)+")
# password=x as in a DSN or a list of variables; 'password': 'x' as in a dict.
AFTER_ITS_NAME = re.compile(
    r"""(password["']?\s*(?:=|:(?=\s*["']))\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&]+)""", re.IGNORECASE
)
LEAST_KNOWN_CHARACTERS = 6
NO_SECRETS = ("batchq", "postgres", "password")  # as passwords for trying things out; they stand in many messages
SECRET_VARIABLES = ("PGPASSWORD", "BATCHQ_WEB_PASSWORD", "BATCHQ_WEB_TOKEN")
known_passwords: dict[str, re.Pattern[str]] = {}


def hide_password(text: str) -> str:
    """Return *text* with every password in it replaced by ***: those of DSNs, those behind the word password, and those
    that `know_password` has been given."""
    for known in tuple(known_passwords.values()):
        text = known.sub("***", text)
    return AFTER_ITS_NAME.sub(r"\1***", IN_AN_ADDRESS.sub(r"\1:***@", text))


def know_password(password: str, *names: str) -> None:
    """Have `hide_password` hide a password wherever it stands, percent-encoded and escaped as well.

    Not one that is shorter than 6 characters, or is one of *names* too (its user's, its database's) or a word that
    everybody knows: half a message would be hidden with it.
    """
    if len(password) >= LEAST_KNOWN_CHARACTERS and password not in (*names, *NO_SECRETS, *known_passwords):
        known_passwords[password] = re.compile("".join(spellings(char) for char in password))


def know_passwords_of(dsn: str) -> None:
    """Do so for the password in a DSN; a text that is no DSN is left to whoever connects."""
    with suppress(ProgrammingError):
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
        know_password(parts.get("password", ""), parts.get("user", ""), parts.get("dbname", ""))


# Bounded: else a text of nothing but backslashes is searched from each of them to its end.
ESCAPES = r"\\{1,16}"


def spellings(char: str) -> str:
    """Return a pattern for a character of a password: as it is, after backslashes (repr, JSON, a DSN of name=value),
    percent-encoded, or by its number."""
    encoded = "".join(f"%{byte:02x}" for byte in char.encode(errors="surrogateescape"))
    ways = [re.escape(char), rf"{ESCAPES}{re.escape(char)}", encoded, encoded.upper()]
    if char == " ":
        ways.append(r"\+")
    if not char.isascii():
        ways += [rf"{ESCAPES}u{ord(char):04x}", rf"{ESCAPES}x{ord(char):02x}"]
    return f"(?:{'|'.join(ways)})"
