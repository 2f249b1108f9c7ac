"""Sessions over REST, through a real server."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
import trio

from hector_trio.errors import InvalidRequest
from hector_trio.transports.rest_sessions import PatchBody, check_patch
from tests.engines import Steered, agent
from tests.serving import serving, settings_of

pytestmark = pytest.mark.usefixtures("either_rest")


async def new(client: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    response = await client.post("/sessions", json={"agentId": "assistant", **body})
    assert response.status_code == 201, response.text
    return response


async def say(client: httpx2.AsyncClient, session: str, text: str) -> Any:
    response = await client.post(f"/sessions/{session}/tasks", json={"input": {"type": "text/plain", "content": text}})
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_session_is_created_with_state_and_metadata_and_found_where_it_says() -> None:
    async with serving() as server, server.client() as client:
        created = await new(client, metadata={"user": "john"})
        session = created.json()
        assert set(session) == {"sessionId", "agentId", "createdAt", "lastActivityAt", "state", "metadata"}
        assert (session["state"], session["metadata"]) == ({}, {"user": "john"})
        assert created.headers["Location"] == f"/sessions/{session['sessionId']}"
        found = await client.get(created.headers["Location"])
        assert found.json() == session
        assert found.headers["ETag"] == created.headers["ETag"]


async def test_a_body_is_read_as_json_whatever_its_content_type() -> None:
    async with serving() as server, server.client() as client:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await client.post("/sessions", content=b'{"agentId":"assistant"}', headers=form)).status_code == 201


async def test_a_client_may_choose_the_id_once() -> None:
    async with serving() as server, server.client() as client:
        await new(client, sessionId="mine", ttlSeconds=60)
        again = await client.post("/sessions", json={"agentId": "assistant", "sessionId": "mine"})
        assert (again.status_code, again.json()["code"]) == (409, "session_exists")
        assert "expiresAt" in (await client.get("/sessions/mine")).json()


@pytest.mark.parametrize(
    ("body", "status", "code", "pointer"),
    [
        ({}, 400, "invalid_request", "/agentId"),
        ({"agentId": "nobody"}, 404, "agent_not_found", None),
        ({"agentId": "assistant", "sessionId": ".."}, 400, "invalid_request", "/sessionId"),
        ({"agentId": "assistant", "ttlSeconds": 0}, 400, "invalid_request", "/ttlSeconds"),
        ({"agentId": "assistant", "metadata": []}, 400, "invalid_request", "/metadata"),
    ],
)
async def test_a_session_that_cannot_be_is_refused(body: Any, status: int, code: str, pointer: str | None) -> None:
    async with serving() as server, server.client() as client:
        refused = await client.post("/sessions", json=body)
        assert (refused.status_code, refused.json()["code"]) == (status, code)
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert [each["pointer"] for each in refused.json().get("errors", [])] == ([] if pointer is None else [pointer])


async def test_a_session_remembers_and_others_do_not() -> None:
    async with serving() as server, server.client() as client:
        one, other = [(await new(client)).json()["sessionId"] for _ in range(2)]
        await say(client, one, "My name is Alice")
        assert "Alice" in (await say(client, one, "What is my name?"))["output"]["content"]
        assert "Alice" not in (await say(client, other, "What is my name?"))["output"]["content"]
        page = (await client.get(f"/sessions/{one}/messages")).json()
        assert [line["role"] for line in page["messages"]] == ["user", "agent"] * 2
        assert page["messages"][0].keys() >= {"role", "content", "agentId", "taskId", "timestamp"}
        assert (page["total"], page["nextPageToken"]) == (4, "")
        tasks = (await client.get(f"/sessions/{one}/tasks?pageSize=1")).json()
        assert tasks["total"] == 2
        assert tasks["tasks"][0]["taskId"] == page["messages"][3]["taskId"]  # newest first
        rest = (await client.get(f"/sessions/{one}/tasks?pageSize=1&pageToken={tasks['nextPageToken']}")).json()
        assert rest["nextPageToken"] == ""
        assert rest["tasks"][0]["taskId"] == page["messages"][0]["taskId"]


async def test_sessions_are_listed_newest_first_filtered_and_paged() -> None:
    async with serving(agents=agent(Steered())) as server, server.client() as client:
        for i in range(3):
            await new(client, sessionId=f"s{i}", metadata={"user": "john" if i else "mary", "n": i})
        await new(client, sessionId="other", agentId="a")

        async def ids(query: str) -> list[str]:
            page = (await client.get(f"/sessions?{query}")).json()
            assert page["total"] == len(page["sessions"])
            return [each["sessionId"] for each in page["sessions"]]

        assert await ids("") == ["other", "s2", "s1", "s0"]
        assert await ids("agent_id=assistant") == ["s2", "s1", "s0"]
        assert await ids("metadata.user=john") == ["s2", "s1"]
        assert await ids("metadata.user=john&metadata.n=1") == ["s1"]
        assert await ids("agent_id=nobody") == []
        seen, token = [], ""
        while True:
            page = (await client.get(f"/sessions/?pageSize=3&pageToken={token}")).json()
            seen += [each["sessionId"] for each in page["sessions"]]
            if not (token := page["nextPageToken"]):
                break
        assert seen == ["other", "s2", "s1", "s0"]


@pytest.mark.parametrize("query", ["pageSize=0", "pageSize=101", "pageSize=abc", "pageSize=1e9", "pageToken=nonsense"])
@pytest.mark.parametrize("path", ["/sessions", "/sessions/s/messages", "/sessions/s/tasks", "/agents/assistant/tasks"])
async def test_a_page_that_cannot_be_is_refused_by_name(path: str, query: str) -> None:
    async with serving() as server, server.client() as client:
        await new(client, sessionId="s")
        refused = await client.get(f"{path}?{query}")
        assert refused.status_code == 400
        assert refused.json()["errors"][0]["pointer"] == "/" + query.partition("=")[0]


async def test_a_patch_merges_state_and_metadata_and_the_etag_follows() -> None:
    async with serving() as server, server.client() as client:
        created = await new(client, sessionId="s", metadata={"a": 1, "b": {"c": 2}})
        patched = await client.patch("/sessions/s", json={"metadata": {"a": None, "b": {"d": 3}}, "state": {"x": []}})
        assert patched.status_code == 200
        assert patched.json()["metadata"] == {"b": {"c": 2, "d": 3}}
        assert patched.json()["state"] == {"x": []}
        assert patched.headers["ETag"] != created.headers["ETag"]
        await say(client, "s", "Hello")
        assert (await client.get("/sessions/s")).headers["ETag"] == patched.headers["ETag"]


async def test_a_patch_can_depend_on_the_etag() -> None:
    async with serving() as server, server.client() as client:
        tag = (await new(client, sessionId="s")).headers["ETag"]

        async def patch(if_match: str) -> int:
            headers = {"If-Match": if_match}
            return (await client.patch("/sessions/s", json={"state": {}}, headers=headers)).status_code

        assert await patch(f'"other", {tag}') == 200
        assert await patch("*") == 200
        assert await patch('"other"') == 412
        assert await patch(f"W/{tag}") == 412
        assert await patch("nonsense") == 412
        assert (await client.patch("/sessions/none", json={}, headers={"If-Match": "*"})).status_code == 404


async def test_a_session_that_has_not_changed_is_not_sent_again() -> None:
    async with serving() as server, server.client() as client:
        tag = (await new(client, sessionId="s")).headers["ETag"]
        same = await client.get("/sessions/s", headers={"If-None-Match": f'"other", W/{tag}'})
        assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", tag)
        assert (await client.get("/sessions/s", headers={"If-None-Match": '"other"'})).status_code == 200


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"sessionId": "t"}, "/sessionId"),
        ({"lastActivityAt": "2026-01-01T00:00:00Z"}, "/lastActivityAt"),
        ({"ttlSeconds": 5}, "/ttlSeconds"),
        ({"state": 5}, "/state"),
        ({"metadata": None}, "/metadata"),
    ],
)
async def test_what_cannot_be_patched_is_refused_by_name(body: Any, pointer: str) -> None:
    async with serving() as server, server.client() as client:
        await new(client, sessionId="s")
        refused = await client.patch("/sessions/s", json=body)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (400, pointer)


def test_a_patch_is_refused_with_every_fault_at_once() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_patch(PatchBody(state=1, agent_id="x"))
    assert [each.pointer for each in refused.value.errors] == ["/state", "/agentId"]


async def test_deleting_a_session_ends_its_tasks_and_then_nothing_is_left() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        await new(client, sessionId="s", agentId="a")
        async with client.stream(
            "POST",
            "/sessions/s/tasks",
            json={"input": {"content": "slow"}, "onDisconnect": "continue"},
            headers={"Accept": "text/event-stream"},
        ) as stream:
            await steered.wait_started("slow")
            deleted: list[int] = []

            async def delete() -> None:
                async with server.client() as second:
                    deleted.append((await second.delete("/sessions/s")).status_code)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(delete)
                with trio.fail_after(5):
                    text = "".join([part async for part in stream.aiter_text()])
        assert '"status":"cancelled","reason":"session_deleted"' in text
        assert deleted == [204]
        for path in ("", "/messages", "/tasks"):
            assert (await client.get(f"/sessions/s{path}")).status_code == 404
        assert (await client.delete("/sessions/s")).status_code == 404


async def test_a_task_names_its_session_in_the_path_or_in_the_body_but_not_two_of_them() -> None:
    async with serving(agents=agent(Steered())) as server, server.client() as client:
        await new(client, sessionId="s")
        body: dict[str, Any] = {"input": {"content": "Hello"}, "context": {"sessionId": "s"}}
        for path in ("/sessions/s/tasks", "/agents/assistant/tasks"):
            assert (await client.post(path, json=body)).json()["sessionId"] == "s"
        refused = await client.post("/sessions/s/tasks", json={**body, "context": {"sessionId": "t"}})
        assert (refused.status_code, refused.json()["code"]) == (400, "session_mismatch")
        refused = await client.post("/agents/a/tasks", json=body)
        assert (refused.status_code, refused.json()["code"]) == (400, "session_mismatch")
        for path, session in (("/sessions/none/tasks", None), ("/agents/assistant/tasks", "none")):
            refused = await client.post(path, json={**body, "context": {"sessionId": session}})
            assert (refused.status_code, refused.json()["code"]) == (404, "session_not_found")


async def test_a_session_of_somebody_else_is_like_none() -> None:
    tokens = [{"name": name, "token": f"token-of-{name}-0123456789"} for name in ("mary", "john")]
    async with (
        serving(settings_of(auth={"tokens": tokens})) as server,
        server.client(headers={"Authorization": "Bearer token-of-mary-0123456789"}) as mary,
        server.client(headers={"Authorization": "Bearer token-of-john-0123456789"}) as john,
    ):
        await new(mary, sessionId="s")
        unknown, foreign = await john.get("/sessions/t"), await john.get("/sessions/s")
        for member in ("status", "code", "title"):
            assert foreign.json()[member] == unknown.json()[member]
        assert (await john.delete("/sessions/s")).status_code == 404
        assert (await john.get("/sessions")).json()["total"] == 0
        await new(john, sessionId="s")  # the id is free for others
        assert (await mary.get("/sessions/s")).status_code == 200


async def test_a_session_cannot_be_made_or_patched_larger_than_allowed() -> None:
    async with serving(settings_of(limits={"session_bytes": 1000})) as server, server.client() as client:
        large = {"x": "x" * 1000}
        made = await client.post("/sessions", json={"agentId": "assistant", "metadata": large})
        assert (made.status_code, made.json()["code"]) == (413, "payload_too_large")
        path = (await client.post("/sessions", json={"agentId": "assistant"})).headers["Location"]
        changed = await client.patch(path, json={"state": large})
        assert (changed.status_code, changed.json()["code"]) == (413, "payload_too_large")
        assert (await client.get(path)).json()["state"] == {}
