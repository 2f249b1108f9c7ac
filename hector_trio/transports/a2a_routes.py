"""A2A on the application: where the bindings, the cards and the document of the resume extension are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, Final

from quart import Quart, Response, request

from hector_trio.a2a import cards, errors
from hector_trio.errors import AgentNotFound
from hector_trio.observability import ROUTE
from hector_trio.transports import Services, a2a_http, a2a_jsonrpc
from hector_trio.transports.a2a import card
from hector_trio.transports.a2a_edge import JSON, card_reply, status_reply
from hector_trio.transports.rest import QuartBody
from hector_trio.transports.routes import Call, Reply, respond

RESUME_TEXT: Final = files("hector_trio.a2a").joinpath("RESUME.md")


def add_a2a(app: Quart, services: Services) -> None:
    """Puts A2A on ``app``. Its paths are no rows of REST's table: they are the protocol's, which describes them."""

    def add(rule: str, name: str, run: Callable[..., Awaitable[Reply]], *methods: str) -> None:
        async def view(**values: str) -> Response:
            scope: Any = request.scope
            scope[ROUTE] = rule.replace("<", "{").replace(">", "}").replace("path:", "")
            return respond(await run(Call(services, scope, values, QuartBody())))

        app.add_url_rule(rule, f"a2a {name}", view, methods=list(methods), provide_automatic_options=False)

    add("/a2a/<agentId>", "jsonrpc", _jsonrpc, "POST")
    add("/a2a/<agentId>/<path:path>", "http", _http, "GET", "POST", "PUT", "PATCH", "DELETE")
    add(f"/a2a/<agentId>{cards.CARD}", "card", _card, "GET")
    add(f"/agents/<agentId>{cards.CARD}", "agent card", _card, "GET")
    add(cards.CARD, "default card", _card, "GET")
    add(cards.RESUME_DOCUMENT, "resume", _resume, "GET")


def is_public(path: str) -> bool:
    """Whether anybody may read it (8.2): the cards, and what they refer to."""
    return path.endswith(cards.CARD) or path == cards.RESUME_DOCUMENT


async def _jsonrpc(call: Call) -> Reply:
    agent = call.services.engine.agents.get(call.ids["agentId"])
    if agent is None:
        return _no_agent()
    return await a2a_jsonrpc.answer(call, agent)


async def _http(call: Call) -> Reply:
    agent = call.services.engine.agents.get(call.ids["agentId"])
    if agent is None:
        return _no_agent()
    return await a2a_http.answer(call, agent, call.ids["path"])


def _no_agent() -> Reply:
    return status_reply(errors.NotFoundError("There is no such agent"))


async def _card(call: Call) -> Reply:
    """The public card (8.2, 8.6). Without an id, that of the default agent."""
    agents = call.services.engine.agents
    agent_id = call.ids.get("agentId") or default_agent(call.services)
    agent = agents.get(agent_id or "")
    if agent is None:
        raise AgentNotFound("There is no such agent")
    headers = {"Cache-Control": f"public, max-age={cards.MAX_AGE}"}
    return card_reply(call, card(call.services, agent, call.base), JSON, headers)


def default_agent(services: Services) -> str | None:
    """The id of the agent that is meant where none is named."""
    agents = services.engine.agents
    named = services.settings.default_agent
    if named is not None:
        return named
    return "assistant" if "assistant" in agents else next(iter(agents), None)


async def _resume(call: Call) -> Reply:
    return Reply(body=RESUME_TEXT.read_bytes(), media_type="text/markdown; charset=utf-8")
