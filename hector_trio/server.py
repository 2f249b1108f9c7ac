"""The composition root: chooses the implementations, opens them in order (store, models, engine), and serves."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import socket
import ssl
import stat
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio
from quart_trio import QuartTrio

from hector_trio import __version__, connection
from hector_trio.agents import Agent, AgentInfo
from hector_trio.agents.function import FunctionAgent
from hector_trio.agents.llm import LlmAgent
from hector_trio.auth import Authenticator
from hector_trio.config import (
    DemoLlm,
    Llm,
    PythonAgent,
    RemoteAgent,
    Server,
    Settings,
    check_exposure,
    from_environment,
    is_loopback,
    secrets,
)
from hector_trio.engine import Engine, open_engine
from hector_trio.errors import ConfigError, StartError
from hector_trio.observability import Metrics, configure, keep_tracebacks_plain, watch_loop
from hector_trio.providers import Provider
from hector_trio.providers.demo import DemoProvider
from hector_trio.push import open_push
from hector_trio.stores import Store
from hector_trio.transports import Services
from hector_trio.transports.a2a_routes import add_a2a
from hector_trio.transports.beside import mark
from hector_trio.transports.direct import Direct
from hector_trio.transports.guard import Guard
from hector_trio.transports.quart_app import HectorQuart
from hector_trio.transports.rest import add_routes
from hector_trio.transports.rest_keys import KEYS_PATH
from hector_trio.transports.websocket import add_websocket
from hector_trio.uploads import open_uploads

if TYPE_CHECKING:
    from hector_trio.a2a.signing import CardSigner
    from hector_trio.jwks import Jwks

CLOSING_LIMIT: Final = 3.0
"""Seconds that connections are given to finish after the drain."""

FINAL_CHUNKS: Final = 1.5
"""Seconds kept, of what Hypercorn gives its connections, for the final chunks to be stored and sent."""

COLLECT_AFTER: Final = 5_000
"""New objects after which the garbage collector looks at them. Python's 700 are what one or two streams make, and it
took a tenth of their time."""

Prepare = Callable[[QuartTrio], object]
"""What a user adds to the Quart application: hooks, middleware, routes."""

log = structlog.stdlib.get_logger("hector_trio.server")


# --- opening, in order ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_app(
    settings: Settings, agents: Mapping[str, Agent] | None = None, prepare: Iterable[Prepare] = ()
) -> AsyncIterator[App]:
    """Everything behind the listeners, open and recovered. ``agents`` come in addition to the configured ones, and each
    of ``prepare`` is called with the Quart application when all of ours is on it.

    Leaving closes in the opposite order; runs are ended first, with their final chunks.
    Raises: ConfigError, StartError.
    """
    keep_tracebacks_plain()
    instance = str(uuid.uuid4())
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        watch = None
        if settings.server.debug_tree:
            from hector_trio.tree import watch_tasks

            watch = await stack.enter_async_context(watch_tasks())
        store = await stack.enter_async_context(_open_store(settings, instance, metrics))
        uploads = await stack.enter_async_context(open_uploads(settings))
        models = {name: await stack.enter_async_context(_open_llm(llm)) for name, llm in _used_llms(settings).items()}
        if watch is not None:
            models = {name: watch.provider(model) for name, model in models.items()}
        limiter = trio.CapacityLimiter(settings.limits.sync_agents)
        served = {**await _configured(settings, models, stack), **(agents or {})}
        for agent in served.values():
            if isinstance(agent, FunctionAgent):
                agent.limiter = limiter
        engine = await stack.enter_async_context(
            open_engine(store, served, settings, instance=instance, observer=metrics, uploads=uploads)
        )
        metrics.watch(engine, store, connection.statistics)
        push = None
        if settings.push.enabled:
            push = await stack.enter_async_context(open_push(engine, settings.push, observer=metrics))
            metrics.watch_push(push)
        signer = _card_signer(settings.server)
        issuer = await stack.enter_async_context(_open_issuer(settings))
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(watch_loop, metrics)
        nursery.start_soon(uploads.sweep_for_ever)
        if issuer is not None:
            nursery.start_soon(issuer.refresh_for_ever)
        services = Services(
            engine,
            uploads,
            settings,
            Authenticator(settings.auth, issuer),
            metrics,
            _only_loopback(settings.server),
            watch,
            push,
            signer,
        )
        app = App(services)
        for each in prepare:
            each(app.quart)
        try:
            yield app
        finally:
            nursery.cancel_scope.cancel()


class App:
    """The ASGI application of an opened server, without a lifespan of its own."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.quart = HectorQuart("hector_trio")
        add_routes(self.quart, services)
        add_a2a(self.quart, services)
        streams = add_websocket(self.quart, services)
        below: Any = Direct(self.quart, services, streams)
        if services.settings.server.http2:
            from hector_trio.transports.a2a_grpc import Grpc

            below = Grpc(services, below)
        self._asgi = Guard(below, services)

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] == "lifespan":
            return _lifespan(receive, send)
        mark(scope, receive, send)
        return self._asgi(scope, receive, send)


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


