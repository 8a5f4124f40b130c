"""Metrics for Prometheus, by its conventions, and the small server on which a worker shows them. Needs the extra
"metrics". A worker counts for `batchq.throughput` anyway, a group of batches at a time: metrics keep the sums of that,
and everything else is read when somebody scrapes.
"""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, BinaryIO

import psycopg
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from batchq.database import Link, read_only_problem
from batchq.errors import ConfigError
from batchq.hosts import Seldom, is_own_host
from batchq.keeper import HEARTBEAT_SECONDS, Keeper
from batchq.lanes import Lane
from batchq.log import get_logger
from batchq.settings import Settings
from batchq.throughput import BOUNDS, ENDS, Counts, Throughput

log = get_logger()

MOST_PAIRS = 200  # of queue and kind that have labels of their own; what comes after is "other"
OTHER = ("other", "other")
READY_SECONDS = 3.0
UNWRITTEN_SECONDS = 3 * HEARTBEAT_SECONDS
MOST_CONNECTIONS = 32
CONNECTION_SECONDS = 10.0
GIVE_WAY_SECONDS = 1.0
MOST_HEAD_BYTES = 16_384
FRESH_SECONDS = 1.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVERY_FOURTH = slice(0, None, 4)  # of the bounds that are counted: from 15 us, in steps of 4
STATES = ("ready", "scheduled", "processing")
Pair = tuple[str, str]


def exposition(collect: Callable[[], Iterable[Metric]]) -> bytes:
    """Return metrics in Prometheus' text format."""

    class Once(Collector):
        """Yields them once."""

        def collect(self) -> Iterable[Metric]:
            """Yield them."""
            return collect()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry)


# ------------------------------------------------------------------------------------------------------ a worker


def worker_metrics(
    sums: Mapping[Pair, Counts], slots: Mapping[str, tuple[int, int]], probe_seconds: float = 0.0
) -> Iterator[Metric]:
    """Yield a worker's metrics: *sums* of what it has counted since its start, by queue and kind; *slots* and how many
    of them are busy, by style of handler; *probe_seconds*, the server's time for one probe for ready batches."""
    finished = CounterMetricFamily(
        "batchq_batches_finished", "Attempts that have ended, by how.", labels=("queue", "kind", "status")
    )
    items = CounterMetricFamily("batchq_items", "Items worked, failed ones included.", labels=("queue", "kind"))
    seconds = HistogramMetricFamily("batchq_batch_run_seconds", "How long attempts ran.", labels=("queue", "kind"))
    for (queue, kind), counts in bounded(sums).items():
        for end in ENDS:
            finished.add_metric((queue, kind, end), counts.ends.get(end, 0))
        items.add_metric((queue, kind), counts.items)
        seconds.add_metric((queue, kind), buckets(counts.run_times), counts.run_seconds)
    yield from (finished, items, seconds)
    for name, place, text in (
        ("batchq_worker_slots", 0, "Batches that this worker runs at once, at most."),
        ("batchq_worker_slots_busy", 1, "Batches that it runs now."),
    ):
        gauge = GaugeMetricFamily(name, text, labels=("style",))
        for style, numbers in slots.items():
            gauge.add_metric((style,), numbers[place])
        yield gauge
    yield GaugeMetricFamily(
        "batchq_probe_seconds",
        "Time that the server needs to find the next ready batch; above 0.02, dead rows are in the way.",
        value=probe_seconds,
    )


def bounded(sums: Mapping[Pair, Counts]) -> dict[Pair, Counts]:
    """Return the sums of the first 200 pairs as they are, and those of all others together."""
    shown: dict[Pair, Counts] = {}
    for pair, counts in sums.items():
        if len(shown) < MOST_PAIRS:
            shown[pair] = counts
        else:
            shown.setdefault(OTHER, Counts()).add(counts)
    return shown


def buckets(run_times: list[int]) -> list[tuple[str, float]]:
    """Return a histogram's buckets: upper bounds and how many were not above them."""
    below: list[int] = []
    for count in run_times:
        below.append(count + (below[-1] if below else 0))
    chosen = [(repr(bound), float(count)) for bound, count in zip(BOUNDS, below[:-1], strict=True)][EVERY_FOURTH]
    return [*chosen, ("+Inf", float(below[-1]))]


# ----------------------------------------------------------------------------------------------------- the queues


