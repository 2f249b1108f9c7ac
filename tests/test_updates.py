"""What webhooks are told, through the public door: they are real servers, and their clients speak A2A."""

from __future__ import annotations

import json
from typing import Any

import trio

from hector_trio.agents import Context
from tests.pushing import Speaker, nothing_to_tell, served
from tests.webhooks import Reply, webhook


async def test_a_webhook_is_told_what_a_subscriber_is_told_in_the_same_order() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker) as client:
        config = {"token": "secret-token", "authentication": {"scheme": "Bearer", "credentials": "secret-credentials"}}
        task = await client.send(hook, config=config)
        subscription = {"jsonrpc": "2.0", "id": 1, "method": "SubscribeToTask", "params": {"id": task["id"]}}
        headers = {"A2A-Version": "1.0", "Accept": "text/event-stream"}
        async with client.http.stream("POST", client.path, json=subscription, headers=headers) as response:
            await hook.wait_state("WORKING")
            for n, word in enumerate("abc", start=2):
                speaker.say(word)
                await hook.wait(n)
            speaker.say(None)
            seen = await hook.wait_state("COMPLETED")
            lines = [line async for line in response.aiter_lines() if line.startswith("data:")]
        subscribed = [json.loads(line[5:])["result"] for line in lines]
    told = [each.body for each in seen]
    assert "task" in subscribed[0]
    assert told[-len(subscribed) + 1 :] == subscribed[1:]
    assert [each.state or each.text for each in seen] == ["WORKING", "a", "b", "c", "COMPLETED"]
    assert [each["artifactUpdate"].get("append", False) for each in told[1:-1]] == [False, True, True]
    for each in seen:
        assert each.headers["content-type"] == "application/a2a+json"
        assert each.headers["authorization"] == "Bearer secret-credentials"
        assert each.headers["x-a2a-notification-token"] == "secret-token"


async def test_a_question_and_what_comes_of_its_answer_are_told() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker) as client:
        task = await client.send(hook)
        speaker.say("?")
        await hook.wait_state("INPUT_REQUIRED")
        speaker.say(None)
        await client.send(text="this", taskId=task["id"])
        seen = await hook.wait_state("COMPLETED")
    assert hook.states == ["WORKING", "INPUT_REQUIRED", "WORKING", "COMPLETED"]
    question = next(each.body for each in seen if each.state == "INPUT_REQUIRED")
    assert question["statusUpdate"]["status"]["message"]["parts"] == [{"text": "Which?"}]
    assert hook.text == "<this>"


async def test_a_webhook_named_with_an_answer_is_told_what_comes_of_it() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker) as client:
        speaker.say("before", "?")
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
        task = (await client.call("SendMessage", message=message))["task"]
        speaker.say("after", None)
        await client.send(hook, text="this", taskId=task["id"])
        await hook.wait_state("COMPLETED")
    assert (hook.states, hook.text) == (["WORKING", "COMPLETED"], "<this>after")


async def test_a_bare_message_is_all_that_is_told() -> None:
    async def replying(ctx: Context) -> None:
        await ctx.reply("Just this")

    async with webhook() as hook, served(replying, {"replies": True}) as client:
        configuration = {"taskPushNotificationConfig": {"url": hook.url}}
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
        answer = await client.call("SendMessage", message=message, configuration=configuration)
        (seen,) = await hook.wait(1)
        assert seen.body == answer
        await nothing_to_tell(client)
        assert len(hook.seen) == 1


async def test_a_webhook_named_later_is_told_what_comes_then_and_nothing_from_before() -> None:
    speaker = Speaker()
    async with webhook() as first, webhook() as second, served(speaker) as client:
        task = await client.send(first)
        speaker.say("before")
        await first.wait(2)
        await client.create(task["id"], second.url)
        speaker.say("after", None)
        await second.wait_state("COMPLETED")
        assert [each.state or each.text for each in second.seen] == ["after", "COMPLETED"]
        assert second.seen[0].body["artifactUpdate"]["append"] is True


async def test_a_webhook_named_too_late_is_told_the_end() -> None:
    speaker = Speaker()
    speaker.say("all", None)
    async with webhook() as first, webhook() as second, served(speaker) as client:
        task = await client.send(first)
        await first.wait_state("COMPLETED")
        await client.create(task["id"], second.url)
        await second.wait(1)
        assert second.states == ["COMPLETED"]


async def test_clients_of_the_old_dialect_are_told_the_task_whenever_its_state_changes() -> None:
    speaker = Speaker()
    held = trio.Event()
    async with webhook() as hook, served(speaker) as client:

        async def call(method: str, **params: Any) -> Any:
            body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            answer = (await client.http.post(client.path, json=body)).json()
            assert "error" not in answer, answer
            return answer["result"]

        config = {"url": hook.url, "token": "t"}
        message = {"kind": "message", "messageId": "m", "role": "user", "parts": [{"kind": "text", "text": "hi"}]}
        configuration = {"blocking": False, "pushNotificationConfig": config}
        task = await call("message/send", message=message, configuration=configuration)
        await hook.wait(1)
        speaker.say("one ", "?")
        await hook.wait(2)
        hook.plan(Reply(200, after=held))
        speaker.say("two", None)
        answer = {**message, "messageId": "n", "taskId": task["id"]}
        await call("message/send", message=answer, configuration={"blocking": True})
        held.set()
        await nothing_to_tell(client)
        seen = hook.seen
    states = [each.body["status"]["state"] for each in seen]
    assert states[:2] == ["working", "input-required"]
    assert states[2:] in (["completed"], ["working", "completed"])  # of what comes together the last is told
    for each in seen:
        assert (each.body["kind"], each.body["id"]) == ("task", task["id"])
        assert each.headers["content-type"] == "application/json"
        assert each.headers["x-a2a-notification-token"] == "t"
    texts = ["".join(part["text"] for part in artifact["parts"]) for artifact in seen[-1].body["artifacts"]]
    assert texts == ["one <hi>two"]
    assert "artifacts" not in seen[0].body
