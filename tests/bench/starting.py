"""How long ``hector`` takes to say its help and to answer its first request."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import hector_trio
from tests.bench.contestants import cpu_seconds

HECTOR: Final = [str(Path(sys.executable).with_name("hector"))]


class Served(NamedTuple):
    url: str
    pid: int

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def served(*arguments: str, folder: str) -> Iterator[Served]:
    """``hector serve`` in ``folder``, from when it says where it listens."""
    with subprocess.Popen(
        [*HECTOR, "serve", "--port", "0", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = next((line.split()[1] for line in process.stdout if "listening" in line), None)
            if url is None:
                raise SystemExit("hector serve has ended without listening")
            yield Served(url, process.pid)
        finally:
            process.kill()


class Took(NamedTuple):
    """Seconds on the wall and of CPU."""

    wall: float
    cpu: float


def help_took() -> Took:
    begun = time.perf_counter()
    with subprocess.Popen([*HECTOR, "--help"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"hector --help has ended with {process.returncode}")
    return Took(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime)


def first_answers_took(store: str) -> list[Took]:
    """From the start of ``hector serve`` until ``GET /agents`` is answered: with a new store, then with it again."""
    with tempfile.TemporaryDirectory() as folder:
        return [_first_answer_took(store.format(tmp=folder), folder) for _ in range(2)]


def _first_answer_took(store: str, folder: str) -> Took:
    begun = time.perf_counter()
    with (
        served("--store", store, folder=folder) as server,
        urllib.request.urlopen(f"{server.url}/agents") as answer,
    ):
        answer.read()
        return Took(time.perf_counter() - begun, cpu_seconds(server.pid))


def compile_package() -> None:
    """As pip does when it installs: where Python may write no bytecode, a checkout is compiled anew at each start."""
    compileall.compile_dir(Path(hector_trio.__file__).parent, quiet=1)
