"""What is measured: each scenario makes figures of one running server, or of one start."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Final, NamedTuple, Self

from tests.bench import a2a, cancelling, load, starting
from tests.bench.client import Client
from tests.bench.contestants import Contestant, Running, start

STREAM: Final = "/agents/{}/stream"
IDLE_STREAMS: Final = 1000
BUSY_STREAMS: Final = 100
PLAIN: Final = ("ours-memory", "ours-sqlite")
"""Contestants of the scenarios that start ``hector serve`` themselves."""
A2A: Final = ("ours-memory", "ours-sqlite", "ours-full")
WEBHOOK_STREAMS: Final = 10


class Bench:
    """What the measurements of one scenario share: the client, the sizes, the servers that go on between them."""

    def __init__(self, client: Client, scale: float) -> None:
        self.client = client
        self._scale = scale
        self._servers: dict[str, Running] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def scaled(self, amount: float, least: int = 1) -> int:
        return max(least, round(amount * self._scale))

    def server(self, contestant: Contestant) -> Running:
        """Running, and with nothing left to do; started when it is first asked for."""
        if contestant.name not in self._servers:
            self._servers[contestant.name] = self._stack.enter_context(start(contestant))
        server = self._servers[contestant.name]
        server.settle()
        return server


class Missing(Exception):
    """A contestant does not have what is to be measured."""


class Figure(NamedTuple):
    name: str
    unit: str
    better: str = "lower"
    """Or ``higher``; empty: neither."""


class Scenario(NamedTuple):
    name: str
    about: str
    figures: tuple[Figure, ...]
    measure: Callable[[Bench, Contestant], Iterable[float]]
    """One value for each figure."""
    takes: Callable[[Contestant], bool] = lambda contestant: contestant.family in ("ours", "peer", "other")
    peers: str = "peer"
    """The family that ratios refer to."""
    warm: bool = True
    """Whether a first round is thrown away."""


PIECES: Final = (Figure("rate", "pieces/s", "higher"), Figure("cpu", "us/piece"))


def _rate(found: dict[str, float], of: str) -> tuple[float, float]:
    """Per second, and microseconds of the server's CPU for each."""
    return found[of] / found["seconds"], found["cpu_seconds"] / found[of] * 1e6


def burst(streams: int) -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        count = bench.scaled(50_000 / streams, 10)
        found = bench.client.run(
            "burst", bench.server(contestant), STREAM.format("burst"), load.ask(count), streams=streams, amount=count
        )
        return _rate(found, "chunks")

    figures = Figure("rate", "chunks/s", "higher"), Figure("cpu", "us/chunk")
    return Scenario(f"burst-{streams}", f"{streams} streams, as many chunks as they can", figures, measure)


def paced(streams: int) -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        milliseconds = bench.scaled(4000, 500)
        found = bench.client.run(
            "paced",
            bench.server(contestant),
            STREAM.format("paced"),
            load.ask(1_000_000),
            streams=streams,
            amount=milliseconds,
        )
        expected = streams * found["seconds"] * 1e9 / load.TICK_NS
        cpu = found["cpu_seconds"] / found["chunks"] * 1e6
        return cpu, found["p50_ms"], found["p99_ms"], found["max_ms"], found["chunks"] / expected * 100

    figures = (
        Figure("cpu", "us/chunk"),
        Figure("p50", "ms"),
        Figure("p99", "ms"),
        Figure("max", "ms"),
        Figure("held", "%", ""),
    )
    about = (
        f"{streams} streams of 40 chunks a second, one ticker; the delay from when a tick was due to its receipt"
        " (where less than all is held, late chunks leave together: cheaper than they are)"
    )
    return Scenario(f"paced-{streams}", about, figures, measure)


def cycles() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        found = bench.client.run(
            "cycles",
            bench.server(contestant),
            STREAM.format("burst"),
            load.ask(64),
            streams=16,
            amount=bench.scaled(600, 16),
        )
        return _rate(found, "cycles")

    figures = Figure("rate", "cycles/s", "higher"), Figure("cpu", "us/cycle")
    return Scenario("cycles", "connect, upgrade, 64 chunks, close; 16 at once", figures, measure)


def rest() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        body = json.dumps({"agentId": "burst"})
        found = bench.client.run(
            "post", bench.server(contestant), "/sessions", body, streams=16, amount=bench.scaled(3000, 16)
        )
        return *_rate(found, "requests"), found["p50_ms"], found["p99_ms"]

    figures = (
        Figure("rate", "requests/s", "higher"),
        Figure("cpu", "us/request"),
        Figure("p50", "ms"),
        Figure("p99", "ms"),
    )
    about = "POST /sessions over 16 kept connections"
    return Scenario("rest", about, figures, measure)


def first(streams: int) -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        found = bench.client.run(
            "first",
            bench.server(contestant),
            STREAM.format("burst"),
            load.ask(2000),
            streams=streams,
            amount=bench.scaled(30) if streams == 1 else 1,
        )
        return found["p50_ms"], found["p99_ms"]

    about = f"from the request to the first chunk, {streams} streams started at once, each asking for 2,000"
    return Scenario(f"first-{streams}", about, (Figure("p50", "ms"), Figure("p99", "ms")), measure)


