"""An agent that is somewhere else: a run here is a task there, over A2A, passed on piece by piece."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import structlog
import trio

from hector_trio.a2a import errors as a2a_errors
from hector_trio.a2a.mapping import OUTPUT
from hector_trio.a2a.relay import Ask, Done, Failed, Relay, Say, Step, Tell
from hector_trio.a2a.types import (
    Artifact,
    Message,
    Part,
    SendMessageConfiguration,
    SendMessageRequest,
    StreamResponse,
    is_unset,
)
from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.a2a_client import Peer, PeerError, PeerEvents, open_peer
from hector_trio.config import RemoteAgent as RemoteSettings
from hector_trio.errors import RunError

CANCEL_LIMIT: Final = 3.0
"""Seconds that a run which is over here spends on telling the other side."""

NAME_LIMIT: Final = 2.0
"""Seconds that a cancelled run waits to learn the name of what it has started there; it could not cancel it else."""

MAX_FAILURES: Final = 8
"""Attempts in a row to come back to a task, before it is given up."""

LONGEST_PAUSE: Final = 8.0
"""Seconds between two attempts."""

FIRST_LOOK: Final = 0.1
LONGEST_LOOK: Final = 2.0
"""Seconds between two looks at a task of an agent that does not stream, at first and in the end."""

MAX_UPLOAD: Final = 8 << 20
"""Bytes of an uploaded file that are sent along."""

PIECE: Final = 16 * 1024
"""Characters of an artifact's text that are one chunk at most."""

STATE: Final = "a2a"
"""Key of the session's state under which stands, by agent, the context there that the session is."""

ANYTHING: Final = ("text/plain", "application/json", "*/*")

T = TypeVar("T")

log = structlog.stdlib.get_logger("hector_trio.remote")


@asynccontextmanager
async def open_remote(info: AgentInfo, settings: RemoteSettings) -> AsyncIterator[RemoteAgent]:
    """The agent with its connections. Asks nobody anything before its first run."""
    async with open_peer(settings) as peer:
        yield RemoteAgent(info, peer)


class RemoteAgent:
    """Another A2A agent as one of ours.

    What it says comes through as it comes; its questions are asked here and the answers go there; a session here is a
    context there. A run that ends here before its task has ended there cancels the task, whatever the reason, in at
    most ``CANCEL_LIMIT`` seconds. A connection that breaks is made again, behind the last event that was had if the
    agent resumes, else by comparing.
    Raises: PeerError; RunError (``rejected``, ``remote_failed``, ``remote_canceled``) as the task there ended.
    """

    def __init__(self, info: AgentInfo, peer: Peer) -> None:
        # What it takes and gives is for the agent there to say, which nobody has asked yet.
        self.info = msgspec.structs.replace(info, input_types=list(ANYTHING), output_types=list(ANYTHING))
        self._peer = peer

    async def run(self, ctx: Context) -> None:
        await Remote(self._peer, ctx).run()

    async def withdraw(self, saved: Any) -> None:
        """Nobody answers the agent there any more, so its task is cancelled, in at most ``CANCEL_LIMIT`` seconds."""
        relay = _relay_from(saved)
        if relay is not None and relay.task_id is not None:
            await _cancel(self._peer, relay.task_id)


