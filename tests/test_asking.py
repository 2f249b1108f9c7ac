"""A task that asks: it ends its run, waits without holding anything, and goes on with the answer, whoever brings it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hector_trio import connection
from hector_trio import server as composition
from hector_trio.agents import Context
from hector_trio.agents.function import SyncContext
from hector_trio.config import Limits, Settings, Tasks
from hector_trio.errors import Draining, NotWaiting, SessionNotFound, StoreUnavailable
from hector_trio.log import now_ms
from hector_trio.models import Content, GraceMs, Status
from hector_trio.stores import Append, Change, Idempotency, NewTask
from hector_trio.stores.memory import MemoryStore
from hector_trio.task import TaskRow, fold
from tests.engines import agent, engine_of, new_session, order, read_all, run, store_of, texts
from tests.serving import Served, serving, settings_of
from tests.sockets import connected, raw

STORES = pytest.mark.parametrize("kind", ["memory", "sql"])


async def ask_name(ctx: Context) -> None:
    if ctx.resume is None:
        await ctx.emit_text("Hello. ")
        await ctx.ask("What is your name?", saved={"asked": [1, "x"]})
    question, answer, saved = ctx.resume
    await ctx.emit_text(f"{question} {answer} {saved['asked']} {ctx.text}")


def ask_in_thread(ctx: SyncContext) -> None:
    if ctx.resume is None:
        ctx.emit_text("Hello. ")
        ctx.ask("What is your name?", saved={"asked": [1, "x"]})
    assert ctx.resume is not None
    ctx.emit_text(f"{ctx.resume.question} {ctx.resume.answer} {ctx.resume.saved['asked']} {ctx.text}")


ANSWER = Content("text/plain", "Ada")
SAID = "Hello. What is your name? Ada [1, 'x'] hi"


async def task_of(server: Served, task_id: str = "t") -> TaskRow:
    row = await server.engine.store.get_task("local", "a", task_id)
    assert row is not None
    return row


class Held:
    """Holds the commits of a store that change a task to ``status``: each waits for ``go``, and then fails with
    ``error`` if there is one."""

    def __init__(self, store: Any, status: Status, error: Exception | None = None) -> None:
        self.reached, self.go = trio.Event(), trio.Event()
        self._status, self._error = status, error
        self._append, store.append = store.append, self.append

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        if any(each.change is not None and each.change.status == self._status for each in appends):
            self.reached.set()
            await self.go.wait()
            if self._error is not None:
                raise self._error
        result: frozenset[int] = await self._append(appends)
        return result

    async def wait_reached(self) -> None:
        with trio.fail_after(5):
            await self.reached.wait()


class SlowToAppend(MemoryStore):
    seconds = 0.0

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        await trio.sleep(self.seconds)
        return await super().append(appends)


async def test_the_grace_of_a_task_that_waits_begins_when_the_next_server_is_ready(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store = SlowToAppend()
    async with engine_of(store, agent(ask_name), instance="dead") as engine:
        row = await run(engine, order("hi", on_disconnect=GraceMs(500)))
    died = NewTask("o", "a", "died", b"{}", "f", "continue", "dead", {}, now_ms())
    key = (await store.create_task(died)).task.key
    await store.append([Append(key, "dead", 1, 0, b"", Change("running"))])
    store.seconds = 2.0  # the recovery of that takes longer than the other's grace
    async with engine_of(store, agent(ask_name), instance="next") as engine:
        store.seconds = 0.0
        await trio.sleep(0.3)
        with engine.follow(row, viewer=True):
            await trio.sleep(5)
            await engine.answer(row, ANSWER)
            assert (await engine.wait(row)).status == "completed"


@STORES
async def test_who_comes_while_the_only_other_reader_leaves_reads_on_behind_the_answer(
    kind: str, tmp_path: Path
) -> None:
    async with store_of(kind, tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        row = await run(engine, order("hi"))
        with engine.follow(row):
            second = engine.follow(row)  # not entered yet: the answer's head is still being sent
        with second, trio.fail_after(5):
            assert len(await second.read()) == 2
            await engine.answer(row, ANSWER)
            seen = 2
            while more := await second.read():
                seen += len(more)
            assert seen == 4


@STORES
@pytest.mark.parametrize("function", [ask_name, ask_in_thread])
async def test_an_answer_starts_the_next_run_of_the_same_task(kind: str, function: Any, tmp_path: Path) -> None:
    async with store_of(kind, tmp_path) as store, engine_of(store, agent(function)) as engine:
        row = await run(engine, order("hi"))
        assert (row.status, row.last_seq) == ("input_required", 2)
        assert (engine.running, engine.queued, engine.waiting_for_input) == (0, 0, 1)
        stored = await store.get_task_by_key(row.key)
        assert stored is not None
        assert (stored.status, stored.question, stored.last_seq) == (row.status, row.question, row.last_seq)
        with engine.follow(row) as before, trio.fail_after(5):
            assert len(await before.read()) == 2
            accepted = await engine.answer(row, ANSWER)
            assert accepted.status == "pending"
            row = await engine.wait(row)
            lines = []
            while more := await before.read():
                lines += more
        assert row.output is not None
        assert (row.status, row.output.content) == ("completed", SAID)
        chunks = await read_all(engine, row)
        assert [chunk.seq for chunk in chunks] == [1, 2, 3, 4]
        assert len(lines) == 2  # who has read before the answer goes on reading after it
        assert chunks[1].content == {"status": "input_required", "prompt": "What is your name?"}
        assert fold(chunks).output() == row.output
        assert engine.waiting_for_input == 0
        with pytest.raises(NotWaiting):
            await engine.answer(row, ANSWER)


@STORES
async def test_a_task_that_waits_survives_a_restart_and_so_does_an_accepted_answer(kind: str, tmp_path: Path) -> None:
    async with store_of(kind, tmp_path) as store:
        async with engine_of(store, agent(ask_name)) as engine:
            row = await run(engine, order("hi"))
        async with engine_of(store, agent(ask_name), instance="next") as engine:
            assert engine.waiting_for_input == 1
            await engine.answer(row, ANSWER)
            row = await engine.wait(row)
        assert row.output is not None
        assert row.output.content == SAID


async def test_an_answer_that_was_accepted_and_not_taken_up_is_taken_up_by_the_next_start(tmp_path: Path) -> None:
    entered = trio.Event()

    async def busy(ctx: Context) -> None:
        if ctx.text == "busy":
            entered.set()
            await trio.sleep_forever()
        await ask_name(ctx)

    one = Settings(limits=Limits(running=1))
    async with store_of("sql", tmp_path) as store:
        async with engine_of(store, agent(busy), one) as engine:
            row = await run(engine, order("hi"))
            await engine.submit(order("busy"))
            await entered.wait()
            await engine.answer(row, ANSWER)
        found = await store.get_task_by_key(row.key)
        assert found is not None
        assert (found.status, found.question and found.question.answer) == ("pending", ANSWER)
        async with engine_of(store, agent(busy), one, instance="next") as engine:
            with trio.fail_after(5):
                row = await engine.wait(row)
        assert row.output is not None
        assert row.output.content == SAID


@STORES
async def test_only_one_of_many_answers_is_taken(kind: str, tmp_path: Path) -> None:
    taken: list[str] = []
    refused: list[str] = []
    async with store_of(kind, tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        row = await run(engine, order("hi"))

        async def answer(name: str) -> None:
            try:
                await engine.answer(row, Content("text/plain", name))
            except NotWaiting:
                refused.append(name)
            else:
                taken.append(name)

        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(answer, str(n))
        row = await engine.wait(row)
        assert (len(taken), len(refused)) == (1, 9)
        assert row.output is not None
        assert f" {taken[0]} " in row.output.content


@STORES
async def test_a_task_that_waits_can_be_cancelled_also_while_it_is_answered(kind: str, tmp_path: Path) -> None:
    async with store_of(kind, tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        row = await run(engine, order("hi"))
        ended = await engine.cancel(row)
        assert (ended.status, ended.output and ended.output.content) == ("cancelled", "Hello. ")
        assert [chunk.final for chunk in await read_all(engine, ended)] == [False, False, True]
        row = await run(engine, order("hi"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.answer, row, ANSWER)
            await trio.testing.wait_all_tasks_blocked()
            engine.stop([row], "requested")
        ended = await engine.wait(row)
        assert ended.status in ("cancelled", "completed")
        assert engine.waiting_for_input == 0
        assert [chunk.seq for chunk in await read_all(engine, ended)] == list(range(1, ended.last_seq + 1))


async def test_a_task_that_waits_ends_when_its_time_is_over(tmp_path: Path) -> None:
    soon = Settings(tasks=Tasks(input_timeout=0.05))
    async with store_of("sql", tmp_path) as store:
        async with engine_of(store, agent(ask_name), soon) as engine:
            row = await run(engine, order("hi"))
            with engine.follow(row, 2) as follower, trio.fail_after(5):
                assert len(await follower.read()) == 1
            row = await engine.wait(row)
            assert row.error is not None
            assert (row.status, row.error.code) == ("failed", "input_timeout")
        async with engine_of(store, agent(ask_name)) as engine:
            row = await run(engine, order("hi"))
        async with engine_of(store, agent(ask_name), soon, instance="next") as engine:  # its time ran on meanwhile
            with engine.follow(row, 2) as follower, trio.fail_after(5):
                assert len(await follower.read()) == 1


async def test_a_waiting_task_gives_its_turn_and_its_conversation_is_kept(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def converse(ctx: Context) -> None:
        seen.append([line.content for line in ctx.history])
        if ctx.text == "other":
            await ctx.emit_text("done")
        else:
            await ask_name(ctx)

    async with store_of("sql", tmp_path) as store, engine_of(store, agent(converse)) as engine:
        session = await new_session(store)
        row = await run(engine, order("hi", session=session))
        assert (await run(engine, order("other", session=session))).status == "completed"
        await engine.answer(row, ANSWER)
        row = await engine.wait(row)
        question = "What is your name?"
        assert seen == [[], ["hi", question], ["hi", question, "other", "done"]]
        page = await store.list_messages("o", session, now=row.created_at)
        assert [(line.role, line.content) for line in page.items] == [
            ("user", "hi"),
            ("agent", question),
            ("user", "other"),
            ("agent", "done"),
            ("user", "Ada"),
            ("agent", SAID),
        ]


async def test_removing_a_session_ends_what_waits_in_it(tmp_path: Path) -> None:
    async with store_of("sql", tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        session = await new_session(store)
        row = await run(engine, order("hi", session=session))
        with engine.follow(row, 2) as follower:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.delete_session, "o", session)
                with trio.fail_after(5):
                    (line,) = await follower.read()
                assert b"session_deleted" in line
                follower.close()
        assert engine.waiting_for_input == 0
        with pytest.raises(SessionNotFound):
            await engine.delete_session("o", session)


@pytest.mark.parametrize(
    ("question", "saved", "code"),
    [(object(), None, "not_json"), ("x", object(), "not_json"), ("x" * 300_000, None, "chunk_too_large")],
)
async def test_what_cannot_be_kept_fails_the_run(question: Any, saved: Any, code: str, tmp_path: Path) -> None:
    async def ask(ctx: Context) -> None:
        await ctx.ask(question, saved=saved)

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask)) as engine:
        row = await run(engine, order("hi"))
        assert row.error is not None
        assert row.error.code == code


async def test_no_more_tasks_wait_than_are_allowed(tmp_path: Path) -> None:
    two = Settings(limits=Limits(waiting_for_input=2))
    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask_name), two) as engine:
        ends = [(await run(engine, order("hi"))) for _ in range(3)]
        assert [row.status for row in ends] == ["input_required", "input_required", "failed"]
        assert ends[2].error is not None
        assert ends[2].error.code == "too_many_waiting"


async def test_what_is_open_in_the_run_is_unwound_before_the_task_waits(tmp_path: Path) -> None:
    order_of_things: list[str] = []

    async def nested(ctx: Context) -> None:
        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                order_of_things.append("child")

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child)
                await ctx.emit_text("x")
                await ctx.ask("?")
        finally:
            order_of_things.append("agent")

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(nested)) as engine:
        assert (await run(engine, order())).status == "input_required"
        assert order_of_things == ["child", "agent"]


async def test_an_ask_that_is_cancelled_first_is_cancelled(tmp_path: Path) -> None:
    async def slow(ctx: Context) -> None:
        try:
            await ctx.ask("?")
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                entered.set()
                await go.wait()

    entered, go = trio.Event(), trio.Event()
    async with store_of("sql", tmp_path) as store, engine_of(store, agent(slow)) as engine:
        row = (await engine.submit(order())).task
        await entered.wait()
        engine.stop([row], "requested")
        go.set()
        assert (await engine.wait(row)).status == "cancelled"


async def test_who_answers_does_not_take_over_what_is_detached_meanwhile(tmp_path: Path) -> None:
    go = trio.Event()

    async def ask_and_wait(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("?")
        await go.wait()

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask_and_wait)) as engine:
        async with trio.open_nursery() as starter:
            row = (await engine.submit(order(policy="cancel"), starter)).task
            await engine.wait(row)
            held = Held(store, "pending")
            async with trio.open_nursery() as nursery, trio.open_nursery() as answerer:
                nursery.start_soon(engine.answer, row, ANSWER, answerer)
                await held.wait_reached()
                await engine.detach(row)
                held.go.set()
            with trio.fail_after(5):
                while engine.waiting_for_input:
                    await trio.lowlevel.checkpoint()
            answerer.cancel_scope.cancel()
        go.set()
        assert (await engine.wait(row)).status == "completed"


async def test_an_answer_on_its_way_is_run_though_the_starter_goes_with_the_server(tmp_path: Path) -> None:
    release = trio.Event()

    async def busy(ctx: Context) -> None:
        if ctx.text == "busy":
            await release.wait()
        else:
            await ask_name(ctx)

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(busy)) as engine:
        await engine.submit(order("busy"))
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starter:
                row = (await engine.submit(order("hi", policy="cancel"), starter)).task
                await engine.wait(row)
                held = Held(store, "pending")
                nursery.start_soon(engine.answer, row, ANSWER)
                await held.wait_reached()
                nursery.start_soon(engine.drain, 5)
                await engine.drain_started.wait()
                engine.left(row)
            held.go.set()
            with trio.fail_after(5):
                while engine.waiting_for_input:
                    await trio.lowlevel.checkpoint()
                assert (await engine.wait(row)).status == "completed"
            release.set()


async def test_a_removed_session_is_there_until_an_answer_that_the_store_refused_has_ended(tmp_path: Path) -> None:
    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        session = await new_session(store)
        row = await run(engine, order("hi", session=session))
        answer = Held(store, "pending", StoreUnavailable("The disk is full"))
        end = Held(store, "cancelled")

        async def refused() -> None:
            with pytest.raises(StoreUnavailable):
                await engine.answer(row, ANSWER)

        with engine.follow(row, 2) as follower:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused)
                await answer.wait_reached()
                nursery.start_soon(engine.delete_session, "o", session)
                await trio.testing.wait_all_tasks_blocked()
                answer.go.set()
                await end.wait_reached()
                await trio.testing.wait_all_tasks_blocked()
                assert await store.get_session("o", session, now=now_ms()) is not None
                end.go.set()
                with trio.fail_after(5):
                    (line,) = await follower.read()
                assert b"session_deleted" in line
                follower.close()
        with pytest.raises(SessionNotFound):
            await engine.delete_session("o", session)


async def test_questions_that_were_answered_leave_no_timer_behind(tmp_path: Path) -> None:
    async def ask(ctx: Context) -> None:
        await ctx.ask("?")

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask)) as engine:
        row = await run(engine, order())
        for _ in range(200):
            await engine.answer(row, ANSWER)
            assert (await engine.wait(row)).status == "input_required"
        assert len(engine._timers) <= 2 + 64


@pytest.mark.parametrize("comes", ["before the drain", "after it"])
async def test_a_drain_ends_what_follows_a_task_that_waits(comes: str, tmp_path: Path) -> None:
    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        row = await run(engine, order("hi"))
        if comes == "after it":
            await engine.drain(0)
        with engine.follow(row) as follower, trio.fail_after(5):
            assert len(await follower.read()) == 2
            if comes == "before the drain":
                await engine.drain(0)
            assert await follower.read() == []
        assert isinstance(follower.failure, Draining)
        assert engine.waiting_for_input == 1


async def test_a_drain_ends_what_follows_a_task_whose_question_is_still_being_stored(tmp_path: Path) -> None:
    async with store_of("memory", tmp_path) as store, engine_of(store, agent(ask_name)) as engine:
        held = Held(store, "input_required")
        row = (await engine.submit(order("hi"))).task
        with engine.follow(row) as follower:
            async with trio.open_nursery() as nursery:
                await held.wait_reached()
                nursery.start_soon(engine.drain, 0)
                await trio.testing.wait_all_tasks_blocked()
                held.go.set()
            with trio.fail_after(5):
                while await follower.read():
                    pass
        assert isinstance(follower.failure, Draining)
        assert (await engine.wait(row)).status == "input_required"


# --- through the doors ------------------------------------------------------------------------------------------------


async def test_rest_answers_with_the_question_and_takes_the_answer() -> None:
    async with serving(agents=agent(ask_name)) as server, server.client() as client:
        asked = await client.post("/agents/a/tasks", json={"input": {"content": "hi"}, "taskId": "t"})
        assert (asked.status_code, asked.json()["status"], asked.json()["prompt"]) == (
            200,
            "input_required",
            "What is your name?",
        )
        assert (await client.get("/agents/a/tasks/t")).json() == asked.json()
        wrong = await client.post("/agents/a/tasks/t/input", json={"input": {"type": "text/plain", "content": 7}})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "invalid_request")
        done = await client.post("/agents/a/tasks/t/input", json={"input": {"content": "Ada"}})
        assert (done.status_code, done.json()["output"]["content"]) == (200, SAID)
        again = await client.post("/agents/a/tasks/t/input", json={"input": {"content": "Ada"}})
        assert (again.status_code, again.json()["code"]) == (409, "not_waiting")
        unknown = await client.post("/agents/a/tasks/u/input", json={"input": {"content": "Ada"}})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "task_not_found")


@STORES
async def test_an_answer_that_comes_again_is_none_to_the_next_question(kind: str, tmp_path: Path) -> None:
    async def twice(ctx: Context) -> None:
        saved = [] if ctx.resume is None else [*ctx.resume.saved, ctx.resume.answer]
        if len(saved) < 2:
            await ctx.ask(f"Question {len(saved)}?", saved=saved)
        await ctx.emit_text(str(saved))

    async with store_of(kind, tmp_path) as store, engine_of(store, agent(twice)) as engine:
        row = await run(engine, order())
        key = Idempotency("POST input", "k", "hash", now_ms() + 60_000)
        assert await engine.answered(row, key) is None  # what a repetition finds that comes at the same time
        first = await engine.wait(await engine.answer(row, ANSWER, None, key))
        assert (first.status, first.question.question) == ("input_required", "Question 1?")  # type: ignore[union-attr]
        with pytest.raises(NotWaiting):
            await engine.answer(row, ANSWER, None, key)
        replayed = await engine.answered(row, key)
        assert replayed is not None
        assert (await engine.wait(replayed)).status == "input_required"
        done = await engine.wait(await engine.answer(first, Content("text/plain", "Bob")))
        assert done.output == Content("text/plain", "['Ada', 'Bob']")


@pytest.mark.parametrize("store", ["memory", "hector.db"])
async def test_an_answer_can_be_repeated_safely_also_after_a_restart(store: str, tmp_path: Path) -> None:
    async def twice(ctx: Context) -> None:
        saved = [] if ctx.resume is None else [*ctx.resume.saved, ctx.resume.answer]
        if len(saved) < 2:
            await ctx.ask(f"Question {len(saved)}?", saved=saved)
        await ctx.emit_text(str(saved))

    settings = settings_of(store={"url": store if store == "memory" else str(tmp_path / store)})
    key = {"Idempotency-Key": "k"}
    path, first, second = "/agents/a/tasks/t/input", {"input": {"content": "1"}}, {"input": {"content": "2"}}
    async with serving(settings, agents=agent(twice)) as server, server.client() as client:
        await client.post("/agents/a/tasks", json={"input": {"content": "hi"}, "taskId": "t"})
        answers: list[Any] = []

        async def answer() -> None:
            answers.append(await client.post(path, json=first, headers=key))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(answer)
        assert [(each.status_code, each.json()["prompt"]) for each in answers] == [(200, "Question 1?")] * 5
        assert sum("Idempotency-Replayed" in each.headers for each in answers) == 4
        other = await client.post(path, json=second, headers=key)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
        if store == "memory":
            done = await client.post(path, json=second)
            assert done.json()["output"]["content"] == "['1', '2']"
            again = await client.post(path, json=first, headers=key)
            assert (again.status_code, again.json()) == (200, done.json())
    if store != "memory":
        async with serving(settings, agents=agent(twice)) as server, server.client() as client:
            again = await client.post(path, json=first, headers=key)
            assert (again.status_code, again.json()["prompt"]) == (200, "Question 1?")


async def test_rest_streams_what_follows_the_answer_or_is_told_where_to_look() -> None:
    async with serving(agents=agent(ask_name)) as server, server.client() as client:
        await client.post("/agents/a/tasks", json={"input": {"content": "hi"}, "taskId": "t"})
        answered = {"input": {"content": "Ada"}}
        events = {"Accept": "text/event-stream"}
        stream = await client.post("/agents/a/tasks/t/input", json=answered, headers=events)
        assert [line for line in stream.text.splitlines() if line.startswith("id:")] == ["id: 3", "id: 4"]
        await client.post("/agents/a/tasks", json={"input": {"content": "hi"}, "taskId": "u"})
        told = await client.post("/agents/a/tasks/u/input", json=answered, headers={"Prefer": "respond-async"})
        assert told.status_code == 202
        assert (await server.engine.wait(await task_of(server, "u"))).status == "completed"


async def test_the_socket_answers_the_answer_and_goes_on() -> None:
    async with serving(agents=agent(ask_name)) as server, connected(server, "a") as peer:
        await peer.ask("hi", taskId="t")
        frames = [await peer.read() for _ in range(2)]
        await peer.send({"type": "input", "taskId": "t", "input": {"type": "text/plain", "content": 7}})
        wrong = await peer.read()
        assert (wrong["type"], wrong["of"], wrong["code"], wrong["taskId"]) == (
            "error",
            "input",
            "invalid_request",
            "t",
        )
        await peer.send({"type": "input", "taskId": "t", "input": {"type": "text/plain", "content": "Ada"}})
        rest = [await peer.read() for _ in range(3)]
        said = [frame for frame in rest if frame.get("type") == "ok"]
        assert said == [{"type": "ok", "of": "input", "taskId": "t", "status": "pending", "lastSeq": 2}]
        chunks = frames + [frame for frame in rest if "seq" in frame]
        assert [chunk["seq"] for chunk in chunks] == [1, 2, 3, 4]
        await peer.send({"type": "input", "taskId": "t", "input": {"content": "Ada"}})
        assert (await peer.read())["code"] == "not_waiting"
        await peer.send({"type": "input", "taskId": "nobody", "input": {"content": "Ada"}})
        assert (await peer.read())["code"] == "task_not_found"


async def wait_status(server: Served, status: str) -> TaskRow:
    with trio.fail_after(5):
        while (row := await task_of(server)).status != status:
            await trio.lowlevel.checkpoint()
    return row


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
@pytest.mark.parametrize("policy", ["cancel", "continue", "grace"])
async def test_leaving_while_it_waits_does_what_the_policy_says(policy: str, how: str) -> None:
    async with serving(agents=agent(ask_name)) as server, connected(server, "a") as other:
        async with raw(server, "a") as peer:
            await peer.ask("hi", taskId="t", onDisconnect={"graceMs": 60} if policy == "grace" else policy)
            await peer.wait_for(b"input_required")
            await other.send({"type": "attach", "taskId": "t", "after": 2})
            assert (await other.read())["status"] == "input_required"
            await peer.leave(how)
            if policy == "cancel":
                assert (await other.read())["reason"] == "client_left"
                return
        await other.send({"type": "ping"})
        assert (await other.read())["type"] == "pong"  # it is watched by another, and goes on
        await other.send({"type": "detach", "taskId": "t"})
        assert (await other.read())["of"] == "detach"
        if policy == "grace":
            row = await wait_status(server, "cancelled")
            assert (row.status, server.engine.waiting_for_input) == ("cancelled", 0)
        else:
            assert server.engine.waiting_for_input == 1


@pytest.mark.parametrize("door", ["post", "streamed post", "answer", "socket"])
async def test_who_leaves_while_the_question_is_stored_has_left(door: str) -> None:
    async def ask(ctx: Context) -> None:
        await ctx.ask("?")

    async with serving(agents=agent(ask)) as server:
        body: dict[str, Any] = {"taskId": "t", "input": {"content": "hi"}, "onDisconnect": "cancel"}
        if door == "answer":
            async with server.client() as client:
                await client.post("/agents/a/tasks", json=body)
        held = Held(server.engine.store, "input_required")
        if door == "socket":
            async with raw(server, "a") as peer:
                await peer.send_text(json.dumps(body))
                await held.wait_reached()
        else:
            path, body = ("/tasks/t/input", {"input": body["input"]}) if door == "answer" else ("/tasks", body)
            headers = {"Accept": "text/event-stream"} if door == "streamed post" else {}
            async with server.client() as client, trio.open_nursery() as nursery:
                nursery.start_soon(partial(client.post, f"/agents/a{path}", json=body, headers=headers))
                await held.wait_reached()
                nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            while connection.statistics().connections:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        held.go.set()
        row = await wait_status(server, "cancelled")
        (*_, final) = await read_all(server.engine, row)
        assert final.reason == "client_left"
        assert server.engine.waiting_for_input == 0


@pytest.mark.parametrize("then", ["cancels everything", "leaves"])
async def test_a_task_stays_its_starters_though_its_log_could_not_be_read(then: str) -> None:
    more, go = trio.Event(), trio.Event()

    async def much(ctx: Context) -> None:
        await ctx.emit_data(0)
        await more.wait()
        for n in range(1, 100):
            await ctx.emit_data(n)
        await go.wait()
        await ctx.ask("?")

    async with serving(settings_of(limits={"tail_bytes": 1000}), agents=agent(much)) as server:
        store: Any = server.engine.store
        read_log = store.read_log

        async def refuse(*_: Any) -> Any:
            raise StoreUnavailable("The disk is full")

        async with connected(server, "a") as peer:
            await peer.ask("hi", taskId="t", window=1)
            assert (await peer.read())["seq"] == 1
            more.set()
            row = await wait_status(server, "running")
            with trio.fail_after(5):
                while server.engine.last_seq(row) < 100:
                    await trio.lowlevel.checkpoint()
            store.read_log = refuse
            await peer.send({"type": "credit", "taskId": "t", "frames": 1})
            frames = [await peer.read() for _ in range(2)]
            assert [frame.get("of") or frame["code"] for frame in frames] == ["credit", "store_unavailable"]
            store.read_log = read_log
            if then == "cancels everything":
                await peer.send({"type": "cancel"})
                assert (await peer.read())["taskIds"] == ["t"]
            else:
                go.set()
                await wait_status(server, "input_required")
        await wait_status(server, "cancelled")


async def test_a_task_that_a_socket_only_answered_can_be_detached_from_it() -> None:
    go = trio.Event()

    async def ask_and_wait(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("?")
        await go.wait()

    async with serving(agents=agent(ask_and_wait)) as server:
        async with server.client() as client:
            body = {"taskId": "t", "input": {"content": "hi"}, "onDisconnect": "cancel"}
            assert (await client.post("/agents/a/tasks", json=body)).json()["status"] == "input_required"
        async with connected(server, "a") as peer:
            for kind in ("input", "detach"):
                await peer.send({"type": kind, "taskId": "t", "input": {"content": "Ada"}})
                answer = await peer.read()
                assert (answer["type"], answer["of"]) == ("ok", kind)
        with trio.fail_after(5):
            while connection.statistics().connections:
                await trio.lowlevel.checkpoint()
        go.set()
        assert (await wait_status(server, "completed")).policy == "continue"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that do not end with a drain hold the server up for longer than any test waits."""
    monkeypatch.setattr(composition, "CLOSING_LIMIT", 60.0)


