"""What comes before everything else where batchq is the program, and not imported by one: `batchq`, `python -m batchq`.

No secret stays in the list of arguments, which other users of the machine can read (``ps``). And the current directory,
which ``python -m`` puts first on the path, goes: ./prometheus_client.py would run in each worker with a metrics port.
Imports nothing that takes time, since the arguments can be read until then.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

SECRET_FLAGS = (b"--dsn", b"--listen-dsn", b"--migration-dsn")
PLACE_OF_ARGUMENTS = slice(45, 47)  # arg_start and arg_end in /proc/self/stat, counted from behind the name


def prepare() -> None:
    """Do so, if batchq is the program."""
    if is_command() or is_module():
        hide_secret_arguments()
    if is_module() and not sys.flags.safe_path:  # with -P, what comes first is not the current directory
        with suppress(OSError):  # the current directory is gone
            if sys.path[:1] in ([""], [os.getcwd()]):
                del sys.path[0]  # batchq.app looks there for the app


def is_command() -> bool:
    """Return whether the command `batchq` runs."""
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "batchq"


def is_module() -> bool:
    """Return whether Python, told ``-m batchq``, is looking for it: it imports the package before it runs it."""
    words = pairwise(sys.orig_argv)
    return sys.argv[:1] == ["-m"] and any(
        option.startswith("-") and option.endswith("m") and module == "batchq" for option, module in words
    )


def hide_secret_arguments() -> None:
    """Overwrite the values of `SECRET_FLAGS` in this process's own list of arguments with asterisks, where the system
    allows: on Linux. What Python has of them stays as it is."""
    with suppress(OSError, ValueError):
        start, end = arguments_in_memory()
        memory = os.open("/proc/self/mem", os.O_RDWR)
        try:
            for place, length in secrets_in(os.pread(memory, end - start, start)):
                os.pwrite(memory, b"*" * length, start + place)
        finally:
            os.close(memory)


def arguments_in_memory() -> tuple[int, int]:
    """Return where the list of arguments begins and ends. Raises OSError, ValueError where the system does not say."""
    with open("/proc/self/stat", "rb") as file:
        after_the_name = file.read().rpartition(b")")[2]  # the program's name may have spaces and brackets in it
    start, end = map(int, after_the_name.split()[PLACE_OF_ARGUMENTS])
    return start, end


def secrets_in(arguments: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each secret stands in a list of arguments, which NUL characters separate, and how long it is."""
    place, is_value = 0, False
    for word in arguments.split(b"\0"):
        flag, has_value, value = word.partition(b"=")
        if is_value:
            yield place, len(word)
            is_value = False
        elif len(flag) > 2 and any(secret.startswith(flag) for secret in SECRET_FLAGS):  # argparse takes --ds as well
            if has_value:
                yield place + len(flag) + 1, len(value)
            is_value = not has_value
        place += len(word) + 1


prepare()