class Remote:
    """One run."""

    def __init__(self, peer: Peer, ctx: Context) -> None:
        self._peer = peer
        self._ctx = ctx
        self._relay = Relay()
        self._after: str | None = None
        """The id of the last event, where the agent resumes."""
        self._settled = False
        """Whether nothing goes on there that would have to be cancelled."""
        self._resumes = False
        self._steps = 0
        """What was passed on so far."""

    async def run(self) -> None:
        self._relay = _relay_of(self._ctx)
        try:
            card = await self._peer.card()
            self._resumes = card.resumes
            if self._ctx.resume is not None and self._relay.task_id is not None and await self._goes_on():
                settled = self._settled
            else:
                request = await self._request(stream=card.streaming)
                settled = await (self._stream(request) if card.streaming else self._send(request))
            if not settled:
                await (self._follow() if card.streaming else self._look())
        finally:
            if not self._settled and self._relay.task_id is not None:
                await _cancel(self._peer, self._relay.task_id)

    # --- beginning

    async def _request(self, *, stream: bool) -> SendMessageRequest:
        ctx = self._ctx
        parts = await _parts_of(ctx)
        message = Message(
            str(uuid.uuid4()),
            "ROLE_USER",
            parts,
            context_id=self._relay.context_id,
            task_id=self._relay.task_id,
        )
        # An agent that does not stream is not waited for: nobody could cancel what has no name yet.
        configuration = SendMessageConfiguration(return_immediately=None if stream else True)
        return SendMessageRequest(message, configuration, metadata=ctx.parameters or None)

    async def _goes_on(self) -> bool:
        """Whether a task that had asked has gone on without our answer, as one may that asked for a permission."""
        assert self._relay.task_id is not None
        task = await self._peer.get(self._relay.task_id)
        if task.status.state in ("TASK_STATE_INPUT_REQUIRED", "TASK_STATE_AUTH_REQUIRED"):
            return False
        await self._take([StreamResponse(task=task)])
        return True

    async def _send(self, request: SendMessageRequest) -> bool:
        async def begin() -> StreamResponse:
            response = await self._delivered(lambda: self._peer.send(request))
            self._relay.recognise(response)
            return response

        return await self._take([await until_named(begin)])

    async def _stream(self, request: SendMessageRequest) -> bool:
        """Sends the message and reads its stream. Whether the task is settled; ``False``: the stream was cut."""
        async with AsyncExitStack() as stack:

            async def begin() -> tuple[PeerEvents, list[StreamResponse] | None]:
                events = await self._delivered(lambda: self._peer.stream(request))
                stack.push_async_callback(events.aclose)
                first = await events.next()
                for response in first or ():
                    self._relay.recognise(response)
                return events, first

            try:
                events, first = await until_named(begin)
                return await self._read(events, first)
            except PeerError as error:
                if not error.lost or self._relay.task_id is None:
                    raise
                return False

    async def _delivered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Tries again where the agent cannot have got the request."""
        for pause in (0.2, 0.8):
            try:
                return await ask()
            except PeerError as error:
                if error.delivered:
                    raise
            await trio.sleep(pause)
        return await ask()

    # --- going on

    async def _follow(self) -> None:
        """Comes back to the task until it is settled."""
        failures = 0
        while not self._settled:
            if self._relay.task_id is None:
                raise PeerError("remote_lost", f"The stream of {self._peer.name} ended before it had begun")
            await trio.sleep(min(FIRST_LOOK * 2**failures, LONGEST_PAUSE))
            before = self._steps
            try:
                await self._come_back(self._relay.task_id)
            except PeerError as error:
                if isinstance(error.refusal, a2a_errors.UnsupportedOperationError):
                    await self._look()  # the task has ended meanwhile, or cannot be subscribed to
                    return
                if not error.lost and error.run_code not in ("remote_unavailable", "remote_rate_limited"):
                    raise
                failures = failures + 1 if self._steps == before else 1
                if failures > MAX_FAILURES:
                    raise
            else:
                failures = min(failures + 1, MAX_FAILURES) if self._steps == before else 0

    async def _come_back(self, task_id: str) -> None:
        async with aclosing(await self._peer.subscribe(task_id, self._after)) as events:
            first = await events.next()
            if first and self._after is None and first[0].task is None:
                await self._look()  # it says only what is new, and not what was missed
            else:
                await self._read(events, first)

    async def _read(self, events: PeerEvents, first: list[StreamResponse] | None) -> bool:
        """Whether the task is settled; ``False``: the stream ended before."""
        responses = first
        while responses is not None:
            settled = await self._take(responses)
            if self._resumes:
                self._after = events.last_event_id or self._after
            if settled:
                await events.drain()
                return True
            responses = await events.next()
        return self._settled

    async def _look(self) -> None:
        """Looks at the task again and again, for agents that do not stream."""
        failures = 0
        pause = FIRST_LOOK
        while not self._settled:
            assert self._relay.task_id is not None
            try:
                task = await self._peer.get(self._relay.task_id)
            except PeerError as error:
                failures += 1
                if not error.lost or failures > MAX_FAILURES:
                    raise
            else:
                failures = 0
                if await self._take([StreamResponse(task=task)]):
                    return
            await trio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_LOOK)

    async def _take(self, responses: list[StreamResponse]) -> bool:
        """Passes on what was said. Whether the task is settled."""
        for response in responses:
            steps = self._relay.take(response)
            await self._keep_context()
            for step in steps:
                self._steps += 1
                if not isinstance(step, Say | Tell):
                    self._settled = True
                await self._pass_on(step)
        return self._settled

    async def _pass_on(self, step: Step) -> None:
        match step:
            case Say():
                await self._say(step)
            case Tell():
                await self._ctx.emit_status(step.message)
            case Ask():
                try:
                    await self._ctx.ask(step.question, saved=msgspec.to_builtins(self._relay), auth=step.auth)
                except RunError:
                    self._settled = False  # it cannot be asked here, so nobody will answer there
                    raise
            case Failed():
                raise RunError(step.code, step.message, details=step.details)
            case Done():
                pass

    async def _say(self, step: Say) -> None:
        part, artifact = step.part, step.artifact
        unnamed = artifact is None or artifact.artifact_id == OUTPUT
        if unnamed and part.metadata is None and part.filename is None and part.media_type is None:
            if part.text is not None:
                await self._ctx.emit_text(part.text)
                return
            if not is_unset(part.data):
                await self._ctx.emit_data(part.data)
                return
        about = artifact or Artifact(str(uuid.uuid4()), [])
        append = step.append
        for piece in _pieces(part):
            if piece.text != "" or step.last or not append:
                await self._ctx.artifact(
                    piece,
                    artifact_id=about.artifact_id,
                    name=about.name,
                    description=about.description,
                    metadata=about.metadata,
                    extensions=about.extensions,
                    append=append,
                    last=step.last,
                )
            append = True

    async def _keep_context(self) -> None:
        """The session goes on in the context that the agent has given it."""
        ctx, context_id = self._ctx, self._relay.context_id
        if ctx.session_id is not None and context_id is not None and _context_of(ctx) != context_id:
            await ctx.update_state({STATE: {ctx.agent_id: context_id}})


async def _cancel(peer: Peer, task_id: str) -> None:
    """Cancels a task there, if it can be done in time; what comes of it changes nothing here."""
    because = "it does not answer"
    with trio.move_on_after(CANCEL_LIMIT, shield=True):
        for pause in (0.1, 0.4, 0.8):
            try:
                await peer.cancel(task_id)
                return
            except PeerError as error:
                if isinstance(error.refusal, a2a_errors.TaskNotCancelableError | a2a_errors.TaskNotFoundError):
                    return  # it has ended: there is nothing left to cancel
                because = error.detail
                if not error.lost:
                    break
            await trio.sleep(pause)
    log.warning("remote_task_not_cancelled", agent=peer.name, remote_task_id=task_id, because=because)


async def until_named(begin: Callable[[], Awaitable[T]]) -> T:
    """What ``begin`` returns, which takes note of what the task there is called.

    A cancel meanwhile waits ``NAME_LIMIT`` seconds for that: a task without a name could not be cancelled there.
    """
    named = trio.Event()
    patience = trio.CancelScope(shield=True)

    async def lose_patience() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(NAME_LIMIT, shield=True):
                await named.wait()
            patience.shield = False

    result: list[T] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose_patience)
            with patience:
                try:
                    result.append(await begin())
                finally:
                    named.set()
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
    return result[0]


def _pieces(part: Part) -> list[Part]:
    """A part, or a long text as several that are adjacent."""
    text = part.text
    if text is None or len(text) <= PIECE:
        return [part]
    return [msgspec.structs.replace(part, text=text[at : at + PIECE]) for at in range(0, len(text), PIECE)]


def _relay_of(ctx: Context) -> Relay:
    relay = None if ctx.resume is None else _relay_from(ctx.resume.saved)
    return relay or Relay(context_id=_context_of(ctx))


def _relay_from(saved: Any) -> Relay | None:
    try:
        return msgspec.convert(saved, Relay)
    except msgspec.ValidationError:
        return None


def _context_of(ctx: Context) -> str | None:
    contexts = ctx.state.get(STATE)
    found = contexts.get(ctx.agent_id) if isinstance(contexts, dict) else None
    return found if isinstance(found, str) else None


async def _parts_of(ctx: Context) -> list[Part]:
    """The input, or the answer to a question, as the parts of a message. Raises: RunError (``unsupported_upload``)."""
    if ctx.message is not None:
        return list(ctx.message.parts)
    content: Any = ctx.input.content if ctx.resume is None else ctx.resume.answer
    parts: list[Part] = []
    if isinstance(content, str):
        if content:
            parts.append(Part(text=content))
    else:
        parts.append(Part(data=content))
    upload = await ctx.upload()
    if upload is not None:
        if upload.size > MAX_UPLOAD:
            raise RunError("unsupported_upload", f"Another agent is sent {MAX_UPLOAD} bytes of an upload at most")
        data = bytearray()
        while len(data) < upload.size and (piece := await upload.read(len(data), upload.size - len(data))):
            data += piece
        parts.append(Part(raw=bytes(data), media_type=upload.media_type, filename=upload.name))
    return parts or [Part(text="")]
