"""Push notifications, through the public door: A2A clients name webhooks, which are real servers on this machine."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from hector_trio.config import PushSettings
from hector_trio.errors import StoreUnavailable
from hector_trio.push import Wish, open_push
from hector_trio.reach import Address
from hector_trio.stores import Store
from tests.engines import agent, engine_of, order, run, store_of
from tests.logged import logged
from tests.pushing import FAST, Speaker, nothing_to_tell, positions, served, server_of
from tests.webhooks import Reply, webhook

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
    with logged() as lines:
        async with webhook() as hook, served(speaker, push={"attempts": 2}) as client:
            hook.always = Reply(500)
            config = {"token": "word-one", "authentication": {"scheme": "Bearer", "credentials": "word-two"}}
            task = await client.send(hook, config=config)
            speaker.say(None)
            await hook.wait(4)
            await client.ask("CreateTaskPushNotificationConfig", taskId=task["id"], url="http://10.0.0.1/word-three")
    told = lines.text
    assert "push_given_up" in told
    assert hook.origin in told
    for secret in ("word-one", "word-two", "word-three", "in-the-query"):
        assert secret not in told + capsys.readouterr().err


class Unwell:
    """A store that refuses what a test says."""

    def __init__(self, store: Store) -> None:
        self.refused: set[str] = set()
        self.refusals = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def refuse(*_: Any, **__: Any) -> None:
            self.refusals += 1
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("Not now")

        return refuse if name in self.refused else method


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


async def test_a_name_that_turns_to_the_inside_is_not_followed_there_and_the_event_is_given_up() -> None:
    speaker = Speaker()
    asked: list[str] = []

    async def names(host: str, port: int) -> list[Address]:
        await trio.lowlevel.checkpoint()
        asked.append(host)
        return [ip_address("93.184.216.34" if len(asked) == 1 else "127.0.0.1")]

    settings = PushSettings(attempts=2, backoff=0.001)
    async with webhook() as hook, store_of("memory", Path()) as store, engine_of(store, agent(speaker)) as engine:
        async with open_push(engine, settings, resolve=names) as pusher:
            url = f"http://rebinding.example:{hook.port}/"
            await pusher.check(url)
            speaker.say(None)
            row = await run(engine, order())
            await pusher.add(row, Wish(url), after=0)
            with trio.fail_after(5):
                while pusher.open:
                    await trio.lowlevel.checkpoint()
        assert asked == ["rebinding.example"] * 5
        assert (hook.seen, hook.cut) == ([], 0)


async def test_what_is_left_to_tell_when_the_store_fails_is_told_once_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hector_trio.push.LOOK_AGAIN", 0.001)
    speaker = Speaker()
    async with webhook() as hook, store_of("memory", Path()) as memory:
        store = Unwell(memory)
        async with engine_of(store, agent(speaker)) as engine:
            async with open_push(engine, msgspec.convert(FAST, PushSettings)) as pusher:
                row = (await engine.submit(order())).task
                speaker.say("all")
                store.refused = {"get_task_by_key", "move_pushes"}
                await pusher.add(row, Wish(hook.url), after=0)
                with trio.fail_after(5):
                    while not store.refusals:
                        await trio.lowlevel.checkpoint()
                store.refused = {"move_pushes"}
                await hook.wait(2)
                speaker.say(None)
                await hook.wait_state("COMPLETED")
                assert (await memory.list_pushes(row.key))[0].seq == 0
                store.refused = set()
                with trio.fail_after(5):
                    while (await memory.list_pushes(row.key))[0].over_at is None:
                        await trio.lowlevel.checkpoint()
                assert (await memory.list_pushes(row.key))[0].seq == 2


async def test_a_webhook_whose_task_is_deleted_is_not_told_any_more() -> None:
    speaker = Speaker()
    speaker.say("all", None)
    async with webhook() as hook, served(speaker, push={"attempts": 100, "backoff": 1, "max_backoff": 1}) as client:
        hook.plan(200)
        hook.always = Reply(500)
        task = await client.send(hook)
        await hook.wait(2)
        assert (await client.http.delete(f"/agents/a/tasks/{task['id']}")).status_code == 204
        await nothing_to_tell(client)
        assert "COMPLETED" not in hook.states


@contextmanager
def no_room_for_webhooks(path: Path) -> Iterator[None]:
    """A database that takes everything but webhooks, as after a fault between a task and its webhook."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TRIGGER fault BEFORE INSERT ON pushes BEGIN SELECT RAISE(ABORT, 'fault'); END")
        yield
        database.execute("DROP TRIGGER fault")


async def test_a_message_and_the_webhook_that_it_names_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    store = {"store": {"url": str(path)}, "uploads": {"path": str(tmp_path / "uploads")}}
    speaker = Speaker()
    message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
    answer = {"messageId": "n", "role": "ROLE_USER", "parts": [{"text": "this"}]}
    async with webhook() as hook, served(speaker, **store) as client:
        configuration = {"returnImmediately": True, "taskPushNotificationConfig": {"url": hook.url}}
        with no_room_for_webhooks(path):
            assert "error" in await client.ask("SendMessage", message=message, configuration=configuration)
            assert (await client.call("ListTasks"))["totalSize"] == 0
        speaker.say("?")
        task = await client.send()
        while task["status"]["state"] != "TASK_STATE_INPUT_REQUIRED":
            task = await client.call("GetTask", id=task["id"])
        answer["taskId"] = task["id"]
        with no_room_for_webhooks(path):
            assert "error" in await client.ask("SendMessage", message=answer, configuration=configuration)
            assert (await client.call("GetTask", id=task["id"]))["status"] == task["status"]
        for _ in range(2):  # the answer that was refused had not been taken; it is taken once
            await client.call("SendMessage", message=answer, configuration=configuration)
        assert len((await client.list(task["id"]))["configs"]) == 1
        speaker.say(None)
        await hook.wait_state("COMPLETED")
        assert hook.text == "<this>"


async def test_what_cannot_be_stored_stands_in_no_log_line(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    store = {"store": {"url": str(path)}, "uploads": {"path": str(tmp_path / "uploads")}}
    with logged() as lines:
        async with webhook() as hook, served(Speaker(), **store) as client:
            with no_room_for_webhooks(path):
                config = {"token": "word-one", "authentication": {"scheme": "Bearer", "credentials": "word-two"}}
                configuration = {"taskPushNotificationConfig": {"url": hook.url, **config}}
                message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
                assert "error" in await client.ask("SendMessage", message=message, configuration=configuration)
    assert "INSERT INTO pushes" in lines.text
    assert not [word for word in ("word-one", "word-two", "in-the-query") if word in lines.text]


async def test_the_end_that_a_dead_server_left_is_told_by_the_next(tmp_path: Path) -> None:
    speaker = Speaker()
    async with webhook() as hook:
        settings = msgspec.convert(FAST, PushSettings)
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


def test_what_is_secret_of_a_wish_is_not_shown() -> None:
    wish = Wish("https://example.com/abc", "c", "def", "Bearer", "ghi")
    assert not any(secret in repr(wish) for secret in ("abc", "def", "ghi"))
    assert msgspec.structs.replace(wish, token=None).token is None
