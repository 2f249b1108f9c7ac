"""What a server of a test logs, as an operator's log has it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from hector_trio.config import Log
from hector_trio.observability import configure


class Lines:
    """The lines; complete once the block has ended."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.text.splitlines()) if line["event"] == event]


@contextmanager
def logged() -> Iterator[Lines]:
    stream = io.StringIO()
    before = structlog.get_config()
    output = configure(Log(level="debug", format="json"), stream)
    structlog.configure(cache_logger_on_first_use=False)  # else loggers keep to this beyond the test
    try:
        yield Lines(stream)
    finally:
        output.flush()
        output.close()
        configure(Log())
        structlog.configure(**before)
