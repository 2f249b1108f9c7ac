"""The official JavaScript SDK of A2A: its programs, its clients in them, and what they say, of its 1.x and its 0.3."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from tests.seed.process import LIMIT, Output

HERE = Path(__file__).parent
PACKAGES = ("a2a-1", "a2a-0.3")
"""Both versions of the SDK, as .ci/interop has named them."""


class Refused(Exception):
    """The SDK's error: ``kinds`` are the names of its classes."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error)
        self.kinds: list[str] = error["kinds"]
        self.message: str = error["message"]
        self.cause = None if error["cause"] is None else Refused(error["cause"])


class Program:
    """A script of this folder with a version of the SDK, to which lines are written; it ends with its input."""

    def __init__(self, node: str, packages: Path, script: str, package: str) -> None:
        shutil.copy(HERE / script, packages)
        command = [node, str(packages / script), package]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._output = Output(self._process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            try:
                self._input.close()
                assert self._process.wait(LIMIT) == 0
            finally:
                self._process.kill()
                self._output.rest()

    def tell(self, line: str) -> None:
        self._input.write(f"{line}\n")
        self._input.flush()

    def find(self, pattern: str) -> str:
        return self._output.find(pattern)


class Driver(Program):
    """A process that has the SDK's clients (``a2a_client.mjs``)."""

    _asked = 0

    def ask(self, action: str, **given: Any) -> Any:
        """Raises: Refused."""
        self._asked += 1
        self.tell(json.dumps({"id": self._asked, "action": action, **given}))
        answer = json.loads(self.find(rf'^(\{{"id":{self._asked}[,}}].*)'))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer.get("result")


# --- what the SDK says, of either version -----------------------------------------------------------------------------


class Told(NamedTuple):
    """A task, an update of one, or a message."""

    kind: str
    """``task``, ``status``, ``artifact`` or ``message``."""
    raw: dict[str, Any]

    @property
    def task_id(self) -> str:
        return str(self.raw["id" if self.kind == "task" else "taskId"])

    @property
    def context_id(self) -> str:
        return str(self.raw["contextId"])

    @property
    def state(self) -> str:
        return str(self.raw["status"]["state"]).removeprefix("TASK_STATE_").lower().replace("_", "-")

    @property
    def said(self) -> list[Any]:
        """What the message, or that of the status, is made of."""
        message = self.raw if self.kind == "message" else self.raw["status"].get("message")
        return [] if message is None else [piece(each) for each in message["parts"]]

    @property
    def artifacts(self) -> list[list[Any]]:
        made = self.raw.get("artifacts", []) if self.kind == "task" else [self.raw["artifact"]]
        return [[piece(part) for part in each["parts"]] for each in made]

    @property
    def history(self) -> list[list[Any]]:
        return [[piece(part) for part in each["parts"]] for each in self.raw.get("history", [])]

    @property
    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = self.raw.get("metadata") or {}
        return found


KINDS: Final = {"statusUpdate": "status", "artifactUpdate": "artifact", "status-update": "status"} | {
    "artifact-update": "artifact"
}


def told(value: Any) -> Told:
    if "kind" in value:  # 0.3
        return Told(KINDS.get(value["kind"], value["kind"]), value)
    if "messageId" in value or "status" in value:  # a result of 1.x
        return Told("message" if "messageId" in value else "task", value)
    ((kind, event),) = value.items()
    return Told(KINDS.get(kind, kind), event)


def piece(part: dict[str, Any]) -> Any:
    """A part: its text; ``{"data": …}``; or ``(bytes or url, name, type)`` of a file."""
    if "text" in part:
        return part["text"]
    if "data" in part:
        return {"data": part["data"]}
    if "file" in part:
        file = part["file"]
        return (file.get("bytes") or file["uri"], file.get("name") or None, file.get("mimeType") or None)
    return (part.get("raw") or part["url"], part.get("filename"), part.get("mediaType"))


def text_of(events: list[Told]) -> str:
    """The text of a task's snapshot, if the events begin with one, and of all that came."""
    made = [each.artifacts for each in events if each.kind in ("task", "artifact")]
    return "".join(part for artifacts in made for artifact in artifacts for part in artifact if isinstance(part, str))


# --- a client ---------------------------------------------------------------------------------------------------------


class Speaker(NamedTuple):
    """What of the SDK is used."""

    package: str
    binding: str
    version: str

    @property
    def old(self) -> bool:
        """Whether the SDK itself is of 0.3; its 1.x speaks 0.3 in shapes of 1.0."""
        return self.package == "a2a-0.3"


SPEAKERS = [
    Speaker("a2a-1", "JSONRPC", "1.0"),
    Speaker("a2a-1", "HTTP+JSON", "1.0"),
    Speaker("a2a-1", "GRPC", "1.0"),
    Speaker("a2a-1", "JSONRPC", "0.3"),
    Speaker("a2a-1", "HTTP+JSON", "0.3"),
    Speaker("a2a-0.3", "JSONRPC", "0.3"),
    Speaker("a2a-0.3", "HTTP+JSON", "0.3"),
]


class Stream:
    def __init__(self, driver: Driver, handle: int) -> None:
        self._driver, self._handle = driver, handle

    def next(self) -> Told:
        """Raises: Refused."""
        value = self._driver.ask("next", stream=self._handle)
        assert value is not None, "the stream has ended"
        return told(value)

    def until(self, text: str) -> list[Told]:
        """Events, up to the one with this text."""
        events = [self.next()]
        while text not in text_of(events[-1:]):
            events.append(self.next())
        return events

    def rest(self) -> list[Told]:
        events = []
        while (value := self._driver.ask("next", stream=self._handle)) is not None:
            events.append(told(value))
        return events

    def leave(self) -> None:
        self._driver.ask("leave", stream=self._handle)


class Client:
    """A client of the SDK for one agent, found by its card."""

    def __init__(self, driver: Driver, speaker: Speaker, url: str, path: str | None = None, **more: Any) -> None:
        self.driver, self.speaker = driver, speaker
        self.headers: dict[str, str] = {}
        found = driver.ask("connect", url=url, path=path, binding=speaker.binding, version=speaker.version, **more)
        self.handle = found["client"]
        self.transport: str = found["transport"]

    def card(self, **more: Any) -> dict[str, Any]:
        """The extended one, where there is one."""
        found: dict[str, Any] = self.driver.ask("card", client=self.handle, headers=self.headers, **more)
        return found

    def call(self, method: str, **params: Any) -> Any:
        """Raises: Refused."""
        return self.driver.ask("call", client=self.handle, method=method, params=params, headers=self.headers)

    def open(self, method: str, **params: Any) -> Stream:
        given = {"client": self.handle, "method": method, "params": params, "headers": self.headers}
        return Stream(self.driver, self.driver.ask("open", **given))

    def send(self, text: str, **more: Any) -> Told:
        return told(self.call("sendMessage", **self._request(text, **more)))

    def stream(self, text: str, **more: Any) -> Stream:
        return self.open("sendMessageStream", **self._request(text, **more))

    def resubscribe(self, task_id: str) -> Stream:
        return self.open("resubscribeTask", id=task_id)

    def get(self, task_id: str, **more: Any) -> Told:
        return told(self.call("getTask", id=task_id, **more))

    def cancel(self, task_id: str) -> Told:
        return told(self.call("cancelTask", id=task_id))

    def _request(
        self, text: str, *, wait: bool = True, push: Any = None, about: Any = None, **configuration: Any
    ) -> dict[str, Any]:
        """``about``: further members of the message; ``push``: a webhook, as ``webhook`` makes it."""
        message = {"messageId": str(uuid.uuid4()), "role": "ROLE_USER", "parts": [{"text": text}]}
        names = ("returnImmediately", "taskPushNotificationConfig")
        if self.speaker.old:
            message |= {"kind": "message", "role": "user", "parts": [{"kind": "text", "text": text}]}
            names = ("blocking", "pushNotificationConfig")
        configuration |= {names[0]: wait if self.speaker.old else not wait, names[1]: push}
        return {"message": {**message, **(about or {})}, "configuration": without_none(configuration)}

    def webhook(self, url: str) -> dict[str, Any]:
        authentication: dict[str, Any] = {"schemes": ["Bearer"]} if self.speaker.old else {"scheme": "Bearer"}
        return {"url": url, "token": "t-1", "authentication": {**authentication, "credentials": "secret"}}

    def push_call(self, what: str, task_id: str, config_id: str, webhook: Any = None) -> Any:
        """``create``, ``get``, ``list`` or ``delete``, of the configurations of a task."""
        method = f"{what}TaskPushNotificationConfig"
        if self.speaker.old:
            if webhook is not None:
                config = {**webhook, "id": config_id}
                return self.call("setTaskPushNotificationConfig", taskId=task_id, pushNotificationConfig=config)
            return self.call(method, id=task_id, pushNotificationConfigId=config_id)
        return self.call(method, taskId=task_id, id=config_id, **(webhook or {}))


def without_none(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}
