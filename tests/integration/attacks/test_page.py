"""Attacks on the web UI's door: guesses, stolen cookies, forged headers, heads that two servers read differently."""

import ipaddress
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from batchq.errors import ConfigError
from batchq.web.guard import client_of
from batchq.web.sessions import MOST_SESSIONS, Sessions
from batchq.web.settings import WebSettings
from batchq.web.throttle import Throttle
from tests.component.rows import Conn, insert
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import PASSWORD, Site, served
from tests.support.wire import codes_of, connect, exchange, request, status_of

TOKEN = "a-token-for-programs"
GUESSES, FORGED = 10_000, 1_000
CLOSED = (303, 401)  # what a stranger is answered


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI with a password and a token, to a client that has no proxy."""
    with served(dsn, password=PASSWORD, token=TOKEN) as site:
        yield site


@pytest.fixture
def proxied(dsn: str) -> Iterator[Site]:
    """Serve the web UI behind a proxy on this machine, which is named."""
    with served(dsn, password=PASSWORD, token=TOKEN, proxies="127.0.0.1") as site:
        yield site


def guess(site: Site, form_token: str, forged: str = "", password: str = "wrong") -> int:
    """Give a password, with an address of one's choice in X-Forwarded-For; return the answer's code."""
    headers = {"Origin": site.url} | ({"X-Forwarded-For": forged} if forged else {})
    data = {"form_token": form_token, "password": password}
    return site.client.post("/login", data=data, headers=headers).status_code


def token_lets_in(site: Site, token: str = TOKEN, **headers: str) -> bool:
    """Return whether a program with a token is let in."""
    with site.new_client(Authorization=f"Bearer {token}", **headers) as program:
        return program.get("/audit").status_code == 200


def forged_addresses(count: int) -> Iterator[str]:
    """Yield addresses."""
    return (f"203.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}" for number in range(count))


# ----------------------------------------------------------------------------------------------------------- guesses


def guesses(site: Site, addresses: list[str]) -> list[int]:
    """Guess a password from each of the addresses, and a token from each; return the answers' codes."""
    form = f"form_token={site.form_token('/login')}&password=wrong".encode()
    session = f"batchq_session={site.client.cookies['batchq_session']}"
    sent = []
    for address in addresses:
        host = f"127.0.0.1:{site.port}"
        common = {"host": host, "close": False, "X_Forwarded_For": address}
        sent.append(request("/login", method="POST", body=form, Origin=site.url, Cookie=session, **common))
        sent.append(request("/metrics", Authorization="Bearer wrong-token", **common))
    sent[-1] = sent[-1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    codes = codes_of(site.port, sent)
    assert len(codes) == 2 * len(addresses)
    return codes


def test_ten_thousand_guesses_from_a_thousand_forged_addresses(site: Site) -> None:
    """As a stranger who tries passwords and tokens, and gives another address each time."""
    codes, began_at, addresses = Counter[int](), time.monotonic(), list(forged_addresses(FORGED))
    for number in range(GUESSES // FORGED):
        half = number % 2 * FORGED // 2
        codes.update(guesses(site, addresses[half : half + FORGED // 2]))
        assert token_lets_in(site), "the right token, meanwhile"
    spent = time.monotonic() - began_at
    step("%s in %.0f s", codes, spent)
    assert codes.keys() == {401, 429}
    assert codes[401] <= 9 + spent / 60, "one connection's address: 3, then after 1, 2, 4, 8, 16, 32, 60 s"
    assert token_lets_in(site)
    assert guess(site, site.form_token("/login"), password=PASSWORD) == 303


def test_guesses_from_a_thousand_addresses_behind_a_proxy_that_is_named(proxied: Site) -> None:
    """As a stranger who has a thousand addresses, none of which guesses often."""
    began_at = time.monotonic()
    codes = Counter(guesses(proxied, list(forged_addresses(FORGED))))
    assert codes.keys() == {401, 429}
    assert codes[401] <= 31 + time.monotonic() - began_at, "30 for all addresses together, and one a second"
    assert token_lets_in(proxied)
    assert guess(proxied, proxied.form_token("/login"), "198.51.100.7", PASSWORD) == 303


def test_guessing_tokens_is_throttled_and_the_right_one_is_let_in(site: Site) -> None:
    """As a program that tries tokens, from the address of another one that has the right one."""
    with site.new_client() as stranger:
        codes = [
            stranger.get("/metrics", headers={"Authorization": f"Bearer {number}"}).status_code for number in range(50)
        ]
        assert codes[:3] == [401, 401, 401]
        assert codes.count(429) > 40
        assert stranger.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert stranger.get("/metrics", headers={"Authorization": "Bearer x"}).headers["retry-after"].isdecimal()


def test_a_prometheus_behind_the_proxy_of_a_guesser_does_not_reset_the_throttle(site: Site) -> None:
    """As a stranger whose address is also that of a program with the right token: its scrapes are not his excuse."""
    form_token = site.form_token("/login")
    codes = []
    for _ in range(12):
        codes.append(guess(site, form_token))
        assert token_lets_in(site)
    assert codes.count(401) < 8, codes
    assert 429 in codes


def test_neighbours_in_one_ipv6_network_are_one_guesser() -> None:
    """As a stranger with an IPv6 network of his own, 2^64 addresses."""
    throttle = Throttle()
    waits = [throttle.failed(f"2001:db8::{number:x}") for number in range(20)]
    assert [wait > 0 for wait in waits] == [False] * 3 + [True] * 17
    assert throttle.failed("2001:db8:1::1") == 0, "another network"
    mapped = [
        throttle.failed(address) for address in ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1")
    ]
    assert [wait > 0 for wait in mapped] == [False] * 3 + [True]


def test_guesses_from_many_addresses_take_bounded_memory() -> None:
    """As a stranger with a hundred thousand addresses."""
    throttle = Throttle()
    for address in forged_addresses(100_000):
        throttle.failed(address)
    assert len(throttle.failures) < 100, "only what was compared is written down"


def test_a_forged_address_before_the_proxys_own_is_not_believed() -> None:
    """As a stranger who sends X-Forwarded-For himself, through a proxy that adds to it."""
    proxies = WebSettings.load(proxies="127.0.0.1, 10.0.0.0/8").proxies
    for forwarded, client in (
        (["1.1.1.1, 192.0.2.7"], "192.0.2.7"),
        (["1.1.1.1", "192.0.2.7"], "192.0.2.7"),
        (["1.1.1.1, 192.0.2.7, 10.1.2.3"], "192.0.2.7"),
        (["127.0.0.1, 192.0.2.7"], "192.0.2.7"),
        (["1.1.1.1, <script>"], "127.0.0.1"),
        (["1.1.1.1, "], "127.0.0.1"),
        ([""], "127.0.0.1"),
        ([], "127.0.0.1"),
        (["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
    ):
        assert client_of("127.0.0.1", forwarded, proxies) == client, forwarded
    assert client_of("192.0.2.9", ["1.1.1.1"], proxies) == "192.0.2.9", "who is no proxy says nothing"
    assert client_of("127.0.0.1", ["1.1.1.1"], ()) == "127.0.0.1", "no proxy is named"
    with pytest.raises(ConfigError, match="BATCHQ_WEB_PROXIES"):
        WebSettings.load(proxies="my-proxy")


# ---------------------------------------------------------------------------------------------------------- sessions


def test_addresses_as_proxies_write_them() -> None:
    """As nobody: gateways that add a port, and a socket that has IPv4 addresses in IPv6's form."""
    networks = (ipaddress.ip_network("10.0.0.0/8"),)
    for given in ("203.0.113.9:52311", "203.0.113.9", " 203.0.113.9 "):
        assert client_of("10.0.0.1", [given], networks) == "203.0.113.9"
    assert client_of("10.0.0.1", ["[2001:db8::1]:443"], networks) == "2001:db8::1"
    assert client_of("10.0.0.1", ["2001:db8::1"], networks) == "2001:db8::1"
    assert client_of("::ffff:10.0.0.1", ["203.0.113.9"], networks) == "203.0.113.9"


def test_the_cookie_of_a_session_that_logged_out(site: Site) -> None:
    """As somebody who has copied a colleague's cookie."""
    site.log_in()
    cookie = site.client.cookies["batchq_session"]
    with site.new_client(Cookie=f"batchq_session={cookie}") as thief:
        assert thief.get("/audit").status_code == 200
        token = site.form_token("/audit")
        site.post("/logout", token)
        assert thief.get("/audit").status_code in CLOSED
        answer = thief.post(
            "/verbs/pause", data={"form_token": token, "queue": "default"}, headers={"Origin": site.url}
        )
        assert answer.status_code in CLOSED


def test_the_cookie_of_a_session_that_logged_in_anew(site: Site) -> None:
    """As somebody who has copied a cookie from before its owner gave the password again."""
    site.log_in()
    cookie = site.client.cookies["batchq_session"]
    site.log_in()
    assert site.client.get("/audit").status_code == 200
    with site.new_client(Cookie=f"batchq_session={cookie}") as thief:
        assert thief.get("/audit").status_code in CLOSED


def test_a_stream_that_was_open_when_its_session_logged_out(conn: Conn, site: Site) -> None:
    """As somebody with a copied cookie who holds a live page open and reads on."""
    site.log_in()
    cookie, seen, ended = site.client.cookies["batchq_session"], [], threading.Event()

    def read() -> None:
        with (
            site.new_client(Cookie=f"batchq_session={cookie}") as thief,
            thief.stream("GET", "/live/overview") as lines,
        ):
            seen.extend(line for line in lines.iter_lines())
        ended.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_until(lambda: site.web.live.viewers == 1, 30, "the stream to be open")
    site.post("/logout", site.form_token("/audit"))
    insert(conn, kind="came-after-the-logout")
    assert ended.wait(90), "the stream goes on"
    reader.join(30)
    assert "came-after-the-logout" not in "".join(seen)


def test_a_cookie_fixed_by_an_attacker_gains_nothing_when_the_victim_logs_in(site: Site) -> None:
    """As the owner of a sister domain, who has planted a session of his own in the victim's browser."""
    planted = site.form_token("/login") and site.client.cookies["batchq_session"]
    assert site.log_in().status_code == 303
    assert site.client.cookies["batchq_session"] != planted
    with site.new_client(Cookie=f"batchq_session={planted}") as attacker:
        assert attacker.get("/audit").status_code in CLOSED


def test_sessions_take_bounded_memory() -> None:
    """As somebody who has the password and logs in without end; and strangers, of whom nothing is kept."""
    sessions = Sessions()
    first = sessions.log_in()
    for _ in range(MOST_SESSIONS):
        newest = sessions.log_in()
        sessions.new()
    assert len(sessions.known) == MOST_SESSIONS
    assert (sessions.is_known(first), sessions.is_known(newest)) == (False, True)


# ---------------------------------------------------------------------------------------------------- forged headers

FOREIGN_HOSTS = (
    "evil.example", "EVIL.example:80", "127.0.0.1.", "localhost.", "127.0.0.1:80:80", "127.0.0.1:x", "localhost:123456",
    "evil.example@127.0.0.1", "127.0.0.1@evil.example", "127.0.0.1,evil.example", "127.0.0.1 evil.example",
    "127.0.0.1/login", "127.0.0.1/login?", "127.0.0.1/login#", "localhost/static/style.css?", "127.0.0.1\\login",
    "0x7f.1", "127.1", "2130706433", "[::1", "::1", "[evil.example]", "[::1]evil.example", "localhost%00", "",
)  # fmt: skip


def test_a_host_header_that_is_read_in_two_ways(site: Site) -> None:
    """As a page whose name leads here (DNS rebinding), or a stranger who writes a path into the Host header: where a
    library makes the address from it, "127.0.0.1/login?" turns every path into the one that needs no password."""
    for host in FOREIGN_HOSTS:
        answer = exchange(site.port, request("/audit", host))
        assert status_of(answer) in (400, 421), (host, answer[:200])


def test_our_own_host_is_known_in_any_case_and_with_any_port(dsn: str) -> None:
    """As nobody: the fence lets its own people through."""
    with served(dsn, hosts="Jobs.Example") as site:
        for host in ("jobs.example", "JOBS.EXAMPLE:8443", "LocalHost", "127.0.0.1:1", "[::1]", "[2001:DB8::1]:80"):
            assert status_of(exchange(site.port, request("/audit", host))) == 200, host


def test_a_host_name_in_another_header(proxied: Site) -> None:
    """As a page with a foreign name, through a proxy that passes on what a client sends."""
    for name in ("X_Forwarded_Host", "X_Host", "X_Original_Host", "Forwarded", "X_Forwarded_Server"):
        value = "host=127.0.0.1" if name == "Forwarded" else "127.0.0.1"
        answer = exchange(proxied.port, request("/login", "evil.example", **{name: value}))
        assert status_of(answer) == 421, name
        own = exchange(proxied.port, request("/login", **{name: value.replace("127.0.0.1", "evil.example")}))
        assert status_of(own) == 200, name
        assert b"evil.example" not in own, name


def test_a_path_or_method_in_another_header(site: Site) -> None:
    """As a stranger who knows what other frameworks believe."""
    for name in ("X_Original_URL", "X_Rewrite_URL", "X_HTTP_Method_Override", "X_Forwarded_Prefix"):
        value = "/login" if "URL" in name else "POST"
        assert status_of(exchange(site.port, request("/audit", **{name: value}))) in CLOSED, name


OPEN_LOOKING = (
    "//login", "/login/..", "/login/../audit", "/static/style.css/../../audit", "/login%2f..%2faudit",
    "/login;/audit", "/%6cogin/../audit", "/audit%3f/login", "/audit?/login", "/./audit",
    "http://127.0.0.1/login/../audit", "//audit", "/audit%00/login", "/AUDIT", "*",
)  # fmt: skip


def test_a_path_that_looks_like_an_open_one(site: Site) -> None:
    """As a stranger who writes the path of a page so that the door takes it for the login."""
    for path in OPEN_LOOKING:
        answer = exchange(site.port, request(path))
        assert status_of(answer) in (*CLOSED, 400, 404), (path, answer[:200])


FOREIGN_ORIGINS = (
    "null", "", "http://evil.example", "file://", "http://127.0.0.1.evil.example", "http://127.0.0.1:1", "//",
    "http://[", "http://evil.example@127.0.0.1",
)  # fmt: skip


def test_a_form_with_a_forged_origin(site: Site) -> None:
    """As a page of another site, in the browser of somebody who has logged in."""
    site.log_in()
    data = {"form_token": site.form_token("/audit"), "queue": "default"}
    for origin in FOREIGN_ORIGINS:
        answer = site.client.post("/verbs/pause", data=data, headers={"Origin": origin})
        assert answer.status_code == 403, origin


def test_a_cookie_is_for_tls_alone_where_a_proxy_speaks_it(site: Site) -> None:
    """As somebody who listens to the network: behind a proxy with TLS no cookie travels without it."""
    for headers, is_secure in (
        ({}, False),
        ({"X-Forwarded-Proto": "https"}, True),
        ({"X-Forwarded-Proto": "x"}, False),
    ):
        with site.new_client(**headers) as client:
            assert ("; Secure" in client.get("/login").headers["set-cookie"]) == is_secure


def test_a_websocket_goes_by_no_other_door(site: Site) -> None:
    """As a stranger who asks for a WebSocket, which would have neither the checks nor the time limits of a request."""
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    headers = {"Upgrade": "websocket", "Sec_WebSocket_Key": key, "Sec_WebSocket_Version": "13"}
    sent = request("/live/overview", **headers).replace(b"Connection: close", b"Connection: Upgrade, close")
    assert status_of(exchange(site.port, sent)) in CLOSED


# ------------------------------------------------------------------------------------------ heads, bodies, smuggling


def test_many_and_long_cookies(site: Site) -> None:
    """As a sister domain that has planted hundreds of cookies."""
    cookies = "; ".join(f"c{number}=x" for number in range(1000))
    assert status_of(exchange(site.port, request("/login", Cookie=cookies))) == 200
    assert status_of(exchange(site.port, request("/audit", Cookie=f"batchq_session={'9' * 10_000}"))) in CLOSED
    hostile = "batchq_session=a.9999999999999999999999999.1.x; batchq_session=..; batchq_session"
    assert status_of(exchange(site.port, request("/audit", Cookie=hostile))) in CLOSED


def test_a_huge_head(site: Site) -> None:
    """As a stranger who sends a head of a megabyte."""
    for kind, sent in {
        "one header": request("/login", X_Long="x" * 1_000_000),
        "many headers": request("/login", **{f"X_{number}": "x" * 80 for number in range(10_000)}),
        "path": request("/" + "x" * 1_000_000),
        "no end": b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X" * 1_000_000,
    }.items():
        assert status_of(exchange(site.port, sent)) in (0, 400), f"{kind}: refused, perhaps before all of it was sent"
    assert site.client.get("/login").status_code == 200


SMUGGLED = b"GET /logout HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "
TWO_READINGS = {
    "both lengths": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": b"Content-Length: 0\r\nContent-Length: 50\r\n\r\n" + SMUGGLED,
    "a length and a sign": b"Content-Length: +50\r\n\r\n" + SMUGGLED,
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a coding that is none": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk of a size that is none": b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk that ends elsewhere": b"Transfer-Encoding: chunked\r\n\r\n2\r\nabXX0\r\n\r\n" + SMUGGLED,
    "two hosts": b"Host: evil.example\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "a bare CR": b"X: a\rTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
}


def test_a_request_with_another_one_in_its_body(site: Site) -> None:
    """As a stranger behind a proxy that finds another end of a request than the web UI does: what is left over would be
    the beginning of the next person's request."""
    head = f"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1:{site.port}\r\n".encode()
    for kind, rest in TWO_READINGS.items():
        answer = exchange(site.port, head + rest)
        assert status_of(answer) in (400, 501), (kind, answer[:200])
        assert len(re.findall(rb"HTTP/1\.1 \d", answer)) == 1, f"{kind}: one answer, then the connection is closed"


def test_a_form_of_endless_fields(site: Site) -> None:
    """As a stranger who sends a form of many fields, many tokens, or no end."""
    form_token = site.form_token("/login")
    headers = {"Origin": site.url, "Content-Type": "application/x-www-form-urlencoded"}
    fields = "&".join(f"a{number}=b" for number in range(10_000))
    assert site.client.post("/login", content=fields, headers=headers).status_code == 413 or len(fields) < 65_536
    few = "&".join(f"a{number}=b" for number in range(100))
    assert site.client.post("/login", content=few, headers=headers).status_code == 400
    twice = f"form_token=x&form_token={form_token}&password={PASSWORD}&password=wrong"
    assert site.client.post("/login", content=twice, headers=headers).status_code == 401


def test_a_form_without_an_end(site: Site) -> None:
    """As a stranger who sends chunks for as long as they are taken."""
    for path in ("/login", "/verbs/pause", "/audit"):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nOrigin: {site.url}\r\n"
        with connect(site.port) as connection:
            connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
            with pytest.raises(ConnectionError):
                send_chunks(connection)
    assert site.client.get("/login").status_code == 200


def send_chunks(connection: socket.socket) -> None:
    """Send eight gigabytes in chunks. Raises ConnectionError when the other end has had enough."""
    for _ in range(2_000_000):
        connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")


def test_strangers_write_no_tracebacks_into_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """As a stranger who breaks off forms, sends garbage and asks for WebSockets: each a line or forty of the log."""
    for sent in (
        request("/login", method="POST", Origin=f"http://127.0.0.1:{site.port}", Content_Length="100").replace(
            b"127.0.0.1\r\n", f"127.0.0.1:{site.port}\r\n".encode(), 1
        ),
        b"\x16\x03\x01 garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        request("/", Upgrade="websocket").replace(b"close", b"Upgrade, close"),
    ):
        with connect(site.port) as connection:
            connection.sendall(sent)
    assert site.client.get("/login").status_code == 200
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")]
    assert lines == []


if __name__ == "__main__":
    run_alone(__file__)