@pytest.mark.usefixtures("patient")
async def test_a_shutdown_closes_the_sockets_on_which_a_task_waits() -> None:
    async with serving(agents=agent(ask_name)) as server:
        async with connected(server, "a") as starter, connected(server, "a") as other:
            await starter.ask("hi", taskId="t", onDisconnect="cancel")
            assert [(await starter.read())["seq"] for _ in range(2)] == [1, 2]
            await other.send({"type": "attach", "taskId": "t", "after": 2})
            assert (await other.read())["status"] == "input_required"
            server.stop.set()
            for peer in (starter, other):
                refusal = await peer.read()
                assert (refusal["seq"], refusal["code"], refusal["taskId"]) == (0, "draining", "t")
                assert await peer.close_code() == 1012
        assert (await task_of(server)).status == "input_required"


@pytest.mark.usefixtures("patient")
async def test_a_shutdown_ends_the_event_streams_on_which_a_task_waits() -> None:
    async with serving(agents=agent(ask_name)) as server, server.client() as client:
        await client.post("/agents/a/tasks", json={"taskId": "t", "input": {"content": "hi"}})
        events = {"Accept": "text/event-stream"}
        async with client.stream("GET", "/agents/a/tasks/t/events", headers=events) as stream:
            server.stop.set()
            with trio.fail_after(5):
                body = (await stream.aread()).decode()
        chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
        assert [(chunk["seq"], chunk.get("code")) for chunk in chunks] == [(1, None), (2, None), (0, "draining")]
        assert body.count("id: ") == 2  # the last has none: a browser comes back where it was


