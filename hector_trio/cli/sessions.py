"""``hector sessions``: list, show, create and delete conversations, and read them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from hector_trio.cli import connected, hector, target
from hector_trio.cli.calls import parse_pairs
from hector_trio.cli.output import as_text, on_terminal, print_fields, print_json, print_rows, visible

if TYPE_CHECKING:
    from hector_trio.client import Client

T = TypeVar("T")


def _ask(question: Callable[[Client], Awaitable[T]]) -> T:
    import trio

    async def ask(client: Client) -> T:
        async with client:
            return await question(client)

    return trio.run(ask, target().open())


@hector.group()
@connected
def sessions() -> None:
    """Conversations: list, show, create and delete them, and read them."""


@sessions.command(name="list")
@click.option("--agent", help="Only sessions of this agent.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Only sessions with this in their metadata.")
@connected
def list_sessions(agent: str | None, metadata: tuple[str, ...]) -> None:
    """List sessions, newest first."""
    agent_id = None if agent is None else target().agent(agent)
    for pair in metadata:
        if "=" not in pair:
            raise click.BadParameter(f"{pair!r} is not key=value", param_hint="--metadata")
    wanted = dict(pair.split("=", 1) for pair in metadata)
    found = _ask(lambda client: client.sessions(agent_id, metadata=wanted))
    if target().json:
        print_json({"sessions": found, "total": len(found)})
    else:
        print_rows(
            ("session", "agent", "created", "last activity", "metadata"),
            [
                (each.session_id, each.agent_id, each.created_at, each.last_activity_at, as_text(each.metadata))
                for each in found
            ],
        )


@sessions.command()
@click.argument("session_id", metavar="ID")
@connected
def show(session_id: str) -> None:
    """Show a session with its state and metadata."""
    print_fields(_ask(lambda client: client.session(session_id)))


@sessions.command()
@click.argument("session_id", metavar="ID")
@connected
def messages(session_id: str) -> None:
    """Print the conversation, oldest line first."""
    found = _ask(lambda client: client.messages(session_id))
    if target().json:
        print_json({"messages": found, "total": len(found)})
    elif on_terminal():
        for each in found:
            mark = " (cut)" if each.partial is True else ""
            click.echo(f"{click.style(each.role, bold=True)}{mark}: {visible(as_text(each.content))}")
    else:
        print_rows((), [(each.timestamp, each.role, as_text(each.content)) for each in found])


@sessions.command()
@click.argument("agent")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Goes into its metadata; VALUE may be JSON.")
@click.option("--ttl", metavar="S", type=click.IntRange(1), help="Seconds without use after which it ends.")
@connected
def create(agent: str, metadata: tuple[str, ...], ttl: int | None) -> None:
    """Begin a conversation with AGENT, and print its id."""
    agent_id = target().agent(agent)
    about = parse_pairs(metadata, "--metadata") or None
    made = _ask(lambda client: client.create_session(agent_id, metadata=about, ttl_seconds=ttl))
    if target().json:
        print_json(made)
    else:
        click.echo(made.session_id)


@sessions.command()
@click.argument("session_ids", metavar="ID...", nargs=-1, required=True)
@connected
def delete(session_ids: tuple[str, ...]) -> None:
    """Cancel what runs in sessions and remove them with all that belongs to them."""

    async def remove(client: Client) -> None:
        for session_id in session_ids:
            await client.delete_session(session_id)

    _ask(remove)
