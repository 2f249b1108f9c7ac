"""The operations on push notification configurations, as clients of every dialect ask for them."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from hector_trio.config import A2a
from tests.pushing import Speaker, nothing_to_tell, served, server_of
from tests.webhooks import Reply, webhook


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


async def test_webhooks_go_with_their_session_and_do_not_delay_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hector_trio.engine.UNREAD_LIMIT", 3600)  # a reader that does not read would be waited for
    speaker = Speaker()
    held = trio.Event()
    async with webhook() as hook, served(speaker) as client:
        hook.always = Reply(200, after=held)
        task = await client.send(hook)
        await hook.wait(1)
        speaker.say("?")
        with trio.fail_after(20):
            assert (await client.http.delete(f"/sessions/{task['contextId']}")).status_code == 204
        store = server_of(client).engine.store
        assert (await store.take_over_pushes("x")) == []
        held.set()
        answer = await client.ask("ListTaskPushNotificationConfigs", taskId=task["id"])
        assert answer["error"]["code"] == -32001


INSIDE = [
    "http://127.0.0.1/", "http://localhost:{port}/", "http://[::1]/", "http://10.0.0.1/", "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://127.1:{port}/",
    "http://2130706433:{port}/", "http://0x7f.0.0.1/", "http://0:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://[64:ff9b::7f00:1]/", "http://[fe80::1]/", "http://[fd00:ec2::254]/", "http://224.0.0.1/",
    "ftp://example.com/", "file:///etc/passwd", "https://user:word@example.com/", "http://127.0.0.1\\@example.com/",
    "example.com", "",
]  # fmt: skip


async def test_addresses_inside_are_refused_when_they_are_named() -> None:
    async with webhook() as hook, served(Speaker(), push={"allow_loopback": False}) as client:
        task = await client.send()
        for url in (each.format(port=hook.port) for each in INSIDE):
            answer = await client.ask("CreateTaskPushNotificationConfig", taskId=task["id"], url=url)
            assert answer["error"]["code"] == -32602, url
            message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
            configuration = {"taskPushNotificationConfig": {"url": url}}
            answer = await client.ask("SendMessage", message=message, configuration=configuration)
            assert answer["error"]["code"] == -32602, url
        assert (await client.list(task["id"]))["configs"] == []
        assert (hook.seen, hook.cut) == ([], 0)


REFUSED: list[dict[str, Any]] = [
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
]


async def test_what_no_header_can_hold_is_refused() -> None:
    async with webhook() as hook, served(Speaker()) as client:
        task = await client.send()
        for config in REFUSED:
            params = {"taskId": task["id"], "url": hook.url, **config}
            answer = await client.ask("CreateTaskPushNotificationConfig", **params)
            assert answer["error"]["code"] == -32602, config
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
        assert await call("get", id=task["id"], pushNotificationConfigId="default") == made  # as clients have called it
        assert await call("list", id=task["id"]) == [made]
        speaker.say(None)
        (seen,) = await hook.wait(1)
        assert seen.body["status"]["state"] == "completed"
        await call("delete", id=task["id"], pushNotificationConfigId=task["id"])
        assert await call("list", id=task["id"]) == []


async def test_one_in_the_place_of_another_that_was_over_is_told_what_comes() -> None:
    speaker = Speaker()
    async with webhook() as gone, webhook() as new, served(speaker) as client:
        gone.always = Reply(410)
        task = await client.send(gone, config={"id": "c"})
        await gone.wait(1)
        await nothing_to_tell(client)
        await client.create(task["id"], new.url, id="c")
        speaker.say("all", None)
        await new.wait_state("COMPLETED")
        await nothing_to_tell(client)
        assert new.text == "all"
        assert len(gone.seen) == 1
