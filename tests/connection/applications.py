"""The small applications that the tests of connections serve, and what these tests share."""

import json
import ssl
import sys
import uuid
from typing import Any

import pytest
import trio

from tests.hostile import accept, asgi

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux tells")
BLOCK = b"x" * 65536


class Told:
    """What a handler has seen, and when it was told to end."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        self.events: list[Any] = []
        self.ended = trio.Event()

    async def listen(self, receive: Any) -> None:
        """Take everything up to the disconnect."""
        self.started.set()
        while True:
            event = await receive()
            self.events.append(event)
            if event["type"].endswith("disconnect"):
                self.ended.set()
                return


def listener(told: Told) -> Any:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await told.listen(receive)

    return asgi(websocket=websocket)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await accept(receive, send)
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"], "bytes": event["bytes"]})


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def problem_of(answer: bytes) -> dict[str, Any]:
    """The problem that a whole *answer* holds, checked against its head."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    problem: dict[str, Any] = json.loads(body)
    assert problem["status"] == int(status.split(b" ")[1])
    assert problem["type"] == f"urn:hector:problem:{problem['code']}"
    assert problem["instance"] == ""
    assert problem["title"]
    assert problem["detail"]
    assert uuid.UUID(problem["requestId"])
    assert headers[b"x-request-id"].decode() == problem["requestId"]
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-length"] == b"%d" % len(body)
    assert headers[b"connection"] == b"close"
    assert (headers.get(b"upgrade"), headers.get(b"sec-websocket-version")) == (
        (b"websocket", b"13") if problem["status"] == 426 else (None, None)
    )
    assert (b"retry-after" in headers) == (problem["status"] == 503)
    return problem


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server and of a client that trusts it and would rather speak HTTP/2."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    client.set_alpn_protocols(["h2", "http/1.1"])
    return server, client


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
