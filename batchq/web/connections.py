"""The connections of the web UI, bounded, so that nobody without a password can keep everybody else out.

A connection that waits for its client (for the head of a request, for the body of a form, for room to send an answer)
has a time limit. There are at most 800 connections, and at most 200 from one address; one more takes the place of the
one that has waited longest for its client. So whoever sends a request at once is answered, however many others hold
their connections open.
"""

import asyncio
import resource
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from batchq.common.hosts import Network, Seldom, group_of, is_within
from batchq.common.log import get_logger

log = get_logger()

MOST_CONNECTIONS = 800
MOST_OF_AN_ADDRESS = 200
OTHER_FILES = 100  # what the process has open besides: its connections to the database, log, code
# How long a connection may wait for its client, by what for. An idle one is closed in good order before that.
WAIT_SECONDS = {"head": 20.0, "body": 20.0, "rest": 3.0, "room": 30.0}


class Connections:
    """The connections that are open, how many each client has, and those that wait for it, the longest first.

    One client is what `group_of` says. *proxies* may have any number: there are many people behind each. Used in the
    event loop alone.
    """

    def __init__(self, proxies: tuple[Network, ...]) -> None:
        self.proxies = proxies
        self.open: set[PatientProtocol] = set()
        self.of_client: Counter[str] = Counter()
        self.waiting: dict[PatientProtocol, None] = {}
        self.reported = Seldom()
        self.most = max(10, min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES))

    def take_in(self, connection: "PatientProtocol") -> bool:
        """Take in a new connection, to which another one may give way. Return whether there is room for it."""
        address = connection.address
        is_proxy = is_within(address, self.proxies)
        if self.of_client[address] >= MOST_OF_AN_ADDRESS and not is_proxy and not self.give_way(address):
            return False
        if len(self.open) >= self.most and not self.give_way():
            return False
        self.open.add(connection)
        self.of_client[address] += 1
        return True

    def give_way(self, address: str | None = None) -> bool:
        """Drop the connection, *address* if given, that has waited longest. Return whether there was one."""
        found = next((one for one in self.waiting if address in (None, one.address)), None)
        if found:
            found.drop()
        return found is not None

    def report(self, address: str) -> None:
        """Log once a minute that a connection was refused."""
        if self.reported():
            log.warning("connections refused: too many; name a proxy in BATCHQ_WEB_PROXIES", address=address)

    def forget(self, connection: "PatientProtocol") -> None:
        """Count a connection no longer."""
        self.waiting.pop(connection, None)
        if connection in self.open:
            self.open.discard(connection)
            self.of_client[connection.address] -= 1
            if not self.of_client[connection.address]:
                del self.of_client[connection.address]


class PatientProtocol(H11Protocol):
    """Serves one connection, but waits for its client only so long."""

    table: Connections
    address = ""
    stage: tuple[str, Any] = ("", None)
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if there is room."""
        super().connection_made(transport)
        self.address = group_of(self.client[0] if self.client else "")
        if self.table.take_in(self):
            self.follow()
        else:
            self.table.report(self.address)
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self.stop_waiting()
        self.table.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self.follow()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self.follow()

    def pause_writing(self) -> None:
        """Wait until the client has read some of the answer."""
        super().pause_writing()
        self.follow()

    def resume_writing(self) -> None:
        """Send on."""
        super().resume_writing()
        self.follow()

    def waits_for(self) -> str:
        """Return what the connection waits for from its client, "" if the client waits for an answer."""
        if self.flow.write_paused or self.transport.is_closing():  # it closes when all is sent
            return "room"
        if self.cycle is None or self.cycle.response_complete:
            return "rest" if self.conn.their_state is h11.SEND_BODY else "head"
        return "body" if self.cycle.more_body else ""

    def follow(self) -> None:
        """Begin or end a time limit, if what the connection waits for has changed. A byte more prolongs none."""
        stage = (self.waits_for(), self.cycle)
        if stage == self.stage:
            return
        self.stop_waiting()
        self.stage = stage
        if stage[0]:
            self.table.waiting[self] = None
            self.timer = self.loop.call_later(WAIT_SECONDS[stage[0]], self.drop)

    def stop_waiting(self) -> None:
        """End the time limit."""
        self.table.waiting.pop(self, None)
        if self.timer:
            self.timer.cancel()

    def drop(self) -> None:
        """Cut the connection."""
        self.stop_waiting()
        self.table.forget(self)
        self.transport.abort()


def protocol_of(proxies: tuple[Network, ...]) -> type[PatientProtocol]:
    """Return the protocol of one server, whose connections know of each other."""
    return type("BoundedProtocol", (PatientProtocol,), {"table": Connections(proxies)})
