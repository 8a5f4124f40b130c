"""``batchq demo``: the demo of `batchq.demo`."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import settings_of


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    summary = "run real input through two workers, kill one, check the result"
    parser = add_command(subparsers, "demo", _run, summary, settings=("dsn",))
    parser.add_argument("--directory", help="data directory of the private server (default: in your cache directory)")
    files = "maximum number of files (default: all source files of the standard library)"
    parser.add_argument("--files", type=int, default=0, metavar="N", help=files)
    parser.add_argument("--web", action="store_true", help="show it in the web UI as well; start when its page is open")


def _run(options: Namespace) -> int:
    from batchq.demo import run  # its extra need not be installed for the other commands

    return run(settings_of(options), options.directory, options.files, options.web)
