"""``batchq enqueue``: one batch, or a file of items (``--items``, ``--lines``, ``--csv``) with a progress bar."""

import csv
import io
import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psycopg
from rich.progress import track

from batchq.cli.arguments import add_command, batch_id, key_name, kind_name, queue_name, some_number, whole_number
from batchq.cli.connections import connected, settings_of
from batchq.cli.known import warn_of_unserved
from batchq.common.numbers import counted
from batchq.common.terminal import errors, put, put_json
from batchq.enqueue import ON_FAILURE, enqueue, enqueue_many
from batchq.errors import BatchqError, InvalidInput
from batchq.postgres.statements import session
from batchq.postgres.transactions import transaction

_A_DAY_SECONDS = 86_400
_ITEMS_PER_BATCH = 1000
_MOST_ITEMS = 1_000_000
_MOST_ATTEMPTS = 32_767
_MOST_WHOLE = 2**31 - 1
_MOST_DELAY_SECONDS = 1e10
_MOST_VALUE_LETTERS = 1_048_576  # of a CSV file: beyond it, a quote is probably not closed
_CSV_HELP = "CSV file with one item per row, as an object of texts by the names in its first row"
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
    "spread",
)


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "enqueue", _run, "enqueue one batch, or a file of items")
    add = parser.add_argument
    add("kind", type=kind_name, metavar="KIND", help="kind of the batch, which names its handler")
    add("--payload", metavar="JSON", help="payload (default: {})")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--items", metavar="FILE", help="file with one item per line, as JSON; - is standard input")
    source.add_argument("--lines", metavar="FILE", help="file with one item per line, as text; - is standard input")
    source.add_argument("--csv", metavar="FILE", help=f"{_CSV_HELP}; - is standard input")
    add("--delimiter", type=_delimiter, metavar="CHAR", help="delimiter of the CSV file, or tab (default: ,)")
    add("--items-per-batch", type=_items, metavar="N", help="most items (default: 1000; with --spread, 1000000)")
    add("--spread", type=_parts, metavar="N", help="number of parts that run at the same time (default: the handler's)")
    add("--queue", type=queue_name, default="default", help="queue (default: default)")
    add("--key", type=key_name, help="key, such as a customer: batches run key by key, in turn (default: none)")
    add("--priority", type=_priority, default=0, metavar="N", help="priority, lower runs first (default: 0)")
    add("--delay-seconds", type=_delay, default=0, metavar="N", help="seconds until the batch is ready (default: 0)")
    unique = "insert nothing while a live batch of this kind (waiting, pending or processing) has this key"
    add("--unique-key", type=_unique_key, metavar="KEY", help=unique)
    add("--max-attempts", type=_attempts, default=5, metavar="N", help="maximum number of attempts (default: 5)")
    add("--max-failed-items", type=_tolerated, default=0, metavar="N", help="failed items to tolerate (default: 0)")
    add("--timeout-seconds", type=_timeout, metavar="N", help="timeout of an attempt, in seconds (default: none)")
    add("--after", type=batch_id, nargs="+", metavar="ID", help="batches that must end first (default: none)")
    add("--on-failure", choices=ON_FAILURE, help="what to do if one of them fails or is cancelled (default: wait)")
    add("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    try:
        payload = json.loads(options.payload) if options.payload is not None else None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"--payload is not valid JSON: {error}") from None
    columns = {name: getattr(options, name) for name in _COLUMNS}
    is_file = bool(options.items or options.lines or options.csv)
    if options.spread is not None and not is_file:
        raise InvalidInput("--spread is for a list of items: give it with --items, --lines or --csv")
    if options.delimiter is not None and not options.csv:
        raise InvalidInput("--delimiter is for a CSV file: give it with --csv")
    result: dict[str, Any]
    settings_of(options).use_encryption_keys()
    with connected(options) as conn:
        with _transaction(conn, options, _A_DAY_SECONDS if is_file else None):  # a file may be long, and a pipe slow
            if is_file:
                result = {"batches": _enqueue_file(conn, options, payload, columns)}
            else:
                result = {"id": enqueue(conn, options.kind, payload, unique_key=options.unique_key, **columns)}
        put_json(result) if options.json else put(_sentence(options, result))
        with suppress(psycopg.Error, BatchqError), _transaction(conn, options):  # it cannot undo what is committed
            warn_of_unserved(conn, options.queue, options.kind)
    return 0


def _transaction(conn: psycopg.Connection[Any], options: Namespace, seconds: float | None = None) -> Any:
    timeout_seconds = seconds or settings_of(options).database_timeout_seconds
    return transaction(conn, timeout_seconds, settings=session.FIXED_FORMATS)


def _priority(text: str) -> int:
    return whole_number(text, -32_768, 32_767, "a whole number from -32,768 to 32,767; lower runs first")


def _attempts(text: str) -> int:
    return whole_number(text, 1, _MOST_ATTEMPTS, f"a number of attempts, 1 to {_MOST_ATTEMPTS:,}")


def _tolerated(text: str) -> int:
    return whole_number(text, 0, _MOST_WHOLE, "a number of items, 0 or more")


