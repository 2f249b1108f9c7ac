"""Keys in order, and keys that are due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hector_trio.stores.order import Due, Lists


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.booleans())), st.none() | st.integers(0, 10))
def test_lists_are_what_sorted_sets_would_be(steps: list[tuple[str, int, bool]], before: int | None) -> None:
    lists: Lists[str] = Lists()
    model: dict[str, set[int]] = {"a": set(), "b": set()}
    for name, key, stays in steps:
        if stays and key not in model[name]:
            lists.add([name], key)
            model[name].add(key)
        elif not stays and key in model[name]:
            lists.remove([name], key)
            model[name].discard(key)
    for name, keys in model.items():
        assert lists.count(name) == len(keys)
        expected = sorted((key for key in keys if before is None or key < before), reverse=True)
        assert list(lists.newest(name, before)) == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 20), st.none() | st.integers(0, 25))))
def test_what_is_due_is_what_a_look_at_everything_would_find(steps: list[tuple[int, int | None, int | None]]) -> None:
    due: Due[int] = Due()
    model: dict[int, int] = {}
    for key, at, now in steps:
        if at is None:
            due.discard(key)
            model.pop(key, None)
        else:
            due.set(key, at)
            model[key] = at
        if now is not None:
            found = due.until(now)
            assert sorted(found) == sorted(key for key, at in model.items() if at <= now)
            assert due.until(now, 2) == found[:2]
        assert len(due) == len(model)


def test_the_first_that_was_due_comes_first() -> None:
    due: Due[int] = Due()
    for key in range(9):
        due.set(key, 100 - key)
    assert due.until(97) == [8, 7, 6, 5, 4, 3]


def test_keys_that_get_another_time_again_and_again_cost_no_more() -> None:
    due: Due[int] = Due()
    for n in range(10_000):
        due.set(n % 5, n)
        due.set(-1 - n, n)
        due.discard(-1 - n)
    assert len(due._coming) <= 2 * 6 + 16
