"""Streams of A2A: what they begin and end with, what a cut, a stall, a restart, a race with the end leave of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hector_trio.a2a import types as a2a
from hector_trio.a2a.cards import RESUME
from hector_trio.a2a.errors import InvalidParamsError
from hector_trio.agents import Context
from hector_trio.auth import LOCAL
from hector_trio.transports import a2a_edge
from hector_trio.transports.a2a import OPERATIONS, Caller, perform
from hector_trio.transports.a2a_stream import Place
from tests import HANG
from tests.a2a.speaking import (
    AT_ONCE,
    BINDINGS,
    Binding,
    Happened,
    Refused,
    Speaker,
    agent_of,
    echo,
    message_of,
    speaking,
    state_of,
    text_of,
)
from tests.engines import Steered
from tests.serving import serving, settings_of

both = pytest.mark.parametrize("binding", BINDINGS)


class Counting:
    """An agent that says numbers, as many as it is told, each when it is told."""

    def __init__(self) -> None:
        self.said = 0
        self.ended = trio.Event()
        self._send, self._receive = trio.open_memory_channel[int](1000)

    def say(self, count: int) -> None:
        """So many more; 0: enough."""
        self._send.send_nowait(count)

    async def __call__(self, ctx: Context) -> None:
        try:
            async for count in self._receive:
                if not count:
                    return
                for _ in range(count):
                    self.said += 1
                    await ctx.emit_text(f"{self.said} ")
        finally:
            self.ended.set()


def said(events: list[Happened]) -> str:
    """What a stream adds up to, a snapshot and what comes behind it."""
    text = ""
    for event in events:
        if event.kind == "task":
            text = text_of(event.value)
        elif event.kind == "artifactUpdate":
            new = "".join(part.get("text", "") for part in event.value["artifact"]["parts"])
            text = text + new if event.value.get("append") else new
    return text


def numbers(count: int) -> str:
    return "".join(f"{n} " for n in range(1, count + 1))


# --- what a stream is -------------------------------------------------------------------------------------------------


@both
async def test_a_stream_begins_with_the_task_and_ends_with_it(binding: Binding) -> None:
    async def works(ctx: Context) -> None:
        await ctx.emit_status("thinking")
        await ctx.emit_text("a")
        await ctx.emit_text("b")
        await ctx.emit_metadata({"tokens": 2})
        await ctx.emit_error("so so", code="careful")

    async with speaking(works, binding) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of("go")) as stream:
            first = await stream.next()
            assert first is not None
            assert first.kind == "task"
            assert [each["parts"] for each in first.value["history"]] == [[{"text": "go"}]]
            rest = await stream.rest()
        assert said([first, *rest]) == "ab"
        statuses = [each.value for each in rest if each.kind == "statusUpdate"]
        assert state_of(statuses[-1]) == "COMPLETED"
        assert all(each["taskId"] == first.value["id"] and each["contextId"] for each in statuses)
        whole = await speaker.get(first.value["id"])
        assert whole["status"] == statuses[-1]["status"]
        # everything that was not in the first event came behind it, once and in order
        places = [Place.read(each.id) for each in [first, *rest]]
        assert places == sorted(set(places))
        assert places[-1].seq == 6


@both
async def test_a_stream_that_waits_for_an_answer_ends_and_the_answers_goes_on(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.emit_text("hm ")
            await ctx.ask("Which?")
        await ctx.emit_text("that")

    async with speaking(asks, binding) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            before = await stream.rest()
        assert state_of(before[-1].value) == "INPUT_REQUIRED"
        task_id = before[0].value["id"]
        async with speaker.stream("SendStreamingMessage", message_of("x", taskId=task_id)) as stream:
            after = await stream.rest()
        assert after[0].kind == "task"
        assert state_of(after[0].value) == "WORKING"
        assert said(after) == "hm that"
        assert state_of(after[-1].value) == "COMPLETED"


@both
async def test_a_stream_goes_on_while_a_permission_is_waited_for(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("May I?", auth=True)
        await ctx.emit_text("done")

    async with speaking(asks, binding) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            first = await stream.next()
            assert first is not None
            await stream.until("statusUpdate", state="AUTH_REQUIRED")
            answer = await speaker.client.post(f"/agents/a/tasks/{first.value['id']}/input", json={"input": {}})
            assert answer.status_code == 200
            rest = await stream.rest()
        assert [state_of(each.value) for each in rest if each.kind == "statusUpdate"] == ["WORKING", "COMPLETED"]


@both
async def test_a_silent_stream_says_that_it_is_there(binding: Binding, monkeypatch: pytest.MonkeyPatch) -> None:
    assert a2a_edge.KEEP_ALIVE < 3
    monkeypatch.setattr(a2a_edge, "KEEP_ALIVE", 0.05)
    counting = Counting()
    async with speaking(counting, binding) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            await stream.next()
            with trio.fail_after(5):
                while stream.comments < 3:
                    with trio.move_on_after(0.3):
                        await stream.next()
            counting.say(0)


@both
async def test_a_stream_is_open_while_an_agent_decides_how_to_answer(
    binding: Binding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(a2a_edge, "KEEP_ALIVE", 0.05)
    decided = trio.Event()

    async def decides(ctx: Context) -> None:
        await decided.wait()
        if ctx.text == "task":
            await ctx.emit_text("a task")
        else:
            await ctx.reply("a message")

    async with speaking(decides, binding, replies=True) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of("message")) as stream:
            with trio.move_on_after(0.3):
                assert await stream.next() is None  # nothing but comments
            assert stream.comments
            decided.set()
            assert [each.kind for each in await stream.rest()] == ["message"]
        async with speaker.stream("SendStreamingMessage", message_of("task")) as stream:
            events = await stream.rest()
        assert events[0].kind == "task"
        assert said(events) == "a task"
        assert state_of((events[-1] if len(events) > 1 else events[0]).value) == "COMPLETED"


async def test_work_shows_before_the_first_word() -> None:
    counting = Counting()
    async with speaking(counting) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            first = await stream.next()
            assert first is not None
            if state_of(first.value) == "SUBMITTED":
                event = await stream.next()
                assert event is not None
                assert (event.kind, state_of(event.value), event.id) == ("statusUpdate", "WORKING", "0.1")
            counting.say(1)
            event = await stream.next()
            assert event is not None
            assert event.kind == "artifactUpdate"
            counting.say(0)


# --- subscribing ------------------------------------------------------------------------------------------------------


@both
async def test_a_subscriber_gets_the_task_as_it_is_and_misses_nothing_after(binding: Binding) -> None:
    counting = Counting()
    async with speaking(counting, binding) as (_, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        counting.say(100)
        async with speaker.stream("SubscribeToTask", {"id": task["id"]}) as stream:
            first = await stream.next()
            assert first is not None
            assert first.kind == "task"
            counting.say(100)
            counting.say(0)
            rest = await stream.rest()
        assert said([first, *rest]) == numbers(200)
        assert state_of(rest[-1].value) == "COMPLETED"


@both
async def test_many_subscribers_get_the_same_events_in_the_same_order(binding: Binding) -> None:
    counting = Counting()
    streams: list[list[Happened]] = []
    async with speaking(counting, binding) as (_, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        ready = trio.open_memory_channel[None](10)

        async def subscribe() -> None:
            async with speaker.stream("SubscribeToTask", {"id": task["id"]}) as stream:
                first = await stream.next()
                assert first is not None
                ready[0].send_nowait(None)
                streams.append([first, *await stream.rest()])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(subscribe)
            for _ in range(5):
                await ready[1].receive()
            counting.say(50)
            counting.say(0)
        assert all(said(each) == numbers(50) for each in streams)
        tails = [[(each.id, each.value) for each in stream[-51:]] for stream in streams]
        assert all(each == tails[0] for each in tails)


@both
async def test_subscribing_to_what_has_ended_or_is_not_there_is_refused(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        task = await speaker.send()
        with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
            async with speaker.stream("SubscribeToTask", {"id": task["id"]}):
                pass
        with pytest.raises(Refused, match="TASK_NOT_FOUND"):
            async with speaker.stream("SubscribeToTask", {"id": "nobody"}):
                pass


async def test_subscribing_races_with_the_end_and_sees_it_whoever_wins() -> None:
    """Whatever the moment, a subscriber is refused, or has a stream that ends with the end."""
    outcomes: set[str] = set()
    gates: dict[str, trio.Event] = {}

    async def works(ctx: Context) -> None:
        await ctx.emit_text(numbers(3))
        await gates[ctx.text].wait()

    async with speaking(works) as (_, speaker):

        async def subscribe(task_id: str) -> None:
            try:
                async with speaker.stream("SubscribeToTask", {"id": task_id}) as stream:
                    events = await stream.rest()
            except Refused as refused:
                outcomes.add(str(refused.reason))
                return
            state = events[-1].value["status"]["state"]
            assert (state, said(events)) == ("TASK_STATE_COMPLETED", numbers(3))
            outcomes.add("streamed")

        for lag in range(60):
            name = str(lag)
            gates[name] = trio.Event()
            task = await speaker.send(name, configuration=AT_ONCE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(subscribe, task["id"])
                for _ in range(lag):
                    await trio.lowlevel.checkpoint()
                gates[name].set()
    assert outcomes <= {"streamed", "UNSUPPORTED_OPERATION"}
    assert "streamed" in outcomes


# --- cuts and stalls --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("operation", ["SendStreamingMessage", "SubscribeToTask"])
async def test_cutting_a_stream_never_stops_the_task(binding: Binding, operation: str) -> None:
    counting = Counting()
    async with speaking(counting, binding) as (served, speaker):
        if operation == "SubscribeToTask":
            params = {"id": (await speaker.send(configuration=AT_ONCE))["id"]}
        else:
            params = message_of()
        async with speaker.stream(operation, params) as stream:
            first = await stream.next()
            assert first is not None
            counting.say(1)
            await stream.until("artifactUpdate")
        [log] = served.engine._logs.values()
        with trio.fail_after(5):
            while log.readers:  # the server has seen that it was left
                await trio.lowlevel.checkpoint()
        assert not counting.ended.is_set()
        counting.say(2)
        counting.say(0)
        with trio.fail_after(5):
            await counting.ended.wait()
            row = await served.engine.find("local", "a", first.value["id"])
            assert row is not None
            await served.engine.wait(row)
        assert text_of(await speaker.get(first.value["id"])) == numbers(3)


@both
async def test_leaving_a_blocking_send_does_not_stop_the_task(binding: Binding) -> None:
    steered = Steered()
    async with speaking(steered, binding) as (served, speaker):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speaker.send, "x")
            await steered.wait_started("x")
            nursery.cancel_scope.cancel()
        steered.let("x")
        await steered.wait_ended("x")
        [task] = (await speaker.ask("ListTasks"))["tasks"]
        row = await served.engine.find("local", "a", task["id"])
        assert row is not None
        with trio.fail_after(5):
            await served.engine.wait(row)
        assert text_of(await speaker.get(task["id"])) == "<x>"


async def test_a_subscriber_that_stalls_harms_nobody_and_loses_nothing() -> None:
    """It does not read while far more than any buffer holds is said; the agent and another subscriber go on."""
    filler = "x" * 4000

    async def talks(ctx: Context) -> None:
        await started.wait()
        for n in range(1_500):
            await ctx.emit_text(f"{n} {filler}\n")

    started = trio.Event()
    settings = settings_of(limits={"send_timeout": 30})
    async with speaking(talks, settings=settings) as (served, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        async with served.client() as other:
            async with speaker.stream("SubscribeToTask", {"id": task["id"]}) as stalled:
                first = await stalled.next()
                assert first is not None
                async with Speaker(other).stream("SubscribeToTask", {"id": task["id"]}) as quick:
                    started.set()
                    with trio.fail_after(HANG):
                        await quick.until("statusUpdate", state="COMPLETED")
                # the agent has ended and the other has it all; now the one that stalled reads on
                rest = await stalled.rest()
        assert state_of(rest[-1].value) == "COMPLETED"
        lines = said([first, *rest]).splitlines()
        assert [int(line.split(" ")[0]) for line in lines] == list(range(1_500))


async def test_a_stream_that_is_given_up_before_its_head_leaves_nothing_behind() -> None:
    counting = Counting()
    async with speaking(counting) as (served, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        caller = Caller(served.services, served.engine.agents["a"], LOCAL, served.url)
        for _ in range(20):
            events = await perform(caller, OPERATIONS["SubscribeToTask"], a2a.SubscribeToTaskRequest(task["id"]))
            await events.aclose()
            await events.aclose()
        [log] = served.engine._logs.values()
        assert not log.readers
        counting.say(0)


# --- resuming ---------------------------------------------------------------------------------------------------------


@both
async def test_a_stream_goes_on_behind_the_last_event_that_a_client_has(binding: Binding) -> None:
    counting = Counting()
    async with speaking(counting, binding) as (_, speaker):
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            seen = [await stream.next()]
            counting.say(10)
            for _ in range(4):
                seen.append(await stream.next())
        had = [each for each in seen if each is not None]
        counting.say(10)
        params = {"id": had[0].value["id"]}
        async with speaker.stream("SubscribeToTask", params, Last_Event_ID=had[-1].id) as stream:
            counting.say(0)
            had += await stream.rest()
        assert said(had) == numbers(20)
        places = [Place.read(each.id) for each in had]
        assert places == sorted(set(places))


@both
async def test_what_has_ended_can_be_resumed_from_any_place(binding: Binding) -> None:
    async def works(ctx: Context) -> None:
        for word in ("a", "b", "c"):
            await ctx.emit_text(word)

    async with speaking(works, binding) as (_, speaker):
        task = await speaker.send()
        async with speaker.stream("SubscribeToTask", {"id": task["id"]}, Last_Event_ID="0") as stream:
            whole = await stream.rest()
        assert [each.id for each in whole] == ["0.1", "1", "2", "3", "4"]
        assert said(whole) == "abc"
        for n, event in enumerate(whole):
            async with speaker.stream("SubscribeToTask", {"id": task["id"]}, Last_Event_ID=event.id) as stream:
                assert await stream.rest() == whole[n + 1 :]
        for wrong in ("5", "x", "-1", "1.2"):
            with pytest.raises(Refused, match="INVALID_PARAMS"):
                async with speaker.stream("SubscribeToTask", {"id": task["id"]}, Last_Event_ID=wrong):
                    pass


@both
async def test_the_extension_gives_places_and_takes_them(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        speaker.headers["A2A-Extensions"] = RESUME
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            assert stream.headers["A2A-Extensions"] == RESUME
            events = await stream.rest()
        assert all(each.value["metadata"][RESUME]["after"] == each.id for each in events)
        params = {"id": events[0].value["id"], "metadata": {RESUME: {"after": events[0].id}}}
        async with speaker.stream("SubscribeToTask", params) as stream:
            assert [each.id for each in await stream.rest()] == [each.id for each in events[1:]]


async def test_an_agent_without_the_extension_takes_no_places() -> None:
    async with speaking(echo, resume=False) as (_, speaker):
        task = await speaker.send()
        with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
            async with speaker.stream("SubscribeToTask", {"id": task["id"]}, Last_Event_ID="0"):
                pass


@both
async def test_a_restart_in_the_middle_of_a_stream_loses_nothing(binding: Binding, tmp_path: Path) -> None:
    """The server ends while a client streams; the next one gives the same events, and the end that came with it."""
    settings = settings_of(store={"url": str(tmp_path / "hector.db")}, uploads={"path": str(tmp_path / "uploads")})
    counting = Counting()
    had: list[Happened] = []
    async with serving(settings, agent_of(counting)) as served, served.client() as client:
        speaker = Speaker(client, binding=binding)
        async with speaker.stream("SendStreamingMessage", message_of("go")) as stream:
            first = await stream.next()
            assert first is not None
            had.append(first)
            counting.say(5)
            while said(had) != numbers(3):
                event = await stream.next()
                assert event is not None
                had.append(event)
    async with serving(settings, agent_of(counting)) as served, served.client() as client:
        speaker = Speaker(client, binding=binding)
        task_id = had[0].value["id"]
        async with speaker.stream("SubscribeToTask", {"id": task_id}, Last_Event_ID=had[-1].id) as stream:
            had += await stream.rest()
        assert said(had) == numbers(5)
        assert state_of(had[-1].value) == "FAILED"
        assert had[-1].value["metadata"]["code"] == "interrupted"
        task = await speaker.get(task_id)
        assert (state_of(task), text_of(task)) == ("FAILED", numbers(5))
        assert task["history"][0]["parts"] == [{"text": "go"}]


@both
async def test_everything_is_the_same_after_a_restart(binding: Binding, tmp_path: Path) -> None:
    async def works(ctx: Context) -> None:
        if ctx.resume is None:
            made = await ctx.artifact("a", name="n")
            await ctx.artifact({"b": 1}, artifact_id=made, append=True)
            await ctx.emit_text("c")
            await ctx.ask("Which?")
        assert ctx.message is not None
        await ctx.artifact(f"{ctx.message.message_id} {ctx.resume.answer}", artifact_id="said")
        await ctx.reject("no")

    settings = settings_of(store={"url": str(tmp_path / "hector.db")}, uploads={"path": str(tmp_path / "uploads")})
    async with serving(settings, agent_of(works)) as served, served.client() as client:
        waiting = await Speaker(client, binding=binding).send("go", messageId="m-1", metadata={"k": 1})
        assert state_of(waiting) == "INPUT_REQUIRED"
    async with serving(settings, agent_of(works)) as served, served.client() as client:
        speaker = Speaker(client, binding=binding)
        assert await speaker.get(waiting["id"]) == waiting
        done = await speaker.send("this", taskId=waiting["id"], messageId="m-2")
        assert state_of(done) == "REJECTED"
        assert done["artifacts"][2] == {"artifactId": "said", "parts": [{"text": "m-2 this"}]}
        async with speaker.stream("SubscribeToTask", {"id": done["id"]}, Last_Event_ID="0") as stream:
            events = await stream.rest()
    async with serving(settings, agent_of(works)) as served, served.client() as client:
        speaker = Speaker(client, binding=binding)
        assert await speaker.get(waiting["id"]) == done
        async with speaker.stream("SubscribeToTask", {"id": done["id"]}, Last_Event_ID="0") as stream:
            assert await stream.rest() == events


async def test_a_task_of_a_websocket_can_be_subscribed_to() -> None:
    from trio_websocket import open_websocket_url

    counting = Counting()
    async with speaking(counting) as (served, speaker):
        url = f"ws://{served.host}/agents/a/stream"
        async with open_websocket_url(url) as socket:
            await socket.send_message('{"taskId":"mine","input":{"content":"go"}}')
            counting.say(1)
            assert '"content":"1 "' in await socket.get_message()
            async with speaker.stream("SubscribeToTask", {"id": "mine"}) as stream:
                first = await stream.next()
                assert first is not None
                counting.say(1)
                counting.say(0)
                rest = await stream.rest()
            assert said([first, *rest]) == numbers(2)


async def test_a_task_of_a2a_can_be_attached_to_on_a_websocket() -> None:
    from trio_websocket import open_websocket_url

    counting = Counting()
    async with speaking(counting) as (served, speaker):
        task = await speaker.send(configuration=AT_ONCE)
        counting.say(2)
        async with open_websocket_url(f"ws://{served.host}/agents/a/stream") as socket:
            await socket.send_message(f'{{"type":"attach","taskId":"{task["id"]}","after":0}}')
            frames = [await socket.get_message() for _ in range(3)]
            counting.say(0)
            frames.append(await socket.get_message())
        assert '"type":"ok"' in frames[0]
        assert '"content":"1 "' in frames[1]
        assert '"final":true' in frames[3]


def test_a_place_is_a_number_and_whether_work_was_told_of() -> None:
    assert Place.read("41") == Place(41)
    assert Place.read("40.1") == Place(40, begun=True)
    assert Place(40) < Place(40, begun=True) < Place(41)
    for wrong in ("", "x", "1.0", "1.10", "9" * 30, "1\n"):
        with pytest.raises(InvalidParamsError):
            Place.read(wrong)
