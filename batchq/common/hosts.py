"""Which names a server of ours answers to, and who is at the other end of a connection."""

import ipaddress
import re
import socket
import time
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

# No "/", "?", "#" or "@": in an address made from such a Host header, a part of the header would be read as the path.
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
NAME = re.compile(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|([0-9.]+):\d+")
SELDOM_SECONDS = 60.0
IPV6_GROUP_BITS = 64  # one client has at least so many addresses to itself
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_own_host(header: str, names: Collection[str]) -> bool:
    """Return whether a Host header names this server: by an address, as localhost, by the machine's name, or by one of
    its *names* (.example.com: all below example.com).

    A page of another site whose name was made to lead to this server (DNS rebinding) sends its own name.
    """
    found = HOST.fullmatch(header)
    if not found:
        return False
    name = found[1].strip("[]").lower()
    if name == "localhost" or is_address(name):
        return True
    return any(is_meant(name.removesuffix("."), by) for by in (own_name(), *names))


def is_meant(name: str, by: str) -> bool:
    """Return whether a name is meant by an entry of a setting: the name itself, or with a dot before it, all below."""
    return name.endswith(by) if by.startswith(".") else name == by


@cache
def own_name() -> str:
    """Return the machine's name, which no page of another site has."""
    return socket.gethostname().lower()


def host_names(value: Any) -> Any:
    """Return the names of a setting: ``"a.example, .b.example"``, or a sequence. Raises ValueError for what is none."""
    given = value.split(",") if isinstance(value, str) else value
    names = tuple(name.strip().lower().rstrip(".") for name in given if name.strip())
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a host name: leave out the scheme, the port, any path and *")
    return names


def is_address(name: str) -> bool:
    """Return whether a host is an address, which no DNS can make to mean something else."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Return whether an address is in one of the networks; False for what is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    plain = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(plain in network for network in networks)


def without_port(address: str) -> str:
    """Return the address in ``1.2.3.4:5678`` or ``[::1]:5678``, as some proxies write it."""
    found = WITH_PORT.fullmatch(address.strip())
    return next(filter(None, found.groups()), "") if found else address.strip()


class Seldom:
    """True when it is called, once a minute at most: for what anybody can have logged."""

    def __init__(self) -> None:
        self.at = float("-inf")

    def __call__(self) -> bool:
        """Return whether a minute has gone since it was last true."""
        now = time.monotonic()
        if now - self.at <= SELDOM_SECONDS:
            return False
        self.at = now
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
    return str(ipaddress.ip_network((int(parsed), IPV6_GROUP_BITS), strict=False))
