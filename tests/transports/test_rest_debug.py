"""Who may see the live tree, and that it is not there unless it is enabled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import schemathesis

from hector_trio.auth import Role
from hector_trio.models import LiveTree
from tests.serving import serving, settings_of

TOKENS = {role: f"{role}-token-0123456789" for role in ("admin", "user", "viewer")}


def with_tokens(**server: Any) -> Any:
    tokens = [{"name": role, "token": token, "role": role} for role, token in TOKENS.items()]
    return settings_of(server=server, auth={"tokens": tokens})


async def test_unless_enabled_it_is_like_any_unknown_path() -> None:
    async with serving() as server, server.client() as client:
        for method in ("GET", "HEAD", "OPTIONS", "POST"):
            there, nowhere = await client.request(method, "/debug/tree"), await client.request(method, "/debug/nothing")
            assert (there.status_code, there.headers["Content-Type"]) == (404, nowhere.headers["Content-Type"])
        assert (await client.get("/debug/tree")).json()["code"] == "not_found"
        assert "/debug/tree" not in (await client.get("/openapi.json")).json()["paths"]
        assert server.services.watch is None


async def test_without_tokens_this_machine_may_ask_and_gets_what_is_described() -> None:
    async with serving(settings_of(server={"debug_tree": True})) as server, server.client() as client:
        answer = await client.get("/debug/tree")
        assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store")
        assert msgspec.json.decode(answer.content, type=LiveTree).root.kind == "task"
        described = (await client.get("/openapi.json")).json()
        schemathesis.openapi.from_dict(described).validate()
        operation = described["paths"]["/debug/tree"]["get"]
        assert set(operation["responses"]) >= {"200", "400", "403"}
        assert {"LiveTree", "LiveNode"} <= set(described["components"]["schemas"])
        assert (await client.options("/debug/tree")).headers["Allow"] == "GET, HEAD, OPTIONS"


async def test_without_tokens_nobody_else_may_ask() -> None:
    settings = settings_of(server={"debug_tree": True, "trusted_proxies": ["127.0.0.1"]})
    async with serving(settings) as server, server.client() as client:
        for address, status in (("203.0.113.9", 403), ("2001:db8::1", 403), ("127.0.0.1", 200), ("::1", 200)):
            answer = await client.get("/debug/tree", headers={"X-Forwarded-For": address})
            assert answer.status_code == status, address
            assert status == 200 or answer.json()["code"] == "forbidden"


async def test_without_tokens_whoever_is_on_the_unix_socket_may_ask(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with serving(settings_of(server={"debug_tree": True, "uds": path})):
        transport = httpx2.AsyncHTTPTransport(uds=path)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=10) as client:
            answer = await client.get("/debug/tree")
            assert answer.status_code == 200
            assert "unix:" in answer.text


@pytest.mark.parametrize(("role", "status"), [("admin", 200), ("user", 403), ("viewer", 403)])
async def test_with_tokens_only_admins_may_ask(role: Role, status: int) -> None:
    async with serving(with_tokens(debug_tree=True)) as server, server.client() as client:
        answer = await client.get("/debug/tree", headers={"Authorization": f"Bearer {TOKENS[role]}"})
        assert answer.status_code == status
        assert status == 200 or answer.json()["code"] == "forbidden"
        assert not any(token in answer.text for token in TOKENS.values())


async def test_with_tokens_an_admin_may_ask_from_anywhere_and_nobody_without_one() -> None:
    async with (
        serving(with_tokens(debug_tree=True, trusted_proxies=["127.0.0.1"])) as server,
        server.client() as client,
    ):
        elsewhere = {"X-Forwarded-For": "203.0.113.9"}
        assert (await client.get("/debug/tree", headers=elsewhere)).status_code == 401
        token = {"Authorization": f"Bearer {TOKENS['admin']}"}
        assert (await client.get("/debug/tree", headers=elsewhere | token)).status_code == 200
