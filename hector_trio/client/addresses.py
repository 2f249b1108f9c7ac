"""Where a server is: its address, taken apart and put together."""

from __future__ import annotations

import ipaddress
from urllib.parse import quote, urlsplit

from msgspec import Struct

from hector_trio.errors import InvalidRequest


class Address(Struct, frozen=True):
    """Where a server is."""

    tls: bool
    host: str
    port: int
    host_header: str
    path: str
    """Below which it is served; no slash at the end."""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.path}"

    @property
    def socket_url(self) -> str:
        """Without the path."""
        return f"{'wss' if self.tls else 'ws'}://{self.host_header}"


def parse(url: str) -> Address:
    """Raises: InvalidRequest."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.strip().isprintable():
        raise InvalidRequest(f"{url!r} is no server's address, such as http://127.0.0.1:8080")
    if "@" in parts.netloc:
        raise InvalidRequest("A server's address holds no user and password; give a token instead")
    if parts.query or parts.fragment:
        raise InvalidRequest(f"A server's address ends before ? and #: {url!r}")
    tls = parts.scheme == "https"
    name = f"[{host}]" if ":" in host else host
    shown = name if port is None else f"{name}:{port}"
    return Address(tls, host, port or (443 if tls else 80), shown, parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def path_of(*segments: str) -> str:
    for each in segments:
        if each in ("", ".", ".."):
            raise InvalidRequest(f"{each!r} is no id")
    return "".join("/" + quote(each, safe="~") for each in segments)
