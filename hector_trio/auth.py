"""Who may call: a token becomes a Principal, and the rules about origins, hosts and proxies, all without I/O."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import math
import re
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import Final, Literal, NamedTuple, Protocol

from msgspec import Struct

from hector_trio.config import Auth
from hector_trio.errors import Forbidden, InvalidToken, Unauthorized

Role = Literal["admin", "user", "viewer"]
Right = Literal["read", "write", "metrics", "debug"]

RIGHTS: Final[dict[Role, frozenset[Right]]] = {
    "viewer": frozenset({"read"}),
    "user": frozenset({"read", "write"}),
    "admin": frozenset({"read", "write", "metrics", "debug"}),
}
"""What each role may. ``read`` and ``write`` always mean the caller's own sessions and tasks, whatever the role."""

CHALLENGE: Final = 'Bearer realm="hector"'
"""The ``WWW-Authenticate`` of a 401 (RFC 6750, section 3)."""

BEARER: Final = "bearer"
"""The WebSocket subprotocol behind which a token stands, and which is accepted with it."""

ENCODED: Final = "base64url."
"""Before a token in a subprotocol that could not stand there as it is: base64url of it, without padding."""


class Principal(Struct, frozen=True):
    """Who calls. ``owner`` is written on every row that they make; ``name`` is for people and logs."""

    owner: str
    name: str
    role: Role
    expires_at: float | None = None
    """Unix time after which the token no longer counts; ``None``: it always does."""

    @property
    def seconds_left(self) -> float:
        """Seconds for which a stream may still be served; ``inf`` without an end."""
        return math.inf if self.expires_at is None else self.expires_at - time.time()

    def may(self, right: Right) -> bool:
        return right in RIGHTS[self.role]

    @property
    def may_write(self) -> bool:
        return self.may("write")

    def forbidden(self, right: Right = "write") -> Forbidden:
        """The error for a right that this caller does not have."""
        return Forbidden(f"The role {self.role!r} may not {_DEEDS[right]}")


_DEEDS: Final[dict[Right, str]] = {
    "read": "read",
    "write": "run agents or change anything",
    "metrics": "read metrics",
    "debug": "look inside the server",
}

LOCAL: Final = Principal(owner="local", name="local", role="admin")
"""Everybody, while no tokens are configured."""


class Issuer(Protocol):
    """Whoever proves tokens that we have not issued."""

    async def holder(self, token: str) -> Principal:
        """Whose token it is. Raises: InvalidToken, KeysUnavailable."""
        ...


class Authenticator:
    """Knows the configured tokens, as digests only, and asks the issuer about the others."""

    def __init__(self, auth: Auth, issuer: Issuer | None = None) -> None:
        self._issuer = issuer
        self._known = [
            (_digest(token.token), Principal(owner=token.name, name=token.name, role=token.role))
            for token in auth.tokens
        ]

    @property
    def required(self) -> bool:
        """Whether a token is needed at all."""
        return bool(self._known) or self._issuer is not None

    async def authenticate(
        self, authorization: str | None, subprotocols: Sequence[str] = ()
    ) -> tuple[Principal, str | None]:
        """Who sent this ``Authorization`` header and offered these WebSocket subprotocols, and the one to accept.

        A header, if there is one, decides alone. ``bearer`` is accepted wherever it is offered, with or without tokens
        configured: a browser gives up a WebSocket whose server accepts none of the subprotocols it offered.

        Waits only where the issuer's keys have to be fetched. Raises: Unauthorized, whose message says nothing about
        the token; KeysUnavailable.
        """
        accepted = BEARER if BEARER in subprotocols else None
        if not self.required:
            return LOCAL, accepted
        if authorization is not None:
            scheme, _, token = authorization.strip().partition(" ")
            if scheme.lower() != BEARER or not token.strip():
                raise Unauthorized("The Authorization header is not of the form: Bearer TOKEN")
            return await self._holder(token.strip()), accepted
        offered = _offered_token(subprotocols)
        if offered is None:
            raise Unauthorized(
                "A token is needed: send the header Authorization: Bearer TOKEN, or, on a WebSocket,"
                " Sec-WebSocket-Protocol: bearer, TOKEN"
            )
        return await self._holder(offered), accepted

    async def _holder(self, token: str) -> Principal:
        digest = _digest(token)
        found: Principal | None = None
        # All of them, always: how long it takes must not tell which token was near.
        for known, principal in self._known:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is not None:
            return found
        if self._issuer is None:
            raise InvalidToken("The token is not accepted")
        return await self._issuer.holder(token)


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def _offered_token(subprotocols: Sequence[str]) -> str | None:
    """The token offered behind ``bearer``."""
    for word, token in pairwise(subprotocols):
        if word == BEARER:
            return _decoded(token)
    return None


