"""A seeded schedule: cuts, stalls, cancels, crashes and restarts, and what must hold after each of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import trio
import trio.testing
from trio._core import _run as trio_run

from hector_trio.task import TaskRow
from tests.simulation.agent import random_plan
from tests.simulation.clients import Call, Socket
from tests.simulation.invariants import BrokenPromise, Reader, Submission
from tests.simulation.world import AGENTS, SOON, World, errors_noted, virtual

CODES: Final = (1000, 1001, 1005, 1006, 1009, 4000)
"""With which codes clients leave; 1006: without a Close frame."""

PATIENCE: Final = 2500.0
"""Seconds of virtual time within which everything is over once nothing is wrong any more."""


@dataclass
class Result:
    seed: int
    steps: int
    story: list[str]
    broken: list[str]
    """Empty: all promises were kept."""

    def told(self, lines: int = 60) -> str:
        command = f"python -m tests.simulation --seed {self.seed} --steps {self.steps} --story"
        return "\n".join([*self.story[-lines:], "", *self.broken[:10], "", f"Replay: {command}"])


def run_schedule(seed: int, steps: int | None = None) -> Result:
    """Runs the schedule of ``seed``, at most ``steps`` of its actions, in a Trio of its own. Blocks; uses no thread."""
    result = Result(seed, 0, [], [])

    async def main() -> None:
        try:
            with trio.fail_after(100_000):
                await _main(result, steps)
        except trio.TooSlowError:
            result.broken.append("the schedule does not end")
        except Exception:
            result.broken.append(traceback.format_exc())

    with scheduler_seeded(seed), virtual(seed), errors_noted(result.broken):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return result


@contextmanager
def scheduler_seeded(seed: int) -> Iterator[None]:
    """Trio shuffles the tasks that are ready by a random generator of its own, after it has put them in order if it
    was told to. This is the one place that seeds it, so that a schedule replays: nothing else here depends on chance.
    """
    before = trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING
    trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING = Random(seed), True  # type: ignore[misc]
    try:
        yield
    finally:
        trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before  # type: ignore[misc]


async def _main(result: Result, steps: int | None) -> None:
    async with trio.open_nursery() as nursery:
        world = World(result.seed, nursery)
        result.story = world.story
        schedule = Schedule(world)
        try:
            await schedule.run(result, steps)
            await schedule.finish()
        except BrokenPromise:
            pass
        finally:
            result.broken += world.ledger.broken
            nursery.cancel_scope.cancel()


class Schedule:
    """Draws one action after the other. Each schedule prefers some kinds of actions, so that they meet often."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self._nonces = 0
        actions: dict[Callable[[], None], float] = {
            self.open_socket: 5,
            self.ask: 14,
            self.post: 5,
            self.stream: 6,
            self.follow: 6,
            self.page: 2,
            self.look: 2,
            self.repeat: 4,
            self.cancel: 3,
            self.cancel_on_socket: 3,
            self.attach: 6,
            self.detach: 3,
            self.answer: 5,
            self.grant: 6,
            self.ping: 1,
            self.nonsense: 1,
            self.stall: 5,
            self.read: 4,
            self.cut: 6,
            self.new_session: 3,
            self.delete_session: 1.5,
            self.delete_task: 1,
            self.change_weather: 3,
            self.clear_up: 3,
            self.stop: 0.6,
        }
        self._actions = {action: weight * self.random.choice((0.2, 1, 1, 3)) for action, weight in actions.items()}
        self._crashes = self.random.choice((0.0, 0.01, 0.05))
        self._length = self.random.randint(10, 60)

    async def run(self, result: Result, steps: int | None) -> None:
        world = self.world
        world.start()
        await self.settle()
        if self.random.random() < 0.5:
            self.take_time()
        actions, weights = list(self._actions), list(self._actions.values())
        for number in range(self._length if steps is None else min(steps, self._length)):
            result.steps = number + 1
            if world.process is None or world.process.gone.is_set():
                if world.weather.bad and self.random.random() < 0.4:
                    self.clear_up()
                world.start()
            elif self.random.random() < self._crashes:
                await world.crash()
            else:
                self.random.choices(actions, weights)[0]()
            await self._let_go_on()
            self.raise_broken()

    async def _let_go_on(self) -> None:
        """Some schedules' actions meet in one instant, others are seconds apart."""
        match self.random.randrange(10):
            case 0 | 1:
                return
            case 2:
                await trio.lowlevel.checkpoint()
            case 3 | 4 | 5:
                await self.settle()
            case 6 | 7:
                await trio.sleep(self.random.choice((0.001, 0.05, 0.3)))
            case 8:
                await trio.sleep(self.random.choice((1.0, 3.0)))
            case _:
                await trio.sleep(self.random.choice((5.0, 12.0, 30.0)))
        self.world.check(settled=False)

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        process = self.world.process
        if process is not None and process.up:
            if not self.world.baseline:
                self.world.baseline = trio.lowlevel.current_statistics().tasks_living
            self.world.check(settled=True)
        self.world.forget_finished()

    def raise_broken(self) -> None:
        if self.world.ledger.broken:
            raise BrokenPromise

    # --- the end

    async def finish(self) -> None:
        """All is well again: every task ends, and then nothing is left."""
        world = self.world
        world.say("the end: all is well again")
        world.weather.change()
        if world.process is not None and self.random.random() < 0.3:
            await world.crash()
        if world.process is not None and world.stopping:
            with trio.move_on_after(PATIENCE):
                await world.process.gone.wait()
        await trio.sleep(SOON)  # one that starts has started by now, or failed
        if world.process is None or world.process.gone.is_set():
            world.start()
        for link in world.links:
            if self.random.random() < 0.5:
                link.read()
        await self.settle()
        self.raise_broken()
        with trio.move_on_after(PATIENCE):
            while any(not row.ended for row in world.ledger.disk.rows()):
                await trio.sleep(5)
                world.check(settled=False)
                self.raise_broken()
        for row in world.ledger.disk.rows():
            if not row.ended:
                world.ledger.note(f"task {row.task_id!r} does not end: it is {row.status}")
        for link in world.links:
            link.read()
        await self.settle()
        for link in world.links:
            link.leave(self.random.choice(CODES))
        await trio.sleep(SOON)
        await self.settle()
        assert world.process is not None
        world.check_quiet(world.process)
        world.ledger.check_disk()
        world.ledger.check_conversations()
        world.process.stop()
        with trio.move_on_after(PATIENCE):
            await world.process.gone.wait()
        world.check(settled=False)
        self.raise_broken()

    # --- actions

    def submission(self) -> Submission:
        random, world = self.random, self.world
        self._nonces += 1
        session_id, agent_id = None, random.choice(AGENTS)
        if world.sessions and random.random() < 0.5:
            session_id = random.choice(list(world.sessions))
            agent_id = world.sessions[session_id]
        names = [f"t{self._nonces}", f"t{self._nonces}", f"t{self._nonces}", "same"]
        submission = Submission(
            agent_id,
            random.choice(names),
            random_plan(random, self._nonces),
            session_id,
            random.choice(("cancel", "continue", "cancel", "continue", "grace:0", "grace:500", "grace:4000")),
            random.choice((None, None, None, "enqueue", "reject", "interrupt")),
            random.choice((1.0, 10.0, 60.0, 120.0)),
        )
        world.ledger.submissions[self._nonces] = submission
        if submission.multitask == "interrupt" and session_id is not None:
            world.ledger.interrupts.add(session_id)
        return submission

    def say(self, text: str) -> None:
        self.world.say(text)

    def _socket(self, agent_id: str | None = None) -> Socket | None:
        found = [each for each in self.world.sockets if not each.link.gone and agent_id in (None, each.agent_id)]
        return self.random.choice(found) if found else None

    def open_socket(self) -> None:
        agent_id = self.random.choice(AGENTS)
        self.say(f"a socket of {agent_id!r} is opened")
        self.world.open_socket(agent_id)

    def ask(self) -> None:
        submission = self.submission()
        socket = self._socket(submission.agent_id)
        if socket is None or self.random.random() < 0.3:
            socket = self.world.open_socket(submission.agent_id)
        reader = socket.readers.get(submission.task_id)
        if socket.attaching.get(submission.task_id) or (reader is not None and not reader.ended):
            return  # which answer belongs to which request could not be told
        window = self.random.choice((None, None, 1, 3))
        pause = window is not None and self.random.random() < 0.5
        self.say(f"ask {self.words(submission)}, window {window}{' and pauses' if pause else ''}")
        socket.ask(submission, window=window, pause=pause, binary=self.random.random() < 0.2)

    def words(self, submission: Submission) -> str:
        steps = " ".join(f"{step.kind}:{step.number:g}" for step in submission.plan.steps)
        session = "" if submission.session_id is None else f" in {submission.session_id} ({submission.multitask})"
        name = f"{submission.agent_id}/{submission.task_id}{session}"
        return f"{name} {submission.policy} {submission.timeout:g} s [{steps}]"

    def post(self) -> None:
        submission = self.submission()
        headers: dict[str, str] = {}
        match self.random.randrange(4):
            case 0:
                headers["Prefer"] = "respond-async"
            case 1:
                headers["Prefer"] = "wait=2"
            case 2:
                headers["Idempotency-Key"] = f"k{submission.plan.nonce}"
        self.say(f"post {self.words(submission)} {headers}")
        self.world.post_task(submission, streamed=False, **headers)

    def stream(self) -> None:
        submission = self.submission()
        self.say(f"stream {self.words(submission)}")
        self.world.post_task(submission, streamed=True)

    def repeat(self) -> None:
        """The same request again, by somebody else or the same."""
        found = list(self.world.ledger.submissions.values())
        if not found:
            return
        submission = self.random.choice(found[-5:])
        socket = self._socket(submission.agent_id)
        if socket is not None and self.random.random() < 0.6:
            reader = socket.readers.get(submission.task_id)
            if reader is not None and not reader.ended and reader.nonce != submission.plan.nonce:
                return
            if socket.attaching.get(submission.task_id):
                return
            self.say(f"ask again {submission.task_id}")
            socket.ask(submission)
        else:
            self.say(f"post again {submission.task_id}")
            self.world.post_task(submission, streamed=self.random.random() < 0.5)

    def _row(self) -> TaskRow | None:
        """A task, rather one that is new or waits: most can happen to those."""
        rows = self.world.ledger.disk.rows()
        waiting = [row for row in rows if row.status in ("pending", "input_required")]
        match self.random.randrange(4):
            case 0 if waiting:
                rows = waiting
            case 1 | 2:
                rows = rows[-2:]
        return self.random.choice(rows[-12:]) if rows else None

    def place(self, row: TaskRow) -> int:
        """Somewhere in a task's log, as far as somebody can know of it."""
        known = self.world.ledger.tasks[row.key]
        old = known.ended_at is not None and known.ended_at + SOON < self.world.now
        return self.random.randint(0, row.last_seq if old else known.seen)

    def follow(self) -> None:
        row = self._row()
        if row is None:
            return
        after = self.place(row)
        call = Call(self.world, "events", agent_id=row.agent_id)
        call.task_id = row.task_id
        headers = {"Accept": "text/event-stream"}
        query = ""
        if self.random.random() < 0.5:
            headers["Last-Event-ID"] = str(after)
        else:
            query = f"after={after}"
            after = min(after, row.last_seq - 1) if row.ended else after
        call.after = after
        call.reader = Reader(self.world.ledger, row.agent_id, row.task_id, after=after)
        call.reader.final_once = bool(query)
        self.say(f"follow {row.agent_id}/{row.task_id} {query or headers['Last-Event-ID']}")
        self.world.request(call, "GET", f"/agents/{row.agent_id}/tasks/{row.task_id}/events", query=query, **headers)

    def page(self) -> None:
        row = self._row()
        if row is None:
            return
        after = self.random.randint(0, row.last_seq)
        call = Call(self.world, "page", agent_id=row.agent_id)
        call.task_id = row.task_id
        call.reader = Reader(self.world.ledger, row.agent_id, row.task_id, after=after, counted=False)
        path = f"/agents/{row.agent_id}/tasks/{row.task_id}/events"
        self.world.request(call, "GET", path, query=f"after={after}&pageSize={self.random.choice((1, 7, 100))}")

    def look(self) -> None:
        row = self._row()
        paths = ["/sessions", "/health/ready", "/agents/a/tasks"]
        if row is not None:
            paths.append(f"/agents/{row.agent_id}/tasks/{row.task_id}")
            if row.session_id is not None:
                paths += [f"/sessions/{row.session_id}", f"/sessions/{row.session_id}/messages"]
        path = self.random.choice(paths)
        self.world.request(Call(self.world, f"GET {path}"), "GET", path)

    def cancel(self) -> None:
        row = self._row()
        if row is None:
            return
        self.say(f"cancel {row.agent_id}/{row.task_id}")
        self.world.ledger.cancelled.add(row.task_id.partition("~")[0])
        call = Call(self.world, "cancel", agent_id=row.agent_id)
        call.task_id = row.task_id
        self.world.request(call, "POST", f"/agents/{row.agent_id}/tasks/{row.task_id}/cancel")

    def cancel_on_socket(self) -> None:
        socket = self._socket()
        if socket is None:
            return
        if self.random.random() < 0.3:
            self.say(f"cancel all on a socket: {list(socket.readers)}")
            self.world.ledger.cancelled |= set(socket.readers)
            socket.control("cancel")
        elif (row := self._row()) is not None:
            self.say(f"cancel {row.task_id} on a socket")
            self.world.ledger.cancelled.add(row.task_id.partition("~")[0])
            socket.control("cancel", taskId=row.task_id, reason="enough")

    def attach(self) -> None:
        row = self._row()
        if row is None or (socket := self._socket(row.agent_id)) is None:
            return
        reader = socket.readers.get(row.task_id)
        if socket.attaching.get(row.task_id) or (reader is not None and reader.may_restart):
            return  # which answer belongs to which frame could not be told
        after, window = self.place(row), self.random.choice((None, None, 1, 5))
        self.say(f"attach {row.task_id} after {after}, window {window}")
        socket.attach(row.task_id, after, window=window, binary=self.random.random() < 0.2)

    def _followed(self) -> tuple[Socket, Reader] | None:
        found = [
            (socket, reader)
            for socket in self.world.sockets
            for reader in socket.readers.values()
            if not (socket.link.gone or reader.ended or reader.may_restart)
        ]
        return self.random.choice(found) if found else None

    def detach(self) -> None:
        found = self._followed()
        if found is not None and not found[0].attaching.get(found[1].task_id):
            self.say(f"detach {found[1].task_id}")
            found[0].control("detach", taskId=found[1].task_id)
            found[1].gone()

    def grant(self) -> None:
        found = self._followed()
        if found is not None and found[1].window is not None and found[1].unacknowledged > 0:
            frames = self.random.randint(1, found[1].unacknowledged)
            self.say(f"grant {frames} to {found[1].task_id}")
            found[0].grant(found[1], frames)

    def answer(self) -> None:
        rows = [row for row in self.world.ledger.disk.rows() if row.status == "input_required"]
        row = self.random.choice(rows) if rows and self.random.random() < 0.9 else self._row()
        if row is None:
            return
        submission = self.world.ledger.submissions[self.world.ledger.tasks[row.key].plan.nonce]
        text = f"answer {len(submission.answers)}"
        submission.answers.add(text)
        socket = self._socket(row.agent_id)
        if socket is not None and self.random.random() < 0.6:
            self.say(f"answer {row.task_id} on a socket")
            submission.links.append(socket.link)
            socket.control("input", taskId=row.task_id, input={"type": "text/plain", "content": text})
        else:
            self.say(f"answer {row.task_id}")
            self.world.post_answer(submission, row.task_id, text, streamed=self.random.random() < 0.4)

    def ping(self) -> None:
        if (socket := self._socket()) is not None:
            socket.control("ping", id=7)

    def nonsense(self) -> None:
        if (socket := self._socket()) is not None:
            self.say("a bad frame")
            nonsense = {"text": "{"}, {"bytes": b"\0"}, {"text": "[]"}, {"text": '{"input":3}'}
            socket.nonsense(self.random.choice(nonsense))

    def _link(self) -> Any:
        links = [link for link in self.world.links if not link.gone]
        return self.random.choice(links) if links else None

    def stall(self) -> None:
        if (link := self._link()) is not None:
            self.say(f"a client of {link.scope['path']} stalls")
            link.stall()

    def read(self) -> None:
        stalled = [link for link in self.world.links if link.stalled]
        if stalled:
            link = self.random.choice(stalled)
            count = self.random.choice((None, 1, 5))
            self.say(f"a client of {link.scope['path']} reads {count or 'on'}")
            link.read(count)

    def cut(self) -> None:
        if (link := self._link()) is not None:
            code = self.random.choice(CODES)
            self.say(f"a client of {link.scope['path']} leaves with {code}")
            link.leave(code, unread=self.random.random() < 0.3)

    def new_session(self) -> None:
        session_id, agent_id = f"s{self.random.randrange(4)}", self.random.choice(AGENTS)
        if session_id in self.world.sessions:
            agent_id = self.world.sessions[session_id]
        self.world.sessions[session_id] = agent_id
        self.say(f"session {session_id} of {agent_id}")
        call = Call(self.world, "new session")
        self.world.request(call, "POST", "/sessions", body={"agentId": agent_id, "sessionId": session_id})

    def delete_session(self) -> None:
        if self.world.sessions:
            rows = [row for row in self.world.ledger.disk.rows() if row.status == "input_required"]
            waiting = [row.session_id for row in rows if row.session_id is not None]
            session_id = self.random.choice(waiting or list(self.world.sessions))
            self.say(f"delete session {session_id}")
            self.world.ledger.removed_sessions.add(session_id)
            self.world.request(Call(self.world, "delete session"), "DELETE", f"/sessions/{session_id}")

    def delete_task(self) -> None:
        row = self._row()
        if row is not None:
            self.say(f"delete task {row.task_id}")
            self.world.ledger.removed_tasks.add(row.task_id.partition("~")[0])
            self.world.request(Call(self.world, "delete task"), "DELETE", f"/agents/{row.agent_id}/tasks/{row.task_id}")

    def change_weather(self) -> None:
        weather = self.world.weather
        match self.random.randrange(6):
            case 0:
                self.say("the disk is full")
                weather.change(full=True)
            case 1:
                self.say("the store is away")
                weather.change(full=True, broken=True)
            case 2:
                self.say("the store hiccups")
                weather.change(hiccups=0.2, delays=(0.0, 0.001))
            case 3:
                self.say("the store is slow")
                weather.change(delays=(0.0, 0.5, 2.0))
            case _:
                self.take_time()

    def take_time(self) -> None:
        """As long as real stores do: what is between two of their steps is seen by others."""
        self.say("the store takes its time")
        self.world.weather.change(delays=self.random.choice(((0.001,), (0.0, 0.01), (0.0, 0.1, 0.02))))

    def clear_up(self) -> None:
        if self.world.weather.bad:
            self.say("the store is well")
        self.world.weather.change()

    def stop(self) -> None:
        process = self.world.process
        if process is not None and process.up and not self.world.stopping:
            self.say(f"{process.name} is told to stop")
            process.stop()
