"""Servers and scripts as a user starts them: processes, in a folder of their own that looks like the repository."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parents[2]
STAND_INS = Path(__file__).with_name("stand_ins.py")
LIMIT = 60.0
"""Seconds that anything started here may take."""


class Home:
    """A folder with ``configs`` and ``examples``, and an environment in which ``hector``, ``curl`` … are found.

    The configuration's port is a socket that is open already, so that nobody else can take it; the demo talks faster.
    """

    def __init__(self, folder: Path, *, stand_ins: bool = False) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        shutil.copytree(REPOSITORY / "examples", folder / "examples")
        shutil.copytree(REPOSITORY / "configs", folder / "configs")
        tools = folder / "bin"
        tools.mkdir()
        for name in ("curl", "jq", "websocat"):
            if stand_ins or shutil.which(name) is None:
                _script(tools / name, sys.executable, str(STAND_INS), name)
        own = Path(sys.executable).parent
        if not (own / "hector").exists():  # run from a checkout that is not installed
            _script(tools / "hector", sys.executable, "-m", "hector_trio")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("HECTOR_")}
        self.environ |= {
            "PATH": os.pathsep.join([str(tools), str(own), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
        }

    @contextlib.contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """A listening socket, and ``configs/a2a-server.yaml`` edited to use it."""
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            text = (REPOSITORY / "configs" / "a2a-server.yaml").read_text()
            text, ports = re.subn(r"(?m)^  port: 8080$", f"  fd: {listener.fileno()}", text)
            text, paces = re.subn(r"words_per_second: 25\b", "words_per_second: 200", text)
            assert (ports, paces) == (1, 1)
            (self.folder / "configs" / "a2a-server.yaml").write_text(text)
            yield listener

    def start(
        self,
        command: Sequence[str],
        *,
        fds: Sequence[int] = (),
        environ: Mapping[str, str] | None = None,
        stderr: int = subprocess.STDOUT,
    ) -> subprocess.Popen[str]:
        """The command in this folder, leading a process group of its own; by default both outputs in one pipe."""
        return subprocess.Popen(
            list(command),
            cwd=self.folder,
            env=self.environ | dict(environ or {}),
            pass_fds=list(fds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
        """What the command printed to its standard output; it must end well."""
        with self.start(command, environ=environ, stderr=subprocess.PIPE) as process:
            try:
                output, complaints = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, complaints = process.communicate()
        said = f"{output}\n{complaints}"
        assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{said}"
        return output

    def shell(self, script: str, environ: Mapping[str, str] | None = None) -> str:
        return self.run(["bash", "-e", "-o", "pipefail", "-c", script], environ)

    @contextlib.contextmanager
    def serving(
        self, command: Sequence[str], *, fds: Sequence[int] = (), ready: str = r"listening\s+(http\S+)"
    ) -> Iterator[str]:
        """The address of the server that the command starts: what ``ready`` finds in its output."""
        with self.start(command, fds=fds) as process:
            assert process.stdout is not None
            output = Output(process.stdout)
            try:
                yield output.find(ready)
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    code = process.wait(LIMIT)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    code = process.wait()
                said = output.rest()
            assert code == 0, f"{command} ended with {code}:\n{said}"

    @contextlib.contextmanager
    def seed_server(self) -> Iterator[str]:
        """The server of the seed's own command, as an address like ``127.0.0.1:41234``."""
        with (
            self.listening() as listener,
            self.serving(shlex.split("hector serve --config configs/a2a-server.yaml"), fds=[listener.fileno()]) as url,
        ):
            yield url.removeprefix("http://")


class Output:
    """A process's output, read by a thread as it comes, so that the process never waits for its reader."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._seen: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(stream,))
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def find(self, pattern: str) -> str:
        """The first group of the first line in which ``pattern`` is found."""
        while True:
            try:
                line = self._lines.get(timeout=LIMIT)
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in:\n{''.join(self._seen)}") from None
            if line is None:
                raise AssertionError(f"ended without {pattern!r}:\n{''.join(self._seen)}")
            self._seen.append(line)
            if found := re.search(pattern, line):
                return found[1]

    def rest(self) -> str:
        """All of it, once the process has ended."""
        self._thread.join(LIMIT)
        while not self._lines.empty():
            self._seen.append(self._lines.get() or "")
        return "".join(self._seen)


def _script(path: Path, *command: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)
