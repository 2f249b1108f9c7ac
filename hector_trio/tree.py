"""The live tree of Trio's tasks as operators read it: connection, stream, run, model call. Only where it is enabled."""

from __future__ import annotations

import gc
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from types import CodeType
from typing import Any, Final, Literal

import trio
from msgspec import UNSET, UnsetType

from hector_trio.engine import Engine
from hector_trio.log import now_ms
from hector_trio.models import LiveNode, LiveTree, timestamp
from hector_trio.providers import ModelRequest, ModelResult, OnDelta, Provider
from hector_trio.runs import Run

KINDS: Final = frozenset(
    {"connection", "request", "sse", "websocket", "handler", "reader", "sender", "flusher", "sweeper"}
    | {"run", "engine", "writer"}
)
"""What the first word of a Trio task's name may say it is; any other task is a ``task`` with its whole name."""

LIMIT: Final = 100
"""Children of one kind that are shown below one node, unless more are asked for."""

MAX_NODES: Final = 5000
"""Nodes of one answer, whatever is asked for."""

MAX_DEPTH: Final = 48
"""How deep tasks that agents start inside tasks are followed."""

MAX_TEXT: Final = 200
"""Characters of a name or of what a task waits for: names hold what clients and agents chose."""

SLICE: Final = 100
"""Nodes that are looked at before others may run: about 3 ms."""

State = Literal["queued", "running", "finishing"]
Cancel = Literal["pending", "shielded"]

_WRAPPERS: Final = frozenset({"Together", "coroutine_wrapper", "async_generator_asend", "async_generator_athrow"})
"""What Python puts around a coroutine or generator without telling which; the garbage collector knows."""

_TRIO: Final = os.path.dirname(trio.__file__) + os.sep


class TreeWatch(trio.abc.Instrument):
    """Knows since when tasks live, and which of them wait for a model. Made by ``watch_tasks``.

    It costs a dictionary entry per living task; nothing is done when a task runs on.
    """

    def __init__(self) -> None:
        self._server = trio.lowlevel.current_task()
        self._born = {self._server: trio.current_time()}
        self._calls: dict[trio.lowlevel.Task, _Call] = {}

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._born[task] = trio.current_time()

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._born.pop(task, None)

    def provider(self, provider: Provider) -> Provider:
        """``provider``, with its calls in the tree."""
        return _Watched(provider, self._calls)

    async def tree(self, engine: Engine, limit: int = LIMIT) -> LiveTree:
        """Every task of this process, seen from its first.

        Others run while it is gathered: each node is as it was when it was looked at. Below each node at most ``limit``
        children of one kind are shown, the oldest, and in all ``MAX_NODES``; the others are counted in ``omitted``.
        """
        root = trio.lowlevel.current_root_task()
        assert root is not None
        walk = _Walk(self._server, self._born, self._calls, engine.runs, limit)
        found = await walk.node(root)
        return LiveTree(
            at=timestamp(now_ms()),
            tasks=trio.lowlevel.current_statistics().tasks_living,
            running=engine.running,
            queued=engine.queued,
            waiting_for_input=engine.waiting_for_input,
            root=found,
        )


@asynccontextmanager
async def watch_tasks() -> AsyncIterator[TreeWatch]:
    """Watches the tasks that are started from now on; the current one counts as the server."""
    watch = TreeWatch()
    trio.lowlevel.add_instrument(watch)
    try:
        yield watch
    finally:
        trio.lowlevel.remove_instrument(watch)


class _Call:
    """A model's call in flight."""

    __slots__ = ("began", "name")

    def __init__(self, name: str) -> None:
        self.name = name[:MAX_TEXT]
        self.began = trio.current_time()


class _Watched:
    """A provider whose calls are known by the task that waits for them."""

    def __init__(self, provider: Provider, calls: dict[trio.lowlevel.Task, _Call]) -> None:
        self.name = provider.name
        self._provider = provider
        self._calls = calls

    async def stream(self, request: ModelRequest, on_delta: OnDelta) -> ModelResult:
        task = trio.lowlevel.current_task()
        self._calls[task] = _Call(self.name)
        try:
            return await self._provider.stream(request, on_delta)
        finally:
            del self._calls[task]