def idle() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        with start(contestant) as server:  # one of its own: memory that was used once is not given back
            bench.client.run("burst", server, STREAM.format("burst"), load.ask(10), streams=16, amount=10)
            server.settle()
            before = server.memory_kib()
            with bench.client.hold(server, STREAM.format("idle"), load.ask(1), IDLE_STREAMS):
                server.settle()
                return [(server.memory_kib() - before) / IDLE_STREAMS]

    about = f"memory of a WebSocket whose task waits; {IDLE_STREAMS:,} of them in a new server"
    return Scenario("idle", about, (Figure("memory", "KiB/stream"),), measure, warm=False)


def takes_a2a(contestant: Contestant) -> bool:
    return contestant.family == "a2a" or contestant.name in A2A


def a2a_sse(streams: int) -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        server = bench.server(contestant)
        if contestant.family == "ours":
            check_served(server, "/a2a/burst/.well-known/agent-card.json")
        count = bench.scaled(400 if streams == 1 else 50, 10)
        body = a2a.jsonrpc("SendStreamingMessage", message=a2a.message(count))
        found = bench.client.run("sse", server, "/a2a/burst", body, streams=streams, amount=count)
        return _rate(found, "pieces")

    about = f"A2A 1.0 SendStreamingMessage, {streams} at once, an artifact in pieces of {load.SIZE} characters"
    return Scenario(f"a2a-{streams}", about, PIECES, measure, takes_a2a, peers="a2a")


def a2a_grpc(streams: int) -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        count = bench.scaled(400 if streams == 1 else 50, 10)
        body, method = a2a.grpc_message("burst", count), "/lf.a2a.v1.A2AService/SendStreamingMessage"
        found = bench.client.run("grpc", bench.server(contestant), method, body, streams=streams, amount=count)
        return _rate(found, "pieces")

    about = f"the same over gRPC, {streams} at once on one connection"
    takes = lambda each: each.family in ("ours-grpc", "a2a-grpc")  # noqa: E731
    return Scenario(f"grpc-{streams}", about, PIECES, measure, takes, peers="a2a-grpc")


def webhook(seconds: int, count: int) -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        slow = bench.scaled(seconds * 1000) / 1000
        server = bench.server(contestant)
        return *a2a.told(bench.client, server, slow, WEBHOOK_STREAMS, bench.scaled(count, 4)), slow

    figures = (
        *(Figure(f"{how} {what}", unit) for how in ("alone", "told") for what, unit in (("all", "s"), ("p99", "ms"))),
        Figure("webhook", "s", ""),
    )
    about = (
        f"A2A streams of {count} pieces, 40 a second, {WEBHOOK_STREAMS} at once, alone and with a webhook that takes"
        f" {seconds} s to answer (scaled)"
    )
    return Scenario(f"webhook-{seconds}", about, figures, measure, takes_a2a, peers="a2a", warm=False)


def behind() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        return a2a.behind(bench.client, bench.server(contestant), bench.scaled(10_000, 10))

    figures = (
        *(Figure(f"task{each}", "ms") for each in ("", " cpu")),
        *(Figure(f"replay{each}", "ms", "") for each in ("", " cpu")),
        Figure("events", "", ""),
    )
    about = (
        "A2A: who joins 10,000 pieces behind is given the task, and asks again to go on from the start (replay): who"
        " cannot gives the task once more, which is one event"
    )
    return Scenario("behind", about, figures, measure, takes_a2a, peers="a2a")


def stalled() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        return a2a.stalled(bench.server(contestant), bench.scaled(3000, 10))

    about = "A2A: a stream of 3,000 versions of an artifact that is read when all have been made: what of it comes"
    figures = Figure("events", "%", "higher"), Figure("took", "ms", "")
    return Scenario("stalled", about, figures, measure, takes_a2a, peers="a2a", warm=False)


def parked() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        return a2a.parked(bench.client, contestant, bench.scaled(1000, 10))

    about = "A2A: memory of a task that waits for an answer; 1,000 of them in a new server"
    figures = Figure("PSS", "KiB/task"), Figure("RSS", "KiB/task")
    return Scenario("parked", about, figures, measure, takes_a2a, peers="a2a", warm=False)


def check_served(server: Running, path: str) -> None:
    """Raises: Missing."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}").close()
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        raise Missing(f"it answers 404 at {path}") from error


def cancel() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        return cancelling.measure(bench.client, contestant, bench.scaled(300, 6), BUSY_STREAMS)

    figures = tuple(Figure(f"{load} {each}", "ms") for load in ("idle", "busy") for each in ("p50", "p99", "max"))
    about = f"from a client's leaving to the close of the model's connection, idle and with {BUSY_STREAMS} busy streams"
    return Scenario("cancel", about, figures, measure, lambda each: each.name in PLAIN, warm=False)


def start_up() -> Scenario:
    def measure(bench: Bench, contestant: Contestant) -> Iterable[float]:
        starting.compile_package()
        took = starting.help_took(), *starting.first_answers_took(contestant.command[1])
        return [seconds * 1000 for each in took for seconds in each]

    figures = tuple(Figure(f"{what}{each}", "ms") for what in ("--help", "serve", "again") for each in ("", " cpu"))
    about = "hector --help; hector serve, until GET /agents is answered, with a new store and with the same again"
    return Scenario("start", about, figures, measure, lambda each: each.name in PLAIN)


ALL: Final = [
    burst(1),
    burst(100),
    paced(100),
    paced(250),
    cycles(),
    rest(),
    first(1),
    first(100),
    idle(),
    cancel(),
    start_up(),
    a2a_sse(1),
    a2a_sse(20),
    a2a_grpc(1),
    a2a_grpc(20),
    webhook(1, 40),
    webhook(10, 8),
    behind(),
    stalled(),
    parked(),
]
