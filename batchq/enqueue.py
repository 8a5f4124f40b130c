"""Enqueue batches, with one statement or one COPY, in the caller's transaction, on the caller's connection of any kind.

If the caller has a transaction open, or a connection that begins one by itself, the batches exist if, and only if, it
commits. Otherwise each call commits. `enqueue_many` inserts a hundred rows per INSERT where COPY does not work: with
row security, and with drivers that have no COPY (psycopg2 and pg8000 of SQLAlchemy).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal, TypedDict, Unpack

from batchq.common import sealed, traces
from batchq.common.text import json_text
from batchq.errors import InvalidInput
from batchq.postgres import drivers
from batchq.postgres.caller_types import AsyncConnection, SyncConnection
from batchq.postgres.statements import inserts
from batchq.postgres.statements.running import Statement

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
    "spread": None,
}
ON_FAILURE = ("wait", "run", "cancel")
MOST_AFTER = 100_000
OnFailure = Literal["wait", "run", "cancel"]
_INFINITY = float("inf")

# Payload and items of each batch, as JSON, and its key if each has its own.
_Texts = Iterator[tuple[str, str | None]] | Iterator[tuple[str, str | None, str | None]]


class ManyOptions(TypedDict, total=False):
    """The options of `enqueue` that `enqueue_many` has, too, apart from those that it names itself."""

    queue: str
    priority: int
    run_at: datetime | None
    delay_seconds: float
    max_attempts: int
    max_failed_items: int
    timeout_seconds: int | None
    after: Iterable[int] | None
    on_failure: OnFailure | None
    spread: int | None


class EachOptions(ManyOptions, total=False):
    """The options of `enqueue_each`."""

    key: str | None


class EnqueueOptions(EachOptions, total=False):
    """The options of `enqueue`."""

    items: Iterable[Any] | None
    unique_key: str | None


def enqueue(
    conn: SyncConnection,
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
    spread: int | None = None,
) -> int | None:
    """Insert a batch of *kind*; return its id, None if one with the same *unique_key* is live.

    *conn*: psycopg's Connection, SQLAlchemy's Connection or Session, or Django's connection; the batch is in its
    transaction. *payload* (default {}) and *items* are JSON; pydantic models in them are dumped. The other arguments
    are columns of batchq.batches; *delay_seconds* counts from the database's now(), *run_at* must have a time zone.
    With *after*, ids of committed batches or of batches of this transaction, it waits until all of them have ended;
    *on_failure* says what happens if one fails or is cancelled (default: "wait"). *spread*: in how many parts, 1 to
    1,000, all workers together work the items (default: what the item handler says). If this program has encryption
    keys, payload and items are sealed. Raises ConfigError if they must be and there are no keys, InvalidInput for what
    is not JSON and for another connection, and the driver's error (psycopg.errors.CheckViolation, SQLAlchemy's and
    Django's IntegrityError), with the check's name, for what the table refuses.
    """
    options = dict(locals())
    del options["conn"]
    parameters = _insert_parameters(**options)
    with traces.sending(kind, queue) as trace_context:
        rows = drivers.run(conn, inserts.insert_batch(parameters, trace_context))
    return rows[0][0] if rows else None


async def enqueue_async(
    conn: AsyncConnection, kind: str, payload: Any = None, **options: Unpack[EnqueueOptions]
) -> int | None:
    """Async version of `enqueue`, with the same options.

    *conn*: psycopg's AsyncConnection, SQLAlchemy's AsyncConnection or AsyncSession, or asyncpg's Connection.
    """
    parameters = _insert_parameters(kind=kind, payload=payload, **(DEFAULTS | _known(options, EnqueueOptions)))
    with traces.sending(kind, parameters["queue"]) as trace_context:
        rows = await drivers.run_async(conn, inserts.insert_batch(parameters, trace_context))
    return rows[0][0] if rows else None


def enqueue_many(
    conn: SyncConnection,
    kind: str,
    payloads: Iterable[Any] | None = None,
    *,
    items: Iterable[Any] | None = None,
    items_per_batch: int = 1000,
    payload: Any = None,
    key: str | Callable[[Any], str | None] | None = None,
    **options: Unpack[ManyOptions],
) -> int:
    """Insert many batches of *kind* by COPY, in one transaction (the caller's, if it has one); return how many.

    Either one batch for each of *payloads*, or *items* in batches of *items_per_batch*, all with the same *payload*.
    Both may be generators: only the batches being written are held in memory. *key*: the key of all batches, or a
    function that returns the key of a payload. *conn* and *options*: those of `enqueue`, except unique_key. Raises as
    `enqueue` does (errors during COPY are those of psycopg and asyncpg themselves); then nothing is inserted, and what
    the caller's transaction did before is kept.
    """
    rows = _many_rows(kind, payloads, items, items_per_batch, payload, key, options)
    with traces.sending(kind, rows.queue) as trace_context:
        return _insert_many(conn, rows, trace_context)


async def enqueue_many_async(
    conn: AsyncConnection,
    kind: str,
    payloads: Iterable[Any] | None = None,
    *,
    items: Iterable[Any] | None = None,
    items_per_batch: int = 1000,
    payload: Any = None,
    key: str | Callable[[Any], str | None] | None = None,
    **options: Unpack[ManyOptions],
) -> int:
    """Async version of `enqueue_many`, with the same options, for the connections of `enqueue_async`."""
    rows = _many_rows(kind, payloads, items, items_per_batch, payload, key, options)
    with traces.sending(kind, rows.queue) as trace_context:
        if drivers.is_sqlalchemy(conn):
            return await drivers.run_sync(conn, _insert_many, rows, trace_context)
        return await _insert_many_async(conn, rows, trace_context)


def enqueue_each(conn: SyncConnection, kind: str, payloads: Iterable[Any], **options: Unpack[EachOptions]) -> list[int]:
    """Insert a batch of *kind* for each of *payloads*, in one transaction; return their ids, in the same order.

    For batches that others wait for: pass the ids as *after*. By INSERT, a hundred at a time: where ids are not needed,
    `enqueue_many` is faster. *conn* and *options*: those of `enqueue`, except items and unique_key. Raises as `enqueue`
    does; an error leaves the caller's transaction as one of its own statements would.
    """
    rows = _each_rows(kind, payloads, options)
    with traces.sending(kind, rows.queue) as trace_context:
        return _insert_each(conn, rows, trace_context)


async def enqueue_each_async(
    conn: AsyncConnection, kind: str, payloads: Iterable[Any], **options: Unpack[EachOptions]
) -> list[int]:
    """Async version of `enqueue_each`, with the same options, for the connections of `enqueue_async`."""
    rows = _each_rows(kind, payloads, options)
    with traces.sending(kind, rows.queue) as trace_context:
        if drivers.is_sqlalchemy(conn):
            return await drivers.run_sync(conn, _insert_each, rows, trace_context)
        ids: list[int] = []
        async with drivers.transaction_async(conn):
            for statement in rows.inserts(trace_context):
                ids += [batch_id for (batch_id,) in await drivers.run_async(conn, statement)]
        return ids


# --------------------------------------------------------------------------------------------------------- many rows


@dataclass(frozen=True)
class _Rows:
    """Batches to insert: the options that all share, where they differ from the defaults, and each one's own columns.

    The columns *own* are those of *texts*, which can be read once.
    """

    shared: dict[str, Any]
    own: tuple[str, ...]
    texts: _Texts

    @property
    def queue(self) -> str:
        return str(self.shared.get("queue", DEFAULTS["queue"]))

    def inserts(self, trace_context: str | None) -> Iterator[Statement]:
        """Yield the statements that insert them."""
        return inserts.insert_blocks(self._with(trace_context), self.own, self.texts)

    def copied(self, trace_context: str | None, run_at: str) -> tuple[list[str], Iterator[str]]:
        """Return the columns of a COPY, and its text in blocks. *run_at*: the time after the delay, if there is one."""
        same = self._with(trace_context)
        if same.pop("delay_seconds", None):
            same["run_at"] = run_at
        return [*same, *self.own], inserts.copy_blocks(same.values(), self.texts)

    def _with(self, trace_context: str | None) -> dict[str, Any]:
        return self.shared | ({} if trace_context is None else {"trace_context": trace_context})


def _insert_many(conn: Any, rows: _Rows, trace_context: str | None) -> int:
    with drivers.transaction(conn) as is_own:
        [(has_row_security, run_at)] = drivers.run(conn, inserts.copy_facts(rows.shared.get("delay_seconds", 0)))
        with nullcontext() if is_own else drivers.savepoint(conn):
            if not has_row_security:
                count = drivers.copy(conn, *rows.copied(trace_context, run_at))
                if count is not None:
                    return count
            return sum(len(drivers.run(conn, statement)) for statement in rows.inserts(trace_context))


async def _insert_many_async(conn: Any, rows: _Rows, trace_context: str | None) -> int:
    async with drivers.transaction_async(conn) as is_own:
        facts = inserts.copy_facts(rows.shared.get("delay_seconds", 0))
        [(has_row_security, run_at)] = await drivers.run_async(conn, facts)
        async with nullcontext() if is_own else drivers.savepoint_async(conn):
            if not has_row_security:
                return await drivers.copy_async(conn, *rows.copied(trace_context, run_at))
            return sum([len(await drivers.run_async(conn, one)) for one in rows.inserts(trace_context)])


def _insert_each(conn: Any, rows: _Rows, trace_context: str | None) -> list[int]:
    # No savepoint within the caller's transaction: batches that wait for these find them by the transaction's own id.
    with drivers.transaction(conn):
        return [batch_id for statement in rows.inserts(trace_context) for (batch_id,) in drivers.run(conn, statement)]


def _many_rows(
    kind: str,
    payloads: Iterable[Any] | None,
    items: Iterable[Any] | None,
    items_per_batch: int,
    payload: Any,
    key: str | Callable[[Any], str | None] | None,
    options: ManyOptions,
) -> _Rows:
    if (payloads is None) == (items is None):
        raise InvalidInput("enqueue_many takes either payloads or items")
    if items_per_batch < 1:
        raise InvalidInput(f"items_per_batch starts at 1, not {items_per_batch!r}")
    if "unique_key" in options:
        raise InvalidInput("enqueue_many has no unique_key; call enqueue for each")
    if callable(key) and payloads is None:
        raise InvalidInput("a function as the key takes a payload, so it needs payloads, not items")
    shared = _shared(kind, {**_known(options, ManyOptions), "key": None if callable(key) else key})
    if payloads is None:
        texts: _Texts = item_rows(items or (), items_per_batch, payload, kind)
    else:
        texts = _keyed_rows(payloads, key, kind) if callable(key) else _payload_rows(payloads, kind)
    return _Rows(shared, ("payload", "items", "key") if callable(key) else ("payload", "items"), texts)


def _each_rows(kind: str, payloads: Iterable[Any], options: EachOptions) -> _Rows:
    if "unique_key" in options:
        raise InvalidInput("enqueue_each has no unique_key; call enqueue for each")
    return _Rows(_shared(kind, _known(options, EachOptions)), ("payload", "items"), _payload_rows(payloads, kind))


def _shared(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults, as values of a statement. Raises as `_check_options` does."""
    given = _check_options(kind=kind, **(DEFAULTS | dict(options)))
    return inserts.as_texts({name: value for name, value in given.items() if name == "kind" or value != DEFAULTS[name]})


# --------------------------------------------------------------------------------------------------------- options


def _known(options: Mapping[str, Any], known: type[ManyOptions]) -> dict[str, Any]:
    """Return *options*. Raises TypeError, as Python does, for one that the function does not have."""
    names = known.__annotations__
    if unknown := options.keys() - names.keys():
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    return dict(options)


def _insert_parameters(*, payload: Any, items: Iterable[Any] | None, **options: Any) -> dict[str, Any]:
    kind, checked = options["kind"], _check_options(**options)
    return {
        "payload": payload_text(payload, kind),
        "items": None if items is None else _items_text(items, kind),
        **checked,
    }


def payload_text(payload: Any, kind: str, what: str = "the payload") -> str:
    """Return the payload of a batch as JSON text, sealed if this program has keys. Raises InvalidInput for what is not
    JSON, ConfigError without keys for a kind that must be sealed."""
    text = "{}" if payload is None else json_text(payload, what)
    keys = sealed.keys_for(kind)
    return text if keys is None else keys.seal(text, kind, "payload")


def _items_text(items: Iterable[Any], kind: str) -> str:
    _check_list("items", items)
    keys = sealed.keys_for(kind)
    if keys is None:
        return json_text(list(items), "an item")
    return keys.seal_items([json_text(item, "an item") for item in items], kind)


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
    for name in ("priority", "max_attempts", "max_failed_items", "timeout_seconds", "spread"):
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


# ---------------------------------------------------------------------------------------------------------- JSON


def _payload_rows(payloads: Iterable[Any], kind: str) -> Iterator[tuple[str, str | None]]:
    _check_list("payloads", payloads)
    sealed.keys_for(kind)  # before the first row, for its error
    return ((payload_text(payload, kind), None) for payload in payloads)


def _keyed_rows(
    payloads: Iterable[Any], key_of: Callable[[Any], str | None], kind: str
) -> Iterator[tuple[str, str | None, str | None]]:
    _check_list("payloads", payloads)
    for payload in payloads:
        key = key_of(payload)
        _check_name("key", key)
        yield payload_text(payload, kind), None, key


def item_rows(items: Iterable[Any], size: int, payload: Any, kind: str) -> Iterator[tuple[str, str | None]]:
    """Yield payload and items of each batch, as JSON texts."""
    _check_list("items", items)
    text = payload_text(payload, kind)
    source = iter(items)
    return ((text, _items_text(part, kind)) for part in iter(lambda: list(islice(source, size)), []))
