"""The JSON-RPC binding of A2A: envelopes, versions by method name, errors, both spellings of the address."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from hector_trio.agents import Context
from hector_trio.errors import StoreUnavailable
from tests.a2a.speaking import VERSION, Speaker, echo, message_of, speaking

LEGACY = {"kind": "message", "messageId": "m", "role": "user", "parts": [{"kind": "text", "text": "hi"}]}


async def rpc(client: httpx2.AsyncClient, body: Any, url: str = "/a2a/a", **headers: str) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post(url, content=content, headers=headers or VERSION)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", -32700),
        (b"", -32700),
        (b"\xff", -32700),
        (b"[]", -32600),
        (b"1", -32600),
        (b"{}", -32600),
        ({"jsonrpc": "1.0", "id": 1, "method": "GetTask"}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": 7}, -32600),
        ({"jsonrpc": "2.0", "id": {}, "method": "GetTask"}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "Nonsense"}, -32601),
        ({"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": [1]}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "GetTask"}, -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"GetTask","params":' + b"[" * 100 + b"]" * 100 + b"}", -32600),
    ],
)
async def test_what_is_no_request_gets_the_code_for_it(body: Any, code: int) -> None:
    async with speaking(echo) as (_, speaker):
        answer = await rpc(speaker.client, body)
        assert answer["error"]["code"] == code
        assert answer["id"] == (1 if code in (-32601, -32602) or (isinstance(body, dict) and body["id"] == 1) else None)
        assert all("@type" in each for each in answer["error"]["data"])


async def test_a_body_that_is_something_else_is_told_so() -> None:
    async with speaking(echo) as (_, speaker):
        for kind, code in (("text/plain", -32005), ("application/json", -32700), ("application/a2a+json", -32700)):
            headers = {**VERSION, "Content-Type": kind}
            assert (await rpc(speaker.client, b"{'a': 1}", **headers))["error"]["code"] == code
            body = {"jsonrpc": "2.0", "id": 1, "method": "ListTasks"}
            assert "result" in await rpc(speaker.client, body, **headers)  # JSON is read, whatever it is called
        answer = await speaker.client.post(
            "/a2a/a/message:send", content=b"x", headers={**VERSION, "Content-Type": "a/b"}
        )
        assert answer.json()["error"]["details"][0]["reason"] == "CONTENT_TYPE_NOT_SUPPORTED"


@pytest.mark.parametrize("request_id", [1, "one", 0, "", None, 2.5])
async def test_an_answer_has_the_id_of_its_request(request_id: Any) -> None:
    async with speaking(echo) as (_, speaker):
        body = {"jsonrpc": "2.0", "id": request_id, "method": "ListTasks", "params": None}
        assert (await rpc(speaker.client, body))["id"] == request_id


async def test_the_address_may_end_with_a_slash() -> None:
    async with speaking(echo) as (_, speaker):
        for url in ("/a2a/a", "/a2a/a/"):
            answer = await rpc(speaker.client, {"jsonrpc": "2.0", "id": 1, "method": "ListTasks"}, url)
            assert answer["result"]["tasks"] == []
        assert (await speaker.client.post("/a2a/nobody", content=b"{}")).status_code == 404


async def test_a_method_of_1_0_needs_its_version() -> None:
    async with speaking(echo) as (_, speaker):
        body = {"jsonrpc": "2.0", "id": 1, "method": "ListTasks"}
        for version in ("", "0.3", "9.9"):
            answer = await rpc(speaker.client, body, **{"A2A-Version": version})
            assert answer["error"]["code"] == -32009
        for version in ("1.0", "1.0.7"):
            assert "result" in await rpc(speaker.client, body, **{"A2A-Version": version})
        assert "result" in await rpc(speaker.client, body, "/a2a/a?A2A-Version=1.0", X="y")


async def test_a_method_of_0_3_is_answered_in_0_3() -> None:
    async with speaking(echo) as (_, speaker):
        body = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": LEGACY}}
        task = (await rpc(speaker.client, body, X="y"))["result"]
        assert (task["kind"], task["status"]["state"]) == ("task", "completed")
        assert task["artifacts"][0]["parts"] == [{"kind": "text", "text": "hi"}]
        assert task["history"][0]["role"] == "user"
        get = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"id": task["id"]}}
        assert (await rpc(speaker.client, get, X="y"))["result"] == task
        cancel = {"jsonrpc": "2.0", "id": 1, "method": "tasks/cancel", "params": {"id": task["id"]}}
        assert (await rpc(speaker.client, cancel, X="y"))["error"]["code"] == -32002
        refused = await rpc(speaker.client, body | {"params": {"message": {}}}, X="y")
        assert refused["error"]["code"] == -32602


@pytest.mark.parametrize("method", ["SendMessage", "message/send"])
@pytest.mark.parametrize(
    ("part", "code"),
    [
        (b'{"kind":"text","text":"\\ud800"}', -32700),
        (b'{"kind":"data","data":{"a":1e999}}', -32602),
        (b'{"kind":"file","file":{"bytes":"?"},"raw":"?"}', -32602),
    ],
)
async def test_what_no_json_can_hold_is_refused(method: str, part: bytes, code: int) -> None:
    async with speaking(echo) as (_, speaker):
        message = b'{"messageId":"m","role":"%b","parts":[%b]}' % (b"user" if "/" in method else b"ROLE_USER", part)
        body = b'{"jsonrpc":"2.0","id":1,"method":"%b","params":{"message":%b}}' % (method.encode(), message)
        assert (await rpc(speaker.client, body))["error"]["code"] == code


async def test_a_stream_of_0_3_says_which_event_is_its_last() -> None:
    async with speaking(echo) as (_, speaker):
        body = {"jsonrpc": "2.0", "id": 1, "method": "message/stream", "params": {"message": LEGACY}}
        answer = await speaker.client.post("/a2a/a", json=body)
        events = [json.loads(line[6:])["result"] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events[0]["kind"] == "task"
        assert [each.get("final", False) for each in events].count(True) == 1
        assert (events[-1]["kind"], events[-1]["final"]) == ("status-update", True)


async def test_where_0_3_is_not_spoken_its_methods_are_unknown() -> None:
    async with speaking(echo, legacy=False) as (_, speaker):
        body = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": LEGACY}}
        assert (await rpc(speaker.client, body))["error"]["code"] == -32601
        assert (await rpc(speaker.client, body, X="y"))["error"]["code"] == -32009


async def test_extensions_that_are_in_use_are_said() -> None:
    async with speaking(echo) as (_, speaker):
        ours = "urn:hector-trio:a2a:resume:v1"
        headers = {**VERSION, "A2A-Extensions": f"urn:x, {ours}"}
        body = {"jsonrpc": "2.0", "id": 1, "method": "ListTasks"}
        answer = await speaker.client.post("/a2a/a", json=body, headers=headers)
        assert answer.headers["a2a-extensions"] == ours
        body |= {"method": "tasks/get", "params": {"id": "x"}}
        send = body | {"method": "message/send", "params": {"message": LEGACY}}
        old = await speaker.client.post("/a2a/a", json=send, headers={"X-A2A-Extensions": ours})
        assert old.headers["x-a2a-extensions"] == ours


async def test_a_bug_is_an_internal_error_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    async with speaking(echo) as (served, speaker):
        monkeypatch.setattr(served.engine.store, "recent_tasks", broken)
        answer = await rpc(speaker.client, {"jsonrpc": "2.0", "id": 1, "method": "ListTasks"})
        assert answer["error"]["code"] == -32603
        assert "secret" not in json.dumps(answer)


async def test_a_log_that_cannot_be_read_on_ends_the_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def works(ctx: Context) -> None:
        await ctx.emit_text("x")
        await ctx.emit_text("y")

    async with speaking(works) as (served, speaker):
        task = await speaker.send()

        async def gone(*_: Any) -> Any:
            raise StoreUnavailable("No disk")

        monkeypatch.setattr(served.engine.store, "read_log", gone)
        body = {"jsonrpc": "2.0", "id": 1, "method": "SubscribeToTask", "params": {"id": task["id"]}}
        answer = await speaker.client.post("/a2a/a", json=body, headers={**VERSION, "Last-Event-ID": "1"})
        assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == -32097


async def test_every_operation_has_a_method() -> None:
    async with speaking(echo) as (_, speaker):
        assert isinstance(speaker, Speaker)
        params = {"id": "x", "taskId": "x", "url": "https://x", **message_of()}
        for method in (
            "CreateTaskPushNotificationConfig",
            "GetTaskPushNotificationConfig",
            "ListTaskPushNotificationConfigs",
            "DeleteTaskPushNotificationConfig",
        ):
            answer = await rpc(speaker.client, {"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
            assert answer["error"]["code"] in (-32001, -32003)
