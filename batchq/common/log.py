"""Structured logs: every line that a handler logs carries its batch."""

import logging
import sys
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

import structlog

from batchq.common.outlet import Outlet
from batchq.common.secrets import hide_password
from batchq.common.text import visible, visible_line


class HasIdentity(Protocol):
    """What a log line says of a batch."""

    id: int
    kind: str
    attempt: int


INDENT = "    "
MOST_CHARACTERS = 100_000  # of a value in a line

# Looked up only when a line is logged: a batch that logs nothing costs no more than setting this variable.
current_batch: ContextVar[HasIdentity | None] = ContextVar("batchq_current_batch", default=None)


def add_batch(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    """Add batch_id, kind and attempt of the batch that the calling handler works."""
    batch = current_batch.get()
    if batch is not None:
        event.setdefault("batch_id", batch.id)
        event.setdefault("kind", batch.kind)
        event.setdefault("attempt", batch.attempt)
    return event


def hide_secrets(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    """Hide passwords of DSNs in every text of the line."""
    for name, value in event.items():
        event[name] = hidden(value)
    return event


def shortened(text: str) -> str:
    """Return a text without its middle where it is very long: no line takes long to make."""
    half = MOST_CHARACTERS // 2
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def hidden(value: Any) -> Any:
    """Return a value of a line with the passwords in it hidden, also within lists, mappings and exceptions."""
    if isinstance(value, str):
        return hide_password(shortened(value))
    if isinstance(value, dict):
        return {name: hidden(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(part) for part in value]
    if value is None or isinstance(value, int | float):
        return value
    text = repr(value)  # what the renderer would make of it
    shown = hide_password(shortened(text))
    return shown if shown != text or isinstance(value, BaseException) else value


def spell_out(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    """Make of everything in a line what a terminal can be shown: a text from outside neither steers the terminal nor
    begins a line. The further lines of an event or a traceback are indented."""
    return {visible_line(str(name)): shown_as(name, value) for name, value in event.items()}


def shown_as(name: str, value: Any) -> Any:
    """Return a field of a line as it is shown; what is not text as it is, unless its repr hides something."""
    if name in ("event", "exception", "stack"):
        return ("" if name == "event" else INDENT) + indented(str(value))
    text = value if isinstance(value, str) else repr(value)
    shown = visible_line(text)
    return value if shown == text else shown


def indented(text: str) -> str:
    """Return a text of several lines, all but the first indented."""
    return visible(text).replace("\n", f"\n{INDENT}")


def configure(log_format: str, log_level: str) -> None:
    """Send the lines of structlog and of `logging` alike to standard error, as *log_format* (console or json)."""
    before: list[Any] = [
        structlog.contextvars.merge_contextvars,
        add_batch,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(log_level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = handler_for(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=last_processors(log_format))
    )
    logging.basicConfig(handlers=[handler], level=log_level.upper(), force=True)
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # its retries are told by our own lines


class OutletHandler(logging.Handler):
    """Writes the lines of `logging` to the file of a stream; a reader that stands still holds up nobody who logs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.encoding = stream.encoding
        self.outlet = Outlet(stream.fileno(), lambda lines: get_logger().warning("log lines dropped", lines=lines))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; instead of one that cannot be made, why not."""
        try:
            text = self.format(record)
        except Exception:
            text = indented(f"--- Logging error ---\n{hide_password(traceback.format_exc())}")
        self.outlet.put(f"{text}\n".encode(self.encoding, "backslashreplace"))

    def flush(self) -> None:
        """Wait for what is on its way, for as long as it moves."""
        self.outlet.flush()


def handler_for(stream: TextIO | None) -> logging.Handler:
    """Return what writes to a stream; nothing at all to one that was closed before the process began."""
    if stream is None:
        return logging.NullHandler()
    try:
        return OutletHandler(stream)
    except (OSError, ValueError):  # it is no file, or is closed
        return logging.StreamHandler(stream)


def last_processors(log_format: str) -> list[Any]:
    """Return the processors that make a line of text."""
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    first = [remove_meta, structlog.processors.format_exc_info, hide_secrets]
    if log_format == "json":
        return [*first, structlog.processors.JSONRenderer()]
    # A plain traceback: the renderer's own shows the values of local variables, secrets among them.
    plain = structlog.dev.plain_traceback
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return [*first, spell_out, structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=plain)]


def get_logger() -> "SafeLogger":
    """Return batchq's own logger."""
    return SafeLogger()


class SafeLogger:
    """Writes batchq's own lines; one that cannot be written stops nothing.

    A handler may have closed standard error, or put something else in its place.
    """

    def __init__(self) -> None:
        self.logger: Any = structlog.get_logger("batchq")

    def info(self, event: str, **fields: Any) -> None:
        """Write a line of what happened."""
        with suppress(Exception):
            self.logger.info(event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Write a line of what somebody should know."""
        with suppress(Exception):
            self.logger.warning(event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        """Write a line of what somebody should do something about."""
        with suppress(Exception):
            self.logger.error(event, **fields)
