"""What may go beside Quart: what comes straight from our connection class, while nobody on Quart could tell."""

from __future__ import annotations

from inspect import isfunction
from operator import attrgetter, itemgetter
from typing import Any, Final, Literal, NamedTuple, Protocol

from quart.signals import (
    appcontext_popped,
    appcontext_pushed,
    appcontext_tearing_down,
    got_request_exception,
    got_websocket_exception,
    request_finished,
    request_started,
    request_tearing_down,
    websocket_finished,
    websocket_received,
    websocket_sent,
    websocket_started,
    websocket_tearing_down,
)

from hector_trio.transports.quart_app import HectorQuart, Receive, Send

OWN_REQUEST: Final = "hector.own_request"
OWN_STREAM: Final = "hector.own_stream"
"""Keys of the scope under which the server's request or stream itself stands when nothing lies between it and our
application. See ``ServerRequest`` and ``ServerStream``."""

SEND_MANY: Final = "hector.send_many"
"""The ASGI scope extension of our connection class on a WebSocket: the stream itself."""

_OWN: Final = {"http": ("hector.request", OWN_REQUEST), "websocket": (SEND_MANY, OWN_STREAM)}
"""Under which extension it comes, and where it is noted."""

Kind = Literal["http", "websocket"]


class Own(Protocol):
    """What our connection class offers beside ASGI's messages."""

    def is_own(self, receive: object, send: object) -> bool: ...


def mark(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Notes in the scope of a request or a WebSocket whether it comes from our connection class with nothing in
    between."""
    extension, key = _OWN[scope["type"]]
    own: Own | None = (scope.get("extensions") or {}).get(extension)
    if own is not None and own.is_own(receive, send):
        scope[key] = own


class _Places(NamedTuple):
    """Where something can be put on Quart that sees or changes a request, or a WebSocket."""

    methods: tuple[str, ...]
    """What Quart calls on its way, and the classes and the sessions that it makes use of."""
    registries: tuple[str, ...]
    """Functions by the name of their blueprint, ``None``: of the application. Our routes are in no blueprint."""
    signals: tuple[Any, ...]


_METHODS: Final = (
    "app_context",
    "app_ctx_globals_class",
    "asgi_app",
    "create_url_adapter",
    "do_teardown_appcontext",
    "ensure_async",
    "handle_http_exception",
    "handle_user_exception",
    "log_exception",
    "make_response",
    "session_interface",
    "sync_to_async",
    "trap_http_exception",
)
_SIGNALS: Final = (appcontext_popped, appcontext_pushed, appcontext_tearing_down)
_PLACES: Final = {
    "http": _Places(
        (
            *_METHODS,
            "asgi_http_class",
            "dispatch_request",
            "do_teardown_request",
            "finalize_request",
            "full_dispatch_request",
            "handle_exception",
            "handle_request",
            "preprocess_request",
            "process_response",
            "request_class",
            "request_context",
        ),
        ("before_request_funcs", "after_request_funcs", "teardown_request_funcs", "url_value_preprocessors"),
        (*_SIGNALS, got_request_exception, request_finished, request_started, request_tearing_down),
    ),
    "websocket": _Places(
        (
            *_METHODS,
            "asgi_websocket_class",
            "dispatch_websocket",
            "do_teardown_websocket",
            "finalize_websocket",
            "full_dispatch_websocket",
            "handle_websocket",
            "handle_websocket_exception",
            "postprocess_websocket",
            "preprocess_websocket",
            "websocket_class",
            "websocket_context",
        ),
        ("before_websocket_funcs", "after_websocket_funcs", "teardown_websocket_funcs", "url_value_preprocessors"),
        (
            *_SIGNALS,
            got_websocket_exception,
            websocket_finished,
            websocket_received,
            websocket_sent,
            websocket_started,
            websocket_tearing_down,
        ),
    ),
}
_config: Final = itemgetter(
    "BODY_TIMEOUT",
    "DEBUG",
    "MAX_CONTENT_LENGTH",
    "PRESERVE_CONTEXT_ON_EXCEPTION",
    "PROPAGATE_EXCEPTIONS",
    "RESPONSE_TIMEOUT",
    "SECRET_KEY",  # with one there are sessions, and cookies on answers
    "SERVER_NAME",
    "TESTING",
    "TRAP_BAD_REQUEST_ERRORS",
    "TRAP_HTTP_EXCEPTIONS",
)
_AUTHORS: Final = frozenset(("flask", "hector_trio", "quart", "quart_trio"))


class Onlookers:
    """Who on Quart could see or change requests, or WebSockets: hooks, receivers of signals, error handlers, views,
    rules, overridden methods and classes, sessions.

    What is there when this is made is ours; but nothing of ours receives signals, or stands in Quart's classes.
    """

    def __init__(self, quart: HectorQuart, kind: Kind) -> None:
        places = _PLACES[kind]
        self._quart = quart
        self._kind = kind
        self._names = frozenset(places.methods)
        self._methods = attrgetter(*places.methods)
        self._registries = attrgetter(*places.registries)
        self._receivers = [signal.receivers for signal in places.signals]
        self._patched = not all(map(_is_original, self._methods(type(quart))))
        self._ours = self._found()
        self._views = dict(quart.view_functions)
        self._map = quart.url_map
        self._rules = frozenset(map(id, self._map.iter_rules()))
        self._read_rules()

    def look_at(self, path: str, view: str) -> bool:
        """Whether somebody could tell if ``path``, below the root path, were answered without Quart instead of by the
        view of this name."""
        quart = self._quart
        if self._added != self._map.added:
            self._read_rules()
        return (
            self._patched
            or any(self._receivers)
            or path in self._paths
            or path.startswith(self._beginnings)
            or quart.view_functions.get(view) is not self._views[view]
            or not self._names.isdisjoint(vars(quart))
            or self._found() != self._ours
        )

    def _read_rules(self) -> None:
        """Which paths may be meant for rules that are not ours: each of these, and all with these beginnings."""
        websocket = self._kind == "websocket"
        self._added = self._map.added
        others = [
            each.rule for each in self._map.iter_rules() if id(each) not in self._rules and each.websocket == websocket
        ]
        self._paths = frozenset(rule.rstrip("/") or "/" for rule in others if "<" not in rule)
        self._beginnings = tuple(rule.partition("<")[0] for rule in others if "<" in rule)

    def _found(self) -> tuple[object, ...]:
        quart = self._quart
        return (
            self._methods(type(quart)),
            [tuple(registry.get(None, ())) for registry in self._registries(quart)],
            tuple(quart.teardown_appcontext_funcs),
            [handler for by_type in quart.error_handler_spec[None].values() for handler in by_type.values()],
            _config(quart.config),
            quart.url_map,
        )


def _is_original(value: Any) -> bool:
    """Whether Quart or we wrote it, and nobody has put it into a class since. What decorates a function may well name
    the function's module as its own, but its globals are its own."""
    module: str = value.__globals__["__name__"] if isfunction(value) else getattr(value, "__module__", "")
    return module.partition(".")[0] in _AUTHORS
