"""The rules every store shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.errors import InvalidRequest, TaskExists
from hector_trio.stores.rules import Quota, next_name, page_position, page_token, split_name, text_of

IDS = st.text("ab~019.", min_size=1, max_size=128)


@given(st.integers(0, 2**63 - 1), st.tuples(st.text(), st.none() | st.text()))
def test_a_token_leads_back_to_its_position_for_its_question_only(position: int, question: tuple[str, str]) -> None:
    token = page_token(position, question)
    assert page_position(token, question) == position
    with pytest.raises(InvalidRequest):
        page_position(token, (*question, "more"))


@given(st.text(max_size=30).filter(bool))
def test_no_text_is_taken_for_a_token(text: str) -> None:
    with pytest.raises(InvalidRequest):
        page_position(text, ("tasks", "alice"))


def test_the_first_page_needs_no_token() -> None:
    assert page_position("", ("tasks",)) is None


@given(IDS)
def test_every_id_is_one_stem_and_one_number(task_id: str) -> None:
    stem, number = split_name(task_id)
    assert task_id == (f"{stem}~{number}" if number else stem)


@given(IDS, st.lists(st.integers(1, 10**8)))
def test_the_next_name_is_free_and_fits(task_id: str, taken: list[int]) -> None:
    names = {task_id}

    def highest(stem: str) -> int:
        return max((number for of, number in map(split_name, names) if of == stem), default=0)

    for number in [*taken, 1, 2, 3]:
        names.add(f"{task_id}~{number}"[:128])
        name = next_name(task_id, highest)
        assert name not in names
        assert len(name) <= 128
        assert name.startswith(task_id[:118])
        names.add(name)


def test_names_end_at_a_thousand_million() -> None:
    assert next_name("t", lambda _stem: 10**9 - 2) == "t~999999999"
    with pytest.raises(TaskExists):
        next_name("t", lambda _stem: 10**9 - 1)


def test_a_quota_counts_only_when_it_may_be_used_up() -> None:
    counted: list[int] = []

    def count(held: int) -> int:
        counted.append(held)
        return held

    quota = Quota()
    for held in range(5):
        assert quota.admits("alice", 5, lambda held=held: count(held))  # type: ignore[misc]
    assert counted == [0]
    assert not quota.admits("alice", 5, lambda: count(5))
    assert quota.admits("alice", 5, lambda: count(3))
    assert quota.admits("bob", 5, lambda: count(0))
    assert counted == [0, 5, 3, 0]


@pytest.mark.parametrize(
    ("value", "text"), [("a", "a"), ("1", "1"), (1, "1"), (True, "true"), (None, "null"), ({"a": [1]}, '{"a":[1]}')]
)
def test_metadata_are_compared_by_their_text(value: object, text: str) -> None:
    assert text_of(value) == text
