"""The contract of the Store protocol, run over every implementation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import pytest
import trio
from msgspec.structs import replace

from hector_trio.errors import (
    HectorError,
    IdempotencyMismatch,
    InvalidRequest,
    PreconditionFailed,
    RateLimited,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    TaskExists,
    TaskNotFound,
    TaskRunning,
)
from hector_trio.models import Content, TaskError
from hector_trio.session import MessageRow, SessionRow, etag
from hector_trio.stores import Change, NewPush, Page, Push, PushMove, Segment, Store, checkpoints
from hector_trio.task import Question, TaskRow
from tests.stores.making import (
    ME,
    NOW,
    accept,
    chunks,
    completed,
    end,
    ended,
    idempotency,
    message,
    new_session,
    new_task,
)

T = TypeVar("T")

# --- accepting --------------------------------------------------------------------------------------------------------


async def test_a_new_task_is_pending_and_is_found_by_name_and_by_key(store: Store) -> None:
    row = await accept(store, metadata={"a": [1, None, "ü"]}, created_at=NOW + 7)
    assert (row.status, row.last_seq, row.created_at, row.instance) == ("pending", 0, NOW + 7, ME)
    assert (row.request, row.metadata, row.output, row.error, row.ended_at) == (
        b'{"input":{}}',
        {"a": [1, None, "ü"]},
        None,
        None,
        None,
    )
    assert await store.get_task("alice", "a", "t") == row
    assert await store.get_task_by_key(row.key) == row


async def test_what_belongs_to_somebody_else_does_not_exist(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    await ended(store)
    assert await store.get_task("bob", "a", "t") is None
    assert await store.get_task("alice", "other", "t") is None
    assert (await store.list_tasks("bob")).items == []
    assert await store.get_session("bob", "s", now=NOW) is None
    assert (await store.list_sessions("bob", now=NOW)).total == 0
    assert await store.history("bob", "s", limit=9) == []
    with pytest.raises(TaskNotFound):
        await store.delete_task("bob", "a", "t")
    for question in (
        store.list_messages("bob", "s", now=NOW),
        store.update_session("bob", "s", now=NOW),
        store.delete_session("bob", "s"),
        store.create_task(new_task("u", owner="bob", session_id="s")),
    ):
        with pytest.raises(SessionNotFound):
            await question


async def test_the_same_id_is_another_task_for_another_owner_or_agent(store: Store) -> None:
    rows = [await accept(store), await accept(store, owner="bob"), await accept(store, agent_id="b")]
    assert len({row.key for row in rows}) == 3
    assert sorted(row.key for row in rows) == [row.key for row in rows]


async def test_the_same_request_for_a_running_task_finds_it(store: Store) -> None:
    row = await accept(store)
    again = await store.create_task(new_task())
    assert (again.how, again.task) == ("running", row)
    with pytest.raises(TaskExists) as caught:
        await store.create_task(new_task(fingerprint="another"))
    assert caught.value.task_id == "t"


async def test_an_ended_task_makes_room_for_a_new_one_under_its_id(store: Store) -> None:
    rows = [await ended(store) for _ in range(12)]
    last = await accept(store)
    assert await store.get_task("alice", "a", "t") == last
    for number, row in enumerate(rows, start=1):
        found = await store.get_task("alice", "a", f"t~{number}")
        assert found is not None
        assert (found.key, found.status) == (row.key, "completed")
        assert await store.read_log(row.key, 0, 99) == [Segment(1, 1, b"end")]


async def test_an_id_that_looks_like_ours_is_not_given_twice(store: Store) -> None:
    chosen = await accept(store, "t~1")
    first = await ended(store)
    await accept(store)
    assert await store.get_task("alice", "a", "t~1") == chosen
    renamed = await store.get_task("alice", "a", "t~2")
    assert renamed is not None
    assert renamed.key == first.key


async def test_long_ids_are_shortened_for_the_number_and_stay_apart(store: Store) -> None:
    ids = ["x" * 127 + "a", "x" * 127 + "b", "x" * 126]
    keys = []
    for task_id in ids:
        keys += [(await ended(store, task_id)).key for _ in range(5)]
        await accept(store, task_id)
    names = [row.task_id for row in [await store.get_task_by_key(key) for key in keys] if row is not None]
    assert len(set(names)) == 15
    assert all(len(name) <= 128 for name in names)
    assert names[0] == "x" * 126 + "~1"


async def test_nobody_can_use_up_the_names_of_somebody_elses_task(store: Store) -> None:
    await accept(store, "t~999999999")
    await ended(store)
    with pytest.raises(TaskExists):
        await store.create_task(new_task())
    await ended(store, owner="bob")
    await accept(store, owner="bob")


async def test_an_idempotency_key_leads_to_its_task_also_after_that_was_replaced(store: Store) -> None:
    new = new_task(idempotency=idempotency())
    first = await store.create_task(new)
    assert (await store.create_task(new)).how == "replayed"
    await end(store, first.task)
    await accept(store)
    again = await store.create_task(new)
    assert (again.how, again.task.key, again.task.task_id) == ("replayed", first.task.key, "t~1")
    assert await store.find_idempotent("alice", idempotency(), now=NOW) == again


async def test_an_idempotency_key_with_another_body_is_refused(store: Store) -> None:
    await store.create_task(new_task(idempotency=idempotency()))
    with pytest.raises(IdempotencyMismatch):
        await store.create_task(new_task("other", idempotency=idempotency(body="c")))
    with pytest.raises(IdempotencyMismatch):
        await store.find_idempotent("alice", idempotency(body="c"), now=NOW)
    assert await store.get_task("alice", "a", "other") is None


async def test_an_idempotency_key_holds_for_one_owner_until_it_expires_or_its_task_is_deleted(store: Store) -> None:
    row = (await store.create_task(new_task(idempotency=idempotency(expires_at=NOW + 10)))).task
    assert await store.find_idempotent("bob", idempotency(), now=NOW) is None
    assert await store.find_idempotent("alice", idempotency("other"), now=NOW) is None
    assert await store.find_idempotent("alice", idempotency(), now=NOW + 9) is not None
    assert await store.find_idempotent("alice", idempotency(), now=NOW + 10) is None
    second = await store.create_task(new_task("u", created_at=NOW + 10, idempotency=idempotency(body="c")))
    assert second.how == "created"
    await end(store, row)
    await store.delete_task("alice", "a", "t")
    assert (await store.find_idempotent("alice", idempotency(body="c"), now=NOW)) is not None
    await end(store, second.task)
    await store.delete_task("alice", "a", "u")
    assert await store.find_idempotent("alice", idempotency(), now=NOW) is None


async def test_a_key_used_for_a_running_task_leads_to_it(store: Store) -> None:
    row = await accept(store)
    assert (await store.create_task(new_task(idempotency=idempotency()))).how == "running"
    await end(store, row)
    assert (await store.create_task(new_task(idempotency=idempotency()))).how == "replayed"


async def test_a_task_needs_its_session_alive_and_of_its_agent(store: Store) -> None:
    await store.create_session(new_session(ttl_seconds=10), limit=9)
    with pytest.raises(SessionNotFound):
        await store.create_task(new_task(session_id="unknown"))
    with pytest.raises(SessionMismatch):
        await store.create_task(new_task(agent_id="b", session_id="s"))
    with pytest.raises(SessionNotFound):
        await store.create_task(new_task(session_id="s", created_at=NOW + 10_000))
    row = await accept(store, session_id="s", created_at=NOW + 5)
    assert row.session_id == "s"
    session = await store.get_session("alice", "s", now=NOW + 10_004)
    assert session is not None
    assert session.last_activity_at == NOW + 5


# --- logs -------------------------------------------------------------------------------------------------------------


async def test_a_log_is_read_in_order_from_the_segment_that_holds_the_next_chunk(store: Store) -> None:
    key = (await accept(store)).key
    assert await store.read_log(key, 0, 99) == []
    for append in (chunks(key, 1, b"a", b"b", b"c"), chunks(key, 4, b"d"), chunks(key, 5, b"e", b"f")):
        assert await store.append([append]) == frozenset()
    one, two, three = Segment(1, 3, b"a\nb\nc"), Segment(4, 4, b"d"), Segment(5, 6, b"e\nf")
    assert await store.read_log(key, 0, 99) == [one, two, three]
    assert await store.read_log(key, 2, 99) == [one, two, three]
    assert await store.read_log(key, 3, 99) == [two, three]
    assert await store.read_log(key, 5, 99) == [three]
    assert await store.read_log(key, 6, 99) == []
    assert await store.read_log(key, 0, 0) == [one]
    assert await store.read_log(key, 0, 6) == [one, two]
    assert await store.read_log(key + 99, 0, 99) == []
    row = await store.get_task_by_key(key)
    assert row is not None
    assert row.last_seq == 6


async def test_an_append_that_does_not_continue_the_log_of_its_writer_is_refused_and_the_others_commit(
    store: Store,
) -> None:
    rows = [await accept(store, f"t{n}") for n in range(5)]
    await end(store, rows[3])
    bad = [
        chunks(rows[0].key, 1, b"x", instance="stale"),
        chunks(rows[1].key, 2, b"x"),
        chunks(rows[3].key, 2, b"x"),
        chunks(10**6, 1, b"x"),
    ]
    good = chunks(rows[4].key, 1, b"good", change=Change("running"))
    refused = await store.append([bad[0], bad[1], good, bad[2], bad[3]])
    assert refused == {append.key for append in bad}
    assert await store.read_log(rows[4].key, 0, 99) == [Segment(1, 1, b"good")]
    for row in rows[:2]:
        assert await store.get_task_by_key(row.key) == row
        assert await store.read_log(row.key, 0, 99) == []
    assert await store.append([good]) == {good.key}


async def test_refused_appends_leave_no_message_and_no_state(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    row = await accept(store, session_id="s")
    stale = chunks(row.key, 1, b"x", instance="stale", change=completed(), message=message(at=NOW + 9))
    assert await store.append([stale]) == {row.key}
    assert await store.get_task_by_key(row.key) == row
    assert await store.history("alice", "s", limit=9) == []
    session = await store.get_session("alice", "s", now=NOW)
    assert session is not None
    assert session.last_activity_at == NOW


async def test_the_row_changes_with_the_chunks(store: Store) -> None:
    key = (await accept(store)).key
    error = TaskError("boom", "It broke", {"why": [1]})
    steps = [
        chunks(key, 1, change=Change("running")),
        chunks(key, 1, b"a", change=Change("input_required", output=Content("text/plain", "half"))),
        chunks(key, 2, change=Change("pending")),
        chunks(key, 2, b"b", b"c", change=Change("failed", Content("application/json", {"x": 1}), error, NOW + 3)),
    ]
    expected = [
        ("running", 0, None, None, None),
        ("input_required", 1, Content("text/plain", "half"), None, None),
        ("pending", 1, None, None, None),
        ("failed", 3, Content("application/json", {"x": 1}), error, NOW + 3),
    ]
    for step, members in zip(steps, expected, strict=True):
        assert await store.append([step]) == frozenset()
        row = await store.get_task_by_key(key)
        assert row is not None
        assert (row.status, row.last_seq, row.output, row.error, row.ended_at) == members


@pytest.mark.parametrize(
    "json", [None, "Which?", "", 0, 1.5, True, [1, {"ü": [None, "\n\0"]}], {"a": {}}, 2**63, -1e300]
)
async def test_a_question_is_kept_exactly_until_the_row_changes_again(store: Store, json: Any) -> None:
    key = (await accept(store)).key
    asked = Question(json, NOW, saved=json)
    answered = Question(json, NOW, saved=json, answer=Content("application/json", json))
    steps = [
        (chunks(key, 1, b"?", change=Change("input_required", question=asked)), asked),
        (chunks(key, 2), asked),
        (chunks(key, 2, change=Change("pending", question=answered)), answered),
        (chunks(key, 2, change=Change("running")), None),
        (chunks(key, 2, b"?", change=Change("input_required", question=asked)), asked),
        (chunks(key, 3, b"end", change=completed()), None),
    ]
    for append, question in steps:
        assert await store.append([append]) == frozenset()
        row = await store.get_task("alice", "a", "t")
        assert row is not None
        assert row.question == question
        assert [row] == (await store.list_tasks("alice")).items == [await store.get_task_by_key(key)]


async def test_a_question_is_taken_over_with_its_task(store: Store) -> None:
    row = await accept(store, instance="dead")
    asked = Question({"which": ["a", "b"]}, NOW, saved={"step": 3})
    await store.append([chunks(row.key, 1, b"?", instance="dead", change=Change("input_required", question=asked))])
    assert [(left.status, left.question) for left in await store.take_over(ME)] == [("input_required", asked)]


async def test_the_policy_of_an_unfinished_task_can_be_changed(store: Store) -> None:
    row, other = await accept(store), await accept(store, "other")
    for policy in ("continue", "grace:30000", "cancel", "continue"):
        await store.set_policy(row.key, policy)
        assert await store.get_task_by_key(row.key) == replace(row, policy=policy)
    await end(store, row)
    await store.set_policy(row.key, "cancel")
    await store.set_policy(10**6, "cancel")
    found = await store.get_task_by_key(row.key)
    assert found is not None
    assert found.policy == "continue"
    assert await store.get_task_by_key(other.key) == other
    await store.delete_task("alice", "a", "t")
    await store.set_policy(row.key, "cancel")
    assert (await store.list_tasks("alice")).items == [other]


async def test_appends_that_contradict_themselves_are_a_bug(store: Store) -> None:
    key = (await accept(store)).key
    for appends in (
        [chunks(key, 1, b"a"), chunks(key, 2, b"b")],
        [chunks(key, 1, b"a", change=Change("completed"))],
        [chunks(key, 1, b"a", change=Change("running", ended_at=NOW))],
        [chunks(key, 1, b"")],
    ):
        with pytest.raises(ValueError, match="append"):
            await store.append(appends)
    assert await store.read_log(key, 0, 99) == []
    assert await store.append([]) == frozenset()


async def test_many_tasks_append_at_once_and_each_log_is_whole(store: Store) -> None:
    keys = [(await accept(store, f"t{n}")).key for n in range(40)]

    async def write(key: int) -> None:
        for seq in range(1, 21):
            assert await store.append([chunks(key, seq, str(seq).encode())]) == frozenset()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(write, key)
    for key in keys:
        assert await store.read_log(key, 0, 999) == [Segment(n, n, str(n).encode()) for n in range(1, 21)]


# --- lists ------------------------------------------------------------------------------------------------------------


async def test_tasks_are_listed_newest_first_by_owner_agent_session_and_status(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    await ended(store, "one", session_id="s")
    await accept(store, "two", agent_id="b")
    await accept(store, "three", session_id="s")
    await accept(store, "four", owner="bob")

    async def ids(**filters: Any) -> list[str]:
        page = await store.list_tasks("alice", **filters)
        assert (page.total, page.next_token) == (len(page.items), "")
        return [row.task_id for row in page.items]

    assert await ids() == ["three", "two", "one"]
    assert await ids(agent_id="a") == ["three", "one"]
    assert await ids(session_id="s") == ["three", "one"]
    assert await ids(session_id="s", status="completed") == ["one"]
    assert await ids(status="pending") == ["three", "two"]
    assert await ids(agent_id="b", session_id="s") == []
    assert await ids(session_id="unknown") == []


async def test_pages_are_complete_and_disjoint_while_new_tasks_arrive(store: Store) -> None:
    for n in range(5):
        await accept(store, f"t{n}")
    first = await store.list_tasks("alice", limit=2)
    await accept(store, "late")
    second = await store.list_tasks("alice", limit=2, token=first.next_token)
    third = await store.list_tasks("alice", limit=2, token=second.next_token)
    ids = [[row.task_id for row in page.items] for page in (first, second, third)]
    assert ids == [["t4", "t3"], ["t2", "t1"], ["t0"]]
    assert (first.total, second.total, third.total, third.next_token) == (5, 6, 6, "")


async def test_recent_tasks_are_in_the_order_in_which_their_states_changed(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    rows = [await accept(store, f"t{n}", session_id="s" if n % 2 else None, created_at=NOW + n) for n in range(6)]
    await accept(store, "other", agent_id="b")
    await accept(store, "hers", owner="bob")

    async def recent(**filters: Any) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            page = await store.recent_tasks("alice", "a", now=NOW, limit=2, token=token, **filters)
            assert page.total >= len(page.items)
            found += [row.task_id for row in page.items]
            token = page.next_token
            if not token:
                return found

    assert await recent() == ["t5", "t4", "t3", "t2", "t1", "t0"]
    question = Question("?", NOW)
    moves = [
        (rows[0], Change("running", at=NOW + 100)),
        (rows[1], Change("input_required", question=question, at=NOW + 50, mark="auth")),
        (rows[2], Change("failed", ended_at=NOW + 100, mark="rejected")),
        (rows[3], Change("completed", ended_at=NOW + 200, mark="reply")),
        (rows[4], Change("failed", ended_at=NOW + 10)),
    ]
    await store.append([chunks(row.key, 1, b"x", change=change) for row, change in moves])
    assert await recent() == ["t2", "t0", "t1", "t4", "t5"]  # of two at once, the later task first; no reply
    assert await recent(session_id="s") == ["t1", "t5"]
    assert await recent(since=NOW + 50) == ["t2", "t0", "t1"]
    assert await recent(states=[("failed", None)]) == ["t4"]
    assert await recent(states=[("failed", "rejected"), ("pending", None)]) == ["t2", "t5"]
    assert await recent(states=[("input_required", None)]) == []
    row = await store.get_task_by_key(rows[1].key)
    assert row is not None
    assert (row.status_at, row.mark) == (NOW + 50, "auth")
    await store.append([chunks(rows[1].key, 2, change=Change("pending", question=question))])
    row = await store.get_task_by_key(rows[1].key)
    assert row is not None
    assert (row.status_at, row.mark) == (NOW + 50, None)
    first = await store.recent_tasks("alice", "a", now=NOW, limit=1)
    for token in (first.next_token[:-1], first.next_token.split(".")[0], "x.y", "."):
        with pytest.raises(InvalidRequest):
            await store.recent_tasks("alice", "a", now=NOW, token=token)
    with pytest.raises(InvalidRequest):
        await store.recent_tasks("alice", "a", now=NOW, since=1, token=first.next_token)


async def test_the_lines_of_a_task_come_with_their_originals(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    one, two = [await accept(store, name, session_id="s") for name in ("one", "two")]
    for n, row in enumerate((one, two, one, one)):
        line = message(f"line {n}", row.task_id, original=b"{%d}" % n if n else None)
        await store.append([chunks(row.key, (n + 1) // 2 + 1 if row is one else 1, b"x", message=line)])
    lines = await store.task_messages(one.key, limit=9)
    assert [(line.content, line.original) for line in lines] == [
        ("line 0", None),
        ("line 2", b"{2}"),
        ("line 3", b"{3}"),
    ]
    assert [line.content for line in await store.task_messages(one.key, limit=2)] == ["line 2", "line 3"]
    assert [line.content for line in await store.task_messages(one.key, limit=9, limit_bytes=1)] == ["line 3"]
    assert await store.task_messages((await accept(store, "alone")).key, limit=9) == []
    assert all(line.original is None for line in (await store.list_messages("alice", "s", now=NOW)).items)


async def test_a_token_of_another_list_or_a_changed_one_is_refused(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    await store.create_session(new_session("s2"), limit=9)
    row = await accept(store, session_id="s")
    await accept(store, "t2")
    for n in range(2):
        await store.append([chunks(row.key, n + 1, b"x", message=message())])
    tasks = (await store.list_tasks("alice", limit=1)).next_token
    sessions = (await store.list_sessions("alice", now=NOW, limit=1)).next_token
    lines = (await store.list_messages("alice", "s", now=NOW, limit=1)).next_token
    assert tasks
    assert sessions
    assert lines
    changed = ("B" if tasks[0] == "A" else "A") + tasks[1:]
    for token in (sessions, lines, changed, tasks + "A", tasks[:-1], "?", "ü", " ", tasks + "\n"):
        with pytest.raises(InvalidRequest) as caught:
            await store.list_tasks("alice", token=token)
        assert [error.pointer for error in caught.value.errors] == ["/pageToken"]
    for question in (
        store.list_tasks("bob", token=tasks),
        store.list_tasks("alice", agent_id="a", token=tasks),
        store.list_sessions("alice", now=NOW, token=tasks),
        store.list_sessions("alice", now=NOW, metadata={"x": "y"}, token=sessions),
        store.list_messages("alice", "s2", now=NOW, token=lines),
    ):
        with pytest.raises(InvalidRequest):
            await question
    assert len((await store.list_tasks("alice", token=tasks, limit=7)).items) == 1


async def paged(ask: Callable[[str], Awaitable[Page[T]]]) -> list[list[T]]:
    """The items of all pages of a list."""
    pages = [await ask("")]
    while pages[-1].next_token:
        pages.append(await ask(pages[-1].next_token))
    assert {page.total for page in pages} == {sum(len(page.items) for page in pages)}
    return [page.items for page in pages]


async def test_what_a_task_asked_counts_as_its_size(store: Store) -> None:
    for n in range(4):
        row = await accept(store, f"t{n}")
        question = Question("ü" * 100, NOW, saved="x" * 200, answer=Content("text/plain", "y" * 100))
        await store.append([chunks(row.key, 1, b"x", change=Change("input_required", question=question))])
    pages = await paged(lambda token: store.list_tasks("alice", limit_bytes=1300, token=token))
    assert [[row.task_id for row in items] for items in pages] == [["t3", "t2"], ["t1", "t0"]]


async def test_a_page_holds_one_item_then_no_more_than_fit_and_the_next_goes_on_behind_it(store: Store) -> None:
    sizes = [10, 5000, 10, 400, 500, 10, 10]
    await store.create_session(new_session("lines"), limit=99)
    for n, size in enumerate(sizes):
        await store.create_session(new_session(f"s{n}", state={"x": "ü" * (size // 4)}, metadata={"y": n}), limit=99)
        row = await accept(store, f"t{n}", session_id="lines", request=b"x" * (size // 2))
        change = Change("completed", Content("text/plain", "ü" * (size // 4)), ended_at=NOW)
        await store.append([chunks(row.key, 1, b"x", change=change, message=message("ü" * (size // 2), f"t{n}"))])

    lists: list[list[list[str]]] = [
        [[row.task_id for row in items] for items in await paged(partial(tasks, store))],
        [[row.session_id for row in items] for items in await paged(partial(sessions, store))],
        [[row.task_id for row in items] for items in await paged(partial(lines, store))],
    ]
    assert lists == [
        [["t6", "t5"], ["t4", "t3"], ["t2"], ["t1"], ["t0"]],
        [["s6", "s5"], ["s4", "s3"], ["s2"], ["s1"], ["s0", "lines"]],
        [["t0"], ["t1"], ["t2", "t3"], ["t4", "t5"], ["t6"]],
    ]
    newest = [line.task_id for line in await store.history("alice", "lines", limit=9, limit_bytes=1000)]
    assert newest == ["t2", "t3", "t4", "t5", "t6"]
    assert [line.task_id for line in await store.history("alice", "lines", limit=9, limit_bytes=1)] == ["t6"]


def tasks(store: Store, token: str) -> Awaitable[Page[TaskRow]]:
    return store.list_tasks("alice", session_id="lines", limit=2, limit_bytes=1100, token=token)


def sessions(store: Store, token: str) -> Awaitable[Page[SessionRow]]:
    return store.list_sessions("alice", now=NOW, limit=2, limit_bytes=1100, token=token)


def lines(store: Store, token: str) -> Awaitable[Page[MessageRow]]:
    return store.list_messages("alice", "lines", now=NOW, limit=2, limit_bytes=1100, token=token)


# --- the end of tasks, and other instances ----------------------------------------------------------------------------


async def test_only_an_ended_task_can_be_deleted_and_its_log_goes_with_it(store: Store) -> None:
    row = await accept(store)
    with pytest.raises(TaskRunning):
        await store.delete_task("alice", "a", "t")
    await end(store, row)
    await store.delete_task("alice", "a", "t")
    assert await store.get_task_by_key(row.key) is None
    assert await store.read_log(row.key, 0, 99) == []
    with pytest.raises(TaskNotFound):
        await store.delete_task("alice", "a", "t")
    assert (await accept(store)).key > row.key


async def test_taking_over_finds_what_dead_instances_left_and_shuts_them_out(store: Store) -> None:
    left = [await accept(store, f"left{n}", instance=f"dead{n}") for n in range(3)]
    await accept(store, "mine")
    done = await accept(store, "done", instance="dead0")
    await store.append([chunks(done.key, 1, b"end", instance="dead0", change=completed())])
    taken = await store.take_over(ME)
    assert [(row.key, row.instance) for row in taken] == [(row.key, ME) for row in left]
    assert await store.append([chunks(left[0].key, 1, b"x", instance="dead0")]) == {left[0].key}
    assert await store.append([chunks(left[0].key, 1, b"x")]) == frozenset()
    assert await store.take_over(ME) == []


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_a_session_is_kept_as_it_was_given(store: Store) -> None:
    row = new_session(state={"a": {"b": [1.5, None]}}, metadata={"k": "v"}, ttl_seconds=60)
    await store.create_session(row, limit=1)
    assert await store.get_session("alice", "s", now=NOW) == row
    with pytest.raises(SessionExists):
        await store.create_session(new_session(), limit=9)
    assert await store.get_session("alice", "s", now=NOW) == row


async def test_an_owner_has_no_more_sessions_than_allowed_and_expired_ones_do_not_count(store: Store) -> None:
    await store.create_session(new_session("s1", ttl_seconds=1), limit=2)
    await store.create_session(new_session("s2"), limit=2)
    with pytest.raises(RateLimited):
        await store.create_session(new_session("s3"), limit=2)
    await store.create_session(new_session("s3", owner="bob"), limit=2)
    await store.create_session(new_session("s3", created_at=NOW + 1000, last_activity_at=NOW + 1000), limit=2)
    with pytest.raises(RateLimited):
        await store.create_session(new_session("s4", created_at=NOW + 1000), limit=2)
    await store.delete_session("alice", "s2")
    await store.create_session(new_session("s4", created_at=NOW + 1000), limit=2)


async def test_an_expired_session_does_not_exist_and_its_name_is_free(store: Store) -> None:
    await store.create_session(new_session(ttl_seconds=1, metadata={"k": "v"}), limit=9)
    await ended(store, session_id="s")
    later = NOW + 1000
    assert await store.get_session("alice", "s", now=later - 1) is not None
    assert await store.get_session("alice", "s", now=later) is None
    assert (await store.list_sessions("alice", now=later)).total == 0
    assert (await store.list_sessions("alice", now=later, metadata={"k": "v"})).items == []
    with pytest.raises(SessionNotFound):
        await store.update_session("alice", "s", now=later)
    with pytest.raises(SessionNotFound):
        await store.list_messages("alice", "s", now=later)
    await store.create_session(new_session(created_at=later, last_activity_at=later), limit=9)
    assert (await store.list_tasks("alice", session_id="s")).total == 0
    assert await store.get_task("alice", "a", "t") is None


async def test_the_tasks_of_an_expired_session_do_not_exist_either(store: Store) -> None:
    await store.create_session(new_session(ttl_seconds=1), limit=9)
    row = await ended(store, session_id="s", idempotency=idempotency(expires_at=NOW + 9000))
    kept = await ended(store, "u")
    for later, there in ((NOW + 999, True), (NOW + 1000, False), (None, False)):
        assert (await store.get_task("alice", "a", "t", now=later) is not None) == there
        everything = await store.list_tasks("alice", now=later)
        assert [found.key for found in everything.items] == [kept.key, row.key][: 1 + there]
        assert everything.total == 1 + there
        assert (await store.list_tasks("alice", now=later, session_id="s")).total == there
        assert (await store.list_tasks("alice", now=later, agent_id="a", status="completed")).total == 1 + there
        if later is not None:
            assert (await store.find_idempotent("alice", idempotency(), now=later) is not None) == there
    with pytest.raises(SessionNotFound):
        await store.create_task(new_task("v", session_id="s", created_at=NOW + 1000, idempotency=idempotency(body="c")))
    again = await accept(store, created_at=NOW + 1000)
    assert await store.get_task("alice", "a", "t", now=NOW + 1000) == again


async def test_a_task_at_work_keeps_its_session_and_its_end_is_an_activity(store: Store) -> None:
    await store.create_session(new_session(ttl_seconds=1, metadata={"k": "v"}), limit=1)
    first = await ended(store, "first", session_id="s")
    row = await accept(store, session_id="s")
    later = NOW + 5000
    assert await store.get_session("alice", "s", now=later) is not None
    assert (await store.list_sessions("alice", now=later, metadata={"k": "v"})).total == 1
    assert (await store.list_messages("alice", "s", now=later)).items == []
    assert {found.key for found in (await store.list_tasks("alice", now=later)).items} == {first.key, row.key}
    assert await store.get_task("alice", "a", "first", now=later) is not None
    await store.update_session("alice", "s", now=NOW, state={"x": 1})
    assert await store.sweep(now=later, tasks_ended_before=later, limit=9) == 0
    with pytest.raises(RateLimited):
        await store.create_session(new_session("z", created_at=later), limit=1)
    await end(store, row, at=later)
    assert await store.get_session("alice", "s", now=later + 999) is not None
    assert await store.get_task("alice", "a", "t", now=later + 999) is not None
    assert await store.get_session("alice", "s", now=later + 1000) is None
    assert await store.get_task("alice", "a", "t", now=later + 1000) is None


async def test_an_expired_session_with_a_task_at_work_keeps_its_name(store: Store) -> None:
    await store.create_session(new_session(ttl_seconds=1), limit=9)
    row = await accept(store, session_id="s")
    with pytest.raises(SessionExists):
        await store.create_session(new_session(created_at=NOW + 5000), limit=9)
    assert await store.append([chunks(row.key, 1, b"x", message=message(at=NOW + 5000))]) == frozenset()
    assert await store.get_session("alice", "s", now=NOW + 5001) is not None


async def test_sessions_are_listed_newest_first_by_agent_and_by_what_their_metadata_say(store: Store) -> None:
    values: list[Any] = ["yes", True, None, 1, 1.5, {"a": [1, 2]}, "true"]
    for n, value in enumerate(values):
        await store.create_session(new_session(f"s{n}", agent_id=f"a{n % 2}", metadata={"k": value, "n": n}), limit=99)

    async def ids(**filters: Any) -> list[str]:
        page = await store.list_sessions("alice", now=NOW, **filters)
        assert (page.total, page.next_token) == (len(page.items), "")
        return [row.session_id for row in page.items]

    assert await ids() == ["s6", "s5", "s4", "s3", "s2", "s1", "s0"]
    assert await ids(agent_id="a1") == ["s5", "s3", "s1"]
    assert await ids(metadata={"k": "yes"}) == ["s0"]
    assert await ids(metadata={"k": "true"}) == ["s6", "s1"]
    assert await ids(metadata={"k": "true"}, agent_id="a0") == ["s6"]
    assert await ids(metadata={"k": "true", "n": "1"}) == ["s1"]
    assert await ids(metadata={"k": "null"}) == ["s2"]
    assert await ids(metadata={"k": "1"}) == ["s3"]
    assert await ids(metadata={"k": "1.5"}) == ["s4"]
    assert await ids(metadata={"k": '{"a":[1,2]}'}) == ["s5"]
    assert await ids(metadata={"unknown": "1"}) == []
    page = await store.list_sessions("alice", now=NOW, limit=4)
    rest = await store.list_sessions("alice", now=NOW, limit=4, token=page.next_token)
    assert [row.session_id for row in page.items + rest.items] == await ids()
    assert (page.total, rest.total, rest.next_token) == (7, 7, "")


async def test_patches_are_merged_and_found_and_move_the_activity(store: Store) -> None:
    await store.create_session(new_session(state={"a": 1, "b": {"c": 2, "d": 3}}, metadata={"k": "old"}), limit=9)
    row = await store.update_session("alice", "s", now=NOW + 5, state={"a": None, "b": {"c": 9}})
    assert (row.state, row.metadata, row.last_activity_at) == ({"b": {"c": 9, "d": 3}}, {"k": "old"}, NOW + 5)
    row = await store.update_session("alice", "s", now=NOW + 3, metadata={"k": "new"})
    assert row.last_activity_at == NOW + 5
    assert await store.get_session("alice", "s", now=NOW) == row
    assert (await store.list_sessions("alice", now=NOW, metadata={"k": "old"})).total == 0
    assert (await store.list_sessions("alice", now=NOW, metadata={"k": "new"})).items == [row]
    with pytest.raises(InvalidRequest) as caught:
        await store.update_session("alice", "s", now=NOW, state=[1])
    assert [error.pointer for error in caught.value.errors] == ["/state"]


async def test_a_patch_under_a_condition_that_no_longer_holds_changes_nothing(store: Store) -> None:
    row = new_session(state={"n": 1})
    await store.create_session(row, limit=9)
    changed = await store.update_session("alice", "s", now=NOW, state={"n": 2}, if_match=etag(row))
    with pytest.raises(PreconditionFailed):
        await store.update_session("alice", "s", now=NOW + 9, state={"n": 3}, if_match=etag(row))
    assert await store.get_session("alice", "s", now=NOW) == changed


async def test_a_deleted_session_takes_tasks_logs_and_messages_along(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    row = await accept(store, session_id="s", idempotency=idempotency())
    await store.append([chunks(row.key, 1, b"x", message=message())])
    await store.delete_session("alice", "s")
    assert await store.get_task_by_key(row.key) is None
    assert await store.read_log(row.key, 0, 99) == []
    assert await store.append([chunks(row.key, 2, b"x")]) == {row.key}
    assert await store.find_idempotent("alice", idempotency(), now=NOW) is None
    await store.create_session(new_session(), limit=9)
    assert (await store.list_messages("alice", "s", now=NOW)).items == []
    await store.delete_session("alice", "s")
    with pytest.raises(SessionNotFound):
        await store.delete_session("alice", "s")


# --- conversations ----------------------------------------------------------------------------------------------------


async def test_a_conversation_is_paged_from_its_beginning_and_remembered_from_its_end(store: Store) -> None:
    await store.create_session(new_session(ttl_seconds=10), limit=9)
    row = await accept(store, session_id="s")
    lines = [message(f"m{n}", at=NOW + n) for n in range(5)]
    lines += [message({"json": [1]}, role="agent", partial_status="cancelled", at=NOW + 5)]
    for n, line in enumerate(lines):
        await store.append([chunks(row.key, n + 1, b"x", message=line)])
    first = await store.list_messages("alice", "s", now=NOW, limit=4)
    rest = await store.list_messages("alice", "s", now=NOW, limit=4, token=first.next_token)
    assert first.items + rest.items == lines
    assert (first.total, rest.total, rest.next_token) == (6, 6, "")
    assert await store.history("alice", "s", limit=2) == lines[-2:]
    assert await store.history("alice", "s", limit=99) == lines
    assert await store.history("alice", "unknown", limit=9) == []
    assert await store.get_session("alice", "s", now=NOW + 10_004) is not None
    with pytest.raises(SessionNotFound):
        await store.list_messages("alice", "unknown", now=NOW)


async def test_messages_follow_their_task_to_its_new_name_and_survive_it(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    row = await accept(store, session_id="s")
    await store.append([chunks(row.key, 1, b"x", message=message("old"), change=completed())])
    second = await accept(store, session_id="s")
    await store.append([chunks(second.key, 1, b"x", message=message("new"))])
    ids = [(line.content, line.task_id) for line in await store.history("alice", "s", limit=9)]
    assert ids == [("old", "t~1"), ("new", "t")]
    await store.delete_task("alice", "a", "t~1")
    assert [line.content for line in (await store.list_messages("alice", "s", now=NOW)).items] == ["old", "new"]


async def test_a_message_of_a_task_without_session_goes_nowhere(store: Store) -> None:
    row = await accept(store)
    assert await store.append([chunks(row.key, 1, b"x", message=message())]) == frozenset()


# --- housekeeping -----------------------------------------------------------------------------------------------------


async def test_sweeping_removes_what_is_over_in_bounded_steps_and_nothing_else(store: Store) -> None:
    for n in range(5):
        await ended(store, f"old{n}", at=NOW)
    fresh = await ended(store, "fresh", at=NOW + 10)
    running = await accept(store, "running")
    await store.create_session(new_session("dead", ttl_seconds=1), limit=9)
    for n in range(3):
        await ended(store, f"gone{n}", session_id="dead")
    await store.create_session(new_session("busy", ttl_seconds=1), limit=9)
    busy = await accept(store, "busy", session_id="busy")
    await store.create_session(new_session("alive"), limit=9)
    kept = await ended(store, "kept", session_id="alive")
    await store.create_task(new_task("running", idempotency=idempotency(expires_at=NOW + 5)))
    steps = []
    while gone := await store.sweep(now=NOW + 5000, tasks_ended_before=NOW + 10, limit=4):
        steps.append(gone)
    assert steps == [4, 4, 2]
    left = (await store.list_tasks("alice")).items
    assert {row.key for row in left} == {row.key for row in (fresh, running, busy, kept)}
    assert await store.get_session("alice", "alive", now=NOW + 5000) is not None
    assert await store.find_idempotent("alice", idempotency(), now=NOW) is None


async def long(store: Store, task_id: str, at: int = NOW, segments: int = 5, **members: Any) -> TaskRow:
    """A task with so many segments, each of two chunks, the last of the final one alone, that ended at ``at``."""
    row = await accept(store, task_id, **members)
    for n in range(1, segments):
        await store.append([chunks(row.key, 2 * n - 1, b"%d" % (2 * n - 1), b"%d" % (2 * n))])
    last = 2 * segments - 1
    change = Change("completed", Content("text/plain", "all"), ended_at=at)
    assert await store.append([chunks(row.key, last, b"%d" % last, change=change)]) == frozenset()
    found = await store.get_task_by_key(row.key)
    assert found is not None
    return found


async def test_of_the_logs_of_tasks_that_ended_long_ago_only_the_end_is_kept(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    old = [await long(store, "old"), await long(store, "of-session", session_id="s"), await ended(store, "short")]
    fresh = await long(store, "fresh", at=NOW + 10)
    running = await accept(store, "running")
    for n in range(1, 4):
        await store.append([chunks(running.key, n, b"x")])
    rows = [await store.get_task_by_key(row.key) for row in (*old, fresh, running)]
    question = {"now": NOW + 5000, "tasks_ended_before": NOW, "limit": 2}
    assert await store.sweep(**question) == 0
    assert len(await store.read_log(old[0].key, 0, 99)) == 5
    steps = [await store.sweep(**question, logs_ended_before=NOW + 10) for _ in range(3)]
    assert steps == [2, 1, 0]
    for row in old[:2]:
        assert await store.read_log(row.key, 0, 99) == [Segment(9, 9, b"9")]
        assert await store.read_log(row.key, 5, 99) == [Segment(9, 9, b"9")]
        assert await store.read_log(row.key, 9, 99) == []
    assert await store.read_log(old[2].key, 0, 99) == [Segment(1, 1, b"end")]
    assert len(await store.read_log(fresh.key, 0, 99)) == 5
    assert len(await store.read_log(running.key, 0, 99)) == 3
    assert [await store.get_task_by_key(row.key) for row in (*old, fresh, running)] == rows
    await store.delete_task("alice", "a", "old")
    assert await store.read_log(old[0].key, 0, 99) == []
    assert await store.sweep(now=NOW + 5000, tasks_ended_before=NOW + 20, limit=9, logs_ended_before=NOW + 20) == 2


async def test_what_is_removed_or_pruned_gives_its_space_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # the log before the file has a bound of its own
    monkeypatch.setattr(checkpoints, "STEP", 1 << 20)
    monkeypatch.setattr(checkpoints, "LIMIT", 4 << 20)

    async def ended_and_gone(task_id: str) -> None:
        row = await accept(store, task_id)
        for n in range(5):
            await store.append([chunks(row.key, n + 1, b"x" * 200_000)])
        await store.append([chunks(row.key, 6, b"end", change=completed())])
        await store.sweep(now=NOW, tasks_ended_before=NOW, limit=9, logs_ended_before=NOW + 1)
        await store.delete_task("alice", "a", task_id)
        await store.sweep(now=NOW, tasks_ended_before=NOW, limit=9)

    sizes = []
    for n in range(12):
        await ended_and_gone(f"t{n}")
        sizes.append(store.statistics().size_bytes)
    # six of them hold more than that
    assert max(sizes[6:]) <= max(sizes[:6]) + checkpoints.LIMIT


async def test_a_store_that_works_says_so(store: Store) -> None:
    before = store.statistics()
    await store.check()
    after = store.statistics()
    assert after.operations == before.operations + 1
    assert after.commits == before.commits + 1
    row = await accept(store)
    await store.append([chunks(row.key, 1, b"x" * 100_000)])
    assert store.statistics().size_bytes > before.size_bytes


# --- what holds for every method --------------------------------------------------------------------------------------


async def test_what_is_given_and_got_is_never_shared(store: Store) -> None:
    metadata: dict[str, Any] = {"list": [1]}
    state: dict[str, Any] = {"list": [1]}
    patch: dict[str, Any] = {"more": [1]}
    content: dict[str, Any] = {"list": [1]}
    saved: dict[str, Any] = {"list": [1]}
    await store.create_session(new_session(state=state, metadata=metadata), limit=9)
    row = await accept(store, session_id="s", metadata=metadata)
    patched = await store.update_session("alice", "s", now=NOW, state=patch)
    output, error = Content("application/json", content), TaskError("c", "m", content)
    change = Change("failed", output, error, NOW, Question(content, NOW, saved=saved))
    await store.append([chunks(row.key, 1, b"x", change=change, message=message(content))])
    for mutable in (metadata, state, content, saved, row.metadata, patched.state):
        mutable["list"].append(2)
    patch["more"].append(2)
    for _ in range(2):
        found = await store.get_task("alice", "a", "t")
        session = await store.get_session("alice", "s", now=NOW)
        (line,) = await store.history("alice", "s", limit=1)
        assert found is not None
        assert found.output is not None
        assert found.error is not None
        assert session is not None
        assert found.question is not None
        parts = [found.metadata, found.output.content, found.error.details, line.content, session.metadata]
        parts += [found.question.question, found.question.saved]
        for part in parts:
            assert part == {"list": [1]}
            part["list"].append(3)
        assert session.state == {"list": [1], "more": [1]}
        session.state["more"].append(3)


async def test_a_write_that_is_cancelled_before_it_begins_never_happens(store: Store) -> None:
    row = await accept(store)
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.append([chunks(row.key, 1, b"x")])
    assert scope.cancelled_caught
    assert await store.read_log(row.key, 0, 99) == []


async def test_every_refusal_leaves_the_store_as_it_was(store: Store) -> None:
    await store.create_session(new_session(), limit=1)
    await accept(store, session_id="s")
    before = [await store.list_tasks("alice"), await store.list_sessions("alice", now=NOW)]
    for refused in (
        store.create_task(new_task(fingerprint="x", session_id="s", created_at=NOW + 9)),
        store.create_task(new_task("u", session_id="unknown", idempotency=idempotency())),
        store.create_session(new_session("s2"), limit=1),
        store.update_session("alice", "s", now=NOW + 9, state={"x": 1}, if_match='"no"'),
        store.delete_task("alice", "a", "t"),
    ):
        with pytest.raises(HectorError):
            await refused
    assert [await store.list_tasks("alice"), await store.list_sessions("alice", now=NOW)] == before
    assert await store.find_idempotent("alice", idempotency(), now=NOW) is None


async def test_however_many_there_are_lists_totals_and_sweeps_are_right(store: Store) -> None:
    """Many sessions with tasks in every state, some of them expired, against what is simply counted."""
    now = NOW + 5000
    for n in range(120):
        members = {
            "ttl_seconds": 1 if n % 3 == 0 else None,
            "agent_id": "ab"[n % 2],
            "metadata": {"n": n % 4, "k": "v"},
        }
        await store.create_session(new_session(f"s{n}", **members), limit=999)
        row = await accept(store, f"t{n}", agent_id="ab"[n % 2], session_id=f"s{n}")
        if n % 5:  # the others go on, and keep their session
            await store.append([chunks(row.key, 1, b"x", change=Change("completed", ended_at=NOW + n))])
    seen = [n for n in reversed(range(120)) if n % 3 or not n % 5]
    for agent in (None, "a", "b"):
        mine = [n for n in seen if agent in (None, "ab"[n % 2])]
        for metadata in (None, {"n": "2"}, {"k": "v"}, {"n": "2", "k": "v"}):
            have = [n for n in mine if not metadata or "n" not in metadata or n % 4 == 2]
            found: list[str] = []
            token = None
            while token != "":
                page = await store.list_sessions(
                    "alice", now=now, agent_id=agent, metadata=metadata, limit=7, token=token or ""
                )
                found += [row.session_id for row in page.items]
                assert page.total == len(have)
                token = page.next_token
            assert found == [f"s{n}" for n in have]
        for status in (None, "pending", "completed", "failed"):
            have = [n for n in mine if status is None or status == ("completed" if n % 5 else "pending")]
            tasks = await store.list_tasks("alice", now=now, agent_id=agent, status=status, limit=999)
            assert [row.task_id for row in tasks.items] == [f"t{n}" for n in have]
            assert tasks.total == len(have)
    gone = 0
    while swept := await store.sweep(now=now, tasks_ended_before=NOW, limit=7):
        gone += swept
    assert gone == 2 * (120 - len(seen))
    assert (await store.list_sessions("alice", now=now)).total == len(seen)
    await store.create_session(new_session("one-more", created_at=now), limit=len(seen) + 1)
    with pytest.raises(RateLimited):
        await store.create_session(new_session("too-many", created_at=now), limit=len(seen) + 1)


# --- webhooks ---------------------------------------------------------------------------------------------------------


def push(key: int, config_id: str = "c", **members: Any) -> Push:
    return Push(key, config_id, "https://example.com/hook", NOW, members.pop("instance", ME), **members)


async def test_a_webhook_is_kept_as_it_is_until_it_is_deleted(store: Store) -> None:
    row = await accept(store)
    one = push(row.key, token="t", scheme="Bearer", credentials="c", seq=3)
    other = push(row.key, "b", dialect="0.3")
    for each in (one, other):
        await store.put_push(NewPush(each, 2))
    assert await store.list_pushes(row.key) == [other, one]
    for _ in range(2):
        await store.delete_push(row.key, "c")
        assert await store.list_pushes(row.key) == [other]
    await store.delete_push(row.key + 1, "b")
    assert await store.list_pushes(row.key + 1) == []


async def test_a_webhook_takes_the_place_of_the_one_with_its_id_and_there_are_no_more_than_allowed(
    store: Store,
) -> None:
    row = await accept(store)
    await store.put_push(NewPush(push(row.key, token="t", over_at=NOW), 1))
    again = push(row.key, seq=7, scheme="Basic")
    await store.put_push(NewPush(again, 1))
    with pytest.raises(RateLimited):
        await store.put_push(NewPush(push(row.key, "d"), 1))
    assert await store.list_pushes(row.key) == [again]
    with pytest.raises(TaskNotFound):
        await store.put_push(NewPush(push(row.key + 1), 1))


async def test_a_webhook_is_kept_with_a_new_task_or_not_at_all(store: Store) -> None:
    row = (await store.create_task(new_task(push=push(0, token="t"), idempotency=idempotency()))).task
    assert await store.list_pushes(row.key) == [push(row.key, token="t")]
    again = await store.create_task(new_task(push=push(0, "d"), idempotency=idempotency()))
    assert again.how == "replayed"
    assert (await store.create_task(new_task(push=push(0, "d")))).how == "running"
    assert await store.list_pushes(row.key) == [push(row.key, token="t")]
    with pytest.raises(TaskExists):
        await store.create_task(new_task(fingerprint="another", push=push(0, "d")))
    assert await store.take_over_pushes(ME) == [push(row.key, token="t")]


async def test_a_webhook_is_kept_with_an_append_or_neither_is(store: Store) -> None:
    row = await accept(store, push=push(0))
    other = await accept(store, "other")
    one_more = replace(chunks(row.key, 1, b"1", idempotency=idempotency()), push=NewPush(push(row.key, "d"), 1))
    with pytest.raises(RateLimited):
        await store.append([chunks(other.key, 1, b"x"), one_more])
    for each in (row, other):
        assert await store.get_task_by_key(each.key) == each
        assert await store.read_log(each.key, 0, 1000) == []
    assert await store.find_idempotent("alice", idempotency(), now=NOW) is None
    assert await store.append([replace(one_more, push=NewPush(push(row.key, seq=5), 1))]) == frozenset()
    assert await store.list_pushes(row.key) == [push(row.key, seq=5)]
    late = replace(chunks(row.key, 1, b"1"), push=NewPush(push(row.key, "late"), 9))
    assert await store.append([late]) == {row.key}
    assert await store.list_pushes(row.key) == [push(row.key, seq=5)]


async def test_how_far_a_webhook_is_told_is_kept_and_of_those_that_are_gone_the_caller_learns(store: Store) -> None:
    row, deleted = await accept(store), await ended(store, "deleted")
    for each in (push(row.key), push(row.key, "d"), push(deleted.key)):
        await store.put_push(NewPush(each, 9))
    await store.delete_task("alice", "a", "deleted")
    moves = [
        PushMove(row.key, "c", 4),
        PushMove(row.key, "d", 5, over_at=NOW),
        PushMove(row.key, "e", 1),
        PushMove(deleted.key, "c", 1),
    ]
    assert await store.move_pushes(moves) == {(row.key, "e"), (deleted.key, "c")}
    assert await store.list_pushes(row.key) == [push(row.key, seq=4), push(row.key, "d", seq=5, over_at=NOW)]
    assert await store.list_pushes(deleted.key) == []
    with pytest.raises(TaskNotFound):
        await store.put_push(NewPush(push(deleted.key), 9))


async def test_the_webhooks_of_a_dead_instance_that_are_not_over_are_taken_over(store: Store) -> None:
    first, second = await accept(store), await ended(store, "u")
    await store.put_push(NewPush(push(second.key, instance="dead"), 9))
    await store.put_push(NewPush(push(first.key, instance="dead", token="t", seq=2), 9))
    await store.put_push(NewPush(push(first.key, "over", instance="dead", over_at=NOW), 9))
    await store.put_push(NewPush(push(first.key, "mine"), 9))
    taken = [push(first.key, token="t", seq=2), push(first.key, "mine"), push(second.key)]
    assert await store.take_over_pushes(ME) == taken
    assert await store.take_over_pushes(ME) == taken
    over = push(first.key, "over", instance="dead", over_at=NOW)
    assert await store.list_pushes(first.key) == [*taken[:2], over]


async def test_webhooks_go_with_their_tasks_and_these_with_their_session_and_their_time(store: Store) -> None:
    await store.create_session(new_session(), limit=9)
    rows = [await ended(store, "s1", session_id="s"), await accept(store, "s2", session_id="s")]
    rows.append(await ended(store, "old"))
    for row in rows:
        await store.put_push(NewPush(push(row.key), 9))
    await store.delete_session("alice", "s")
    await store.sweep(now=NOW + 1, tasks_ended_before=NOW + 1, limit=9)
    for row in rows:
        assert await store.list_pushes(row.key) == []
    assert await store.take_over_pushes("next") == []


def test_what_is_secret_of_a_webhook_is_not_shown() -> None:
    shown = repr(push(1, token="abc", scheme="Bearer", credentials="def"))
    assert "abc" not in shown
    assert "def" not in shown
    assert "example.com" not in shown
