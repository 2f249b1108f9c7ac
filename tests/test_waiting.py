"""How long is waited before the next attempt."""

from __future__ import annotations

import pytest

from hector_trio.waiting import backoff, retry_after


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float) -> None:
    assert retry_after({"retry-after": header}, 40.0) == seconds


@pytest.mark.parametrize("header", ["", "soon", "-1", "1e9", "9" * 50, "Thu, 99 Jan 1970 00:00:00 GMT"])
def test_a_retry_after_of_nonsense_is_none(header: str) -> None:
    assert retry_after({"retry-after": header}, 0.0) is None


def test_each_failure_doubles_the_wait_up_to_the_most_and_no_two_waits_are_the_same() -> None:
    for tries, most in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (9999, 5.0)):
        waits = [backoff(tries, 1.0, 5.0) for _ in range(100)]
        assert most / 2 <= min(waits) <= max(waits) <= most
        assert len(set(waits)) > 90


def test_what_is_asked_for_counts_if_it_is_longer_but_not_without_end() -> None:
    assert backoff(1, 1.0, 5.0, asked=3.0) == 3.0
    assert backoff(1, 1.0, 5.0, asked=10**9) == 5.0
    assert backoff(3, 1.0, 5.0, asked=0.0) >= 2.0
