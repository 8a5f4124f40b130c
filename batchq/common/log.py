"""Structured logs: every line that a handler logs carries its batch."""

import logging
import sys
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from functools import partialmethod
from typing import Any, Protocol, TextIO

import structlog

from batchq.common.outlet import Outlet
from batchq.common.secrets import hide_password
from batchq.common.text import visible, visible_line


class _HasIdentity(Protocol):
    id: int
    kind: str
    attempt: int


_INDENT = "    "
_MOST_CHARACTERS = 100_000  # of a value in a line: no line takes long to make

# Looked up only when a line is logged: a batch that logs nothing costs no more than setting this variable.
current_batch: ContextVar[_HasIdentity | None] = ContextVar("batchq_current_batch", default=None)


def _add_batch(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    batch = current_batch.get()
    if batch is not None:
        event.setdefault("batch_id", batch.id)
        event.setdefault("kind", batch.kind)
        event.setdefault("attempt", batch.attempt)
    return event


def _hide_secrets(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    for name, value in event.items():
        event[name] = hidden(value)
    return event


def _shortened(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def hidden(value: Any) -> Any:
    """Return a value without the passwords in it, also within lists, mappings and exceptions."""
    if isinstance(value, str):
        return hide_password(_shortened(value))
    if isinstance(value, dict):
        return {name: hidden(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(part) for part in value]
    if value is None or isinstance(value, int | float):
        return value
    text = repr(value)  # as the renderer would print it
    shown = hide_password(_shortened(text))
    return shown if shown != text or isinstance(value, BaseException) else value


def spell_out(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    """Make a line safe for a terminal: no text controls it or starts a line (those of a traceback are indented)."""
    return {visible_line(str(name)): _shown_as(name, value) for name, value in event.items()}


def _shown_as(name: str, value: Any) -> Any:
    if name in ("event", "exception", "stack"):
        return ("" if name == "event" else _INDENT) + _indented(str(value))
    text = value if isinstance(value, str) else repr(value)
    shown = visible_line(text)
    return value if shown == text else shown


def _indented(text: str) -> str:
    return visible(text).replace("\n", f"\n{_INDENT}")


def configure(log_format: str, log_level: str) -> None:
    """Send the lines of structlog and `logging` to standard error, as *log_format* (console or json)."""
    before: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _add_batch,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(log_level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = _handler_for(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=_last_processors(log_format))
    )
    logging.basicConfig(handlers=[handler], level=log_level.upper(), force=True)
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # batchq logs these retries itself


class _OutletHandler(logging.Handler):
    """Writes the lines of `logging` to a stream's file; a reader that has stopped delays nobody who logs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.encoding = stream.encoding
        self.outlet = Outlet(stream.fileno(), lambda lines: get_logger().warning("log lines dropped", lines=lines))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            text = _indented(f"--- Logging error ---\n{hide_password(traceback.format_exc())}")
        self.outlet.put(f"{text}\n".encode(self.encoding, "backslashreplace"))

    def flush(self) -> None:
        self.outlet.flush()


def _handler_for(stream: TextIO | None) -> logging.Handler:
    """Return what writes to a stream; None is a stream that was closed before the process began."""
    if stream is None:
        return logging.NullHandler()
    try:
        return _OutletHandler(stream)
    except (OSError, ValueError):  # it is not a file, or is closed
        return logging.StreamHandler(stream)


def _last_processors(log_format: str) -> list[Any]:
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    first = [remove_meta, structlog.processors.format_exc_info, _hide_secrets]
    if log_format == "json":
        return [*first, structlog.processors.JSONRenderer()]
    # A plain traceback: the renderer's own shows the values of local variables, secrets among them.
    plain = structlog.dev.plain_traceback
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return [*first, spell_out, structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=plain)]


def get_logger() -> "_SafeLogger":
    """Return batchq's own logger."""
    return _SafeLogger()


class _SafeLogger:
    """Writes batchq's own lines and raises nothing: a handler may have closed or replaced standard error."""

    def __init__(self) -> None:
        self._logger: Any = structlog.get_logger("batchq")

    def _write(self, level: str, event: str, **fields: Any) -> None:
        with suppress(Exception):
            getattr(self._logger, level)(event, **fields)

    info = partialmethod(_write, "info")  # what happened
    warning = partialmethod(_write, "warning")  # what somebody should know
    error = partialmethod(_write, "error")  # what somebody should act on
