"""The agent that is a model: what the model is given, and what of its answer becomes chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio

from hector_trio.a2a.mapping import PartLike
from hector_trio.a2a.types import Message as A2aMessage
from hector_trio.agents import AgentInfo, Resume
from hector_trio.agents.llm import LlmAgent
from hector_trio.config import OpenAiLlm
from hector_trio.errors import ModelError, RunError
from hector_trio.models import Content, Message, TaskRequest
from hector_trio.providers import Delta, ModelRequest, ModelResult, OnDelta, Turn
from hector_trio.providers.demo import DemoProvider
from hector_trio.providers.openai import open_openai
from hector_trio.uploads import UploadedFile
from tests.fake_model import USAGE, cuts, says, serve_fake_model

INFO = AgentInfo("assistant", "Assistant")


class Recorder:
    """A Context that keeps what is emitted."""

    def __init__(
        self, text: str, history: list[Message] | None = None, parameters: dict[str, Any] | None = None
    ) -> None:
        self.task_id = "t1"
        self.agent_id = "assistant"
        self.session_id: str | None = None
        self.user_id: str | None = None
        self.input = Content(content=text)
        self.request = TaskRequest(self.input, parameters=parameters)
        self.history = history or []
        self.state: dict[str, Any] = {}
        self.deadline = float("inf")
        self.text = text
        self.parameters = parameters or {}
        self.file: UploadedFile | None = None
        self.message: A2aMessage | None = None
        self.resume: Resume | None = None
        self.emitted: list[tuple[str, Any]] = []

    async def upload(self) -> UploadedFile | None:
        return self.file

    async def emit_text(self, text: str) -> None:
        self.emitted.append(("text", text))

    async def emit_data(self, value: Any) -> None:
        self.emitted.append(("data", value))

    async def emit_metadata(self, value: Any) -> None:
        self.emitted.append(("metadata", value))

    async def emit_error(self, message: str, *, code: str = "agent_warning") -> None:
        self.emitted.append(("error", message))

    async def emit_bytes(self, data: bytes, media_type: str) -> None:
        raise AssertionError("a model's agent gives text")

    async def emit_status(self, message: Any = None) -> None:
        raise AssertionError("a model's agent gives text")

    async def artifact(self, *parts: PartLike, **about: Any) -> str:
        raise AssertionError("a model's agent gives text")

    async def reply(self, *parts: PartLike) -> None:
        raise AssertionError("a model's agent gives text")

    async def reject(self, reason: str) -> NoReturn:
        raise AssertionError("a model's agent rejects nothing")

    def require_extension(self, uri: str) -> None:
        raise AssertionError("a model's agent needs no extension")

    async def ask(self, question: Any, *, saved: Any = None, auth: bool = False) -> NoReturn:
        raise AssertionError("a model's agent asks nothing")

    async def update_state(self, patch: dict[str, Any]) -> None:
        raise AssertionError("a model's agent has no state to update")


class Scripted:
    """A Provider that gives out deltas it was told and keeps the request."""

    name = "scripted"

    def __init__(self, *deltas: Delta, result: ModelResult | None = None) -> None:
        self.requests: list[ModelRequest] = []
        self._deltas = deltas
        self._result = result or ModelResult()

    async def stream(self, request: ModelRequest, on_delta: OnDelta) -> ModelResult:
        self.requests.append(request)
        for delta in self._deltas:
            await on_delta(delta)
        return self._result


def message(role: str, content: Any) -> Message:
    return Message(role=role, content=content, agent_id="a", task_id="t", timestamp="")  # type: ignore[arg-type]


async def request_for(ctx: Recorder, instructions: str = "", parameters: dict[str, Any] | None = None) -> ModelRequest:
    provider = Scripted()
    await LlmAgent(INFO, provider, instructions, parameters or {}).run(ctx)
    (request,) = provider.requests
    return request


async def test_instructions_history_and_input_become_turns() -> None:
    history = [message("user", "My name is Alice"), message("agent", "Hello Alice")]
    request = await request_for(Recorder("What is my name?", history), "Be brief.")
    assert request.turns == [
        Turn("system", "Be brief."),
        Turn("user", "My name is Alice"),
        Turn("assistant", "Hello Alice"),
        Turn("user", "What is my name?"),
    ]


def file_of(path: Path, data: bytes, media_type: str) -> UploadedFile:
    path.write_bytes(data)
    return UploadedFile(media_type, len(data), "notes", path, trio.CapacityLimiter(1))


async def test_an_uploaded_text_stands_behind_what_is_said(tmp_path: Path) -> None:
    long = "é" * 100_000
    ctx = Recorder("Sum it up:")
    ctx.file = file_of(tmp_path / "x", long.encode(), "text/markdown; charset=utf-8")
    assert (await request_for(ctx)).turns == [Turn("user", f"Sum it up:\n\n{long}")]
    ctx = Recorder("")
    ctx.file = file_of(tmp_path / "y", b"{}", "application/json")
    assert (await request_for(ctx)).turns == [Turn("user", "{}")]


@pytest.mark.parametrize(
    ("data", "media_type"), [(b"x", "image/png"), (b"\xff", "text/plain"), (b"x" * ((1 << 20) + 1), "text/plain")]
)
async def test_an_upload_that_is_no_text_for_a_model_is_refused(data: bytes, media_type: str, tmp_path: Path) -> None:
    ctx = Recorder("What is it?")
    ctx.file = file_of(tmp_path / "x", data, media_type)
    with pytest.raises(RunError) as refused:
        await request_for(ctx)
    assert refused.value.run_code == "unsupported_upload"


async def test_without_instructions_there_is_no_system_turn() -> None:
    assert (await request_for(Recorder("Hi"))).turns == [Turn("user", "Hi")]


async def test_content_that_is_not_text_is_given_as_json() -> None:
    history = [message("user", {"a": [1, "é"]}), message("agent", [1, None])]
    assert (await request_for(Recorder("Hi", history))).turns[:2] == [
        Turn("user", '{"a":[1,"é"]}'),
        Turn("assistant", "[1,null]"),
    ]


async def test_a_partial_answer_stands_as_far_as_it_came_and_an_empty_one_is_left_out() -> None:
    history = [message("user", "1"), message("agent", "Half an ans"), message("user", "2"), message("agent", "")]
    turns = (await request_for(Recorder("3", history))).turns
    assert [turn.content for turn in turns] == ["1", "Half an ans", "2", "3"]


async def test_the_callers_sampling_parameters_go_over_the_agents() -> None:
    ctx = Recorder("Hi", parameters={"temperature": 1, "stop": ["x"], "seed": None, "model": "other", "stream": False})
    request = await request_for(ctx, parameters={"temperature": 0.5, "top_p": 0.9, "top_k": 3})
    assert request.parameters == {"temperature": 1, "top_p": 0.9, "top_k": 3, "stop": ["x"]}


async def test_the_callers_length_limit_replaces_the_agents_under_either_name() -> None:
    ctx = Recorder("Hi", parameters={"max_completion_tokens": 5})
    assert (await request_for(ctx, parameters={"max_tokens": 100})).parameters == {"max_completion_tokens": 5}


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"max_tokens": 1.5},
        {"max_tokens": 0},
        {"max_completion_tokens": -1},
        {"stop": [1]},
        {"seed": "x"},
        {"top_p": {}},
    ],
)
async def test_parameters_of_the_wrong_type_fail_the_run_before_the_model_is_asked(parameters: dict[str, Any]) -> None:
    provider = Scripted()
    with pytest.raises(RunError) as caught:
        await LlmAgent(INFO, provider, "", {}).run(Recorder("Hi", parameters=parameters))
    assert caught.value.run_code == "invalid_parameters"
    assert f"parameters.{next(iter(parameters))}" in caught.value.detail
    assert provider.requests == []


async def test_every_kind_of_delta_becomes_its_chunk() -> None:
    deltas = [Delta("a"), Delta({"x": 1}, "data"), Delta([2], "metadata"), Delta("careful", "error"), Delta("b")]
    ctx = Recorder("Hi")
    await LlmAgent(INFO, Scripted(*deltas), "", {}).run(ctx)
    assert ctx.emitted == [("text", "a"), ("data", {"x": 1}), ("metadata", [2]), ("error", "careful"), ("text", "b")]


async def test_usage_is_told_at_the_end_only_if_it_was_reported() -> None:
    ctx = Recorder("Hi")
    await LlmAgent(INFO, Scripted(Delta("a"), result=ModelResult("length", {"total": 3})), "", {}).run(ctx)
    assert ctx.emitted == [("text", "a"), ("metadata", {"usage": {"total": 3}, "finishReason": "length"})]


async def test_the_demo_reads_the_history_it_is_given() -> None:
    ctx = Recorder("What is my name?", [message("user", "My name is Alice"), message("agent", "Hello Alice")])
    await LlmAgent(INFO, DemoProvider(0), "", {}).run(ctx)
    assert "".join(content for kind, content in ctx.emitted if kind == "text") == "Your name is Alice."
    assert ctx.emitted[-1] == ("metadata", {"usage": {"wordsIn": 10, "wordsOut": 4}, "finishReason": "stop"})


async def test_a_real_stream_becomes_chunks_and_its_cut_an_error(nursery: trio.Nursery) -> None:
    fake = await serve_fake_model(nursery)
    fake.plan(says("Hello ", "world"), cuts("Half "))
    with trio.fail_after(5):
        async with open_openai(OpenAiLlm(model="m", base_url=fake.base_url)) as provider:
            agent = LlmAgent(INFO, provider, "Be brief.", {"temperature": 0})
            ctx = Recorder("Hi")
            await agent.run(ctx)
            assert ctx.emitted == [
                ("text", "Hello "),
                ("text", "world"),
                ("metadata", {"usage": USAGE, "finishReason": "stop"}),
            ]
            ctx = Recorder("Hi")
            with pytest.raises(ModelError):
                await agent.run(ctx)
            assert ctx.emitted == [("text", "Half ")]
    assert fake.requests[0].body["messages"][0] == {"role": "system", "content": "Be brief."}
