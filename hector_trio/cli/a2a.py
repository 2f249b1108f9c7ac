"""``hector info | call | chat URL``: any A2A agent, wherever it is, as if it were an agent of a server of ours."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import click
import msgspec
import trio

from hector_trio.a2a.mapping import PartLike, artifact_pieces, part_of
from hector_trio.a2a.relay import Relay
from hector_trio.a2a.types import Message as A2aMessage
from hector_trio.agents import AgentInfo, Resume
from hector_trio.agents.a2a_client import open_peer
from hector_trio.agents.remote import STATE, RemoteAgent
from hector_trio.cli import ASKS, FAILED, INTERRUPTED, NOT_FOUND, OK, UNREACHABLE, complain, say, target
from hector_trio.cli.calls import ChunkPrinter, ask_user
from hector_trio.cli.chat import COMMANDS, HINT, Interrupts
from hector_trio.cli.lines import Lines, open_keyboard, open_lines
from hector_trio.cli.output import as_text, print_fields, print_json, to_json, visible
from hector_trio.config import RemoteAgent as RemoteSettings
from hector_trio.config import load
from hector_trio.errors import ConfigError, HectorError, RunError
from hector_trio.log import now_ms
from hector_trio.models import ArtifactChunk, Chunk, Content, Message, Status, Task, TaskError, TaskRequest, timestamp
from hector_trio.task import Fold

SESSION = "chat"
"""What the only session is called; it is a context there."""


class Request(NamedTuple):
    """What ``hector call`` was told."""

    prompt: str
    context_id: str | None = None
    parameters: dict[str, Any] | None = None
    timeout: float | None = None
    answers: str | None = None
    """The task that the prompt answers."""


def show_card(url: str) -> None:
    async def ask() -> Any:
        async with open_peer(_settings(url)) as peer:
            return (await peer.card()).document

    print_fields(_exiting(ask))


def call_agent(url: str, request: Request, *, stream: bool) -> int:
    """One task. Returns the exit code."""

    async def run() -> int:
        # A cancel, and no exception in the middle of it: the agent is to be told, whatever it is just doing.
        with Interrupts() as interrupts, interrupts.scope():
            async with open_peer(_settings(url)) as peer:
                talk = Talk(RemoteAgent(AgentInfo(url, url), peer), stream=stream, as_json=target().json)
                talk.context_id = request.context_id
                return await talk.call(request, open_keyboard())
        return INTERRUPTED

    return int(_exiting(run))


def chat_with_agent(url: str, context_id: str | None) -> int:
    """A conversation. Returns the exit code."""

    async def run() -> int:
        with Interrupts() as interrupts:
            async with open_peer(_settings(url)) as peer:
                talk = Talk(RemoteAgent(AgentInfo(url, url), peer), stream=True, as_json=target().json)
                talk.context_id = context_id
                lines = open_lines()
                if lines.interactive:
                    return await talk.chat(lines, interrupts)
                with interrupts.scope():
                    return await talk.chat(lines, interrupts)
            return INTERRUPTED

    return int(_exiting(run))


def _settings(url: str) -> RemoteSettings:
    """Raises: click.UsageError for an address or a token that cannot be one."""
    token = target().token or os.environ.get("HECTOR_TOKEN") or None
    try:
        text = "agents: {a: {type: a2a, url: '${URL}', token: '${TOKEN:-}'}}"
        agent = load(text, {"URL": url, "TOKEN": token or ""}, source="").agents["a"]
    except ConfigError as error:
        raise click.UsageError(error.detail.removeprefix("agents.a.")) from None
    assert isinstance(agent, RemoteSettings)
    return agent


def _exiting(run: Callable[[], Any]) -> Any:
    """What ``run`` returns. An error of the agent ends the program with its code."""
    try:
        return trio.run(run)
    except RunError as error:
        complain(error)
        raise SystemExit(exit_code(error)) from None


def exit_code(error: RunError) -> int:
    codes = {"remote_unreachable": UNREACHABLE, "remote_lost": UNREACHABLE, "remote_not_found": NOT_FOUND}
    return codes.get(error.run_code, FAILED)


class Talk:
    """Tasks of one agent, one after the other, in one context."""

    def __init__(self, agent: RemoteAgent, *, stream: bool, as_json: bool) -> None:
        self.context_id: str | None = None
        self._agent = agent
        self._stream = stream
        self._as_json = as_json

    async def call(self, request: Request, lines: Lines) -> int:
        turn = Turn(self, request)
        if request.answers is not None:
            saved = Relay(task_id=request.answers, context_id=request.context_id)
            turn.resume = Resume(None, request.prompt, msgspec.to_builtins(saved))
        return await self._finish(turn, lines)

    async def _finish(self, turn: Turn, lines: Lines) -> int:
        """Runs the task, asking the user what it asks."""
        printer = ChunkPrinter()

        def show(chunk: Chunk) -> None:
            if self._stream and self._as_json:
                click.echo(to_json(chunk))
            elif self._stream:
                printer.print(chunk)

        turn.show = show
        try:
            while True:
                try:
                    with trio.fail_at(turn.deadline):
                        await self._agent.run(turn)
                except _Asked as asked:
                    printer.end()
                    line = await ask_user(asked.question, lines)
                    if line is None:
                        return self._leave(turn, asked)
                    turn.resume = Resume(asked.question, line, asked.saved)
                    continue
                break
        except trio.TooSlowError:
            return self._failed(turn, RunError("timeout", "The task did not end within its time"), printer)
        except RunError as error:
            return self._failed(turn, error, printer)
        finally:
            self.context_id = turn.context_id or self.context_id
        if not self._stream:
            self._print_whole(turn, printer)
        printer.end()
        return OK

    def _print_whole(self, turn: Turn, printer: ChunkPrinter) -> None:
        if self._as_json:
            print_json(turn.task("completed"))
            return
        for chunk in turn.chunks:
            printer.print(chunk)

    def _failed(self, turn: Turn, error: RunError, printer: ChunkPrinter) -> int:
        if not self._stream and self._as_json:
            print_json(turn.task("failed", TaskError(error.run_code, error.detail, error.details)))
        elif not self._stream:
            self._print_whole(turn, printer)
        printer.end()
        say(f"task failed: {visible(error.run_code)}: {visible(error.detail)}")
        return exit_code(error)

    def _leave(self, turn: Turn, asked: _Asked) -> int:
        if self._as_json and not self._stream:
            print_json(turn.task("input_required", prompt=asked.question))
        say(f"the agent asks: {visible(as_text(asked.question))}")
        task_id = asked.saved.get("taskId")
        context = f" --session {turn.context_id}" if turn.context_id else ""
        url = self._agent.info.agent_id
        say(f'task {task_id} waits for the answer: hector call {url}{context} --answer {task_id} "..."')
        return ASKS

    async def chat(self, lines: Lines, interrupts: Interrupts) -> int:
        """Line by line until the input ends. By a pipe, the code says whether a turn has failed."""
        if lines.interactive:
            say(HINT)
        code = OK
        while True:
            try:
                line = await lines.next()
            except KeyboardInterrupt:
                say(HINT)
                continue
            if line is None or line.strip() == "/quit":
                return OK if lines.interactive else code
            if line.strip() == "/session":
                click.echo(self.context_id or "")
            elif line.startswith("/") and not line.startswith("//"):
                say(f"there is no command {line.split()[0]} here; {COMMANDS}")
            elif line.strip():
                turn = await self._turn(line.removeprefix("/") if line.startswith("//") else line, lines, interrupts)
                code = code or turn

    async def _turn(self, prompt: str, lines: Lines, interrupts: Interrupts) -> int:
        code = FAILED
        with interrupts.scope() as scope:
            try:
                code = await self._finish(Turn(self, Request(prompt)), lines)
            except HectorError as error:
                complain(error)
        if scope.cancelled_caught:
            click.echo()
            say("cancelled")
        return code


class _Asked(Exception):
    """The agent waits for an answer."""

    def __init__(self, question: Any, saved: Any) -> None:
        super().__init__("the agent asks something")
        self.question = question
        self.saved = saved


class Turn:
    """One task as the agent sees it (see ``hector_trio.agents.Context``): what it emits is shown."""

    def __init__(self, talk: Talk, request: Request) -> None:
        self.task_id = ""
        self.agent_id = talk._agent.info.agent_id
        self.session_id: str | None = SESSION
        self.user_id: str | None = None
        self.input = Content(content=request.prompt)
        self.request = TaskRequest(self.input, parameters=request.parameters)
        self.history: list[Message] = []
        self.state: dict[str, Any] = {STATE: {self.agent_id: talk.context_id}} if talk.context_id else {}
        self.deadline = math.inf if request.timeout is None else trio.current_time() + request.timeout
        self.message: A2aMessage | None = None
        self.resume: Resume | None = None
        self.chunks: list[Chunk] = []
        self.show: Callable[[Chunk], None] = lambda chunk: None
        self._started_at = timestamp(now_ms())

    @property
    def context_id(self) -> str | None:
        found = self.state.get(STATE, {}).get(self.agent_id)
        return found if isinstance(found, str) else None

    @property
    def text(self) -> str:
        return str(self.input.content)

    @property
    def parameters(self) -> dict[str, Any]:
        return self.request.parameters or {}

    def task(self, status: Status, error: TaskError | None = None, prompt: Any = None) -> Task:
        """All of it, as a task of a server of ours."""
        fold = Fold()
        for chunk in self.chunks:
            fold.take(chunk)
        output = fold.output()
        more: dict[str, Any] = {} if output is None else {"output": output}
        more |= {} if error is None else {"error": error}
        more |= {} if prompt is None else {"prompt": prompt}
        metadata = {"contextId": self.context_id} if self.context_id else {}
        return Task(self.task_id, self.agent_id, status, metadata, self._started_at, **more)

    async def upload(self) -> None:
        return None

    async def update_state(self, patch: dict[str, Any]) -> None:
        self.state = {**self.state, **patch}

    async def emit_text(self, text: str) -> None:
        await self._emit("text", text)

    async def emit_data(self, value: Any) -> None:
        await self._emit("data", value)

    async def emit_metadata(self, value: Any) -> None:
        await self._emit("metadata", value)

    async def emit_error(self, message: str, *, code: str = "agent_warning") -> None:
        await self._emit("error", message, code=code)

    async def emit_bytes(self, data: bytes, media_type: str) -> None:
        await self.artifact(data, media_type=media_type)

    async def emit_status(self, message: Any = None) -> None:
        await self._emit("metadata", {"status": "working", "message": message})

    async def artifact(self, *parts: PartLike, **about: Any) -> str:
        artifact = ArtifactChunk(
            about.pop("artifact_id", None) or "", **{name: value for name, value in about.items() if value is not None}
        )
        for piece in artifact_pieces([part_of(each) for each in parts], artifact):
            await self._emit(piece.kind, piece.content, **piece.extra)
        return artifact.id

    async def reply(self, *parts: PartLike) -> None:
        await self.artifact(*parts)

    async def reject(self, reason: str) -> NoReturn:
        raise RunError("rejected", reason)

    def require_extension(self, uri: str) -> None:
        raise RunError("extension_required", f"The client does not know the extension {uri}")

    async def ask(self, question: Any, *, saved: Any = None, auth: bool = False) -> NoReturn:
        self.task_id = saved["taskId"]
        raise _Asked(question, saved)

    async def _emit(self, kind: Any, content: Any, **more: Any) -> None:
        chunk = Chunk(self.task_id, len(self.chunks) + 1, kind, content, timestamp(now_ms()), **more)
        self.chunks.append(chunk)
        self.show(chunk)
        await trio.lowlevel.checkpoint()
