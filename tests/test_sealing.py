"""What is secret of webhooks in the database: nothing that can be read there, through changes of the keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.fernet import Fernet

from hector_trio.config import load, secrets
from hector_trio.errors import ConfigError
from hector_trio.sealing import MARK, Seal
from hector_trio.stores import Push
from tests.logged import logged
from tests.pushing import Speaker, nothing_to_tell, served, server_of
from tests.webhooks import Hook, webhook

OLD, NEW, OTHER = (Fernet.generate_key().decode() for _ in range(3))
SECRET = {"token": "word-one", "authentication": {"scheme": "Bearer", "credentials": "word-two"}}
ASKS = "TASK_STATE_INPUT_REQUIRED"
WORDS = (b"word-one", b"word-two", b"in-the-query")


def on_disk(tmp_path: Path, *keys: str) -> dict[str, Any]:
    return {
        "store": {"url": str(tmp_path / "hector.db")},
        "uploads": {"path": str(tmp_path / "uploads")},
        "push": {"encryption_keys": list(keys)},
    }


def stored(tmp_path: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(tmp_path.glob("hector.db*")) if path.is_file())


async def told(hook: Hook, count: int) -> None:
    """Returns once the webhook was told more than ``count`` times, with its secrets."""
    seen = (await hook.wait(count + 1))[-1]
    assert seen.headers["authorization"] == "Bearer word-two"
    assert seen.headers["x-a2a-notification-token"] == "word-one"
    assert seen.target == "/hook?secret=in-the-query"


async def test_with_a_key_nothing_that_is_secret_can_be_read_in_the_database(tmp_path: Path) -> None:
    speaker = Speaker()
    async with webhook() as hook, webhook() as named_later:
        async with served(speaker, **on_disk(tmp_path, OLD)) as client:
            task = await client.send(hook, config=SECRET)
            await told(hook, 0)
            created = await client.create(task["id"], named_later.url, id="later", **SECRET)
            assert (created["url"], created["token"]) == (named_later.url, "word-one")
            listed = (await client.list(task["id"]))["configs"]
            assert {(each["url"], each["token"]) for each in listed} == {
                (hook.url, "word-one"),
                (named_later.url, "word-one"),
            }
            speaker.say("?")
            await hook.wait_state("INPUT_REQUIRED")
            answer = {"messageId": "n", "role": "ROLE_USER", "parts": [{"text": "x"}], "taskId": task["id"]}
            configuration = {"returnImmediately": True, "taskPushNotificationConfig": {"url": hook.url, **SECRET}}
            await client.call("SendMessage", message=answer, configuration=configuration)
            assert not [word for word in WORDS if word in stored(tmp_path)]
            speaker.say(None)
            await named_later.wait_state("COMPLETED")
        assert not [word for word in WORDS if word in stored(tmp_path)]


async def test_keys_can_be_changed_and_what_was_stored_before_them_is_told_too(tmp_path: Path) -> None:
    speaker = Speaker()
    async with webhook() as hook:
        async with served(speaker, **on_disk(tmp_path)) as client:
            task = await client.send(hook, config=SECRET)
            await told(hook, 0)
            speaker.say("?")
            await hook.wait_state("INPUT_REQUIRED")
        assert all(word in stored(tmp_path) for word in WORDS)  # there was no key
        for config_id, keys, readable in (
            ("first", (OLD,), {task["id"], "first"}),
            ("second", (NEW, OLD), {task["id"], "first", "second"}),
            ("third", (NEW,), {task["id"], "second", "third"}),
        ):
            count = len(hook.seen)
            async with served(speaker, **on_disk(tmp_path, *keys)) as client:
                await client.create(task["id"], hook.url, id=config_id, **SECRET)
                shown = (await client.list(task["id"]))["configs"]
                assert {each["id"] for each in shown if each["url"] == hook.url} == readable
                await client.send(text="x", messageId=config_id, taskId=task["id"])
                await told(hook, count)
                speaker.say("?")
                with trio.fail_after(10):
                    while (await client.call("GetTask", id=task["id"]))["status"]["state"] != ASKS:
                        pass


async def test_a_webhook_whose_key_is_gone_is_told_nothing_until_it_is_back(tmp_path: Path) -> None:
    speaker = Speaker()
    async with webhook() as hook:
        async with served(speaker, **on_disk(tmp_path, OLD)) as client:
            task = await client.send(hook, config=SECRET)
            await told(hook, 0)
            speaker.say("?")
            await hook.wait_state("INPUT_REQUIRED")
        count = len(hook.seen)
        for keys in ((OTHER,), ()):
            with logged() as lines:
                async with served(speaker, **on_disk(tmp_path, *keys)) as client:
                    assert (await client.list(task["id"]))["configs"] == []
                    assert server_of(client).services.push.open == 0  # type: ignore[union-attr]
            (line,) = lines.of("push_ended")
            assert "push.encryption_keys" in line["because"]
        async with served(speaker, **on_disk(tmp_path, OLD)) as client:
            speaker.say(None)
            await client.send(text="x", messageId="n", taskId=task["id"])
            await hook.wait_state("COMPLETED")
            await nothing_to_tell(client)
        assert len(hook.seen) > count


def test_a_key_that_is_none_is_refused_and_shown_to_nobody() -> None:
    for wrong in ("['short-word']", f"['{OLD}', '{'x' * 44}']", "[{short-word: 1}]", "{short-word: 1}"):
        with pytest.raises(ConfigError, match=r"push\.encryption_keys") as refused:
            load(f"push: {{encryption_keys: {wrong}}}\nagents: {{a: {{}}}}", {}, source="x")
        assert "short-word" not in str(refused.value)
    settings = load("push: {encryption_keys: ['${KEY}']}\nagents: {a: {}}", {"KEY": OLD}, source="x")
    assert settings.push.encryption_keys == [OLD]
    assert OLD in secrets(settings)


def test_without_cryptography_a_key_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(ConfigError, match=r'push\.encryption_keys needs .*pip install "hector_trio\[jwt\]"'):
        Seal([OLD])
    plain = Push(1, "c", "https://example.com/hook", 0, "i", token="t")
    assert Seal([]).closed(plain) == Seal([]).opened(plain) == plain


def test_the_same_secret_looks_different_each_time() -> None:
    plain = Push(1, "c", "https://example.com/hook", 0, "i", token="t", scheme="Bearer", credentials="c")
    seal = Seal([OLD])
    first, second = seal.closed(plain), seal.closed(plain)
    assert first.token != second.token
    assert seal.opened(first) == seal.opened(second) == plain
    assert first.url.startswith(MARK)
