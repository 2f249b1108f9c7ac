"""The writer thread: it takes every operation that waits, commits them together and wakes all who wait, at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Literal, TypeVar

import trio
from outcome import Error, Outcome, Value
from sqlalchemy import Connection

from hector_trio.errors import HectorError, StoreUnavailable

A = TypeVar("A")
R = TypeVar("R")
Together = Callable[[Connection, Sequence[A], bool], Sequence[R]]

_log = logging.getLogger(__name__)


class Again(Exception):
    """Raised by an operation that found a surprise: undo the batch and run me alone."""


class _Waiting:
    """One operation, the task that waits for it, and what came of it."""

    __slots__ = ("argument", "outcome", "state", "task", "together")

    def __init__(self, together: Together[Any, Any], argument: Any, task: trio.lowlevel.Task) -> None:
        self.together = together
        self.argument = argument
        self.task = task
        self.state: Literal["queued", "taken", "withdrawn"] = "queued"
        """Changed under the writer's lock only: what the thread has taken cannot be withdrawn."""
        self.outcome: Outcome[Any] | None = None


class _CannotBegin(Exception):
    """No transaction could be opened, so no operation is the culprit; ``why`` is the driver's error."""

    def __init__(self, why: Exception) -> None:
        super().__init__(why)
        self.why = why


