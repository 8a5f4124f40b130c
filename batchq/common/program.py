"""What runs first where batchq is the program and not imported by one: `batchq`, `python -m batchq`.

Secrets are overwritten in the list of arguments, which other users of the machine can read (``ps``). And the current
directory, which ``python -m`` puts first on the path, is removed from it: ./prometheus_client.py would run in each
worker with a metrics port. Imports nothing that takes time, since the arguments can be read until then.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

_SECRET_FLAGS = (b"--dsn", b"--listen-dsn", b"--migration-dsn")
_ARGUMENT_FIELDS = slice(45, 47)  # arg_start and arg_end in /proc/self/stat, counted after the name


def prepare() -> None:
    """Hide secret arguments and clean the path, if batchq is the program."""
    if _is_command() or _is_module():
        hide_secret_arguments()
    if _is_module() and not sys.flags.safe_path:  # with -P, the first entry is not the current directory
        with suppress(OSError):  # the current directory is gone
            if sys.path[:1] in ([""], [os.getcwd()]):
                del sys.path[0]  # batchq.app looks there for the app


def _is_command() -> bool:
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "batchq"


def _is_module() -> bool:
    """Return whether this is ``python -m batchq``, which imports the package before it runs it."""
    words = pairwise(sys.orig_argv)
    return sys.argv[:1] == ["-m"] and any(
        option.startswith("-") and option.endswith("m") and module == "batchq" for option, module in words
    )


def hide_secret_arguments() -> None:
    """Overwrite secrets in this process's own list of arguments, not in `sys.argv`; only Linux allows it."""
    with suppress(OSError, ValueError):
        start, end = _arguments_in_memory()
        memory = os.open("/proc/self/mem", os.O_RDWR)
        try:
            for index, length in secrets_in(os.pread(memory, end - start, start)):
                os.pwrite(memory, b"*" * length, start + index)
        finally:
            os.close(memory)


def _arguments_in_memory() -> tuple[int, int]:
    """Return where the list of arguments begins and ends. Raises OSError or ValueError where that is unknown."""
    with open("/proc/self/stat", "rb") as file:
        after_the_name = file.read().rpartition(b")")[2]  # the program's name may have spaces and brackets in it
    start, end = map(int, after_the_name.split()[_ARGUMENT_FIELDS])
    return start, end


def secrets_in(arguments: bytes) -> Iterator[tuple[int, int]]:
    """Yield index and length of each secret in a list of arguments, which NUL characters separate."""
    index, is_value = 0, False
    for word in arguments.split(b"\0"):
        flag, has_value, value = word.partition(b"=")
        if is_value:
            yield index, len(word)
            is_value = False
        elif len(flag) > 2 and any(secret.startswith(flag) for secret in _SECRET_FLAGS):  # argparse takes --ds as well
            if has_value:
                yield index + len(flag) + 1, len(value)
            is_value = not has_value
        index += len(word) + 1


prepare()