def queue_metrics(queues: Iterable[Mapping[str, Any]], workers: int) -> Iterator[Metric]:
    """Yield what stands in batchq.queues (one row each) and how many *workers* live. Beyond 200 rows: sums as other."""
    depth = GaugeMetricFamily(
        "batchq_queue_depth", "Live batches; beyond a bound an estimate.", labels=("queue", "kind", "state")
    )
    gauges = {
        "stalled": gauge("batchq_stalled", "Batches whose worker gave no sign of life for a whole lease."),
        "failed": gauge("batchq_failed", "Failed batches that are kept; at least so many."),
        "oldest_wait_seconds": gauge("batchq_oldest_wait_seconds", "How long the oldest ready batch has waited."),
        "workers": gauge("batchq_serving_workers", "Live workers that serve the queue and know the kind."),
    }
    for row in bounded_rows(queues):
        labels = (row["queue"], row["kind"])
        for state in STATES:
            depth.add_metric((*labels, state), row[state])
        for name, family in gauges.items():
            family.add_metric(labels, row[name] or 0)
    yield from (depth, *gauges.values())
    yield GaugeMetricFamily("batchq_workers", "Live workers.", value=workers)


def gauge(name: str, text: str) -> GaugeMetricFamily:
    """Return a gauge for each queue and kind."""
    return GaugeMetricFamily(name, text, labels=("queue", "kind"))


