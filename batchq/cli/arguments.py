"""What the parsers of several commands share."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from batchq.common import terminal
from batchq.common.secrets import hide_password
from batchq.settings import Settings

READING = ("dsn", "database_timeout_seconds")


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
    group = parser.add_argument_group("settings", "each can also be set as BATCHQ_NAME in the environment or .env")
    for setting in settings:
        description = (Settings.model_fields[setting].description or "").replace("%", "%%")
        flag = "--" + setting.replace("_", "-")
        group.add_argument(flag, dest=f"set_{setting}", metavar="VALUE", help=description)
    return parser


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add --queue and --kind."""
    parser.add_argument("--queue", help="show only this queue")
    parser.add_argument("--kind", help="show only this kind")


def add_id(parser: argparse.ArgumentParser) -> None:
    """Add the batch."""
    parser.add_argument("id", type=batch_id, metavar="ID", help="id of the batch")


def add_interval(parser: argparse.ArgumentParser, default: float | None, default_text: str) -> None:
    """Add --every-seconds."""
    text = f"seconds between two queries (default: {default_text})"
    parser.add_argument("--every-seconds", type=_some_seconds, default=default, metavar="N", help=text)


def batch_id(text: str) -> int:
    """Return a batch's id. A number that cannot be one is refused here, more clearly than by the database."""
    return int(_checked(text, int, 1, 2**63 - 1, "the id of a batch"))


def natural(text: str) -> int:
    """Return a whole number."""
    return int(_checked(text, int, 0, 2**63 - 1, "a whole number, 0 or more"))


def _some_seconds(text: str) -> float:
    return _checked(text, float, 0.01, 86_400, "a number of seconds from 0.01 to 86400")


def _checked(text: str, read: Callable[[str], float], least: float, most: float, what: str) -> float:
    with suppress(ValueError):
        if least <= (number := read(text)) <= most:  # NaN is not
            return number
    raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
