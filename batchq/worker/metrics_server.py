"""The small server on which a worker shows its metrics and its health: bounded in threads, time and bytes."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, BinaryIO

from batchq.common.exposition import CONTENT_TYPE
from batchq.common.hosts import Seldom, is_own_host
from batchq.common.log import get_logger

log = get_logger()

MOST_CONNECTIONS = 32
CONNECTION_SECONDS = 10.0
GIVE_WAY_SECONDS = 1.0
MOST_HEAD_BYTES = 16_384
FRESH_SECONDS = 1.0

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
