"""The agent of the simulation: it does, step by step, what its input says, and tells when it began and ended."""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from random import Random
from typing import Any, Final, Protocol

import msgspec
import trio
from msgspec import Struct

from hector_trio.agents import Context
from hector_trio.errors import HectorError, RunError
from hector_trio.task import TaskRow

KINDS: Final = {
    "text": 30, "burst": 10, "pause": 30, "data": 5, "metadata": 5, "warn": 3, "state": 5, "children": 5, "bytes": 4,
    "ask": 6, "refuse": 1, "crash": 1,
}  # fmt: skip
"""What an agent may do, and how often it does."""


class Step(Struct, frozen=True, array_like=True):
    """One thing that an agent does. ``number``: how many, how large, or how many seconds."""

    kind: str
    number: float = 0


class Plan(Struct, frozen=True):
    """What a task is asked to do. ``nonce`` is in every request another, and stands in every text that it emits."""

    nonce: int
    steps: list[Step]
    cleanup: float = 0.0
    """Seconds for which the agent holds a cancel up, under a limited shield."""

    def text(self, number: int, size: int) -> str:
        return f"{self.nonce}.{number};" + "x" * size

    def picture(self, number: int, size: int) -> str:
        """As it stands in the log."""
        return b64encode(self.pixels(number, size)).decode()

    def pixels(self, number: int, size: int) -> bytes:
        return b"%d.%d;" % (self.nonce, number) + b"\0" * size

    def question(self, number: int) -> Any:
        return {"n": self.nonce, "i": number}

    @property
    def asks(self) -> bool:
        return any(step.kind == "ask" for step in self.steps)

    def expected(self) -> list[tuple[str, Any]]:
        """What a run emits that goes to its end, texts joined; steps that fail end it."""
        return self._emitted()[0]

    def fails(self) -> str | None:
        """The code with which it fails if nothing else ends it before."""
        return self._emitted()[1]

    def _emitted(self) -> tuple[list[tuple[str, Any]], str | None]:
        result: list[tuple[str, Any]] = []

        def add(kind: str, value: Any) -> None:
            if kind == "text" and result and result[-1][0] == "text":
                result[-1] = (kind, result[-1][1] + value)
            else:
                result.append((kind, value))

        for number, step in enumerate(self.steps):
            match step.kind:
                case "text":
                    add("text", self.text(number, int(step.number)))
                case "burst":
                    for each in range(int(step.number)):
                        add("text", self.text(number * 1000 + each, 8))
                case "data":
                    add("data", {"n": self.nonce, "i": number})
                case "metadata":
                    add("metadata", {"n": self.nonce, "i": number})
                case "warn":
                    add("error", f"{self.nonce}.{number}!")
                case "bytes":
                    add("data", self.picture(number, int(step.number)))
                case "ask":
                    add("metadata", {"status": "input_required", "prompt": self.question(number)})
                case "refuse":
                    return result, "planned"
                case "crash":
                    return result, "agent_error"
        return result, None


def plan_of(row: TaskRow) -> Plan:
    request = msgspec.json.decode(row.request)
    return msgspec.json.decode(request["input"]["content"], type=Plan)


class Watcher(Protocol):
    """Is told what agents do."""

    def began(self, ctx: Context, plan: Plan) -> None: ...

    def ended(self, ctx: Context, plan: Plan) -> None: ...

    def busy_seconds(self) -> float:
        """For how long the store has worked, in all."""

    def waited(self, plan: Plan, seconds: float, busy: float) -> None:
        """An emit has taken so long, while the store worked for ``busy`` seconds."""

    def resumed(self, ctx: Context, plan: Plan) -> None:
        """A run goes on behind a question."""


class PlannedAgent:
    """See ``Plan``. To be wrapped into a ``FunctionAgent``."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    async def __call__(self, ctx: Context) -> None:
        plan = msgspec.json.decode(ctx.text, type=Plan)
        self._watcher.began(ctx, plan)
        try:
            first = 0
            if ctx.resume is not None:
                self._watcher.resumed(ctx, plan)
                first = ctx.resume.saved + 1
            for number, step in list(enumerate(plan.steps))[first:]:
                await self._do(ctx, plan, number, step)
        finally:
            try:
                if plan.cleanup:
                    with trio.move_on_after(plan.cleanup, shield=True):
                        await trio.sleep_forever()
            finally:
                self._watcher.ended(ctx, plan)

    async def _do(self, ctx: Context, plan: Plan, number: int, step: Step) -> None:
        began, busy = trio.current_time(), self._watcher.busy_seconds()
        match step.kind:
            case "text":
                await ctx.emit_text(plan.text(number, int(step.number)))
            case "burst":
                for each in range(int(step.number)):
                    await ctx.emit_text(plan.text(number * 1000 + each, 8))
            case "data":
                await ctx.emit_data({"n": plan.nonce, "i": number})
            case "metadata":
                await ctx.emit_metadata({"n": plan.nonce, "i": number})
            case "warn":
                await ctx.emit_error(f"{plan.nonce}.{number}!")
            case "bytes":
                await ctx.emit_bytes(plan.pixels(number, int(step.number)), "image/x-none")
            case "ask":
                await ctx.ask(plan.question(number), saved=number)
            case "state":
                if ctx.session_id is not None:
                    with suppress(HectorError):  # the store refused, or the session is gone: it goes on without
                        await ctx.update_state({"last": plan.nonce})
                return
            case "pause":
                await trio.sleep(step.number)
                return
            case "children":
                await self._children(ctx, step.number)
                return
            case "for ever":
                await trio.sleep_forever()
            case "refuse":
                raise RunError("planned", f"{plan.nonce} was to fail")
            case "crash":
                raise ValueError(f"{plan.nonce} was to crash")
            case kind:
                raise AssertionError(kind)
        self._watcher.waited(plan, trio.current_time() - began, self._watcher.busy_seconds() - busy)

    async def _children(self, ctx: Context, seconds: float) -> None:
        """Tools side by side, in a nursery of the run's."""
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(trio.sleep, seconds * n)


def random_plan(random: Random, nonce: int) -> Plan:
    steps: list[Step] = []
    for _ in range(random.randint(0, 8)):
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        number: float = 0
        if kind == "text":
            number = random.choice((0, 1, 20, 300, 3000))
        elif kind == "bytes":
            number = random.choice((0, 10, 500))
        elif kind == "burst":
            number = random.choice((2, 10, 50))
        elif kind in ("pause", "children"):
            number = random.choice((0, 0.001, 0.05, 0.5, 3.0, 20.0))
        steps.append(Step(kind, number))
    if random.random() < 0.1:
        steps.append(Step("for ever"))
    return Plan(nonce, steps, random.choice((0.0, 0.0, 0.0, 0.01, 0.7)))
