"""Push notifications, through the public door: A2A clients name webhooks, which are real servers on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import trio

from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import Log, PushSettings
from hector_trio.observability import configure
from hector_trio.push import Wish, open_push
from tests.engines import agent, engine_of, order, store_of
from tests.serving import Served, serving, settings_of
from tests.webhooks import Hook, Reply, webhook

FAST = {"allow_loopback": True, "backoff": 0.001, "max_backoff": 0.01}
"""Settings under which nobody waits for long."""


class Speaker:
    """An agent that says what a test gives it, when the test gives it; ``None`` ends the task, ``?`` asks."""

    def __init__(self) -> None:
        self._say, self._heard = trio.open_memory_channel[str | None](1000)
        self.said = trio.Event()

    def say(self, *words: str | None) -> None:
        for word in words:
            self._say.send_nowait(word)

    async def __call__(self, ctx: Context) -> None:
        if ctx.resume is not None:
            await ctx.emit_text(f"<{ctx.resume.answer}>")
        while (word := await self._heard.receive()) is not None:
            if word == "?":
                await ctx.ask("Which?")
            await ctx.emit_text(word)


def speaking(speaker: Any, **about: Any) -> dict[str, Any]:
    return {"a": FunctionAgent(AgentInfo("a", "a", **about), speaker)}


class Client:
    """An A2A client that speaks JSON-RPC."""

    def __init__(self, http: httpx2.AsyncClient, agent_id: str = "a") -> None:
        self.http = http
        self.path = f"/a2a/{agent_id}"

    async def call(self, method: str, **params: Any) -> Any:
        """The result. Raises: AssertionError when it is an error."""
        answer = await self.ask(method, **params)
        assert "error" not in answer, answer
        return answer["result"]

    async def ask(self, method: str, **params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        response = await self.http.post(self.path, json=body, headers={"A2A-Version": "1.0"})
        assert response.status_code == 200, response.text
        return response.json()

    async def send(self, hook: Hook | None = None, text: str = "hi", **more: Any) -> Any:
        """Begins a task and returns it at once; ``hook`` is told of it."""
        config = more.pop("config", {})
        configuration: dict[str, Any] = {"returnImmediately": True}
        if hook is not None:
            configuration["taskPushNotificationConfig"] = {"url": hook.url, **config}
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": text}], **more}
        return (await self.call("SendMessage", message=message, configuration=configuration))["task"]

    async def create(self, task_id: str, url: str, **more: Any) -> Any:
        return await self.call("CreateTaskPushNotificationConfig", taskId=task_id, url=url, **more)

    async def list(self, task_id: str, **more: Any) -> Any:
        return await self.call("ListTaskPushNotificationConfigs", taskId=task_id, **more)


@asynccontextmanager
async def served(speaker: Any, about: dict[str, Any] | None = None, **sections: Any) -> AsyncIterator[Client]:
    """A server with an agent ``a``, and a client of it."""
    sections["push"] = FAST | sections.get("push", {})
    async with serving(settings_of(**sections), speaking(speaker, **(about or {}))) as server:
        async with server.client() as http:
            client = Client(http)
            client.server = server  # type: ignore[attr-defined]
            yield client


def server_of(client: Client) -> Served:
    return client.server  # type: ignore[attr-defined,no-any-return]


async def positions(client: Client, task_id: str, until: int) -> None:
    """Returns once all webhooks of a task have been told so much, and this is stored."""
    store = server_of(client).engine.store
    row = await store.get_task("local", "a", task_id)
    assert row is not None
    with trio.fail_after(10):
        while min(push.seq for push in await store.list_pushes(row.key)) < until:
            await trio.lowlevel.checkpoint()


async def nothing_to_tell(client: Client) -> None:
    """Returns once every webhook has been told everything."""
    push = server_of(client).services.push
    assert push is not None
    with trio.fail_after(10):
        while push.open:
            await trio.lowlevel.checkpoint()


# --- what is told -----------------------------------------------------------------------------------------------------


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


# --- webhooks that are slow or fail -----------------------------------------------------------------------------------


async def test_a_webhook_that_does_not_answer_delays_no_stream_and_is_told_the_rest_joined() -> None:
    speaker = Speaker()
    words = [f"word{n} " for n in range(300)]
    held = trio.Event()
    async with webhook() as hook, served(speaker) as client:
        hook.plan(Reply(200, after=held))
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
        params = {"message": message, "configuration": {"taskPushNotificationConfig": {"url": hook.url}}}
        body = {"jsonrpc": "2.0", "id": 1, "method": "SendStreamingMessage", "params": params}
        streamed = ""
        with trio.fail_after(10):
            async with client.http.stream("POST", client.path, json=body, headers={"A2A-Version": "1.0"}) as response:
                speaker.say("first ")
                await hook.wait(1)
                speaker.say(*words, None)
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        update = json.loads(line[5:])["result"].get("artifactUpdate")
                        streamed += "" if update is None else update["artifact"]["parts"][0]["text"]
        assert streamed == "first " + "".join(words)
        assert (len(hook.seen), hook.under_way) == (1, 1)  # the stream has ended, and the first answer is not there yet
        held.set()
        seen = await hook.wait_state("COMPLETED")
        assert hook.text == streamed
        assert len(seen) < 20


async def test_what_fails_is_tried_again_and_nothing_overtakes_it() -> None:
    speaker = Speaker()
    speaker.say("all", None)
    async with webhook() as hook, served(speaker) as client:
        hook.plan(500, Reply(429, {"Retry-After": "0"}), Reply(503, {"Retry-After": "3600"}), 404, 302, 200, 200, 400)
        await client.send(hook)
        seen = await hook.wait(9)
    bodies = [each.content for each in seen]
    assert len(set(bodies[:6])) == 1
    assert len(set(bodies)) == 3
    assert bodies[7] == bodies[8]
    assert [each.state or each.text for each in seen[5:]] == ["WORKING", "all", "COMPLETED", "COMPLETED"]


async def test_a_webhook_asks_for_patience_and_gets_it_up_to_the_longest_pause() -> None:
    speaker = Speaker()
    speaker.say(None)
    async with webhook() as hook, served(speaker, push={"backoff": 0.001, "max_backoff": 0.3}) as client:
        hook.plan(Reply(503, {"Retry-After": "3600"}))
        await client.send(hook)
        await hook.wait(1)
        began = trio.current_time()
        await hook.wait(2)
        assert 0.25 < trio.current_time() - began < 5


async def test_an_event_is_given_up_after_all_attempts_and_the_next_get_one_each_but_the_end_gets_all() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker, push={"attempts": 3}) as client:
        hook.always = Reply(500)
        task = await client.send(hook)
        await hook.wait(3)
        for n, word in enumerate(["lost", "too"], start=4):
            speaker.say(word)
            await hook.wait(n)
        hook.plan(200, 500)
        speaker.say("heard")
        await hook.wait(6)
        speaker.say("again")
        await hook.wait(9)
        speaker.say("once")
        await hook.wait(10)
        speaker.say(None)
        seen = await hook.wait(13)
        told = [each.state or each.text for each in seen]
        expected = ["WORKING"] * 3 + ["lost", "too", "heard"] + ["again"] * 3 + ["once"] + ["COMPLETED"] * 3
        assert told == expected
        await positions(client, task["id"], 6)
        await nothing_to_tell(client)
        metrics = server_of(client).services.metrics.render().decode()
        assert 'hector_push_requests_total{result="given_up"} 6.0' in metrics
        assert 'hector_push_requests_total{result="delivered"} 1.0' in metrics
        assert 'hector_push_requests_total{result="failed"} 6.0' in metrics
        assert "hector_webhooks 0.0" in metrics


async def test_a_webhook_that_says_it_is_gone_is_not_called_again() -> None:
    speaker = Speaker()
    async with webhook() as gone, webhook() as other, served(speaker) as client:
        gone.always = Reply(410)
        task = await client.send(gone)
        await client.create(task["id"], other.url)
        await gone.wait(1)
        speaker.say("all", None)
        await other.wait_state("COMPLETED")
        assert len(gone.seen) == 1
        assert len((await client.list(task["id"]))["configs"]) == 2


async def test_one_host_gets_no_more_requests_at_once_than_allowed_and_others_do_not_wait_for_it() -> None:
    speaker = Speaker()
    held = trio.Event()
    async with webhook() as slow, webhook() as fast, served(speaker, push={"per_host": 2}) as client:
        slow.always = Reply(200, after=held)
        for _ in range(5):
            await client.send(slow)
        await slow.wait(2)
        url = fast.url.replace("127.0.0.1", "localhost")
        task = await client.send()
        await client.create(task["id"], url)
        speaker.say("x")  # to whichever of them
        await client.call("CancelTask", id=task["id"])
        await fast.wait_state("CANCELED")
        assert slow.under_way == 2
        held.set()
        await slow.wait(5)
        assert slow.most_under_way == 2


async def test_what_is_secret_of_a_webhook_stands_in_no_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Speaker()
    lines = io.StringIO()
    output = configure(Log(level="debug", format="json"), lines)
    try:
        async with webhook() as hook, served(speaker, push={"attempts": 2}) as client:
            hook.always = Reply(500)
            config = {"token": "word-one", "authentication": {"scheme": "Bearer", "credentials": "word-two"}}
            task = await client.send(hook, config=config)
            speaker.say(None)
            await hook.wait(4)
            await client.ask("CreateTaskPushNotificationConfig", taskId=task["id"], url="http://10.0.0.1/word-three")
    finally:
        output.flush()
        output.close()
        configure(Log())
    told = lines.getvalue()
    assert "push_given_up" in told
    assert hook.origin in told
    for secret in ("word-one", "word-two", "word-three", "in-the-query"):
        assert secret not in told + capsys.readouterr().err


# --- restarts ---------------------------------------------------------------------------------------------------------


async def test_the_next_start_goes_on_where_a_webhook_was(tmp_path: Path) -> None:
    speaker = Speaker()
    store = {"url": str(tmp_path / "hector.db")}
    async with webhook() as hook:
        async with served(speaker, store=store) as client:
            task = await client.send(hook)
            speaker.say("told ")
            await hook.wait(2)
            await positions(client, task["id"], 1)
            hook.always = Reply(500)
            speaker.say("untold ", "?")
            await hook.wait(4)
        before = len(hook.seen)
        hook.always = Reply(200)
        async with served(speaker, store=store) as client:
            seen = (await hook.wait_state("INPUT_REQUIRED"))[before:]
            assert [each.state or each.text for each in seen] == ["untold ", "INPUT_REQUIRED"]
            assert seen[0].body["artifactUpdate"]["append"] is True
            speaker.say(None)
            await client.send(text="this", taskId=task["id"])
            await hook.wait_state("COMPLETED")
            await positions(client, task["id"], 5)
        calls = len(hook.seen)
        async with served(speaker, store=store) as client:
            await nothing_to_tell(client)
        assert len(hook.seen) == calls


async def test_the_end_that_a_dead_server_left_is_told_by_the_next(tmp_path: Path) -> None:
    speaker = Speaker()
    async with webhook() as hook:
        settings = PushSettings(**FAST)  # type: ignore[arg-type]
        async with store_of("sql", tmp_path) as store:
            async with engine_of(store, agent(speaker)) as engine, open_push(engine, settings) as pusher:
                row = (await engine.submit(order())).task
                await pusher.add(row, Wish(hook.url), after=0)
                await hook.wait_state("WORKING")
        async with store_of("sql", tmp_path, "next") as store:
            async with engine_of(store, agent(speaker), instance="next") as engine, open_push(engine, settings):
                seen = await hook.wait_state("FAILED")
                (push,) = await store.list_pushes(row.key)
                assert push.instance == "next"
        status = next(each.body for each in seen if each.state == "FAILED")["statusUpdate"]
        assert status["metadata"]["code"] == "interrupted"


# --- configurations ---------------------------------------------------------------------------------------------------


async def test_configurations_are_created_got_listed_and_deleted() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker) as client:
        task = await client.send(hook)
        secret = {"scheme": "Basic", "credentials": "abc"}
        created = await client.create(task["id"], hook.url, id="one", token="t", authentication=secret)
        shown = {
            "id": "one",
            "taskId": task["id"],
            "url": hook.url,
            "token": "t",
            "authentication": {"scheme": "Basic"},
        }
        assert created == shown
        assert await client.call("GetTaskPushNotificationConfig", taskId=task["id"], id="one") == shown
        named = await client.create(task["id"], hook.url)
        assert named["id"] not in ("", "one", task["id"])
        everything = await client.list(task["id"])
        assert {each["id"] for each in everything["configs"]} == {"one", named["id"], task["id"]}
        assert everything["nextPageToken"] == ""
        page, token = [], ""
        for _ in range(3):
            answer = await client.list(task["id"], pageSize=1, pageToken=token)
            page += answer["configs"]
            token = answer["nextPageToken"]
        assert (page, token) == (everything["configs"], "")
        for _ in range(2):
            assert await client.call("DeleteTaskPushNotificationConfig", taskId=task["id"], id="one") in (None, {})
        answer = await client.ask("GetTaskPushNotificationConfig", taskId=task["id"], id="one")
        assert answer["error"]["code"] == -32001
        assert len((await client.list(task["id"]))["configs"]) == 2


async def test_over_http_they_are_the_same() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker) as client:
        task = await client.send()
        path = f"{client.path}/tasks/{task['id']}/pushNotificationConfigs"
        headers = {"A2A-Version": "1.0"}
        created = await client.http.post(path, json={"id": "c", "url": hook.url}, headers=headers)
        assert (created.status_code, created.json()["url"]) == (200, hook.url)
        got = await client.http.get(f"{path}/c", headers=headers)
        assert got.json() == created.json()
        assert (await client.http.get(path, headers=headers)).json()["configs"] == [got.json()]
        assert (await client.http.delete(f"{path}/c", headers=headers)).is_success
        assert (await client.http.get(f"{path}/c", headers=headers)).status_code == 404


async def test_a_configuration_that_is_deleted_is_not_told_any_more_and_one_that_is_replaced_goes_on() -> None:
    speaker = Speaker()
    async with webhook() as old, webhook() as new, webhook() as deleted, served(speaker) as client:
        old.always = deleted.always = Reply(500)
        slow = await client.send(old, config={"id": "c"})
        await client.create(slow["id"], deleted.url, id="d")
        speaker.say("one ")
        await deleted.wait(1)
        await client.call("DeleteTaskPushNotificationConfig", taskId=slow["id"], id="d")
        await old.wait(1)
        await client.create(slow["id"], new.url, id="c")
        calls = len(old.seen), len(deleted.seen)
        speaker.say("two", None)
        await new.wait_state("COMPLETED")
        assert (new.seen[0].state or new.seen[0].text) in ("WORKING", "one ", "one two")
        assert new.text == "one two"
        assert (len(old.seen), len(deleted.seen)) == calls
        assert len((await client.list(slow["id"]))["configs"]) == 1


async def test_there_are_no_more_webhooks_than_allowed_of_a_task_and_in_all() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker, push={"per_task": 2, "webhooks": 3}) as client:
        task = await client.send(hook)
        await client.create(task["id"], hook.url)
        over = await client.ask("CreateTaskPushNotificationConfig", taskId=task["id"], url=hook.url)
        assert over["error"]["data"][0]["reason"] == "RESOURCE_EXHAUSTED"
        await client.send(hook)
        third = await client.send()
        over = await client.ask("CreateTaskPushNotificationConfig", taskId=third["id"], url=hook.url)
        assert over["error"]["data"][0]["reason"] == "RESOURCE_EXHAUSTED"


async def test_webhooks_of_a_session_that_is_deleted_are_told_that_it_ended_and_delay_nothing() -> None:
    speaker = Speaker()
    held = trio.Event()
    async with webhook() as hook, served(speaker) as client:
        hook.always = Reply(200, after=held)
        task = await client.send(hook)
        await hook.wait(1)
        speaker.say("?")
        with trio.fail_after(1.5):  # a reader that does not read would be waited for longer
            assert (await client.http.delete(f"/sessions/{task['contextId']}")).status_code == 204
        store = server_of(client).engine.store
        assert (await store.take_over_pushes("x")) == []
        held.set()
        answer = await client.ask("ListTaskPushNotificationConfigs", taskId=task["id"])
        assert answer["error"]["code"] == -32001


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost:{port}/", "http://[::1]/", "http://10.0.0.1/", "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://127.1:{port}/",
        "http://2130706433:{port}/", "http://0x7f.0.0.1/", "http://0:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
        "http://[64:ff9b::7f00:1]/", "http://[fe80::1]/", "http://[fd00:ec2::254]/", "http://224.0.0.1/",
        "ftp://example.com/", "file:///etc/passwd", "https://user:word@example.com/", "http://127.0.0.1\\@example.com/",
        "example.com", "",
    ],
)  # fmt: skip
async def test_addresses_inside_are_refused_when_they_are_named(url: str) -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker, push={"allow_loopback": False}) as client:
        url = url.format(port=hook.port)
        task = await client.send()
        answer = await client.ask("CreateTaskPushNotificationConfig", taskId=task["id"], url=url)
        assert answer["error"]["code"] == -32602
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
        configuration = {"taskPushNotificationConfig": {"url": url}}
        answer = await client.ask("SendMessage", message=message, configuration=configuration)
        assert answer["error"]["code"] == -32602
        assert (await client.list(task["id"]))["configs"] == []
        assert (hook.seen, hook.cut) == ([], 0)


@pytest.mark.parametrize(
    "config",
    [
        {"token": "a\r\nX-Evil: 1"},
        {"token": "ü"},
        {"token": "x" * 5000},
        {"authentication": {"scheme": "Bearer\r\n", "credentials": "x"}},
        {"authentication": {"scheme": "Bearer", "credentials": "x\n"}},
        {"authentication": {"scheme": "", "credentials": "x"}},
        {"id": "a/b"},
        {"id": ".."},
        {"id": "x" * 129},
        {"url": 7},
    ],
)
async def test_what_no_header_can_hold_is_refused(config: dict[str, Any]) -> None:
    async with webhook() as hook, served(Speaker()) as client:
        task = await client.send()
        params = {"taskId": task["id"], "url": hook.url, **config}
        answer = await client.ask("CreateTaskPushNotificationConfig", **params)
        assert answer["error"]["code"] == -32602
        assert (await client.list(task["id"]))["configs"] == []


async def test_a_redirect_to_the_inside_is_not_followed() -> None:
    speaker = Speaker()
    speaker.say(None)
    async with webhook() as hook, webhook() as inside, served(speaker, push={"attempts": 2}) as client:
        hook.always = Reply(307, {"Location": inside.url})
        await client.send(hook)
        await hook.wait(4)
        assert (inside.seen, inside.cut) == ([], 0)


@pytest.mark.parametrize("off", ["agent", "server"])
async def test_where_there_are_none_the_card_and_every_operation_say_so(off: str) -> None:
    from hector_trio.config import A2a

    about = {"a2a": A2a(push=False)} if off == "agent" else {}
    async with served(Speaker(), about, push={"enabled": off != "server"}) as client:
        card = (await client.http.get(f"{client.path}/.well-known/agent-card.json")).json()
        assert card["capabilities"]["pushNotifications"] is False
        task = await client.send()
        config = {"taskId": task["id"], "id": "c", "url": "https://example.com"}
        for operation in ("Create", "Get", "Delete"):
            answer = await client.ask(f"{operation}TaskPushNotificationConfig", **config)
            assert answer["error"]["code"] == -32003
        answer = await client.ask("ListTaskPushNotificationConfigs", taskId="nobody's")
        assert answer["error"]["code"] == -32003
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
        configuration = {"taskPushNotificationConfig": {"url": "https://example.com"}}
        answer = await client.ask("SendMessage", message=message, configuration=configuration)
        assert answer["error"]["code"] == -32003


async def test_the_card_says_that_there_are_push_notifications_and_nobody_sees_those_of_others() -> None:
    tokens = [{"name": name, "token": name * 16} for name in ("a", "b")]
    async with webhook() as hook, served(Speaker(), auth={"tokens": tokens}) as client:
        card = (await client.http.get(f"{client.path}/.well-known/agent-card.json")).json()
        assert card["capabilities"]["pushNotifications"] is True
        client.http.headers["Authorization"] = "Bearer " + "a" * 16
        task = await client.send(hook)
        client.http.headers["Authorization"] = "Bearer " + "b" * 16
        for operation, params in (
            ("CreateTaskPushNotificationConfig", {"url": hook.url}),
            ("GetTaskPushNotificationConfig", {"id": task["id"]}),
            ("DeleteTaskPushNotificationConfig", {"id": task["id"]}),
            ("ListTaskPushNotificationConfigs", {}),
        ):
            answer = await client.ask(operation, taskId=task["id"], **params)
            assert answer["error"]["code"] == -32001


async def test_clients_of_the_old_dialect_set_get_list_and_delete_them() -> None:
    speaker = Speaker()
    async with webhook() as hook, served(speaker) as client:
        task = await client.send()

        async def call(method: str, **params: Any) -> Any:
            body = {"jsonrpc": "2.0", "id": 1, "method": f"tasks/pushNotificationConfig/{method}", "params": params}
            answer = (await client.http.post(client.path, json=body)).json()
            assert "error" not in answer, answer
            return answer["result"]

        config = {"url": hook.url, "token": "t"}
        made = await call("set", taskId=task["id"], pushNotificationConfig=config)
        assert made == {"taskId": task["id"], "pushNotificationConfig": {"id": task["id"], **config}}
        assert await call("get", id=task["id"]) == made
        assert await call("list", id=task["id"]) == [made]
        speaker.say(None)
        await hook.wait_state("COMPLETED")
        await call("delete", id=task["id"], pushNotificationConfigId=task["id"])
        assert await call("list", id=task["id"]) == []


def test_what_is_secret_of_a_wish_is_not_shown() -> None:
    wish = Wish("https://example.com/abc", "c", "def", "Bearer", "ghi")
    assert not any(secret in repr(wish) for secret in ("abc", "def", "ghi"))
    assert msgspec.structs.replace(wish, token=None).token is None
