"""Enqueue batches, with one statement or one COPY, in the caller's transaction.

If the caller has a transaction open, the batches exist if, and only if, it commits. Without one, each call commits.
With row security, which COPY does not support, `enqueue_many` inserts a hundred rows per INSERT.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from datetime import datetime
from itertools import islice
from typing import Any, Literal

import psycopg
from psycopg.rows import tuple_row

from batchq.common import traces
from batchq.common.text import json_text
from batchq.errors import InvalidInput
from batchq.postgres.statements import inserts
from batchq.postgres.statements.running import array_text

DEFAULTS: dict[str, Any] = {
    "items": None,
    "queue": "default",
    "priority": 0,
    "run_at": None,
    "delay_seconds": 0,
    "unique_key": None,
    "key": None,
    "max_attempts": 5,
    "max_failed_items": 0,
    "timeout_seconds": None,
    "after": None,
    "on_failure": None,
}
ON_FAILURE = ("wait", "run", "cancel")
MOST_AFTER = 100_000
OnFailure = Literal["wait", "run", "cancel"]
_INFINITY = float("inf")

# Payload and items of each batch, as JSON, and its key if each has its own.
_Texts = Iterator[tuple[str, str | None]] | Iterator[tuple[str, str | None, str | None]]


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
    key: str | None = None,
    max_attempts: int = 5,
    max_failed_items: int = 0,
    timeout_seconds: int | None = None,
    after: Iterable[int] | None = None,
    on_failure: OnFailure | None = None,
) -> int | None:
    """Insert a batch of *kind*; return its id, None if one with the same *unique_key* is live.

    *payload* (default {}) and *items* are JSON; pydantic models in them are dumped. The other arguments are columns of
    batchq.batches; *delay_seconds* counts from the database's now(), *run_at* must have a time zone. With *after*, ids
    of committed batches or of batches of this transaction, it waits until all of them have ended; *on_failure* says
    what happens if one fails or is cancelled (default: "wait"). Raises InvalidInput for what is not JSON,
    psycopg.errors.CheckViolation, with the check's name, for what the table refuses.
    """
    options = dict(locals())
    del options["conn"]
    parameters = _insert_parameters(**options)
    with traces.sending(kind, queue) as trace_context:
        statement = inserts.insert_batch(parameters, trace_context)
        row = conn.cursor(row_factory=tuple_row).execute(*statement, prepare=False).fetchone()
    return row[0] if row else None


async def enqueue_async(
    conn: psycopg.AsyncConnection[Any], kind: str, payload: Any = None, **options: Any
) -> int | None:
    """Async version of `enqueue`, with the same options."""
    parameters = _insert_parameters(kind=kind, payload=payload, **(DEFAULTS | _known(options)))
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
    key: str | Callable[[Any], str | None] | None = None,
    **options: Any,
) -> int:
    """Insert many batches of *kind* by COPY, in one transaction (the caller's, if one is open); return how many.

    Either one batch for each of *payloads*, or *items* in batches of *items_per_batch*, all with the same *payload*.
    Both may be generators: only the batch being written is held in memory. *key*: the key of all batches, or a function
    that returns the key of a payload. *options*: those of `enqueue`, except unique_key. Raises as `enqueue` does; then
    nothing is inserted.
    """
    if (payloads is None) == (items is None):
        raise InvalidInput("enqueue_many takes either payloads or items")
    if items_per_batch < 1:
        raise InvalidInput(f"items_per_batch starts at 1, not {items_per_batch!r}")
    if "unique_key" in options:
        raise InvalidInput("enqueue_many has no unique_key; call enqueue for each")
    if callable(key) and payloads is None:
        raise InvalidInput("a function as the key takes a payload, so it needs payloads, not items")
    texts: _Texts = item_rows(items or (), items_per_batch, payload)
    if payloads is not None:
        texts = _keyed_rows(payloads, key) if callable(key) else _payload_rows(payloads)
    given = _check_options(kind=kind, **(DEFAULTS | _known(options) | {"key": None if callable(key) else key}))
    names = ["payload", "items", "key"] if callable(key) else ["payload", "items"]
    with traces.sending(kind, given["queue"]) as trace_context:
        more = {} if trace_context is None else {"trace_context": trace_context}
        try:
            return _insert_all(conn, inserts.copy_batches, given, more, names, texts)
        except psycopg.errors.FeatureNotSupported:
            # With row security, COPY is refused before it consumes a batch. After any other cause some may be consumed.
            if not inserts.has_row_security(conn):
                raise
            return _insert_all(conn, inserts.insert_batches, given, more, names, texts)


def enqueue_each(conn: psycopg.Connection[Any], kind: str, payloads: Iterable[Any], **options: Any) -> list[int]:
    """Insert a batch of *kind* for each of *payloads*, in one transaction; return their ids, in the same order.

    For batches that others wait for: pass the ids as *after*. By INSERT, a hundred at a time: where ids are not needed,
    `enqueue_many` is faster. *options*: those of `enqueue`, except unique_key. Raises as `enqueue` does.
    """
    if "unique_key" in options:
        raise InvalidInput("enqueue_each has no unique_key; call enqueue for each")
    given = _check_options(kind=kind, **(DEFAULTS | _known(options)))
    texts = _payload_rows(payloads)
    # No savepoint within the caller's transaction: batches that wait for these find them by the transaction's own id.
    is_open = conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE
    with traces.sending(kind, given["queue"]) as trace_context, nullcontext() if is_open else conn.transaction():
        columns, same = _columns_and_values(conn, given)
        more = {} if trace_context is None else {"trace_context": trace_context}
        names = [*columns, *more, "payload", "items"]
        return inserts.insert_returning(conn, names, [*same, *more.values()], texts)


def _insert_all(
    conn: psycopg.Connection[Any],
    insert: Callable[[psycopg.Connection[Any], list[str], list[Any], _Texts], int],
    options: dict[str, Any],
    more: dict[str, Any],
    names: list[str],
    texts: _Texts,
) -> int:
    """Insert the rows of *texts*, whose columns are *names*, with what all share."""
    with conn.transaction():
        columns, same = _columns_and_values(conn, options)
        return insert(conn, [*columns, *more, *names], [*same, *more.values()], texts)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Return *options*. Raises TypeError, as Python does, for one that `enqueue` does not have."""
    if unknown := options.keys() - DEFAULTS.keys():
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(sorted(DEFAULTS))}")
    return options


