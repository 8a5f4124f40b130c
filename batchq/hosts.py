"""Which names a server of ours answers to, and who is at the other end of a connection."""

import ipaddress
import re
from collections.abc import Collection, Iterable

# No "/", "?", "#" or "@": in an address made from such a Host header, a part of the header would be read as the path.
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
IPV6_GROUP_BITS = 64  # one client has at least so many addresses to itself
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_own_host(header: str, names: Collection[str]) -> bool:
    """Return whether a Host header names this server: by an address, as localhost, or by one of its *names*.

    A page of another site whose name was made to lead to this server (DNS rebinding) sends its own name.
    """
    found = HOST.fullmatch(header)
    if not found:
        return False
    name = found[1].strip("[]").lower()
    return name == "localhost" or name in names or is_address(name)


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
        return any(ipaddress.ip_address(address) in network for network in networks)
    except ValueError:
        return False


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
