"""A line that delays: a TCP proxy before a Postgres that holds each piece back for a fixed time.

It delays without narrowing: what arrives is stamped and queued at once, and sent when its time has come, so any amount
may be under way. Threads, not asyncio, whose timers are too coarse for half a millisecond.
"""

import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

PIECE_BYTES = 2**16


class DelayingProxy:
    """Takes connections on a port of this machine and passes them on to *dsn*, each way *delay_seconds* late."""

    def __init__(self, dsn: str, delay_seconds: float) -> None:
        self.delay_seconds = delay_seconds
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
        self.host, self.upstream_port = parts.get("host", "localhost"), int(parts.get("port", 5432))
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self.listener.getsockname()[1], sslmode="disable")
        self.sockets: list[socket.socket] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self.accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            for each in (self.listener, *self.sockets):
                hang_up(each)

    def accept(self) -> None:
        """Take connections until closed."""
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = self.connect()
                for each in (client, server):
                    if each.family != socket.AF_UNIX:
                        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self.lock:
                    self.sockets += [client, server]
                self.pass_on(client, server)
                self.pass_on(server, client)

    def connect(self) -> socket.socket:
        """Connect to the server."""
        if not self.host.startswith("/"):
            return socket.create_connection((self.host, self.upstream_port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{self.host}/.s.PGSQL.{self.upstream_port}")
        return server

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on one direction, by a thread that takes and one that sends."""
        line: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self.take, args=(source, line), name="proxy-take", daemon=True).start()
        threading.Thread(target=send, args=(line, target), name="proxy-send", daemon=True).start()

    def take(self, source: socket.socket, line: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        """Stamp and queue what arrives, to the end; the end is as late as everything else."""
        data = b"?"
        while data:
            try:
                data = source.recv(PIECE_BYTES)
            except OSError:
                data = b""
            line.put((time.monotonic() + self.delay_seconds, data))


def send(line: "queue.SimpleQueue[tuple[float, bytes]]", target: socket.socket) -> None:
    """Send each piece when its time has come; hang up at the end."""
    with suppress(OSError):
        while True:
            due, data = line.get()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            if not data:
                break
            target.sendall(data)
    hang_up(target)


def hang_up(each: socket.socket) -> None:
    """Shut a socket down, so that whoever waits for it wakes, and close it."""
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
