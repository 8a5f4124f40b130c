"""Attacks through the proxy that docs/deploy/nginx.conf describes, with nginx itself."""

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchq.settings import Settings
from batchq.web.settings import WebSettings
from tests.support.alone import run_alone
from tests.support.processes import ROOT
from tests.support.programs import path_of
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import PASSWORD, Site, served
from tests.support.wire import exchange, request, status_of

FOLDER = ROOT / "docs" / "deploy"
CONFIGURATION = FOLDER / "nginx.conf"
NAME = "jobs.example.com"
AROUND = """
daemon off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


@contextmanager
def nginx(site_port: int, folder: Path) -> Iterator[int]:
    """Run nginx with the documented configuration, without TLS, before a page; yield its port."""
    port = free_port()
    text = re.sub(r"^ *ssl_\w+ .*$", "", CONFIGURATION.read_text(), flags=re.MULTILINE)
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};").replace(
        "127.0.0.1:8080", f"127.0.0.1:{site_port}"
    )
    file = folder / "nginx.conf"
    file.write_text(AROUND.format(folder=folder, server=text))
    with subprocess.Popen([path_of("nginx"), "-p", str(folder), "-c", str(file)]) as process:
        try:
            wait_until(lambda: process.poll() is not None or listens(port), 30, "nginx to listen")
            assert process.poll() is None, "nginx has ended"
            yield port
        finally:
            process.terminate()


def listens(port: int) -> bool:
    """Return whether a port takes connections."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def log_in_through(port: int, site: Site, source: str, password: str, **headers: str) -> int:
    """Give a password through the proxy, from an address; return the answer's code."""
    page = exchange(port, request("/login", NAME, **headers), source)
    [form_token] = re.findall(rb'name="form_token" value="(\w+)"', page)
    [session] = re.findall(rb"(?i)set-cookie: (batchq_session=[^;]+)", page)
    body = b"form_token=" + form_token + b"&password=" + password.replace(" ", "+").encode()
    sent = request("/login", NAME, "POST", body, Origin=f"http://{NAME}", Cookie=session.decode(), **headers)
    return status_of(exchange(port, sent, source))


def test_the_documented_proxies_name_settings_that_exist_and_replace_what_a_client_says() -> None:
    """As a stranger who sends X-Forwarded-For through them."""
    known = {f"BATCHQ_{name.upper()}" for name in Settings.model_fields}
    known |= {f"BATCHQ_WEB_{name.upper()}" for name in WebSettings.model_fields}
    for file in (CONFIGURATION, FOLDER / "Caddyfile"):
        text = file.read_text()
        assert set(re.findall(r"\bBATCHQ_[A-Z_]+\b", text)) <= known
        assert "BATCHQ_WEB_PROXIES" in text
    text = CONFIGURATION.read_text()
    assert text.count("proxy_set_header X-Forwarded-For $remote_addr;") == text.count("proxy_pass ")
    assert "header_up X-Forwarded-For {remote_host}" in (FOLDER / "Caddyfile").read_text()


def test_forged_addresses_through_the_documented_proxy(dsn: str, tmp_path: Path) -> None:
    """As a stranger behind nginx who gives another address each time, and as his neighbour."""
    with (
        served(dsn, password=PASSWORD, hosts=NAME, proxies="127.0.0.1") as site,
        nginx(site.port, tmp_path) as port,
    ):
        codes = [
            log_in_through(port, site, "127.0.0.2", "wrong", X_Forwarded_For=f"192.0.2.{number}") for number in range(6)
        ]
        step("%s", codes)
        assert codes[:3] == [401] * 3
        assert 429 in codes[3:]
        assert site.web.guard.throttle.failures.keys() == {"127.0.0.2"}
        assert log_in_through(port, site, "127.0.0.3", "wrong") == 401, "a neighbour has his own three"
        assert log_in_through(port, site, "127.0.0.3", PASSWORD) == 303
        assert status_of(exchange(port, request("/login", "evil.example"))) == 421
        forged = request("/login", NAME, X_Forwarded_Host="evil.example", Forwarded="for=1.1.1.1;host=evil.example")
        assert b"evil.example" not in exchange(port, forged)


if __name__ == "__main__":
    run_alone(__file__)
