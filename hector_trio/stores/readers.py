"""The reader connections: a few reads at once, each in a thread, beside the writer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from hector_trio.errors import StoreUnavailable

R = TypeVar("R")

READERS = 4
"""How many reads run at once; more wait for their turn."""


class Readers:
    """Runs reads, each in a transaction of its own: everything it sees is of one moment.

    A read that is cancelled is abandoned: its thread finishes it, gives the connection back and the place with it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        meaning: Callable[[Exception], Exception],
        interrupt: Callable[[Connection], None],
    ) -> None:
        """``meaning`` turns a driver's error into what callers shall see; ``interrupt`` ends a read from outside."""
        self._engine = engine
        self._meaning = meaning
        self._interrupt = interrupt
        self._limiter = trio.CapacityLimiter(READERS)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._closed = False

    async def run(self, read: Callable[[Connection], R]) -> R:
        """Returns what ``read`` returns, or raises what it raises."""
        return await trio.to_thread.run_sync(self._run, read, abandon_on_cancel=True, limiter=self._limiter)

    async def close(self) -> None:
        """Ends the reads that nobody waits for any more, and closes all connections."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        borrowers = [object() for _ in range(READERS)]
        taken: list[object] = []
        try:
            while len(taken) < READERS:
                # again and again: an interrupt does nothing to a thread that is between two statements
                self._interrupt_all()
                with trio.move_on_after(0.05):
                    await self._limiter.acquire_on_behalf_of(borrowers[len(taken)])
                    taken.append(borrowers[len(taken)])
        finally:
            for borrower in taken:
                self._limiter.release_on_behalf_of(borrower)

    def _interrupt_all(self) -> None:
        with self._lock:
            for connection in self._busy:
                self._interrupt(connection)

    def _run(self, read: Callable[[Connection], R]) -> R:
        try:
            with self._connection() as connection, connection.begin():
                return read(connection)
        except DBAPIError as error:
            meant = self._meaning(error)
            if meant is error:
                raise
            raise meant from error

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("The store is closed")
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._engine.connect()
        with self._lock:
            self._busy.add(connection)
        broken = False
        try:
            yield connection
        except DBAPIError:
            broken = True
            raise
        finally:
            with self._lock:
                self._busy.discard(connection)
                keep = not (broken or self._closed or connection.in_transaction())
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()
