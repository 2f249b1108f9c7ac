"""From measurements to medians and ratios, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.bench.scenarios import Figure, Scenario

Rounds = Mapping[str, Sequence[Sequence[float]]]
"""By contestant, round by round, a value for each figure of the scenario."""


def summary(scenario: Scenario, rounds: Rounds, peers: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By contestant and figure: the median, and ``ratio``: how many times better than the better of ``peers``.

    The better peer is the one with the better median of that figure. Ratios are taken round by round, and their median
    is told, so that what slows the machine down for a round does so for both.
    """
    result: dict[str, dict[str, dict[str, float]]] = {name: {} for name in rounds}
    for number, figure in enumerate(scenario.figures):
        values = {name: [each[number] for each in measured] for name, measured in rounds.items()}
        best = _best(figure, {name: each for name, each in values.items() if name in peers})
        for name, each in values.items():
            found = {"median": median(each)}
            if best is not None:
                found["ratio"] = median(map(lambda value, peer: _ratio(figure, value, peer), each, values[best]))
            result[name][figure.name] = found
    return result


def _best(figure: Figure, peers: Mapping[str, Sequence[float]]) -> str | None:
    if not figure.better or not peers:
        return None
    choose = min if figure.better == "lower" else max
    return choose(peers, key=lambda name: median(peers[name]))


def _ratio(figure: Figure, value: float, peer: float) -> float:
    above, below = (peer, value) if figure.better == "lower" else (value, peer)
    return above / below if below else 0.0


def table(scenario: Scenario, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    heading = f"{scenario.name}: {scenario.about}"
    names = "".join(f"{f'{figure.name} {figure.unit}':>19}{'':9}" for figure in scenario.figures)
    lines = [heading, f"{'':26}{names}".rstrip()]
    for name, figures in found.items():
        line = f"{name:26}"
        for each in figures.values():
            ratio = f"({each['ratio']:.2f}x)" if "ratio" in each else ""
            line += f"{_number(each['median']):>19}{ratio:>9}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def as_json(found: Mapping[str, Any]) -> dict[str, Any]:
    """With four significant digits."""
    return {
        key: as_json(value) if isinstance(value, Mapping) else float(f"{value:.4g}") for key, value in found.items()
    }
