"""OpenTelemetry: a span for each enqueue and each run, with a link from the run to the enqueue; nothing without it."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

import batchq
from batchq import Backoff, enqueue_async, enqueue_many
from batchq.common import traces
from batchq.errors import ConfigError
from batchq.postgres.statements import claims, inserts, leases
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, look, put, register, register_items
from tests.support.steps import step
from tests.support.waiting import wait_until

EXPORTER = InMemorySpanExporter()
PROVIDER = TracerProvider()
PROVIDER.add_span_processor(SimpleSpanProcessor(EXPORTER))
BY_HAND = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Return what gathers the spans that the test's programs record."""
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: PROVIDER)
    monkeypatch.setattr(trace, "get_tracer", PROVIDER.get_tracer)
    EXPORTER.clear()
    yield EXPORTER
    EXPORTER.clear()


def spans(name: str) -> list[ReadableSpan]:
    """Return the spans of a name that have ended, in their order."""
    return [span for span in EXPORTER.get_finished_spans() if span.name == name]


def span(name: str) -> ReadableSpan:
    """Return the one span of a name."""
    [found] = spans(name)
    return found


def work(app: batchq.App, dsn: str, **settings: Any) -> None:
    """Work what is ready, with traces."""
    drain(app, dsn, traces=True, **settings)


def traceparent(of: ReadableSpan | SpanContext) -> str:
    """Return a span's context, or a context, as W3C writes it."""
    context = of if isinstance(of, SpanContext) else of.context
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def linked(run: ReadableSpan) -> list[str]:
    """Return what a span is linked to."""
    return [traceparent(link.context) for link in run.links]


def nothing(batch: batchq.Batch) -> None:
    """Do nothing."""


# -------------------------------------------------------------------------------------------------- enqueue and run


@pytest.mark.parametrize("style", STYLES)
def test_a_run_is_a_trace_of_its_own_linked_to_the_enqueue(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter, style: str
) -> None:
    app, seen = batchq.App(), []

    def look_around(batch: batchq.Batch) -> None:
        seen.append(trace.get_current_span().get_span_context())

    register(app, style, "greet", look_around)
    with PROVIDER.get_tracer("test").start_as_current_span("request") as request:
        batch_id = put(conn, "greet", queue="mail")
    work(app, dsn, queues="mail")
    sent, run = span("send greet"), span("process greet")
    assert (sent.kind, run.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert traceparent(sent.parent) == traceparent(request.get_span_context())
    assert run.parent is None
    assert run.context.trace_id != sent.context.trace_id
    assert linked(run) == [traceparent(sent)]
    assert look(conn, batch_id).trace_context == traceparent(sent), "it goes along when the batch is finished"
    assert seen == [run.context], "the handler's code runs inside the span"
    common = {"messaging.system": "batchq", "messaging.destination.name": "mail", "batchq.kind": "greet"}
    assert sent.attributes == common | {"messaging.operation.name": "send", "messaging.operation.type": "send"}
    assert run.attributes == common | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "batchq.batch.id": batch_id,
        "batchq.attempt": 1,
    }
    assert run.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("options", [{}, {"concurrency": 3}], ids=["one by one", "three at once"])
def test_the_items_of_a_batch_are_worked_inside_its_span(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter, style: str, options: dict[str, Any]
) -> None:
    app, seen = batchq.App(), []

    def look_around(item: int, batch: batchq.Batch) -> None:
        seen.append(trace.get_current_span())

    register_items(app, style, "each", look_around, **options)
    put(conn, "each", items=[1, 2, 3, 4])
    work(app, dsn)
    assert [one.get_span_context() for one in seen] == 4 * [span("process each").context]
    assert span("process each").links == ()


def test_every_way_to_enqueue_from_python_takes_the_context_along(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter
) -> None:
    async def one_more() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=None) as async_conn:
            await enqueue_async(async_conn, "by_async", queue="mail")

    with PROVIDER.get_tracer("test").start_as_current_span("request"):
        put(conn, "by_sync")
        asyncio.run(one_more())
        enqueue_many(conn, "by_copy", [1, 2, 3], queue="mail")
    rows = conn.execute("SELECT kind, queue, payload, trace_context FROM batchq.all_batches ORDER BY id").fetchall()
    assert rows == [
        ("by_sync", "default", {}, traceparent(span("send by_sync"))),
        ("by_async", "mail", {}, traceparent(span("send by_async"))),
        *(("by_copy", "mail", number, traceparent(span("send by_copy"))) for number in (1, 2, 3)),
    ]


