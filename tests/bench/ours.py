"""The measured server: one agent that emits as many chunks as it is asked for."""

from __future__ import annotations

import sys

from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import Limits, Server, Settings, StoreSettings
from hector_trio.server import Serving, run


async def burst(ctx: Context) -> None:
    count, size = map(int, ctx.text.split())
    text = "x" * size
    for _ in range(count):
        await ctx.emit_text(text)


def main(store: str, durability: str) -> None:
    settings = Settings(
        server=Server(host=["127.0.0.1"], port=0),
        store=StoreSettings(url=store, durability="full" if durability == "full" else "process"),
        limits=Limits(log_bytes=1 << 30),
    )

    def started(serving: Serving) -> None:
        print(serving.url.rpartition(":")[2], flush=True)

    run(settings, {"burst": FunctionAgent(AgentInfo("burst", "burst"), burst)}, started=started)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
