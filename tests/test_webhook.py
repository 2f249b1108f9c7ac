"""Requests to webhooks, against real loopback servers."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trustme

from hector_trio.reach import Address, NotReachable, Reach, parse
from hector_trio.webhook import Answer, Webhooks
from tests.webhooks import Reply, webhook

LOOPBACK = ipaddress.ip_address("127.0.0.1")
PUBLIC = ipaddress.ip_address("93.184.216.34")
HEADERS = [("Content-Type", "application/a2a+json"), ("Authorization", "Bearer c")]


class Names:
    """A name server that answers each time with the next of what a test has planned, then with the last for ever."""

    def __init__(self, *answers: Sequence[Address]) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answers = list(answers)

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        await trio.lowlevel.checkpoint()
        self.asked.append((host, port))
        found = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if not found:
            raise socket.gaierror("no such host")
        return found


async def post(webhooks: Webhooks, url: str) -> Answer:
    with trio.fail_after(20):
        return await webhooks.post(parse(url), HEADERS, b'{"a":1}')


async def test_the_body_and_the_headers_arrive_and_the_answer_is_told() -> None:
    webhooks = Webhooks(Reach(loopback=True), 5)
    async with webhook() as hook:
        hook.plan(Reply(202), Reply(503, {"Retry-After": "7"}))
        assert await post(webhooks, f"{hook.origin}/a/b?c=%20d") == Answer(202, "202")
        assert await post(webhooks, hook.url) == Answer(503, "503", 7.0)
        seen = hook.seen[0]
    assert (seen.method, seen.target, seen.content) == ("POST", "/a/b?c=%20d", b'{"a":1}')
    assert seen.headers == {
        "host": f"127.0.0.1:{hook.port}",
        "connection": "close",
        "content-type": "application/a2a+json",
        "authorization": "Bearer c",
        "content-length": "7",
    }


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    webhooks = Webhooks(Reach(loopback=True), 5)
    async with webhook() as hook, webhook() as inside:
        hook.plan(Reply(status, {"Location": inside.url}))
        answer = await post(webhooks, hook.url)
        assert (answer.status, answer.delivered) == (status, False)
        assert (inside.seen, inside.cut) == ([], 0)


async def test_this_machine_is_not_called_by_default_under_any_name() -> None:
    webhooks = Webhooks(Reach(), 5)
    async with webhook() as hook:
        for host in ("127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "017700000001", "0", "0.0.0.0"):
            url = f"http://{host}:{hook.port}/"
            assert (await post(webhooks, url)).reason == f"{host} is at an address that is not public"
            with pytest.raises(NotReachable):
                await webhooks.check(parse(url))
        assert (hook.seen, hook.cut) == ([], 0)


async def test_a_name_that_leads_elsewhere_the_second_time_is_not_followed_there() -> None:
    names = Names([PUBLIC], [LOOPBACK])
    webhooks = Webhooks(Reach(), 5, resolve=names)
    async with webhook() as hook:
        url = f"http://rebinding.example:{hook.port}/"
        await webhooks.check(parse(url))
        answer = await post(webhooks, url)
        assert answer == Answer(None, "rebinding.example is at an address that is not public")
        assert (hook.seen, hook.cut) == ([], 0)


async def test_the_connection_goes_to_the_address_that_was_checked_and_the_name_is_asked_for_once() -> None:
    names = Names([LOOPBACK], [PUBLIC])
    webhooks = Webhooks(Reach(loopback=True), 5, resolve=names)
    async with webhook() as hook:
        assert (await post(webhooks, f"http://hooks.example:{hook.port}/")).delivered
        assert hook.seen[0].headers["host"] == f"hooks.example:{hook.port}"
    assert names.asked == [("hooks.example", hook.port)]


async def test_the_next_address_is_tried_when_nobody_is_at_the_first() -> None:
    nobody = ipaddress.ip_address("127.9.9.9")
    webhooks = Webhooks(Reach(loopback=True), 5, resolve=Names([ipaddress.ip_address("::1"), nobody, LOOPBACK]))
    async with webhook() as hook:
        assert (await post(webhooks, f"http://hooks.example:{hook.port}/")).delivered


async def test_a_name_that_is_not_there_is_no_reason_to_refuse_and_no_answer() -> None:
    webhooks = Webhooks(Reach(), 5, resolve=Names([]))
    await webhooks.check(parse("http://gone.example/"))
    assert await post(webhooks, "http://gone.example/") == Answer(None, "no connection")


async def test_a_label_longer_than_a_name_may_have_is_no_answer() -> None:
    webhooks = Webhooks(Reach(), 5)
    host = "a" * 63 + "." + "b" * 62 + ".invalid"
    assert (await post(webhooks, f"http://{host}/")).status is None


@asynccontextmanager
async def listening(sock: socket.socket) -> AsyncIterator[int]:
    with sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


async def test_a_webhook_that_does_not_answer_in_time_has_not_answered() -> None:
    webhooks = Webhooks(Reach(loopback=True), 0.2)
    async with listening(socket.socket()) as port:
        for scheme in ("http", "https"):  # in the handshake, too
            assert await post(webhooks, f"{scheme}://127.0.0.1:{port}/") == Answer(None, "timeout")


async def test_an_answer_whose_body_never_comes_is_an_answer() -> None:
    webhooks = Webhooks(Reach(loopback=True), 5)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

        async def answer_half() -> None:
            async with await listener.accept() as stream:
                await stream.receive_some()
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
                await stream.receive_some()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_half)
            port = sock.getsockname()[1]
            assert (await post(webhooks, f"http://127.0.0.1:{port}/")).delivered


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000])
async def test_what_is_no_answer_is_none(said: bytes) -> None:
    webhooks = Webhooks(Reach(loopback=True), 5)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def say(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some()
            await stream.send_all(said)
        except trio.BrokenResourceError:
            pass
        finally:
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, say, listeners)
        answer = await post(webhooks, f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/")
        assert answer.status is None
        assert answer.reason
        nursery.cancel_scope.cancel()


def contexts(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server with a certificate for a name, and of a client that trusts it."""
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(server)
    authority.configure_trust(client)
    return server, client


async def test_with_tls_the_certificate_is_that_of_the_name_although_the_address_is_connected_to() -> None:
    server, client = contexts("hooks.example")
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    async with webhook(server) as hook:
        webhooks = Webhooks(Reach(loopback=True), 5, tls=client, resolve=Names([LOOPBACK]))
        assert (await post(webhooks, f"https://hooks.example:{hook.port}/")).delivered
        assert asked == ["hooks.example"]
        answer = await post(webhooks, f"https://other.example:{hook.port}/")
        assert answer.status is None
        assert len(hook.seen) == 1
