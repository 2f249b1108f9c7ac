"""``python -m tests.bench``: ours against its peers, in one run, by turns.

Every contestant is a process of its own; they take turns within each round, in one order and then in the other, so
that a machine that drifts drifts for all. The client is a C program, compiled at the start. Prints a table for each
scenario and, at the end, all of it as one line of JSON. A ratio says how many times better than the better uvicorn
variant (for A2A, than the better one of the official SDK's stores). Needs the extra ``bench``, Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile

from tests.bench import contestants, report, scenarios
from tests.bench.client import Client
from tests.bench.contestants import Contestant
from tests.bench.scenarios import Bench, Missing, Scenario


def chosen(wanted: str, name: str) -> bool:
    """Whether ``name`` is one of the comma-separated names, or begins with one and a dash; all are if none is given."""
    return not wanted or any(f"{name}-".startswith(f"{each.strip()}-") for each in wanted.split(","))


def measure(scenario: Scenario, bench: Bench, taking_part: list[Contestant], rounds: int) -> report.Rounds:
    measured: dict[str, list[list[float]]] = {each.name: [] for each in taking_part}
    warm = scenario.warm and rounds > 1
    for number in range(0 if warm else 1, rounds + 1):
        for each in taking_part if number % 2 else reversed(taking_part):
            if each.name in measured:
                try:
                    figures = list(scenario.measure(bench, each))
                except Missing as missing:
                    print(f"{scenario.name}: {each.name} is missing: {missing}", file=sys.stderr)
                    del measured[each.name]
                else:
                    if number:  # the first warms up
                        measured[each.name].append(figures)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up, if more than 1")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes and durations")
    parser.add_argument(
        "--scenarios", default="", help=f"separated by commas: {', '.join(each.name for each in scenarios.ALL)}"
    )
    parser.add_argument(
        "--contestants", default="", help=f"separated by commas: {', '.join(each.name for each in contestants.ALL)}"
    )
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        client = Client(folder)
        for scenario in scenarios.ALL:
            taking_part = [
                each for each in contestants.ALL if scenario.takes(each) and chosen(options.contestants, each.name)
            ]
            if not taking_part or not chosen(options.scenarios, scenario.name):
                continue
            with Bench(client, options.scale) as bench:
                rounds = measure(scenario, bench, taking_part, options.rounds)
            peers = [each.name for each in taking_part if each.family == scenario.peers]
            found[scenario.name] = report.summary(scenario, rounds, peers)
            print(report.table(scenario, found[scenario.name]), end="\n\n", flush=True)
    print(f"({options.rounds} rounds; x: times better than the better peer)", file=sys.stderr)
    print(json.dumps(report.as_json(found)))


if __name__ == "__main__":
    main()
