"""Attacks on the web UI by connections that are held open: idle ones, slow ones, ones that nobody reads from."""

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from batchq.web import connections
from batchq.web.connections import MOST_CONNECTIONS, MOST_OF_AN_ADDRESS, Connections
from tests.component.rows import Conn
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import allowed, wait_until
from tests.support.web import PASSWORD, Site, served
from tests.support.wire import connect, exchange, is_closed, read_to_end, request, status_of

IDLE, SLOW = 2000, 500
HALF_A_HEAD = b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI with a password."""
    with served(dsn, password=PASSWORD) as site:
        yield site


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the time limits short."""
    for name in connections.WAIT_SECONDS:
        monkeypatch.setitem(connections.WAIT_SECONDS, name, 1.0)


def table_of(site: Site) -> Connections:
    """Return the connections that the server knows."""
    return site.server.config.http_protocol_class.table  # type: ignore[no-any-return, union-attr]


def half_a_form(site: Site) -> bytes:
    """Return the head of a form, and no body."""
    lines = ("POST /login HTTP/1.1", f"Host: 127.0.0.1:{site.port}", f"Origin: {site.url}", "Content-Length: 60000")
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def held(port: int, count: int, sent: bytes = b"", sources: int = 1) -> Iterator[list[socket.socket]]:
    """Hold connections open while the block runs, each of which has sent the same; from 127.0.1.1, 127.0.1.2 ..."""
    with ExitStack() as stack:
        made = []
        for number in range(count):
            connection = stack.enter_context(connect(port, f"127.0.1.{number % sources + 1}"))
            with suppress(ConnectionError):
                connection.sendall(sent)
            made.append(connection)
        yield made


@contextmanager
def trickling(connections: list[socket.socket]) -> Iterator[None]:
    """Send a byte on each connection, again and again, while the block runs."""
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.2):
            for connection in connections:
                with suppress(OSError):
                    connection.send(b"x")

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(30)


def answered_within(port: int, source: str = "127.0.0.1") -> float:
    """Return how long the web UI takes to answer a new connection with 200."""
    began_at = time.monotonic()
    assert status_of(exchange(port, request("/login"), source)) == 200
    return time.monotonic() - began_at