def _decoded(token: str) -> str:
    if not token.startswith(ENCODED):
        return token
    text = token.removeprefix(ENCODED)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return token


# --- origins and hosts ------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    scheme: str
    host: str
    port: int | None


_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_*](?:[A-Za-z0-9._-]*))(?::(?P<port>[0-9]{1,5}))?\Z")
_PORTS: Final = {"http": 80, "https": 443}


def origin_allowed(origin: str | None, *, scheme: str, host_header: str | None, allow_origins: Sequence[str]) -> bool:
    """Whether a request with this ``Origin`` may be served (``scheme`` and ``host_header`` are the request's own).

    Allowed are: no ``Origin`` (not a browser's cross-origin request), the server's own, loopback ones, and those
    listed; ``*`` lists all but ``null``, which only its own entry allows.
    """
    if origin is None:
        return True
    if origin == "null":
        return "null" in allow_origins
    place = _place(origin)
    if "*" in allow_origins:
        return True
    if place is None:
        return False
    return _is_own(place, scheme, host_header) or _is_loopback_origin(place) or _is_listed(place, allow_origins)


def cors_origin(
    origin: str | None, *, scheme: str, host_header: str | None, allow_origins: Sequence[str]
) -> str | None:
    """The ``Access-Control-Allow-Origin`` of the answer; None where the request needs or gets none.

    With ``*`` it is ``*``, which browsers never combine with credentials. Anything else varies by ``Origin``.
    """
    if origin is None or not origin_allowed(
        origin, scheme=scheme, host_header=host_header, allow_origins=allow_origins
    ):
        return None
    return "*" if "*" in allow_origins and origin != "null" else origin


def host_allowed(host_header: str | None, *, loopback_bind: bool, allowed_hosts: Sequence[str]) -> bool:
    """Whether a request with this ``Host`` may be served; ports do not count.

    On a loopback bind only loopback names and the allowed ones: a page whose name was re-pointed to this machine (DNS
    rebinding) carries its own name. No ``Host`` at all comes from HTTP/1.0 programs, never from browsers.
    """
    if not loopback_bind or host_header is None or "*" in allowed_hosts:
        return True
    place = _split_host(host_header, "http")
    if place is None:
        return False
    if place.host == "localhost" or place.host.endswith(".localhost") or _is_loopback_address(place.host):
        return True
    return any(_covers(allowed.lower().strip("[]"), place.host) for allowed in allowed_hosts)


def _place(origin: str) -> _Place | None:
    """An origin taken apart, in one spelling: lower case, no default port, no final dot."""
    scheme, separator, rest = origin.partition("://")
    return _split_host(rest, scheme.lower()) if separator and scheme else None


def _split_host(text: str, scheme: str) -> _Place | None:
    match = _HOST.match(text)
    if match is None:
        return None
    scheme = {"ws": "http", "wss": "https"}.get(scheme, scheme)
    port = int(match["port"]) if match["port"] else None
    host = match["host"].lower().strip("[]")
    return _Place(scheme, host.removesuffix("."), None if port == _PORTS.get(scheme) else port)


