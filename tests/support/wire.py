"""HTTP by hand, for what no well-behaved client sends: raw heads, half a head, an address of one's choice."""

import re
import socket
import threading
from contextlib import suppress

READ_SECONDS = 30.0


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    """Return a connection to this machine; *source* is the client's own address, any of 127.0.0.0/8."""
    return socket.create_connection(("127.0.0.1", port), READ_SECONDS, (source, 0))


def request(
    path: str = "/", host: str = "127.0.0.1", method: str = "GET", body: bytes = b"", close: bool = True, **headers: str
) -> bytes:
    """Return a request, after which the server closes unless *close* is false. A header's "_" is written as "-"."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(["Connection: close"] if close else [])]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def exchange(port: int, sent: bytes, source: str = "127.0.0.1") -> bytes:
    """Send bytes, and return all that is answered until the server closes."""
    with connect(port, source) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes, in good order or not. Raises TimeoutError."""
    received = b""
    with suppress(ConnectionError):
        while piece := connection.recv(65_536):
            received += piece
    return received


def status_of(answer: bytes) -> int:
    """Return the code of an answer, 0 where there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


def codes_of(port: int, requests: list[bytes]) -> list[int]:
    """Send many requests in one connection, the last of which closes it; return the codes of their answers."""
    with connect(port) as connection:
        sender = threading.Thread(target=connection.sendall, args=[b"".join(requests)], daemon=True)
        sender.start()
        codes = [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", read_to_end(connection))]
        sender.join(READ_SECONDS)
        return codes


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other end has closed, without waiting."""
    connection.setblocking(False)
    try:
        return connection.recv(65_536) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
