"""The tables of A2A's errors: total, as the specification has them (5.4), and what they look like."""

from __future__ import annotations

from typing import TypeVar

import pytest

from hector_trio.a2a import errors
from hector_trio.errors import FieldError, HectorError, InvalidRequest, RateLimited, RunError, TaskNotFound

T = TypeVar("T")


def tree(kind: type[T]) -> set[type[T]]:
    found = {kind}
    for each in kind.__subclasses__():
        found |= tree(each)
    return found


def test_every_error_has_its_codes() -> None:
    kinds = tree(errors.A2AError) - {errors.A2AError, errors.GeneralError}
    assert set(errors.CODES) == kinds
    assert len({codes.jsonrpc for codes in errors.CODES.values()}) == len(kinds)
    assert len({kind.reason for kind in kinds}) == len(kinds)


def test_every_error_of_ours_is_one_of_theirs() -> None:
    ours = (each for each in tree(HectorError) if each.__module__ == "hector_trio.errors")  # clients have more
    codes = {each.code for each in ours if not issubclass(each, RunError)}
    assert codes <= set(errors.OURS)


@pytest.mark.parametrize(
    ("kind", "jsonrpc", "http", "grpc", "reason"),
    [
        (errors.TaskNotFoundError, -32001, 404, "NOT_FOUND", "TASK_NOT_FOUND"),
        (errors.TaskNotCancelableError, -32002, 400, "FAILED_PRECONDITION", "TASK_NOT_CANCELABLE"),
        (
            errors.PushNotificationNotSupportedError,
            -32003,
            400,
            "FAILED_PRECONDITION",
            "PUSH_NOTIFICATION_NOT_SUPPORTED",
        ),
        (errors.UnsupportedOperationError, -32004, 400, "FAILED_PRECONDITION", "UNSUPPORTED_OPERATION"),
        (errors.ContentTypeNotSupportedError, -32005, 400, "INVALID_ARGUMENT", "CONTENT_TYPE_NOT_SUPPORTED"),
        (errors.InvalidAgentResponseError, -32006, 500, "INTERNAL", "INVALID_AGENT_RESPONSE"),
        (
            errors.ExtendedAgentCardNotConfiguredError,
            -32007,
            400,
            "FAILED_PRECONDITION",
            "EXTENDED_AGENT_CARD_NOT_CONFIGURED",
        ),
        (errors.ExtensionSupportRequiredError, -32008, 400, "FAILED_PRECONDITION", "EXTENSION_SUPPORT_REQUIRED"),
        (errors.VersionNotSupportedError, -32009, 400, "FAILED_PRECONDITION", "VERSION_NOT_SUPPORTED"),
    ],
)
def test_the_codes_are_those_of_the_specification(
    kind: type[errors.A2AError], jsonrpc: int, http: int, grpc: str, reason: str
) -> None:
    error = kind("said", metadata={"taskId": "t"})
    assert errors.CODES[kind] == (jsonrpc, http, grpc)
    info = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": "a2a-protocol.org",
        "metadata": {"taskId": "t"},
    }
    assert errors.jsonrpc_error(error) == {"code": jsonrpc, "message": "said", "data": [info]}
    assert errors.http_body(error) == {"error": {"code": http, "status": grpc, "message": "said", "details": [info]}}


def test_what_is_wrong_in_a_request_is_told_field_by_field() -> None:
    ours = InvalidRequest("pageToken: x", errors=(FieldError("/a/b", "x"),))
    assert errors.details(errors.of(ours))[1] == {
        "@type": "type.googleapis.com/google.rpc.BadRequest",
        "fieldViolations": [{"field": "a.b", "description": "x"}],
    }


def test_our_errors_keep_what_helps() -> None:
    limited = errors.of(RateLimited("slow down", retry_after=3))
    assert errors.codes_of(limited).http == 429
    assert errors.details(limited)[-1]["retryDelay"] == "3s"
    gone = errors.of(TaskNotFound("no", task_id="t"))
    assert isinstance(gone, errors.TaskNotFoundError)
    assert gone.metadata["taskId"] == "t"