def _is_own(place: _Place, scheme: str, host_header: str | None) -> bool:
    return host_header is not None and place == _split_host(host_header, scheme)


def _is_loopback_origin(place: _Place) -> bool:
    return place.scheme in _PORTS and (place.host == "localhost" or _is_loopback_address(place.host))


def _is_listed(place: _Place, allow_origins: Sequence[str]) -> bool:
    for entry in allow_origins:
        listed = _place(entry)
        if listed is not None and listed[::2] == place[::2] and _covers(listed.host, place.host):
            return True
    return False


def _covers(pattern: str, host: str) -> bool:
    """Whether ``pattern`` (a name, or ``*.name`` for any subdomain) covers ``host``."""
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and host != pattern[1:]
    return host == pattern.removesuffix(".")


def _is_loopback_address(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_loopback


# --- proxies ----------------------------------------------------------------------------------------------------------

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Seen(NamedTuple):
    """A request as the outside saw it: its scheme and host, and the address of the client (None: a Unix socket)."""

    scheme: str
    host: str | None
    client: str | None


def trusted_peer(client_ip: str | None, trusted_proxies: Sequence[str]) -> bool:
    """Whether the peer's word about whom it forwards counts. ``None`` is a peer on the Unix socket."""
    if not trusted_proxies:
        return False
    everybody, unix, networks = _networks(tuple(trusted_proxies))
    if everybody:
        return True
    if client_ip is None:
        return unix
    address = _address(client_ip)
    return address is not None and any(address in network for network in networks)


def forwarded(
    headers: Iterable[tuple[bytes, bytes]],
    *,
    scheme: str,
    host: str | None,
    client: str | None,
    trusted_proxies: Sequence[str],
) -> Seen:
    """The request as the outside saw it: ``X-Forwarded-Proto``, ``-Host`` and ``-For`` of a trusted proxy.

    ``headers`` have lower-case names (ASGI). The client is the right-most address that is no trusted proxy: what stands
    left of it anybody may have written. A WebSocket's scheme stays one (``ws``, ``wss``).
    """
    seen = Seen(scheme, host, client)
    if not trusted_peer(client, trusted_proxies):
        return seen
    said: dict[bytes, list[str]] = {}
    for name, value in headers:
        if name.startswith(b"x-forwarded-"):
            said.setdefault(name, []).extend(part.strip() for part in value.decode("latin-1").split(","))
    protocols = said.get(b"x-forwarded-proto", [""])
    secure = {"http": False, "ws": False, "https": True, "wss": True}.get(protocols[-1].lower())
    if secure is not None:
        plain = "ws" if scheme in ("ws", "wss") else "http"
        seen = seen._replace(scheme=plain + "s" if secure else plain)
    hosts = said.get(b"x-forwarded-host", [""])
    if _split_host(hosts[-1], "http") is not None:
        seen = seen._replace(host=hosts[-1])
    return seen._replace(client=_first_stranger(said.get(b"x-forwarded-for", []), client, trusted_proxies))


def _first_stranger(chain: Sequence[str], peer: str | None, trusted_proxies: Sequence[str]) -> str | None:
    nearest = peer
    for text in reversed(chain):
        place = _split_host(text, "") if text.count(":") <= 1 or text.startswith("[") else None
        address = _address(place.host if place is not None else text)
        if address is None:
            break  # "unknown", or not an address: what is left of it cannot be checked
        nearest = str(address)
        if not trusted_peer(nearest, trusted_proxies):
            break
    return nearest


@lru_cache(maxsize=16)
def _networks(trusted: tuple[str, ...]) -> tuple[bool, bool, tuple[_Network, ...]]:
    networks = tuple(ipaddress.ip_network(each, strict=False) for each in trusted if each not in ("*", "unix"))
    return "*" in trusted, "unix" in trusted, networks


def _address(text: str) -> _Address | None:
    """An address; one of IPv4 in IPv6's clothes as what it is."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
