"""Which addresses are called, and how they are written."""

from __future__ import annotations

import ipaddress

import pytest

from hector_trio.reach import NotReachable, Reach, Webhook, is_public, parse


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://example.com", Webhook("https", "example.com", 443, "/")),
        ("http://Example.COM.:8080/a/b?c=d#e", Webhook("http", "example.com", 8080, "/a/b?c=d")),
        ("HTTPS://[2001:DB8:0::1]/x", Webhook("https", "2001:db8::1", 443, "/x")),
        ("http://127.0.0.1?x", Webhook("http", "127.0.0.1", 80, "/?x")),
    ],
)
def test_an_address_is_taken_apart(url: str, parts: Webhook) -> None:
    assert parse(url) == parts


@pytest.mark.parametrize(
    ("parts", "authority"),
    [
        (Webhook("https", "example.com", 443, "/"), "example.com"),
        (Webhook("http", "example.com", 443, "/"), "example.com:443"),
        (Webhook("http", "::1", 81, "/"), "[::1]:81"),
        (Webhook("http", "::1", 80, "/"), "[::1]"),
    ],
)
def test_the_host_header_has_the_port_that_is_not_the_schemes(parts: Webhook, authority: str) -> None:
    assert parts.authority == authority
    assert parts.origin == f"{parts.scheme}://{authority}"


@pytest.mark.parametrize(
    "url",
    [
        "", "example.com", "//example.com", "ftp://example.com", "file:///etc/passwd", "gopher://example.com", "http://",
        "http:///x", "https://:443", "http://user@example.com", "http://user:word@example.com", "http://example.com:0",
        "http://example.com:99999", "http://example.com:x", "http://exa mple.com", "http://example.com/\r\nX: y",
        "http://example.com\\@127.0.0.1/", "http://ex%61mple.com", "http://bücher.example", "http://[::1", "http://[x]",
        "http://[fe80::1%25eth0]/", "http://a..b/", "http://-a.com/", "http://\texample.com",
        "https://e.com/" + "x" * 2048,
    ],
)  # fmt: skip
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(has|holds|is|must|names)"):
        parse(url)


INTERNAL = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1",
    "127.255.0.1", "169.254.169.254", "169.254.0.1", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.9", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "fe80::1",
    "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254",
    "64:ff9b::10.0.0.1", "64:ff9b:1::8.8.8.8", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1",
    "4000::1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.1",
    "169.253.255.255", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "192.169.0.0", "223.255.255.255",
    "2606:4700::1111", "2001:4860:4860::8888", "64:ff9b::8.8.8.8",
]  # fmt: skip


@pytest.mark.parametrize("address", INTERNAL)
def test_what_is_internal_in_any_form_is_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(NotReachable, match="not public") as caught:
        Reach().check("example.com", [ipaddress.ip_address(address)])
    assert address not in str(caught.value)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_may_be_called(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    Reach().check("example.com", [ipaddress.ip_address(address)])


def test_one_internal_address_among_public_ones_is_enough() -> None:
    with pytest.raises(NotReachable):
        Reach().check("example.com", [ipaddress.ip_address("1.1.1.1"), ipaddress.ip_address("10.0.0.1")])


@pytest.mark.parametrize(
    ("allow", "host", "address", "may"),
    [
        (["10.1.0.0/16"], "x", "10.1.2.3", True),
        (["10.1.0.0/16"], "x", "10.2.0.1", False),
        (["10.1.2.3"], "x", "10.1.2.3", True),
        (["10.1.2.3"], "x", "::ffff:10.1.2.3", False),
        (["fd00::/8"], "x", "fd00::1", True),
        (["hooks.lan"], "hooks.lan", "10.0.0.1", True),
        (["Hooks.LAN."], "hooks.lan", "10.0.0.1", True),
        (["hooks.lan"], "a.hooks.lan", "10.0.0.1", False),
        (["*.lan"], "a.b.lan", "10.0.0.1", True),
        (["*.lan"], "lan", "10.0.0.1", False),
        (["*.lan"], "evil-lan", "10.0.0.1", False),
    ],
)
def test_what_is_allowed_may_be_called_and_nothing_beside_it(
    allow: list[str], host: str, address: str, may: bool
) -> None:
    reach = Reach(allow)
    if may:
        reach.check(host, [ipaddress.ip_address(address)])
    else:
        with pytest.raises(NotReachable):
            reach.check(host, [ipaddress.ip_address(address)])


def test_this_machine_is_allowed_by_a_word_of_its_own() -> None:
    reach = Reach(loopback=True)
    reach.check("localhost", [ipaddress.ip_address("::1"), ipaddress.ip_address("127.8.8.8")])
    for other in ("10.0.0.1", "0.0.0.0", "::ffff:127.0.0.1"):
        with pytest.raises(NotReachable):
            reach.check("localhost", [ipaddress.ip_address(other)])
