"""``batchq new-key``: a new key to seal batches with."""

from argparse import ArgumentTypeError, Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.common import sealed
from batchq.common.terminal import put


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "new-key", _run, "print a new key to seal batches with", settings=())
    parser.description = (
        "Print a new random key as an element of BATCHQ_ENCRYPTION_KEYS, NAME:KEY. To rotate keys, see docs/sealed.md."
    )
    parser.add_argument(
        "name", type=_name, metavar="NAME", help="name of the key, for everybody to see, such as 2026-11"
    )


def _run(options: Namespace) -> int:
    put(sealed.new_key(options.name))
    return 0


def _name(text: str) -> str:
    if not sealed.is_id(text):
        raise ArgumentTypeError(
            f"must be a name of 1 to 50 letters, digits, dots, hyphens and underscores, not {text!r}"
        )
    return text
