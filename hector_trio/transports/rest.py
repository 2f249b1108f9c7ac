"""REST: the one table of routes, put on a Quart application, and what every refusal of it becomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import structlog
import trio
from quart import Quart, Request, Response, Websocket, has_request_context, request, websocket
from werkzeug.exceptions import HTTPException, InternalServerError
from werkzeug.exceptions import MethodNotAllowed as NoSuchMethod
from werkzeug.routing import WebsocketMismatch

from hector_trio.agents import AgentInfo
from hector_trio.errors import (
    AgentNotFound,
    Draining,
    HectorError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    StoreUnavailable,
)
from hector_trio.models import AgentCard, AgentList, Endpoints
from hector_trio.observability import CONTENT_TYPE, ROUTE
from hector_trio.transports import Services
from hector_trio.transports.page import CONTENT_SECURITY_POLICY, PAGE
from hector_trio.transports.problems import INTERNAL
from hector_trio.transports.quart_app import HectorRequestBody
from hector_trio.transports.rest_keys import KEY_ROUTES
from hector_trio.transports.rest_sessions import SESSION_ROUTES
from hector_trio.transports.rest_tasks import TASK_ROUTES
from hector_trio.transports.routes import (
    REQUEST_ID,
    Answer,
    Call,
    Reply,
    Route,
    json_reply,
    perform,
    refusal,
    respond,
)
from hector_trio.transports.uploads import UPLOAD_ROUTES

CHECK_LIMIT: Final = 2.0
"""Seconds that the store may take before the server counts as not ready."""

log = structlog.stdlib.get_logger("hector_trio.rest")


# --- agents -----------------------------------------------------------------------------------------------------------


async def list_agents(call: Call) -> Reply:
    cards = [card(agent.info, call.base, _auth(call)) for agent in call.services.engine.agents.values()]
    return json_reply(AgentList(cards, len(cards)))


async def get_agent(call: Call) -> Reply:
    agent = call.services.engine.agents.get(call.ids["agentId"])
    if agent is None:
        raise AgentNotFound(f"There is no agent {call.ids['agentId']!r}")
    return json_reply(card(agent.info, call.base, _auth(call)))


def _auth(call: Call) -> dict[str, Any]:
    return {"type": "bearer"} if call.services.settings.auth.required else {"type": "none"}


def card(info: AgentInfo, base: str, auth: dict[str, Any]) -> AgentCard:
    """An agent's card, with addresses below ``base``."""
    here = f"{base}/agents/{info.agent_id}"
    return AgentCard(
        agent_id=info.agent_id,
        name=info.name,
        description=info.description,
        version=info.version,
        capabilities={"streaming": True, "sessions": True, "multiTurn": True, "cancellation": True},
        endpoints=Endpoints(
            task=f"{here}/tasks", stream=f"ws{here.removeprefix('http')}/stream", status=f"{here}/tasks/{{taskId}}"
        ),
        input_types=info.input_types,
        output_types=info.output_types,
        auth=auth,
        metadata=info.metadata,
    )


# --- the server itself ------------------------------------------------------------------------------------------------


async def live(call: Call) -> Reply:
    return json_reply({"status": "live"})


async def ready(call: Call) -> Reply:
    engine = call.services.engine
    if engine.draining:
        raise Draining("The server is shutting down", retry_after=5)
    with trio.move_on_after(CHECK_LIMIT):
        await engine.store.check()
        return json_reply({"status": "ready"})
    raise StoreUnavailable(f"The store did not answer within {CHECK_LIMIT:g} s")


async def metrics(call: Call) -> Reply:
    return Reply(body=call.services.metrics.render(), media_type=CONTENT_TYPE)


async def openapi(call: Call) -> Reply:
    from hector_trio.transports.openapi import document

    return json_reply(document(routes_of(call.services), call.base, secured=call.services.authenticator.required))


