"""Who may call: tokens and roles, and the rules about origins, hosts and proxies."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.auth import (
    LOCAL,
    RIGHTS,
    Authenticator,
    Principal,
    Seen,
    cors_origin,
    forwarded,
    host_allowed,
    origin_allowed,
    trusted_peer,
)
from hector_trio.config import Auth, Token
from hector_trio.errors import Forbidden, Unauthorized

ALICE = "alice-token-0123456789"
ODD = "odd/token+with=signs,0123"
AUTHENTICATOR = Authenticator(
    Auth(
        tokens=[
            Token(name="alice", token=ALICE),
            Token(name="bob", token=ODD, role="viewer"),
            Token(name="root", token="root-token-0123456789", role="admin"),
        ]
    )
)


def authenticate(
    header: str | None, subprotocols: Sequence[str] = (), by: Authenticator = AUTHENTICATOR
) -> tuple[Principal, str | None]:
    return trio.run(by.authenticate, header, subprotocols)


# --- tokens and roles -------------------------------------------------------------------------------------------------


def test_without_tokens_everybody_is_the_local_user() -> None:
    authenticator = Authenticator(Auth())
    assert not authenticator.required
    assert authenticate(None, by=authenticator) == (LOCAL, None)
    assert authenticate("Bearer whatever", by=authenticator) == (LOCAL, None)
    assert (LOCAL.owner, LOCAL.role) == ("local", "admin")


def test_a_browser_that_offers_a_token_where_none_is_needed_still_gets_its_subprotocol() -> None:
    assert authenticate(None, ["bearer", "x"], Authenticator(Auth())) == (LOCAL, "bearer")


@pytest.mark.parametrize("header", [f"Bearer {ALICE}", f"bearer {ALICE}", f"  BEARER   {ALICE} "])
def test_a_bearer_token_names_its_owner(header: str) -> None:
    assert AUTHENTICATOR.required
    assert authenticate(header) == (Principal("alice", "alice", "user"), None)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer no", f"Basic {ALICE}", ALICE, f"Bearer {ALICE} x", "Bearer \udcff\xe4"]
)
def test_any_other_header_is_refused_without_repeating_it(header: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        authenticate(header)
    assert ALICE not in caught.value.detail


def test_no_token_at_all_is_told_how_to_send_one() -> None:
    for subprotocols in ([], ["bearer"], ["chat", "v2"]):
        with pytest.raises(Unauthorized, match="Authorization: Bearer TOKEN"):
            authenticate(None, subprotocols)


def test_a_websocket_may_offer_its_token_as_a_subprotocol() -> None:
    principal, accepted = authenticate(None, ["bearer", ALICE])
    assert (principal.owner, accepted) == ("alice", "bearer")
    principal, accepted = authenticate(None, ["chat", "bearer", ALICE, "more"])
    assert (principal.owner, accepted) == ("alice", "bearer")


def test_a_token_with_odd_signs_is_offered_in_base64url() -> None:
    encoded = base64.urlsafe_b64encode(ODD.encode()).decode().rstrip("=")
    principal, accepted = authenticate(None, ["bearer", f"base64url.{encoded}"])
    assert (principal.owner, accepted) == ("bob", "bearer")


@pytest.mark.parametrize("offered", ["base64url.", "base64url.%%%", "base64url._w", "base64url.a", "nope"])
def test_a_wrong_token_in_a_subprotocol_is_refused(offered: str) -> None:
    with pytest.raises(Unauthorized):
        authenticate(None, ["bearer", offered])


def test_a_wrong_header_is_not_helped_by_a_good_subprotocol() -> None:
    with pytest.raises(Unauthorized):
        authenticate("Bearer wrong", ["bearer", ALICE])


def test_roles_grow_and_only_admins_see_inside() -> None:
    assert RIGHTS["viewer"] < RIGHTS["user"] < RIGHTS["admin"]
    viewer, user, admin = (authenticate(f"Bearer {token}")[0] for token in (ODD, ALICE, "root-token-0123456789"))
    assert (viewer.may("read"), viewer.may_write, viewer.may("metrics")) == (True, False, False)
    assert (user.may("read"), user.may_write, user.may("metrics"), user.may("debug")) == (True, True, False, False)
    assert (admin.may_write, admin.may("metrics"), admin.may("debug")) == (True, True, True)
    assert isinstance(viewer.forbidden(), Forbidden)
    assert viewer.forbidden().detail == "The role 'viewer' may not run agents or change anything"


@given(st.text(), st.lists(st.text(), max_size=4))
def test_nothing_but_a_token_gets_in(header: str, subprotocols: list[str]) -> None:
    with pytest.raises(Unauthorized):
        authenticate(header, subprotocols)


# --- origins ----------------------------------------------------------------------------------------------------------


def allowed(origin: str | None, *listed: str, scheme: str = "http", host: str | None = "hector.example:8080") -> bool:
    return origin_allowed(origin, scheme=scheme, host_header=host, allow_origins=listed)


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "http://hector.example:8080",
        "HTTP://Hector.Example:8080",
        "http://localhost",
        "https://localhost:3000",
        "http://127.0.0.1:5500",
        "http://127.3.2.1",
        "http://[::1]:80",
    ],
)
def test_own_and_loopback_origins_may_call(origin: str | None) -> None:
    assert allowed(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "http://evil.example",
        "http://hector.example",
        "https://hector.example:8080",
        "http://hector.example:8081",
        "http://hector.example:8080.evil.example",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://evil.example:80@localhost",
        "http://localhost:80@evil.example",
        "http://[::2]",
        "file://localhost",
        "ftp://localhost",
        "http://localhost/path",
        "http://localhost:",
        "localhost",
        "://localhost",
        "http://",
        "http://localhost http://evil.example",
        "http://0177.0.0.1",
        "chrome-extension://abcdef",
    ],
)
def test_other_origins_may_not(origin: str) -> None:
    assert not allowed(origin)


def test_the_scheme_of_a_websocket_is_that_of_its_page() -> None:
    assert allowed("https://hector.example", scheme="wss", host="hector.example")
    assert allowed("https://hector.example", scheme="wss", host="hector.example:443")
    assert not allowed("http://hector.example", scheme="wss", host="hector.example")


def test_without_a_host_no_origin_is_the_servers_own() -> None:
    assert not allowed("http://hector.example:8080", host=None)
    assert not allowed("http://hector.example:8080", host="bad host")


def test_listed_origins_may_call() -> None:
    assert allowed("https://app.example", "https://app.example")
    assert allowed("https://app.example:443", "https://APP.example")
    assert allowed("chrome-extension://abcdef", "chrome-extension://abcdef")
    assert allowed("https://a.b.app.example", "https://*.app.example")
    assert not allowed("https://app.example", "https://*.app.example")
    assert not allowed("https://evilapp.example", "https://*.app.example")
    assert not allowed("http://app.example", "https://app.example")
    assert not allowed("https://app.example:8443", "https://app.example")


def test_a_star_lists_all_but_null() -> None:
    assert allowed("https://anything.example", "*")
    assert not allowed("null", "*")
    assert allowed("null", "null")


def test_a_star_is_answered_with_a_star_and_others_with_themselves() -> None:
    def answer(origin: str | None, *listed: str) -> str | None:
        return cors_origin(origin, scheme="http", host_header="h", allow_origins=listed)

    assert answer(None, "*") is None
    assert answer("https://a.example", "*") == "*"
    assert answer("https://a.example", "https://a.example") == "https://a.example"
    assert answer("http://localhost:3000") == "http://localhost:3000"
    assert answer("https://b.example", "https://a.example") is None
    assert answer("null", "*", "null") == "null"


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        None,
        "localhost",
        "LocalHost:8080",
        "localhost.",
        "app.localhost:1",
        "127.0.0.1",
        "127.9.9.9:80",
        "[::1]:8080",
        "[::1]",
    ],
)
def test_loopback_hosts_are_served_on_a_loopback_bind(host: str | None) -> None:
    assert host_allowed(host, loopback_bind=True, allowed_hosts=[])


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8080",
        "10.0.0.1",
        "0.0.0.0",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "localhost:x",
        "a@localhost",
        "[::1",
        "::1",
        "[fe80::1]",
    ],
)
def test_other_hosts_are_not(host: str) -> None:
    assert not host_allowed(host, loopback_bind=True, allowed_hosts=[])
    assert host_allowed(host, loopback_bind=False, allowed_hosts=[])


def test_allowed_hosts_are_served() -> None:
    names = ["Hector.lan", "*.example.com", "192.168.1.2"]
    for host in ("hector.lan:8080", "a.example.com", "192.168.1.2:80"):
        assert host_allowed(host, loopback_bind=True, allowed_hosts=names)
    for host in ("example.com", "hector.lan.evil.example", "192.168.1.3"):
        assert not host_allowed(host, loopback_bind=True, allowed_hosts=names)
    assert host_allowed("anything.example", loopback_bind=True, allowed_hosts=["*"])


# --- proxies ----------------------------------------------------------------------------------------------------------

PROXIES = ["10.0.0.0/8", "::1", "192.168.1.5"]


def test_only_listed_peers_are_trusted() -> None:
    for address in ("10.1.2.3", "::1", "192.168.1.5", "::ffff:10.1.2.3"):
        assert trusted_peer(address, PROXIES)
    for stranger in ("11.0.0.1", "::2", "192.168.1.6", "", "nonsense", None):
        assert not trusted_peer(stranger, PROXIES)
    assert not trusted_peer("127.0.0.1", [])
    assert trusted_peer(None, ["unix"])
    assert not trusted_peer("10.0.0.1", ["unix"])
    assert trusted_peer(None, ["*"])
    assert trusted_peer("1.2.3.4", ["*"])


def through(*headers: tuple[str, str], client: str | None = "10.0.0.1", scheme: str = "http") -> Seen:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return forwarded(raw, scheme=scheme, host="inner:8080", client=client, trusted_proxies=PROXIES)


def test_a_trusted_proxy_tells_scheme_host_and_client() -> None:
    seen = through(
        ("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "hector.example"), ("X-Forwarded-For", "203.0.113.7")
    )
    assert seen == Seen("https", "hector.example", "203.0.113.7")


def test_a_stranger_tells_nothing() -> None:
    headers = [("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "x"), ("X-Forwarded-For", "1.1.1.1")]
    assert through(*headers, client="203.0.113.9") == Seen("http", "inner:8080", "203.0.113.9")
    assert through(*headers, client=None) == Seen("http", "inner:8080", None)


def test_the_client_is_the_rightmost_address_that_is_no_proxy() -> None:
    assert through(("X-Forwarded-For", "6.6.6.6, 203.0.113.7, 10.0.0.2")).client == "203.0.113.7"
    assert through(("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "203.0.113.7,10.0.0.2")).client == "203.0.113.7"
    assert through(("X-Forwarded-For", "10.0.0.3, 10.0.0.2")).client == "10.0.0.3"


def test_a_client_may_come_with_its_port() -> None:
    assert through(("X-Forwarded-For", "203.0.113.7:5000")).client == "203.0.113.7"
    assert through(("X-Forwarded-For", "[2001:db8::1]:5000")).client == "2001:db8::1"
    assert through(("X-Forwarded-For", "2001:db8::1")).client == "2001:db8::1"


@pytest.mark.parametrize("garbage", ["unknown", "", "x y", "_hidden", "1.2.3", "\xff"])
def test_what_is_left_of_garbage_does_not_count(garbage: str) -> None:
    assert through(("X-Forwarded-For", f"6.6.6.6, {garbage}, 10.0.0.2")).client == "10.0.0.2"
    assert through(("X-Forwarded-For", garbage)).client == "10.0.0.1"


def test_nonsense_from_a_proxy_changes_nothing() -> None:
    seen = through(("X-Forwarded-Proto", "gopher"), ("X-Forwarded-Host", "a b"), ("X-Forwarded-Host", "c/d"))
    assert seen == Seen("http", "inner:8080", "10.0.0.1")


def test_a_websocket_stays_one_behind_a_proxy() -> None:
    assert through(("X-Forwarded-Proto", "https"), scheme="ws").scheme == "wss"
    assert through(("X-Forwarded-Proto", "wss"), scheme="ws").scheme == "wss"
    assert through(("X-Forwarded-Proto", "http"), scheme="wss").scheme == "ws"


def test_of_several_words_the_nearest_proxys_counts() -> None:
    assert through(("X-Forwarded-Proto", "http, https")).scheme == "https"


@given(
    st.lists(st.tuples(st.sampled_from([b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"]), st.binary()))
)
def test_no_header_of_a_proxy_can_break_anything(headers: list[tuple[bytes, bytes]]) -> None:
    seen = forwarded(headers, scheme="http", host="h", client="10.0.0.1", trusted_proxies=PROXIES)
    assert seen.scheme in ("http", "https")


@given(st.text(), st.text())
def test_no_origin_or_host_can_break_anything(origin: str, host: str) -> None:
    assert origin_allowed(origin, scheme="http", host_header=host, allow_origins=[]) in (True, False)
    assert host_allowed(host, loopback_bind=True, allowed_hosts=["a.b"]) in (True, False)
