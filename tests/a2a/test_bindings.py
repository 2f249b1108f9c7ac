"""What goes over the wire to another agent, and what its refusals mean."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hector_trio.a2a import errors
from hector_trio.a2a.bindings import Binding, Outgoing
from hector_trio.a2a.cards import RESUME
from hector_trio.a2a.dialects import Garbage
from hector_trio.a2a.peers import Interface, binding_for
from hector_trio.a2a.types import Message, Part, SendMessageConfiguration, SendMessageRequest

REQUEST = SendMessageRequest(
    Message("m", "ROLE_USER", [Part(text="hi")], context_id="C"), SendMessageConfiguration(return_immediately=True)
)


def binding(kind: str, version: str, tenant: str | None = None, url: str = "http://x/y") -> Binding:
    return binding_for(Interface(url, kind, version, tenant))


def body(outgoing: Outgoing) -> Any:
    assert outgoing.content is not None
    return json.loads(outgoing.content)


def test_a_message_over_json_rpc() -> None:
    sent = binding("JSONRPC", "1.0", "t").send(REQUEST, stream=True)
    assert (sent.method, sent.url, sent.media_type) == ("POST", "http://x/y", "application/json")
    assert body(sent) == {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "SendStreamingMessage",
        "params": {
            "message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}], "contextId": "C"},
            "configuration": {"returnImmediately": True},
            "tenant": "t",
        },
    }


def test_a_message_over_http() -> None:
    sent = binding("HTTP+JSON", "1.0", "t/u", "http://x/y/").send(REQUEST, stream=False)
    assert (sent.url, sent.media_type) == ("http://x/y/t%2Fu/message:send", "application/a2a+json")
    assert "tenant" not in body(sent)


def test_a_message_in_0_3() -> None:
    rpc = body(binding("JSONRPC", "0.3").send(REQUEST, stream=False))
    assert rpc["method"] == "message/send"
    assert rpc["params"] == {
        "message": {
            "kind": "message",
            "messageId": "m",
            "role": "user",
            "parts": [{"kind": "text", "text": "hi"}],
            "contextId": "C",
        },
        "configuration": {"blocking": False},
    }
    sent = binding("HTTP+JSON", "0.3").send(REQUEST, stream=True)
    assert (sent.url, sent.media_type) == ("http://x/y/v1/message:stream", "application/json")
    assert body(sent)["message"] == {
        "messageId": "m",
        "role": "ROLE_USER",
        "content": [{"text": "hi"}],
        "contextId": "C",
    }
    assert binding("HTTP+JSON", "0.3", url="http://x/v1").send(REQUEST, stream=True).url == "http://x/v1/message:stream"


@pytest.mark.parametrize(
    ("kind", "version", "name", "method", "place"),
    [
        ("HTTP+JSON", "1.0", "get", "GET", "/tasks/a%2Fb"),
        ("HTTP+JSON", "1.0", "cancel", "POST", "/tasks/a%2Fb:cancel"),
        ("HTTP+JSON", "1.0", "subscribe", "POST", "/tasks/a%2Fb:subscribe"),
        ("HTTP+JSON", "0.3", "get", "GET", "/v1/tasks/a%2Fb"),
        ("HTTP+JSON", "0.3", "cancel", "POST", "/v1/tasks/a%2Fb:cancel"),
        ("HTTP+JSON", "0.3", "subscribe", "GET", "/v1/tasks/a%2Fb:subscribe"),
    ],
)
def test_operations_on_a_task_over_http(kind: str, version: str, name: Any, method: str, place: str) -> None:
    sent = binding(kind, version).about(name, "a/b")
    assert (sent.method, sent.url) == (method, f"http://x/y{place}")


@pytest.mark.parametrize(
    ("version", "name", "method"),
    [
        ("1.0", "get", "GetTask"),
        ("1.0", "cancel", "CancelTask"),
        ("1.0", "subscribe", "SubscribeToTask"),
        ("0.3", "get", "tasks/get"),
        ("0.3", "cancel", "tasks/cancel"),
        ("0.3", "subscribe", "tasks/resubscribe"),
    ],
)
def test_operations_on_a_task_over_json_rpc(version: str, name: Any, method: str) -> None:
    sent = body(binding("JSONRPC", version, "t").about(name, "T", {RESUME: {"after": "7"}}))
    assert (sent["method"], sent["params"]) == (
        method,
        {"id": "T", "tenant": "t", "metadata": {RESUME: {"after": "7"}}},
    )


def test_what_a_refusal_over_json_rpc_means() -> None:
    rpc = binding("JSONRPC", "1.0")

    def refused(code: int, data: Any = None) -> errors.A2AError:
        with pytest.raises(errors.A2AError) as caught:
            rpc.task(json.dumps({"error": {"code": code, "message": "why", "data": data}}).encode())
        return caught.value

    for kind, codes in errors.CODES.items():
        assert type(refused(codes.jsonrpc)) is kind
    assert refused(-32001).message == "why"
    assert type(refused(-7)) is errors.InternalError
    named = [{"@type": errors.ERROR_INFO, "reason": "VERSION_NOT_SUPPORTED"}]
    assert type(refused(-32603, named)) is errors.VersionNotSupportedError


def test_json_rpc_may_be_refused_in_the_shape_of_http() -> None:
    said = json.dumps(errors.http_body(errors.UnauthenticatedError("who?"))).encode()
    refusal = binding("JSONRPC", "1.0").refusal(401, said)
    assert (type(refusal), refusal.message) == (errors.UnauthenticatedError, "who?")
    said = json.dumps({"error": errors.jsonrpc_error(errors.TaskNotFoundError("where?"))}).encode()
    assert type(binding("JSONRPC", "1.0").refusal(400, said)) is errors.TaskNotFoundError


def test_what_a_refusal_over_http_means() -> None:
    http = binding("HTTP+JSON", "1.0")
    for kind in errors.CODES:
        said = json.dumps(errors.http_body(kind("why"))).encode()
        refusal = http.refusal(errors.CODES[kind].http, said)
        assert (type(refusal), refusal.message) == (kind, "why")
    for status, kind in (
        (401, errors.UnauthenticatedError),
        (404, errors.NotFoundError),
        (502, errors.UnavailableError),
    ):
        assert type(http.refusal(status, b"<html>")) is kind
        assert type(binding("JSONRPC", "1.0").refusal(status, b"<html>")) is kind
    assert type(http.refusal(418, b"[]")) is errors.InvalidParamsError
    assert type(http.refusal(500, b'{"error":7}')) is errors.InternalError
    old = binding("HTTP+JSON", "0.3").refusal(404, b'{"code":-32001,"message":"Task not found"}')
    assert (type(old), old.message) == (errors.TaskNotFoundError, "Task not found")
    with pytest.raises(errors.UnavailableError):
        http.event("error", json.dumps(errors.http_body(errors.UnavailableError("later"))).encode())


@pytest.mark.parametrize("data", [b"", b"7", b"{}", b'{"result":', b'{"error":7}', b"\xff"])
def test_what_is_no_json_rpc_is_garbage(data: bytes) -> None:
    with pytest.raises(Garbage):
        binding("JSONRPC", "1.0").task(data)