async def page(call: Call) -> Reply:
    policy = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Referrer-Policy": "no-referrer"}
    return Reply(body=PAGE, media_type="text/html; charset=utf-8", headers=policy)


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/agents", "listAgents", "All agents", list_agents, {200: Answer("The agents' cards", AgentList)}),
    Route(
        "GET",
        "/agents/{agentId}",
        "getAgent",
        "An agent's card",
        get_agent,
        {200: Answer("The card", AgentCard)},
        refusals=(AgentNotFound,),
    ),
    *TASK_ROUTES,
    *SESSION_ROUTES,
    *UPLOAD_ROUTES,
    Route(
        "GET",
        "/health/live",
        "live",
        "Whether the process answers",
        live,
        {200: Answer("It does", dict[str, str])},
        right=None,
    ),
    Route(
        "GET",
        "/health/ready",
        "ready",
        "Whether the server takes work: its store accepts writes and it is not shutting down",
        ready,
        {200: Answer("It does", dict[str, str])},
        right=None,
    ),
    Route(
        "GET",
        "/metrics",
        "metrics",
        "Counters for Prometheus; for admins where tokens are configured",
        metrics,
        {200: Answer("Prometheus' text format", media_type="text/plain")},
        right="metrics",
    ),
    Route(
        "GET",
        "/openapi.json",
        "openapi",
        "This description",
        openapi,
        {200: Answer("OpenAPI 3.1", dict[str, Any])},
    ),
    Route(
        "GET", "/", "page", "A page to try the server", page, {200: Answer("HTML", media_type="text/html")}, right=None
    ),
)
"""Every route of REST that is always there. HEAD goes with GET; OPTIONS answers with ``Allow``."""


def routes_of(services: Services) -> tuple[Route, ...]:
    """The routes of this server: what must be enabled is otherwise not there at all."""
    keys = () if services.signer is None else KEY_ROUTES
    if services.watch is None:
        return (*ROUTES, *keys)
    from hector_trio.transports.rest_debug import DEBUG_ROUTES

    return (*ROUTES, *keys, *DEBUG_ROUTES)


# --- on Quart ---------------------------------------------------------------------------------------------------------


def add_routes(app: Quart, services: Services) -> None:
    """Puts the table on ``app``, and the answers to errors, also those of its other routes and WebSockets."""
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = services.settings.limits.body_bytes
    for route in routes_of(services):
        path = route.path.replace("{", "<").replace("}", ">")
        app.add_url_rule(path, route.name, _view(route, services), methods=[route.method])
    app.before_websocket(_name_route)
    app.register_error_handler(HectorError, refuse)
    app.register_error_handler(HTTPException, _refuse_http)


def _view(route: Route, services: Services) -> Callable[..., Awaitable[Response]]:
    async def view(**ids: str) -> Response:
        scope: Any = request.scope
        scope[ROUTE] = route.path
        return respond(await perform(route, Call(services, scope, ids, QuartBody())))

    return view


class QuartBody:
    """The body of Quart's current request."""

    async def data(self) -> bytes:
        data: bytes = await request.get_data(cache=True, as_text=False, parse_form_data=False)
        return data

    @property
    def pieces(self) -> HectorRequestBody:
        return cast(HectorRequestBody, request.body)


async def _name_route() -> None:
    """Tells the metrics which WebSocket route this is."""
    scope: Any = websocket.scope
    if websocket.url_rule is not None:
        scope[ROUTE] = websocket.url_rule.rule.replace("<agent_id>", "{agentId}")


async def refuse(error: HectorError) -> Response:
    """The error as RFC 9457 problem details, on a request or on a WebSocket that has not been accepted."""
    current: Request | Websocket
    current = request if has_request_context() else websocket
    scope: Any = current.scope
    return respond(refusal(error, current.path, scope.get(REQUEST_ID, "")))


async def _refuse_http(error: HTTPException) -> Response:
    """What Quart itself refuses with. It has logged what went wrong inside (500)."""
    ours, headers = _own(error)
    response = await refuse(ours)
    response.headers.update(headers)
    return response


def _own(error: HTTPException) -> tuple[HectorError, dict[str, str]]:
    """Our error for one of werkzeug's, and headers that go with it."""
    match error.code:
        case 405 if isinstance(error, NoSuchMethod):
            allow = ", ".join(sorted(error.valid_methods or ()))
            return MethodNotAllowed(f"This path answers {allow}"), {"Allow": allow}
        case _ if isinstance(error, WebsocketMismatch):
            return InvalidRequest(
                "A WebSocket is served at some paths, HTTP at the others; this path serves the other"
            ), {}
        case 404:
            return NotFound("There is nothing at this path"), {}
        case 413:
            return PayloadTooLarge("The body is larger than the server takes"), {}
        case 408:
            return InvalidRequest("The body did not come in time"), {}
        case code if code is not None and 400 <= code < 500:
            return InvalidRequest("The request cannot be read"), {}
        case _:
            if not isinstance(error, InternalServerError):
                log.error("unexpected_http_error", exc_info=error)
            return INTERNAL, {}
