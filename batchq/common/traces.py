"""OpenTelemetry traces: a span around each enqueue and each run; the run's links to that of the enqueue.

The context travels in batchq.batches.trace_context, as the traceparent of W3C Trace Context. Names and attributes
follow OpenTelemetry's conventions for messaging. Runs need BATCHQ_TRACES and the extra "otel".
"""

import json
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

FLUSH_SECONDS = 2.0
log = get_logger()


def require() -> None:
    """Raise ConfigError unless OpenTelemetry is installed."""
    try:
        import opentelemetry.trace  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"traces need an extra ({error}): pip install 'batchq[otel]'") from None


def attributes(operation: str, kind: str, queue: str, **more: Any) -> dict[str, Any]:
    """Return the attributes of a span."""
    return {
        "messaging.system": "batchq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
        "batchq.kind": kind,
        **{f"batchq.{name.replace('_', '.')}": value for name, value in more.items()},
    }


# -------------------------------------------------------------------------------------------------------- enqueue


@contextmanager
def sending(kind: str, queue: str) -> Iterator[str | None]:
    """Have a span around an enqueue, if one is being recorded already, and yield its context for the batch, else None.

    Raises what the block raises, and nothing of OpenTelemetry's: who is told of an error after the INSERT would enqueue
    again. Who records a span has imported OpenTelemetry; nobody else pays for more than this look.
    """
    if "opentelemetry.trace" not in sys.modules:
        yield None
        return
    running = trace_context = None
    try:
        if running := begin_sending(kind, queue):
            trace_context = context_of_current_span()
    except Exception as error:
        log.warning("no span", error=one_line(error), kind=kind)
    try:
        yield trace_context
    except BaseException as error:
        end(running, error_object(error))
        raise
    end(running, None)


def begin_sending(kind: str, queue: str) -> "Running | None":
    """Begin the span of an enqueue, within the one that is being recorded; None if none is."""
    from opentelemetry import context, trace

    if not trace.get_current_span().is_recording():
        return None
    span = trace.get_tracer("batchq").start_span(
        f"send {kind}", kind=trace.SpanKind.PRODUCER, attributes=attributes("send", kind, queue)
    )
    return span, context.attach(trace.set_span_in_context(span))


def context_of_current_span() -> str | None:
    """Return the traceparent of the current span."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


# ------------------------------------------------------------------------------------------------------------ run


def begin(kind: str, queue: str, batch_id: int, attempt: int, trace_context: str | None) -> "Running | None":
    """Begin the span of a run, in the context of this thread or task; a trace of its own, since a batch may wait long,
    and run more than once. Raises nothing: the batch runs also if OpenTelemetry fails.
    """
    from opentelemetry import context, trace

    try:
        span = trace.get_tracer("batchq").start_span(
            f"process {kind}",
            context=context.Context(),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes("process", kind, queue, batch_id=batch_id, attempt=attempt),
            links=links(trace_context),
        )
        return span, context.attach(trace.set_span_in_context(span, context.Context()))
    except Exception as error:
        log.warning("no span", error=one_line(error), batch_id=batch_id, kind=kind)
        return None


def links(trace_context: str | None) -> "list[Link]":
    """Return a link to the span that enqueued the batch; none for a context that is missing, or is none."""
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
            fail(span, json.loads(error))
        span.end()
    except Exception as problem:
        log.warning("a span was not ended", error=one_line(problem))


def fail(span: "Span", told: dict[str, str]) -> None:
    """Say of a span that the attempt has failed, and by which exception, if by one."""
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR, told["error"])
    if "traceback" in told:
        name, _, message = told["error"].partition(": ")
        span.set_attribute("error.type", name)
        event = {"exception.type": name, "exception.message": message, "exception.stacktrace": told["traceback"]}
        span.add_event("exception", event)


def flush() -> None:
    """Have the spans that have ended exported, where the SDK gathers them: the process may be about to go.

    In a thread, for FLUSH_SECONDS at most: an exporter whose server does not answer tries for a minute.
    """
    thread = threading.Thread(target=flush_provider, name="batchq-last-spans", daemon=True)
    thread.start()
    thread.join(FLUSH_SECONDS)


def flush_provider() -> None:
    """Have the spans that have ended exported, however long it takes. Raises nothing."""
    from opentelemetry import trace

    try:
        provider: Any = trace.get_tracer_provider()
        if hasattr(provider, "force_flush"):
            provider.force_flush()
    except Exception as error:
        log.warning("spans were not exported", error=one_line(error))
