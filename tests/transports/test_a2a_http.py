"""The HTTP+JSON binding of A2A: paths, tenants, methods, media types, queries, 0.3 below ``v1``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hector_trio.transports.a2a_http import Found, find
from tests.a2a.speaking import VERSION, Speaker, echo, message_of, speaking, text_of

LEGACY = {"messageId": "m", "role": "ROLE_USER", "content": [{"text": "hi"}]}


@pytest.mark.parametrize(
    ("method", "path", "operation", "names"),
    [
        ("POST", "message:send", "SendMessage", {}),
        ("POST", "message:stream", "SendStreamingMessage", {}),
        ("GET", "tasks", "ListTasks", {}),
        ("GET", "tasks/t", "GetTask", {"id": "t"}),
        ("POST", "tasks/t:cancel", "CancelTask", {"id": "t"}),
        ("POST", "tasks/t:subscribe", "SubscribeToTask", {"id": "t"}),
        ("GET", "tasks/t:subscribe", "SubscribeToTask", {"id": "t"}),
        ("POST", "tasks/t/pushNotificationConfigs", "CreateTaskPushNotificationConfig", {"taskId": "t"}),
        ("GET", "tasks/t/pushNotificationConfigs", "ListTaskPushNotificationConfigs", {"taskId": "t"}),
        ("GET", "tasks/t/pushNotificationConfigs/c", "GetTaskPushNotificationConfig", {"taskId": "t", "id": "c"}),
        ("DELETE", "tasks/t/pushNotificationConfigs/c", "DeleteTaskPushNotificationConfig", {"taskId": "t", "id": "c"}),
        ("GET", "extendedAgentCard", "GetExtendedAgentCard", {}),
    ],
)
def test_every_path_means_its_operation_also_below_a_tenant(
    method: str, path: str, operation: str, names: dict[str, str]
) -> None:
    found = find(method, path)
    assert isinstance(found, Found)
    assert (found.pattern.operation, found.names, found.legacy) == (operation, names, False)
    below = find(method, f"acme/{path}")
    assert isinstance(below, Found)
    assert (below.pattern.operation, below.names) == (operation, {**names, "tenant": "acme"})


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("POST", "v1/message:send", "SendMessage"),
        ("GET", "v1/tasks/t", "GetTask"),
        ("POST", "v1/tasks/t:cancel", "CancelTask"),
        ("GET", "v1/card", "GetExtendedAgentCard"),
    ],
)
def test_below_v1_is_0_3(method: str, path: str, operation: str) -> None:
    found = find(method, path)
    assert isinstance(found, Found)
    assert (found.pattern.operation, found.legacy) == (operation, True)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "message:send", {"POST"}),
        ("DELETE", "tasks/t", {"GET"}),
        ("PUT", "tasks/t:subscribe", {"GET", "POST"}),
        ("GET", "v1/tasks", set()),
        ("GET", "card", set()),
        ("GET", "tasks/t:explode", set()),
        ("GET", "tasks/", set()),
        ("GET", "tasks/a/b", set()),
        ("GET", "x/y/tasks", set()),
        ("GET", "acme:1/tasks", set()),
        ("GET", "v1/extendedAgentCard", set()),
        ("GET", "", set()),
    ],
)
def test_other_paths_mean_nothing(method: str, path: str, allowed: set[str]) -> None:
    assert find(method, path) == frozenset(allowed)


async def test_metrics_know_no_names_of_clients() -> None:
    async with speaking(echo, "http") as (served, speaker):
        for path in ("tasks/secret", "secret/tasks", "v1/tasks/secret"):
            await speaker.client.get(f"/a2a/a/{path}", headers=VERSION)
        metrics = served.services.metrics.render()
        assert b'route="/a2a/{agentId}/{path}"' in metrics
        assert b"secret" not in metrics


async def test_a_wrong_method_says_which_are_right() -> None:
    async with speaking(echo, "http") as (_, speaker):
        answer = await speaker.client.delete("/a2a/a/tasks/t", headers=VERSION)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        assert answer.json()["error"]["code"] == 405
        answer = await speaker.client.get("/a2a/a/nothing", headers=VERSION)
        assert answer.status_code == 404
        answer = await speaker.client.get("/a2a/nobody/tasks", headers=VERSION)
        assert (answer.status_code, answer.json()["error"]["status"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("accept", "kind", "result", "refusal"),
    [
        ("*/*", "application/a2a+json", "a2a", "a2a"),
        ("application/a2a+json", "application/json", "a2a", "a2a"),
        ("*/*", "application/json", "plain", "plain"),
        ("application/json", "application/a2a+json", "plain", "plain"),
        ("*/*", "text/plain", "a2a", "plain"),
    ],
)
async def test_an_answer_is_in_the_media_type_that_the_client_speaks(
    accept: str, kind: str, result: str, refusal: str
) -> None:
    names = {"a2a": "application/a2a+json", "plain": "application/json"}
    async with speaking(echo, "http") as (_, speaker):
        headers = {**VERSION, "Accept": accept, "Content-Type": kind}
        body = json.dumps(message_of()).encode()
        answer = await speaker.client.post("/a2a/a/message:send", content=body, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (200, names[result])
        answer = await speaker.client.post("/a2a/a/message:send", content=b"{}", headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (400, names[refusal])


async def test_cancel_and_subscribe_may_have_an_empty_body() -> None:
    async with speaking(echo, "http") as (_, speaker):
        task = await speaker.send()
        for verb in ("cancel", "subscribe"):
            answer = await speaker.client.post(f"/a2a/a/tasks/{task['id']}:{verb}", headers=VERSION)
            assert answer.status_code == 400
            assert answer.json()["error"]["details"][0]["reason"] in ("TASK_NOT_CANCELABLE", "UNSUPPORTED_OPERATION")
        answer = await speaker.client.get(f"/a2a/a/tasks/{task['id']}:subscribe?after=0", headers=VERSION)
        assert answer.headers["content-type"].startswith("text/event-stream")


async def test_a_tenant_in_the_path_leads_to_the_same_agent() -> None:
    async with speaking(echo, "http") as (_, speaker):
        answer = await speaker.client.post("/a2a/a/acme/message:send", json=message_of("x"), headers=VERSION)
        task = answer.json()["task"]
        assert text_of(task) == "x"
        assert (await speaker.client.get(f"/a2a/a/acme/tasks/{task['id']}", headers=VERSION)).json()["id"] == task["id"]


async def test_a_path_of_1_0_needs_its_version() -> None:
    async with speaking(echo, "http") as (_, speaker):
        for headers in ({}, {"A2A-Version": "0.3"}, {"A2A-Version": "7.0"}):
            answer = await speaker.client.get("/a2a/a/tasks", headers=headers)
            assert answer.status_code == 400
            assert answer.json()["error"]["details"][0]["reason"] == "VERSION_NOT_SUPPORTED"
        assert (await speaker.client.get("/a2a/a/tasks?A2A-Version=1.0")).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"7", b"[" * 100])
async def test_a_body_that_is_none_is_refused(body: bytes) -> None:
    async with speaking(echo, "http") as (_, speaker):
        answer = await speaker.client.post("/a2a/a/message:send", content=body, headers=VERSION)
        assert answer.status_code == 400
        assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"


async def test_0_3_is_spoken_below_v1() -> None:
    async with speaking(echo, "http") as (_, speaker):
        answer = await speaker.client.post("/a2a/a/v1/message:send", json={"request": LEGACY})
        task = answer.json()["task"]
        assert task["status"]["state"] == "TASK_STATE_COMPLETED"
        assert task["artifacts"][0]["parts"] == [{"text": "hi"}]
        got = (await speaker.client.get(f"/a2a/a/v1/tasks/{task['id']}")).json()
        assert (got["id"], got["history"][0]["content"]) == (task["id"], [{"text": "hi"}])
        answer = await speaker.client.post("/a2a/a/v1/message:stream", json={"request": LEGACY})
        events: list[dict[str, Any]] = [
            json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")
        ]
        assert "task" in events[0]
        assert events[-1]["statusUpdate"]["final"] is True
        assert (await speaker.client.get("/a2a/a/v1/tasks")).status_code == 404


@pytest.mark.parametrize(
    ("configuration", "state"),
    [({}, "SUBMITTED"), ({"blocking": False}, "SUBMITTED"), ({"blocking": True}, "COMPLETED"), (None, "COMPLETED")],
)
async def test_what_0_3_does_not_say_below_v1_is_false(configuration: Any, state: str) -> None:
    """Its shape is that of the protocol's buffers, which write no false."""
    async with speaking(echo, "http") as (_, speaker):
        body = {"message": LEGACY, **({} if configuration is None else {"configuration": configuration})}
        task = (await speaker.client.post("/a2a/a/v1/message:send", json=body)).json()["task"]
        assert task["status"]["state"] == f"TASK_STATE_{state}"


async def test_errors_below_v1_are_known_by_their_code_and_their_name() -> None:
    async with speaking(echo, "http") as (_, speaker):
        answer = await speaker.client.get("/a2a/a/v1/tasks/nobody")
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
        error = answer.json()
        assert (error["code"], error["type"], error["message"]) == (
            -32001,
            "TaskNotFoundError",
            "Task 'nobody' was not found",
        )
        answer = await speaker.client.post("/a2a/a/v1/message:stream", json={"message": {**LEGACY, "taskId": "nobody"}})
        assert (answer.status_code, answer.json()["code"]) == (404, -32001)


async def test_both_bindings_see_the_same() -> None:
    async with speaking(echo, "http") as (_, speaker):
        task = await speaker.send("x")
        assert await Speaker(speaker.client, binding="jsonrpc").get(task["id"]) == await speaker.get(task["id"])
