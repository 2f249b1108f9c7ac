"""What the measured agents do on every server: the sizes asked for, the text of a chunk, the times of the ticks."""

from __future__ import annotations

import json
import time
from typing import Final

SIZE: Final = 40
"""Characters of text in a chunk, which makes about 154 bytes of JSON."""

TICK_NS: Final = 25_000_000
"""Between two chunks of a paced stream: 40 in a second."""

TEXT: Final = "x" * SIZE

LONG: Final = "x" * 4096
"""So much that the buffers of the system do not hold what a stalled reader leaves."""


def ask(count: int) -> str:
    """The request for ``count`` chunks."""
    return json.dumps({"input": {"type": "text/plain", "content": str(count)}})


class Ticks:
    """The times at which a server's ticker wakes all its paced agents.

    The chunk of a tick tells when the tick was due, not when the ticker came to it: a server whose loop is late has
    made its clients wait.
    """

    def __init__(self) -> None:
        self._start = time.monotonic_ns()
        self.count = 0
        """Ticks that have been."""

    def until_next(self) -> float:
        """Seconds, never negative: a late ticker makes up for what it has missed."""
        return max(0, self._start + (self.count + 1) * TICK_NS - time.monotonic_ns()) / 1e9

    def text(self, number: int) -> str:
        return f"@{self._start + number * TICK_NS}".ljust(SIZE, "x")
