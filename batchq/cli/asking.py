"""The question on a terminal before many batches are changed."""

import sys
from typing import Any

from batchq.common.terminal import ask, complain


def add_yes(parser: Any) -> None:
    """Add --yes to a parser or a group."""
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask; without a terminal, nothing is asked")


def is_confirmed(question: str, is_yes: bool) -> bool:
    """Ask *question* on standard error; return whether the answer is y. Without a terminal, nobody is asked.

    A script has no terminal, and goes on as if it had passed --yes.
    """
    if is_yes or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    if ask(f"{question} [y/N]").lower() == "y":
        return True
    complain("nothing was changed")
    return False