@pytest.mark.usefixtures("patient")
async def test_a_shutdown_closes_a_socket_that_only_answered() -> None:
    async with serving(agents=agent(ask_name)) as server:
        async with server.client() as client:
            body = {"taskId": "t", "input": {"content": "hi"}, "onDisconnect": "cancel"}
            assert (await client.post("/agents/a/tasks", json=body)).json()["status"] == "input_required"
        async with connected(server, "a") as peer:
            await peer.send({"type": "input", "taskId": "t", "input": {"content": "Ada"}})
            assert (await peer.read())["of"] == "input"
            await wait_status(server, "completed")
            server.stop.set()
            assert await peer.close_code() == 1012


async def test_grace_of_a_waiting_task_starts_anew_after_a_restart(tmp_path: Path) -> None:
    async with store_of("sql", tmp_path) as store:
        async with engine_of(store, agent(ask_name)) as engine:
            row = (await engine.submit(order("hi", on_disconnect=GraceMs(50)))).task
            with engine.follow(row, viewer=True):
                row = await engine.wait(row)
                await engine.drain(0)
        async with engine_of(store, agent(ask_name), instance="next") as engine:
            with engine.follow(row, 2) as follower, trio.fail_after(5):
                (line,) = await follower.read()
            assert b"client_left" in line