class Writer:
    """One thread, one connection, one transaction for everything that waits.

    An operation gets the connection inside the transaction. It may raise a ``HectorError`` (a refusal, given to its
    caller) before its first write only: the rest of the batch goes on. Any other exception undoes the batch, whose
    operations are then run one by one, each in its own transaction, so that only the culprit fails.

    ``run`` and ``run_together`` keep the promise of the Store protocol about cancellation: an operation that the thread
    has not taken is withdrawn; one that it has taken is finished, and its result returned without a checkpoint.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        meaning: Callable[[Exception], Exception],
        settle: Callable[[Connection, Exception | None], bool] = lambda _connection, _error: False,
    ) -> None:
        """``connect`` opens the connection (in the writer's thread, again after a failure); ``meaning`` turns a
        driver's error into what callers shall see; ``settle`` is called in the thread between transactions, with what
        undid the one before, if anything did, and says whether to try that again (it raises nothing). Must be built
        where Trio runs; the thread starts with it and ends with ``close``."""
        self.commits = 0
        self.commit_seconds = 0.0
        self.operations = 0
        self.on_commit: Callable[[float, int], None] | None = None
        """Called in the writer's thread after every commit with its duration (seconds) and its operations."""
        self._connect = connect
        self._meaning = meaning
        self._settle = settle
        self._connection: Connection | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._changed = threading.Condition(threading.Lock())
        self._queue: list[_Waiting] = []
        self._taken: list[_Waiting] = []
        self._closing = False
        self._stopped: str | None = None
        # daemon: an interpreter that wants to go does not wait for a disk that hangs
        self._thread = threading.Thread(target=self._main, name="hector store writer", daemon=True)
        self._thread.start()

    # --- in Trio ------------------------------------------------------------------------------------------------------
    async def run(self, operation: Callable[[Connection], R]) -> R:
        """Runs ``operation`` in the next transaction; returns its result once that is committed."""

        def alone(connection: Connection, operations: Sequence[Callable[[Connection], R]], _again: bool) -> list[R]:
            return [operation(connection) for operation in operations]

        return await self.run_together(alone, operation)

    async def run_together(self, together: Together[A, R], argument: A) -> R:
        """As ``run``, for operations that are cheaper together: ``together`` gets the arguments of all neighbours in
        the queue that came with the same function, and returns a result for each.

        Its last argument is true when it runs alone, again, after it raised or a neighbour did.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        waiting = _Waiting(together, argument, trio.lowlevel.current_task())
        with self._changed:
            self.check()
            self._queue.append(waiting)
            self._changed.notify()

        def withdraw(_raise_cancel: object) -> trio.lowlevel.Abort:
            with self._changed:
                if waiting.state == "taken":
                    return trio.lowlevel.Abort.FAILED
                waiting.state = "withdrawn"
                return trio.lowlevel.Abort.SUCCEEDED

        result: R = await trio.lowlevel.wait_task_rescheduled(withdraw)
        return result

    def check(self) -> None:
        """Raises StoreUnavailable once the thread has stopped or is about to."""
        if self._closing or self._stopped is not None:
            raise StoreUnavailable(self._stopped or "The store is closed")

    @property
    def has_ended(self) -> bool:
        """Whether the thread is gone, so that nothing writes any more."""
        return not self._thread.is_alive()

    async def close(self) -> None:
        """Finishes what waits and ends the thread; nothing is accepted from now on. A cancel leaves the thread to
        finish on its own."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await trio.to_thread.run_sync(self._thread.join, abandon_on_cancel=True)

    def _wake(self, batch: list[_Waiting]) -> None:
        for waiting in batch:
            assert waiting.outcome is not None
            trio.lowlevel.reschedule(waiting.task, waiting.outcome)

    # --- in the thread ------------------------------------------------------------------------------------------------
    def _main(self) -> None:
        try:
            while self._take():
                self._execute(self._taken)
                self._release()
                self._between(None)
        finally:
            with self._changed:
                self._stopped = "The store is closed" if self._closing else "The store's writer has stopped"
                self._taken += self._queued()
            if not self._closing:
                _log.critical(self._stopped, exc_info=True)
            for waiting in self._taken:
                if waiting.outcome is None:
                    waiting.outcome = Error(StoreUnavailable(self._stopped))
            self._release()
            self._disconnect()

    def _take(self) -> bool:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return False
            self._taken = self._queued()
            return True

    def _queued(self) -> list[_Waiting]:
        """Takes what waits; the caller holds the lock."""
        taken = [waiting for waiting in self._queue if waiting.state == "queued"]
        self._queue = []
        for waiting in taken:
            waiting.state = "taken"
        return taken

    def _release(self) -> None:
        batch, self._taken = self._taken, []
        if batch:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake, batch)

    def _execute(self, batch: list[_Waiting]) -> None:
        try:
            self._transaction(batch, False)
        except _CannotBegin as error:
            self._fail(batch, error.why)
        except Exception as error:
            retry = self._between(error)
            if len(batch) == 1 and not retry and not isinstance(error, Again):
                self._fail(batch, error)
                return
            for waiting in batch:
                try:
                    self._transaction([waiting], True)
                except _CannotBegin as own:
                    self._fail([waiting], own.why)
                except Exception as own:
                    self._fail([waiting], own)

    def _transaction(self, batch: list[_Waiting], again: bool) -> None:
        """Runs ``batch`` in one transaction and sets the outcomes, or raises and has done nothing."""
        if not batch:
            return
        started = perf_counter()
        outcomes: list[Outcome[Any]] = []
        try:
            with self._begin() as connection:
                for together, arguments in _neighbours(batch):
                    try:
                        results = together(connection, arguments, again)
                    except HectorError as refusal:
                        if len(arguments) > 1:
                            raise Again from refusal
                        outcomes.append(Error(refusal))
                    else:
                        outcomes.extend(map(Value, results))
        except Exception:
            if self._connection is not None and (self._connection.in_transaction() or self._connection.invalidated):
                self._disconnect()
            raise
        seconds = perf_counter() - started
        for waiting, outcome in zip(batch, outcomes, strict=True):
            waiting.outcome = outcome
        self.commits += 1
        self.commit_seconds += seconds
        self.operations += len(batch)
        if self.on_commit is not None:
            try:
                self.on_commit(seconds, len(batch))
            except Exception:
                _log.exception("on_commit of the store's writer failed")

    def _between(self, error: Exception | None) -> bool:
        return self._connection is not None and self._settle(self._connection, error)

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            if self._connection is None:
                self._connection = self._connect()
            transaction = self._connection.begin()
        except Exception as error:
            raise _CannotBegin(error) from error
        with transaction:
            yield self._connection

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        for waiting in batch:
            waiting.outcome = Error(self._meaning(error))

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception:
                _log.exception("the store's writer could not close its connection")


def _neighbours(batch: list[_Waiting]) -> list[tuple[Together[Any, Any], list[Any]]]:
    """The arguments of operations that came one after the other with the same function."""
    groups: list[tuple[Together[Any, Any], list[Any]]] = []
    for waiting in batch:
        if groups and groups[-1][0] == waiting.together:
            groups[-1][1].append(waiting.argument)
        else:
            groups.append((waiting.together, [waiting.argument]))
    return groups
