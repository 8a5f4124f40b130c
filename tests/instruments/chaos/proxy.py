"""A line that can be broken: a TCP proxy that delays, cuts, swallows, and cuts in the middle of a COMMIT's answer."""

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from tests.instruments.bench.proxy import PIECE_BYTES, DelayingProxy, hang_up

COMMIT = b"COMMIT\0"  # ends a message of its own, and one that is a whole transaction
KEEPALIVE_SECONDS = 10.0


class Pair:
    """One connection: the client's socket and the server's."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.is_swallowing = False
        self.cuts_answer = False

    def hang_up(self) -> None:
        """End both."""
        hang_up(self.client)
        hang_up(self.server)


class FaultyProxy(DelayingProxy):
    """Passes on what comes, until told otherwise; everything may be changed at any time."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, 0.0)
        self.pairs: set[Pair] = set()
        self.dice = random.Random()
        self.cut_share = 0.0  # of the COMMITs
        self.cuts = 0

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.cut()

    def accept(self) -> None:
        """Take connections until closed; hang up where nobody is at the other end."""
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                try:
                    server = self.connect()
                except OSError:
                    hang_up(client)
                else:
                    self.start(Pair(client, server))

    def start(self, pair: Pair) -> None:
        """Pass on both directions of a connection."""
        for each in (pair.client, pair.server):
            if each.family != socket.AF_UNIX:
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.pairs.add(pair)
        for run in (self.to_server, self.to_client):
            threading.Thread(target=self.run, args=(run, pair), name="proxy", daemon=True).start()

    def run(self, pass_on: Callable[[Pair], None], pair: Pair) -> None:
        """Pass on one direction to its end, which ends the other, too; but not of one that swallows."""
        with suppress(OSError):
            pass_on(pair)
        if not pair.is_swallowing:
            self.forget(pair)

    def to_server(self, pair: Pair) -> None:
        """Pass on what the client says; cut some COMMITs, half of them before the server has them."""
        while data := pair.client.recv(PIECE_BYTES):
            if pair.is_swallowing:
                continue
            self.delay()
            if data.endswith(COMMIT) and self.dice.random() < self.cut_share:
                self.cuts += 1
                if self.dice.random() < 0.5:
                    return
                pair.cuts_answer = True
            pair.server.sendall(data)

    def to_client(self, pair: Pair) -> None:
        """Pass on what the server says; of an answer that is to be cut, half."""
        while data := pair.server.recv(PIECE_BYTES):
            if pair.is_swallowing:
                continue
            self.delay()
            if pair.cuts_answer:
                pair.client.sendall(data[: len(data) // 2])
                return
            pair.client.sendall(data)

    def delay(self) -> None:
        """Wait as long as a piece is to be held back."""
        if self.delay_seconds:
            time.sleep(self.delay_seconds)

    def cut(self) -> int:
        """Cut every connection; return how many."""
        with self.lock:
            pairs = list(self.pairs)
        for pair in pairs:
            self.forget(pair)
        return len(pairs)

    def swallow(self) -> int:
        """Let every connection stand, and pass nothing on any more, not even its end; return how many.

        Those behind the proxy notice after a while, as by TCP's keepalive: else all that were ever swallowed would keep
        their places at the pooler, until it takes no more.
        """
        with self.lock:
            pairs = [pair for pair in self.pairs if not pair.is_swallowing]
        for pair in pairs:
            pair.is_swallowing = True
        keepalive = threading.Timer(KEEPALIVE_SECONDS, lambda: [hang_up(pair.server) for pair in pairs])
        keepalive.daemon = True
        keepalive.start()
        return len(pairs)

    def forget(self, pair: Pair) -> None:
        """End a connection."""
        with self.lock:
            self.pairs.discard(pair)
        pair.hang_up()
