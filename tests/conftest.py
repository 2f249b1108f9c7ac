"""For all tests: log lines as a server prints them that nobody has configured."""

from __future__ import annotations

import pytest

from hector_trio.observability import keep_tracebacks_plain


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    keep_tracebacks_plain()
