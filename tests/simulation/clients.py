"""The clients of the simulation: a WebSocket, a request, an event stream. They check what they are told as it comes."""

from __future__ import annotations

import json
import math
from base64 import b64decode
from typing import TYPE_CHECKING, Any

import msgspec

from hector_trio.task import ENDED, decode_chunk
from tests.simulation.channel import Link, Message
from tests.simulation.invariants import Reader, Submission, stem_of

if TYPE_CHECKING:
    from tests.simulation.world import World


class Socket:
    """A WebSocket. ``link`` is set by whoever opens it."""

    link: Link

    def __init__(self, world: World, agent_id: str) -> None:
        self.agent_id = agent_id
        self.open = False
        self.readers: dict[str, Reader] = {}
        self.controls: dict[str, int] = {}
        """How many control frames of each type wait for their answer."""
        self.bad_frames = 0
        """How many refusals of unreadable frames are to come."""
        self.attaching: dict[str, list[tuple[int, int | None]]] = {}
        """Where, and with which window, each attach that is not answered is to begin."""
        self._world = world

    def ask(
        self, submission: Submission, *, window: int | None = None, pause: bool = False, binary: bool = False
    ) -> None:
        submission.links.append(self.link)
        request = request_of(submission)
        before = self.readers.get(submission.task_id)
        if before is not None and not before.ended:
            before.may_restart += 1
            before.window = None
        else:
            reader = Reader(self._world.ledger, self.agent_id, submission.task_id)
            reader.link = self.link
            reader.nonce = submission.plan.nonce
            reader.window, reader.pauses = window, pause
            self.readers[submission.task_id] = reader
            request |= viewing(window, binary) | ({"pause": True} if pause else {})
            submission.may_pause |= pause
        self.link.put({"type": "websocket.receive", "text": json.dumps(request)})

    def attach(self, task_id: str, after: int, *, window: int | None, binary: bool) -> None:
        self.attaching.setdefault(task_id, []).append((after, window))
        self._world.ledger.attaching[self.agent_id, stem_of(task_id)] = math.inf
        self.control("attach", taskId=task_id, after=after, **viewing(window, binary))

    def grant(self, reader: Reader, frames: int) -> None:
        """Acknowledges frames that were received."""
        reader.unacknowledged -= frames
        self.control("credit", taskId=reader.task_id, frames=frames)

    def control(self, kind: str, **members: Any) -> None:
        self.controls[kind] = self.controls.get(kind, 0) + 1
        self.link.put({"type": "websocket.receive", "text": json.dumps({"type": kind, **members})})

    def nonsense(self, message: Message) -> None:
        self.bad_frames += 1
        self.link.put({"type": "websocket.receive", **message})

    # --- told by the link

    def take(self, message: Message) -> None:
        note = self._world.ledger.note
        match message["type"]:
            case "websocket.accept":
                self.open = True
            case "websocket.send":
                if (data := message.get("bytes")) is not None:
                    self._binary(data)
                else:
                    self._frame(message["text"].encode())
            case "websocket.close":
                self.open = False
                if message["code"] not in (1000, 1008, 1012):
                    note(f"a socket was closed with {message['code']}")
                self.link.leave(message["code"])
            case "websocket.http.response.start":
                if message["status"] not in (429, 503):
                    note(f"a socket was refused with {message['status']}")
                if message["status"] == 503 and self._world.ledger.last_end_of_a_process < 0:
                    note("a socket was refused with 503 by a server that was never to stop")
            case "websocket.http.response.body":
                if not message.get("more_body"):
                    self.link.leave(1006)
            case kind:
                note(f"the application sent {kind} on a WebSocket")

    def _frame(self, line: bytes) -> None:
        note = self._world.ledger.note
        frame = json.loads(line)
        kind = frame.get("type")
        if kind is not None:
            of = "ping" if kind == "pong" else frame.get("of")
            if self.controls.get(of, 0) < 1 or kind not in ("pong", "ok", "error"):
                note(f"an answer to no control frame: {line!r}")
                return
            self.controls[of] -= 1
            if kind == "error":
                self._world.refused(frame["code"], f"{of} {frame.get('taskId')}")
                if of == "attach":
                    self._attached(frame["taskId"])
                elif of == "detach" and self.link.left_at is None:
                    reader = self.readers.get(frame["taskId"])
                    if reader is not None and not reader.detached:
                        reader.gone_at = None
            elif kind == "ok":
                self._done(of, frame)
            return
        chunk = decode_chunk(line)
        reader = self.readers.get(chunk.task_id)
        if reader is None:
            if chunk.task_id == "" and chunk.seq == 0 and chunk.code == "invalid_request" and self.bad_frames:
                self.bad_frames -= 1
            else:
                note(f"a chunk of a task that nobody asked for: {line!r}")
            return
        reader.take(chunk, line)
        if chunk.seq == 0:
            self._world.refused(str(chunk.code), f"task {chunk.task_id!r}")

    def _done(self, of: str, frame: Any) -> None:
        """A control frame was answered with ok."""
        ledger, task_id = self._world.ledger, frame.get("taskId")
        match of:
            case "attach":
                after, window = self._attached(task_id)
                if frame["status"] in ENDED:
                    after = max(0, min(after, frame["lastSeq"] - 1))
                reader = self.readers.get(task_id)
                if reader is None:
                    reader = self.readers[task_id] = Reader(ledger, self.agent_id, task_id)
                    reader.link = self.link
                reader.follow(after, window)
            case "detach":
                reader = self.readers[task_id]
                if reader.may_restart:
                    reader.follow(0, None)
                    reader.may_restart -= 1
                else:
                    reader.detached = True
                    reader.gone()
                known = reader.known()
                if known is not None and known.policy == "continue":
                    known.detached = True
            case "input":
                found = [ledger.tasks[key] for key in ledger.candidates(self.agent_id, task_id)]
                if not any(known.answers for known in found):
                    ledger.note(f"the input of {task_id!r} was accepted, and is not there")

    def _attached(self, task_id: str) -> tuple[int, int | None]:
        self._world.ledger.attaching[self.agent_id, stem_of(task_id)] = self._world.now
        return self.attaching[task_id].pop(0)

    def _binary(self, data: bytes) -> None:
        """A chunk of bytes (PROTOCOL 4): made what it is in the log."""
        note = self._world.ledger.note
        name_ends = 3 + data[2]
        seq = int.from_bytes(data[name_ends : name_ends + 8])
        type_ends = name_ends + 9 + data[name_ends + 8]
        task_id = data[3:name_ends].decode()
        reader = self.readers.get(task_id)
        known = None if reader is None else reader.known() or self._world.ledger.one_of(reader, seq)
        if data[:2] != b"\x01\x00" or reader is None or known is None or seq > len(known.chunks):
            note(f"a binary frame of no task that is followed, or not committed: {data[:40]!r}")
            return
        chunk = known.chunks[seq - 1]
        if chunk.media_type != data[name_ends + 9 : type_ends].decode() or b64decode(chunk.content) != data[type_ends:]:
            note(f"a binary frame {seq} of {task_id!r} is not what is in the log")
        reader.take(chunk, b"{" + known.rests[seq - 1])

    def lost(self) -> None:
        self.open = False
        for reader in self.readers.values():
            reader.gone()
        for task_id in [name for name, places in self.attaching.items() if places]:
            self._attached(task_id)

    def failed(self, error: BaseException) -> None:
        self._world.ledger.note(f"the application raised {error!r} on a WebSocket")


