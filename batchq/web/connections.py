"""The connections of the web UI's clients, limited so that nobody without a password can keep everybody else out.

A connection that waits for its client (for the head of a request, for the body of a form, for room to send an answer)
has a time limit. There are at most 800 connections, and at most 200 from one address; one more takes the place of the
one that has waited longest for its client. A client that sends a request immediately is therefore answered, however
many others hold their connections open.
"""

import asyncio
import resource
from collections import Counter
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from batchq.common.hosts import Network, Seldom, group_of, is_within
from batchq.common.log import get_logger

MOST_CONNECTIONS = 800
MOST_OF_AN_ADDRESS = 200
_OTHER_FILES = 100  # what else the process has open: database connections, log, code
# How long a connection may wait for what its client owes it. uvicorn closes an idle one gracefully before that.
WAIT_SECONDS = {"head": 20.0, "body": 20.0, "rest": 3.0, "room": 30.0}
Awaited = Literal["head", "body", "rest", "room"]  # rest: of a body whose request is already answered

_log = get_logger()


class Connections:
    """The open connections: how many each client has, and those that wait for their client, the longest first.

    One client is what `group_of` returns. *proxies* may have any number, because each serves many people. Used in the
    event loop only.
    """

    def __init__(self, proxies: tuple[Network, ...]) -> None:
        self.open: set[TimedProtocol] = set()
        self.of_client: Counter[str] = Counter()
        self.waiting: dict[TimedProtocol, None] = {}
        self.most = max(10, min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES))
        self._proxies = proxies
        self._reported = Seldom()

    def admit(self, connection: "TimedProtocol") -> bool:
        """Add a new connection, dropping another one if necessary. Return False, and log, if there is no room."""
        address = connection.address
        is_proxy = is_within(address, self._proxies)
        if self.of_client[address] >= MOST_OF_AN_ADDRESS and not is_proxy and not self._drop_one(address):
            return self._refuse(address)
        if len(self.open) >= self.most and not self._drop_one():
            return self._refuse(address)
        self.open.add(connection)
        self.of_client[address] += 1
        return True

    def remove(self, connection: "TimedProtocol") -> None:
        """Stop counting a connection."""
        self.waiting.pop(connection, None)
        if connection in self.open:
            self.open.discard(connection)
            self.of_client[connection.address] -= 1
            if not self.of_client[connection.address]:
                del self.of_client[connection.address]

    def _drop_one(self, address: str | None = None) -> bool:
        """Drop the connection, of *address* if given, that has waited longest. Return whether there was one."""
        found = next((one for one in self.waiting if address in (None, one.address)), None)
        if found:
            found.drop()
        return found is not None

    def _refuse(self, address: str) -> bool:
        if self._reported():
            _log.warning("connections refused: too many; name a proxy in BATCHQ_WEB_PROXIES", address=address)
        return False


class TimedProtocol(H11Protocol):
    """Serves one connection, with a limit on each wait for its client."""

    table: Connections
    address = ""
    _stage: tuple[Awaited | None, Any] = (None, None)
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Serve it if there is room."""
        super().connection_made(transport)
        self.address = group_of(self.client[0] if self.client else "")
        if self.table.admit(self):
            self._follow()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting it."""
        self._stop_waiting()
        self.table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """Await the next request."""
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        """Wait for room."""
        super().pause_writing()
        self._follow()

    def resume_writing(self) -> None:
        """Continue to send."""
        super().resume_writing()
        self._follow()

    def drop(self) -> None:
        """Abort the connection."""
        self._stop_waiting()
        self.table.remove(self)
        self.transport.abort()

    def _awaited(self) -> Awaited | None:
        """Return what the client owes; None while the server owes an answer."""
        if self.flow.write_paused or self.transport.is_closing():  # a closing transport still sends its buffer
            return "room"
        if self.cycle is None or self.cycle.response_complete:
            return "rest" if self.conn.their_state is h11.SEND_BODY else "head"
        return "body" if self.cycle.more_body else None

    def _follow(self) -> None:
        """Start or stop a time limit if what the client owes has changed. Another byte extends no limit."""
        stage = (self._awaited(), self.cycle)
        if stage == self._stage:
            return
        self._stop_waiting()
        self._stage = stage
        if stage[0]:
            self.table.waiting[self] = None
            self._timer = self.loop.call_later(WAIT_SECONDS[stage[0]], self.drop)

    def _stop_waiting(self) -> None:
        self.table.waiting.pop(self, None)
        if self._timer:
            self._timer.cancel()


def protocol_of(proxies: tuple[Network, ...]) -> type[TimedProtocol]:
    """Return the protocol for one server, whose connections share a table."""
    return type("ServerProtocol", (TimedProtocol,), {"table": Connections(proxies)})
