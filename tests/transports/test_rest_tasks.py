"""Tasks over REST, through a real server: waiting, preferring not to, following, repeating, cancelling, reading."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
import trio

from hector_trio.agents import Context
from hector_trio.errors import RunError
from tests.engines import Steered, agent
from tests.serving import Served, serving, settings_of

pytestmark = pytest.mark.usefixtures("either_rest")

SIX = {"taskId", "seq", "chunkType", "content", "timestamp", "final"}


def body(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"input": {"type": "text/plain", "content": text}, **more}


async def run(client: httpx2.AsyncClient, text: str = "Hello", agent: str = "assistant", **more: Any) -> Any:
    response = await client.post(f"/agents/{agent}/tasks", json=body(text, **more))
    assert response.status_code == 200, response.text
    return response.json()


async def status_of(server: Served, task_id: str, agent_id: str = "a") -> str:
    row = await server.engine.store.get_task("local", agent_id, task_id)
    assert row is not None
    return (await server.engine.wait(row)).status


async def test_a_plain_post_waits_for_the_end() -> None:
    async with serving() as server, server.client() as client:
        answered = await client.post("/agents/assistant/tasks", json=body(context={"metadata": {"k": "v"}}))
        task = answered.json()
        assert answered.status_code == 200
        assert task["status"] == "completed"
        assert task["output"]["type"] == "text/plain"
        assert task["metadata"] == {"k": "v"}
        assert (await client.get(answered.headers["Content-Location"])).json() == task


async def test_a_task_that_fails_is_an_answer_too() -> None:
    async def fail(ctx: Context) -> None:
        raise RunError("out_of_stock", "Nothing left", details={"left": 0})

    async with serving(agents=agent(fail)) as server, server.client() as client:
        task = await run(client, agent="a")
        assert task["status"] == "failed"
        assert task["error"] == {"code": "out_of_stock", "message": "Nothing left", "details": {"left": 0}}


async def test_who_prefers_not_to_wait_is_told_where_to_look() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        told = await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers={"Prefer": "respond-async"})
        assert (told.status_code, told.headers["Preference-Applied"]) == (202, "respond-async")
        assert told.headers["Location"] == "/agents/a/tasks/t"
        assert told.json()["status"] in ("pending", "running")
        await steered.wait_started("x")
        steered.let("x")
        assert await status_of(server, "t") == "completed"


async def test_patience_can_run_out_and_the_task_runs_on() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        told = await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers={"Prefer": "wait=0"})
        assert (told.status_code, told.headers["Preference-Applied"]) == (202, "wait=0")
        told = await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers={"Prefer": "wait=1"})
        assert (told.status_code, told.json()["status"]) == (202, "running")
        steered.let("x")
        assert await status_of(server, "t") == "completed"
        told = await client.post("/agents/a/tasks", json=body("x", taskId="u"), headers={"Prefer": "wait=9"})
        assert told.status_code == 200


async def test_a_task_that_dies_with_its_connection_is_waited_for_whatever_is_preferred() -> None:
    async with serving() as server, server.client() as client:
        answered = await client.post(
            "/agents/assistant/tasks", json=body(onDisconnect="cancel"), headers={"Prefer": "respond-async"}
        )
        assert (answered.status_code, answered.json()["status"]) == (200, "completed")
        assert "Preference-Applied" not in answered.headers


@pytest.mark.parametrize(("policy", "end"), [("cancel", "cancelled"), ("continue", "completed"), (None, "completed")])
async def test_a_client_that_gives_up_waiting_ends_its_task_only_if_it_said_so(policy: str | None, end: str) -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server:
        async with server.client() as client, trio.open_nursery() as nursery:
            request = body("x", taskId="t", **({"onDisconnect": policy} if policy else {}))
            nursery.start_soon(lambda: client.post("/agents/a/tasks", json=request))
            await steered.wait_started("x")
            nursery.cancel_scope.cancel()
        if policy != "cancel":
            steered.let("x")
        with trio.fail_after(5):
            assert await status_of(server, "t") == end


async def test_a_request_that_names_a_running_task_follows_it_and_another_is_refused() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        first = {"Prefer": "respond-async"}
        await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers=first)
        await steered.wait_started("x")
        other = await client.post("/agents/a/tasks", json=body("y", taskId="t"))
        assert (other.status_code, other.json()["code"]) == (409, "task_exists")
        assert (await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers=first)).status_code == 202
        steered.let("x")
        assert await status_of(server, "t") == "completed"
        assert steered.started == ["x"]


async def test_an_ended_tasks_id_can_be_used_again_and_the_old_one_stays_readable() -> None:
    async with serving() as server, server.client() as client:
        one = await run(client, "My name is Alice", taskId="task-123")
        two = await run(client, "What are agents?", taskId="task-123")
        assert (await client.get("/agents/assistant/tasks/task-123")).json() == two
        old = (await client.get("/agents/assistant/tasks/task-123~1")).json()
        assert old == {**one, "taskId": "task-123~1"}
        chunks = (await client.get("/agents/assistant/tasks/task-123~1/events")).json()["chunks"]
        assert {chunk["taskId"] for chunk in chunks} == {"task-123~1"}


async def test_an_idempotency_key_answers_the_same_task_in_flight_or_ended() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        key = {"Idempotency-Key": "k1"}
        in_flight = {**key, "Prefer": "respond-async"}
        one = await client.post("/agents/a/tasks", json=body("x"), headers=in_flight)
        two = await client.post("/agents/a/tasks", json=body("x"), headers=in_flight)
        assert "Idempotency-Replayed" not in one.headers
        assert two.headers["Idempotency-Replayed"] == "true"
        assert two.json()["taskId"] == one.json()["taskId"]
        steered.let("x")
        ended = await client.post("/agents/a/tasks", json=body("x"), headers=key)
        assert (ended.status_code, ended.json()["status"]) == (200, "completed")
        assert ended.json()["taskId"] == one.json()["taskId"]
        other = await client.post("/agents/a/tasks", json=body("y"), headers=key)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
        assert (await client.get("/agents/a/tasks")).json()["total"] == 1
        elsewhere = await client.post("/agents/assistant/tasks", json=body("y"), headers=key)
        assert elsewhere.status_code == 200  # a key is a route's own
        refused = await client.post("/agents/a/tasks", json=body("x"), headers={"Idempotency-Key": "k" * 256})
        assert refused.status_code == 400


async def test_a_busy_session_can_be_refused() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        await client.post("/sessions", json={"agentId": "a", "sessionId": "s"})
        await client.post("/sessions/s/tasks", json=body("x", taskId="t"), headers={"Prefer": "respond-async"})
        refused = await client.post("/sessions/s/tasks", json=body("y", multitask="reject"))
        assert (refused.status_code, refused.json()["code"], refused.json()["taskId"]) == (409, "session_busy", "t")
        steered.let("x")
        assert await status_of(server, "t") == "completed"


async def test_cancelling_ends_the_task_and_can_be_repeated() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers={"Prefer": "respond-async"})
        await steered.wait_started("x")
        running = await client.delete("/agents/a/tasks/t")
        assert (running.status_code, running.json()["code"]) == (409, "task_running")
        for _ in range(2):
            cancelled = await client.post("/agents/a/tasks/t/cancel")
            assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert steered.ended == ["x"]
        assert (await client.delete("/agents/a/tasks/t")).status_code == 204
        assert (await client.get("/agents/a/tasks/t")).status_code == 404
        assert (await client.post("/agents/a/tasks/t/cancel")).json()["code"] == "task_not_found"


async def test_cancelling_an_ended_task_answers_how_it_ended() -> None:
    async with serving() as server, server.client() as client:
        task = await run(client, taskId="t")
        assert (await client.post("/agents/assistant/tasks/t/cancel")).json() == task


async def test_a_task_of_another_agent_is_not_found_and_an_unknown_agent_is_said_to_be() -> None:
    async with serving(agents=agent(Steered())) as server, server.client() as client:
        await run(client, taskId="t")
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events")):
            other = await client.request(method, f"/agents/a/tasks/t{path}")
            assert (other.status_code, other.json()["code"]) == (404, "task_not_found")
            nobody = await client.request(method, f"/agents/nobody/tasks/t{path}")
            assert (nobody.status_code, nobody.json()["code"]) == (404, "agent_not_found")
        for method in ("GET", "POST"):
            nobody = await client.request(method, "/agents/nobody/tasks", json=body())
            assert (nobody.status_code, nobody.json()["code"]) == (404, "agent_not_found")


async def test_an_agents_tasks_are_listed_newest_first_by_status() -> None:
    async with serving() as server, server.client() as client:
        for i in range(3):
            await run(client, taskId=f"t{i}")
        page = (await client.get("/agents/assistant/tasks?status=completed&pageSize=2")).json()
        assert [task["taskId"] for task in page["tasks"]] == ["t2", "t1"]
        assert page["total"] == 3
        assert (await client.get("/agents/assistant/tasks?status=running")).json()["tasks"] == []
        refused = await client.get("/agents/assistant/tasks?status=asleep")
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (400, "/status")


async def test_a_log_is_read_in_pages_without_a_hole() -> None:
    async with serving() as server, server.client() as client:
        await run(client, taskId="t")
        path = "/agents/assistant/tasks/t/events"
        whole = (await client.get(f"{path}?pageSize=100")).json()
        chunks = whole["chunks"]
        assert all(chunk.keys() >= SIX for chunk in chunks)
        assert [chunk["seq"] for chunk in chunks] == list(range(1, whole["total"] + 1))
        assert (whole["nextPageToken"], chunks[-1]["chunkType"], chunks[-1]["final"]) == ("", "done", True)
        paged, token = [], ""
        while True:
            page = (await client.get(f"{path}?pageSize=7&pageToken={token}")).json()
            assert page["total"] == whole["total"]
            paged += page["chunks"]
            if not (token := page["nextPageToken"]):
                break
        assert paged == chunks
        assert (await client.get(f"{path}?after=3&pageSize=2")).json()["chunks"] == chunks[3:5]
        beyond = (await client.get(f"{path}?after=9999")).json()
        assert (beyond["chunks"], beyond["nextPageToken"], beyond["total"]) == ([], "", whole["total"])
        for query in ("after=x", "after=-1", "pageToken=x", "pageSize=0"):
            assert (await client.get(f"{path}?{query}")).status_code == 400


async def test_the_log_of_a_running_task_is_read_without_waiting() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers={"Prefer": "respond-async"})
        row = await server.engine.store.get_task("local", "a", "t")
        assert row is not None
        with server.engine.follow(row) as follower, trio.fail_after(5):
            await follower.read(1)
        page = (await client.get("/agents/a/tasks/t/events")).json()
        assert [chunk["content"] for chunk in page["chunks"]] == ["<x"]
        assert (await client.get("/agents/a/tasks/t/events?after=1")).json()["chunks"] == []
        steered.let("x")
        assert await status_of(server, "t") == "completed"


@pytest.mark.parametrize(
    ("data", "pointer"),
    [(b"", ""), (b"{", ""), (b'{"input":5}', "/input"), (b'{"input":{"content":5}}', "/input/content")],
)
async def test_a_request_that_cannot_be_read_is_refused_with_its_place(data: bytes, pointer: str) -> None:
    async with serving() as server, server.client() as client:
        refused = await client.post("/agents/assistant/tasks", content=data)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (400, pointer)


async def test_the_depth_of_a_body_is_limited() -> None:
    async with serving(settings_of(limits={"json_depth": 8})) as server, server.client() as client:
        deep: Any = []
        for _ in range(8):
            deep = [deep]
        refused = await client.post("/agents/assistant/tasks", json=body(parameters={"deep": deep}))
        assert refused.status_code == 400


async def test_a_draining_server_takes_no_work_but_can_be_read() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        await client.post("/agents/a/tasks", json=body("x", taskId="t"), headers={"Prefer": "respond-async"})
        await steered.wait_started("x")
        server.stop.set()
        await server.engine.drain_started.wait()
        for path, request in (("/agents/a/tasks", body("y")), ("/sessions", {"agentId": "a"})):
            refused = await client.post(path, json=request)
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert refused.json()["retryable"] is True
            assert int(refused.headers["Retry-After"]) > 0
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/agents/a/tasks/t")).json()["status"] == "running"
        steered.let("x")
