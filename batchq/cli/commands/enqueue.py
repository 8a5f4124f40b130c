"""``batchq enqueue``: one batch, or a file of items (``--items``, ``--lines``) with a progress bar."""

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

from batchq.cli.arguments import add_command, batch_id
from batchq.cli.connections import database
from batchq.common.terminal import errors, put, put_json
from batchq.enqueue import ON_FAILURE, enqueue, enqueue_many
from batchq.errors import InvalidInput

_A_DAY_SECONDS = 86_400
_COLUMNS = (
    "queue",
    "key",
    "priority",
    "delay_seconds",
    "max_attempts",
    "max_failed_items",
    "timeout_seconds",
    "after",
    "on_failure",
)


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "enqueue", _run, "enqueue one batch, or a file of items")
    add = parser.add_argument
    add("kind", metavar="KIND", help="kind of the batch, which names its handler")
    add("--payload", metavar="JSON", help="payload (default: {})")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--items", metavar="FILE", help="file with one item per line, as JSON; - is standard input")
    source.add_argument("--lines", metavar="FILE", help="file with one item per line, as text; - is standard input")
    add("--items-per-batch", type=int, default=1000, metavar="N", help="maximum number of items (default: 1000)")
    add("--queue", default="default", help="queue (default: default)")
    add("--key", help="key, such as a customer: batches run key by key, in turn (default: none)")
    add("--priority", type=int, default=0, metavar="N", help="priority, lower runs first (default: 0)")
    add("--delay-seconds", type=float, default=0, metavar="N", help="seconds until the batch is ready (default: 0)")
    unique = "insert nothing while a live batch of this kind (waiting, pending or processing) has this key"
    add("--unique-key", metavar="KEY", help=unique)
    add("--max-attempts", type=int, default=5, metavar="N", help="maximum number of attempts (default: 5)")
    add("--max-failed-items", type=int, default=0, metavar="N", help="failed items that are tolerated (default: 0)")
    add("--timeout-seconds", type=int, metavar="N", help="timeout of an attempt, in seconds (default: none)")
    add("--after", type=batch_id, nargs="+", metavar="ID", help="batches that must end first (default: none)")
    add("--on-failure", choices=ON_FAILURE, help="what to do if one of them fails or is cancelled (default: wait)")
    add("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    try:
        payload = json.loads(options.payload) if options.payload is not None else None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"--payload is not valid JSON: {error}") from None
    columns = {name: getattr(options, name) for name in _COLUMNS}
    is_file = bool(options.items or options.lines)
    result: dict[str, Any]
    with database(options, _A_DAY_SECONDS if is_file else None) as conn:  # a file may be long, and a pipe slow
        if is_file:
            result = {"batches": _enqueue_file(conn, options, payload, columns)}
        else:
            result = {"id": enqueue(conn, options.kind, payload, unique_key=options.unique_key, **columns)}
    put_json(result) if options.json else put(_sentence(options, result))
    return 0


def _sentence(options: Namespace, result: dict[str, Any]) -> str:
    if "batches" in result:
        return f"enqueued {result['batches']:,} batches of {options.kind}"
    if result["id"] is None:
        return f"nothing enqueued: a batch with unique key {options.unique_key!r} is waiting, pending or processing"
    return f"enqueued batch {result['id']}"


# ------------------------------------------------------------------------------------------------------------- files


def _enqueue_file(conn: psycopg.Connection[Any], options: Namespace, payload: Any, columns: dict[str, Any]) -> int:
    """Return the number of batches. Raises InvalidInput that names the line."""
    if options.unique_key is not None:
        raise InvalidInput("--unique-key is for one batch, not for a file of items; leave it out")
    name = options.items or options.lines
    read = _json_items if options.items else _text_items
    with _opened(name) as source:
        return enqueue_many(
            conn,
            options.kind,
            items=read(name, _with_progress(source, name)),
            items_per_batch=options.items_per_batch,
            payload=payload,
            **columns,
        )


def _opened(name: str) -> AbstractContextManager[TextIO]:
    """Open the file, or standard input for ``-``: UTF-8 whatever the locale, with or without a byte order mark."""
    if name == "-":
        return nullcontext(io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig"))
    try:
        return Path(name).open(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"cannot read {name}: {error.strerror}") from None


def _with_progress(source: TextIO, name: str) -> Iterator[str]:
    """Yield the lines, with a progress bar on a terminal."""
    if not errors.is_terminal:
        yield from source
        return
    total = _count_lines(name) if Path(name).is_file() else None  # counting would drain a pipe
    yield from track(source, "enqueueing", total=total, console=errors)


def _count_lines(name: str) -> int:
    with Path(name).open("rb") as source:
        return sum(1 for _ in source)


def _json_items(name: str, lines: Iterator[str]) -> Iterator[Any]:
    for number, line in _numbered(name, lines):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                advice = "write one JSON value per line, or use --lines"
                raise InvalidInput(f"{name}, line {number}: not valid JSON ({error}); {advice}") from None


def _text_items(name: str, lines: Iterator[str]) -> Iterator[str]:
    for _, line in _numbered(name, lines):
        if text := line.rstrip("\r\n"):
            yield text


def _numbered(name: str, lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(lines, 1)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 ({error}); convert it") from None