def _timeout(text: str) -> int:
    return whole_number(text, 1, _MOST_WHOLE, "a number of seconds, 1 or more")


def _items(text: str) -> int:
    return whole_number(text, 1, _MOST_ITEMS, f"a number of items, 1 to {_MOST_ITEMS:,}")


def _delay(text: str) -> float:
    return some_number(text, -_MOST_DELAY_SECONDS, _MOST_DELAY_SECONDS, "a number of seconds, at most 300 years")


def _unique_key(text: str) -> str:
    if not 1 <= (size := len(text.encode())) <= 1000:
        raise ArgumentTypeError(f"must be a unique key, which has 1 to 1,000 bytes, not {size:,}")
    return text


def _parts(text: str) -> int:
    return whole_number(text, 1, 1000, "a number of parts, 1 to 1000")


def _delimiter(text: str) -> str:
    if text in ("tab", "\\t"):
        return "\t"
    if len(text) != 1 or text in '"\r\n\0':
        raise ArgumentTypeError(f"must be one character other than a quote or a line break, or tab, not {text!r}")
    return text


def _sentence(options: Namespace, result: dict[str, Any]) -> str:
    if "batches" in result:
        return f"enqueued {counted(result['batches'], 'batch')} of {options.kind}"
    if result["id"] is None:
        return f"nothing enqueued: a batch with unique key {options.unique_key!r} is waiting, pending or processing"
    return f"enqueued batch {result['id']}"


# ------------------------------------------------------------------------------------------------------------- files


def _enqueue_file(conn: psycopg.Connection[Any], options: Namespace, payload: Any, columns: dict[str, Any]) -> int:
    """Return the number of batches. Raises InvalidInput that names the line."""
    if options.unique_key is not None:
        raise InvalidInput("--unique-key is for one batch, not for a file of items; leave it out")
    file = options.items or options.lines or options.csv
    name = "standard input" if file == "-" else file  # as errors call it
    read = _json_items if options.items else _text_items
    if options.csv:
        read = partial(_csv_items, options.delimiter or ",")
    with _opened(file, "" if options.csv else None) as source:
        return enqueue_many(
            conn,
            options.kind,
            items=read(name, _with_progress(source, file)),
            items_per_batch=_items_per_batch(options),
            payload=payload,
            **columns,
        )


def _items_per_batch(options: Namespace) -> int:
    if options.items_per_batch is not None:
        return int(options.items_per_batch)
    return _MOST_ITEMS if options.spread else _ITEMS_PER_BATCH


def _opened(name: str, newline: str | None) -> AbstractContextManager[TextIO]:
    """Open the file, or standard input for ``-``: UTF-8 whatever the locale, with or without a byte order mark.

    *newline*: as `open` takes it.
    """
    if name == "-":
        return nullcontext(io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=newline))
    try:
        return Path(name).open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise InvalidInput(f"cannot read {name}: {error.strerror}") from None


def _with_progress(source: TextIO, name: str) -> Iterator[str]:
    """Yield the lines, with a progress bar on a terminal."""
    if not errors().is_terminal:
        yield from source
        return
    total = _count_lines(name) if Path(name).is_file() else None  # counting would drain a pipe
    yield from track(source, "enqueueing", total=total, console=errors())


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


def _csv_items(delimiter: str, name: str, lines: Iterator[str]) -> Iterator[dict[str, str]]:
    rows = _csv_rows(delimiter, name, lines)
    number, header = next(rows, (1, []))
    _check_header(f"{name}, line {number}", header)
    width = len(header)
    for number, row in rows:
        if len(row) != width:
            counts = f"{len(row)} column{'s' * (len(row) != 1)}, but {width} in the first row"
            raise InvalidInput(f"{name}, line {number}: {counts}; quote values that contain {delimiter!r}")
        yield dict(zip(header, row, strict=True))


def _csv_rows(delimiter: str, name: str, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, and the number of the line on which it begins."""
    csv.field_size_limit(_MOST_VALUE_LETTERS)
    reader = csv.reader((line for _, line in _numbered(name, lines)), delimiter=delimiter, strict=True)
    number = 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise InvalidInput(f"{name}, line {number}: {_csv_problem(str(error))}") from None


def _csv_problem(message: str) -> str:
    """Return what is wrong, in other words than those of Python's csv."""
    if message.startswith("unexpected end"):
        return "a quote is not closed; close it, or write a quote within a quoted value twice"
    if "expected after" in message:
        return "text follows a closing quote; write a quote within a quoted value twice"
    if "field limit" in message:
        return f"a value has more than {_MOST_VALUE_LETTERS:,} letters; a quote is probably not closed"
    return f"not valid CSV ({message})"


def _check_header(place: str, names: list[str]) -> None:
    """Raise InvalidInput unless each column has a name of its own."""
    if not names:
        raise InvalidInput(f"{place}: the file is empty; write the names of the columns into the first row")
    for index, name in enumerate(names, 1):
        if not name.strip():
            raise InvalidInput(f"{place}: column {index} has no name; name every column in the first row")
        if name in names[: index - 1]:
            raise InvalidInput(f"{place}: two columns have the name {name!r}; rename one")


def _numbered(name: str, lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(lines, 1)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 ({error}); convert it") from None
