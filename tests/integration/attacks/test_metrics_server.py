"""Attacks on the port where a worker shows its metrics: foreign names, held connections, floods of requests."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from batchq.common.hosts import is_own_host
from batchq.errors import ConfigError
from batchq.settings import Settings
from batchq.worker import metrics_server
from batchq.worker.metrics_server import MOST_CONNECTIONS, MetricsServer
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import allowed, wait_until
from tests.support.wire import connect, exchange, read_to_end, request, status_of


class Counted:
    """What a worker answers with, and how often it was asked to make it, by how many at once."""

    def __init__(self) -> None:
        self.made = 0
        self.comments = b""
        self.now = 0
        self.most_at_once = 0
        self.may_end = threading.Event()
        self.may_end.set()

    def metrics(self) -> bytes:
        """Make metrics."""
        self.made += 1
        return b"batchq_up 1\n" + self.comments

    def check(self) -> str:
        """Check something, which may take long."""
        self.now += 1
        self.made += 1
        self.most_at_once = max(self.most_at_once, self.now)
        self.may_end.wait(30)
        self.now -= 1
        return ""


@pytest.fixture
def counted() -> Counted:
    """What the server answers with."""
    return Counted()


@pytest.fixture
def server(counted: Counted) -> Iterator[MetricsServer]:
    """Serve metrics, under one name."""
    checks = {"/healthz": lambda: "", "/readyz": counted.check}
    server = MetricsServer("127.0.0.1", 0, counted.metrics, checks, ("worker-1.example",))
    server.start()
    yield server
    counted.may_end.set()
    server.close()


@contextmanager
def held(port: int, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Hold connections open while the block runs, each of which has sent the same."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            connection = stack.enter_context(connect(port))
            with suppress(ConnectionError):
                connection.sendall(sent)
            made.append(connection)
        yield made


def threads_of_connections() -> int:
    """Return how many threads serve a connection."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_a_foreign_host_name(server: MetricsServer) -> None:
    """As a page whose name leads to this port (DNS rebinding), in a browser on the worker's machine."""
    for host in ("evil.example", "127.0.0.1.evil.example", "127.0.0.1/x", "127.0.0.1, evil.example", "localhost.", ""):
        for path in ("/metrics", "/healthz", "/readyz", "/nothing"):
            assert status_of(exchange(server.port, request(path, host))) == 421, (host, path)
    twice = request("/metrics").replace(b"\r\n\r\n", b"\r\nHost: evil.example\r\n\r\n")
    assert status_of(exchange(server.port, twice)) == 421
    for host in (f"127.0.0.1:{server.port}", "localhost", "[::1]", "10.1.2.3:9400", "Worker-1.Example:9400"):
        assert status_of(exchange(server.port, request("/metrics", host))) == 200, host


def test_old_health_checks_are_answered(server: MetricsServer) -> None:
    """As nobody: a check that sends no Host (no browser does so), HEAD, or an empty line first."""
    for sent in (
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"\r\nGET /healthz HTTP/1.0\r\n\r\n",
        request("/healthz", socket.gethostname().upper()),
        request("/healthz", "localhost").replace(b"GET", b"HEAD"),
    ):
        answer = exchange(server.port, sent)
        assert status_of(answer) == 200, sent
        assert answer.endswith(b"\r\n\r\n") == sent.startswith(b"HEAD"), sent


def test_a_host_that_comes_after_the_head_is_no_way_in(server: MetricsServer) -> None:
    """As a page with a foreign name whose Host header stands where a bounded head has ended."""
    sent = request("/metrics", "evil.example").replace(b"\r\nHost", b"\r\nX: " + b"x" * 20_000 + b"\r\nHost")
    assert b"200" not in exchange(server.port, sent)[:20]


def test_names_come_from_the_setting() -> None:
    """As nobody: the fence lets its own people through."""
    assert Settings.load(metrics_hosts="a.example, B.example").metrics_hosts == ("a.example", "b.example")
    assert Settings.load().metrics_hosts == ()
    assert is_own_host("pod.default.svc:9400", Settings.load(metrics_hosts=".svc, w").metrics_hosts)
    assert is_own_host("W.", ("w",))
    assert not is_own_host("evil.example", (".svc", "w"))
    for wrong in ("https://a.example", "a.example:9400", "*", "a.example/x"):
        with pytest.raises(ConfigError, match="is not a host name; leave out the scheme"):
            Settings.load(metrics_hosts=wrong)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /met", request("/metrics")[:-2], b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000]
)
def test_idle_and_slow_connections(server: MetricsServer, sent: bytes) -> None:
    """As a neighbour who opens five hundred connections and holds them."""
    with held(server.port, 500, sent):
        began_at = time.monotonic()
        for path in ("/metrics", "/healthz", "/readyz"):
            assert status_of(exchange(server.port, request(path))) == 200
        assert time.monotonic() - began_at < allowed(3.0)
        assert threads_of_connections() <= MOST_CONNECTIONS + 1


