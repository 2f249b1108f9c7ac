"""What stands before the application: hosts, origins, credentials, sizes, ids; refused before a body is read."""

from __future__ import annotations

import json
from typing import Any

import h11
import httpx2
import pytest
import trio
from structlog.testing import capture_logs

from hector_trio.transports.guard import (
    Headers,
    accepted_request_id,
    is_preflight,
    is_public,
    local_path,
    preflight,
    seen_through_proxies,
)
from tests.serving import Served, serving, settings_of
from tests.sockets import connected, rejected

TOKENS = [{"name": role, "token": f"token-of-{role}-0123456789", "role": role} for role in ("admin", "user", "viewer")]
SECURED = {"auth": {"tokens": TOKENS}}
ASKING = b'{"input":{"content":"Hello"}}'


def bearer(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer token-of-{role}-0123456789"}


async def raw(server: Served, request: bytes) -> tuple[int, dict[str, str], bytes, bool]:
    """Status, headers and body of what a few bytes are answered with, and whether the connection then closed."""
    async with await trio.open_tcp_stream(*server.address) as stream:
        await stream.send_all(request)
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        http.send(h11.EndOfMessage())
        status, body = 0, b""
        headers: dict[str, str] = {}
        with trio.fail_after(5):
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    headers = {name.decode().title(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
            closed = False
            with trio.move_on_after(0.5):
                closed = await stream.receive_some() == b""
    return status, headers, body, closed


# --- origins and hosts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/agents", "/health/live", "/", "/nothing-here"])
async def test_a_foreign_page_is_refused_everywhere_and_the_log_says_how_to_allow_it(path: str) -> None:
    async with serving() as server, server.client() as client:
        with capture_logs() as lines:
            refused = await client.get(path, headers={"Origin": "https://evil.example"})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "Access-Control-Allow-Origin" not in refused.headers
        told = [line for line in lines if line["event"] == "origin_refused"]
        assert told[0]["allow_with"] == "--allow-origin https://evil.example"


async def test_a_foreign_page_is_refused_before_its_body_is_sent() -> None:
    async with serving() as server:
        status, _, body, _ = await raw(
            server,
            b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nContent-Length: 1000\r\n\r\n",
        )
        assert (status, json.loads(body)["code"]) == (403, "forbidden")


async def test_pages_of_this_machine_and_allowed_ones_are_answered_and_may_read_the_headers() -> None:
    async with (
        serving(settings_of(server={"allow_origins": ["https://app.example"]})) as server,
        server.client() as client,
    ):
        for origin in ("http://localhost:3000", "http://127.0.0.1:5000", server.url, "https://app.example"):
            answer = await client.get("/agents", headers={"Origin": origin})
            assert answer.status_code == 200
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert "Origin" in answer.headers["Vary"]
            exposed = {name.strip() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
            assert exposed == {
                *("Location", "Retry-After", "ETag", "X-Request-Id"),
                *("Upload-Offset", "Upload-Length", "Upload-Defer-Length", "Upload-Metadata", "Upload-Expires"),
                *("Tus-Resumable", "Tus-Version", "Tus-Extension", "Tus-Max-Size", "Tus-Checksum-Algorithm"),
            }
            assert "Access-Control-Allow-Credentials" not in answer.headers
        problem = await client.get("/agents/nobody", headers={"Origin": "https://app.example"})
        assert problem.headers["Access-Control-Allow-Origin"] == "https://app.example"


async def test_a_preflight_is_answered_without_credentials() -> None:
    async with serving(settings_of(**SECURED)) as server, server.client() as client:
        asked = {
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "PATCH",
            "Access-Control-Request-Headers": "authorization, content-type, if-match",
        }
        answer = await client.options("/sessions/s", headers=asked)
        assert answer.status_code == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
        assert "PATCH" in answer.headers["Access-Control-Allow-Methods"]
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type, if-match"
        refused = await client.options("/sessions/s", headers={**asked, "Origin": "https://evil.example"})
        assert refused.status_code == 403


async def test_a_name_that_was_pointed_at_this_machine_is_refused() -> None:
    async with serving() as server, server.client() as client:
        with capture_logs() as lines:
            refused = await client.get("/agents", headers={"Host": "rebound.example"})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert any(line["event"] == "host_refused" for line in lines)
    async with (
        serving(settings_of(server={"allowed_hosts": ["hector.lan"]})) as server,
        server.client() as client,
    ):
        card = (await client.get("/agents/assistant", headers={"Host": "hector.lan:80"})).json()
        assert card["endpoints"]["task"].startswith("http://hector.lan")


async def test_a_request_without_a_host_is_answered() -> None:
    async with serving() as server:
        status, _, body, closed = await raw(server, b"GET /agents/assistant HTTP/1.0\r\n\r\n")
        assert (status, closed) == (200, True)
        assert json.loads(body)["endpoints"]["stream"].startswith("ws://127.0.0.1:")


# --- credentials and roles --------------------------------------------------------------------------------------------


async def test_without_tokens_everybody_on_this_machine_may_call() -> None:
    async with serving() as server, server.client() as client:
        assert (await client.get("/metrics")).status_code == 200


async def test_with_tokens_nobody_may_call_without_one_except_for_health_and_the_page() -> None:
    async with serving(settings_of(**SECURED)) as server, server.client() as client:
        for path in ("/agents", "/sessions", "/openapi.json", "/metrics", "/nothing-here"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
                refused = await client.get(path, headers=headers)
                assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
                assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        assert (await client.get(f"/agents?token={TOKENS[0]['token']}")).status_code == 401
        for path in ("/health/live", "/health/ready", "/"):
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("role", "read", "write", "metrics"),
    [("viewer", 200, 403, 403), ("user", 200, 201, 403), ("admin", 200, 201, 200)],
)
async def test_roles_may_what_they_may(role: str, read: int, write: int, metrics: int) -> None:
    async with serving(settings_of(**SECURED)) as server, server.client(headers=bearer(role)) as client:
        assert (await client.get("/sessions")).status_code == read
        assert (await client.post("/sessions", json={"agentId": "assistant"})).status_code == write
        answer = await client.get("/metrics")
        assert answer.status_code == metrics
        if metrics == 403:
            assert answer.json()["code"] == "forbidden"


# --- WebSockets -------------------------------------------------------------------------------------------------------


async def upgrade_refused(server: Served, agent: str = "assistant", **options: Any) -> tuple[int, Any]:
    refused = await rejected(server, agent, **options)
    return refused.status_code, json.loads(refused.body or b"{}")


async def test_a_websocket_is_refused_before_the_upgrade_with_a_problem() -> None:
    async with serving(settings_of(**SECURED)) as server:
        status, problem = await upgrade_refused(server)
        assert (status, problem["code"], problem["instance"]) == (401, "unauthorized", "/agents/assistant/stream")
        foreign = [("Origin", "https://evil.example")]
        status, problem = await upgrade_refused(server, extra_headers=foreign)
        assert (status, problem["code"]) == (403, "forbidden")
        token = [("Authorization", bearer("user")["Authorization"])]
        status, problem = await upgrade_refused(server, "nobody", extra_headers=token)
        assert (status, problem["code"]) == (404, "agent_not_found")
        assert problem["requestId"]


async def test_a_browser_gives_its_token_as_a_subprotocol() -> None:
    async with serving(settings_of(**SECURED)) as server:
        async with connected(server, subprotocols=["bearer", TOKENS[1]["token"]]) as peer:
            assert peer.websocket.subprotocol == "bearer"
            await peer.ask("Hello")
            assert (await peer.read_to_final())[-1]["status"] == "completed"
        status, _ = await upgrade_refused(server, subprotocols=["bearer", "wrong"])
        assert status == 401


# --- sizes ------------------------------------------------------------------------------------------------------------

SMALL = settings_of(limits={"body_bytes": 100})


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read() -> None:
    async with serving(SMALL) as server:
        status, _, body, closed = await raw(
            server, b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 101\r\n\r\n"
        )
        assert (status, json.loads(body)["code"], closed) == (413, "payload_too_large", True)
        huge = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 19 + b"\r\n\r\n"
        assert (await raw(server, huge))[0] in (400, 413)


async def test_a_body_without_a_length_is_cut_at_the_limit() -> None:
    async with serving(SMALL) as server:
        chunk = b"20\r\n" + b"x" * 32 + b"\r\n"
        status, _, body, closed = await raw(
            server, b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 4
        )
        assert (status, json.loads(body)["code"], closed) == (413, "payload_too_large", True)


async def test_a_body_of_exactly_the_limit_is_taken() -> None:
    async with serving(SMALL) as server, server.client() as client:
        body = b'{"agentId":"assistant"}'.ljust(100)
        assert (await client.post("/sessions", content=body)).status_code == 201


# --- every answer -----------------------------------------------------------------------------------------------------


async def test_every_answer_has_an_id_and_says_what_it_is() -> None:
    async with serving(settings_of(**SECURED)) as server, server.client() as client:
        answers: list[httpx2.Response] = [
            await client.get("/agents", headers=bearer("user")),
            await client.get("/agents"),
            await client.get("/agents", headers={"Origin": "null"}),
            await client.put("/agents", headers=bearer("user")),
            await client.get("/"),
        ]
        for answer in answers:
            assert answer.headers["X-Request-Id"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
            assert len(answer.headers.get_list("Cache-Control")) == 1


async def test_the_clients_id_of_a_request_is_kept_if_it_is_one() -> None:
    async with serving() as server, server.client() as client:
        mine = await client.get("/agents/nobody", headers={"X-Request-Id": "trace~1"})
        assert mine.headers["X-Request-Id"] == mine.json()["requestId"] == "trace~1"
        other = await client.get("/agents", headers={"X-Request-Id": "a b"})
        assert other.headers["X-Request-Id"] != "a b"


async def test_requests_are_counted_by_their_route_and_logged_if_wanted() -> None:
    async with serving(settings_of(log={"access": True})) as server, server.client() as client:
        with capture_logs() as lines:
            await client.get("/agents/assistant?secret=1")
            await client.get("/agents/nobody")
            await client.get("/nothing-here")
        metrics = (await client.get("/metrics")).text
        for labels in (
            'method="GET",route="/agents/{agentId}",status="200"',
            'method="GET",route="/agents/{agentId}",status="404"',
            'method="GET",route="other",status="404"',
        ):
            assert f"hector_requests_total{{{labels}}} 1.0" in metrics
        line = next(line for line in lines if line["event"] == "request")
        assert (line["path"], line["status"]) == ("/agents/assistant", 200)
        assert "secret" not in str(lines)


# --- decided without I/O ----------------------------------------------------------------------------------------------


def scope(**more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "path": "/",
        "scheme": "http",
        "headers": [],
        "client": ("10.0.0.1", 1),
        **more,
    }


FORWARDED = [
    (b"host", b"inner:8080"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"hector.example"),
    (b"x-forwarded-for", b"203.0.113.7"),
]


def test_a_trusted_proxy_is_believed() -> None:
    seen = seen_through_proxies(scope(headers=FORWARDED), ["10.0.0.0/8"])
    assert (seen["scheme"], seen["client"]) == ("https", ("203.0.113.7", 0))
    assert Headers(seen["headers"]).one(b"host") == "hector.example"


def test_anybody_else_is_not_believed() -> None:
    given = scope(headers=FORWARDED)
    assert seen_through_proxies(given, ["192.168.0.1"]) == given
    assert seen_through_proxies(given, []) == given


async def test_cards_follow_the_host_that_a_trusted_proxy_tells() -> None:
    server_settings = {"trusted_proxies": ["127.0.0.1"], "allowed_hosts": ["hector.example"]}
    async with serving(settings_of(server=server_settings)) as server, server.client() as client:
        headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "hector.example"}
        card = (await client.get("/agents/assistant", headers=headers)).json()
        assert card["endpoints"]["stream"] == "wss://hector.example/agents/assistant/stream"


@pytest.mark.parametrize("bad", [None, "", "a b", "..", "x" * 129, "é"])
def test_an_id_that_is_none_is_replaced(bad: str | None) -> None:
    assert accepted_request_id(bad) != bad


def test_public_paths_are_the_page_its_assets_and_health() -> None:
    assert all(map(is_public, ["/", "/health/live", "/assets/x.js"]))
    assert not any(map(is_public, ["/health", "/agents", "//", "/healthy", "/metrics"]))
    assert local_path(scope(path="/root/health/live", root_path="/root")) == "/health/live"
    assert local_path(scope(path="/root", root_path="/root")) == "/"


def test_a_preflight_is_an_options_with_both_headers() -> None:
    both = [(b"origin", b"http://x"), (b"access-control-request-method", b"PUT")]
    assert is_preflight(scope(method="OPTIONS"), Headers(both))
    assert not is_preflight(scope(method="OPTIONS"), Headers(both[:1]))
    assert not is_preflight(scope(method="GET"), Headers(both))


def test_nonsense_in_a_preflight_is_not_echoed() -> None:
    names = [name for name, _ in preflight(Headers([(b"access-control-request-headers", b"a\r\nb, c d")]))]
    assert b"access-control-allow-headers" not in names
