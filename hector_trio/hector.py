"""``Hector``: agents in a few lines of Python, served."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hector_trio.agents import Agent, AgentInfo
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import A2a, Settings, default_settings, load_file
from hector_trio.errors import ConfigError
from hector_trio.models import is_id

if TYPE_CHECKING:
    import trio

    from hector_trio.server import Prepare, SelfOpeningApp, Serving

P = TypeVar("P", bound="Prepare")
F = TypeVar("F", bound=Callable[[Any], Awaitable[None] | None])


class Hector:
    """A server of agents written in Python, and of those of a configuration file if one is given.

    ::

        app = Hector()

        @app.agent("echo", description="Says it again")
        async def echo(ctx: Context) -> None:
            await ctx.emit_text(ctx.text)

        app.run()

    ``HECTOR_*`` variables and ``config`` (a path) set everything else, as for ``hector serve``.
    """

    def __init__(self, config: str | Path | None = None) -> None:
        self._config = config
        self._agents: dict[str, Agent] = {}
        self._prepare: list[Prepare] = []

    def quart(self, function: P) -> P:
        """Has the function below called with the Quart-Trio application before it serves, to put on it what Quart
        offers: hooks, middleware (``quart.asgi_app = ...``), routes of your own.

        With a hook or a middleware that can see WebSockets, streams take Quart's way, message by message; without,
        they go beside it, which costs less.
        """
        self._prepare.append(function)
        return function

    def agent(
        self,
        agent_id: str,
        *,
        name: str | None = None,
        description: str = "",
        version: str = "1.0.0",
        metadata: dict[str, Any] | None = None,
        grace: float | None = None,
        max_grace: float | None = None,
        replies: bool = False,
        a2a: A2a | None = None,
    ) -> Callable[[F], F]:
        """Makes the function below an agent: an ``async def`` runs on Trio, a plain ``def`` in a worker thread.

        ``grace`` and ``max_grace``: seconds that its tasks go on without viewers, as under ``tasks`` in the settings.
        ``replies``: whether it may answer with a bare A2A message (``ctx.reply``). ``a2a``: what its A2A card says.

        Raises: ConfigError for an id that is taken or not one.
        """
        if not is_id(agent_id):
            raise ConfigError(f"agent id {agent_id!r}: use 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
        if agent_id in self._agents:
            raise ConfigError(f"agent id {agent_id!r} is taken")

        def register(function: F) -> F:
            info = AgentInfo(
                agent_id,
                name or agent_id,
                description or (function.__doc__ or "").strip(),
                version,
                metadata=metadata or {},
                grace=grace,
                max_grace=max_grace,
                replies=replies,
                a2a=a2a or A2a(),
            )
            self._agents[agent_id] = FunctionAgent(info, function)
            return function

        return register

    def settings(self, **server: Any) -> Settings:
        """What would be served: defaults, ``HECTOR_*``, the configuration file, and ``server`` keys over all.

        Raises: ConfigError, also for an agent that stands both in the file and in Python.
        """
        flags = {"server": server} if server else {}
        if self._config is None:
            return default_settings(os.environ, flags, need_agents=not self._agents)
        settings = load_file(str(self._config), os.environ, flags, need_agents=not self._agents)
        if twice := sorted(self._agents.keys() & settings.agents.keys()):
            raise ConfigError(f"{self._config}: agents.{twice[0]}: this agent is declared in Python too; rename one")
        return settings

    def run(self, **server: Any) -> None:
        """Serves until SIGINT or SIGTERM, and drains. ``server``: keys of the section ``server`` (``port=0``).

        Raises: ConfigError, StartError.
        """
        from hector_trio.server import announcement, configure_logs, run

        settings = self.settings(**server)
        configure_logs(settings)
        run(
            settings,
            self._agents,
            prepare=self._prepare,
            started=lambda serving: print(announcement(settings, serving), flush=True),
        )

    async def serve(
        self,
        *,
        stop: trio.Event | None = None,
        task_status: trio.TaskStatus[Serving] | None = None,
        **server: Any,
    ) -> None:
        """The same inside a running Trio loop: ``serving = await nursery.start(app.serve)``. Set ``stop`` to drain."""
        import trio

        from hector_trio.server import serve

        await serve(
            self.settings(**server),
            self._agents,
            prepare=self._prepare,
            stop=stop,
            task_status=task_status or trio.TASK_STATUS_IGNORED,
        )

    @cached_property
    def asgi(self) -> SelfOpeningApp:
        """The ASGI application, for Hypercorn's trio worker: ``hypercorn -k trio module:app.asgi``.

        Installs the connection class, as ``hector_trio.asgi`` does.
        """
        from hector_trio.server import installed

        return installed(self.settings(), self._agents, self._prepare)
