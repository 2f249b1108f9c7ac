"""What goes beside Quart, and what on Quart brings it back: everything that could tell, on requests and WebSockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import Any, cast

import pytest
import trio
import trio.testing
from quart import Blueprint, Quart, has_request_context, has_websocket_context, signals, websocket
from quart.config import Config
from quart.routing import QuartRule
from quart.sessions import SecureCookieSessionInterface
from quart_trio import QuartTrio

from hector_trio.agents import Context
from hector_trio.errors import HectorError
from hector_trio.server import Prepare, open_app
from hector_trio.transports.beside import OWN_REQUEST, OWN_STREAM, SEND_MANY, Onlookers, mark
from hector_trio.transports.quart_app import (
    HectorHTTPConnection,
    HectorQuart,
    HectorRequest,
    HectorWebsocket,
    HectorWebsocketConnection,
)
from tests.engines import agent
from tests.serving import Served, serving, settings_of
from tests.sockets import connected, rejected

Seen = list[Any]
KINDS = ("http", "websocket")


async def where(ctx: Context) -> None:
    """An agent that tells which way its caller came."""
    await ctx.emit_text("through" if has_request_context() or has_websocket_context() else "beside")


async def way(server: Served, kind: str) -> str:
    if kind == "http":
        async with server.client() as client:
            answer = await client.post(
                "/agents/a/tasks", json={"input": {"content": "?"}}, headers={"Prefer": "wait=5"}
            )
            assert answer.status_code == 200
            text: str = answer.json()["output"]["content"]
            return text
    async with connected(server, "a") as peer:
        await peer.ask("?")
        first, *_, last = await peer.read_to_final()
        assert last["status"] == "completed"
        await peer.close_code()
        return str(first["content"])


@asynccontextmanager
async def both(*prepare: Prepare) -> AsyncIterator[tuple[Served, HectorQuart]]:
    """A server whose agent tells the way, and its Quart application."""
    found: list[Any] = []
    settings = settings_of(limits={"idle_after_final": 0.01})
    with trio.fail_after(10):
        async with serving(settings, agent(where), prepare=[*prepare, found.append]) as server:
            yield server, found[0]


@contextmanager
def forgetting() -> Iterator[None]:
    """Signals are the interpreter's, not the application's."""
    try:
        yield
    finally:
        for each in vars(signals).values():
            if isinstance(each, type(signals.request_started)):
                each.receivers.clear()


# ---- what brings requests and WebSockets back to Quart

Put = Callable[[QuartTrio, Seen], Any]


def taking(seen: Seen, *, answer: bool = False) -> Any:
    """A function for any hook: notes that it was called; what it is given first is its answer, if it has one."""

    async def take(*given: Any, **_: Any) -> Any:
        seen.append(given)
        return given[0] if answer else None

    return take


def listening(*names: str) -> dict[str, Put]:
    def to(name: str) -> Put:
        return lambda quart, seen: getattr(signals, name).connect(taking(seen), weak=False)

    return {name: to(name) for name in names}


def calling(owner: Any, name: str, seen: Seen) -> None:
    """Has *owner* note what is called on it by this name."""
    original = getattr(owner, name)

    @wraps(original)
    def noting(*given: Any, **options: Any) -> Any:
        seen.append(name)
        return original(*given, **options)

    setattr(owner, name, noting)


def overriding(*names: str) -> dict[str, Put]:
    def it(name: str) -> Put:
        return lambda quart, seen: calling(quart, name, seen)

    return {name: it(name) for name in names}


def classes(**replaced: type) -> dict[str, Put]:
    def by_subclass(name: str, original: type) -> Put:
        def put(quart: QuartTrio, seen: Seen) -> None:
            class Noting(original):  # type: ignore[misc]
                def __init__(self, *given: Any, **options: Any) -> None:
                    seen.append(name)
                    super().__init__(*given, **options)

            setattr(quart, name, Noting)

        return put

    return {name: by_subclass(name, original) for name, original in replaced.items()}


def become(quart: QuartTrio, seen: Seen) -> None:
    class Mine(HectorQuart):
        def make_response(self, result: Any) -> Any:
            seen.append("answer")
            return super().make_response(result)

        def create_url_adapter(self, request: Any) -> Any:
            seen.append("path")
            return super().create_url_adapter(request)

    quart.__class__ = Mine


def sessions(quart: QuartTrio, seen: Seen) -> None:
    class Noting(SecureCookieSessionInterface):
        async def open_session(self, app: Quart, request: Any) -> Any:
            seen.append(request)
            return await super().open_session(app, request)

    quart.session_interface = Noting()


def error(cause: Any) -> Put:
    def put(quart: QuartTrio, seen: Seen) -> None:
        seen.append("registered")
        quart.register_error_handler(cause, taking(seen))

    return put


def config(key: str, value: Any) -> Put:
    def put(quart: QuartTrio, seen: Seen) -> None:
        seen.append("configured")
        quart.config[key] = value

    return put


def middleware(quart: QuartTrio, seen: Seen) -> None:
    inner = quart.asgi_app

    async def around(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        await inner(scope, receive, send)

    quart.asgi_app = around  # type: ignore[method-assign]


def view(name: str) -> Put:
    def put(quart: QuartTrio, seen: Seen) -> None:
        ours: Any = quart.view_functions[name]

        async def wrapped(**ids: str) -> Any:
            seen.append(ids)
            return await ours(**ids)

        quart.view_functions[name] = wrapped

    return put


def blueprint(quart: QuartTrio, fill: Callable[[Blueprint], Any]) -> None:
    each = Blueprint("mine", __name__)
    fill(each)
    quart.register_blueprint(each)


EITHER: dict[str, Put] = {
    "context's teardown": lambda quart, seen: quart.teardown_appcontext(taking(seen)),
    "error": error(KeyError),
    "status": error(404),
    "replaced error": error(HectorError),
    "subclass": become,
    "sessions": sessions,
    "middleware": middleware,
    "secret": config("SECRET_KEY", "x"),
    "debug": config("DEBUG", True),
    **listening("appcontext_pushed", "appcontext_tearing_down", "appcontext_popped"),
    **overriding(
        "app_context", "create_url_adapter", "do_teardown_appcontext", "ensure_async", "app_ctx_globals_class"
    ),
}
PUT: dict[str, dict[str, Put]] = {
    "http": {
        **EITHER,
        "before": lambda quart, seen: quart.before_request(taking(seen)),
        "before, of a blueprint": lambda quart, seen: blueprint(
            quart, lambda each: each.before_app_request(taking(seen))
        ),
        "after": lambda quart, seen: quart.after_request(taking(seen, answer=True)),
        "teardown": lambda quart, seen: quart.teardown_request(taking(seen)),
        "view": view("createTask"),
        "values": lambda quart, seen: quart.url_value_preprocessor(lambda *given: seen.append(given)),
        "size": config("MAX_CONTENT_LENGTH", 1000),
        **listening("request_started", "request_finished", "request_tearing_down"),
        **overriding(
            "handle_request",
            "full_dispatch_request",
            "preprocess_request",
            "dispatch_request",
            "finalize_request",
            "make_response",
            "process_response",
            "do_teardown_request",
            "request_context",
        ),
        **classes(asgi_http_class=HectorHTTPConnection, request_class=HectorRequest),
    },
    "websocket": {
        **EITHER,
        "before": lambda quart, seen: quart.before_websocket(taking(seen)),
        "before, of a blueprint": lambda quart, seen: blueprint(
            quart, lambda each: each.before_app_websocket(taking(seen))
        ),
        "after": lambda quart, seen: quart.after_websocket(taking(seen, answer=True)),
        "teardown": lambda quart, seen: quart.teardown_websocket(taking(seen)),
        "view": view("stream"),
        **listening(
            "websocket_started", "websocket_received", "websocket_sent", "websocket_finished", "websocket_tearing_down"
        ),
        **overriding(
            "handle_websocket",
            "full_dispatch_websocket",
            "preprocess_websocket",
            "dispatch_websocket",
            "finalize_websocket",
            "postprocess_websocket",
            "do_teardown_websocket",
            "websocket_context",
        ),
        **classes(asgi_websocket_class=HectorWebsocketConnection, websocket_class=HectorWebsocket),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in PUT[kind]])
async def test_whatever_a_user_puts_on_quart_is_asked(kind: str, name: str) -> None:
    seen: Seen = []
    with forgetting():
        async with both() as (server, quart):
            assert await way(server, kind) == "beside"
            PUT[kind][name](quart, seen)
            assert await way(server, kind) == "through"
            while not seen:
                await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("name", ["before", "middleware", "appcontext_pushed"])
@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_asked_too_if_it_was_there_before_the_server(kind: str, name: str) -> None:
    seen: Seen = []
    with forgetting():
        async with both(lambda quart: PUT[kind][name](quart, seen)) as (server, _):
            assert await way(server, kind) == "through"


@pytest.mark.parametrize("kind", KINDS)
async def test_receivers_from_before_the_server_are_heard_and_when_they_have_gone_nobody_is(kind: str) -> None:
    seen: Seen = []
    name = "request_started" if kind == "http" else "websocket_started"
    with getattr(signals, name).connected_to(taking(seen)):
        async with both() as (server, _):
            assert await way(server, kind) == "through"
    assert seen
    async with both() as (server, _):
        assert await way(server, kind) == "beside"


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [
        ("http", QuartTrio, "full_dispatch_request"),
        ("http", Quart, "preprocess_request"),
        ("websocket", HectorQuart, "handle_websocket"),
        ("websocket", Quart, "dispatch_websocket"),
    ],
)
async def test_what_is_put_into_quarts_classes_is_called(
    monkeypatch: pytest.MonkeyPatch, kind: str, owner: type, name: str, early: bool
) -> None:
    seen: Seen = []
    monkeypatch.setattr(owner, name, vars(owner)[name])  # put back at the end
    if early:
        calling(owner, name, seen)
    async with both() as (server, _):
        if not early:
            assert await way(server, kind) == "beside"
            calling(owner, name, seen)
        assert await way(server, kind) == "through"
    assert seen == [name]


class Noting(Config):
    """A configuration that notes what is read."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.root_path, config)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_that_quart_makes_use_of_is_forgotten(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On the way of a request or a WebSocket, also of one that fails."""
    used: set[str] = set()
    original = HectorQuart.__getattribute__

    def noting(self: Any, name: str) -> Any:
        used.add(name)
        return original(self, name)

    async def fail(**_: str) -> None:
        raise ZeroDivisionError

    async def look() -> None:
        pass

    view = "createTask" if kind == "http" else "stream"
    async with both() as (server, quart):
        quart.config = noted = Noting(cast(Config, quart.config))
        quart.before_request(look)
        quart.before_websocket(look)
        monkeypatch.setattr(HectorQuart, "__getattribute__", noting)
        assert await way(server, kind) == "through"
        quart.view_functions[view] = cast(Any, fail)
        if kind == "http":
            async with server.client() as client:
                assert (await client.post("/agents/a/tasks", json={"input": {"content": "?"}})).status_code == 500
        else:
            assert (await rejected(server, "a")).status_code == 500
        monkeypatch.undo()

    async with open_app(settings_of()) as app:
        quart = app.quart
        onlookers = Onlookers(quart, kind)  # type: ignore[arg-type]
        overridable = {name for name in used & set(dir(HectorQuart)) if not name.startswith("_")} - DATA
        assert len(overridable) > 15
        for name in overridable:
            assert not onlookers.look_at("/x", view), name
            setattr(quart, name, getattr(quart, name))
            assert onlookers.look_at("/x", view), name
            delattr(quart, name)
        assert len(noted.read) > 2
        for key in noted.read:
            assert not onlookers.look_at("/x", view), key
            before, quart.config[key] = quart.config[key], object()
            assert onlookers.look_at("/x", view), key
            quart.config[key] = before


