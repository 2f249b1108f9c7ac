"""``python -m tests.simulation``: many schedules, or one again. Tells the first that breaks a promise.

``--schedules 100000 --jobs 2`` is the long run; ``--seed N --story`` tells what happens in schedule N.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable

from tests.simulation.schedule import Result, run_schedule


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="the first schedule, or the only one")
    parser.add_argument("--schedules", type=int, default=None, help="how many; 1000, or 1 with --seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--steps", type=int, default=None, help="only so many actions of a schedule")
    parser.add_argument("--story", action="store_true", help="tell what happens")
    options = parser.parse_args()
    first = options.seed or 0
    count = options.schedules or (1000 if options.seed is None else 1)
    seeds = range(first, first + count)
    began = time.monotonic()
    if options.story or options.steps is not None or options.jobs == 1:
        results = (run_schedule(seed, options.steps) for seed in seeds)
        return report(results, count, began, story=options.story)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        return report(pool.imap(run_schedule, seeds, chunksize=20), count, began, story=False)


def report(results: Iterable[Result], count: int, began: float, *, story: bool) -> int:
    """Exits with 1 after a broken promise."""
    for done, result in enumerate(results, 1):
        if result.broken:
            print(f"schedule {result.seed} broke a promise:\n{result.told(10_000 if story else 60)}")
            return 1
        if story:
            print("\n".join(result.story))
        if done % 1000 == 0 or done == count:
            print(f"{done} schedules, {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
