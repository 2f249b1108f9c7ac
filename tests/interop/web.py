"""What stands around the server on the web: a site on another origin, and a wire that shows and cuts what passes."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import socket
import threading
from collections import deque
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.seed.process import LIMIT


class Site:
    """Pages of another origin than the server's: ``pages`` by their paths."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.pages: dict[str, bytes] = {"/": b"<!doctype html><title>a page</title>"}

    def url(self, path: str = "/", host: str = "localhost") -> str:
        return f"http://{host}:{self.port}{path}"

    def put(self, path: str, html: str) -> str:
        """The page's address."""
        self.pages[path] = html.encode()
        return self.url(path)


@contextlib.contextmanager
def serving_site() -> Iterator[Site]:
    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = site.pages.get(self.path.split("?")[0])
            self.send_response(404 if body is None else 200)
            kind = "javascript" if self.path.endswith(".js") else "html"
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _serving(Pages) as port:
        site = Site(port)
        yield site


@contextlib.contextmanager
def _serving(requests: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """The port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), requests) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class Hook:
    """A webhook, which takes everything."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen: queue.SimpleQueue[tuple[str, Message, Any]] = queue.SimpleQueue()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def wait(self) -> tuple[str, Message, Any]:
        """The next request's path, headers and body."""
        return self.seen.get(timeout=LIMIT)


@contextlib.contextmanager
def serving_hook() -> Iterator[Hook]:
    class Requests(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hook.seen.put((self.path, self.headers, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _serving(Requests) as port:
        hook = Hook(port)
        yield hook


class Wire:
    """Every request and answer that has passed: ``(path, Last-Event-ID)`` and statuses, in order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connections = 0
        self.cuts: deque[int] = deque()
        """Bytes of the server's after which the next connections are cut, one after the other."""
        self.requests: list[tuple[str, str | None]] = []
        self.statuses: list[int] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def cut(self) -> None:
        """Ends every connection, as a network that fails does."""
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def add(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._open |= set(sockets)

    def carry(self, source: socket.socket, target: socket.socket, limit: int | None = None) -> None:
        """Passes bytes on until the end, or so many, and then the end."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if limit is not None:
                    data = data[:limit]
                    limit -= len(data)
                for method, path, head in re.findall(rb"(?s)(GET|POST) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", data):
                    found = re.search(rb"(?im)^last-event-id: *(\S+)\r?$", head)
                    self.requests.append((path.decode(), found and found[1].decode()))
                    assert method
                for status in re.findall(rb"(?m)^HTTP/1\.1 (\d+)", data):
                    self.statuses.append(int(status))
                target.sendall(data)
                if limit == 0:
                    source.shutdown(socket.SHUT_RDWR)
                    break
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def wire_to(url: str) -> Iterator[Wire]:
    """A wire in front of the server at ``url``, which need not be there all the time."""
    host, port = url.removeprefix("http://").split(":")
    threads: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        wire = Wire(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def start(*arguments: Any) -> None:
            threads.append(threading.Thread(target=wire.carry, args=arguments))
            threads[-1].start()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near = stack.enter_context(listener.accept()[0])
                    wire.connections += 1
                    try:
                        far = stack.enter_context(socket.create_connection((host, int(port))))
                    except OSError:
                        near.close()
                        continue
                    wire.add(near, far)
                    start(near, far)
                    start(far, near, wire.cuts.popleft() if wire.cuts else None)

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield wire
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            wire.cut()
            for thread in threads:
                thread.join()
