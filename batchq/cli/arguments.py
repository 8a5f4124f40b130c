"""What the parsers of several commands share."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from batchq.common import terminal
from batchq.common.numbers import read_whole
from batchq.common.secrets import hide_password
from batchq.settings import Settings

_MOST_SHOWN = 60
_ALIASES = {"databases": ("--database",)}
READING = ("dsn", "databases", "database_timeout_seconds")


class Parser(argparse.ArgumentParser):
    """Prints errors without passwords and hidden characters: they quote arguments, perhaps file names from a shell."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        super().error(terminal.line(hide_password(message)))


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    settings: Sequence[str] = READING,
) -> argparse.ArgumentParser:
    """Add a command with a flag for each of *settings*, the names of fields; return its parser."""
    description = summary[0].upper() + summary[1:] + "."
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=summary, description=description)
    parser.set_defaults(run=run, runs_workers=False)
    if not settings:
        return parser
    group = parser.add_argument_group("settings", "each can also be set as BATCHQ_NAME in the environment or .env")
    for setting in settings:
        description = (Settings.model_fields[setting].description or "").replace("%", "%%")
        flags = ["--" + setting.replace("_", "-"), *_ALIASES.get(setting, ())]
        group.add_argument(*flags, dest=f"set_{setting}", metavar="VALUE", help=description)
    return parser


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add --queue and --kind."""
    parser.add_argument("--queue", type=queue_name, help="show only this queue")
    parser.add_argument("--kind", type=kind_name, help="show only this kind")


def add_id(parser: argparse.ArgumentParser) -> None:
    """Add the batch."""
    parser.add_argument("id", type=batch_id, metavar="ID", help="id of the batch")


def add_interval(parser: argparse.ArgumentParser, default: float | None, default_text: str) -> None:
    """Add --every-seconds."""
    text = f"seconds between two queries (default: {default_text})"
    parser.add_argument("--every-seconds", type=_some_seconds, default=default, metavar="N", help=text)


def batch_id(text: str) -> int:
    """Return a batch's id. A number that cannot be one is refused here, more clearly than by the database."""
    return whole_number(text, 1, 2**63 - 1, "the id of a batch, such as 5562 or 5,562")


def natural(text: str) -> int:
    """Return a whole number."""
    return whole_number(text, 0, 2**31 - 1, "a whole number, from 0 to 2,147,483,647")


def queue_name(text: str) -> str:
    """Return the name of a queue that can exist."""
    return _name(text, "the name of a queue", 128)


def kind_name(text: str) -> str:
    """Return a kind that can exist."""
    return _name(text, "a kind", 200)


def key_name(text: str) -> str:
    """Return a key that can exist."""
    return _name(text, "a key", 500)


def some_text(text: str) -> str:
    """Return a text that is not empty, as one from an unset variable of a shell is."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _name(text: str, what: str, most: int) -> str:
    if not 1 <= (size := len(text.encode())) <= most:
        raise argparse.ArgumentTypeError(f"must be {what}, which has 1 to {most} bytes, not {size:,}")
    return text


def whole_number(text: str, least: int, most: int, what: str) -> int:
    """Return a whole number from *least* to *most*; *what* it is, for the error."""
    return int(_checked(text, read_whole, least, most, what))


def some_number(text: str, least: float, most: float, what: str) -> float:
    """Return a number from *least* to *most*; *what* it is, for the error."""
    return _checked(text, float, least, most, what)


def _some_seconds(text: str) -> float:
    return some_number(text, 0.01, 86_400, "a number of seconds from 0.01 to 86,400")


def _checked(text: str, read: Callable[[str], float], least: float, most: float, what: str) -> float:
    with suppress(ValueError):
        if least <= (number := read(text)) <= most:  # NaN is not
            return number
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    raise argparse.ArgumentTypeError(f"must be {what}, not {shown!r}")
