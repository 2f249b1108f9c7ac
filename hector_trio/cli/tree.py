"""``hector tree``: what lives in a server, as a tree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from hector_trio.cli import connected, hector, target
from hector_trio.cli.output import on_terminal, print_json, to_json, visible

if TYPE_CHECKING:
    from rich.tree import Tree

    from hector_trio.client import Client
    from hector_trio.models import LiveNode, LiveTree

INTERVAL = 1.0
"""Seconds between two looks of ``--watch``."""


@hector.command()
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.option("--limit", metavar="N", type=click.IntRange(1, 5000), help="Show N of a kind below one node.")
@connected
def tree(watch: bool, limit: int | None) -> None:
    """Show what lives in a server: connections, streams, runs, model calls, and what each waits for.

    The server's configuration must say server.debug_tree: true; where there are tokens, an admin's is needed.
    """
    import trio

    trio.run(_watch if watch else _look, target().open(), limit)


async def _look(client: Client, limit: int | None) -> None:
    async with client:
        found = await _ask(client, limit)
    if target().json:
        print_json(found)
    elif on_terminal():
        from rich.console import Console

        Console().print(_rendered(found))
    else:
        _print_lines(found)


async def _watch(client: Client, limit: int | None) -> None:
    async with client:
        if target().json:
            await _repeat(client, limit, lambda found: click.echo(to_json(found)))
        elif on_terminal():
            from rich.live import Live

            with Live(screen=True, auto_refresh=False) as live:
                await _repeat(client, limit, lambda found: live.update(_rendered(found), refresh=True))
        else:
            await _repeat(client, limit, _print_lines)


async def _repeat(client: Client, limit: int | None, show: Callable[[LiveTree], None]) -> None:
    import trio

    while True:
        show(await _ask(client, limit))
        sys.stdout.flush()
        await trio.sleep(INTERVAL)


async def _ask(client: Client, limit: int | None) -> LiveTree:
    from hector_trio.errors import NotFound

    try:
        return await client.tree(limit)
    except NotFound:
        raise NotFound("The server does not show its tree; server.debug_tree: true in its configuration does") from None


# --- how it looks -----------------------------------------------------------------------------------------------------


def _head(found: LiveTree) -> str:
    counts = f"{found.running} running, {found.queued} queued, {found.waiting_for_input} waiting for input"
    return f"{found.at}  {counts}  ({found.tasks} Trio tasks)"


def _rendered(found: LiveTree) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    def add(branch: Tree, node: LiveNode) -> None:
        text = Text(node.kind, style="bold")
        text.append(f" {visible(node.name)}" if node.name else "", style="cyan")
        text.append("".join(f"  {each}" for each in _facts(node)), style="yellow" if _stands_out(node) else "dim")
        below = branch.add(text)
        for child in node.children:
            add(below, child)
        for line in _omitted(node):
            below.add(Text(line, style="dim"))

    root = Tree(Text(_head(found)))
    add(root, found.root)
    return root


def _print_lines(found: LiveTree) -> None:
    click.echo(_head(found))
    for depth, line in _lines(found.root, 0):
        click.echo("  " * depth + line)


def _lines(node: LiveNode, depth: int) -> Iterator[tuple[int, str]]:
    yield depth, "  ".join([f"{node.kind} {visible(node.name)}".rstrip(), *_facts(node)])
    for child in node.children:
        yield from _lines(child, depth + 1)
    for line in _omitted(node):
        yield depth + 1, line


def _facts(node: LiveNode) -> Iterator[str]:
    if isinstance(node.age_ms, int):
        yield _span(node.age_ms)
    if node.state != "running":
        yield node.state
    if isinstance(node.cancel, str):
        yield f"cancel {node.cancel}"
    if isinstance(node.deadline_ms, int):
        yield f"deadline in {_span(node.deadline_ms)}"
    if node.waits_for:
        yield f"waits for {node.waits_for}"


def _omitted(node: LiveNode) -> Iterator[str]:
    for kind, count in node.omitted.items():
        yield f"… {count} more of kind {kind}"


def _stands_out(node: LiveNode) -> bool:
    return node.state != "running" or isinstance(node.cancel, str)


def _span(ms: int) -> str:
    """Milliseconds as a person reads them."""
    if abs(ms) < 1000:
        return f"{ms} ms"
    seconds = ms / 1000
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