def test_a_slow_head_ends_however_many_bytes_come(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a neighbour who sends a byte now and then: each one would prolong a limit that counts from the last."""
    monkeypatch.setattr(metrics_server, "CONNECTION_SECONDS", 2.0)
    ended = threading.Event()
    with connect(server.port) as connection:
        connection.settimeout(allowed(30))

        def trickle() -> None:
            with suppress(OSError):
                while not ended.wait(0.2):
                    connection.send(b"x")

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        assert status_of(read_to_end(connection)) in (0, 400), "closed"
        ended.set()
        thread.join(30)
    wait_until(lambda: not server.server.ends_at and threads_of_connections() == 0, 30, "the thread to end")


def test_an_answer_that_nobody_reads_ends(
    server: MetricsServer, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a neighbour who asks for more metrics than the buffers of a socket take, and reads none of them."""
    counted.comments = b"# x\n" * 5_000_000
    monkeypatch.setattr(metrics_server, "CONNECTION_SECONDS", 2.0)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request("/metrics"))
        wait_until(lambda: threads_of_connections() == 1, 30, "a thread to answer")
        wait_until(lambda: threads_of_connections() == 0, 30, "the thread to end")


def test_a_flood_of_checks_logs_in_once_a_second(server: MetricsServer, counted: Counted) -> None:
    """As a neighbour who asks /readyz, which logs in to the database, as often as he can."""
    began_at = time.monotonic()
    codes = [status_of(exchange(server.port, request("/readyz"))) for _ in range(300)]
    assert set(codes) == {200}
    assert counted.made <= time.monotonic() - began_at + 1
    step("at once, while the database hangs")
    counted.may_end.clear()
    wait_until(lambda: counted.now == 1 or held_once(server.port), 30, "a check to hang")
    with held(server.port, 20, request("/readyz")) as connections:
        assert status_of(exchange(server.port, request("/healthz"))) == 200, "the other answers come"
        counted.may_end.set()
        assert {status_of(read_to_end(one)) for one in connections} == {200}
    assert counted.most_at_once == 1


def held_once(port: int) -> None:
    """Ask /readyz once, and wait for no answer."""
    with connect(port) as connection:
        connection.sendall(request("/readyz"))
        connection.settimeout(0.05)
        with suppress(TimeoutError):
            read_to_end(connection)


def test_a_flood_of_scrapes_makes_metrics_once_a_second(server: MetricsServer, counted: Counted) -> None:
    """As a neighbour who scrapes as often as he can: making metrics holds the lock that each finished batch takes."""
    began_at = time.monotonic()
    for _ in range(50):
        assert status_of(exchange(server.port, request("/metrics"))) == 200
    assert counted.made <= time.monotonic() - began_at + 1


def test_huge_heads_and_garbage_are_refused_and_nothing_is_printed(
    server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a neighbour who fills memory or the worker's log."""
    for sent in (
        b"\x16\x03\x01\x00 garbage\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"x" * 1_000_000,
        b"".join([b"GET /metrics HTTP/1.1\r\n", *[b"X: " + b"x" * 60_000 + b"\r\n"] * 90, b"\r\n"]),
        b"GET " + b"x" * 100_000,
        b"GET /metrics HTTP/9.9\r\n\r\n",
        request("/metrics", method="POST", body=b"x" * 10),
        request("/metrics", method="TRACE"),
        request("/../../etc/passwd"),
        request("http://127.0.0.1/metrics"),
    ):
        assert status_of(exchange(server.port, sent)) not in (200, 500), sent[:40]
    with held(server.port, 5, request("/metrics")):
        pass
    wait_until(lambda: threads_of_connections() == 0, 30, "the threads to end")
    answer = exchange(server.port, request("/metrics"))
    assert b"Python" not in answer
    assert b"nosniff" in answer
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out


if __name__ == "__main__":
    run_alone(__file__)
