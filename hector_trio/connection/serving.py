"""How a server with these connections is run: by `serve`, or by Hypercorn, in whose place they are then installed."""

from __future__ import annotations

import inspect
import socket as stdlib_socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, cast

import hypercorn.trio.run
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.protocol.h11 import H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIFramework

from hector_trio.connection import server
from hector_trio.connection.bounds import ConnectionLimits
from hector_trio.connection.server import AccessLog, ServeConfig, Worker
from hector_trio.connection.socket import Connection, alpn


def install(limits: ConnectionLimits | None = None) -> None:
    """Put these classes where Hypercorn's trio worker looks them up, and HTTP/2 off unless *limits* say on. Idempotent.

    *limits* hold for servers started by Hypercorn itself from now on, in place of its own timeouts and sizes; without
    them the last ones, or the defaults.
    """
    if limits is not None:
        server.installed = limits
    vars(hypercorn.trio.run).update(TCPServer=Connection, WorkerContext=Worker)
    Config.alpn_protocols = alpn(server.installed)


async def serve(
    app: ASGIFramework,
    sockets: Iterable[stdlib_socket.socket],
    *,
    ssl_context: ssl.SSLContext | None = None,
    limits: ConnectionLimits | None = None,
    shutdown: Callable[[], Awaitable[None]],
    graceful_timeout: float = 10.0,
    root_path: str = "",
    access_log: AccessLog | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *app* on bound and listening *sockets* until `shutdown()` returns and its connections have ended.

    Lifespan startup comes first (its failure is raised), then `task_status.started` with the URLs; lifespan shutdown
    comes last. From the return of `shutdown()` no connection is accepted and idle ones are closed; the others have
    *graceful_timeout* seconds to end, then their tasks are cancelled, WebSockets closed with 1012, and what has stopped
    reading is reset; over TLS, nothing more can be said then and all are reset. The sockets are closed in the end. A
    cancel ends everything at once, without lifespan shutdown. With *ssl_context*, whose ALPN is set to what is spoken,
    all sockets speak TLS.
    """
    install()
    config = ServeConfig(limits or ConnectionLimits(), ssl_context, access_log)
    config.graceful_timeout = graceful_timeout
    config.root_path = root_path
    bound = list(sockets)
    if ssl_context is not None:
        ssl_context.set_alpn_protocols(alpn(config.limits))
    await hypercorn.trio.run.worker_serve(
        cast(AppWrapper, ASGIWrapper(app)),
        config,
        sockets=Sockets(bound if ssl_context else [], [] if ssl_context else bound, []),
        shutdown_trigger=shutdown,
        task_status=task_status,
    )


_STREAM = "self app config context task_group ssl client server send stream_id"
_RELIED_ON: dict[Callable[..., Any], str] = {
    TCPServer.__init__: "self app config context state stream",
    WorkerContext.__init__: "self max_requests",
    H11Protocol.__init__: "self app config context task_group connection_state ssl client server send",
    HTTPStream.__init__: _STREAM,
    WSStream.__init__: _STREAM,
    HTTPStream.app_send: "self message",
    HTTPStream._send_error_response: "self status_code",
    WSStream.app_send: "self message",
    WSStream._accept: "self message",
    WSStream._send_error_response: "self status_code",
    H11Protocol.stream_send: "self event",
    H11Protocol._handle_events: "self",
    H11Protocol._maybe_recycle: "self",
    H11Protocol._close_stream: "self",
    H11WSConnection.__init__: "self h11_connection",
    hypercorn.trio.run.worker_serve: "app config sockets shutdown_trigger task_status",
}
"""What is subclassed or called here, with the names of its parameters."""


def check_hypercorn(relied_on: Mapping[Callable[..., Any], str]) -> None:
    """Raise ImportError if Hypercorn is no longer what is subclassed here: at import, not in the first request."""
    changed = [
        function.__qualname__
        for function, names in relied_on.items()
        if " ".join(inspect.signature(function).parameters) != names
    ]
    for ours in (Connection, Worker):
        name = ours.__mro__[1].__name__
        if vars(hypercorn.trio.run).get(name) not in ours.__mro__[:2]:
            changed.append(f"hypercorn.trio.run.{name}")
    if changed:
        raise ImportError(
            f"hector_trio.connection was written for Hypercorn 0.18; version {version('hypercorn')} changed: "
            + ", ".join(changed)
        )


check_hypercorn(_RELIED_ON)
