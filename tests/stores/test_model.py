"""Whatever is asked, in whatever order: the SQL store answers as the memory store does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hector_trio.errors import HectorError
from hector_trio.models import Content
from hector_trio.session import etag
from hector_trio.stores import Append, Change, Store
from hector_trio.stores.memory import open_memory
from hector_trio.stores.sql import open_sql
from tests.stores.making import NOW, idempotency, message, new_session, new_task

OWNERS = st.sampled_from(["alice", "bob"])
AGENTS = st.sampled_from(["a", "b"])
TASKS = st.sampled_from(["t", "t~1", "t~2", "x" * 128])
SESSIONS = st.sampled_from(["s", "z"])
INSTANCES = st.sampled_from(["one", "two"])
KEYS = st.integers(1, 6)
TIMES = st.integers(NOW, NOW + 30).map(lambda n: n * 100)
LATER = TIMES.map(lambda at: at + 500)
JSON = st.sampled_from([None, 1, "x", [1, {"y": None}], {"a": {"b": 2}}])
OBJECTS = st.dictionaries(st.sampled_from("ab"), JSON, max_size=2)


def step(name: str, **members: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(name), st.fixed_dictionaries(members))


STEPS = st.one_of(
    step(
        "create_task",
        owner=OWNERS,
        agent_id=AGENTS,
        task_id=TASKS,
        instance=INSTANCES,
        created_at=TIMES,
        fingerprint=st.sampled_from("fg"),
        session_id=st.none() | SESSIONS,
        metadata=OBJECTS,
        idempotency=st.none() | st.builds(idempotency, st.sampled_from("kl"), st.sampled_from("bc"), expires_at=LATER),
    ),
    step(
        "append",
        rows=st.lists(
            st.tuples(
                KEYS,
                INSTANCES,
                st.integers(-1, 1),
                st.integers(0, 2),
                st.sampled_from([None, None, "running", "input_required", "completed", "failed"]),
                st.none() | JSON,
                TIMES,
            ),
            min_size=1,
            max_size=3,
            unique_by=lambda row: row[0],
        ),
    ),
    step("delete_task", owner=OWNERS, agent_id=AGENTS, task_id=TASKS),
    step("take_over", instance=INSTANCES),
    step(
        "create_session",
        owner=OWNERS,
        session_id=SESSIONS,
        agent_id=AGENTS,
        created_at=TIMES,
        metadata=OBJECTS,
        state=OBJECTS,
        ttl_seconds=st.none() | st.integers(1, 2),
        limit=st.integers(1, 2),
    ),
    step(
        "update_session", owner=OWNERS, session_id=SESSIONS, now=TIMES, state=st.none() | OBJECTS, metadata=JSON,
        match=st.booleans(),
    ),
    step("delete_session", owner=OWNERS, session_id=SESSIONS),
    step("sweep", now=TIMES, tasks_ended_before=TIMES, limit=st.integers(1, 3)),
    step("look", owner=OWNERS, now=TIMES, limit=st.integers(1, 2), metadata=st.none() | st.just({"a": "1"})),
)  # fmt: skip


async def pages(ask: Any) -> list[Any]:
    """All pages of a list."""
    found = [await ask("")]
    while found[-1].next_token:
        found.append(await ask(found[-1].next_token))
    return found


async def look(store: Store, owner: str, now: int, limit: int, metadata: dict[str, str] | None) -> list[Any]:
    """Everything there is to see."""
    seen: list[Any] = [
        await pages(lambda token: store.list_tasks(owner, now=now, limit=limit, token=token)),
        await pages(
            lambda token: store.list_tasks(owner, now=now, agent_id="a", session_id="s", limit=limit, token=token)
        ),
        await pages(lambda token: store.list_tasks(owner, now=now, status="completed", limit=limit, token=token)),
        await pages(lambda token: store.list_sessions(owner, now=now, metadata=metadata, limit=limit, token=token)),
        await store.history(owner, "s", limit=limit),
        await store.find_idempotent(owner, idempotency(), now=now),
    ]
    if await store.get_session(owner, "s", now=now) is not None:
        seen.append(await pages(lambda token: store.list_messages(owner, "s", now=now, limit=limit, token=token)))
    for key in range(1, 7):
        seen += [await store.get_task_by_key(key), await store.read_log(key, limit, 5)]
    return seen


async def append(store: Store, rows: list[tuple[Any, ...]]) -> frozenset[int]:
    made = []
    for key, instance, shift, size, status, content, at in rows:
        row = await store.get_task_by_key(key)
        first = max(1, (row.last_seq if row is not None else 0) + 1 + shift)
        data = b"\n".join(b"%d" % (first + n) for n in range(size))
        change = None
        if status is not None:
            change = Change(status, Content("application/json", content), None, at if status[-2:] == "ed" else None)
            if status == "input_required":
                change = Change(status)
        line = None if content is None else message(content, "t", at)
        made.append(Append(key, instance, first, first + size - 1, data, change, line))
    return await store.append(made)


async def take(store: Store, name: str, members: dict[str, Any]) -> Any:
    """One step; a refusal is an answer too."""
    members = dict(members)
    try:
        if name == "create_task":
            return await store.create_task(new_task(**members))
        if name == "append":
            return await append(store, members["rows"])
        if name == "create_session":
            limit = members.pop("limit")
            row = new_session(**members, last_activity_at=members["created_at"])
            return await store.create_session(row, limit=limit)
        if name == "update_session" and members.pop("match"):
            session = await store.get_session(members["owner"], members["session_id"], now=members["now"])
            members["if_match"] = "none" if session is None else etag(session)
        if name == "look":
            return await look(store, **members)
        return await getattr(store, name)(**members)
    except HectorError as error:
        return type(error), error.detail


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, max_size=40))
def test_both_stores_answer_the_same(steps: list[tuple[str, dict[str, Any]]]) -> None:
    async def compare() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with open_memory("one") as memory, open_sql(Path(folder) / "h.db", instance="one") as sql:
                for name, members in steps:
                    assert await take(sql, name, members) == await take(memory, name, members), name
                for owner in ("alice", "bob"):
                    last = {"owner": owner, "now": NOW * 100, "limit": 2, "metadata": None}
                    assert await take(sql, "look", last) == await take(memory, "look", last)

    trio.run(compare)
