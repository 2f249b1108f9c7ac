"""``hector list | info | call``: who is served, and one task."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click

from hector_trio.cli import ASKS, FAILED, OK, connected, hector, say, target
from hector_trio.cli.lines import Lines, open_keyboard
from hector_trio.cli.output import as_text, print_fields, print_json, print_rows, to_json, visible, write

if TYPE_CHECKING:
    from hector_trio.client import ChunkStream, Client, TaskOptions
    from hector_trio.models import Chunk, Task


@hector.command(name="list")
@connected
def list_agents() -> None:
    """List the agents of a server."""
    import trio

    from hector_trio.models import AgentList

    async def ask(client: Client) -> AgentList:
        async with client:
            cards = await client.agents()
            return AgentList(cards, len(cards))

    found = trio.run(ask, target().open())
    if target().json:
        print_json(found)
    else:
        print_rows(
            ("agent", "name", "description"), [(each.agent_id, each.name, each.description) for each in found.agents]
        )


@hector.command()
@click.argument("agent")
@connected
def info(agent: str) -> None:
    """Show the card of AGENT."""
    import trio

    from hector_trio.models import AgentCard

    if (url := target().a2a(agent)) is not None:
        from hector_trio.cli.a2a import show_card

        show_card(url)
        return
    agent_id = target().agent(agent)

    async def ask(client: Client) -> AgentCard:
        async with client:
            return await client.agent(agent_id)

    print_fields(trio.run(ask, target().open()))


def parse_pairs(pairs: tuple[str, ...], flag: str) -> dict[str, Any]:
    """``key=value`` pairs; a value that is JSON counts as such, any other as text."""
    import msgspec

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not key=value", param_hint=flag)
        try:
            found[key] = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            found[key] = text
    return found


@hector.command()
@click.argument("agent")
@click.argument("prompt", default="-")
@click.option("--stream", is_flag=True, help="Print the answer as it comes.")
@click.option("--session", metavar="ID", help="The session that the task belongs to.")
@click.option("--timeout", metavar="S", type=click.FloatRange(0, min_open=True), help="Seconds the task may take.")
@click.option("--task-id", metavar="ID", help="The task's id; one is made up when it is left out.")
@click.option("--param", metavar="KEY=VALUE", multiple=True, help="A parameter of the task; VALUE may be JSON.")
@click.option("--answer", metavar="TASK_ID", help="PROMPT answers what this task asks, and the task goes on.")
@connected
def call(
    agent: str,
    prompt: str,
    stream: bool,
    session: str | None,
    timeout: float | None,
    task_id: str | None,
    param: tuple[str, ...],
    answer: str | None,
) -> None:
    """Have AGENT answer PROMPT; without PROMPT, or for -, what stands on stdin.

    The answer goes to stdout and nothing else does; data that the agent emits is printed as lines of JSON. With --json:
    the whole task, or, with --stream, each chunk as a line. Ctrl-C cancels the task.

    Of an A2A agent (its URL) --session is a context of its, and --json shows the answer as a task of this server.

    When the task asks something, it is answered on the terminal. Where there is none, the question and the task's id go
    to stderr, the command ends with 5, and the task waits for --answer.
    """
    import trio

    if (url := target().a2a(agent)) is not None:
        from hector_trio.cli.a2a import Request, call_agent

        if task_id is not None:
            raise click.UsageError("--task-id goes with agents of Hector only: A2A agents name their tasks themselves")
        parameters = parse_pairs(param, "--param") or None
        code = call_agent(url, Request(_prompt(prompt), session, parameters, timeout, answer), stream=stream)
        if code != OK:
            raise SystemExit(code)
        return
    agent_id = target().agent(agent)
    options: TaskOptions = {
        "session_id": session,
        "task_id": task_id,
        "timeout_seconds": timeout,
        "parameters": parse_pairs(param, "--param") or None,
    }
    if answer is not None and (stream or any(options.values())):
        raise click.UsageError("--answer goes with none of --stream, --session, --timeout, --task-id and --param")
    run = _stream if stream else partial(_run, answers=answer)
    code = trio.run(partial(run, target().open(), agent_id, _prompt(prompt), options, as_json=target().json))
    if code != OK:
        raise SystemExit(code)


def _prompt(prompt: str) -> str:
    if prompt != "-":
        # Bytes of an argument that are no UTF-8 arrive as surrogates, which JSON cannot carry.
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if sys.stdin is None:
        raise click.UsageError("There is no PROMPT, and stdin is closed")
    if sys.stdin.isatty():
        say("reading the prompt; end it with Ctrl-D")
    return sys.stdin.buffer.read().decode("utf-8", "replace")


async def _run(
    client: Client, agent_id: str, prompt: str, options: TaskOptions, *, answers: str | None, as_json: bool
) -> int:
    async with client:
        if answers is None:
            task = await client.run(agent_id, prompt, on_disconnect="cancel", **options)
        else:
            task = await client.answer(agent_id, answers, prompt)
        lines = open_keyboard()
        while task.status == "input_required" and lines.interactive:
            line = await ask_user(task.prompt, lines)
            if line is None:
                task = await client.cancel(agent_id, task.task_id)
            else:
                task = await client.answer(agent_id, task.task_id, line)
        if as_json:
            print_json(task)
        elif task.status != "input_required":
            await _print_log(client, task)
    return _task_verdict(task)


async def ask_user(question: Any, lines: Lines) -> str | None:
    """What somebody answers; None for Ctrl-D and Ctrl-C, and where nobody is."""
    say(f"the agent asks: {visible(as_text(question))}")
    try:
        return await lines.next()
    except KeyboardInterrupt:
        return None


def on_leaving(interactive: bool) -> Literal["cancel"] | None:
    """The policy of a stream: where nobody can answer a question, it has to be one that ``detach`` turns into another,
    and lets the task wait for as long as it takes."""
    return None if interactive else "cancel"


async def answer_or_leave(chunks: ChunkStream, agent_id: str, lines: Lines) -> None:
    """Answers what the task asks, or cancels it; where nobody is to be asked, leaves it waiting and says so."""
    line = await ask_user(chunks.prompt, lines)
    if line is not None:
        await chunks.answer(line)
    elif lines.interactive:
        await chunks.cancel()
    else:
        await chunks.detach()
        _say_how_to_answer(agent_id, chunks.task_id)


def _say_how_to_answer(agent_id: str, task_id: str) -> None:
    say(f'task {task_id} waits for the answer: hector call {agent_id} --answer {task_id} "..."')


async def _print_log(client: Client, task: Task) -> None:
    """All that the ended task has said; its ``output`` is only the text where there is text and data."""
    printer = ChunkPrinter()
    async with client.events(task.agent_id, task.task_id) as chunks:
        async for chunk in chunks:
            printer.print(chunk)
    printer.end()


def _task_verdict(task: Task) -> int:
    """Says on stderr how a task has ended that is not completed."""
    from msgspec import UNSET

    if task.status == "completed":
        return OK
    if task.status == "input_required":
        say(f"the agent asks: {visible(as_text(task.prompt))}")
        _say_how_to_answer(task.agent_id, task.task_id)
        return ASKS
    if task.error is not UNSET:
        say(f"task {task.status}: {visible(task.error.code)}: {visible(task.error.message)}")
    else:
        say(f"task {task.status}")
    return FAILED


async def _stream(client: Client, agent_id: str, prompt: str, options: TaskOptions, *, as_json: bool) -> int:
    printer = ChunkPrinter()
    lines = open_keyboard()
    policy = on_leaving(lines.interactive)
    async with client, client.stream(agent_id, prompt, on_disconnect=policy, **options) as chunks:
        async for chunk in chunks:
            if as_json:
                click.echo(to_json(chunk))
            else:
                printer.print(chunk)
            if chunks.status == "input_required":
                printer.end()
                await answer_or_leave(chunks, agent_id, lines)
    printer.end()
    return ASKS if chunks.final is None else chunk_verdict(chunks.final)


class ChunkPrinter:
    """Prints the chunks of an answer as they come: text as it is, data as lines of JSON, errors on stderr."""

    def __init__(self) -> None:
        self._line_open = False

    def print(self, chunk: Chunk) -> None:
        if chunk.chunk_type == "text":
            if chunk.content:
                write(chunk.content)
                self._line_open = not chunk.content.endswith("\n")
        elif chunk.chunk_type == "data":
            self.end()
            click.echo(to_json(chunk.content))
        elif chunk.chunk_type == "error" and not chunk.final:
            self.end()
            say(visible(as_text(chunk.content)))

    def end(self) -> None:
        """Ends the line that text has begun."""
        if self._line_open:
            click.echo()
            self._line_open = False


def chunk_verdict(final: Chunk) -> int:
    """Says on stderr how a stream has ended that is not completed."""
    from msgspec import UNSET

    if final.chunk_type == "error":
        code = "" if final.code is UNSET else f"{visible(final.code)}: "
        say(f"task failed: {code}{visible(as_text(final.content))}")
        return FAILED
    if final.status == "completed" or final.status is UNSET:
        return OK
    reason = "" if final.reason is UNSET else f" ({visible(final.reason)})"
    say(f"task {final.status}{reason}")
    return FAILED
