"""The bench's arithmetic: which peer is the better one, which way a ratio points, what a name chooses."""

from __future__ import annotations

import pytest

from tests.bench import load, report
from tests.bench.__main__ import chosen
from tests.bench.scenarios import ALL, Figure, Scenario

SCENARIO = Scenario(
    "s", "", (Figure("rate", "/s", "higher"), Figure("cpu", "us"), Figure("held", "%", "")), lambda *_: ()
)


def test_a_ratio_says_how_many_times_better_than_the_better_peer_of_that_figure() -> None:
    found = report.summary(
        SCENARIO, {"ours": [[300, 10, 99]], "a": [[100, 25, 99]], "b": [[150, 40, 99]]}, peers=["a", "b"]
    )
    assert found["ours"] == {
        "rate": {"median": 300, "ratio": 2},
        "cpu": {"median": 10, "ratio": 2.5},
        "held": {"median": 99},
    }
    assert found["b"]["rate"]["ratio"] == found["a"]["cpu"]["ratio"] == 1


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = [10, 100, 0], [100, 10, 0]  # the machine changes between the rounds, for both
    found = report.summary(SCENARIO, {"ours": [slow, fast, fast], "peer": [slow, fast, fast]}, peers=["peer"])
    assert found["ours"]["rate"]["ratio"] == found["ours"]["cpu"]["ratio"] == 1


def test_without_a_peer_there_is_no_ratio() -> None:
    assert report.summary(SCENARIO, {"ours": [[1, 2, 3]]}, peers=[])["ours"]["cpu"] == {"median": 2}


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("burst", ["burst-1", "burst-100"]),
        ("burst-1", ["burst-1"]),
        ("paced-250, idle", ["paced-250", "idle"]),
        ("bur", []),
    ],
)
def test_a_name_chooses_what_it_is_or_what_goes_on_with_a_dash(wanted: str, names: list[str]) -> None:
    assert [each.name for each in ALL if chosen(wanted, each.name)] == names


def test_a_paced_chunk_tells_when_its_tick_was_due_and_has_the_size_of_the_others() -> None:
    ticks = load.Ticks()
    texts = [ticks.text(number) for number in (1, 2)]
    first, second = (int(text.strip("@x")) for text in texts)
    assert second - first == load.TICK_NS
    assert {*map(len, texts)} == {load.SIZE}
