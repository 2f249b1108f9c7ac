"""Lines that a person or a pipe gives to a command."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


class Lines(Protocol):
    """Where lines come from."""

    interactive: bool

    async def next(self) -> str | None:
        """The next line, without its end; None when there is none any more. Raises: KeyboardInterrupt, for the key."""


def open_lines() -> Lines:
    """Those of stdin, whatever it is."""
    return _PromptLines() if _on_keyboard() else _PipeLines()


def open_keyboard() -> Lines:
    """Those that a person types; none where stdin is no terminal."""
    return _PromptLines() if _on_keyboard() else _NoLines()


def _on_keyboard() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


class _NoLines:
    interactive = False

    async def next(self) -> str | None:
        return None


class _PipeLines:
    """Lines of a stdin that is no terminal.

    Waits by the event loop, not in a thread: a thread that is stuck in a read could not be ended by Ctrl-C, and
    would hold stdin's lock when the program ends.
    """

    interactive = False

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    async def next(self) -> str | None:
        import trio

        while b"\n" not in self._rest and not self._ended:
            try:
                await trio.lowlevel.wait_readable(0)
            except PermissionError:
                await trio.lowlevel.checkpoint()  # a file, which can always be read
            data = os.read(0, 1 << 16)
            self._rest += data
            self._ended = not data
        line, newline, self._rest = self._rest.partition(b"\n")
        if not line and not newline:
            return None
        return line.decode("utf-8", "replace").removesuffix("\r")


class _PromptLines:
    """Lines that a person edits, with history, while the event loop goes on: the prompt has a thread of its own."""

    interactive = True

    def __init__(self) -> None:
        self._session: PromptSession[str] | None = None

    async def next(self) -> str | None:
        import trio

        try:
            # Ctrl-C is a key here, not a signal. A signal from elsewhere counts once the line is there.
            return await trio.to_thread.run_sync(self._ask)
        except EOFError:
            return None

    def _ask(self) -> str:
        if self._session is None:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.output import create_output

            # The prompt is for people and goes where the messages for people go when stdout is not theirs.
            output = create_output(stdout=sys.stdout if sys.stdout is not None and sys.stdout.isatty() else sys.stderr)
            self._session = PromptSession("> ", output=output)
        return self._session.prompt(handle_sigint=False)
