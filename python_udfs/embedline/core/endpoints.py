"""Decide at which addresses a model may be asked."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

# Entries of the list that every installation begins with, for programs on the server's own machine.
LOOPBACK = tuple(f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("localhost", "127.0.0.1", "::1"))
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Machines of a cloud read their credentials at such an address. Link-local ones are refused whole, and beside them AWS
# over IPv6, Alibaba, Oracle and Azure, whose addresses are others.
_METADATA = frozenset(("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16", "fd20:ce::254"))
# The prefix under which NAT64 gives IPv4 addresses to machines that have IPv6 alone.
_NAT64 = "64:ff9b::/96"


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of an address.

    Raises ValueError if it has none.
    """
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("the address has no scheme http or https, or no host")
    return parts.scheme, parts.hostname, _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port


def is_allowed(url: str, allowed: Iterable[str]) -> bool:
    """Return True if an entry of the list names the address's scheme, host and port.

    An entry is scheme://host:port. Its host may begin with "*.", for all names below it, and its port may be "*".
    """
    scheme, host, port = origin(url)
    for entry in allowed:
        entry_scheme, _, rest = entry.partition("://")
        entry_host, _, entry_port = rest.rpartition(":")
        is_host = host.endswith(entry_host[1:]) if entry_host.startswith("*.") else host == entry_host
        if scheme == entry_scheme and is_host and entry_port in ("*", str(port)):
            return True
    return False


def allowing_statement(url: str) -> str:
    """Return the statement by which a superuser puts the address on the list."""
    scheme, host, port = origin(url)
    quoted = host.replace("'", "''")
    return f"INSERT INTO embedline.allowed_endpoint (scheme, host, port) VALUES ('{scheme}', '{quoted}', {port});"


def is_forbidden_address(address: str) -> bool:
    """Return True if an IP address is link-local, or that of a cloud's metadata.

    A name is not resolved here, so it is none.
    """
    # A session's first search pays for each import, and asks at no address itself.
    import ipaddress

    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found in ipaddress.IPv6Network(_NAT64):
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_link_local or found.compressed in _METADATA
