"""``hector chat``: a conversation on a terminal, or by a pipe; Ctrl-C cancels the answer, not the program."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from hector_trio.cli import ASKS, FAILED, INTERRUPTED, OK, complain, connected, hector, say, target
from hector_trio.cli.calls import ChunkPrinter, answer_or_leave, chunk_verdict, on_leaving
from hector_trio.cli.lines import Lines, open_lines
from hector_trio.cli.output import as_text, print_json, to_json, visible

if TYPE_CHECKING:
    import trio

    from hector_trio.client import ChunkStream, Client

HINT: Final = "Ctrl-D or /quit leaves; Ctrl-C during an answer cancels it"
COMMANDS: Final = "/session shows the session's id, /history the conversation, /quit leaves"


@hector.command()
@click.argument("agent")
@click.option("--session", metavar="ID", help="Go on with this session; without it, a new one is begun.")
@connected
def chat(agent: str, session: str | None) -> None:
    """Talk with AGENT, line by line.

    On a terminal Ctrl-C during an answer cancels that answer; Ctrl-D or /quit leaves. By a pipe each line of stdin is a
    turn; the answers go to stdout, everything else to stderr. When the agent asks something, the next line answers it.
    """
    import trio

    if (url := target().a2a(agent)) is not None:
        from hector_trio.cli.a2a import chat_with_agent

        code = chat_with_agent(url, session)
        if code != OK:
            raise SystemExit(code)
        return
    agent_id = target().agent(agent)
    code = trio.run(_chat, target().open(), agent_id, session)
    if code != OK:
        raise SystemExit(code)


async def _chat(client: Client, agent_id: str, session_id: str | None) -> int:
    from hector_trio.errors import SessionMismatch

    with Interrupts() as interrupts:
        async with client:
            with interrupts.scope() as beginning:
                if session_id is None:
                    session_id = (await client.create_session(agent_id)).session_id
                elif (owner := (await client.session(session_id)).agent_id) != agent_id:
                    raise SessionMismatch(f"Session {session_id} is a conversation with {owner}, not with {agent_id}")
            if beginning.cancelled_caught:
                return INTERRUPTED
            assert session_id is not None
            talk = _Talk(client, agent_id, session_id, interrupts)
            lines = open_lines()
            if lines.interactive:
                # No scope around it: a Ctrl-C that comes just after an answer's end is not meant for the program.
                return await talk.run(lines)
            with interrupts.scope():
                return await talk.run(lines)
        return INTERRUPTED


class Interrupts:
    """SIGINT while a conversation lasts: cancels the innermost scope that is open for it.

    A plain signal function, because a program started in the background has SIGINT ignored, and because nothing may be
    lost between two reads of a channel.
    """

    def __init__(self) -> None:
        self._scopes: list[trio.CancelScope] = []

    def __enter__(self) -> Interrupts:
        import trio

        token = trio.lowlevel.current_trio_token()

        def on_signal(number: int, frame: FrameType | None) -> None:
            token.run_sync_soon(self._cancel)

        self._before = signal.signal(signal.SIGINT, on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _cancel(self) -> None:
        if self._scopes:
            self._scopes[-1].cancel()

    @contextmanager
    def scope(self) -> Iterator[trio.CancelScope]:
        """What stands in it is what Ctrl-C ends."""
        import trio

        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                yield scope
            finally:
                self._scopes.remove(scope)


class _Talk:
    """One conversation: reads a line, has it answered, reads the next."""

    def __init__(self, client: Client, agent_id: str, session_id: str, interrupts: Interrupts) -> None:
        self._client = client
        self._agent_id = agent_id
        self._session_id = session_id
        self._interrupts = interrupts
        self._json = target().json

    async def run(self, lines: Lines) -> int:
        """Until the input ends. By a pipe, the code says whether a turn has failed."""
        say(f"session {self._session_id}")
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
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                with self._interrupts.scope():
                    await self._command(line.split()[0])
                continue
            turn = await self._turn(line.removeprefix("/") if line.startswith("//") else line, lines)
            code = code or turn

    async def _turn(self, prompt: str, lines: Lines) -> int:
        """What the user says and what the agent does, live. Whatever goes wrong ends the turn, not the conversation."""
        from hector_trio.errors import HectorError

        printer = ChunkPrinter()
        code = FAILED
        cancelled = False
        policy = on_leaving(lines.interactive)
        try:
            with self._interrupts.scope() as turn:
                stream = self._client.stream(self._agent_id, prompt, session_id=self._session_id, on_disconnect=policy)
                async with stream as chunks:
                    with self._interrupts.scope() as listening:
                        await self._print(chunks, printer, lines)
                    if cancelled := listening.cancelled_caught:
                        # A second Ctrl-C does not wait for what the server says to this: it hangs up.
                        await chunks.cancel()
                        await self._print(chunks, printer, lines)
                printer.end()
                if chunks.final is None:
                    return ASKS
                cancelled = cancelled and chunks.final.status == "cancelled"
                code = FAILED if cancelled else chunk_verdict(chunks.final)
            if cancelled or turn.cancelled_caught:
                printer.end()
                say("cancelled")
        except HectorError as error:
            printer.end()
            complain(error)
        return code

    async def _print(self, chunks: ChunkStream, printer: ChunkPrinter, lines: Lines) -> None:
        """To the final chunk, or to a question that nobody is there to answer."""
        async for chunk in chunks:
            if self._json:
                click.echo(to_json(chunk))
            else:
                printer.print(chunk)
            if chunks.status == "input_required":
                printer.end()
                await answer_or_leave(chunks, self._agent_id, lines)

    async def _command(self, name: str) -> None:
        if name == "/session":
            click.echo(self._session_id)
        elif name == "/history":
            await self._history()
        else:
            say(f"there is no command {name}; {COMMANDS}. Begin with // to send a line that begins with /")

    async def _history(self) -> None:
        from hector_trio.errors import HectorError

        try:
            messages = await self._client.messages(self._session_id)
        except HectorError as error:
            complain(error)
            return
        if self._json:
            print_json({"messages": messages, "total": len(messages)})
            return
        for each in messages:
            click.echo(f"{each.role}: {visible(as_text(each.content))}")
