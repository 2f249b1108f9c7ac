"""The operations of A2A, over both HTTP bindings: what each answers, and what it refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio

from hector_trio import Part
from hector_trio.a2a.mapping import content_of
from hector_trio.a2a.types import Message
from hector_trio.agents import Context
from hector_trio.config import A2aExtension, A2aSkill
from hector_trio.errors import RunError
from hector_trio.models import Content
from tests.a2a.speaking import (
    AT_ONCE,
    BINDINGS,
    Binding,
    Refused,
    Speaker,
    echo,
    message_of,
    speaking,
    state_of,
    text_of,
)
from tests.engines import Steered
from tests.serving import settings_of

both = pytest.mark.parametrize("binding", BINDINGS)

TOKENS = [
    {"name": "alice", "token": "alice-alice-alice-1"},
    {"name": "bob", "token": "bob-bob-bob-bob-bob1"},
    {"name": "eve", "token": "eve-eve-eve-eve-eve1", "role": "viewer"},
]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": "Bearer " + next(each["token"] for each in TOKENS if each["name"] == name)}


# --- sending ----------------------------------------------------------------------------------------------------------


@both
async def test_a_message_is_answered_by_the_ended_task(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        sent = message_of("Hello", messageId="mine")
        task = (await speaker.ask("SendMessage", sent))["task"]
        assert state_of(task) == "COMPLETED"
        assert task["artifacts"] == [{"artifactId": "output", "parts": [{"text": "Hello"}]}]
        assert [each["messageId"] for each in task["history"]] == ["mine"]
        assert task["history"][0]["contextId"] == task["contextId"]
        assert await speaker.get(task["id"]) == task


@both
async def test_return_immediately_does_not_wait_for_the_end(binding: Binding) -> None:
    steered = Steered()
    async with speaking(steered, binding) as (_, speaker):
        task = await speaker.send("x", configuration=AT_ONCE)
        assert state_of(task) in ("SUBMITTED", "WORKING")
        await steered.wait_started("x")
        assert state_of(await speaker.get(task["id"])) == "WORKING"
        steered.let("x")
        await steered.wait_ended("x")


@both
async def test_a_question_interrupts_and_a_message_to_the_task_answers_it(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("Which?", saved=1)
        await ctx.emit_text(f"{ctx.resume.answer}!")

    async with speaking(asks, binding) as (_, speaker):
        task = await speaker.send("go", messageId="m-1")
        assert state_of(task) == "INPUT_REQUIRED"
        asked = task["status"]["message"]
        assert asked["parts"] == [{"text": "Which?"}]
        assert asked["role"] == "ROLE_AGENT"
        done = await speaker.send("that one", taskId=task["id"], messageId="m-2")
        assert (state_of(done), text_of(done), done["id"]) == ("COMPLETED", "that one!", task["id"])
        assert done["contextId"] == task["contextId"]  # inferred (3.4.3)
        assert [each["messageId"] for each in done["history"]] == ["m-1", asked["messageId"], "m-2"]


@both
async def test_a_permission_is_asked_for_and_shows_on_both_faces(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("May I?", auth=True)
        await ctx.emit_text("done")

    async with speaking(asks, binding) as (_, speaker):
        task = await speaker.send()
        assert state_of(task) == "AUTH_REQUIRED"
        assert task["status"]["message"]["parts"] == [{"text": "May I?"}]
        seed = (await speaker.client.get(f"/agents/a/tasks/{task['id']}")).json()
        assert (seed["status"], seed["metadata"]["reason"], seed["prompt"]) == ("input_required", "auth", "May I?")
        chunks = (await speaker.client.get(f"/agents/a/tasks/{task['id']}/events")).json()["chunks"]
        assert chunks[0]["content"] == {"status": "input_required", "prompt": "May I?", "reason": "auth"}
        listed = await speaker.ask("ListTasks", {"status": "TASK_STATE_AUTH_REQUIRED"})
        assert [each["id"] for each in listed["tasks"]] == [task["id"]]
        assert (await speaker.ask("ListTasks", {"status": "TASK_STATE_INPUT_REQUIRED"}))["totalSize"] == 0
        assert state_of(await speaker.send("yes", taskId=task["id"])) == "COMPLETED"


@both
async def test_a_rejection_is_a_state_of_its_own(binding: Binding) -> None:
    async def rejects(ctx: Context) -> None:
        await ctx.reject("not on Sundays")

    async with speaking(rejects, binding) as (_, speaker):
        task = await speaker.send()
        assert state_of(task) == "REJECTED"
        assert task["status"]["message"]["parts"] == [{"text": "not on Sundays"}]
        seed = (await speaker.client.get(f"/agents/a/tasks/{task['id']}")).json()
        assert (seed["status"], seed["error"]["code"]) == ("failed", "rejected")
        assert (await speaker.ask("ListTasks", {"status": "TASK_STATE_FAILED"}))["totalSize"] == 0
        assert (await speaker.ask("ListTasks", {"status": "TASK_STATE_REJECTED"}))["totalSize"] == 1


@both
async def test_a_failure_says_what_failed(binding: Binding) -> None:
    async def fails(ctx: Context) -> None:
        await ctx.emit_text("half")
        raise RunError("out_of_stock", "Nothing left")

    async with speaking(fails, binding) as (_, speaker):
        task = await speaker.send()
        assert (state_of(task), text_of(task)) == ("FAILED", "half")
        assert task["status"]["message"]["parts"] == [{"text": "Nothing left"}]


@both
async def test_a_bare_message_answers_without_a_task(binding: Binding) -> None:
    async def replies(ctx: Context) -> None:
        await ctx.reply("Just this", {"n": 1})

    async with speaking(replies, binding, replies=True) as (_, speaker):
        for configuration in (None, AT_ONCE):  # which has no effect then (3.2.2)
            message = (await speaker.send(configuration=configuration))["message"]
            assert message["parts"] == [{"text": "Just this"}, {"data": {"n": 1}}]
            assert message["role"] == "ROLE_AGENT"
            assert message["contextId"]
            assert "taskId" not in message
        assert (await speaker.ask("ListTasks"))["tasks"] == []
        async with speaker.stream("SendStreamingMessage", message_of()) as stream:
            assert [each.kind for each in await stream.rest()] == ["message"]


async def test_an_agent_that_has_not_declared_replies_fails_loudly() -> None:
    async def replies(ctx: Context) -> None:
        await ctx.reply("x")

    async with speaking(replies) as (_, speaker):
        task = await speaker.send()
        assert state_of(task) == "FAILED"
        assert "replies=True" in task["status"]["message"]["parts"][0]["text"]


@both
async def test_artifacts_come_back_as_they_were_made(binding: Binding) -> None:
    async def makes(ctx: Context) -> None:
        made = await ctx.artifact("one ", name="report", description="A report", metadata={"k": 1})
        await ctx.artifact("two", {"x": [1, None]}, artifact_id=made, append=True, last=True)
        await ctx.artifact(Part(raw=b"\x00\x01", filename="a.bin", media_type="application/x-bin", metadata={"p": 2}))
        await ctx.artifact(Part(url="https://example.com/f", filename="f", media_type="text/csv"), artifact_id="u")
        await ctx.emit_data(None)

    async with speaking(makes, binding) as (_, speaker):
        task = await speaker.send()
        report, file, url, output = task["artifacts"]
        assert report["parts"] == [{"text": "one two"}, {"data": {"x": [1, None]}}]
        assert (report["name"], report["description"], report["metadata"]) == ("report", "A report", {"k": 1})
        assert file["parts"] == [
            {"raw": "AAE=", "filename": "a.bin", "mediaType": "application/x-bin", "metadata": {"p": 2}}
        ]
        assert url == {
            "artifactId": "u",
            "parts": [{"url": "https://example.com/f", "filename": "f", "mediaType": "text/csv"}],
        }
        assert output == {"artifactId": "output", "parts": [{"data": None}]}
        assert await speaker.get(task["id"]) == task


@both
async def test_text_and_data_without_an_artifact_are_one_in_their_order(binding: Binding) -> None:
    async def works(ctx: Context) -> None:
        for value in ("a", "b", {"c": 1}, "d"):
            await (ctx.emit_text(value) if isinstance(value, str) else ctx.emit_data(value))

    async with speaking(works, binding) as (_, speaker):
        task = await speaker.send()
        assert task["artifacts"] == [
            {"artifactId": "output", "parts": [{"text": "ab"}, {"data": {"c": 1}}, {"text": "d"}]}
        ]
        async with speaker.stream("SubscribeToTask", {"id": task["id"]}, Last_Event_ID="0") as stream:
            updates = [event.value for event in await stream.rest() if event.kind == "artifactUpdate"]
        assert [update.get("append", False) for update in updates] == [False, True, True, True]


@both
async def test_what_the_agent_does_not_take_is_refused(binding: Binding) -> None:
    async with speaking(echo, binding, input_modes=["text/*"]) as (_, speaker):
        refused: list[Any] = [{"raw": "AAE=", "mediaType": "image/png"}, {"data": {}}, {"url": "https://x"}]
        for part in refused:
            with pytest.raises(Refused, match="CONTENT_TYPE_NOT_SUPPORTED"):
                await speaker.ask("SendMessage", message_of(parts=[part]))
        assert text_of(await speaker.send(parts=[{"text": "a,b", "mediaType": "text/csv; header=absent"}])) == "a,b"


@both
async def test_an_agent_sees_all_parts_of_a_message(binding: Binding) -> None:
    seen: list[Any] = []

    async def looks(ctx: Context) -> None:
        assert ctx.message is not None
        seen.extend([ctx.text, ctx.message.parts, ctx.message.metadata])

    parts = [{"text": "look"}, {"data": {"a": 1}}]
    async with speaking(looks, binding) as (_, speaker):
        await speaker.ask("SendMessage", message_of(parts=parts, metadata={"why": "so"}))
        assert seen == ['look\n{"a":1}', [Part(text="look"), Part(data={"a": 1})], {"why": "so"}]


@both
async def test_a_context_is_a_session_and_keeps_the_conversation(binding: Binding) -> None:
    async def remembers(ctx: Context) -> None:
        await ctx.emit_text(" / ".join(str(line.content) for line in ctx.history))

    async with speaking(remembers, binding) as (_, speaker):
        first = await speaker.send("one")
        context = first["contextId"]
        second = await speaker.send("two", contextId=context)
        assert second["contextId"] == context
        assert second["id"] != first["id"]
        assert text_of(await speaker.send("three", contextId=context)) == "one / two / one"
        session = (await speaker.client.get(f"/sessions/{context}")).json()
        assert session["agentId"] == "a"
        listed = await speaker.ask("ListTasks", {"contextId": context})
        assert listed["totalSize"] == 3


@both
async def test_a_context_that_a_client_names_is_kept(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        assert (await speaker.send(contextId="mine"))["contextId"] == "mine"
        with pytest.raises(Refused, match="INVALID_PARAMS") as refused:
            await speaker.send(contextId="not an id!")
        assert refused.value.fields == ["message.contextId"]


@both
async def test_a_message_whose_context_is_not_its_tasks_is_refused(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        await ctx.ask("?")

    async with speaking(asks, binding) as (_, speaker):
        task = await speaker.send()
        with pytest.raises(Refused, match="INVALID_PARAMS"):
            await speaker.send(taskId=task["id"], contextId="another")
        assert state_of(await speaker.get(task["id"])) == "INPUT_REQUIRED"
        assert state_of(await speaker.send(taskId=task["id"], contextId=task["contextId"])) == "INPUT_REQUIRED"


@both
async def test_a_message_to_a_task_that_is_not_there_or_has_ended_is_refused(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        for unknown in ("nobody", "no/such", "x" * 500):
            with pytest.raises(Refused, match="TASK_NOT_FOUND"):
                await speaker.send(taskId=unknown)
        task = await speaker.send()
        with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
            await speaker.send(taskId=task["id"])


@both
async def test_a_message_to_a_task_that_works_is_refused(binding: Binding) -> None:
    steered = Steered()
    async with speaking(steered, binding) as (_, speaker):
        task = await speaker.send("x", configuration=AT_ONCE)
        await steered.wait_started("x")
        with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
            await speaker.send("and this", taskId=task["id"])
        steered.let("x")


@both
async def test_the_same_answer_again_answers_once(binding: Binding) -> None:
    runs: list[str] = []

    async def asks(ctx: Context) -> None:
        runs.append(ctx.text)
        if ctx.resume is None:
            await ctx.ask("?")
        await ctx.emit_text("ok")

    async with speaking(asks, binding) as (_, speaker):
        task = await speaker.send()
        answer = {"taskId": task["id"], "messageId": "again"}
        first = await speaker.send("yes", **answer)
        assert await speaker.send("yes", **answer) == first
        assert len(runs) == 2
        with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
            await speaker.send("no", **answer)


@both
@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({}, "message"),
        ({"message": {}}, "messageId"),
        ({"message": {"messageId": "m", "role": "ROLE_USER", "parts": []}}, "message.parts"),
        ({"message": {"messageId": "", "role": "ROLE_USER", "parts": [{"text": "x"}]}}, "message.messageId"),
        ({"message": {"messageId": "m", "role": "user", "parts": [{"text": "x"}]}}, "message.role"),
        ({"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": 1}]}}, "message.parts[0].text"),
        ({"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{}]}}, "message.parts[0]"),
        ({"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "", "url": ""}]}}, "message.parts[0]"),
    ],
)
async def test_a_message_that_is_none_is_refused_with_its_field(
    binding: Binding, wrong: dict[str, Any], field: str
) -> None:
    async with speaking(echo, binding) as (_, speaker):
        with pytest.raises(Refused, match="INVALID_PARAMS") as refused:
            await speaker.ask("SendMessage", wrong)
        assert refused.value.code == (-32602 if binding == "jsonrpc" else 400)
        assert any(field in each or field in refused.value.message for each in refused.value.fields)


@both
async def test_unknown_fields_are_ignored_and_names_with_underscores_are_read(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        sent = message_of("x", future=1, metadata={"my_own": {"a_b": 1}})
        sent["message"]["message_id"] = sent["message"].pop("messageId")
        sent["configuration"] = {"return_immediately": False, "later": []}
        task = (await speaker.ask("SendMessage", sent))["task"]
        assert task["history"][0]["metadata"] == {"my_own": {"a_b": 1}}


# --- history, lists ---------------------------------------------------------------------------------------------------


@both
async def test_history_is_as_long_as_it_is_wanted(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        if ctx.text != "go" or ctx.resume is None or ctx.resume.answer != "end":
            await ctx.ask("more?")

    async with speaking(asks, binding) as (_, speaker):
        task = await speaker.send("go")
        await speaker.send("1", taskId=task["id"])
        done = await speaker.send("end", taskId=task["id"], configuration={"historyLength": 2})
        said = [[part["text"] for part in each["parts"]] for each in done["history"]]
        assert said == [["more?"], ["end"]]
        assert "history" not in await speaker.get(task["id"], historyLength=0)
        assert len((await speaker.get(task["id"], historyLength=1))["history"]) == 1
        assert len((await speaker.get(task["id"]))["history"]) == 5
        for operation in ("GetTask", "ListTasks"):
            with pytest.raises(Refused, match="INVALID_PARAMS") as refused:
                await speaker.ask(operation, {"id": task["id"], "historyLength": -1})
            assert refused.value.fields == ["historyLength"]


@both
async def test_lists_have_the_last_changed_first_in_pages(binding: Binding) -> None:
    async def asks(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("?")
        await ctx.emit_text("ok")

    async with speaking(asks, binding) as (_, speaker):
        ids = [(await speaker.send(str(n)))["id"] for n in range(5)]
        await trio.sleep(0.002)  # the clock's next millisecond
        await speaker.send("now", taskId=ids[1])
        order = [ids[1], *reversed([each for each in ids if each != ids[1]])]
        seen: list[str] = []
        token = ""
        while True:
            page = await speaker.ask("ListTasks", {"pageSize": 2, "pageToken": token})
            assert (page["pageSize"], page["totalSize"]) == (2, 5)
            seen += [each["id"] for each in page["tasks"]]
            times = [each["status"]["timestamp"] for each in page["tasks"]]
            assert times == sorted(times, reverse=True)
            assert all("artifacts" not in each for each in page["tasks"])
            token = page["nextPageToken"]
            if not token:
                break
        assert seen == order
        done = await speaker.ask("ListTasks", {"status": "TASK_STATE_COMPLETED", "includeArtifacts": True})
        assert [(each["id"], text_of(each)) for each in done["tasks"]] == [(ids[1], "ok")]
        waiting = await speaker.ask("ListTasks", {"status": "TASK_STATE_INPUT_REQUIRED", "includeArtifacts": True})
        assert [each["artifacts"] for each in waiting["tasks"]] == [[]] * 4
        since = done["tasks"][0]["status"]["timestamp"]
        late = await speaker.ask("ListTasks", {"statusTimestampAfter": since})
        assert [each["id"] for each in late["tasks"]] == [ids[1]]


@both
@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"pageSize": 0}, "pageSize"),
        ({"pageSize": 101}, "pageSize"),
        ({"pageToken": "guess"}, "pageToken"),
        ({"status": "TASK_STATE_HAPPY"}, "status"),
        ({"statusTimestampAfter": "yesterday"}, "statusTimestampAfter"),
        ({"statusTimestampAfter": "2025-10-28T10:30:00"}, "statusTimestampAfter"),
    ],
)
async def test_a_list_that_is_asked_for_wrongly_is_refused(binding: Binding, wrong: dict[str, Any], field: str) -> None:
    async with speaking(echo, binding) as (_, speaker):
        with pytest.raises(Refused, match="INVALID_PARAMS") as refused:
            await speaker.ask("ListTasks", wrong)
        assert refused.value.fields == [field]


# --- cancel -----------------------------------------------------------------------------------------------------------


@both
async def test_a_cancel_says_canceled_once_the_work_has_stopped(binding: Binding) -> None:
    steered = Steered()
    async with speaking(steered, binding) as (_, speaker):
        task = await speaker.send("x", configuration=AT_ONCE)
        await steered.wait_started("x")
        canceled = await speaker.ask("CancelTask", {"id": task["id"]})
        assert steered.running == 0
        assert (state_of(canceled), text_of(canceled)) == ("CANCELED", "<x")
        with pytest.raises(Refused, match="TASK_NOT_CANCELABLE") as refused:
            await speaker.ask("CancelTask", {"id": task["id"]})
        assert refused.value.code == (-32002 if binding == "jsonrpc" else 400)
        with pytest.raises(Refused, match="TASK_NOT_FOUND"):
            await speaker.ask("CancelTask", {"id": "nobody"})


@both
async def test_two_cancels_at_once_are_answered_alike(binding: Binding) -> None:
    steered = Steered()
    async with speaking(steered, binding) as (served, speaker):
        task = await speaker.send("x", configuration=AT_ONCE)
        await steered.wait_started("x")
        answers: list[str] = []

        async def cancel() -> None:
            async with served.client() as client:
                found = await Speaker(client, binding=binding).ask("CancelTask", {"id": task["id"]})
                answers.append(state_of(found))

        row = await served.engine.find("local", "a", task["id"])
        assert row is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            nursery.start_soon(cancel)
        assert "CANCELED" in answers


async def test_a_task_that_waits_for_input_can_be_canceled() -> None:
    async def asks(ctx: Context) -> None:
        await ctx.ask("?")

    async with speaking(asks) as (_, speaker):
        task = await speaker.send()
        assert state_of(await speaker.ask("CancelTask", {"id": task["id"]})) == "CANCELED"


# --- who may ----------------------------------------------------------------------------------------------------------


@both
async def test_what_is_somebody_elses_is_not_there(binding: Binding) -> None:
    settings = settings_of(auth={"tokens": TOKENS})
    async with speaking(echo, binding, settings=settings) as (served, _):
        async with served.client(headers=bearer("alice")) as hers, served.client(headers=bearer("bob")) as his:
            alice, bob = Speaker(hers, binding=binding), Speaker(his, binding=binding)
            task = await alice.send("secret", contextId="shared")
            for operation in ("GetTask", "CancelTask"):
                with pytest.raises(Refused, match="TASK_NOT_FOUND"):
                    await bob.ask(operation, {"id": task["id"]})
            with pytest.raises(Refused, match="TASK_NOT_FOUND"):
                async with bob.stream("SubscribeToTask", {"id": task["id"]}):
                    pass
            with pytest.raises(Refused, match="TASK_NOT_FOUND"):
                await bob.send(taskId=task["id"])
            assert (await bob.ask("ListTasks"))["totalSize"] == 0
            assert (await bob.ask("ListTasks", {"contextId": "shared"}))["totalSize"] == 0
            own = await bob.send("mine", contextId="shared")  # a context of his own
            assert (await bob.ask("ListTasks", {"contextId": "shared"}))["tasks"][0]["id"] == own["id"]
            assert (await alice.ask("ListTasks"))["totalSize"] == 1


@both
async def test_a_viewer_reads_and_does_nothing_else(binding: Binding) -> None:
    settings = settings_of(auth={"tokens": TOKENS})
    async with speaking(echo, binding, settings=settings) as (served, _):
        async with served.client(headers=bearer("eve")) as client:
            eve = Speaker(client, binding=binding)
            assert (await eve.ask("ListTasks"))["tasks"] == []
            with pytest.raises(Refused, match="PERMISSION_DENIED"):
                await eve.send()


@both
async def test_without_credentials_nothing_is_answered_but_the_card(binding: Binding) -> None:
    settings = settings_of(auth={"tokens": TOKENS})
    async with speaking(echo, binding, settings=settings) as (served, _):
        async with served.client(headers={"A2A-Version": "1.0"}) as client:
            url = "/a2a/a" if binding == "jsonrpc" else "/a2a/a/message:send"
            answer = await client.post(url, json={})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            error = answer.json()["error"]  # in the protocol's own shape, though it was not yet spoken
            assert (error["code"], error["status"], error["details"][0]["reason"]) == (401, *["UNAUTHENTICATED"] * 2)
            assert (await client.get("/a2a/a/.well-known/agent-card.json")).status_code == 200


@both
async def test_the_extended_card_is_for_who_has_shown_who_they_are(binding: Binding) -> None:
    skill = {"id": "s", "name": "S", "description": "Secret", "tags": ["x"]}
    tokens = settings_of(auth={"tokens": TOKENS})
    extended = [msgspec.convert(skill, A2aSkill)]
    async with speaking(echo, binding, settings=tokens, extended_skills=extended) as (served, _):
        async with served.client(headers=bearer("alice")) as client:
            public = (await client.get("/a2a/a/.well-known/agent-card.json")).json()
            assert public["capabilities"]["extendedAgentCard"] is True
            assert public["securitySchemes"]["bearer"]["httpAuthSecurityScheme"]["scheme"] == "Bearer"
            card = await Speaker(client, binding=binding).ask("GetExtendedAgentCard")
            assert [each["id"] for each in card["skills"]] == ["a", "s"]
            assert [each["id"] for each in public["skills"]] == ["a"]
    async with speaking(echo, binding, extended_skills=extended) as (_, speaker):
        with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
            await speaker.ask("GetExtendedAgentCard")


# --- what an agent does not do ----------------------------------------------------------------------------------------


@both
async def test_what_the_card_does_not_declare_is_refused(binding: Binding) -> None:
    async with speaking(echo, binding, streaming=False) as (_, speaker):
        task = await speaker.send()
        for operation, params in (("SendStreamingMessage", message_of()), ("SubscribeToTask", {"id": task["id"]})):
            with pytest.raises(Refused, match="UNSUPPORTED_OPERATION"):
                async with speaker.stream(operation, params):
                    pass


@both
async def test_a_required_extension_must_be_declared(binding: Binding) -> None:
    extensions = [A2aExtension("urn:must", required=True), A2aExtension("urn:may")]
    async with speaking(echo, binding, extensions=extensions) as (_, speaker):
        with pytest.raises(Refused, match="EXTENSION_SUPPORT_REQUIRED") as refused:
            await speaker.send()
        assert refused.value.code == (-32008 if binding == "jsonrpc" else 400)
        speaker.headers["A2A-Extensions"] = "urn:other, urn:must"
        assert text_of(await speaker.send("x")) == "x"


@both
async def test_an_agent_can_ask_for_an_extension_itself(binding: Binding) -> None:
    async def needs(ctx: Context) -> None:
        ctx.require_extension("urn:must")
        await ctx.emit_text("ok")

    extensions = [A2aExtension("urn:must", required=True, enforce="agent")]
    async with speaking(needs, binding, extensions=extensions) as (_, speaker):
        with pytest.raises(Refused, match="EXTENSION_SUPPORT_REQUIRED"):
            await speaker.send()
        speaker.headers["A2A-Extensions"] = "urn:must"
        assert text_of(await speaker.send()) == "ok"


# --- two faces --------------------------------------------------------------------------------------------------------


@both
async def test_a_task_of_the_seed_is_a_task_of_a2a(binding: Binding) -> None:
    async with speaking(echo, binding) as (_, speaker):
        answer = await speaker.client.post("/agents/a/tasks", json={"taskId": "seeds", "input": {"content": "hello"}})
        assert answer.json()["status"] == "completed"
        task = await speaker.get("seeds")
        assert (state_of(task), text_of(task), task["contextId"]) == ("COMPLETED", "hello", "seeds")
        assert task["history"][0]["parts"] == [{"text": "hello"}]
        assert (await speaker.ask("ListTasks"))["tasks"][0]["id"] == "seeds"


@both
async def test_a_task_of_a2a_is_a_task_of_the_seed(binding: Binding) -> None:
    async def makes(ctx: Context) -> None:
        await ctx.emit_text("so ")
        await ctx.artifact("said", name="x")

    async with speaking(makes, binding) as (_, speaker):
        task = await speaker.send("go")
        seed = (await speaker.client.get(f"/agents/a/tasks/{task['id']}")).json()
        assert seed["output"] == {"type": "text/plain", "content": "so said"}
        assert seed["sessionId"] == task["contextId"]
        messages = (await speaker.client.get(f"/sessions/{task['contextId']}/messages")).json()["messages"]
        assert [(each["role"], each["content"]) for each in messages] == [("user", "go"), ("agent", "so said")]


def test_an_input_of_one_data_part_is_json() -> None:
    data = Message("m", "ROLE_USER", [Part(data={"a": 1})])
    assert content_of(data) == Content("application/json", {"a": 1})