DATA = {"secret_key", "testing", "debug"}
"""Attributes of Quart that are keys of its configuration."""


# ---- what does not


@pytest.mark.parametrize("kind", KINDS)
async def test_what_cannot_concern_it_changes_nothing(kind: str) -> None:
    seen: Seen = []
    mine = Blueprint("mine", __name__, url_prefix="/mine")
    for put in (mine.before_request, mine.before_websocket, mine.teardown_request, mine.teardown_websocket):
        put(taking(seen))
    mine.errorhandler(404)(taking(seen))

    @mine.get("/<name>")
    async def hello(name: str) -> str:
        return name

    def prepare(quart: QuartTrio) -> None:
        quart.register_blueprint(mine)
        quart.config["MINE"] = 1
        quart.extensions["mine"] = object()
        quart.mine = object()  # type: ignore[attr-defined]
        other = {"http": ("before_websocket", "websocket"), "websocket": ("before_request", "get")}[kind]
        getattr(quart, other[0])(taking([]))
        getattr(quart, other[1])("/agents/<agent_id>/<what>")(taking([]))

    async with both(prepare) as (server, _), server.client() as client:
        assert await way(server, kind) == "beside"
        assert (await client.get("/mine/me")).text == "me"
        assert seen == [(), (None,)]
        assert await way(server, kind) == "beside"


