"""Which host names a server of batchq answers to, and which client is at the other end of a connection."""

import ipaddress
import re
import socket
import time
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

# No "/", "?", "#" or "@": in a URL made from such a Host header, a part of the header would be read as the path.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_NAME = re.compile(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|([0-9.]+):\d+")
_SELDOM_SECONDS = 60.0
_IPV6_GROUP_BITS = 64  # one client has at least a whole /64 to itself
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_own_host(header: str, names: Collection[str]) -> bool:
    """Return whether a Host header is an address, localhost, the machine's name, or in *names* (".a.b": all below a.b).

    A page of another site whose name was made to resolve to this server (DNS rebinding) sends its own name.
    """
    found = _HOST.fullmatch(header)
    if not found:
        return False
    name = found[1].strip("[]").lower()
    if name == "localhost" or is_address(name):
        return True
    return any(_matches(name.removesuffix("."), entry) for entry in (own_name(), *names))


def _matches(name: str, entry: str) -> bool:
    return name.endswith(entry) if entry.startswith(".") else name == entry


@cache
def own_name() -> str:
    """Return the machine's name, which a page of another site does not have."""
    return socket.gethostname().lower()


def host_names(value: Any) -> Any:
    """Return the names in a setting: ``"a.example, .b.example"``, or a sequence. Raises ValueError."""
    given = value.split(",") if isinstance(value, str) else value
    names = tuple(name.strip().lower().rstrip(".") for name in given if name.strip())
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a host name; leave out the scheme, the port, any path and *")
    return names


def is_address(name: str) -> bool:
    """Return whether a host is an IP address, which DNS cannot redirect."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Return whether an address is in one of the networks; False for a text that is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    plain = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(plain in network for network in networks)


def without_port(address: str) -> str:
    """Return the address of ``1.2.3.4:5678`` or ``[::1]:5678``, as some proxies write it."""
    found = _WITH_PORT.fullmatch(address.strip())
    return next(filter(None, found.groups()), "") if found else address.strip()


class Seldom:
    """Returns True at most once a minute: for log lines that any stranger can cause."""

    def __init__(self) -> None:
        self._last_at = float("-inf")

    def __call__(self) -> bool:
        """Return whether a minute has passed since it was last true."""
        now = time.monotonic()
        if now - self._last_at <= _SELDOM_SECONDS:
            return False
        self._last_at = now
        return True


def group_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the 64-bit network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), _IPV6_GROUP_BITS), strict=False))
