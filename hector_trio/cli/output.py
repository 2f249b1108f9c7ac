"""What the client commands print: JSON for scripts, tables on a terminal, tab-separated lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from hector_trio.cli import target

# Whatever an agent says, on a terminal it must not move the cursor, change the title or forge a line: control
# characters except tab and newline are shown as a replacement character.
_UNSEEN = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def visible(text: str) -> str:
    """``text`` as it may be written to where the output goes."""
    return text.replace("\r\n", "\n").translate(_UNSEEN) if on_terminal() else text


def as_text(content: Any) -> str:
    """Content as a person reads it: text as it is, anything else as one line of JSON."""
    return content if isinstance(content, str) else to_json(content)


def to_json(value: Any) -> str:
    """One line of JSON, with the wire's names."""
    from hector_trio.models import encode

    return encode(value).decode()


def print_json(value: Any) -> None:
    """Made readable on a terminal, one line otherwise."""
    import msgspec

    text = to_json(value)
    click.echo(msgspec.json.format(text, indent=2) if on_terminal() else text)


def print_rows(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; otherwise a line per row, its cells separated by tabs."""
    if not on_terminal():
        for row in rows:
            click.echo("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(visible(cell), overflow="fold") for cell in row))
    Console().print(table)


def print_fields(value: Any) -> None:
    """A struct as JSON if that is asked for, else a line ``name: value`` for each member."""
    if target().json:
        print_json(value)
        return
    import msgspec

    for name, member in msgspec.to_builtins(value).items():
        click.echo(f"{name}: {visible(as_text(member))}")


def write(text: str) -> None:
    """A piece of a live answer, at once."""
    click.echo(visible(text), nl=False)
