"""The OpenAI-compatible provider against a real server on loopback: answers, errors, retries, and above all cancels."""

from __future__ import annotations

import email.utils
import gzip
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.config import OpenAiLlm
from hector_trio.errors import ConfigError, ModelError
from hector_trio.providers import Delta, ModelRequest, ModelResult, Turn
from hector_trio.providers.openai import MAX_EVENT, OpenAiProvider, open_openai
from tests.fake_model import (
    USAGE,
    Behaviour,
    Exchange,
    FakeModel,
    chunk,
    cuts,
    hangs_up,
    refuses,
    says,
    sends,
    serve_fake_model,
    serve_silent_port,
    silent,
    stalls,
)

KEY = "sk-this-is-the-secret-key"
QUESTION = ModelRequest([Turn("system", "Be brief."), Turn("user", "Hello?")])
CLOSE_LIMIT = 0.25
"""Seconds a busy test machine may take until the server sees a close; the usual figure is one millisecond."""


def settings(base_url: str, **changes: Any) -> OpenAiLlm:
    return OpenAiLlm(**{"model": "m", "base_url": base_url, "api_key": KEY, **changes})


async def ask(provider: OpenAiProvider, request: ModelRequest = QUESTION) -> tuple[list[str], ModelResult]:
    texts: list[str] = []

    async def keep(delta: Delta) -> None:
        texts.append(delta.content)

    with trio.fail_after(5):
        result = await provider.stream(request, keep)
    return texts, result


async def failure(provider: OpenAiProvider, given: list[str] | None = None) -> ModelError:
    """The error that the question ends with; what was given out before it is put into ``given``."""

    async def keep(delta: Delta) -> None:
        if given is not None:
            given.append(delta.content)

    with trio.fail_after(5), pytest.raises(ModelError) as caught:
        await provider.stream(QUESTION, keep)
    assert KEY not in caught.value.detail
    assert len(caught.value.detail) < 500
    return caught.value


@pytest.fixture
async def fake(nursery: trio.Nursery) -> FakeModel:
    return await serve_fake_model(nursery)


@pytest.fixture
async def provider(fake: FakeModel) -> AsyncIterator[OpenAiProvider]:
    async with open_openai(settings(fake.base_url)) as opened:
        yield opened


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_every_piece_is_given_out_as_it_arrives(fake: FakeModel, provider: OpenAiProvider) -> None:
    gate = trio.Semaphore(0)
    fake.plan(says("Hel", "lo ", "world", gate=gate))
    arrived: list[str] = []
    moved = trio.Event()

    async def keep(delta: Delta) -> None:
        nonlocal moved
        assert delta.kind == "text"
        arrived.append(delta.content)
        moved.set()
        moved = trio.Event()

    results: list[ModelResult] = []

    async def run() -> None:
        results.append(await provider.stream(QUESTION, keep))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            for count in (1, 2, 3):
                gate.release()
                while len(arrived) < count:
                    await moved.wait()
                assert len(arrived) == count
    assert arrived == ["Hel", "lo ", "world"]
    assert results == [ModelResult("stop", USAGE)]


async def test_the_request_holds_turns_parameters_and_the_key(fake: FakeModel) -> None:
    configured = {"temperature": 0.1, "top_k": 5, "model": "other", "stream": False}
    request = ModelRequest([*QUESTION.turns, Turn("assistant", "Hi é")], {"temperature": 0.9, "stop": ["x"]})
    changed = settings(fake.base_url + "/", parameters=configured, headers={"X-Team": "blue"})
    async with open_openai(changed) as provider:
        await ask(provider, request)
    (exchange,) = fake.requests
    assert exchange.target == "/v1/chat/completions"
    assert exchange.headers["authorization"] == f"Bearer {KEY}"
    assert exchange.headers["x-team"] == "blue"
    assert exchange.headers["accept-encoding"] == "identity"
    assert exchange.body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hi é"},
        ],
        "temperature": 0.9,
        "top_k": 5,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_without_a_key_no_authorization_is_sent(fake: FakeModel) -> None:
    async with open_openai(settings(fake.base_url, api_key=None)) as provider:
        await ask(provider)
    assert "authorization" not in fake.requests[0].headers