def test_a_handler_that_enqueues_goes_on_in_its_own_trace(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter
) -> None:
    app = batchq.App()

    @app.handler("first")
    def first(batch: batchq.Batch) -> None:
        with batch.transaction() as own:
            batchq.enqueue(own, "second")

    register(app, "async def", "second", nothing)
    put(conn, "first")
    work(app, dsn)
    assert traceparent(span("send second").parent) == traceparent(span("process first"))
    assert linked(span("process second")) == [traceparent(span("send second"))]


@pytest.mark.parametrize(
    ("text", "is_one"), [(BY_HAND, True), ("nonsense", False), (BY_HAND.replace("-b7ad6b7169203331", ""), False)]
)
def test_who_inserts_by_sql_may_write_the_context_and_one_that_is_none_stops_nothing(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter, text: str, is_one: bool
) -> None:
    app = batchq.App()
    register(app, "def", "greet", nothing)
    conn.execute("INSERT INTO batchq.batches (kind, trace_context) VALUES ('greet', %s)", [text])
    work(app, dsn)
    assert linked(span("process greet")) == ([BY_HAND] if is_one else [])


@pytest.mark.parametrize("text", ["", "x" * 201])
def test_a_context_of_a_size_that_none_has_is_refused_by_name(conn: psycopg.Connection, text: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_trace_context_fits"):
        conn.execute("INSERT INTO batchq.batches (kind, trace_context) VALUES ('k', %s)", [text])


# ----------------------------------------------------------------------------------------------------- how it ended


@pytest.mark.parametrize("style", STYLES)
def test_each_attempt_has_its_own_span_and_one_that_fails_says_why(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter, style: str
) -> None:
    app = batchq.App()

    def fail_once(batch: batchq.Batch) -> None:
        if batch.attempt == 1:
            raise ValueError("no such order")

    register(app, style, "charge", fail_once, backoff=Backoff(first_seconds=0.01, most_seconds=0.01))
    with PROVIDER.get_tracer("test").start_as_current_span("request"):
        batch_id = put(conn, "charge")
    with running_worker(app, dsn, traces=True):
        wait_until(lambda: look(conn, batch_id).status == "completed", 20, "the second attempt")
    failed, good = spans("process charge")
    assert [run.attributes["batchq.attempt"] for run in (failed, good)] == [1, 2]
    assert linked(failed) == linked(good) == [traceparent(span("send charge"))]
    assert failed.context.trace_id != good.context.trace_id
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "ValueError: no such order")
    assert failed.attributes["error.type"] == "ValueError"
    [event] = failed.events
    assert (event.name, event.attributes["exception.type"]) == ("exception", "ValueError")
    assert event.attributes["exception.message"] == "no such order"
    assert "in fail_once" in event.attributes["exception.stacktrace"]
    assert (good.status.status_code, list(good.events)) == (StatusCode.UNSET, [])


def fail(batch: batchq.Batch) -> None:
    """Fail."""
    raise KeyError("it")


def cancel(batch: batchq.Batch) -> None:
    """Cancel."""
    raise batchq.Cancel("not wanted")


def snooze(batch: batchq.Batch) -> None:
    """Snooze."""
    raise batchq.Snooze(3600)


ENDS: list[tuple[Callable[[batchq.Batch], None], str, StatusCode, str | None]] = [
    (fail, "failed", StatusCode.ERROR, "KeyError: 'it'"),
    (cancel, "cancelled", StatusCode.UNSET, None),
    (snooze, "pending", StatusCode.UNSET, None),
]


