"""What is wrong, and where: one line for each thing, with the path of the key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hector_trio.errors import ConfigError

Path = tuple[str, ...]
"""Where a value stands: keys, and ``[n]`` for the items of a list."""

WRONG: Final = object()
"""Stands for a value that could not be read or built; an issue says why."""


class Issues:
    """Collects what is wrong. ``origins`` names, for paths that do not come from ``source``, where they come from."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []
        self.origins: dict[Path, str] = {}

    def origin(self, path: Path) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.source

    def add(self, path: Path, message: str) -> None:
        where = ".".join(path).replace(".[", "[")
        self.lines.append(": ".join(part for part in (self.origin(path), where, message) if part))

    def raise_any(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


def nearest(word: str, words: Sequence[str]) -> str:
    """`` (did you mean x?)``, or nothing when no word is near."""
    import difflib

    near = difflib.get_close_matches(word.lower(), words, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
