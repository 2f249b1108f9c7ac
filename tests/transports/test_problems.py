"""Errors as RFC 9457 problem details."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from hector_trio import errors
from hector_trio.errors import FieldError, HectorError, InvalidRequest, RateLimited, SessionBusy, Unauthorized
from hector_trio.transports.problems import STATUS, body_of, headers_of, problem, refused, status_of


def tree(error: type[HectorError] = HectorError) -> Iterator[type[HectorError]]:
    yield error
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize("error", list(tree()), ids=lambda each: each.__name__)
def test_every_error_has_a_status(error: type[HectorError]) -> None:
    assert error.code in STATUS


def test_no_status_stands_for_a_code_that_does_not_exist() -> None:
    assert set(STATUS) == {error.code for error in tree()}


@pytest.mark.parametrize("error", list(tree(errors.CallerError)), ids=lambda each: each.__name__)
def test_the_callers_fault_is_a_4xx(error: type[HectorError]) -> None:
    # ``CallerError`` itself is only a branch of the tree.
    assert error is errors.CallerError or 400 <= STATUS[error.code] < 500


def test_a_problem_has_the_members_of_the_standard_and_ours() -> None:
    error = InvalidRequest("input: is required", errors=(FieldError("/input", "is required"),))
    assert json.loads(body_of(error, instance="/agents/a/tasks", request_id="r1")) == {
        "type": "urn:hector:problem:invalid_request",
        "title": "Invalid request",
        "status": 400,
        "detail": "input: is required",
        "instance": "/agents/a/tasks",
        "code": "invalid_request",
        "retryable": False,
        "requestId": "r1",
        "errors": [{"pointer": "/input", "message": "is required"}],
    }


def test_a_refusing_chunk_says_what_is_wrong_once() -> None:
    error = InvalidRequest("input: is required", errors=(FieldError("/input", "is required"),))
    chunk = refused("t1", error)
    assert (chunk.task_id, chunk.seq, chunk.final, chunk.code) == ("t1", 0, True, "invalid_request")
    assert chunk.content == "input: is required"


def test_a_problem_names_the_task_it_speaks_of() -> None:
    assert problem(SessionBusy("busy", task_id="t1"), instance="/", request_id="r").task_id == "t1"


def test_429_and_503_say_when_to_come_back() -> None:
    assert headers_of(RateLimited("slow down"))["Retry-After"] == "1"
    assert headers_of(RateLimited("slow down", retry_after=7))["Retry-After"] == "7"
    for error in tree():
        instance = error.__new__(error)
        HectorError.__init__(instance, "x")
        assert (status_of(instance) in (429, 503)) == ("Retry-After" in headers_of(instance))


def test_401_says_how_to_authenticate() -> None:
    assert headers_of(Unauthorized("no"))["WWW-Authenticate"].startswith("Bearer")