@pytest.mark.parametrize(("body", "status", "code", "description"), ENDS)
def test_a_span_is_an_error_if_its_attempt_has_failed(
    conn: psycopg.Connection,
    dsn: str,
    exporter: InMemorySpanExporter,
    body: Callable[[batchq.Batch], None],
    status: str,
    code: StatusCode,
    description: str | None,
) -> None:
    app = batchq.App()
    register(app, "def", "k", body)
    conn.execute("INSERT INTO batchq.batches (kind, max_attempts, trace_context) VALUES ('k', 1, %s)", [BY_HAND])
    work(app, dsn)
    assert conn.execute("SELECT status, trace_context FROM batchq.all_batches").fetchall() == [(status, BY_HAND)]
    assert (span("process k").status.status_code, span("process k").status.description) == (code, description)


def test_failed_items_and_a_lost_lease_make_it_an_error_too(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter
) -> None:
    app = batchq.App()

    def odd(item: int, batch: batchq.Batch) -> None:
        if item % 2:
            raise ValueError(item)

    def lose(batch: batchq.Batch) -> None:
        conn.execute("SELECT batchq.cancel(%s)", [batch.id])
        batch.checkpoint("never saved")

    register_items(app, "def", "odd", odd)
    register(app, "def", "lose", lose)
    put(conn, "odd", items=[1, 2, 3], max_attempts=1)
    put(conn, "lose")
    work(app, dsn)
    assert span("process odd").status.description == "2 of 3 items failed; the first: ValueError: 1"
    assert span("process odd").events == ()
    assert span("process lose").attributes["error.type"] == "LeaseLost"


def test_the_context_goes_along_when_a_worker_died_for_the_last_time(conn: psycopg.Connection) -> None:
    conn.execute("INSERT INTO batchq.batches (kind, max_attempts, trace_context) VALUES ('k', 1, %s)", [BY_HAND])
    with conn.transaction():
        conn.execute(*claims.claim("default", 0, ["k"], 1, "dead", uuid4(), 1.0))
        conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 second'")
    leases.rescue(conn, "default", 10)
    assert conn.execute("SELECT status, trace_context FROM batchq.all_batches").fetchall() == [("failed", BY_HAND)]


@pytest.mark.parametrize("many", ["one", "bulk"])
def test_the_context_goes_along_with_the_verbs(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter, many: str
) -> None:
    app = batchq.App()
    register(app, "def", "k", nothing)
    conn.execute("INSERT INTO batchq.batches (kind, trace_context) VALUES ('k', %s)", [BY_HAND])
    for verb, before, after in (("cancel", "pending", "cancelled"), ("retry", "cancelled", "pending")):
        if many == "one":
            conn.execute(f"SELECT batchq.{verb}(id) FROM batchq.all_batches".encode())
        else:
            conn.execute("SELECT batchq.bulk(%s, jsonb_build_object('status', %s::text))", [verb, before])
        rows = conn.execute("SELECT status, trace_context FROM batchq.all_batches").fetchall()
        assert rows == [(after, BY_HAND)]
    work(app, dsn)
    assert linked(span("process k")) == [BY_HAND]


# ---------------------------------------------------------------------------------------------- who does not trace