RULES = [
    ("/mine", True),
    ("/mine/<path:rest>", True),
    ("/agents/a", True),
    ("/agents/ab/<what>", True),
    ("/agents/a/{}/more", True),
    ("/agents/a/{}", False),
    ("/agents/a/{}/", False),
    ("/agents/a/<what>", False),
    ("/agents/<path:all>", False),
    ("/<first>/a/<second>", False),
    ("/<path:all>", False),
]


@pytest.mark.parametrize(("path", "beside"), RULES)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_rule_that_could_be_meant_is_looked_for_by_quart(kind: str, path: str, beside: bool) -> None:
    async def mine(**_: str) -> Any:
        await websocket.send('{"content":"through"}')
        await websocket.send('{"status":"completed","final":true}')

    async with both() as (server, quart):
        assert await way(server, kind) == "beside"
        if kind == "http":
            quart.add_url_rule(path.format("tasks"), "mine", mine, methods=["PUT"])
        else:
            quart.add_websocket(path.format("stream"), "mine", mine)
        assert await way(server, kind) == ("beside" if beside else "through")


async def test_a_rule_of_a_users_own_is_served_although_ours_would_match() -> None:
    async def mine(**_: str) -> str:
        return "mine"

    async def talk(**_: str) -> None:
        await websocket.send('"mine"')

    def prepare(quart: QuartTrio) -> None:
        quart.add_url_rule("/sessions/mine", "mine", mine)
        quart.url_map.add(QuartRule("/agents/all", endpoint="mine", methods={"GET"}))
        quart.add_websocket("/agents/a/stream", "talk", talk)

    async with both(prepare) as (server, _), server.client() as client:
        assert (await client.get("/sessions/mine")).text == "mine"
        assert (await client.get("/agents/all")).text == "mine"
        assert (await client.get("/sessions/other")).status_code == 404
        async with connected(server, "a") as peer:
            assert await peer.websocket.get_message() == '"mine"'


# ---- who stands between


@pytest.mark.parametrize(
    ("kind", "extension", "key"),
    [("http", "hector.request", OWN_REQUEST), ("websocket", SEND_MANY, OWN_STREAM)],
)
def test_who_stands_between_the_server_and_the_application_is_not_passed_by(
    kind: str, extension: str, key: str
) -> None:
    class Own:
        def is_own(self, receive: object, send: object) -> bool:
            return (receive, send) == (nothing, nothing)

    nothing, other = taking([]), taking([])
    for send, marked in ((nothing, True), (other, False)):
        scope: dict[str, Any] = {"type": kind, "extensions": {extension: Own()}}
        mark(scope, nothing, send)
        assert (key in scope) is marked