class SelfOpeningApp:
    """The ASGI application for servers that are not ours (``hypercorn -k trio``): the lifespan opens everything.

    The whole server lives in the lifespan's task: started before the first connection, closed after the last. What the
    server binds is not ours to check, so a request that arrives at an address others can reach is refused unless there
    are tokens or ``server.insecure``.
    """

    def __init__(self, settings: Settings, agents: Mapping[str, Agent], prepare: Iterable[Prepare] = ()) -> None:
        self._settings = settings
        self._agents = agents
        self._prepare = prepare
        self._app: App | None = None
        self._told = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is None:
            raise RuntimeError("The server has no lifespan: run it under Hypercorn with its trio worker")
        elif (reason := self._exposed(scope)) is not None:
            await _refuse(scope, send, reason)
        else:
            await self._app(scope, receive, send)

    def _exposed(self, scope: Any) -> str | None:
        host, port = scope.get("server") or (None, None)
        if host is None or port is None:  # a Unix socket
            return None
        try:
            check_exposure(self._settings, [host])
        except ConfigError as error:
            if not self._told:
                log.error("refusing_everybody", because=error.detail)
            self._told = True
            return "This server has no tokens and is not meant to be reached from elsewhere; its log says more"
        return None

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        try:
            with interpreter_of_a_server() as loaded:
                async with open_app(self._settings, self._agents, self._prepare) as self._app:
                    loaded()
                    await send({"type": "lifespan.startup.complete"})
                    engine = self._app.services.engine
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._drain_early, engine)
                        await receive()  # comes after the last connection, whose streams would have been cut by then
                        nursery.cancel_scope.cancel()
                    await engine.drain(self._settings.server.shutdown_grace)
        except Exception as error:
            if self._app is not None:
                # Hypercorn would go on listening with nothing behind it.
                log.critical("server_failed", exc_info=error)
                signal.raise_signal(signal.SIGTERM)
                raise
            detail = error.detail if isinstance(error, StartError) else "the server cannot start; its log says more"
            if not isinstance(error, StartError):
                log.critical("start_failed", exc_info=error)
            await send({"type": "lifespan.startup.failed", "message": detail})
            return
        finally:
            self._app = None
        await send({"type": "lifespan.shutdown.complete"})

    async def _drain_early(self, engine: Engine) -> None:
        """End the streams with their final chunks as soon as Hypercorn shuts down, before it cuts them."""
        left = await connection.shutdown_begun()
        await engine.drain(max(0.0, min(self._settings.server.shutdown_grace, left - FINAL_CHUNKS)))


async def _refuse(scope: Any, send: Any, reason: str) -> None:
    prefix = "http" if scope["type"] == "http" else "websocket.http"
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": f"{prefix}.response.start", "status": 403, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": reason.encode()})


def installed(settings: Settings, agents: Mapping[str, Agent], prepare: Iterable[Prepare] = ()) -> SelfOpeningApp:
    """The application for Hypercorn's trio worker, with our connection class put into it.

    ``HECTOR_CONNECTION=plain`` in the environment leaves Hypercorn as it is, with its defects. Logs which it is.
    """
    configure_logs(settings)
    if os.environ.get("HECTOR_CONNECTION") == "plain":
        log.warning("connection_class_not_installed", because="HECTOR_CONNECTION=plain")
    else:
        connection.install(limits_of(settings))
        log.info("connection_class_installed", opt_out="HECTOR_CONNECTION=plain")
    return SelfOpeningApp(settings, agents, prepare)


