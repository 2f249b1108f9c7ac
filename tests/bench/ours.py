"""The measured server: ``python -m tests.bench.ours STORE DURABILITY [quart | grpc]``. Says its port when it listens.

``quart`` switches the way past Quart off, as a user's own hook on the route does; ``grpc`` switches HTTP/2 on.
"""

from __future__ import annotations

import sys

import trio
from quart_trio import QuartTrio

from hector_trio import connection
from hector_trio.agents import Agent, AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import Limits, Log, PushSettings, Server, Settings, StoreSettings
from hector_trio.server import Tell, configure_logs, interpreter_of_a_server, limits_of, listen, open_app
from tests.bench.load import LONG, TEXT, Ticks


class Ticker:
    """Wakes all agents that wait for the next tick."""

    def __init__(self) -> None:
        self.ticks = Ticks()
        self._waiting = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        while True:
            await trio.sleep(self.ticks.until_next())
            self.ticks.count += 1
            self._waiting.unpark_all()

    async def wait_beyond(self, number: int) -> None:
        while self.ticks.count <= number:
            await self._waiting.park()


def agents(ticker: Ticker) -> dict[str, Agent]:
    async def burst(ctx: Context) -> None:
        for _ in range(int(ctx.text)):
            await ctx.emit_text(TEXT)

    async def paced(ctx: Context) -> None:
        before = ticker.ticks.count
        for number in range(before, before + int(ctx.text)):
            await ticker.wait_beyond(number)
            await ctx.emit_text(ticker.ticks.text(number + 1))

    async def idle(ctx: Context) -> None:
        for _ in range(int(ctx.text)):
            await ctx.emit_text(TEXT)
        await trio.sleep_forever()

    async def versions(ctx: Context) -> None:
        for _ in range(int(ctx.text)):
            await ctx.artifact(LONG, artifact_id="answer")

    async def asks(ctx: Context) -> None:
        await ctx.ask("Which?")

    return {
        each.__name__: FunctionAgent(AgentInfo(each.__name__, each.__name__), each)
        for each in (burst, paced, idle, versions, asks)
    }


def settings(store: str, durability: str, *, http2: bool) -> Settings:
    return Settings(
        server=Server(host=["127.0.0.1"], port=0, http2=http2),
        store=StoreSettings(url=store, durability="full" if durability == "full" else "process"),
        limits=Limits(log_bytes=1 << 30, sessions=100_000_000, running=5_000),
        push=PushSettings(allow_loopback=True),
        log=Log(level="error"),
    )


def hook(quart: QuartTrio) -> None:
    """A hook that does nothing."""

    async def nothing() -> None:
        return None

    quart.before_websocket(nothing)
    quart.before_request(nothing)


async def serve(
    store: str, durability: str, way: str = "", *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serves until cancelled; ``task_status`` is given the URLs."""
    chosen = settings(store, durability, http2=way == "grpc")
    configure_logs(chosen)
    ticker = Ticker()
    prepare = [hook] if way == "quart" else []
    with interpreter_of_a_server() as loaded:
        async with open_app(chosen, agents(ticker), prepare) as app, trio.open_nursery() as nursery:
            nursery.start_soon(ticker.run)
            loaded()
            await connection.serve(
                app,
                listen(chosen.server),
                limits=limits_of(chosen),
                shutdown=trio.sleep_forever,
                task_status=task_status,
            )


async def main(*arguments: str) -> None:
    await serve(*arguments, task_status=Tell(lambda urls: print(urls[0].rpartition(":")[2], flush=True)))


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