async def test_the_query_of_the_base_url_is_kept(fake: FakeModel) -> None:
    async with open_openai(settings(fake.base_url + "?api-version=1")) as provider:
        await ask(provider)
        assert provider.name == f"openai m at {fake.base_url}"
    assert fake.requests[0].target == "/v1/chat/completions?api-version=1"


async def test_the_connection_is_used_again_after_done(fake: FakeModel, provider: OpenAiProvider) -> None:
    for _ in range(5):
        await ask(provider)
    assert {exchange.connection_number for exchange in fake.requests} == {1}


async def test_a_server_that_does_not_end_its_body_after_done_delays_nobody_for_long(
    fake: FakeModel, provider: OpenAiProvider
) -> None:
    async def done_without_end(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.token("hi")
        await exchange.raw(b"data: [DONE]\n\n")
        await trio.sleep_forever()

    fake.plan(done_without_end)
    with trio.fail_after(2):
        assert await ask(provider) == (["hi"], ModelResult("stop"))
        await fake.requests[0].closed.wait()


async def test_after_done_an_endless_body_is_left(fake: FakeModel, provider: OpenAiProvider) -> None:
    async def done_and_more(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.raw(b"data: [DONE]\n\n")
        while True:
            await exchange.raw(b": more\n" * 1000)

    fake.plan(done_and_more)
    with trio.fail_after(2):
        await ask(provider)
        await fake.requests[0].closed.wait()


async def test_a_finish_reason_is_enough_without_done(fake: FakeModel, provider: OpenAiProvider) -> None:
    pieces = [chunk({"content": "hi"}), chunk({}, "length")]
    fake.plan(sends(b"".join(b"data: %s\n\n" % json.dumps(piece).encode() for piece in pieces)))
    assert await ask(provider) == (["hi"], ModelResult("length"))


async def test_a_stream_cut_after_its_finish_reason_is_complete(fake: FakeModel, provider: OpenAiProvider) -> None:
    async def cut_late(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.event(chunk({"content": "hi"}, "stop"))
        exchange.cut()

    fake.plan(cut_late)
    assert await ask(provider) == (["hi"], ModelResult("stop"))


async def test_only_text_is_given_out(fake: FakeModel, provider: OpenAiProvider) -> None:
    def event(delta: dict[str, Any] | None, index: int = 0) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": None}
        return b"data: " + json.dumps({"choices": [choice], "unknown": 1}).encode() + b"\r\n\r\n"

    stream = (
        b": comment\n\n"
        + b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
        + event({"role": "assistant", "content": ""})
        + event({"reasoning_content": "hmm"})
        + event({"content": None})
        + event(None)
        + event({"content": "a"})
        + event({"content": "other answer"}, index=1)
        + event({"refusal": "b"})
        + b'event: x\ndata: {"choices":null,"usage":{"total_tokens":1}}\n\ndata: [DONE]\n\n'
    )
    fake.plan(sends(stream, "text/event-stream; charset=utf-8"))
    assert await ask(provider) == (["a", "b"], ModelResult("stop", {"total_tokens": 1}))


async def test_text_cut_anywhere_arrives_whole(fake: FakeModel, provider: OpenAiProvider) -> None:
    stream = b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9 \xf0\x9f\x98\x80"}}]}\r\n\r\ndata: [DONE]\r\n\r\n'

    async def in_bytes(exchange: Exchange) -> None:
        await exchange.start()
        for i in range(len(stream)):
            await exchange.raw(stream[i : i + 1])
        await exchange.end()

    fake.plan(in_bytes)
    assert (await ask(provider))[0] == ["café 😀"]


async def test_a_slow_taker_holds_the_stream_back_without_harm(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(says(*[f"{n} " for n in range(500)]))
    taken = 0

    async def take(delta: Delta) -> None:
        nonlocal taken
        await trio.lowlevel.checkpoint()
        taken += 1

    with trio.fail_after(5):
        await provider.stream(QUESTION, take)
    assert taken == 500


@pytest.mark.parametrize("status", [400, 422])
async def test_a_server_without_stream_options_is_asked_without(
    fake: FakeModel, provider: OpenAiProvider, status: int
) -> None:
    fake.plan(refuses(status, body=b'{"detail":[{"loc":["body","stream_options"],"msg":"Extra inputs"}]}'))
    assert await ask(provider) == (["You ", "said: ", "Hello? "], ModelResult("stop"))
    await ask(provider)
    assert ["stream_options" in exchange.body for exchange in fake.requests] == [True, False, False]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (401, "model_unauthorized", False),
        (403, "model_unauthorized", False),
        (404, "model_not_found", False),
        (400, "model_rejected", False),
        (413, "model_rejected", False),
        (422, "model_rejected", False),
        (302, "model_error", False),
        (204, "model_error", False),
    ],
)
async def test_a_refusal_has_a_code_and_is_not_repeated(
    fake: FakeModel, provider: OpenAiProvider, status: int, code: str, retryable: bool
) -> None:
    async def refuse(exchange: Exchange) -> None:
        if status == 204:
            await exchange.bytes(b"HTTP/1.1 204 No Content\r\n\r\n")
            exchange.cut()
        else:
            await refuses(status, "because", headers={"Location": "http://elsewhere.invalid/"})(exchange)

    fake.plan(refuse)
    error = await failure(provider)
    assert (error.run_code, error.can_retry) == (code, retryable)
    assert str(status) in error.detail
    assert len(fake.requests) == 1


async def test_an_error_shows_the_servers_words_without_the_key_or_control_characters(
    fake: FakeModel, provider: OpenAiProvider
) -> None:
    fake.plan(refuses(401, f"Bad key {KEY}\r\n\x1b[31m{KEY} " + "x" * 1000))
    error = await failure(provider)
    server = fake.base_url.removesuffix("/v1")
    assert error.detail.startswith(f"The model's server at {server} answered 401: Bad key *** [31m*** xxx")
    assert error.detail.endswith("x…")


@pytest.mark.parametrize("secret", ["token-in-a-header"])
async def test_an_error_does_not_show_a_configured_header(fake: FakeModel, secret: str) -> None:
    fake.plan(refuses(403, f"{secret} is wrong"))
    async with open_openai(settings(fake.base_url, headers={"api-key": secret})) as provider:
        assert secret not in (await failure(provider)).detail


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"null", b'{"error":{}}', b'{"error":[1]}', b'{"error":{"message":{}}}', b"[" * 60000],
)
async def test_any_body_of_an_error_is_endured(fake: FakeModel, provider: OpenAiProvider, body: bytes) -> None:
    fake.plan(refuses(400, body=body))
    error = await failure(provider)
    assert error.detail.endswith("answered 400")


