"""For the transports' tests: both ways of a REST request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from quart.signals import request_started


@pytest.fixture(params=["direct", "quart"])
def either_rest(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs twice: with REST answered beside Quart, and through Quart, because somebody listens there."""
    if request.param == "direct":
        yield "direct"
        return
    with request_started.connected_to(listen):
        yield "quart"


async def listen(sender: Any, **_: Any) -> None:
    """Hears of requests and does nothing."""
