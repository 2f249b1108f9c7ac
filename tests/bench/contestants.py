"""Who is measured, how each is started, and what the system says about a running one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple


class Contestant(NamedTuple):
    name: str
    family: str
    """``ours``, ``peer`` (WebSockets and REST under uvicorn), ``other`` (beside the peers, where its package happens to
    be installed; ratios do not refer to it), ``a2a`` (the official SDK's server), ``ours-grpc``, ``a2a-grpc``."""
    command: list[str]
    """Module and arguments; ``{tmp}`` is a folder of its own."""


STORES: Final = {
    "memory": ["memory", "process"],
    "sqlite": ["{tmp}/bench.db", "process"],
    "full": ["{tmp}/bench.db", "full"],
}
"""Arguments of our server; ``full`` is SQLite with ``durability: full``."""

UVLOOP: Final = (
    [Contestant("uvicorn-uvloop", "other", ["tests.bench.starlette_app", "websockets-sansio", "uvloop"])]
    if find_spec("uvloop")
    else []
)

ALL: Final = [
    *(Contestant(f"ours-{store}", "ours", ["tests.bench.ours", *each]) for store, each in STORES.items()),
    *(
        Contestant(f"ours-quart-{store}", "ours", ["tests.bench.ours", *each, "quart"])
        for store, each in STORES.items()
    ),
    Contestant("uvicorn-websockets", "peer", ["tests.bench.starlette_app", "websockets"]),
    Contestant("uvicorn-sansio", "peer", ["tests.bench.starlette_app", "websockets-sansio"]),
    *UVLOOP,
    Contestant("a2a-sdk-memory", "a2a", ["tests.bench.a2a_sdk", "memory"]),
    Contestant("a2a-sdk-sqlite", "a2a", ["tests.bench.a2a_sdk", "{tmp}/bench.db"]),
    *(
        Contestant(f"ours-grpc-{store}", "ours-grpc", ["tests.bench.ours", *each, "grpc"])
        for store, each in STORES.items()
    ),
    Contestant("a2a-sdk-grpc-memory", "a2a-grpc", ["tests.bench.a2a_sdk", "memory", "grpc"]),
    Contestant("a2a-sdk-grpc-sqlite", "a2a-grpc", ["tests.bench.a2a_sdk", "{tmp}/bench.db", "grpc"]),
]


def cpu_seconds(pid: int) -> float:
    """Of a process with all its threads."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid says


class Running(NamedTuple):
    """A server process."""

    contestant: Contestant
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def memory_kib(self, kind: str = "Pss") -> int:
        """``Pss``: what is its alone, with its share of what is shared; ``Rss``: with all of that."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1])
        raise RuntimeError("the system does not tell the memory of a process")

    def settle(self, most: float = 5) -> None:
        """Waits, for so many seconds at most, until it has nothing left to do."""
        used = self.cpu_seconds()
        for _ in range(round(most / 0.2)):
            time.sleep(0.2)
            before, used = used, self.cpu_seconds()
            if used - before < 0.015:
                return


@contextmanager
def start(contestant: Contestant) -> Iterator[Running]:
    """Its messages of trouble go to stderr when it ends by itself, and are dropped otherwise."""
    with tempfile.TemporaryDirectory() as tmp, tempfile.TemporaryFile() as errors:
        arguments = [each.format(tmp=tmp) for each in contestant.command]
        command = [sys.executable, "-m", *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stdout is not None
                if line := process.stdout.readline():
                    yield Running(contestant, int(line), process.pid)
                if process.poll() is not None or not line:
                    errors.seek(0)
                    raise SystemExit(f"{contestant.name} has ended:\n{errors.read().decode()[-4000:]}")
            finally:
                process.kill()
