"""``batchq completion``: the script with which a shell completes commands and options. Needs the extra "completion"."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from batchq.cli.arguments import add_command
from batchq.errors import ConfigError

_SHELLS = ("bash", "zsh", "fish")


def add_parser(subparsers: Any, parser_of_all: Callable[[], ArgumentParser]) -> None:
    """Add the command, which describes the commands of *parser_of_all*."""

    def run(options: Namespace) -> int:
        sys.stdout.write(script(parser_of_all(), options.shell))
        return 0

    parser = add_command(
        subparsers,
        "completion",
        run,
        "print the script with which a shell completes commands and options; needs pgbatchq[completion]",
        settings=(),
    )
    parser.epilog = (
        'bash, in ~/.bashrc: eval "$(batchq completion bash)". zsh: batchq completion zsh > a file named _batchq '
        "in a directory of $fpath. fish: batchq completion fish > ~/.config/fish/completions/batchq.fish."
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell")


def script(parser: ArgumentParser, shell: str) -> str:
    """Return the script of a shell. Raises ConfigError where the extra is not installed."""
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            f"batchq completion needs an extra ({error}); run: pip install 'pgbatchq[completion]'"
        ) from None
    _complete_files(parser, shtab.FILE)
    return str(shtab.complete(parser, shell))


def _complete_files(parser: ArgumentParser, how: object) -> None:
    """Have the names of files completed where an argument is a FILE, in all commands."""
    for action in parser._actions:
        if action.metavar == "FILE":
            action.complete = how  # type: ignore[attr-defined]
        elif isinstance(action.choices, dict):
            for command in action.choices.values():
                _complete_files(command, how)
