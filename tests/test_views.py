"""The views of tasks: a log is folded once, whoever asks and however often, in bounded memory. Steps are counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.agents import Context
from hector_trio.config import Settings
from tests.a2a.speaking import AT_ONCE, Speaker, agent_of, state_of, text_of
from tests.serving import Served, serving, settings_of
from tests.transports.test_a2a_stream import Counting, numbers, said

LONG = 5000
"""Chunks of a log that nobody wants to fold twice."""


class Steps:
    """What was read and folded since this was made."""

    def __init__(self, served: Served) -> None:
        self._views = served.engine.views
        self._before = self._views.taken
        self.segments = 0
        store: Any = served.engine.store
        read_log = store.read_log

        async def counted(*args: Any) -> Any:
            found = await read_log(*args)
            self.segments += len(found)
            return found

        store.read_log = counted

    @property
    def chunks(self) -> int:
        return self._views.taken - self._before


async def talk(ctx: Context) -> None:
    for n in range(1, LONG + 1):
        await ctx.emit_text(f"{n} ")


@asynccontextmanager
async def started(settings: Settings, function: Any) -> AsyncIterator[tuple[Served, Speaker]]:
    async with serving(settings, agent_of(function)) as served, served.client() as client:
        yield served, Speaker(client)


def on_disk(tmp_path: Path, **sections: Any) -> Settings:
    return settings_of(
        store={"url": str(tmp_path / "hector.db")}, uploads={"path": str(tmp_path / "uploads")}, **sections
    )


async def test_what_has_ended_is_folded_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    async with started(on_disk(tmp_path), talk) as (served, speaker):
        steps = Steps(served)
        task = await speaker.send()
        assert text_of(task) == numbers(LONG)
        assert steps.chunks == LONG + 1  # as it came
        steps = Steps(served)
        assert await speaker.get(task["id"]) == task
        assert (steps.chunks, steps.segments) == (0, 0)
    async with started(on_disk(tmp_path), talk) as (served, speaker):
        steps = Steps(served)
        assert await speaker.get(task["id"]) == task
        assert steps.chunks == LONG + 1
        read = steps.segments
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(speaker.get, task["id"])
        for _ in range(3):
            listed = await speaker.ask("ListTasks", {"includeArtifacts": True})
            assert text_of(listed["tasks"][0]) == numbers(LONG)
        assert (steps.chunks, steps.segments) == (LONG + 1, read)


@pytest.mark.parametrize("kind", ["memory", "sql"])
async def test_many_who_join_a_long_stream_fold_it_once_together(tmp_path: Path, kind: str) -> None:
    counting = Counting()
    texts: list[str] = []

    async def join(client: httpx2.AsyncClient, task_id: str) -> None:
        async with Speaker(client).stream("SubscribeToTask", {"id": task_id}) as stream:
            first = await stream.next()
            assert first is not None
            assert text_of(first.value) == numbers(LONG)
            ready.release()
            events = [first, *await stream.rest()]
        assert state_of(events[-1].value) == "COMPLETED"
        texts.append(said(events))

    async with started(settings_of() if kind == "memory" else on_disk(tmp_path), counting) as (served, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        counting.say(LONG)
        row = await served.engine.find("local", "a", task["id"])
        assert row is not None
        with trio.fail_after(20):
            while served.engine.last_seq(row) < LONG:
                await trio.lowlevel.checkpoint()
        steps = Steps(served)
        ready = trio.Semaphore(0)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(join, speaker.client, task["id"])
            for _ in range(20):
                await ready.acquire()
            assert steps.chunks == LONG
            counting.say(3)
            counting.say(0)
        assert texts == [numbers(LONG + 3)] * 20
        assert steps.chunks == LONG  # what came live was nobody's to fold
        assert await speaker.get(task["id"]) is not None
        assert steps.chunks == LONG + 4


async def test_who_comes_back_to_a_long_stream_reads_what_is_new(tmp_path: Path) -> None:
    async with started(on_disk(tmp_path), talk) as (served, speaker):
        task = await speaker.send()
        steps = Steps(served)
        for place in (LONG - 2, LONG - 1, LONG):
            params = {"id": task["id"]}
            async with speaker.stream("SubscribeToTask", params, Last_Event_ID=str(place)) as stream:
                events = await stream.rest()
            assert [each.id for each in events] == [str(n) for n in range(place + 1, LONG + 2)]
            assert all(each.value["append"] for each in events if each.kind == "artifactUpdate")
        assert steps.chunks == 0
        assert steps.segments <= 3 * 2


async def test_a_get_between_two_pieces_folds_the_second_only() -> None:
    counting = Counting()
    async with started(settings_of(), counting) as (served, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        row = await served.engine.find("local", "a", task["id"])
        assert row is not None
        steps = Steps(served)
        for many in (100, 1, 1):
            counting.say(many)
            with trio.fail_after(10):
                while served.engine.last_seq(row) < counting.said or not counting.said:
                    await trio.lowlevel.checkpoint()
            got = await speaker.get(task["id"])
            assert text_of(got) == numbers(counting.said)
            assert steps.chunks == counting.said
        counting.say(0)


async def test_what_is_kept_has_a_bound_and_what_is_not_kept_is_read_again() -> None:
    limit = 200_000

    async def some(ctx: Context) -> None:
        for n in range(1, int(ctx.text) + 1):
            await ctx.emit_text(f"{n} ")

    async with started(settings_of(limits={"view_bytes": limit}), some) as (served, speaker):
        views = served.engine.views
        tasks = [await speaker.send("300") for _ in range(10)]
        assert 0 < views.size <= limit
        for _ in range(2):
            for task in tasks:
                assert await speaker.get(task["id"]) == task
                assert 0 < views.size <= limit
        last = Steps(served)
        assert await speaker.get(tasks[-1]["id"]) == tasks[-1]
        assert last.chunks == 0
        large = await speaker.send("3000")  # larger than all that may be kept together
        assert text_of(large) == numbers(3000)
        assert await speaker.get(large["id"]) == large
        assert views.size == 0
        assert await speaker.get(tasks[-1]["id"]) == tasks[-1]


async def test_one_who_gives_up_in_the_middle_leaves_the_rest_to_the_others(tmp_path: Path) -> None:
    async with started(on_disk(tmp_path), talk) as (served, speaker):
        task = await speaker.send()
    async with started(on_disk(tmp_path), talk) as (served, speaker):
        steps = Steps(served)
        engine = served.engine
        row = await engine.find("local", "a", task["id"])
        assert row is not None
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.views.of(row).read, row)
                while steps.chunks < LONG // 4:
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert steps.chunks < LONG
        assert await speaker.get(task["id"]) == task
        assert steps.chunks == LONG + 1


async def test_a_view_whose_log_may_be_gone_says_what_the_log_says(tmp_path: Path) -> None:
    async def makes(ctx: Context) -> None:
        await ctx.artifact("report", name="report")
        await ctx.emit_text("done")

    async with started(settings_of(tasks={"log_retention": 0.0}), makes) as (served, speaker):
        task = await speaker.send()
        assert [each["artifactId"] for each in task["artifacts"]][1:] == ["output"]
        with trio.fail_after(10):
            while not await served.engine.sweep():
                await trio.lowlevel.checkpoint()
        got = await speaker.get(task["id"])
        assert [each["artifactId"] for each in got["artifacts"]] == ["output"]


async def test_a_task_that_lost_its_name_is_shown_under_its_new_one() -> None:
    async with started(settings_of(), talk_little) as (_, speaker):
        body = {"taskId": "t", "input": {"content": "x"}}
        await speaker.client.post("/agents/a/tasks", json=body)
        assert (await speaker.get("t"))["id"] == "t"
        await speaker.client.post("/agents/a/tasks", json=body)
        old, new = await speaker.get("t~1"), await speaker.get("t")
        assert (old["id"], new["id"]) == ("t~1", "t")
        assert old["contextId"] == "t~1"


async def talk_little(ctx: Context) -> None:
    await ctx.emit_text("hi")