def bounded_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first 200 rows as they are, and one for all others: sums, and the longest wait."""
    shown = [dict(row) for row in rows]
    rest = shown[MOST_PAIRS:]
    if not rest:
        return shown
    other: dict[str, Any] = {"queue": OTHER[0], "kind": OTHER[1]}
    other |= {name: sum(row[name] for row in rest) for name in (*STATES, "stalled", "failed")}
    other |= {name: max(row[name] or 0 for row in rest) for name in ("oldest_wait_seconds", "workers")}
    return [*shown[:MOST_PAIRS], other]


# --------------------------------------------------------------------------------------------------- the server


Answer = tuple[int, bytes]


class Fresh:
    """An answer that is made by one thread at a time and at most once a second, however many ask: none of them can have
    a worker do more, such as log in to the database for each request to /readyz."""

    def __init__(self, make: Callable[[], Answer]) -> None:
        self.make = make
        self.lock = threading.Lock()
        self.made_at = float("-inf")
        self.answer: Answer = (503, b"")

    def __call__(self) -> Answer:
        """Return the answer, at most a second old."""
        with self.lock:
            if time.monotonic() - self.made_at >= FRESH_SECONDS:
                self.answer = self.make()
                self.made_at = time.monotonic()
            return self.answer


class BoundedServer(ThreadingTCPServer):
    """Serves each connection in a thread: few at a time, and none for long.

    When all threads are taken, the connection that has waited longest for its client gives way.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.ends_at: dict[Any, float] = {}  # of each connection
        self.waiting: dict[Any, None] = {}  # those whose client has not sent a whole request, the oldest first
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin to serve a connection, or close it if there is no room."""
        if not self.has_room():
            self.shutdown_request(request)
            return
        self.ends_at[request] = time.monotonic() + CONNECTION_SECONDS
        self.waiting[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self.room.release()
            raise

    def has_room(self) -> bool:
        """Take room for one more connection, and return whether there was some."""
        if self.room.acquire(blocking=False):
            return True
        for waiting in self.waiting.copy():
            cut(waiting)
            break
        return self.room.acquire(timeout=GIVE_WAY_SECONDS)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.ends_at.pop(request, None)
        self.waiting.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut the connections whose time is over. Called twice a second, and after each new connection."""
        for request, ends_at in self.ends_at.copy().items():
            if time.monotonic() > ends_at:
                cut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a stranger who breaks off could fill the log."""


def cut(request: Any) -> None:
    """Have the thread that serves a connection read its end."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class MetricsHandler(BaseHTTPRequestHandler):
    """Answers one request, whose head has a bounded size, and which names this server as its host."""

    server: "AnsweringServer"  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = CONNECTION_SECONDS
    server_version = "batchq"
    sys_version = ""

    def setup(self) -> None:
        """Read the head."""
        super().setup()
        with self.rfile as incoming:
            self.rfile = io.BufferedReader(io.BytesIO(head_of(incoming)))  # type: ignore[arg-type]
        self.server.waiting.pop(self.connection, None)

    def do_GET(self) -> None:
        """Answer."""
        hosts = self.headers.get_all("Host")  # none: an old health check, and no browser
        if hosts is None or is_own_host(", ".join(hosts), self.server.hosts):
            code, body = self.server.answers.get(self.path.partition("?")[0], lambda: (404, b"not found\n"))()
        else:
            self.server.refused(", ".join(hosts))
            code, body = 421, b"unknown host name; list it in BATCHQ_METRICS_HOSTS\n"
        self.send_response(code)
        self.send_header("Content-Type", CONTENT_TYPE if self.path.startswith("/metrics") else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.server.waiting[self.connection] = None  # for room to send the answer
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (http.server looks for it by this name)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing."""


def head_of(incoming: BinaryIO) -> bytes:
    """Return what a client sends up to the first empty line; nothing if that does not come within 16 KB: what is not
    read might name another host."""
    head = b""
    while line := incoming.readline(MOST_HEAD_BYTES - len(head)):
        head += line
        if head.strip() and not line.strip():
            return head.lstrip()
    return b""


class AnsweringServer(BoundedServer):
    """Answers by path, to those who ask for one of *hosts*."""

    def __init__(
        self, address: tuple[str, int], answers: Mapping[str, Callable[[], Answer]], hosts: Collection[str]
    ) -> None:
        self.answers = answers
        self.hosts = hosts
        self.reported = Seldom()
        super().__init__(address, MetricsHandler)

    def refused(self, host: str) -> None:
        """Log once a minute that somebody asks for another name than ours."""
        if self.reported():
            log.warning("metrics refused: unknown host name; list it in BATCHQ_METRICS_HOSTS", host=host[:200])


class MetricsServer:
    """Serves /metrics, /healthz and /readyz in a thread. *checks*: what is wrong by path, "" for nothing."""

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Callable[[], bytes],
        checks: Mapping[str, Callable[[], str]],
        hosts: Collection[str] = (),
    ) -> None:
        answers = {"/metrics": Fresh(lambda: (200, metrics()))}
        answers |= {path: Fresh(lambda check=check: judged(check())) for path, check in checks.items()}  # type: ignore[misc]
        self.server = AnsweringServer((host, port), answers, hosts)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server.server_address[1])

    def start(self) -> None:
        """Serve, in a thread."""
        threading.Thread(target=self.server.serve_forever, name="batchq-metrics", daemon=True).start()

    def close(self) -> None:
        """Serve no more."""
        self.server.shutdown()
        self.server.server_close()


def judged(problem: str) -> tuple[int, bytes]:
    """Return the answer of a check."""
    return (503, f"{problem}\n".encode()) if problem else (200, b"ok\n")


def serve_worker(
    settings: Settings, throughput: Throughput, lanes: Mapping[str, Lane], keeper: Keeper, silent_seconds: float
) -> MetricsServer:
    """Serve a worker's metrics, whether it polls, and whether its database takes writes. Raises ConfigError."""
    throughput.sums = {}

    def metrics() -> bytes:
        slots = {style: (lane.concurrency, busy(lane)) for style, lane in lanes.items()}
        with throughput.lock:
            return exposition(lambda: worker_metrics(throughput.sums or {}, slots, keeper.claimer.probe_seconds()))

    def polls() -> str:
        silent = time.monotonic() - keeper.claimer.polled_at
        return f"no poll has finished for {silent:.0f} s" if silent > silent_seconds else ""

    def writes() -> str:
        silent = time.monotonic() - keeper.beat_at
        if silent > UNWRITTEN_SECONDS:
            return f"no heartbeat was written for {silent:.0f} s"
        return database_problem(settings)

    try:
        checks = {"/healthz": polls, "/readyz": writes}
        server = MetricsServer(settings.metrics_host, settings.metrics_port, metrics, checks, settings.metrics_hosts)
    except OSError as error:
        raise ConfigError(f"BATCHQ_METRICS_PORT {settings.metrics_port}: {error.strerror}") from None
    server.start()
    return server


def busy(lane: Lane) -> int:
    """Return how many batches a lane runs now."""
    return sum(batch.begun_at is not None for batch in lane.in_hand())


def database_problem(settings: Settings) -> str:
    """Return why the database does not answer or takes no writes, "" if it does; on a connection of its own."""
    link = Link(settings.require_dsn(), READY_SECONDS)
    try:
        with link.reading() as conn:
            problem = read_only_problem(conn)
    except psycopg.Error:
        return "the database does not answer"
    finally:
        link.close()
    return problem[0] if problem else ""
