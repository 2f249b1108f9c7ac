"""The files of uploads: the data and a record beside it. Everything here blocks, and runs in threads."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import Struct

from hector_trio.errors import StartError

_FILE = re.compile(r"[0-9a-f]{32}\.(data|json|new)\Z")

log = structlog.stdlib.get_logger("hector_trio.uploads")


class Record(Struct, frozen=True):
    """What stands beside the data on disk; it is replaced as a whole. The offset is the size of the data itself."""

    upload_id: str
    owner: str
    length: int | None
    """Bytes in all; ``None`` while the client has not said it."""
    metadata: str
    """``Upload-Metadata`` as it was sent."""
    checked: int | None = None
    """Only so many bytes are good: what follows came with a checksum that was not compared before the end."""


class Found(NamedTuple):
    """An upload that was there."""

    record: Record
    offset: int
    """Bytes of it that are good."""
    touched: int
    """When its data was last written, milliseconds since the epoch."""


def write_record(folder: Path, record: Record, durable: bool) -> None:
    new = folder / f"{record.upload_id}.new"
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(record))
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(new, folder / f"{record.upload_id}.json")
    if durable:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(folder: Path, record: Record, durable: bool) -> None:
    """The data first: a record always has its data, and data without a record is nobody's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    data = folder / f"{record.upload_id}.data"
    os.close(os.open(data, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        write_record(folder, record, durable)
    except OSError:
        with suppress(OSError):
            unlink(folder, record.upload_id)
        raise


def unlink(folder: Path, upload_id: str) -> None:
    for kind in ("json", "new", "data"):
        (folder / f"{upload_id}.{kind}").unlink(missing_ok=True)


def open_at(data: Path, offset: int) -> FileIO:
    """The data, to go on at ``offset``; what lies behind it was never acknowledged."""
    file = FileIO(data, "r+")
    try:
        if os.fstat(file.fileno()).st_size < offset:
            raise OSError(errno.EIO, "The file is shorter than what was stored in it")
        file.truncate(offset)
        file.seek(offset)
    except OSError:
        file.close()
        raise
    return file


def write(file: FileIO, data: bytes, digest: Any) -> None:
    """All of it; where the disk refuses, as much as it took."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    if digest is not None:
        digest.update(data)


def close(file: FileIO, rest: bytes, back_to: int | None, durable: bool) -> int:
    """Stores ``rest`` as far as the disk takes it, or takes all back to an offset. Returns the size."""
    with file:
        if back_to is not None:
            file.truncate(back_to)
            return back_to
        with suppress(OSError):
            write(file, rest, None)
        if durable:
            os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def load(folder: Path) -> list[Found]:
    """Every upload in the folder. What a crash has left half made is removed; what is not ours is not touched."""
    good: dict[str, Found] = {}
    files = [path for path in folder.iterdir() if _FILE.match(path.name)]
    for path in files:
        if path.suffix == ".json":
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
                data = os.stat(path.with_suffix(".data"))
            except (msgspec.MsgspecError, FileNotFoundError):
                log.warning("upload_unreadable", upload_id=path.stem)
                continue
            if record.upload_id == path.stem:
                offset = min(each for each in (data.st_size, record.length, record.checked) if each is not None)
                good[path.stem] = Found(record, offset, data.st_mtime_ns // 1_000_000)
    for path in files:
        if path.stem not in good or path.suffix == ".new":
            path.unlink(missing_ok=True)
    return list(good.values())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder where it is missing, and holds it for this process alone. Raises: StartError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"The folder of uploads {folder} cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"The folder of uploads {folder} is in use by another process") from None
        yield
    finally:
        os.close(lock)