@pytest.mark.parametrize(
    "body", [b'{"error":"why"}', b'{"message":"why"}', b'{"detail":"why"}', b'[{"error":{"message":"why"}}]']
)
async def test_the_usual_shapes_of_an_error_are_understood(
    fake: FakeModel, provider: OpenAiProvider, body: bytes
) -> None:
    fake.plan(refuses(400, body=body))
    assert (await failure(provider)).detail.endswith("answered 400: why")


async def test_an_endless_error_body_is_left(fake: FakeModel, provider: OpenAiProvider) -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.start(400)
        while True:
            await exchange.raw(b"x" * 4096)

    fake.plan(endless)
    assert (await failure(provider)).run_code == "model_rejected"
    with trio.fail_after(2):
        await fake.requests[0].closed.wait()


async def test_a_busy_server_is_asked_again_when_it_says(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(refuses(429, headers={"Retry-After": "0.2"}), says("ok"))
    start = trio.current_time()
    assert (await ask(provider))[0] == ["ok"]
    assert 0.2 <= trio.current_time() - start < 0.5 + CLOSE_LIMIT


async def test_a_server_that_stays_busy_is_rate_limited(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(*[refuses(429, "slow down", headers={"Retry-After": "0"})] * 4)
    error = await failure(provider)
    assert (error.run_code, error.can_retry, error.retry_after) == ("model_rate_limited", True, 0)
    assert len(fake.requests) == 4


@pytest.mark.parametrize("wait", ["61", email.utils.formatdate(time.time() + 3600)], ids=["seconds", "date"])
async def test_too_long_a_wait_is_not_waited_but_told(fake: FakeModel, provider: OpenAiProvider, wait: str) -> None:
    fake.plan(refuses(429, headers={"Retry-After": wait}))
    error = await failure(provider)
    assert error.run_code == "model_rate_limited"
    assert error.retry_after is not None
    assert error.retry_after > 60
    assert len(fake.requests) == 1


async def test_a_wait_beyond_the_callers_deadline_is_not_begun(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(refuses(429, headers={"Retry-After": "20"}))
    with trio.fail_after(10):
        assert (await failure(provider)).run_code == "model_rate_limited"


async def test_an_exhausted_quota_is_not_asked_again(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(refuses(429, "no money", code="insufficient_quota"))
    error = await failure(provider)
    assert (error.run_code, error.can_retry) == ("model_rate_limited", False)
    assert len(fake.requests) == 1


async def test_a_broken_server_is_asked_again(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(refuses(500, headers={"Retry-After": "0"}), refuses(503, headers={"Retry-After": "0"}), says("ok"))
    assert (await ask(provider))[0] == ["ok"]


async def test_a_server_that_stays_broken_is_a_model_error(fake: FakeModel) -> None:
    fake.plan(*[refuses(500, "out of order", headers={"Retry-After": "0"})] * 2)
    async with open_openai(settings(fake.base_url, max_retries=1)) as provider:
        error = await failure(provider)
    assert (error.run_code, error.can_retry) == ("model_error", True)
    assert error.detail.endswith("answered 500: out of order")


async def test_a_server_that_hangs_up_is_asked_again(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(hangs_up(), says("ok"))
    assert (await ask(provider))[0] == ["ok"]


async def test_a_server_that_always_hangs_up_cut_the_stream(fake: FakeModel) -> None:
    fake.plan(hangs_up())
    async with open_openai(settings(fake.base_url, max_retries=0)) as provider:
        assert (await failure(provider)).run_code == "model_stream_cut"


@pytest.mark.parametrize("reset", [False, True])
async def test_a_stream_cut_half_way_is_an_error_and_never_repeated(
    fake: FakeModel, provider: OpenAiProvider, reset: bool
) -> None:
    fake.plan(cuts("Half ", reset=reset))
    given: list[str] = []
    error = await failure(provider, given)
    assert (error.run_code, error.can_retry) == ("model_stream_cut", True)
    assert given == ["Half "] or reset
    assert len(fake.requests) == 1


async def test_a_body_that_ends_before_the_answer_does_is_a_cut(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(sends(b"data: " + json.dumps(chunk({"content": "Half "})).encode() + b"\n\n"))
    assert (await failure(provider)).run_code == "model_stream_cut"


GARBAGE: dict[str, Behaviour] = {
    "not_json": sends(b"data: {not json\n\n"),
    "a_number": sends(b"data: 5\n\n"),
    "wrong_shape": sends(b'data: {"choices":"none"}\n\n'),
    "other_object": sends(b'data: {"hello":"world"}\n\n'),
    "content_of_another_type": sends(b'data: {"choices":[{"delta":{"content":5}}]}\n\n'),
    "nested_too_deep": sends(b'data: {"error":' + b"[" * 100_000 + b"\n\n"),
    "a_huge_line": sends(b"data: " + b"x" * (MAX_EVENT + 1)),
    "html": sends(b"<html>welcome</html>", "text/html"),
    "a_plain_json_answer": sends(b'{"choices":[]}', "application/json"),
    "compressed": sends(gzip.compress(b"data: [DONE]\n\n"), headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_an_error_and_the_connection_is_closed(
    fake: FakeModel, provider: OpenAiProvider, name: str
) -> None:
    fake.plan(GARBAGE[name])
    error = await failure(provider)
    assert (error.run_code, error.can_retry) == ("model_garbage", False)
    await ask(provider)


async def test_a_server_that_does_not_speak_http_sends_garbage(fake: FakeModel, provider: OpenAiProvider) -> None:
    async def other_protocol(exchange: Exchange) -> None:
        await exchange.bytes(b"220 mail.example ESMTP\r\n\r\n")
        exchange.cut()

    fake.plan(other_protocol)
    assert (await failure(provider)).run_code == "model_garbage"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"message": f"overloaded {KEY}", "code": 502}, "model_error"),
        ("overloaded", "model_error"),
        ({"message": "overloaded", "code": "rate_limit_exceeded"}, "model_rate_limited"),
        ({"message": "overloaded", "type": None, "code": 429}, "model_rate_limited"),
    ],
)
async def test_an_error_inside_the_stream_ends_it(
    fake: FakeModel, provider: OpenAiProvider, error: Any, code: str
) -> None:
    first = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    fake.plan(sends(first + b"data: " + json.dumps({"error": error}).encode() + b"\n\n"))
    given: list[str] = []
    raised = await failure(provider, given)
    assert (raised.run_code, given) == (code, ["a"])
    assert "overloaded" in raised.detail


async def test_an_error_instead_of_a_stream_is_told(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(sends(b'{"error":{"message":"no capacity"}}', "application/json"))
    error = await failure(provider)
    assert error.run_code == "model_error"
    assert error.detail.endswith(": no capacity")


@pytest.mark.parametrize("behaviour", [silent(), stalls("Half ")])
async def test_silence_beyond_the_read_timeout_is_a_timeout(fake: FakeModel, behaviour: Behaviour) -> None:
    fake.plan(behaviour)
    async with open_openai(settings(fake.base_url, read_timeout=0.1)) as provider:
        error = await failure(provider)
        assert (error.run_code, error.can_retry) == ("model_timeout", True)
        assert "0.1 seconds" in error.detail
        with trio.fail_after(2):
            await fake.requests[0].closed.wait()
    assert len(fake.requests) == 1


async def test_a_closed_port_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with open_openai(settings(f"http://127.0.0.1:{unused.getsockname()[1]}/v1")) as provider:
            error = await failure(provider)
    assert (error.run_code, error.can_retry) == ("model_unreachable", True)
    assert error.detail.endswith("cannot be reached: Connection refused")


async def test_an_unknown_host_is_unreachable() -> None:
    async with open_openai(settings("http://no-such-host.invalid/v1")) as provider:
        assert (await failure(provider)).run_code == "model_unreachable"


async def test_a_tls_handshake_that_never_ends_is_a_timeout(nursery: trio.Nursery) -> None:
    port = await serve_silent_port(nursery)
    async with open_openai(settings(f"https://127.0.0.1:{port.port}/v1", connect_timeout=0.1)) as provider:
        assert (await failure(provider)).run_code == "model_timeout"
        with trio.fail_after(2):
            await port.closed.wait()


async def test_a_certificate_nobody_vouches_for_is_told(nursery: trio.Nursery) -> None:
    trustme = pytest.importorskip("trustme")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    async def greet(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await trio.SSLStream(stream, context, server_side=True).do_handshake()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, greet, [listener])
    async with open_openai(settings(f"https://127.0.0.1:{listener.socket.getsockname()[1]}/v1")) as provider:
        error = await failure(provider)
    assert error.run_code == "model_unreachable"
    assert "certificate" in error.detail


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_url": "localhost:8080"}, "http:// or https://"),
        ({"base_url": "ftp://example.org"}, "http:// or https://"),
        ({"base_url": "http://"}, "http:// or https://"),
        ({"base_url": "http://user:secret-pass@example.org"}, "user or password"),
        ({"base_url": "http://example.org:99999"}, "port"),
        ({"base_url": "http://exa mple.org:x"}, "URL"),
        ({"api_key": "sk-secret-\u20ac"}, "api_key"),
        ({"api_key": "sk-secret\nX: y"}, "api_key"),
        ({"headers": {"a b": "x"}}, "a b"),
        ({"headers": {"x": "secret\r\nY: z"}}, "x"),
    ],
)
async def test_settings_that_cannot_work_are_refused_without_showing_secrets(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        async with open_openai(OpenAiLlm(**{"model": "m", **changes})):
            pass
    assert words in caught.value.detail
    assert "secret" not in caught.value.detail


async def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with open_openai(settings(fake.base_url)) as provider:
        assert (await ask(provider))[0]


async def test_a_proxy_of_the_environment_is_used_for_other_hosts(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{fake.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with open_openai(settings("http://model.invalid/v1")) as provider:
        await ask(provider)
    assert fake.requests[0].target == "http://model.invalid/v1/chat/completions"


async def test_cookies_are_not_kept(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(sends(b"data: [DONE]\n\n", headers={"Set-Cookie": "a=b; Path=/"}))
    await ask(provider)
    await ask(provider)
    assert "cookie" not in fake.requests[1].headers


# --- cancels ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def asking(provider: OpenAiProvider) -> AsyncIterator[tuple[trio.CancelScope, list[str], trio.Event]]:
    """Asks in the background: the scope that cancels it, what it has given out, and an event set when it is over."""
    texts: list[str] = []
    over = trio.Event()
    scope = trio.CancelScope()

    async def keep(delta: Delta) -> None:
        texts.append(delta.content)

    async def run() -> None:
        with scope:
            await provider.stream(QUESTION, keep)
        over.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield scope, texts, over
            await over.wait()


async def closes_within(limit: float, closed: trio.Event) -> None:
    with trio.fail_after(limit):
        await closed.wait()


async def test_a_cancel_before_the_head_closes_the_connection(fake: FakeModel, provider: OpenAiProvider) -> None:
    fake.plan(silent())
    async with asking(provider) as (scope, _, _):
        (exchange,) = await fake.wait_requests(1)
        scope.cancel()
        await closes_within(CLOSE_LIMIT, exchange.closed)


async def test_a_cancel_before_the_first_token_closes_the_connection(fake: FakeModel, provider: OpenAiProvider) -> None:
    started = trio.Event()

    async def head_only(exchange: Exchange) -> None:
        await exchange.start()
        started.set()
        await trio.sleep_forever()

    fake.plan(head_only)
    async with asking(provider) as (scope, _, _):
        await started.wait()
        scope.cancel()
        await closes_within(CLOSE_LIMIT, fake.requests[0].closed)


async def test_a_cancel_between_tokens_closes_the_connection(fake: FakeModel, provider: OpenAiProvider) -> None:
    gate = trio.Semaphore(1)
    fake.plan(says("one ", "two ", gate=gate))
    async with asking(provider) as (scope, texts, _):
        while not texts:
            await trio.lowlevel.checkpoint()
        scope.cancel()
        await closes_within(CLOSE_LIMIT, fake.requests[0].closed)
    assert texts == ["one "]
    assert not fake.requests[0].answered


async def test_a_cancel_while_the_delta_is_being_taken_closes_the_connection(
    fake: FakeModel, provider: OpenAiProvider
) -> None:
    fake.plan(says(*["x "] * 1000))
    taking = trio.Event()

    async def take(_: Delta) -> None:
        taking.set()
        await trio.sleep_forever()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.stream, QUESTION, take)
            await taking.wait()
            nursery.cancel_scope.cancel()
        await closes_within(CLOSE_LIMIT, fake.requests[0].closed)


async def test_an_error_of_the_taker_closes_the_connection_and_is_passed_on(
    fake: FakeModel, provider: OpenAiProvider
) -> None:
    fake.plan(stalls("one "))

    async def take(_: Delta) -> None:
        raise KeyError("mine")

    with trio.fail_after(5):
        with pytest.raises(KeyError, match="mine"):
            await provider.stream(QUESTION, take)
        await closes_within(CLOSE_LIMIT, fake.requests[0].closed)


async def test_a_cancel_after_done_closes_the_connection(fake: FakeModel, provider: OpenAiProvider) -> None:
    done = trio.Event()

    async def done_without_end(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.token("hi")
        await exchange.raw(b"data: [DONE]\n\n")
        done.set()
        await trio.sleep_forever()

    fake.plan(done_without_end)
    async with asking(provider) as (scope, texts, _):
        await done.wait()
        while not texts:
            await trio.lowlevel.checkpoint()
        scope.cancel()
        await closes_within(CLOSE_LIMIT, fake.requests[0].closed)


async def test_a_cancel_in_the_tls_handshake_closes_the_connection(nursery: trio.Nursery) -> None:
    port = await serve_silent_port(nursery)
    async with (
        open_openai(settings(f"https://127.0.0.1:{port.port}/v1")) as provider,
        asking(provider) as (scope, _, _),
    ):
        await port.accepted.wait()
        scope.cancel()
        await closes_within(CLOSE_LIMIT, port.closed)


async def test_a_cancel_while_the_connection_is_not_accepted_returns_at_once() -> None:
    with socket.socket() as full, socket.socket() as first:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first.connect(full.getsockname())  # the queue is full now: the next SYN is not answered
        async with (
            open_openai(settings(f"http://127.0.0.1:{full.getsockname()[1]}/v1")) as provider,
            asking(provider) as (scope, _, over),
        ):
            with trio.move_on_after(0.1):
                await over.wait()
            assert not over.is_set()
            scope.cancel()
            await closes_within(CLOSE_LIMIT, over)


async def test_a_cancel_while_waiting_for_the_next_try_returns_at_once(
    fake: FakeModel, provider: OpenAiProvider
) -> None:
    fake.plan(refuses(429, headers={"Retry-After": "3"}))
    async with asking(provider) as (scope, _, over):
        (exchange,) = await fake.wait_requests(1)
        await exchange.ended.wait()
        with trio.move_on_after(0.1):
            await over.wait()
        assert not over.is_set()
        scope.cancel()
        await closes_within(CLOSE_LIMIT, over)
    assert len(fake.requests) == 1


async def test_a_cancel_while_waiting_for_a_free_connection_returns_at_once(fake: FakeModel) -> None:
    fake.plan(silent())
    async with open_openai(settings(fake.base_url, max_connections=1)) as provider:
        async with asking(provider) as (first, _, _):
            await fake.wait_requests(1)
            async with asking(provider) as (second, _, over):
                with trio.move_on_after(0.1):
                    await over.wait()
                assert not over.is_set()
                second.cancel()
                await closes_within(CLOSE_LIMIT, over)
            first.cancel()
        assert (await ask(provider))[0]


async def test_a_cancelled_run_is_cancelled_and_not_failed(fake: FakeModel, provider: OpenAiProvider) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await provider.stream(QUESTION, _ignore)
    assert scope.cancelled_caught
    assert fake.requests == []


async def _ignore(_: Delta) -> None:
    await trio.lowlevel.checkpoint()


async def test_after_many_cancels_at_any_moment_nothing_is_left(fake: FakeModel) -> None:
    fake.default = says(*["word "] * 50, pace=0.001)

    async def cut_after(provider: OpenAiProvider, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await provider.stream(QUESTION, _ignore)

    async with open_openai(settings(fake.base_url, max_connections=20)) as provider:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for n in range(200):
                    nursery.start_soon(cut_after, provider, n * 0.001)
        fake.default = says("ok")
        assert (await ask(provider))[0] == ["ok"]
    with trio.fail_after(5):
        await fake.wait_connections(0)


STEPS = (
    "connection.connect_tcp.started",
    "connection.connect_tcp.complete",
    "http11.send_request_headers.started",
    "http11.send_request_headers.complete",
    "http11.send_request_body.started",
    "http11.send_request_body.complete",
    "http11.receive_response_headers.started",
    "http11.receive_response_headers.complete",
    "http11.receive_response_body.started",
    "http11.receive_response_body.complete",
    "http11.response_closed.started",
    "http11.response_closed.complete",
)


@pytest.mark.parametrize("step", STEPS)
async def test_a_cancel_at_any_step_of_the_request_costs_the_pool_nothing(fake: FakeModel, step: str) -> None:
    scope = trio.CancelScope()
    steps: list[str] = []

    async def cancel_at_the_step(request: httpx2.Request) -> None:
        trace = request.extensions["trace"]

        async def trace_and_cancel(event: str, info: dict[str, Any]) -> None:
            await trace(event, info)
            steps.append(event)
            if event == step:
                scope.cancel()

        request.extensions = {**request.extensions, "trace": trace_and_cancel}

    hooks: dict[str, list[Callable[..., Any]]] = {"request": [cancel_at_the_step]}
    chosen = settings(fake.base_url)
    async with httpx2.AsyncClient(event_hooks=hooks, limits=httpx2.Limits(max_connections=1)) as client:
        provider = OpenAiProvider(chosen, client, httpx2.URL(fake.base_url + "/chat/completions"))
        with trio.fail_after(5):
            with scope:
                await provider.stream(QUESTION, _ignore)
            assert step in steps
            assert (await ask(provider))[0]
    with trio.fail_after(2):
        await fake.wait_connections(0)


async def test_closing_the_provider_closes_its_connections(fake: FakeModel) -> None:
    async with open_openai(settings(fake.base_url)) as provider:
        await ask(provider)
        assert fake.open_connections == 1
    with trio.fail_after(2):
        await fake.wait_connections(0)