class _Walk:
    """One look at all tasks."""

    def __init__(
        self,
        server: trio.lowlevel.Task,
        born: Mapping[trio.lowlevel.Task, float],
        calls: Mapping[trio.lowlevel.Task, _Call],
        runs: Iterable[Run],
        limit: int,
    ) -> None:
        self._server = server
        self._way = {server}
        """The server's task and those that it is in: they are shown in any case."""
        nursery = server.parent_nursery
        while nursery is not None:
            self._way.add(nursery.parent_task)
            nursery = nursery.parent_task.parent_nursery
        self._born = born
        self._calls = calls
        self._runs = {run.task: run for run in runs}
        self._limit = limit
        self._left = MAX_NODES
        self._looked_at = 0

    async def node(self, task: trio.lowlevel.Task, depth: int = 0) -> LiveNode:
        """``task`` with everything below it."""
        self._looked_at += 1
        if self._looked_at % SLICE == 0:
            await trio.lowlevel.checkpoint()
        self._left -= 1
        kind, name = ("server", "") if task is self._server else described(task.name)
        members = _children(task)
        tasks, inner = 1, task
        if kind in ("request", "websocket"):
            # One task that waits for its nursery, and in that the one of its handler: together they are one node.
            for handler in [child for child in members if child.name in ("handler", "sse")]:
                members.remove(handler)
                members += _children(handler)
                tasks, inner = tasks + 1, handler
                if handler.name == "sse":
                    kind = "sse"
        codes = awaited(inner.coro)
        age = self._age(self._born.get(task))
        state, cancel, deadline_ms = _fate(inner, asleep=_sleeps(codes))
        run = self._runs.get(task)
        if run is not None:
            state = run.state
        waits_for = waiting(codes)
        children = []
        if (call := self._calls.get(task)) is not None:
            self._left -= 1
            children.append(
                LiveNode("model call", call.name, 0, self._age(call.began), state, waits_for, deadline_ms, cancel)
            )
            waits_for = "model call"
        if run is not None and cancel is UNSET:
            deadline_ms = _ms_until(run.scope.deadline)
        if task is self._server:
            # What the engine keeps going, and the runs that outlive their connection, stand in one nursery.
            inside = {child.parent_nursery for child in members if described(child.name)[0] == "engine"}
            engine = [child for child in members if child.parent_nursery in inside]
            members = [child for child in members if child.parent_nursery not in inside]
            self._left -= 1
            below, omitted = await self._below(engine, depth + 2)
            children.append(LiveNode("engine", tasks=0, children=below, omitted=omitted))
        below, omitted = await self._below(members, depth + 1)
        return LiveNode(kind, name, tasks, age, state, waits_for, deadline_ms, cancel, children + below, omitted)

    async def _below(self, members: list[trio.lowlevel.Task], depth: int) -> tuple[list[LiveNode], dict[str, int]]:
        """The nodes of ``members``, and how many of which kind are left out."""
        nodes: list[LiveNode] = []
        omitted: Counter[str] = Counter()
        shown: Counter[str] = Counter()
        for member in sorted(members, key=lambda each: self._born.get(each, -math.inf)):
            kind, _ = described(member.name)
            full = shown[kind] >= self._limit or self._left <= 0 or depth > MAX_DEPTH
            if full and member not in self._way:
                omitted[kind] += 1
            else:
                shown[kind] += 1
                nodes.append(await self.node(member, depth))
        return nodes, dict(omitted)

    def _age(self, began: float | None) -> int | UnsetType:
        return UNSET if began is None else round((trio.current_time() - began) * 1000)


def _fate(task: trio.lowlevel.Task, *, asleep: bool) -> tuple[State, Cancel | UnsetType, int | UnsetType]:
    """Whether a cancel is on its way to ``task``, and how long it has until there will be one."""
    # Publicly, Trio tells this of the current task only. It is pinned to its minor version.
    status: Any = task._cancel_status
    if asleep:  # in a scope whose deadline is the end of the sleep
        status = status.parent
    if status is None:  # Trio's own first task
        return "running", UNSET, UNSET
    if status.effectively_cancelled:
        return "finishing", "pending", UNSET
    deadline_ms = _ms_until(status.effective_deadline())
    while status is not None:
        if status._scope._cancel_called:  # the property would cancel what is due
            return "running", "shielded", deadline_ms
        status = status.parent
    return "running", UNSET, deadline_ms


def described(name: str) -> tuple[str, str]:
    """The kind and the name of a task, from the name that Trio knows it by."""
    kind, _, rest = name.partition(" ")
    return (kind, rest[:MAX_TEXT]) if kind in KINDS else ("task", name[:MAX_TEXT])


def awaited(coroutine: Any) -> list[CodeType]:
    """What a suspended coroutine waits in, from the outside in.

    Only code, never frames: those, once made, would stay with the coroutine, and their variables with them.
    """
    codes: list[CodeType] = []
    while coroutine is not None:
        for code, inner in (("cr_code", "cr_await"), ("ag_code", "ag_await"), ("gi_code", "gi_yieldfrom")):
            if hasattr(coroutine, code):
                codes.append(getattr(coroutine, code))
                coroutine = getattr(coroutine, inner)
                break
        else:
            inside = gc.get_referents(coroutine) if type(coroutine).__name__ in _WRAPPERS else ()
            coroutine = next((each for each in inside if hasattr(each, "cr_code") or hasattr(each, "ag_code")), None)
    return codes


def waiting(codes: list[CodeType]) -> str:
    """What is waited for, by the names of functions: the one of Trio (or that parks itself), and who calls it."""
    at = len(codes)
    while at > 1 and codes[at - 1].co_filename.startswith(_TRIO):
        at -= 1
    if at in (0, len(codes)):
        return ""  # it has not begun, has ended, or is running just now
    if codes[at].co_qualname in ("wait_task_rescheduled", "ParkingLot.park"):
        at -= 1
    what, callers = codes[at].co_qualname, codes[:at]
    if what == "NurseryManager.__aexit__":
        what = "children"
    return f"{what} in {callers[-1].co_qualname}"[:MAX_TEXT] if callers else what


def _sleeps(codes: list[CodeType]) -> bool:
    return any(code.co_filename.startswith(_TRIO) and code.co_name == "sleep_until" for code in codes[-5:])


def _children(task: trio.lowlevel.Task) -> list[trio.lowlevel.Task]:
    return [child for nursery in task.child_nurseries for child in nursery.child_tasks]


def _ms_until(deadline: float) -> int | UnsetType:
    return UNSET if deadline == math.inf else round((deadline - trio.current_time()) * 1000)