def configure_logs(settings: Settings) -> None:
    """Sends all logs where the settings say, their secrets hidden, and tells of variables that mean nothing."""
    configure(settings.log, secrets=secrets(settings))
    for warning in from_environment(os.environ).warnings:
        log.warning("unknown_variable", detail=warning)


def _only_loopback(server: Server) -> bool:
    return server.uds is not None or all(is_loopback(host) for host in server.host)


def _open_store(settings: Settings, instance: str, metrics: Metrics) -> AbstractAsyncContextManager[Store]:
    if settings.store.url == "memory":
        from hector_trio.stores.memory import open_memory

        return open_memory(instance)
    from hector_trio.stores.sql import open_sql

    return open_sql(
        settings.store.url, durability=settings.store.durability, instance=instance, on_commit=metrics.committed
    )


def _card_signer(server: Server) -> CardSigner | None:
    if server.card_key is None or server.base_url is None:
        return None
    try:
        from hector_trio.a2a.signing import CardSigner
    except ImportError as error:
        raise ConfigError(f'server.card_key needs {error.name}: pip install "hector_trio[jwt]"') from error
    try:
        return CardSigner(Path(server.card_key).read_bytes(), server.base_url + KEYS_PATH)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"server.card_key: cannot use {server.card_key}: {reason}") from error


@asynccontextmanager
async def _open_issuer(settings: Settings) -> AsyncIterator[Jwks | None]:
    if settings.auth.jwt is None:
        yield None
        return
    try:
        from hector_trio.jwks import open_jwks
    except ImportError as error:
        raise ConfigError(f'auth.jwt needs {error.name}: pip install "hector_trio[jwt]"') from error
    async with open_jwks(settings.auth.jwt) as jwks:
        yield jwks


def _used_llms(settings: Settings) -> dict[str, Llm]:
    """The declared models; ``demo`` is always there."""
    return {"demo": DemoLlm(), **settings.llms}


@asynccontextmanager
async def _open_llm(llm: Llm) -> AsyncIterator[Provider]:
    if isinstance(llm, DemoLlm):
        yield DemoProvider(llm.words_per_second)
        return
    from hector_trio.providers.openai import open_openai

    async with open_openai(llm) as provider:
        yield provider


async def _configured(settings: Settings, models: Mapping[str, Provider], stack: AsyncExitStack) -> dict[str, Agent]:
    agents: dict[str, Agent] = {}
    for agent_id, each in settings.agents.items():
        info = AgentInfo(
            agent_id,
            name=each.name or agent_id,
            description=each.description,
            version=each.version,
            metadata=each.metadata,
            grace=each.grace,
            max_grace=each.max_grace,
            replies=isinstance(each, PythonAgent) and each.replies,
            a2a=each.a2a,
        )
        if isinstance(each, PythonAgent):
            agents[agent_id] = FunctionAgent(info, load_function(each.function, f"agents.{agent_id}.function"))
        elif isinstance(each, RemoteAgent):
            from hector_trio.agents.remote import open_remote

            agents[agent_id] = await stack.enter_async_context(open_remote(info, each))
        else:
            agents[agent_id] = LlmAgent(info, models[each.llm], each.instructions, each.parameters)
    return agents


