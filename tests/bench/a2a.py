"""What is measured of A2A beside streams that go well: slow webhooks, late and stalled subscribers, tasks that wait."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from hector_trio.a2a import protobuf
from tests.bench import load
from tests.bench.client import Client
from tests.bench.contestants import Contestant, Running, start

SMALL_BUFFER: Final = 16384
"""What a stalled subscriber lets its system keep for it."""

PATIENCE: Final = 300
"""Seconds that a server may take for what a stalled subscriber has asked for."""


def message(count: int) -> dict[str, Any]:
    return {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": str(count)}]}


def jsonrpc(method: str, **params: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})


def grpc_message(agent: str, count: int) -> str:
    """A request to send, as the argument of a program: there is no NUL in it, and nothing beyond ASCII."""
    return protobuf.encode("SendMessageRequest", {"tenant": agent, "message": message(count)}).decode("ascii")


def call(server: Running, agent: str, method: str, **params: Any) -> Any:
    """The result of a call. Raises: KeyError with the error."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/a2a/{agent}",
        jsonrpc(method, **params).encode(),
        {"Content-Type": "application/json", "A2A-Version": "1.0"},
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    if "error" in found:
        raise KeyError(found["error"])
    return found["result"]


class Webhook(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.seconds = seconds
        self.asked = 0
        self.over = threading.Event()


class _Answer(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(410 if self.server.over.wait(self.server.seconds) else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def webhook(seconds: float) -> Iterator[str]:
    """Answers after so many seconds. In the end it says at once that it is gone, until nobody asks any more."""
    with Webhook(seconds) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.over.set()
            before = -1
            while before != server.asked:
                before = server.asked
                time.sleep(0.5)
            server.shutdown()


def told(client: Client, server: Running, seconds: float, streams: int, count: int) -> list[float]:
    """Seconds that the streams take and the p99 of their delays, without a webhook and with one that is so slow."""
    for slow, some in ((0.0, 1), (seconds, count)):  # first what is done once: a client of HTTP is imported
        figures = []
        with webhook(slow) as url:
            for configuration in ({}, {"taskPushNotificationConfig": {"url": url}}):
                body = jsonrpc("SendStreamingMessage", message=message(some), configuration=configuration)
                found = client.run("sse", server, "/a2a/paced", body, streams=streams, amount=some)
                figures += [found["seconds"], found["p99_ms"]]
    return figures


def behind(client: Client, server: Running, count: int) -> list[float]:
    """Milliseconds and milliseconds of CPU until who comes late has all that a task has said: from the Task as it is,
    and (told to go on from the start) event by event; how many events those are."""
    begun = call(server, "idle", "SendMessage", message=message(count), configuration={"returnImmediately": True})
    body = jsonrpc("SubscribeToTask", id=begun["task"]["id"])
    client.run("join", server, "/a2a/idle", body, streams=1, amount=count)  # until it has said all
    server.settle()
    found = [client.run(how, server, "/a2a/idle", body, streams=1, amount=count) for how in ("join", "resume")]
    times = [each[name] * 1000 for each in found for name in ("seconds", "cpu_seconds")]
    return [*times, found[1]["events"]]


def stalled(server: Running, count: int) -> list[float]:
    """Of a stream that nobody reads until all has happened: per cent of its events that come then, and milliseconds."""
    body = jsonrpc("SendStreamingMessage", message=message(count)).encode()
    head = (
        "POST /a2a/versions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nA2A-Version: 1.0\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        stream.connect(("127.0.0.1", server.port))
        stream.sendall(head.encode() + body)
        server.settle(PATIENCE)
        begun = time.perf_counter()
        received = bytearray()
        while data := stream.recv(1 << 16):
            received += data
        took = time.perf_counter() - begun
    return [received.count(load.LONG.encode()) / count * 100, took * 1000]


def parked(client: Client, contestant: Contestant, count: int) -> list[float]:
    """KiB for each task that waits for an answer, in a new server: what is its alone with its share, and all in all."""
    body = jsonrpc("SendMessage", message=message(1))
    with start(contestant) as server:  # memory that was used once is not given back
        memory = []
        for some in (count // 10 + 1, count):  # the first are for what comes with any
            client.run("post", server, "/a2a/asks", body, streams=min(16, some), amount=some)
            server.settle()
            memory.append([server.memory_kib(kind) for kind in ("Pss", "Rss")])
        waiting = call(server, "asks", "ListTasks", status="TASK_STATE_INPUT_REQUIRED", pageSize=1)["totalSize"]
    if waiting != count // 10 + 1 + count:
        raise SystemExit(f"{contestant.name}: {waiting} tasks wait, which is not what was asked for")
    before, after = memory
    return [(b - a) / count for a, b in zip(before, after, strict=True)]
