"""Agents, health, and what every path and method is answered with."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio

from hector_trio.agents import AgentInfo
from hector_trio.errors import StoreUnavailable
from hector_trio.transports import rest
from hector_trio.transports.rest import ROUTES, card
from hector_trio.transports.routes import NOT_FOUND
from tests.engines import Steered, agent
from tests.serving import serving, settings_of

pytestmark = pytest.mark.usefixtures("either_rest")


async def test_agents_are_listed_in_the_order_they_are_configured_in() -> None:
    async with (
        serving(agents={**agent(Steered(), "zed"), **agent(Steered(), "a")}) as server,
        server.client() as client,
    ):
        listed = (await client.get("/agents")).json()
        assert [each["agentId"] for each in listed["agents"]] == ["assistant", "zed", "a"]
        assert listed["total"] == 3
        for each in listed["agents"]:
            assert (await client.get(f"/agents/{each['agentId']}")).json() == each


async def test_a_card_says_where_and_how_to_reach_the_agent() -> None:
    async with serving() as server, server.client() as client:
        found = (await client.get("/agents/assistant")).json()
        assert set(found) == {
            *("agentId", "name", "description", "version", "capabilities", "endpoints"),
            *("inputTypes", "outputTypes", "auth", "metadata"),
        }
        assert found["endpoints"] == {
            "task": f"{server.url}/agents/assistant/tasks",
            "stream": f"{server.url.replace('http', 'ws')}/agents/assistant/stream",
            "status": f"{server.url}/agents/assistant/tasks/{{taskId}}",
        }
        assert found["auth"] == {"type": "none"}


async def test_a_cards_addresses_are_below_the_base_url_if_one_is_set() -> None:
    async with (
        serving(settings_of(server={"base_url": "https://hector.example/x/"})) as server,
        server.client() as client,
    ):
        endpoints = (await client.get("/agents/assistant")).json()["endpoints"]
        assert endpoints["stream"] == "wss://hector.example/x/agents/assistant/stream"


def test_a_streams_address_is_a_websockets() -> None:
    endpoints = card(AgentInfo("a", "A"), "https://h", {}).endpoints
    assert (endpoints.stream, endpoints.task) == ("wss://h/agents/a/stream", "https://h/agents/a/tasks")


async def test_below_a_root_path_everything_works_and_says_so() -> None:
    async with serving(settings_of(server={"root_path": "/hector"})) as server, server.client() as client:
        base = server.url if server.url.endswith("/hector") else server.url + "/hector"
        assert (await client.get(f"{base}/agents/assistant")).json()["endpoints"]["task"].startswith(base)
        created = await client.post(f"{base}/sessions", json={"agentId": "assistant", "sessionId": "s"})
        assert created.headers["Location"] == "/hector/sessions/s"
        assert (await client.get(f"{base}/health/live")).status_code == 200
        assert (await client.get(f"{base}/")).headers["Content-Type"] == "text/html; charset=utf-8"


async def test_the_page_is_sent_with_its_policy() -> None:
    async with serving() as server, server.client() as client:
        page = await client.get("/")
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert page.text.startswith("<!doctype html>")


async def test_the_server_is_ready_when_its_store_takes_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "CHECK_LIMIT", 0.05)
    async with serving() as server, server.client() as client:
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        store: Any = server.engine.store

        async def refuse() -> None:
            raise StoreUnavailable("The disk is full")

        for check in (refuse, trio.sleep_forever):
            store.check = check
            answer = await client.get("/health/ready")
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert "Retry-After" in answer.headers
        assert (await client.get("/health/live")).status_code == 200


async def test_a_bug_is_a_500_that_says_nothing_of_its_inside() -> None:
    async with serving() as server, server.client() as client:
        store: Any = server.engine.store

        async def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a secret of the inside")

        store.list_sessions = broken
        answer = await client.get("/sessions")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["requestId"] == answer.headers["X-Request-Id"]
        assert (await client.get("/agents")).status_code == 200


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES}))
async def test_every_path_answers_other_methods_with_405_and_options_with_204(path: str) -> None:
    methods = {route.method for route in ROUTES if route.path == path}
    allowed = sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))
    real = path.replace("{agentId}", "assistant").replace("{", "").replace("}", "")
    async with serving() as server, server.client() as client:
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"} - set(allowed):
            answer = await client.request(method, real)
            assert answer.status_code == 405, method
            assert answer.headers["Allow"] == ", ".join(allowed)
            if method != "HEAD":
                assert answer.json()["code"] == "method_not_allowed"
        options = await client.options(real)
        assert (options.status_code, options.headers["Allow"], options.content) == (204, ", ".join(allowed), b"")


@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/agents/assistant/nothing", "/health", "/agents//tasks", "/Agents"),
        *("/agents/%00", "/agents/%2e%2e", "/agents/a%2Fb", "/agents/%FF%FE", "/agents/caf%C3%A9"),
        *("/sessions/%0A", "/sessions/" + "x" * 129),
        *("/agents/assistant/tasks/a%20b", "/agents/assistant/tasks/%ED%A0%80"),
        *("/uploads/%2e%2e%2fetc", "/sessions/s/snapshots", "/sessions/s/fork"),
    ],
)
async def test_what_is_not_there_is_404_whatever_it_is_called(path: str) -> None:
    async with serving() as server, server.client() as client:
        answer = await client.get(server.url + path)
        assert answer.status_code == 404
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["code"].endswith("not_found")


async def test_a_slash_at_the_end_changes_nothing() -> None:
    async with serving() as server, server.client() as client:
        assert (await client.get("/agents/")).json() == (await client.get("/agents")).json()
        created = await client.post("/sessions/", json={"agentId": "assistant"})
        assert created.status_code == 201


async def test_head_is_get_without_the_body() -> None:
    async with serving() as server, server.client() as client:
        head, get = await client.head("/agents"), await client.get("/agents")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Length"] == get.headers["Content-Length"]


async def test_a_websockets_path_is_no_page() -> None:
    async with serving() as server, server.client() as client:
        answer = await client.get("/agents/assistant/stream")
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


def test_every_route_has_a_name_of_its_own_and_says_what_it_answers() -> None:
    assert len({route.name for route in ROUTES}) == len(ROUTES)
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    for route in ROUTES:
        assert route.answers
        assert route.summary
        assert all(200 <= status < 400 for status in route.answers)


def test_whoever_changes_anything_must_be_allowed_to() -> None:
    for route in ROUTES:
        assert (route.right == "write") == (route.method not in ("GET", "HEAD")), route.name


def test_every_name_in_a_path_is_one_that_is_checked() -> None:
    names = {name for route in ROUTES for name in re.findall(r"{(\w+)}", route.path)}
    assert names == set(NOT_FOUND)
