"""The real server on a free port, for tests that use it as a client would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx2
import msgspec
import trio

from hector_trio.agents import Agent
from hector_trio.config import DemoLlm, LlmAgent, Server, Settings, StoreSettings
from hector_trio.engine import Engine
from hector_trio.server import Prepare, Serving, serve
from hector_trio.transports import Services

always: list[Prepare] = []
"""What every server of a test gets: see ``either_way``."""


class Served:
    """A running server: where it is, what is behind it, and clients of it that end with it."""

    def __init__(self, serving: Serving, stop: trio.Event) -> None:
        self.url = serving.url
        self.services: Services = serving.services
        self.engine: Engine = serving.services.engine
        self.stop = stop
        """Set: the server drains and stops, as after SIGTERM."""

    @property
    def host(self) -> str:
        return self.url.split("://")[1]

    @property
    def address(self) -> tuple[str, int]:
        name, _, port = self.host.rpartition(":")
        return name, int(port)

    def client(self, **options: Any) -> httpx2.AsyncClient:
        """Waits for no answer longer than ten seconds."""
        options.setdefault("verify", False)  # loading the certificates of the world takes a tenth of a second
        return httpx2.AsyncClient(base_url=self.url, timeout=10, trust_env=False, **options)


def settings_of(**sections: Any) -> Settings:
    """Settings for a test: memory, one loopback address, any port, the demo model without pauses as ``assistant``.

    ``sections`` replace keys of the sections: ``settings_of(limits={"json_depth": 8})``.
    """
    base = Settings(
        server=Server(host=["127.0.0.1"], port=0, shutdown_grace=1),
        store=StoreSettings(url="memory"),
        llms={"demo": DemoLlm(words_per_second=0)},
        agents={"assistant": LlmAgent(llm="demo", description="The demo model")},
    )
    raw = msgspec.to_builtins(base)
    for name, keys in sections.items():
        raw[name] = {**raw[name], **keys} if isinstance(keys, dict) else keys
    return msgspec.convert(raw, Settings)


@asynccontextmanager
async def serving(
    settings: Settings | None = None, agents: Mapping[str, Agent] | None = None, *, prepare: Iterable[Prepare] = ()
) -> AsyncIterator[Served]:
    """``agents`` come in addition to the configured ones. Leaving ends the server at once."""
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        start = partial(serve, settings or settings_of(), agents, prepare=[*prepare, *always], stop=stop)
        yield Served(await nursery.start(start), stop)
        nursery.cancel_scope.cancel()
