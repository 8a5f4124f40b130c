"""OpenTelemetry traces: a span around each enqueue and each run. The run's span links to that of the enqueue.

The context travels in batchq.batches.trace_context, as the traceparent of W3C Trace Context. Names and attributes
follow OpenTelemetry's conventions for messaging. Runs need BATCHQ_TRACES and the extra "otel".
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batchq.common.log import get_logger
from batchq.common.text import error_object, one_line
from batchq.errors import ConfigError

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span

    Running = tuple[Span, Token[Context]]

_FLUSH_SECONDS = 2.0
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_log = get_logger()


def require() -> None:
    """Raise ConfigError unless OpenTelemetry is installed."""
    try:
        import opentelemetry.trace  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"traces need an extra ({error}): pip install 'pgbatchq[otel]'") from None


def attributes(operation: str, kind: str, queue: str, **more: Any) -> dict[str, Any]:
    """Return span attributes."""
    return {
        "messaging.system": "batchq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
        "batchq.kind": kind,
        **{f"batchq.{name.replace('_', '.')}": value for name, value in more.items()},
    }


def trace_id_of(trace_context: str | None) -> str | None:
    """Return the trace id in a batch's trace_context, 32 hexadecimal digits; None if it has no valid one."""
    found = _TRACEPARENT.fullmatch(trace_context or "")
    return found[1] if found and found[1].strip("0") else None


# -------------------------------------------------------------------------------------------------------- enqueue


@contextmanager
def sending(kind: str, queue: str) -> Iterator[str | None]:
    """Put a span around an enqueue, if one is being recorded already, and yield its context for the batch, else None.

    Raises what the block raises, but no error of OpenTelemetry: after an error a caller would enqueue again, and the
    INSERT may have succeeded. A program that records spans has imported OpenTelemetry; others pay only for this check.
    """
    if "opentelemetry.trace" not in sys.modules:
        yield None
        return
    running = trace_context = None
    try:
        if running := _begin_sending(kind, queue):
            trace_context = _context_of_current_span()
    except Exception as error:
        _log.warning("span not started", error=one_line(error), kind=kind)
    try:
        yield trace_context
    except BaseException as error:
        end(running, error_object(error))
        raise
    end(running, None)


def _begin_sending(kind: str, queue: str) -> "Running | None":
    """Start the span of an enqueue, within the one that is being recorded; return None if none is."""
    from opentelemetry import context, trace

    if not trace.get_current_span().is_recording():
        return None
    span = trace.get_tracer("batchq").start_span(
        f"send {kind}", kind=trace.SpanKind.PRODUCER, attributes=attributes("send", kind, queue)
    )
    return span, context.attach(trace.set_span_in_context(span))


def _context_of_current_span() -> str | None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


# ------------------------------------------------------------------------------------------------------------ run


def begin(kind: str, queue: str, batch_id: int, attempt: int, trace_context: str | None) -> "Running | None":
    """Start the span of a run, in the context of this thread or task.

    It has a trace of its own, because a batch may wait for long and run more than once. Raises nothing: if
    OpenTelemetry fails, the batch runs all the same.
    """
    from opentelemetry import context, trace

    try:
        span = trace.get_tracer("batchq").start_span(
            f"process {kind}",
            context=context.Context(),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes("process", kind, queue, batch_id=batch_id, attempt=attempt),
            links=_links(trace_context),
        )
        return span, context.attach(trace.set_span_in_context(span, context.Context()))
    except Exception as error:
        _log.warning("span not started", error=one_line(error), batch_id=batch_id, kind=kind)
        return None


def _links(trace_context: str | None) -> "list[Link]":
    """Return a link to the span that enqueued the batch; nothing for a context that is missing or invalid."""
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if trace_context is None:
        return []
    extracted = TraceContextTextMapPropagator().extract({"traceparent": trace_context}, Context())
    found = get_current_span(extracted).get_span_context()
    return [Link(found)] if found.is_valid else []


def end(running: "Running | None", error: str | None) -> None:
    """End the span of a run. *error*: an object of batchq.batches.errors, if the attempt has failed. Raises nothing."""
    if running is None:
        return
    from opentelemetry import context

    span, token = running
    try:
        context.detach(token)
        if error is not None:
            _record_error(span, json.loads(error))
        span.end()
    except Exception as problem:
        _log.warning("span not ended", error=one_line(problem))


def _record_error(span: "Span", fields: dict[str, str]) -> None:
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR, fields["error"])
    if "traceback" in fields:
        name, _, message = fields["error"].partition(": ")
        span.set_attribute("error.type", name)
        event = {"exception.type": name, "exception.message": message, "exception.stacktrace": fields["traceback"]}
        span.add_event("exception", event)


def flush() -> None:
    """Export the spans that the SDK still holds, for 2 s at most: unanswered, an exporter retries for a minute."""
    thread = threading.Thread(target=_flush_provider, name="batchq-last-spans", daemon=True)
    thread.start()
    thread.join(_FLUSH_SECONDS)


def _flush_provider() -> None:
    from opentelemetry import trace

    try:
        provider: Any = trace.get_tracer_provider()
        if hasattr(provider, "force_flush"):
            provider.force_flush()
    except Exception as error:
        _log.warning("spans not exported", error=one_line(error))
