"""``batchq enqueue --items`` and ``--lines``: a file of items, with a progress bar."""

import io
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import psycopg
from rich.progress import track

from batchq.common.terminal import errors
from batchq.enqueue import enqueue_many
from batchq.errors import InvalidInput


def enqueue(conn: psycopg.Connection[Any], options: Namespace, payload: Any, given: dict[str, Any]) -> int:
    """Enqueue the items of a file; return how many batches they make. Raises InvalidInput that names the line."""
    if options.unique_key is not None:
        raise InvalidInput("--unique-key is for one batch, not for a file of items")
    name = options.items or options.lines
    read = json_items if options.items else text_items
    with opened(name) as source:
        return enqueue_many(
            conn,
            options.kind,
            items=read(name, with_progress(source, name)),
            items_per_batch=options.items_per_batch,
            payload=payload,
            **given,
        )


def opened(name: str) -> AbstractContextManager[TextIO]:
    """Open the file, or standard input for ``-``: UTF-8 whatever the locale, with or without a byte order mark."""
    if name == "-":
        return nullcontext(io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig"))
    try:
        return Path(name).open(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"cannot read {name}: {error.strerror}") from None


def with_progress(source: TextIO, name: str) -> Iterator[str]:
    """Yield the lines, and show on a terminal how far they are."""
    if not errors.is_terminal:
        yield from source
        return
    total = count_lines(name) if Path(name).is_file() else None  # counting would drain a pipe
    yield from track(source, "enqueueing", total=total, console=errors)


def count_lines(name: str) -> int:
    """Return how many lines a file has."""
    with Path(name).open("rb") as source:
        return sum(1 for _ in source)


def json_items(name: str, lines: Iterator[str]) -> Iterator[Any]:
    """Yield the JSON value of each line that is not empty."""
    for number, line in numbered(name, lines):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"line {number} of {name} is no JSON: {error}") from None


def text_items(name: str, lines: Iterator[str]) -> Iterator[str]:
    """Yield each line that is not empty, without its end."""
    for _, line in numbered(name, lines):
        if text := line.rstrip("\r\n"):
            yield text


def numbered(name: str, lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Yield each line with its number, from 1. Raises InvalidInput for what is no UTF-8."""
    try:
        yield from enumerate(lines, 1)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8: {error}") from None
