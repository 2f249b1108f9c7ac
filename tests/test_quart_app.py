"""What HectorQuart adds to Quart-Trio: nurseries that end with their client, errors that are told, bounded reading."""

import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from quart import Response, abort, request, url_for, websocket
from werkzeug.routing import BuildError

from hector_trio.connection import ConnectionLimits
from hector_trio.transports.quart_app import CLOSE_CODE, LEFT_AT, NURSERY, EventStreamResponse, HectorQuart
from tests.hostile import client_close, client_frame, get, post, running, upgrade


class Marks:
    """What became of a handler."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()

    async def wait_for_cancel(self) -> None:
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


def errors(caplog: pytest.LogCaptureFixture) -> set[str]:
    return {record.name for record in caplog.records if record.levelno >= logging.ERROR}


# ---- errors


async def test_a_group_raised_by_a_websocket_handler_is_logged_whole_and_closes_with_1011(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = HectorQuart(__name__)

    @app.websocket("/ws")
    async def handler() -> None:
        await websocket.accept()
        async with trio.open_nursery() as nursery:

            async def fail(error: Exception) -> None:
                raise error

            nursery.start_soon(fail, ValueError("one"))
            nursery.start_soon(fail, KeyError("two"))

    async with running(app) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.close_code() == 1011
    assert "ValueError: one" in caplog.text
    assert "KeyError: 'two'" in caplog.text
    assert errors(caplog) == {"hector_trio"}


async def test_an_error_before_the_acceptance_of_a_websocket_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    app = HectorQuart(__name__)

    @app.websocket("/ws")
    async def handler() -> None:
        raise ValueError("early")

    async with running(app) as server, server.peer(upgrade()) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 500
    assert "ValueError: early" in caplog.text


async def test_a_handler_may_refuse_before_the_acceptance_with_any_status() -> None:
    app = HectorQuart(__name__)

    @app.websocket("/ws")
    async def handler() -> None:
        abort(Response("not you", 401))

    async with running(app) as server:
        for path, status in ((b"/ws", 401), (b"/nowhere", 404)):
            async with server.peer(upgrade(path)) as peer:
                with trio.fail_after(5):
                    assert await peer.status() == status


async def test_the_close_code_after_the_acceptance_says_whose_fault_it_was() -> None:
    app = HectorQuart(__name__)

    @app.websocket("/<int:status>")
    async def handler(status: int) -> None:
        await websocket.accept()
        if status:
            abort(status)

    async with running(app) as server:
        for path, code in ((b"/0", 1000), (b"/403", 1008), (b"/503", 1011)):
            async with server.websocket(path) as peer:
                with trio.fail_after(5):
                    assert await peer.close_code() == code


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in a group with the cancel"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_an_error_raised_while_being_cancelled_is_logged(
    caplog: pytest.LogCaptureFixture, kind: str, grouped: bool
) -> None:
    app = HectorQuart(__name__)
    started, ended = trio.Event(), trio.Event()

    async def fail_at_the_end() -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
            raise ValueError("in the clean-up")

    async def work() -> None:
        if grouped:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_at_the_end)
                nursery.start_soon(trio.sleep_forever)
        else:
            await fail_at_the_end()

    @app.get("/")
    async def http_handler() -> str:
        await work()
        return ""

    @app.websocket("/")
    async def websocket_handler() -> None:
        await websocket.accept()
        await work()

    async with running(app) as server:
        async with server.peer(get() if kind == "http" else upgrade(b"/")):
            with trio.fail_after(5):
                await started.wait()
        with trio.fail_after(5):
            await ended.wait()
        await server.until_open(0)
    assert "ValueError: in the clean-up" in caplog.text
    assert errors(caplog) == {"hector_trio"}


async def test_a_failing_request_is_a_500_and_its_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = HectorQuart(__name__)

    @app.get("/")
    async def handler() -> str:
        raise ExceptionGroup("both", [ValueError("one"), KeyError("two")])

    async with running(app) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 500
    assert "ValueError: one" in caplog.text
    assert "KeyError: 'two'" in caplog.text


async def test_a_failing_background_task_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    app = HectorQuart(__name__)
    ran = trio.Event()

    async def fail() -> None:
        raise ValueError("in the background")

    async def succeed() -> None:
        ran.set()

    @app.get("/<name>")
    async def handler(name: str) -> str:
        app.add_background_task(fail if name == "fail" else succeed)
        return ""

    async with running(app) as server:
        for path in (b"/fail", b"/succeed"):
            async with server.peer(get(path)) as peer:
                with trio.fail_after(5):
                    assert await peer.status() == 200
        with trio.fail_after(5):
            await ran.wait()
    assert "ValueError: in the background" in caplog.text


# ---- reading


@pytest.mark.parametrize("number", [0, 1, 1000], ids=str)
async def test_a_handler_that_never_receives_is_cancelled_when_its_client_leaves(number: int) -> None:
    app = HectorQuart(__name__)
    marks = Marks()

    @app.websocket("/ws")
    async def handler() -> None:
        await websocket.accept()
        await marks.wait_for_cancel()

    async with running(app) as server:
        async with server.websocket() as peer:
            with trio.fail_after(5):
                await marks.started.wait()
                await peer.send(client_frame(0x81, b"unread") * number)
        with trio.fail_after(5):
            await marks.cancelled.wait()


@pytest.mark.parametrize(("number", "size"), [(10_000, 1), (200, 30_000)], ids=["many", "large"])
async def test_too_much_unread_closes_with_1008_and_cancels_the_handler(number: int, size: int) -> None:
    app = HectorQuart(__name__)
    marks = Marks()

    @app.websocket("/ws")
    async def handler() -> None:
        await websocket.accept()
        await marks.wait_for_cancel()

    async with running(app, ConnectionLimits(linger_timeout=0.3)) as server, server.websocket() as peer:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:

                async def flood() -> None:
                    for _ in range(number // 100):
                        await peer.send(client_frame(0x81, b"m" * size) * 100)

                nursery.start_soon(flood)
                assert await peer.close_code() == 1008
                await marks.cancelled.wait()
                nursery.cancel_scope.cancel()


async def test_a_handler_gets_text_and_bytes_also_when_empty() -> None:
    app = HectorQuart(__name__)
    got: list[Any] = []

    @app.websocket("/ws")
    async def handler() -> None:
        for _ in range(4):
            got.append(await websocket.receive())
        await websocket.send("done")

    async with running(app) as server, server.websocket() as peer:
        with trio.fail_after(5):
            for data in (client_frame(0x82), client_frame(0x81), client_frame(0x82, b"b"), client_frame(0x81, b"t")):
                await peer.send(data)
            assert await peer.frame() == (0x81, b"done")
    assert got == [b"", "", b"b", "t"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_when_a_client_left_stands_in_the_scope(kind: str) -> None:
    app = HectorQuart(__name__)
    marks = Marks()
    left: list[float] = []

    async def wait(scope: Any) -> None:
        try:
            await marks.wait_for_cancel()
        finally:
            left.append(scope[LEFT_AT])

    @app.get("/")
    async def http_handler() -> str:
        await wait(request.scope)
        return ""

    @app.websocket("/ws")
    async def websocket_handler() -> None:
        await websocket.accept()
        await wait(websocket.scope)

    async with running(app) as server, server.peer(get() if kind == "http" else upgrade()) as peer:
        with trio.fail_after(5):
            await marks.started.wait()
            before = trio.current_time()
            peer.reset()
            await marks.cancelled.wait()
            await trio.testing.wait_all_tasks_blocked()
    assert len(left) == 1
    assert before <= left[0] <= trio.current_time()


async def test_a_client_that_was_answered_has_not_left() -> None:
    scopes: list[Any] = []

    async def handler() -> str:
        scopes.append(request.scope)
        return "here"

    app = HectorQuart(__name__)
    app.get("/")(handler)
    async with running(app) as server, server.peer(get() + get(b"/", b"connection: close")) as peer:
        with trio.fail_after(5):
            assert (await peer.rest()).count(b"here") == 2
    assert [LEFT_AT in scope for scope in scopes] == [False, False]


async def test_the_close_code_of_the_client_stands_in_the_scope() -> None:
    app = HectorQuart(__name__)
    codes: list[int] = []
    ended = trio.Event()

    @app.websocket("/ws")
    async def handler() -> None:
        scope: Any = websocket.scope
        await websocket.accept()
        try:
            await trio.sleep_forever()
        finally:
            codes.append(scope[CLOSE_CODE])
            ended.set()

    async with running(app) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_close(4001))
            await ended.wait()
    assert codes == [4001]


async def test_a_body_that_is_iterated_over_does_not_run_ahead_of_its_handler() -> None:
    app = HectorQuart(__name__)
    app.config["MAX_CONTENT_LENGTH"] = None
    go = trio.Event()
    size = 32 << 20

    @app.post("/")
    async def handler() -> str:
        total = 0
        async for piece in request.body:
            total += len(piece)
            await go.wait()
        return str(total)

    async with running(app) as server, server.peer(post(b"", b"connection: close", announced=size)) as peer:
        sent = 0
        with trio.move_on_after(0.5):
            while sent < size:
                sent += await peer.socket.send(b"z" * min(65536, size - sent))
        assert sent < size / 2
        go.set()
        with trio.fail_after(20):
            while sent < size:
                sent += await peer.socket.send(b"z" * min(65536, size - sent))
            assert (await peer.rest()).endswith(str(size).encode())


async def test_a_body_beyond_the_limit_is_413() -> None:
    app = HectorQuart(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 1000

    @app.post("/")
    async def handler() -> str:
        return str(len(await request.get_data()))

    async with running(app) as server:
        chunked = get(b"/", b"transfer-encoding: chunked", method=b"POST") + b"800\r\n" + b"a" * 2048 + b"\r\n0\r\n\r\n"
        for data in (post(b"a" * 1001), chunked):
            async with server.peer(data) as peer:
                with trio.fail_after(5):
                    assert await peer.status() == 413


# ---- rules


async def test_urls_can_be_built_although_no_rule_is_compiled_for_it_before() -> None:
    app = HectorQuart(__name__)
    app.add_url_rule("/<rule>/<int:number>", "one", lambda **_: "")
    async with app.test_request_context("/"):
        for name in ("a b", "c"):
            path = name.replace(" ", "%20")
            assert url_for("one", rule=name, number=2, more="d") == f"/{path}/2?more=d"
        with pytest.raises(BuildError):
            url_for("one", rule="a")
    bound = app.url_map.bind("here")
    assert bound.build("one", {"rule": "x", "number": 1, "more": 1}, append_unknown=False) == "/x/1"
    assert bound.match("/y/3") == ("one", {"rule": "y", "number": 3})


# ---- nurseries


async def test_a_task_in_the_nursery_of_a_request_dies_with_its_client() -> None:
    app = HectorQuart(__name__)
    marks = Marks()

    @app.get("/")
    async def handler() -> str:
        scope: Any = request.scope
        scope[NURSERY].start_soon(marks.wait_for_cancel)
        await trio.sleep_forever()
        return ""

    async with running(app) as server:
        async with server.peer(get()):
            with trio.fail_after(5):
                await marks.started.wait()
        with trio.fail_after(5):
            await marks.cancelled.wait()


async def test_a_task_in_the_nursery_of_a_request_ends_with_its_response() -> None:
    app = HectorQuart(__name__)
    marks = Marks()

    @app.get("/")
    async def handler() -> str:
        scope: Any = request.scope
        scope[NURSERY].start_soon(marks.wait_for_cancel)
        await marks.started.wait()
        return "answer"

    async with running(app) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            assert (await peer.until(b"answer")).startswith(b"HTTP/1.1 200")
            await marks.cancelled.wait()


async def test_a_failing_task_in_the_nursery_of_a_request_fails_that_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = HectorQuart(__name__)

    async def fail() -> None:
        raise ValueError("beside the handler")

    @app.get("/")
    async def handler() -> str:
        scope: Any = request.scope
        scope[NURSERY].start_soon(fail)
        await trio.sleep_forever()
        return ""

    @app.websocket("/ws")
    async def socket() -> None:
        await websocket.accept()
        scope: Any = websocket.scope
        scope[NURSERY].start_soon(fail)
        await trio.sleep_forever()

    async with running(app) as server:
        with trio.fail_after(5):
            async with server.peer(get()) as peer:
                assert await peer.status() == 500
            async with server.websocket() as peer:
                assert await peer.close_code() == 1011
    assert caplog.text.count("ValueError: beside the handler") == 2


# ---- streams


class Ticks:
    """An asynchronous iterator that is no generator, and knows whether it was closed."""

    def __init__(self, count: int | None) -> None:
        self.left = count
        self.closed = trio.Event()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.left == 0:
            raise StopAsyncIteration
        if self.left is None:
            await trio.sleep_forever()
        else:
            self.left -= 1
        await trio.lowlevel.checkpoint()
        return b"data: tick\n\n"

    async def aclose(self) -> None:
        self.closed.set()
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("explicit", [True, False], ids=["EventStreamResponse", "returned"])
async def test_any_asynchronous_iterator_is_a_body(explicit: bool) -> None:
    app = HectorQuart(__name__)
    ticks = Ticks(3)

    @app.get("/")
    async def handler() -> Any:
        return EventStreamResponse(ticks) if explicit else app.response_class(ticks)

    async with running(app) as server, server.peer(get(b"/", b"connection: close")) as peer:
        with trio.fail_after(5):
            answer = await peer.rest()
    assert answer.count(b"data: tick\n\n") == 3
    assert answer.endswith(b"0\r\n\r\n")
    assert ticks.closed.is_set()
    if explicit:
        assert b"content-type: text/event-stream" in answer
        assert b"cache-control: no-store" in answer


async def test_the_head_of_an_event_stream_leaves_at_once_and_the_body_is_closed_when_the_client_leaves() -> None:
    app = HectorQuart(__name__)
    ticks = Ticks(None)

    @app.get("/")
    async def handler() -> Any:
        return EventStreamResponse(ticks)

    async with running(app) as server:
        async with server.peer(get()) as peer:
            with trio.fail_after(5):
                assert await peer.status() == 200
        with trio.fail_after(5):
            await ticks.closed.wait()


async def test_no_timeout_cuts_a_stream() -> None:
    app = HectorQuart(__name__)
    assert app.config["RESPONSE_TIMEOUT"] is None
    async with app.app_context():
        assert EventStreamResponse(Ticks(0)).timeout is None


# ---- writing


async def test_a_handler_that_only_sends_is_cancelled_when_its_client_leaves() -> None:
    app = HectorQuart(__name__)
    ended = trio.Event()

    @app.websocket("/ws")
    async def handler() -> None:
        try:
            while True:
                await websocket.send("chunk")
        finally:
            ended.set()

    async with running(app) as server:
        async with server.websocket() as peer:
            with trio.fail_after(5):
                assert await peer.frame() == (0x81, b"chunk")
        with trio.fail_after(5):
            await ended.wait()


async def test_send_many_sends_all_in_order_and_ordinary_sends_keep_their_place() -> None:
    app = HectorQuart(__name__)
    pieces = [os.urandom(50_000).hex().encode() for _ in range(40)]

    @app.websocket("/ws")
    async def handler() -> None:
        await websocket.accept()
        scope: Any = websocket.scope
        send_many = scope["extensions"]["hector.send_many"]
        await websocket.send("before")
        await send_many(pieces)
        await websocket.send(b"after")
        await websocket.close(4002, "done")

    async with running(app) as server, server.websocket() as peer:
        with trio.fail_after(10):
            assert await peer.frame() == (0x81, b"before")
            for piece in pieces:
                assert await peer.frame() == (0x81, piece)
            assert await peer.frame() == (0x82, b"after")
            assert await peer.close_code() == 4002


async def test_closing_twice_and_sending_after_the_close_do_nothing() -> None:
    app = HectorQuart(__name__)
    ended = trio.Event()

    @app.websocket("/ws")
    async def handler() -> None:
        await websocket.accept()
        await websocket.close(4003)
        await websocket.close(4004)
        for _ in range(40):
            await websocket.send("late")
        ended.set()

    async with running(app) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert (await peer.frame())[0] == 0x88
            await ended.wait()
            await peer.send(client_close(4003))
            assert await peer.rest() == b""
