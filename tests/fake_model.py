"""A model's server for tests: real loopback sockets, OpenAI's chat completions, scripted, and it sees who hangs up.

    fake = await serve_fake_model(nursery)          # ends with the nursery
    fake.plan(says("Hello ", "world"), refuses(429, headers={"Retry-After": "0"}), silent())
    … point a client at fake.base_url …
    (exchange,) = await fake.wait_requests(1)       # exchange.body, exchange.headers
    await exchange.closed.wait()                    # the client's FIN or RST has arrived, at exchange.closed_at
    assert fake.open_connections == 0

Each request takes the next planned behaviour; without one, the behaviour that ``fake.models`` has for the model's name,
and else an echo. A behaviour is any ``async def (exchange)``; it is cancelled when its client hangs up.

``python -m tests.fake_model --port 0`` serves the same for other processes and prints its base URL. There the model's
name chooses (see ``MODELS``), and ``GET /stats`` tells what was seen.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import h11
import trio

Behaviour = Callable[["Exchange"], Awaitable[None]]

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


class Exchange:
    """One request and what became of it. Times are Trio's clock."""

    def __init__(self, connection: _Connection, request: h11.Request, content: bytes) -> None:
        self.method = request.method.decode()
        self.target = request.target.decode()
        self.headers: dict[str, str] = {name.decode().lower(): value.decode() for name, value in request.headers}
        self.body: dict[str, Any] = json.loads(content) if content else {}
        self.connection_number = connection.number
        """The same for requests that shared a connection."""
        self.received_at = trio.current_time()
        self.closed = trio.Event()
        """Set when the server sees the client's FIN or RST."""
        self.closed_at = 0.0
        self.ended = trio.Event()
        """Set when the behaviour is over, or was cut by the client."""
        self.answered = False
        """Whether the whole answer was sent."""
        self._connection = connection

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @property
    def prompt(self) -> str:
        """The last user message."""
        return next((str(m["content"]) for m in reversed(self.body.get("messages", [])) if m["role"] == "user"), "")

    async def start(
        self, status: int = 200, content_type: str = "text/event-stream", headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends the head of the answer."""
        head = {"content-type": content_type, "transfer-encoding": "chunked", **(headers or {})}
        await self._connection.send(h11.Response(status_code=status, headers=list(head.items())))

    async def raw(self, data: bytes) -> None:
        """Sends bytes of the answer's body as they are."""
        await self._connection.send(h11.Data(data=data))

    async def event(self, value: Any) -> None:
        """Sends one server-sent event with ``value`` as JSON."""
        await self.raw(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def token(self, text: str) -> None:
        await self.event(chunk({"content": text}))

    async def finish(self, reason: str = "stop", usage: dict[str, Any] | None = None) -> None:
        """Sends the end of a complete answer: the finish reason, the usage if it was asked for, ``[DONE]``."""
        await self.event(chunk({}, reason))
        if (self.body.get("stream_options") or {}).get("include_usage"):
            await self.event({**chunk({}), "choices": [], "usage": usage or USAGE})
        await self.raw(b"data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        """Ends the answer's body; the connection stays for the next request."""
        await self._connection.send(h11.EndOfMessage())
        self.answered = True

    async def bytes(self, data: bytes) -> None:
        """Sends bytes on the connection, past HTTP."""
        await self._connection.stream.send_all(data)

    def cut(self, *, reset: bool = False) -> None:
        """Closes the connection on the server's side: FIN, or RST with ``reset``."""
        if reset:
            self._connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.cut()


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """A chat completion chunk."""
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


# --- behaviours -------------------------------------------------------------------------------------------------------


def says(*tokens: str, pace: float = 0.0, gate: trio.Semaphore | None = None) -> Behaviour:
    """A complete answer. ``pace``: seconds before each token; ``gate``: each token waits for one ``release()``."""

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.event(chunk({"role": "assistant", "content": ""}))
        for token in tokens:
            if gate is not None:
                await gate.acquire()
            if pace:
                await trio.sleep(pace)
            await exchange.token(token)
        await exchange.finish()

    return behave


def echoes(pace: float = 0.0) -> Behaviour:
    """Says ``You said: `` and the last user message, word by word."""

    async def behave(exchange: Exchange) -> None:
        words = ["You ", "said: ", *(word + " " for word in exchange.prompt.split())]
        await says(*words, pace=pace)(exchange)

    return behave


def silent() -> Behaviour:
    """Takes the request and never answers, not even a head."""

    async def behave(exchange: Exchange) -> None:
        await trio.sleep_forever()

    return behave


def stalls(*tokens: str) -> Behaviour:
    """Sends a head and ``tokens`` (or none), then nothing more."""

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        for token in tokens:
            await exchange.token(token)
        await trio.sleep_forever()

    return behave


def refuses(
    status: int,
    message: str = "refused",
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Behaviour:
    """An error answer with OpenAI's error object, or with ``body``."""

    async def behave(exchange: Exchange) -> None:
        await exchange.start(status, "application/json", headers)
        error = {"message": message, "type": "error", "code": code}
        await exchange.raw(json.dumps({"error": error}).encode() if body is None else body)
        await exchange.end()

    return behave


def cuts(*tokens: str, reset: bool = False) -> Behaviour:
    """Sends ``tokens`` and closes the connection in the middle of the answer."""

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        for token in tokens:
            await exchange.token(token)
        exchange.cut(reset=reset)

    return behave


def hangs_up() -> Behaviour:
    """Closes the connection instead of answering."""

    async def behave(exchange: Exchange) -> None:
        exchange.cut()

    return behave


def sends(body: bytes, content_type: str = "text/event-stream", headers: Mapping[str, str] | None = None) -> Behaviour:
    """A complete HTTP answer with exactly this body."""

    async def behave(exchange: Exchange) -> None:
        await exchange.start(200, content_type, headers)
        await exchange.raw(body)
        await exchange.end()

    return behave


MODELS: dict[str, Behaviour] = {
    "slow": echoes(pace=0.1),
    "endless": says(*["again "] * 1_000_000, pace=0.01),
    "silent": silent(),
    "stalls": stalls("Half ", "an "),
    "unauthorized": refuses(401, "Incorrect API key provided"),
    "busy": refuses(429, "Slow down", headers={"Retry-After": "1"}),
    "broken": refuses(500, "Something broke"),
    "cut": cuts("Half ", "an "),
    "garbage": sends(b"data: {not json\n\n"),
}
"""What the program does by the model's name; any other name echoes."""


# --- the server -------------------------------------------------------------------------------------------------------


class FakeModel:
    """The running server. Made by ``serve_fake_model``."""

    def __init__(self, port: int, models: Mapping[str, Behaviour] | None = None) -> None:
        self.port = port
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self.requests: list[Exchange] = []
        """Every chat request so far, in order of arrival."""
        self.models: dict[str, Behaviour] = dict(models or {})
        self.default: Behaviour = echoes()
        self.open_connections = 0
        self.connections = 0
        """Connections accepted so far."""
        self._planned: deque[Behaviour] = deque()
        self._changed = trio.Event()

    def plan(self, *behaviours: Behaviour) -> None:
        """The next requests take these, one each, in order."""
        self._planned.extend(behaviours)

    async def wait_requests(self, n: int) -> list[Exchange]:
        """Waits until ``n`` requests have arrived in all and returns every one so far."""
        await self._wait(lambda: len(self.requests) >= n)
        return list(self.requests)

    async def wait_connections(self, n: int) -> None:
        """Waits until exactly ``n`` connections are open."""
        await self._wait(lambda: self.open_connections == n)

    def stats(self) -> dict[str, int]:
        return {
            "requests": len(self.requests),
            "answered": sum(exchange.answered for exchange in self.requests),
            "cut": sum(exchange.closed.is_set() and not exchange.answered for exchange in self.requests),
            "open": self.open_connections,
        }

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open_connections += 1
        connection = _Connection(stream, self.connections)
        self._change()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.read, nursery.cancel_scope)
                await self._answer_all(connection)
                nursery.cancel_scope.cancel()
        finally:
            self.open_connections -= 1
            await trio.aclose_forcefully(stream)
            self._change()

    async def _answer_all(self, connection: _Connection) -> None:
        while (exchange := await connection.next_request()) is not None:
            if exchange.target == "/stats":
                await sends(json.dumps(self.stats()).encode(), "application/json")(exchange)
            else:
                await self._answer(exchange)
            if not connection.ready_for_more():
                return

    async def _answer(self, exchange: Exchange) -> None:
        by_name = self.models.get(exchange.model, self.default)
        behaviour = self._planned.popleft() if self._planned else by_name
        self.requests.append(exchange)
        self._change()
        try:
            await behaviour(exchange)
        except trio.BrokenResourceError:
            await trio.sleep_forever()  # the client is gone; the reader sees it at once and cancels this
        finally:
            exchange.ended.set()


class _Connection:
    """One client's connection: a reader that always reads, so that a FIN is seen whatever the behaviour does."""

    def __init__(self, stream: trio.SocketStream, number: int) -> None:
        self.stream = stream
        self.number = number
        self._http = h11.Connection(h11.SERVER)
        self._arrived = trio.Event()
        self._exchanges: list[Exchange] = []
        self._cut = False

    async def read(self, scope: trio.CancelScope) -> None:
        """Runs until the client hangs up, notes when, and cancels ``scope``."""
        try:
            while data := await self.stream.receive_some():
                self._http.receive_data(data)
                self._arrived.set()
        except trio.BrokenResourceError:
            pass  # RST, as good as FIN
        for exchange in self._exchanges:
            exchange.closed_at = trio.current_time()
            exchange.closed.set()
        scope.cancel()

    async def next_request(self) -> Exchange | None:
        request: h11.Request | None = None
        content = b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._arrived = trio.Event()
                await self._arrived.wait()
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                content += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                exchange = Exchange(self, request, content)
                self._exchanges.append(exchange)
                return exchange
            else:
                return None

    async def send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            await self.stream.send_all(data)

    def cut(self) -> None:
        self._cut = True

    def ready_for_more(self) -> bool:
        """Whether the connection can take another request."""
        if self._cut or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True


async def serve_fake_model(
    nursery: trio.Nursery, *, port: int = 0, models: Mapping[str, Behaviour] | None = None
) -> FakeModel:
    """Starts a server on loopback in ``nursery``; it listens when this returns and ends with the nursery."""
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    fake = FakeModel(listeners[0].socket.getsockname()[1], models)
    nursery.start_soon(trio.serve_listeners, fake._serve, listeners)
    return fake


class SilentPort:
    """A port that accepts connections and says nothing: no TLS, no HTTP. Made by ``serve_silent_port``."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.accepted = trio.Event()
        self.closed = trio.Event()
        """Set when the first client's FIN or RST has arrived."""
        self.closed_at = 0.0

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.accepted.set()
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        self.closed_at = trio.current_time()
        self.closed.set()


async def serve_silent_port(nursery: trio.Nursery) -> SilentPort:
    """Starts a silent port on loopback in ``nursery``."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    silent_port = SilentPort(listeners[0].socket.getsockname()[1])
    nursery.start_soon(trio.serve_listeners, silent_port._serve, listeners)
    return silent_port


async def _main() -> None:
    parser = argparse.ArgumentParser(description="A fake model's server on loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds before each word")
    arguments = parser.parse_args()
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery, port=arguments.port, models=MODELS)
        fake.default = echoes(arguments.pace)
        print(fake.base_url, flush=True)


if __name__ == "__main__":
    trio.run(_main)
