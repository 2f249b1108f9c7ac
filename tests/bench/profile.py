"""``python -m tests.bench.profile SCENARIO``: where the microseconds of a chunk (a cycle, a request) go, in our server.

The server runs in this process, driven by the client as in the bench. A first run counts what Trio does. In the second
the stacks of all threads are looked at, about 250 times in a second of CPU time, and each gets the CPU time that its
thread has used since: so functions written in C (a system call, an encoder) count for the line that calls them.
"""

from __future__ import annotations

import argparse
import linecache
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

import trio

from tests.bench import contestants, ours, scenarios
from tests.bench.client import Client
from tests.bench.contestants import Contestant, Running
from tests.bench.scenarios import Bench, Scenario

INTERVAL: Final = 0.001
"""Seconds of CPU time between two looks; many systems make it 4 ms."""

ROOT: Final = Path(__file__).parent.parent.parent


class Sampler:
    """CPU seconds by line (of the innermost Python function) and by function with all that it calls."""

    def __init__(self) -> None:
        self.lines: Counter[tuple[CodeType, int]] = Counter()
        self.inclusive: Counter[CodeType] = Counter()
        self.looks = 0
        self._used: dict[int, float] = {}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """To be entered in the main thread, with Trio running: its loop is not woken by the samples."""
        wakeup = signal.set_wakeup_fd(-1)
        before = signal.signal(signal.SIGPROF, self._look)
        self._take_times()
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            signal.set_wakeup_fd(wakeup)

    def _take_times(self) -> dict[int, float]:
        """CPU seconds of each thread since the last call."""
        now = {ident: time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in sys._current_frames()}
        since = {ident: used - self._used.get(ident, used) for ident, used in now.items()}
        self._used = now
        return since

    def _look(self, number: int, interrupted: FrameType | None) -> None:
        self.looks += 1
        frames = sys._current_frames()
        main = threading.main_thread().ident
        for ident, used in self._take_times().items():
            frame = interrupted if ident == main else frames.get(ident)
            if frame is None or not used:
                continue
            self.lines[frame.f_code, frame.f_lineno] += used  # type: ignore[assignment]
            seen = set()
            while frame is not None:
                if frame.f_code not in seen:
                    seen.add(frame.f_code)
                    self.inclusive[frame.f_code] += used  # type: ignore[assignment]
                frame = frame.f_back


class Steps(trio.abc.Instrument):
    """Counts what costs a scheduler something."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def before_io_wait(self, timeout: float) -> None:
        self.counts["looks at the sockets (epoll_wait)"] += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.counts["task steps"] += 1

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.counts["tasks started"] += 1


class Here(Bench):
    """Measures the server in this process."""

    def __init__(self, client: Client, scale: float, server: Running) -> None:
        super().__init__(client, scale)
        self._server = server

    def server(self, contestant: Contestant) -> Running:
        return self._server


def room_of(code: CodeType) -> str:
    """The package that a function belongs to; of ours, the module."""
    path = Path(code.co_filename)
    if "site-packages" in path.parts:
        return path.parts[path.parts.index("site-packages") + 1].removesuffix(".py")
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).with_suffix("").as_posix()
    return "python"


async def profile(client: Client, scenario: Scenario, contestant: Contestant, scale: float, folder: str) -> None:
    arguments = [each.format(tmp=folder) for each in contestant.command[1:]]
    at = [each.name for each in scenario.figures].index("cpu")
    unit = scenario.figures[at].unit.rpartition("/")[2]
    async with trio.open_nursery() as nursery:
        urls: list[str] = await nursery.start(partial(ours.serve, *arguments))
        bench = Here(client, scale, Running(contestant, int(urls[0].rpartition(":")[2]), os.getpid()))

        async def measure() -> float:
            figures = await trio.to_thread.run_sync(lambda: list(scenario.measure(bench, contestant)))
            return figures[at]

        await measure()
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        begun = time.process_time()
        counted = await measure()
        units = (time.process_time() - begun) / counted * 1e6
        trio.lowlevel.remove_instrument(steps)
        sampler = Sampler()
        with sampler.sampling():
            cost = await measure()
        nursery.cancel_scope.cancel()
    print(f"{scenario.name}, {contestant.name}: {cost:.1f} us of CPU per {unit} ({sampler.looks} samples)\n")
    for what, count in steps.counts.items():
        print(f"{count / units:10.3f} {what} per {unit}")
    print_tables(sampler, cost)


def print_tables(sampler: Sampler, cost: float, most: int = 30) -> None:
    scale = cost / (sum(sampler.lines.values()) or 1)
    rooms: Counter[str] = Counter()
    functions: Counter[CodeType] = Counter()
    for (code, _), used in sampler.lines.items():
        rooms[room_of(code)] += used
        functions[code] += used
    print(f"\n{'self us':>10}  by module")
    for room, used in rooms.most_common(most):
        print(f"{used * scale:10.2f}  {room}")
    print(f"\n{'self us':>10}{'with calls':>12}  by function")
    for code, used in functions.most_common(most):
        print(f"{used * scale:10.2f}{sampler.inclusive[code] * scale:12.2f}  {room_of(code)}  {code.co_qualname}")
    print(f"\n{'self us':>10}  by line")
    for (code, number), used in sampler.lines.most_common(most):
        text = linecache.getline(code.co_filename, number).strip()
        print(f"{used * scale:10.2f}  {room_of(code)}:{number}  {text[:90]}")


def main() -> None:
    measurable = {each.name: each for each in scenarios.ALL if any(figure.name == "cpu" for figure in each.figures)}
    candidates = {each.name: each for each in contestants.ALL if each.family.startswith("ours")}
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description=__doc__)
    parser.add_argument("scenario", nargs="?", default="burst-1", choices=measurable)
    parser.add_argument("--contestant", choices=candidates, help="left out: the first that takes part")
    parser.add_argument("--scale", type=float, default=2.0, help="of all sizes and durations")
    options = parser.parse_args()
    scenario = measurable[options.scenario]
    name = options.contestant or next(each.name for each in candidates.values() if scenario.takes(each))
    contestant = candidates[name]
    with tempfile.TemporaryDirectory() as folder:
        trio.run(profile, Client(folder), scenario, contestant, options.scale, folder)


if __name__ == "__main__":
    main()
