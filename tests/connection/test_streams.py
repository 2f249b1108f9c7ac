"""What an application that fails leaves to its client and its log."""

import logging
from typing import Any

import pytest
import trio

from tests.connection.applications import problem_of
from tests.hostile import accept, asgi, get, running, upgrade


async def test_an_error_in_a_websocket_is_logged_whole_and_closes_it_with_1011(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        raise ExceptionGroup("two", [ValueError("first"), KeyError("second")])

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.close_code() == 1011
    assert "ValueError: first" in caplog.text
    assert "KeyError: 'second'" in caplog.text
    assert {record.name for record in caplog.records if record.levelno >= logging.ERROR} == {"hector_trio"}


async def test_an_error_before_any_answer_is_a_500() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    async with running(asgi(http=fail, websocket=fail)) as server:
        for data in (get(), upgrade()):
            async with server.peer(data) as peer:
                with trio.fail_after(5):
                    assert problem_of(await peer.rest())["code"] == "internal_error"


async def test_an_error_in_the_middle_of_a_response_cuts_it_visibly() -> None:
    async def http(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("no")

    async with running(asgi(http=http)) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            answer = await peer.rest()
    assert answer.endswith(b"half\r\n")
    assert b"\r\n0\r\n" not in answer