def test_without_a_span_that_is_recorded_nothing_is_written(
    conn: psycopg.Connection, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("OpenTelemetry is there, and no span; then a span of another program's trace, that is not recorded")
    put(conn, "k")
    remote = trace.NonRecordingSpan(trace.SpanContext(1, 1, is_remote=True, trace_flags=trace.TraceFlags(1)))
    with trace.use_span(remote):
        put(conn, "k")
    step("OpenTelemetry was never imported: none is looked for")
    with PROVIDER.get_tracer("test").start_as_current_span("request"):
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        put(conn, "k")
        enqueue_many(conn, "k", [1])
    assert conn.execute("SELECT count(*), count(trace_context) FROM batchq.all_batches").fetchone() == (4, 0)
    assert spans("send k") == []


def test_who_does_not_trace_sends_the_statement_of_a_schema_without_the_column() -> None:
    statement, _ = inserts.insert_batch({}, None)
    assert "trace_context" not in statement


def test_a_worker_without_the_setting_records_nothing(
    conn: psycopg.Connection, dsn: str, exporter: InMemorySpanExporter
) -> None:
    app, seen = batchq.App(), []

    def look_around(batch: batchq.Batch) -> None:
        seen.append(trace.get_current_span())

    register(app, "def", "k", look_around)
    put(conn, "k")
    drain(app, dsn)
    assert seen == [trace.INVALID_SPAN]
    assert EXPORTER.get_finished_spans() == ()


def test_a_worker_without_the_extra_says_what_to_install(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = batchq.App()
    register(app, "def", "k", nothing)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    with pytest.raises(ConfigError, match=r"traces need an extra .*: pip install 'pgbatchq\[otel\]'"):
        drain(app, dsn, traces=True)


# -------------------------------------------------------------------------------------------------------- its limits


class Broken(SpanProcessor):
    """A processor that fails when a span of batchq *begins* or ends, by an error that cannot be told."""

    def __init__(self, begins: bool) -> None:
        self.begins = begins

    def on_start(self, span: Any, **_: Any) -> None:
        """Fail, if it is to."""
        self.fail(span, self.begins)

    def on_end(self, span: Any) -> None:
        """Fail, if it is to."""
        self.fail(span, not self.begins)

    def fail(self, span: Any, is_due: bool) -> None:
        """Fail."""
        if is_due and span.name != "request":
            raise Untellable


class Untellable(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        """Fail."""
        raise RuntimeError("out of order")


@pytest.fixture(params=[True, False], ids=["at the start", "at the end"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """Return what traces in vain."""
    provider = TracerProvider()
    provider.add_span_processor(Broken(request.param))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return provider


@pytest.mark.parametrize("style", STYLES)
def test_traces_that_fail_stop_no_batch(conn: psycopg.Connection, dsn: str, broken: TracerProvider, style: str) -> None:
    app = batchq.App()
    register(app, style, "k", nothing)
    batch_ids = [put(conn, "k") for _ in range(3)]
    work(app, dsn)
    assert [look(conn, batch_id).status for batch_id in batch_ids] == 3 * ["completed"]


def test_traces_that_fail_stop_no_enqueue(conn: psycopg.Connection, dsn: str, broken: TracerProvider) -> None:
    async def one_more() -> int | None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=None) as async_conn:
            return await enqueue_async(async_conn, "k")

    with broken.get_tracer("test").start_as_current_span("request") as request:
        assert put(conn, "k") == 1
        assert asyncio.run(one_more()) == 2
        assert enqueue_many(conn, "k", [1, 2]) == 2
        assert trace.get_current_span() is request
    assert conn.execute("SELECT count(*) FROM batchq.all_batches").fetchone() == (4,)


def test_an_enqueue_that_fails_makes_its_span_an_error(
    conn: psycopg.Connection, exporter: InMemorySpanExporter
) -> None:
    conn.execute("SET default_transaction_read_only = on")
    with PROVIDER.get_tracer("test").start_as_current_span("request"), pytest.raises(psycopg.Error):
        put(conn, "k")
    failed = span("send k")
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["error.type"] == "ReadOnlySqlTransaction"
    assert [event.name for event in failed.events] == ["exception"]


def test_a_worker_that_ends_has_its_spans_exported(
    conn: psycopg.Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    app = batchq.App()
    register(app, "def", "k", nothing)
    put(conn, "k")
    work(app, dsn)
    assert [span.name for span in exporter.get_finished_spans()] == ["process k"]
    provider.shutdown()


def test_a_server_of_traces_that_does_not_answer_keeps_no_worker(
    dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    class Waiting(SpanProcessor):
        """A processor whose server does not answer."""

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            """Wait for it."""
            return answers.wait(timeout_millis)

    provider = TracerProvider()
    provider.add_span_processor(Waiting())
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    app = batchq.App()
    register(app, "def", "k", nothing)
    put(conn, "k")
    try:
        began_at = time.monotonic()
        work(app, dsn)
        assert time.monotonic() - began_at < 20
    finally:
        answers.set()


def test_a_slot_is_left_without_the_span_of_its_last_batch(exporter: InMemorySpanExporter) -> None:
    with PROVIDER.get_tracer("test").start_as_current_span("before") as before:
        running = traces.begin("k", "default", 1, 1, None)
        assert trace.get_current_span() is not before
        traces.end(running, None)
        assert trace.get_current_span() is before


if __name__ == "__main__":
    run_alone(__file__)
