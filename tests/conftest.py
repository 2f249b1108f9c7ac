"""For all tests: log lines as a server prints them that nobody has configured, and both ways of a stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from quart_trio import QuartTrio

from hector_trio.observability import keep_tracebacks_plain
from tests import serving


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    keep_tracebacks_plain()


@pytest.fixture(params=["direct", "quart"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs twice: with streams beside Quart, and with all that is said on them going through Quart."""
    if request.param == "direct":
        yield
        return
    serving.always.append(hooked)
    yield
    serving.always.remove(hooked)


def hooked(app: QuartTrio) -> None:
    """Makes Quart be asked about every WebSocket."""

    @app.before_websocket
    async def look() -> None:
        pass