def _insert_parameters(*, payload: Any, items: Iterable[Any] | None, **options: Any) -> dict[str, Any]:
    return {
        "payload": _payload_text(payload),
        "items": None if items is None else _items_text(items),
        **_check_options(**options),
    }


def _payload_text(payload: Any) -> str:
    return "{}" if payload is None else json_text(payload, "the payload")


def _items_text(items: Iterable[Any]) -> str:
    _check_list("items", items)
    return json_text(list(items), "an item")


def _check_list(name: str, values: object) -> None:
    """Raise InvalidInput for anything but a list or a generator; a mapping or a string is neither."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise InvalidInput(f"{name} must be a list or a generator, not {type(values).__name__}")


def _check_options(**options: Any) -> dict[str, Any]:
    """Return the options. Raises InvalidInput for values that the database would misread instead of refusing them."""
    for name in ("kind", "queue", "unique_key", "key"):
        _check_name(name, options.get(name))
    run_at = options["run_at"]
    if run_at is not None and (not isinstance(run_at, datetime) or run_at.tzinfo is None):
        raise InvalidInput(f"run_at must be a datetime with a time zone, not {run_at!r}")
    if run_at is not None and options["delay_seconds"]:
        raise InvalidInput("give either run_at or delay_seconds")
    for name in ("priority", "max_attempts", "max_failed_items", "timeout_seconds"):
        value = options[name]
        if not isinstance(value, int | None) or isinstance(value, bool):
            raise InvalidInput(f"{name} must be a whole number, not {value!r}")
    _check_flow(options)
    delay_seconds = options["delay_seconds"]
    if not isinstance(delay_seconds, int | float) or not -_INFINITY < delay_seconds < _INFINITY:
        raise InvalidInput(f"delay_seconds must be a number, not {delay_seconds!r}")
    return options


def _check_flow(options: dict[str, Any]) -> None:
    """Check after and on_failure; make a list of after. Raises InvalidInput."""
    if options["on_failure"] not in (None, *ON_FAILURE):
        raise InvalidInput(f"on_failure must be one of {', '.join(ON_FAILURE)}, not {options['on_failure']!r}")
    if options["after"] is None:
        return
    _check_list("after", options["after"])
    options["after"] = ids = list(options["after"])
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool):
            raise InvalidInput(f"after must be ids of batches, as enqueue returns them, not {one!r}")
    if len(ids) > MOST_AFTER:
        raise InvalidInput(
            f"after must have at most {MOST_AFTER:,} ids, not {len(ids):,}; let a batch for each part of them wait, "
            "and one for all of these"
        )


def _check_name(name: str, value: object) -> None:
    """Raise InvalidInput for a name that is not a string, or that Postgres cannot store."""
    if value is None and name in ("unique_key", "key"):
        return
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a text, not {value!r}")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidInput(f"{name} has a NUL character or a lone surrogate, which Postgres cannot store: {value!r}")


# ---------------------------------------------------------------------------------------------------------- by COPY


def _payload_rows(payloads: Iterable[Any]) -> Iterator[tuple[str, str | None]]:
    _check_list("payloads", payloads)
    return ((_payload_text(payload), None) for payload in payloads)


def _keyed_rows(
    payloads: Iterable[Any], key_of: Callable[[Any], str | None]
) -> Iterator[tuple[str, str | None, str | None]]:
    _check_list("payloads", payloads)
    for payload in payloads:
        key = key_of(payload)
        _check_name("key", key)
        yield _payload_text(payload), None, key


def item_rows(items: Iterable[Any], size: int, payload: Any) -> Iterator[tuple[str, str | None]]:
    """Yield payload and items of each batch, as JSON texts."""
    _check_list("items", items)
    text = _payload_text(payload)
    source = iter(items)
    return ((text, _items_text(part)) for part in iter(lambda: list(islice(source, size)), []))


def _columns_and_values(conn: psycopg.Connection[Any], options: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the columns that differ from their defaults, and their values, which all batches share."""
    given = {name: value for name, value in options.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    if delay_seconds := given.pop("delay_seconds", None):
        given["run_at"] = inserts.now_plus(conn, delay_seconds)
    if given.get("after") is not None:
        given["after"] = array_text(given["after"])
    return list(given), list(given.values())
