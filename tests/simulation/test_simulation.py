"""Some schedules in every run of the tests; more with ``python -m tests.simulation --schedules 1000 --jobs 2``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.simulation.schedule import run_schedule

SCHEDULES = 200
BATCH = 25


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_no_schedule_of_faults_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + BATCH):
        result = run_schedule(seed)
        assert not result.broken, result.told()


def test_a_schedule_replays_in_another_process() -> None:
    seeds = range(20, 24)
    told = [run_schedule(seed).story for seed in seeds]
    assert all(len(story) > 10 for story in told)
    assert [run_schedule(seed).story for seed in seeds] == told
    command = [sys.executable, "-m", "tests.simulation", "--seed", "20", "--schedules", "4", "--story"]
    other = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert other.stdout.splitlines()[:-1] == [line for story in told for line in story]
