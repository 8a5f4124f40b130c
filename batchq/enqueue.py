"""Enqueue: one statement, or one COPY, in the caller's transaction.

The batch exists if, and only if, the caller's transaction commits; nothing here commits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from batchq.common import traces
from batchq.common.text import json_text
from batchq.errors import InvalidInput
from batchq.postgres.statements import inserts

INFINITY = float("inf")


def enqueue(
    conn: psycopg.Connection[Any],
    kind: str,
    payload: Any = None,
    *,
    items: Iterable[Any] | None = None,
    queue: str = "default",
    priority: int = 0,
    run_at: datetime | None = None,
    delay_seconds: float = 0,
    unique_key: str | None = None,
    max_attempts: int = 5,
    max_failed_items: int = 0,
    timeout_seconds: int | None = None,
) -> int | None:
    """Insert a batch of *kind*; return its id, None if one with the same *unique_key* is pending or processing.

    *payload* (default {}) and *items* are JSON; pydantic models within them are dumped. The other arguments are the
    columns of batchq.batches; *delay_seconds* counts from the database's now(), *run_at* must have a time zone.
    Raises InvalidInput for what is no JSON, psycopg.errors.CheckViolation for what the table refuses, by name.
    """
    parameters = insert_parameters(
        kind=kind,
        payload=payload,
        items=items,
        queue=queue,
        priority=priority,
        run_at=run_at,
        delay_seconds=delay_seconds,
        unique_key=unique_key,
        max_attempts=max_attempts,
        max_failed_items=max_failed_items,
        timeout_seconds=timeout_seconds,
    )
    with traces.sending(kind, queue) as trace_context:
        statement = inserts.insert_batch(parameters, trace_context)
        row = conn.cursor(row_factory=tuple_row).execute(*statement, prepare=False).fetchone()
    return row[0] if row else None


async def enqueue_async(
    conn: psycopg.AsyncConnection[Any], kind: str, payload: Any = None, **options: Any
) -> int | None:
    """Do as `enqueue` does, with the same options, on an asyncio connection."""
    parameters = insert_parameters(kind=kind, payload=payload, **(DEFAULTS | known(options)))
    cursor = conn.cursor(row_factory=tuple_row)
    with traces.sending(kind, parameters["queue"]) as trace_context:
        statement = inserts.insert_batch(parameters, trace_context)
        row = await (await cursor.execute(*statement, prepare=False)).fetchone()
    return row[0] if row else None


def enqueue_many(
    conn: psycopg.Connection[Any],
    kind: str,
    payloads: Iterable[Any] | None = None,
    *,
    items: Iterable[Any] | None = None,
    items_per_batch: int = 1000,
    payload: Any = None,
    **options: Any,
) -> int:
    """Insert many batches of *kind* by COPY, in one transaction (the caller's, if one is open); return how many.

    Either a batch for each of *payloads*; or *items* cut into batches of *items_per_batch*, all with
    the same *payload*.
    Both may be generators: nothing is held in memory but the batch being written. *options*: those of `enqueue`, but
    unique_key. Raises as `enqueue` does; then nothing is inserted.
    """
    if (payloads is None) == (items is None):
        raise InvalidInput("enqueue_many takes either payloads or items")
    if items_per_batch < 1:
        raise InvalidInput(f"items_per_batch starts at 1, not {items_per_batch!r}")
    if "unique_key" in options:
        raise InvalidInput("enqueue_many has no unique_key; call enqueue for each")
    texts = payload_rows(payloads) if payloads is not None else item_rows(items or (), items_per_batch, payload)
    given = check_options(kind=kind, **(DEFAULTS | known(options)))
    with traces.sending(kind, given["queue"]) as trace_context:
        more = {} if trace_context is None else {"trace_context": trace_context}
        try:
            return insert_all(conn, inserts.copy_batches, given, more, texts)
        except psycopg.errors.FeatureNotSupported:
            # With row security COPY is refused before it takes a text. Whatever else raised this may have taken some.
            if not inserts.has_row_security(conn):
                raise
            return insert_all(conn, inserts.insert_batches, given, more, texts)


def insert_all(
    conn: psycopg.Connection[Any],
    insert: Callable[[psycopg.Connection[Any], list[str], list[Any], "Texts"], int],
    options: dict[str, Any],
    more: dict[str, Any],
    texts: "Texts",
) -> int:
    """Insert all batches, or none; return how many."""
    with conn.transaction():
        columns, same = columns_and_values(conn, options)
        return insert(conn, [*columns, *more, "payload", "items"], [*same, *more.values()], texts)


DEFAULTS: dict[str, Any] = {
    "items": None,
    "queue": "default",
    "priority": 0,
    "run_at": None,
    "delay_seconds": 0,
    "unique_key": None,
    "max_attempts": 5,
    "max_failed_items": 0,
    "timeout_seconds": None,
}


def known(options: dict[str, Any]) -> dict[str, Any]:
    """Return *options*. Raises TypeError for one that `enqueue` does not have, as Python does."""
    if unknown := options.keys() - DEFAULTS.keys():
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(sorted(DEFAULTS))}")
    return options


def insert_parameters(*, payload: Any, items: Iterable[Any] | None, **options: Any) -> dict[str, Any]:
    """Return the parameters of the INSERT. Raises InvalidInput."""
    return {
        "payload": payload_text(payload),
        "items": None if items is None else items_text(items),
        **check_options(**options),
    }


def payload_text(payload: Any) -> str:
    """Return a payload as JSON text; None is {}."""
    return "{}" if payload is None else json_text(payload, "the payload")


def items_text(items: Iterable[Any]) -> str:
    """Return items as the text of a JSON array. Raises InvalidInput."""
    check_list("items", items)
    return json_text(list(items), "an item")


def check_list(name: str, values: object) -> None:
    """Raise InvalidInput for what is no list or generator; a mapping or a text is none either."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise InvalidInput(f"{name} must be a list or a generator, not {type(values).__name__}")


def check_options(**options: Any) -> dict[str, Any]:
    """Return the options. Raises InvalidInput for those that the database would misread rather than refuse."""
    for name in ("kind", "queue", "unique_key"):
        check_name(name, options.get(name))
    run_at = options["run_at"]
    if run_at is not None and (not isinstance(run_at, datetime) or run_at.tzinfo is None):
        raise InvalidInput(f"run_at must be a datetime with a time zone, not {run_at!r}")
    if run_at is not None and options["delay_seconds"]:
        raise InvalidInput("give either run_at or delay_seconds")
    for name in ("priority", "max_attempts", "max_failed_items", "timeout_seconds"):
        value = options[name]
        if not isinstance(value, int | None) or isinstance(value, bool):
            raise InvalidInput(f"{name} must be a whole number, not {value!r}")
    delay_seconds = options["delay_seconds"]
    if not isinstance(delay_seconds, int | float) or not -INFINITY < delay_seconds < INFINITY:
        raise InvalidInput(f"delay_seconds must be a number, not {delay_seconds!r}")
    return options


def check_name(name: str, value: object) -> None:
    """Raise InvalidInput for a name that is no text, or a text that Postgres has no way to store."""
    if value is None and name == "unique_key":
        return
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a text, not {value!r}")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidInput(f"{name} has a NUL character or a lone surrogate, which Postgres cannot store: {value!r}")


# ---------------------------------------------------------------------------------------------------------- by COPY

Texts = Iterator[tuple[str, str | None]]


def payload_rows(payloads: Iterable[Any]) -> Texts:
    """Yield payload and items (None) of a batch for each payload."""
    check_list("payloads", payloads)
    return ((payload_text(payload), None) for payload in payloads)


def item_rows(items: Iterable[Any], size: int, payload: Any) -> Texts:
    """Yield payload and items of each batch of *size* items."""
    check_list("items", items)
    text = payload_text(payload)
    source = iter(items)
    return ((text, items_text(part)) for part in iter(lambda: list(islice(source, size)), []))


def columns_and_values(conn: psycopg.Connection[Any], options: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the columns that differ from the defaults, and their values: the same for each batch."""
    given = {name: value for name, value in options.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    if delay_seconds := given.pop("delay_seconds", None):
        given["run_at"] = inserts.now_plus(conn, delay_seconds)
    return list(given), list(given.values())
