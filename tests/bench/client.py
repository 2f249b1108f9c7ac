"""The load: ``client.c``, compiled once and run for each measurement."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.contestants import Running

SOURCE = Path(__file__).with_name("client.c")


class Client:
    """The compiled client."""

    def __init__(self, folder: str) -> None:
        """Raises: SystemExit without a C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise SystemExit(
                f"The bench compiles its client ({SOURCE.name}) and found no cc, gcc or clang: install one"
            )
        self._program = f"{folder}/client"
        subprocess.run([compiler, "-O2", "-Wall", "-std=gnu11", "-o", self._program, str(SOURCE)], check=True)

    def run(
        self, scenario: str, server: Running, target: str, body: str, *, streams: int, amount: int
    ) -> dict[str, float]:
        """What ``client.c`` prints for the scenario. Raises: SystemExit with what went wrong."""
        done = subprocess.run(
            self._command(scenario, server, target, body, streams, amount), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{server.contestant.name}, {scenario}: {done.stderr.strip()}")
        found: dict[str, float] = json.loads(done.stdout)
        if found.get("client_seconds", 0) > 0.8 * found.get("seconds", 0):
            print(f"{server.contestant.name}, {scenario}: the client may have been the bottleneck", file=sys.stderr)
        return found

    @contextmanager
    def hold(self, server: Running, target: str, body: str, streams: int) -> Iterator[None]:
        """Streams that all have had a chunk, and are read until the block ends."""
        command = self._command("hold", server, target, body, streams, 1)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            try:
                if not process.stdout.readline():
                    raise SystemExit(f"{server.contestant.name}: the streams were not held")
                yield
            finally:
                process.stdin.close()

    def _command(self, scenario: str, server: Running, target: str, body: str, streams: int, amount: int) -> list[str]:
        return [self._program, scenario, str(server.port), str(server.pid), target, body, str(streams), str(amount)]
