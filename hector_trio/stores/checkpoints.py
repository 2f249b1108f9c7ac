"""When SQLite's write-ahead log goes into the file: beside the writer, and in its way only where it must."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from hector_trio.stores.sqlite import BUSY_MS, is_full

STEP: Final = 16 << 20
"""How many bytes the log grows before they are copied: pages are written again and again."""

LIMIT: Final = 64 << 20
"""How large the log becomes while the writer never rests; then it copies the little that is left itself. At twice as
much it waits for whatever there is."""

_SPARE: Final = 4
"""How many times the size of the log the disk must have free, or the log goes into the file at once."""

_SETTLE_MS: Final = 20
"""How long emptying the log waits for whoever still reads from it: it is tried again after the next transaction."""

_LITTLE: Final = 2 << 20
"""What the writer may copy itself."""

_ROUNDS: Final = 8
"""How many times what was written meanwhile is copied as well: at the last, less than the writer writes at once."""

_HEADER: Final = 32
_FRAME_HEADER: Final = 24


class Checkpoints:
    """Called by the writer between its transactions, in its thread.

    Copying waits for the disk, longer than a viewer should, so another thread does it with a connection of its own and
    the writer goes on. Once all is copied the log begins anew, by itself; to a writer that never rests that happens
    when it copies the last of it itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wal = f"{path}-wal"
        self._copied = 0
        """Bytes of the log that are in the file, as far as is known."""
        self._tried = 0
        """How large it was when a copy was begun: one that somebody still reads from cannot be copied whole."""
        self._copying: threading.Thread | None = None

    def __call__(self, connection: Connection, error: Exception | None) -> bool:
        """``error`` is what undid the transaction before. Returns whether that is worth another try: the disk was full,
        and the log has been emptied. Raises nothing."""
        try:
            size = os.stat(self._wal).st_size
            if size == 0:
                return False
            if error is not None:
                return is_full(error) and self._empty(connection, size)
            disk = os.statvfs(self._wal)
            # The file may grow by as much as the log has, and a log that no longer fits into it can never be given
            # back: so it goes there while there is room for both.
            if disk.f_bavail * disk.f_frsize < _SPARE * size:
                self._empty(connection, size)
            else:
                self._copy(connection, size)
        except (OSError, sqlite3.Error, SQLAlchemyError):
            pass
        return False

    @property
    def has_ended(self) -> bool:
        """Whether nothing is being copied."""
        return self._copying is None or not self._copying.is_alive()

    def close(self) -> None:
        """Waits for what is being copied. The writer must have ended."""
        if self._copying is not None:
            self._copying.join()

    def _empty(self, connection: Connection, size: int) -> bool:
        driver = _driver(connection)
        driver.execute(f"PRAGMA busy_timeout={_SETTLE_MS}").close()
        try:
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            driver.execute(f"PRAGMA busy_timeout={BUSY_MS}").close()
        return os.stat(self._wal).st_size < size

    def _copy(self, connection: Connection, size: int) -> None:
        if size < self._tried:
            self._tried = self._copied = 0  # the log has begun anew
        left = size - self._copied
        if self._copying is not None and self._copying.is_alive():
            if size >= 2 * LIMIT:
                self._copying.join()
                self._copied = _checkpoint(_driver(connection))
        elif 0 < left <= _LITTLE and size >= LIMIT:
            self._copied = _checkpoint(_driver(connection))
        elif size - self._tried >= STEP:
            self._tried = size
            # daemon: as the writer
            copying = threading.Thread(target=self._beside, name="hector store checkpoint", daemon=True)
            copying.start()
            self._copying = copying

    def _beside(self) -> None:
        try:
            with closing(sqlite3.connect(self._path, isolation_level=None)) as driver:
                for _ in range(_ROUNDS):
                    self._copied = _checkpoint(driver)
                    if os.stat(self._wal).st_size <= self._copied:
                        return
        except (OSError, sqlite3.Error):
            return  # the writer meets it as well, and says so


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


def _checkpoint(driver: sqlite3.Connection) -> int:
    """Copies what nobody needs to read from the log; returns how many bytes of the log are in the file by now."""
    (page,) = driver.execute("PRAGMA page_size").fetchone()
    _busy, _frames, copied = driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return _HEADER + max(0, int(copied)) * (int(page) + _FRAME_HEADER)