@pytest.mark.parametrize("sources", [1, 200])
def test_two_thousand_idle_and_five_hundred_slow_connections(site: Site, sources: int) -> None:
    """As a stranger without the password, from one address and from two hundred."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + SLOW + 1200:
        pytest.skip("this machine does not let one process have as many connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, IDLE + SLOW + 1200), hard))
    with (
        held(site.port, IDLE, sources=sources),
        held(site.port, SLOW // 2, HALF_A_HEAD, sources) as heads,
        held(site.port, SLOW - SLOW // 2, half_a_form(site), sources) as forms,
        trickling(heads + forms),
    ):
        answered_within(site.port)  # it has stood in line behind all of them: now they are accepted
        times = [answered_within(site.port) for _ in range(20)]
        step("slowest of 20: %.3f s", max(times))
        assert max(times) < allowed(1.0)
        assert len(table_of(site).open) <= MOST_CONNECTIONS
    assert answered_within(site.port) < allowed(1.0)


def test_one_address_cannot_have_all_connections(site: Site) -> None:
    """As a stranger with one address: the connection that has waited longest gives way, and it is his."""
    with held(site.port, 1) as [neighbour], held(site.port, MOST_OF_AN_ADDRESS + 50, sources=1) as mine:
        table = table_of(site)
        step("one of the same address has waited longest, then come the older ones of the others")
        wait_until(lambda: is_closed(neighbour) and all(map(is_closed, mine[:49])), 30, "the bound to be kept")
        assert not any(map(is_closed, mine[60:]))
        assert table.of_client["127.0.1.1"] == MOST_OF_AN_ADDRESS
        with held(site.port, 3, sources=3) as others:
            wait_until(lambda: table.of_client["127.0.1.2"] == 1, 30, "a neighbour to be let in")
            assert [is_closed(other) for other in others[1:]] == [False, False]


def test_people_behind_a_proxy_that_is_named_share_no_bound_of_an_address(dsn: str) -> None:
    """As nobody: the fence lets its own people through."""
    with (
        served(dsn, password=PASSWORD, proxies="127.0.1.1") as site,
        held(site.port, MOST_OF_AN_ADDRESS + 100) as connections,
    ):
        wait_until(lambda: len(table_of(site).open) == MOST_OF_AN_ADDRESS + 100, 30, "all to be open")
        assert not any(is_closed(one) for one in connections)
        assert answered_within(site.port, "127.0.1.1") < allowed(1.0)


def test_the_oldest_idle_connection_gives_way_at_the_total(site: Site) -> None:
    """As a stranger with many addresses, who takes every connection that there is."""
    with held(site.port, MOST_CONNECTIONS + 100, sources=100) as connections:
        wait_until(lambda: all(map(is_closed, connections[:99])), 30, "the older ones to be closed")
        assert not any(map(is_closed, connections[110:]))
        assert len(table_of(site).open) == MOST_CONNECTIONS


def test_those_who_wait_for_an_answer_never_give_way(conn: Conn, dsn: str) -> None:
    """As a stranger who opens connection after connection while people watch live pages."""
    with served(dsn) as site, ExitStack() as stack:
        watching = [stack.enter_context(site.new_client()) for _ in range(5)]
        streams = [stack.enter_context(one.stream("GET", "/live/overview")) for one in watching]
        wait_until(lambda: site.web.live.viewers == 5, 30, "the streams to be open")
        with held(site.port, MOST_OF_AN_ADDRESS + 50, sources=1), held(site.port, MOST_CONNECTIONS, sources=50):
            assert site.web.live.viewers == 5
            assert [stream.status_code for stream in streams] == [200] * 5


# ------------------------------------------------------------------------------------------------------- time limits


@pytest.mark.usefixtures("impatient")
def test_slow_heads_and_bodies_end_however_many_bytes_come(site: Site) -> None:
    """As a stranger who sends a byte now and then (slowloris): a byte more prolongs nothing."""
    kinds = {"nothing": b"", "head": HALF_A_HEAD, "line": b"G", "form": half_a_form(site)}
    kinds["after an answer"] = request("/login", close=False) + HALF_A_HEAD
    kinds["chunks"] = half_a_form(site).replace(b"Content-Length: 60000", b"Transfer-Encoding: chunked") + b"5\r\n"
    for kind, sent in kinds.items():
        with held(site.port, 1, sent) as [connection], trickling([connection] if kind != "nothing" else []):
            connection.settimeout(allowed(20))
            answer = read_to_end(connection)
            assert status_of(answer) == (200 if kind == "after an answer" else 0), kind
            assert b"HTTP/1.1 2" not in answer[20:], kind
    assert not table_of(site).waiting
    assert not table_of(site).of_client


@pytest.mark.usefixtures("impatient")
def test_a_body_that_goes_on_after_the_answer_ends(site: Site) -> None:
    """As a stranger who is refused, and sends on."""
    sent = half_a_form(site).replace(b"Origin: ", b"X-Origin: ")
    with held(site.port, 1, sent) as [connection], trickling([connection]):
        connection.settimeout(allowed(20))
        assert status_of(read_to_end(connection)) == 403


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_nobody_reads_ends(conn: Conn, dsn: str) -> None:
    """As a viewer who asks for large pages and live streams, and reads nothing: pages would pile up in memory."""
    for number in range(400):
        conn.execute("INSERT INTO batchq.batches (kind, queue) VALUES (%s, %s)", [f"{number} {'x' * 100}", "q" * 100])
    asked = request("/", close=False)
    with served(dsn) as site, ExitStack() as stack:
        for sent in (asked * 40, request("/"), request("/live/overview")):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", site.port))
            connection.sendall(sent)
        wait_until(lambda: len(table_of(site).open) == 3, 30, "all three to be open")
        step("nobody reads; the queues change, so that the stream has news")

        def only_one_is_left() -> bool:
            conn.execute("UPDATE batchq.batches SET priority = 1 - priority WHERE id % 7 = 0")
            conn.execute("INSERT INTO batchq.batches (kind) VALUES ('more')")
            return len(table_of(site).open) == 0

        wait_until(only_one_is_left, 60, "all to be closed")
        wait_until(lambda: site.web.live.viewers == 0, 30, "the stream to end")


def test_streams_whose_viewers_have_gone_are_given_up(conn: Conn, dsn: str) -> None:
    """As a viewer whose browser opens live pages and leaves them, hundreds of times."""
    with served(dsn) as site:
        for _ in range(300):
            with connect(site.port) as connection:
                connection.sendall(request("/live/overview"))
        wait_until(lambda: not table_of(site).open and site.web.live.viewers == 0, 60, "the streams to end")
        assert site.web.live.watched == {}


def test_requests_in_one_connection_are_answered_one_after_another(site: Site) -> None:
    """As a stranger who sends a thousand requests at once in one connection: they wait, and only in his own buffer."""
    with connect(site.port) as connection:
        sent = request("/login", close=False) * 200 + request("/login")
        sender = threading.Thread(target=connection.sendall, args=[sent], daemon=True)
        sender.start()
        assert read_to_end(connection).count(b"HTTP/1.1 200 OK") == 201
        sender.join(30)


def test_there_are_no_more_connections_than_the_process_may_have_files() -> None:
    """As a stranger on a machine where a process may have 256 open files: beyond them it could accept nobody."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert Connections(()).most == 156
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


if __name__ == "__main__":
    run_alone(__file__)
