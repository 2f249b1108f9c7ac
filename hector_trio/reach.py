"""Which webhooks may be called: how their address is written, and where no client may send this server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

LONGEST: Final = 2048
"""Characters that a webhook's address may have."""

_CHARACTERS: Final = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+\Z")
"""Of RFC 3986. What is not among them, clever parsers disagree about."""
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\Z")

PORTS: Final = {"http": 80, "https": 443}

# What the registries of special addresses (RFC 6890 and after) name, and no webhook is at. Written out, because what
# Python calls global has changed from version to version.
_INTERNAL_4: Final = tuple(
    ipaddress.IPv4Network(each)
    for each in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; metadata of one cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # public by its number, but one cloud's host, with metadata
        "169.254.0.0/16",  # link-local, and metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; metadata of one cloud
        "192.0.2.0/24",  # documentation, as the next two
        "198.51.100.0/24",
        "203.0.113.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_LOOPBACK: Final = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))
_GLOBAL_6: Final = ipaddress.IPv6Network("2000::/3")
"""All that is given out to anybody; what is outside is loopback, link-local, unique local, multicast, or nothing."""
_INTERNAL_6: Final = tuple(
    ipaddress.IPv6Network(each)
    for each in (
        "2001::/23",  # protocol assignments, Teredo among them, which carries an IPv4 address
        "2001:db8::/32",  # documentation, as the next
        "3fff::/20",
        "2002::/16",  # 6to4, which carries an IPv4 address
    )
)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""Leads to the IPv4 address in its last 32 bits."""


class NotReachable(Exception):
    """The address is not one that this server calls for its clients. Says why."""


class Webhook(NamedTuple):
    """Where a webhook is, taken apart once: whoever connects and whoever asks use the same parts."""

    scheme: str
    host: str
    """Lower case; an IPv6 address without brackets."""
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """What stands in ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """All of it that may stand in a log: path and query may hold secrets."""
        return f"{self.scheme}://{self.authority}"


def parse(url: str) -> Webhook:
    """Takes a webhook's address apart. Raises: ValueError, with what is wrong with it."""
    if len(url) > LONGEST:
        raise ValueError(f"has more than {LONGEST} characters")
    if not _CHARACTERS.match(url):
        raise ValueError("holds characters that no URL has; write them percent-encoded, and the host in punycode")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.scheme not in PORTS:
        raise ValueError("must begin with https:// or http://")
    if "@" in parts.netloc:
        raise ValueError("holds a user or password; say them in authentication")
    if ":" in host:
        try:
            host = ipaddress.IPv6Address(host).compressed
        except ValueError:
            host = ""
        if "%" in host:
            raise ValueError("names an interface")
    if not (":" in host or _NAME.match(host)) or port == 0:
        raise ValueError("has no host that can be called")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Webhook(parts.scheme, host, port or PORTS[parts.scheme], target)


class Reach:
    """Whom this server calls for its clients: whoever is public, and what the configuration allows besides."""

    def __init__(self, allow: Iterable[str] = (), *, loopback: bool = False) -> None:
        """``allow``: addresses, networks, host names, and ``*.name`` for all hosts below a name."""
        self._names: set[str] = set()
        self._below: tuple[str, ...] = ()
        networks: list[Network] = list(_LOOPBACK) if loopback else []
        for each in allow:
            try:
                networks.append(ipaddress.ip_network(each, strict=False))
            except ValueError:
                name = each.lower().rstrip(".")
                if name.startswith("*."):
                    self._below += (name[1:],)
                else:
                    self._names.add(name)
        self._networks = tuple(networks)

    def check(self, host: str, addresses: Iterable[Address]) -> None:
        """Raises: NotReachable for a host one of whose addresses is not to be called.

        One is enough: public ones beside it would be a disguise. A network is allowed for the address itself, not for
        what an address in another one carries.
        """
        if host in self._names or host.endswith(self._below):
            return
        if not all(self._is_allowed(address) or is_public(address) for address in addresses):
            raise NotReachable(f"{host} is at an address that is not public")  # which one, is nobody's business

    def _is_allowed(self, address: Address) -> bool:
        return any(address.version == each.version and address in each for each in self._networks)


def is_public(address: Address) -> bool:
    """Whether anybody could be there, and nobody else can be meant."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in each for each in _INTERNAL_4)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _GLOBAL_6 and not any(address in each for each in _INTERNAL_6)