class Call:
    """A request, and its answer: one body, or a stream of events with a reader."""

    link: Link

    def __init__(self, world: World, kind: str, *, reader: Reader | None = None, agent_id: str = "") -> None:
        self.kind = kind
        self.agent_id = agent_id
        self.asked_at = world.now
        self.status: int | None = None
        self.body = bytearray()
        self.complete = False
        self.reader = reader
        self.submission: Submission | None = None
        self.task_id = ""
        self.after = 0
        self.events = False
        self._world = world

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {name.lower(): value for name, value in message["headers"]}
            self.events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
            if self.events:
                self._take_events()
            if not message.get("more_body", False):
                self.complete = True
                self._check()
        else:
            self._world.ledger.note(f"the application sent {message['type']} on HTTP")

    def _take_events(self) -> None:
        *events, rest = bytes(self.body).split(b"\n\n")
        self.body = bytearray(rest)
        for event in events:
            if event.startswith(b":"):
                continue
            identity, _, data = event.rpartition(b"\n")
            line = data.removeprefix(b"data: ")
            chunk = decode_chunk(line)
            expected = b"" if chunk.seq == 0 else b"id: %d" % chunk.seq
            if identity != expected or line == data or self.reader is None:
                self._world.ledger.note(f"an event that is none: {event!r}")
            else:
                self.reader.take(chunk, line)

    def _check(self) -> None:
        """The answer is complete."""
        note = self._world.ledger.note
        name = f"{self.kind} {self.task_id}"
        if self.status is None or (self.status >= 500 and self.status != 503):
            note(f"{name} was answered with {self.status}: {bytes(self.body)!r}")
        elif self.events:
            if self.reader is not None and not self.reader.ended:
                note(f"a stream of {self.reader.task_id!r} ended at {self.reader.next} without a final chunk")
        elif self.status >= 400:
            problem = json.loads(bytes(self.body))
            self._world.refused(problem["code"], f"{name}: {problem['detail']}")
        elif self.status == 204 and self.kind == "events":
            self._check_nothing()
        elif self.kind == "task" and self.submission is not None:
            self._check_task(json.loads(bytes(self.body)), self.submission)
        elif self.kind == "cancel":
            self._check_cancelled(json.loads(bytes(self.body)))
        elif self.kind == "page":
            self._check_page(json.loads(bytes(self.body)))

    def _check_task(self, task: Any, submission: Submission) -> None:
        """What was acknowledged is on the disk."""
        ledger = self._world.ledger
        asked = task["status"] == "input_required"
        if not any(
            self.status == 202 or known.status == task["status"] or (asked and known.questions)
            for known in ledger.of_plan(submission.plan.nonce)
        ):
            ledger.note(f"task {submission.task_id!r} was answered with {self.status} {task['status']}; it is not so")
        if (self.status == 200) != (task["status"] in ENDED | {"input_required"}):
            ledger.note(f"task {submission.task_id!r} was answered with {self.status}, it is {task['status']}")

    def _check_cancelled(self, task: Any) -> None:
        ledger = self._world.ledger
        found = [ledger.tasks[key] for key in ledger.candidates(self.agent_id, self.task_id)]
        if task["status"] not in ENDED or not any(known.status == task["status"] for known in found):
            ledger.note(f"the cancel of {self.task_id!r} was answered with {task['status']}")

    def _check_nothing(self) -> None:
        """204 stops a browser for good: it must have everything."""
        ledger = self._world.ledger
        found = [ledger.tasks[key] for key in ledger.candidates(self.agent_id, self.task_id)]
        if not any(known.final is not None and known.final.seq <= self.after for known in found):
            ledger.note(f"a reader of {self.task_id!r} behind {self.after} was told that there is nothing")

    def _check_page(self, page: Any) -> None:
        reader = self.reader
        assert reader is not None
        lines = bytes(self.body)
        for chunk in page["chunks"]:
            reader.take(decode_chunk(json.dumps(chunk).encode()), rebuilt(lines, chunk["seq"]))

    def lost(self) -> None:
        if self.reader is not None:
            self.reader.gone()

    def failed(self, error: BaseException) -> None:
        self._world.ledger.note(f"the application raised {error!r} on {self.kind}")


def rebuilt(page: bytes, seq: int) -> bytes:
    """The encoded chunk as it stands in a page of them."""
    start = page.index(b'"seq":%d,' % seq)
    end = page.index(b'"final":', start)
    return b"{" + page[start : page.index(b"}", end) + 1]


def viewing(window: int | None, binary: bool) -> dict[str, Any]:
    return ({} if window is None else {"window": window}) | ({"binary": True} if binary else {})


def request_of(submission: Submission) -> dict[str, Any]:
    kind, _, grace = submission.policy.partition(":")
    request: dict[str, Any] = {
        "taskId": submission.task_id,
        "input": {"type": "text/plain", "content": msgspec.json.encode(submission.plan).decode()},
        "onDisconnect": {"graceMs": int(grace)} if kind == "grace" else kind,
        "timeoutMs": int(submission.timeout * 1000),
    }
    if submission.session_id is not None:
        request["context"] = {"sessionId": submission.session_id}
    if submission.multitask is not None:
        request["multitask"] = submission.multitask
    return request