def load_function(reference: str, where: str) -> Callable[[Any], Any]:
    """The function that ``module:name`` or ``path/to/file.py:name`` names. Raises: ConfigError."""
    place, _, name = reference.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None:
                raise ImportError(place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is imported
        raise ConfigError(f"{where}: cannot load {reference!r} ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ConfigError(f"{where}: {reference!r} is not a function")
    return function  # type: ignore[no-any-return]


# --- listening --------------------------------------------------------------------------------------------------------


def listen(server: Server) -> list[socket.socket]:
    """The listening sockets. Raises: StartError, with who holds the address where that can be told."""
    if server.fd is not None:
        return [_inherited(server.fd)]
    if server.uds is not None:
        return [_listen_unix(server.uds)]
    sockets: list[socket.socket] = []
    port = server.port
    try:
        for host in server.host:
            for family, _, _, _, address in _resolve(host, port):
                sock = _listen_tcp(family, address, host, optional=bool(sockets))
                if sock is not None:
                    sockets.append(sock)
                    port = sock.getsockname()[1]  # port 0: the others take the same
        if not sockets:
            raise StartError(f"Cannot listen on any of {', '.join(server.host)}")
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"--fd {fd}: not a socket ({error.strerror})") from error
    if not listens:
        sock.detach()  # it is not ours to close
        raise StartError(f"--fd {fd}: not a listening stream socket")
    return sock


def _resolve(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"Cannot listen on {host!r}: {error.strerror}") from error


def _listen_tcp(family: int, address: Any, host: str, *, optional: bool) -> socket.socket | None:
    """``None``: this machine lacks the family and another address is being listened on."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind((address[0], address[1], *address[2:]))
        connection.tune_listener(sock)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        if optional and family == socket.AF_INET6 and error.errno not in (98, 13):
            return None
        raise StartError(_why(error, host, address[1])) from error
    return sock


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == 98:
        holder = _holder(port)
        held = f" by {holder}" if holder else ""
        return f"Port {port} on {host} is in use{held}; choose another with --port, or --port 0 for any"
    return f"Cannot listen on {host} port {port}: {error.strerror}"


def _holder(port: int) -> str:
    """Who listens on a port, as Linux tells its own user; empty when it cannot be told."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                return f"process {process.name} ({name})"
        except OSError:
            continue
    return ""


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise StartError(f"--uds {path}: exists and is not a socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)  # left behind by a process that died
                else:
                    raise StartError(f"--uds {path}: another process listens there")
        sock.setblocking(False)
        sock.bind(path)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise StartError(f"Cannot listen on {path}: {error.strerror or error}") from error
    except StartError:
        sock.close()
        raise
    return sock


def tls_context(server: Server) -> ssl.SSLContext | None:
    if server.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(server.tls.cert, server.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"server.tls: cannot use {server.tls.cert} with {server.tls.key}: {error}") from error
    return context


def addresses(sockets: list[socket.socket], server: Server) -> list[str]:
    """Where it listens, as URLs that a client on this machine can use."""
    scheme = "http" if server.tls is None else "https"
    found = []
    for sock in sockets:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            found.append(f"unix:{name}")
        else:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            found.append(f"{scheme}://{host}:{name[1]}{server.root_path}")
    return found


# --- serving ----------------------------------------------------------------------------------------------------------


def limits_of(settings: Settings) -> connection.ConnectionLimits:
    limits = settings.limits
    return connection.ConnectionLimits(
        send_timeout=limits.send_timeout,
        header_timeout=limits.header_timeout,
        body_timeout=limits.body_timeout,
        keep_alive_timeout=limits.keep_alive_timeout,
        ping_interval=limits.ping_interval,
        max_message_bytes=limits.body_bytes,
        max_unread_messages=limits.unread_messages,
        max_unread_bytes=limits.unread_bytes,
        max_connections=limits.connections,
        http2=settings.server.http2,
    )


async def serve(
    settings: Settings,
    agents: Mapping[str, Agent] | None = None,
    *,
    prepare: Iterable[Prepare] = (),
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until ``stop`` is set, then drains and returns.

    ``task_status`` gives the addresses and the services. The drain: the listener stays open while streams end or, after
    ``shutdown_grace``, are ended; new work and readiness answer 503; sockets close with 1012; then the server stops.
    Cancelled instead: everything ends at once, runs with their final chunks (bounded).
    Raises: ConfigError, StartError.
    """
    check_exposure(settings)
    stop = trio.Event() if stop is None else stop
    context = tls_context(settings.server)
    sockets = listen(settings.server)
    try:
        if settings.server.fd is not None:  # what somebody else has bound
            bound = [sock.getsockname()[0] for sock in sockets if sock.family != socket.AF_UNIX]
            check_exposure(settings, bound)
        async with open_app(settings, agents, prepare) as app:
            engine = app.services.engine

            async def drained() -> None:
                await stop.wait()
                log.info("draining", running=engine.running, queued=engine.queued)
                await engine.drain(settings.server.shutdown_grace)

            def listening(_: object) -> None:
                task_status.started(Serving(addresses(sockets, settings.server), app.services))

            await connection.serve(
                app,
                sockets,
                ssl_context=context,
                limits=limits_of(settings),
                shutdown=drained,
                graceful_timeout=CLOSING_LIMIT,
                root_path=settings.server.root_path,
                access_log=None,
                task_status=Tell(listening),
            )
            log.info("stopped")
    finally:
        for sock in sockets:
            sock.close()
        if settings.server.uds is not None:
            with suppress(FileNotFoundError):
                os.unlink(settings.server.uds)


class Tell:
    """A ``TaskStatus`` that calls a function: for a caller that has no nursery to start a task in."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function

    def started(self, value: Any = None) -> None:
        self._function(value)


class Serving:
    """A server that serves: its addresses and what is behind them."""

    def __init__(self, urls: list[str], services: Services) -> None:
        self.urls = urls
        self.services = services

    @property
    def url(self) -> str:
        return self.urls[0]


@contextmanager
def _signals(stop: trio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets ``stop``, the second ends the process at once, even when the loop is stuck.

    Plain handlers, because a background shell job starts with SIGINT ignored and a stuck loop reads no channel. What
    was acknowledged is committed, so ending at once loses nothing of it.
    """
    token = trio.lowlevel.current_trio_token()
    seen: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        token.run_sync_soon(stop.set)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    settings: Settings,
    agents: Mapping[str, Agent] | None = None,
    *,
    prepare: Iterable[Prepare] = (),
    started: Callable[[Serving], None] = lambda serving: None,
) -> None:
    """Serves until SIGINT or SIGTERM. Blocks. Raises: ConfigError, StartError (nothing is left behind then).

    Meanwhile the interpreter changes threads more often, and the garbage collector, unless it is switched off, works
    less often and no more looks at what was there when the server began to serve; afterwards both are as they were.
    """

    async def main() -> None:
        stop = trio.Event()
        with interpreter_of_a_server() as loaded, _signals(stop):

            def ready(serving: Serving) -> None:
                loaded()
                started(serving)

            await serve(settings, agents, prepare=prepare, stop=stop, task_status=Tell(ready))

    trio.run(main)


@contextmanager
def interpreter_of_a_server() -> Iterator[Callable[[], None]]:
    """Sets Python up for many streams in one process. Gives what to call when all that stays has been loaded."""
    interval, collects = sys.getswitchinterval(), gc.isenabled()
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()

    def loaded() -> None:
        if collects:
            # A collection stops everything: none has to look through modules and tables again, and streams that come
            # and go are no reason for one each time.
            gc.freeze()
            gc.set_threshold(max(COLLECT_AFTER, thresholds[0]), *thresholds[1:])
            gc.enable()

    # The store's thread and the loop share one interpreter lock: at Python's 5 ms a cancel waits for commits.
    sys.setswitchinterval(0.0005)
    gc.disable()  # a start makes next to nothing that could be collected (half a megabyte)
    try:
        yield loaded
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.set_threshold(*thresholds)
            gc.enable()
            if not frozen:
                gc.unfreeze()


def announcement(settings: Settings, serving: Serving) -> str:
    """What a start prints: where it listens, the agents, the data's absolute path, and one line to paste."""
    url = serving.url
    agents = serving.services.engine.agents
    store = settings.store.url
    lines = [f"hector_trio {__version__}", "", *(f"  listening  {each}" for each in serving.urls)]
    for agent_id, agent in agents.items():
        lines.append(f"  agent      {agent_id}  {agent.info.description}".rstrip())
    lines.append(f"  data       {'memory only' if store == 'memory' else Path(store).resolve()}")
    if agents:
        agent_id = settings.default_agent or ""
        if agent_id not in agents:
            agent_id = next(iter(agents))
        token = " -H 'Authorization: Bearer TOKEN'" if settings.auth.required else ""
        place = f"{url}/agents/{agent_id}/tasks"
        if url.startswith("unix:"):
            place = f"--unix-socket {url[5:]} http://localhost/agents/{agent_id}/tasks"
        body = '{"input":{"type":"text/plain","content":"Hello"}}'
        lines += ["", "Try:", f"  curl -N -H 'Accept: text/event-stream'{token} {place} -d '{body}'"]
    return "\n".join(lines) + "\n"