async def test_a_cancel_of_everything_takes_what_waits_too() -> None:
    async with serving(agents=agent(ask_name)) as server, connected(server, "a") as peer:
        await peer.ask("hi", taskId="t")
        assert [(await peer.read())["seq"] for _ in range(2)] == [1, 2]
        await peer.send({"type": "cancel"})
        frames = [await peer.read(), await peer.read()]
        assert {frame.get("of") or frame["status"] for frame in frames} == {"cancel", "cancelled"}
        assert server.engine.waiting_for_input == 0


async def test_a_socket_on_which_a_task_waits_is_not_idle() -> None:
    settings = settings_of(limits={"idle_after_final": 0.01})
    async with serving(settings, agents=agent(ask_name)) as server, connected(server, "a") as peer:
        await peer.ask("hi", taskId="t")
        await peer.read()
        await peer.read()
        with trio.move_on_after(0.1):
            await peer.websocket.get_message()
            raise AssertionError("nothing was to be said")
        async with server.client() as client:
            await client.post("/agents/a/tasks/t/input", json={"input": {"content": "Ada"}})
        assert [(await peer.read())["seq"] for _ in range(2)] == [3, 4]


async def test_a_log_that_asks_twice_folds_to_what_its_row_says(tmp_path: Path) -> None:
    async def twice(ctx: Context) -> None:
        saved = [] if ctx.resume is None else [*ctx.resume.saved, ctx.resume.answer]
        await ctx.emit_text(f"{len(saved)};")
        if len(saved) < 2:
            await ctx.ask({"n": len(saved)}, saved=saved)
        await ctx.emit_text(str(saved))

    async with store_of("sql", tmp_path) as store, engine_of(store, agent(twice)) as engine:
        row = await run(engine, order())
        for n in range(2):
            assert row.question is not None
            assert row.question.question == {"n": n}
            await engine.answer(row, Content("application/json", {"a": n}))
            row = await engine.wait(row)
        chunks = await read_all(engine, row)
        assert texts(chunks) == ["0;", "1;", "2;", "[{'a': 0}, {'a': 1}]"]
        assert (fold(chunks).status, fold(chunks).output()) == (row.status, row.output)
    with sqlite3.connect(tmp_path / "hector.db") as database:
        assert database.execute("select question from bodies").fetchall() == [(None,)]
