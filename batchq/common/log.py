"""Structured logs: every line that a handler logs carries its batch."""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partialmethod
from typing import Any, Protocol, TextIO

from batchq.common import hidden as hidden_fields
from batchq.common.outlet import Outlet
from batchq.common.secrets import hide_password
from batchq.common.text import visible, visible_line


class _HasIdentity(Protocol):
    id: int
    kind: str
    attempt: int

    @property
    def part_of(self) -> int | None: ...


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
        if batch.part_of is not None:
            event.setdefault("part_of", batch.part_of)
    return event


def _hide_secrets(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001
    event.update(_hidden_parts(event))
    return event


def _hidden_parts(values: Mapping[Any, Any]) -> dict[Any, Any]:
    fields = hidden_fields.fields()
    return {
        name: hidden_fields.HIDDEN if fields is not None and fields.has(str(name)) else hidden(value)
        for name, value in values.items()
    }


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
        return _hidden_parts(value)
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


@contextmanager
def _without_rich() -> Iterator[None]:
    """Keep structlog from importing rich, for tracebacks that are never shown: it takes 2.8 MiB."""
    name = "rich"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def configure(log_format: str, log_level: str) -> None:
    """Send the lines of structlog and `logging` to standard error, as *log_format* (console or json)."""
    with _without_rich():
        import structlog

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
    import structlog

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
        self._logger: Any = None

    def _write(self, level: str, event: str, **fields: Any) -> None:
        with suppress(Exception):
            if self._logger is None:
                import structlog  # only here: programs that enqueue log next to nothing, and start sooner

                self._logger = structlog.get_logger("batchq")
            getattr(self._logger, level)(event, **fields)

    info = partialmethod(_write, "info")  # what happened
    warning = partialmethod(_write, "warning")  # what somebody should know
    error = partialmethod(_write, "error")  # what somebody should act on
