"""Tasks of A2A from rows alone are those that their logs add up to; what is left when a log is gone."""

from __future__ import annotations

from typing import get_args

import trio

from hector_trio.a2a import types as a2a
from hector_trio.agents import Context
from hector_trio.models import Status
from hector_trio.transports.a2a_tasks import STATES, history, task_from_row
from tests.a2a.speaking import message_of, speaking
from tests.serving import settings_of


async def many(ctx: Context) -> None:
    match ctx.text:
        case "ask":
            await ctx.ask("Which?")
        case "auth":
            await ctx.ask({"scope": "x"}, auth=True)
        case "reject":
            await ctx.reject("no")
        case "fail":
            raise RuntimeError("secret")
        case _:
            await ctx.emit_text(ctx.text)


async def test_a_row_says_the_same_as_its_log() -> None:
    async with speaking(many) as (served, speaker):
        for text in ("ask", "auth", "reject", "fail", "done"):
            task = await speaker.send(text)
            row = await served.engine.find("local", "a", task["id"])
            assert row is not None
            from_log = await speaker.get(task["id"], historyLength=0)
            from_row = a2a.encode(task_from_row(row, []))
            [listed] = (await speaker.ask("ListTasks", {"contextId": task["contextId"], "historyLength": 0}))["tasks"]
            assert a2a.encode(listed) == from_row
            assert listed["status"]["state"] == from_log["status"]["state"]
            assert listed["status"].get("message") == from_log["status"].get("message")
            assert listed["status"]["timestamp"] >= from_log["status"]["timestamp"]


async def test_a_task_that_ends_while_it_is_looked_at_has_no_output_in_its_history() -> None:
    go_on = trio.Event()

    async def says(ctx: Context) -> None:
        await go_on.wait()
        await ctx.emit_text("said")

    async with speaking(says) as (served, speaker):
        async with speaker.stream("SendStreamingMessage", message_of("say")) as stream:
            task = (await stream.until("statusUpdate", state="WORKING")).value
            row = await served.engine.find("local", "a", task["taskId"])
            assert row is not None
            go_on.set()
            await stream.rest()
        found = await history(served.engine.store, row, None)
    assert [each.parts[0].text for each in found] == ["say"]


def test_every_state_is_in_the_store() -> None:
    assert set(STATES) == set(get_args(a2a.TaskState))
    assert {status for several in STATES.values() for status, _ in several} == set(get_args(Status))


async def test_when_the_log_is_gone_the_output_is_what_is_left() -> None:
    go_on = trio.Event()

    async def makes(ctx: Context) -> None:
        await ctx.artifact("one ", name="n")
        await go_on.wait()
        await ctx.emit_text("two")

    settings = settings_of(tasks={"log_retention": 0})
    async with speaking(makes, settings=settings) as (served, speaker):
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            while not served.engine.store.statistics().commits or not next(iter(served.engine.runs)).log.committed:
                await trio.lowlevel.checkpoint()
            go_on.set()
            task_id = (await stream.rest())[0].value["id"]
        assert len((await speaker.get(task_id))["artifacts"]) == 2
        with trio.fail_after(5):
            while not await served.engine.sweep():
                await trio.lowlevel.checkpoint()
        left = await speaker.get(task_id)
        assert left["artifacts"] == [{"artifactId": "output", "parts": [{"text": "one two"}]}]
        async with speaker.stream("SubscribeToTask", {"id": task_id}, Last_Event_ID="0") as stream:
            events = await stream.rest()
        gaps = [each for each in events if "gap" in each.value.get("metadata", {})]
        assert len(gaps) == 1
