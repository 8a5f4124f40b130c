"""The small server of a worker's metrics and health checks: threads, time and bytes are limited."""

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

_log = get_logger()

MOST_CONNECTIONS = 32
CONNECTION_SECONDS = 10.0
_GIVE_WAY_SECONDS = 1.0
_MOST_HEAD_BYTES = 16_384
_CACHED_SECONDS = 1.0

_Answer = tuple[int, bytes]


class _Cached:
    """An answer that is at most a second old, made by one thread at a time.

    So no number of requests makes a worker do more, such as log in to the database for each request to /readyz.
    """

    def __init__(self, make: Callable[[], _Answer]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made_at = float("-inf")
        self._answer: _Answer = (503, b"")

    def __call__(self) -> _Answer:
        with self._lock:
            if time.monotonic() - self._made_at >= _CACHED_SECONDS:
                self._answer = self._make()
                self._made_at = time.monotonic()
            return self._answer


class _LimitedServer(ThreadingTCPServer):
    """Serves each connection in a thread: at most 32 of them, and each for at most 10 s.

    When all threads are taken, the connection that has waited longest for its client is closed.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.ends_at: dict[Any, float] = {}  # of each connection
        self.waiting: dict[Any, None] = {}  # those whose client has not sent a whole request, the oldest first
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._take_room():
            self.shutdown_request(request)
            return
        self.ends_at[request] = time.monotonic() + CONNECTION_SECONDS
        self.waiting[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._room.release()
            raise

    def _take_room(self) -> bool:
        if self._room.acquire(blocking=False):
            return True
        if oldest := next(iter(self.waiting.copy()), None):
            _hang_up(oldest)
        return self._room.acquire(timeout=_GIVE_WAY_SECONDS)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def shutdown_request(self, request: Any) -> None:
        self.ends_at.pop(request, None)
        self.waiting.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close the connections whose time is over. Called twice a second, and after each new connection."""
        for request, ends_at in self.ends_at.copy().items():
            if time.monotonic() > ends_at:
                _hang_up(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a stranger who disconnects could fill the log."""


def _hang_up(request: Any) -> None:
    """Let the thread that serves a connection read an end of file."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _MetricsHandler(BaseHTTPRequestHandler):
    server: "_AnsweringServer"  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = CONNECTION_SECONDS
    server_version = "batchq"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        with self.rfile as incoming:
            self.rfile = io.BufferedReader(io.BytesIO(_head_of(incoming)))  # type: ignore[arg-type]
        self.server.waiting.pop(self.connection, None)

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host")  # None: an old health check, not a browser
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


def _head_of(incoming: BinaryIO) -> bytes:
    """Return the text up to the first empty line; nothing if it takes over 16 KB: the rest might name another host."""
    head = b""
    while line := incoming.readline(_MOST_HEAD_BYTES - len(head)):
        head += line
        if head.strip() and not line.strip():
            return head.lstrip()
    return b""


class _AnsweringServer(_LimitedServer):
    def __init__(
        self, address: tuple[str, int], answers: Mapping[str, Callable[[], _Answer]], hosts: Collection[str]
    ) -> None:
        self.answers = answers
        self.hosts = hosts
        self._may_log = Seldom()
        super().__init__(address, _MetricsHandler)

    def refused(self, host: str) -> None:
        """Log, once a minute, a request that names another host."""
        if self._may_log():
            _log.warning("metrics request refused", reason="host not in BATCHQ_METRICS_HOSTS", host=host[:200])


class MetricsServer:
    """Serves /metrics, /healthz and /readyz. *checks*: by path, what is wrong, "" if nothing is."""

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Callable[[], bytes],
        checks: Mapping[str, Callable[[], str]],
        hosts: Collection[str] = (),
    ) -> None:
        answers = {"/metrics": _Cached(lambda: (200, metrics()))}
        answers |= {path: _Cached(lambda check=check: _judged(check())) for path, check in checks.items()}  # type: ignore[misc]
        self.server = _AnsweringServer((host, port), answers, hosts)

    @property
    def port(self) -> int:
        """The port."""
        return int(self.server.server_address[1])

    def start(self) -> None:
        """Serve in a thread."""
        threading.Thread(target=self.server.serve_forever, name="batchq-metrics", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()


def _judged(problem: str) -> tuple[int, bytes]:
    return (503, f"{problem}\n".encode()) if problem else (200, b"ok\n")
