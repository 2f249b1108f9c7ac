"""Uploads: files that clients send in pieces, kept in one folder with a record beside each until their time is over."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import structlog
import trio
from msgspec import Struct

from hector_trio.config import Settings
from hector_trio.errors import (
    ChecksumMismatch,
    FieldError,
    InvalidRequest,
    OffsetMismatch,
    PayloadTooLarge,
    RateLimited,
    RunError,
    StartError,
    StoreUnavailable,
    UploadLocked,
    UploadNotFound,
)
from hector_trio.log import now_ms
from hector_trio.uploads import files
from hector_trio.uploads.files import Record

T = TypeVar("T")

ALGORITHMS: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}
"""The checksums that a piece may come with, and their sizes in bytes."""

THREADS: Final = 8
"""Threads that read and write uploads at once, in all."""

STALLED: Final = 2.0
"""Seconds without a byte after which a request that writes to an upload gives way to the next one."""

CLOSING_LIMIT: Final = 10.0
"""Seconds that storing what had arrived, and removing a file, may take once the request is cancelled."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = structlog.stdlib.get_logger("hector_trio.uploads")


# --- values -----------------------------------------------------------------------------------------------------------


class Checksum(Struct, frozen=True):
    """What the bytes of one request must hash to. ``algorithm`` is one of ``ALGORITHMS``."""

    algorithm: str
    digest: bytes


class Upload:
    """One upload. Its owner's files only: everybody else is told that there is none."""

    __slots__ = ("offset", "record", "reserved", "touched", "writing")

    def __init__(self, record: Record, *, offset: int, touched: int) -> None:
        self.record = record
        self.offset = offset
        """Bytes stored, where the next ones belong."""
        self.touched = touched
        """Milliseconds since the epoch of the last byte, or until which a task may use it: expiry counts from then."""
        self.reserved = 0
        """Bytes of the limits that are its own."""
        self.writing: _Writing | None = None

    @property
    def upload_id(self) -> str:
        return self.record.upload_id

    @property
    def length(self) -> int | None:
        return self.record.length

    @property
    def complete(self) -> bool:
        return self.offset == self.length


class _Writing:
    """The request that writes to an upload."""

    __slots__ = ("ended", "moved", "scope")

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.moved = trio.current_time()
        """When its last byte arrived."""


class Source(Protocol):
    """The body of a request: its pieces as they come."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def arrived(self) -> bytes:
        """What has come and was not taken yet; takes it."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A finished upload as an agent is given it.

    ``name`` is what the client calls it: information, never part of a path. The file at ``path`` is to be read only; it
    stays at least for as long as the task may run, unless its owner removes it.
    """

    media_type: str
    size: int
    name: str | None
    path: Path
    limiter: trio.CapacityLimiter = field(repr=False)
    """Of the threads that read."""

    async def read(self, offset: int = 0, size: int = 65536) -> bytes:
        """At most ``size`` bytes from ``offset`` on; ``b""`` at the end. Raises: RunError (``upload_gone``)."""

        def read() -> bytes:
            with self.path.open("rb") as file:
                return os.pread(file.fileno(), size, offset)

        try:
            return await trio.to_thread.run_sync(read, limiter=self.limiter)
        except FileNotFoundError:
            raise RunError("upload_gone", "The upload was removed before the task had read it") from None


def parse_metadata(header: str) -> dict[str, bytes]:
    """``Upload-Metadata``: pairs of a key and base64, parted by commas. Raises: ValueError saying what is wrong."""
    found: dict[str, bytes] = {}
    for pair in header.split(","):
        key, _, value = pair.strip(" \t").partition(" ")
        if re.fullmatch(r"[\x21-\x2b\x2d-\x7e]+", key) is None:
            raise ValueError("must be pairs of a key (printable ASCII) and a base64 value, parted by commas")
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        try:
            found[key] = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"the value of {key!r} is not base64") from None
    return found


def name_in(metadata: str) -> str | None:
    """What the client calls the file: ``filename`` or, as some write it, ``name``."""
    found = parse_metadata(metadata) if metadata else {}
    return found.get("filename", found.get("name", b"")).decode(errors="replace") or None


# --- uploads ----------------------------------------------------------------------------------------------------------


def folder_of(settings: Settings) -> Path | None:
    """Where uploads are kept; ``None``: in a temporary folder, for as long as the server runs."""
    if settings.uploads.path is not None:
        return Path(settings.uploads.path)
    if settings.store.url == "memory":
        return None
    return Path(f"{settings.store.url}-uploads")


@asynccontextmanager
async def open_uploads(settings: Settings) -> AsyncIterator[Uploads]:
    """All uploads that were there. Start ``sweep_for_ever`` beside it. Raises: StartError."""
    folder = folder_of(settings)
    if folder is None:
        # Made with the first upload: most servers without a database never have one, and one that is killed leaves it.
        folder = Path(tempfile.gettempdir(), f"hector-uploads-{uuid.uuid4().hex}")
        try:
            yield Uploads(folder, [], settings)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSING_LIMIT):
                await trio.to_thread.run_sync(shutil.rmtree, folder, True)
        return
    with files.claimed(folder):
        try:
            found = await trio.to_thread.run_sync(files.load, folder)
        except OSError as error:
            raise StartError(f"The folder of uploads {folder} cannot be read: {error.strerror}") from error
        yield Uploads(folder, found, settings)


class Uploads:
    """Every upload of this server. Made by ``open_uploads``.

    At most one request writes to an upload. The limits count what clients have announced, so that what was accepted
    has its room. A cancel anywhere leaves every upload whole: at the offset up to which its bytes have been stored.

    Raises, beside what a method says: StoreUnavailable when the disk refuses; what was stored stays and can be read.
    """

    def __init__(self, folder: Path, found: list[files.Found], settings: Settings) -> None:
        self._folder = folder
        self._settings = settings.uploads
        self._durable = settings.store.durability == "full"
        self._task_ms = int((settings.tasks.max_timeout + settings.tasks.input_timeout) * 1000)
        self._sweep_interval = settings.tasks.sweep_interval
        self._limiter = trio.CapacityLimiter(THREADS)
        self._owned: dict[str, dict[str, Upload]] = {}
        self._total = 0
        for record, offset, touched in found:
            self._remember(Upload(record, offset=offset, touched=touched))

    # --- finding

    def find(self, owner: str, upload_id: str) -> Upload:
        """Raises: UploadNotFound, also for an upload of somebody else, and one whose time is over."""
        upload = self._owned.get(owner, {}).get(upload_id)
        if upload is None or self._expired(upload):
            raise UploadNotFound(f"There is no upload {upload_id!r}")
        return upload

    def expires_at(self, upload: Upload) -> int:
        """Milliseconds since the epoch."""
        return upload.touched + int(self._settings.expiry * 1000)

    def _expired(self, upload: Upload) -> bool:
        return upload.writing is None and self.expires_at(upload) <= now_ms()

    # --- making and removing

    async def create(self, owner: str, length: int | None, metadata: str) -> Upload:
        """An upload of ``length`` bytes, or (``None``) of as many as come. ``metadata`` has been parsed.

        Raises: PayloadTooLarge, RateLimited (the owner has too many, or too large ones), StoreUnavailable (there is no
        room for anybody's). Cancelled: there is none, or one that nobody knows of and that expires.
        """
        if len(self._owned.get(owner, {})) >= self._settings.per_owner:
            raise RateLimited(
                f"{self._settings.per_owner} uploads are kept for you already; remove one", retry_after=60
            )
        upload = Upload(Record(uuid.uuid4().hex, owner, length, metadata), offset=0, touched=now_ms())
        self._reserve(upload, length or 0)
        self._owned.setdefault(owner, {})[upload.upload_id] = upload
        try:
            await self._in_thread(files.create, self._folder, upload.record, self._durable)
        except BaseException:
            self._forget(upload)
            raise
        return upload

    async def remove(self, upload: Upload) -> None:
        """Removes it; a request that writes to it is ended first."""
        while upload.writing is not None:
            upload.writing.scope.cancel()
            await upload.writing.ended.wait()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSING_LIMIT):
            self._forget(upload)
            try:
                await self._in_thread(files.unlink, self._folder, upload.upload_id)
            except StoreUnavailable:
                self._remember(upload)
                raise

    async def sweep(self) -> int:
        """Removes every upload whose time is over; returns how many."""
        gone = [each for owned in self._owned.values() for each in owned.values() if self._expired(each)]
        for upload in gone:
            await self.remove(upload)
        return len(gone)

    async def sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(self._sweep_interval)
            try:
                await self.sweep()
            except StoreUnavailable as error:
                log.warning("sweep_failed", detail=error.detail)

    # --- writing

    async def append(
        self,
        upload: Upload,
        offset: int,
        source: Source,
        *,
        announced: int | None = None,
        length: int | None = None,
        checksum: Checksum | None = None,
    ) -> None:
        """Stores what comes from ``source`` at ``offset``, which must be the upload's; ``announced``: how many bytes
        that will be. ``length`` says, once, how long an upload is that did not say so at first.

        A cancel leaves what had arrived stored, but of bytes with a checksum, none: they count when it has been
        compared. The upload can be written to again at once.

        Raises: UploadLocked (another request writes to it, or has gone on with it after this one had been silent for
        ``STALLED`` seconds), UploadNotFound (removed meanwhile), OffsetMismatch, PayloadTooLarge, InvalidRequest (the
        length is known), RateLimited, ChecksumMismatch.
        """
        writing = await self._enter(upload)
        try:
            with writing.scope:
                if offset != upload.offset:
                    raise OffsetMismatch(f"The upload is at offset {upload.offset}, not {offset}")
                if length is not None:
                    await self._set_length(upload, length)
                if announced is not None:
                    self._admit(upload, offset + announced)
                await self._receive(upload, source, checksum, writing)
            if writing.scope.cancelled_caught:
                raise UploadLocked("Another request has gone on with this upload", retry_after=1)
        finally:
            upload.writing = None
            writing.ended.set()

    async def _enter(self, upload: Upload) -> _Writing:
        holder = upload.writing
        if holder is not None:
            if trio.current_time() - holder.moved < STALLED:
                raise UploadLocked("Another request is writing to this upload", retry_after=1)
            holder.scope.cancel()
            await holder.ended.wait()
            if upload.writing is not None:
                raise UploadLocked("Another request is writing to this upload", retry_after=1)
        self.find(upload.record.owner, upload.upload_id)
        upload.writing = _Writing()
        return upload.writing

    async def _set_length(self, upload: Upload, length: int) -> None:
        if length == upload.length:
            return
        if upload.length is not None or length < upload.offset:
            known = f"at least {upload.offset}" if upload.length is None else f"{upload.length}, as it was said before"
            raise invalid("/Upload-Length", f"must be {known}")
        self._reserve(upload, length)
        await self._change(upload, length=length)

    async def _receive(self, upload: Upload, source: Source, checksum: Checksum | None, writing: _Writing) -> None:
        begin = size = upload.offset
        digest = None if checksum is None else hashlib.new(checksum.algorithm, usedforsecurity=False)
        file = await self._in_thread(files.open_at, self._data(upload), begin)
        pending, whole, failed = b"", False, False
        try:
            # On disk before the first byte that it speaks of, and gone before the first that it does not.
            if (checked := begin if checksum is not None else None) != upload.record.checked:
                await self._change(upload, checked=checked)
            async for pending in source:
                writing.moved = trio.current_time()
                self._admit(upload, size + len(pending))
                await self._in_thread(files.write, file, pending, digest)
                size, pending = size + len(pending), b""
                if digest is None:
                    upload.offset = size
            whole = True
        except (StoreUnavailable, PayloadTooLarge, RateLimited):
            failed = True
            raise
        finally:
            good = digest is None or checksum is None or (whole and digest.digest() == checksum.digest)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSING_LIMIT):
                rest = b"" if failed or digest is not None else pending + source.arrived()
                rest = rest[: upload.reserved - size]
                size = await self._in_thread(files.close, file, rest, None if good else begin, self._durable)
                if digest is not None and good:
                    await self._change(upload, checked=size)
                upload.offset = size
                upload.touched = now_ms()
                if upload.length is None:
                    self._reserve(upload, size)
        if not good:
            raise ChecksumMismatch(f"The bytes do not have this checksum; the upload is still at offset {begin}")

    # --- for tasks

    async def use(
        self, owner: str, upload_id: str, media_type: str, *, pointer: str = "/input/uploadId"
    ) -> UploadedFile:
        """A finished upload that a task is to read: from now on it stays for as long as any task may run, and then the
        usual time. Raises: InvalidRequest naming ``pointer``."""
        try:
            upload = self.find(owner, upload_id)
        except UploadNotFound as error:
            raise invalid(pointer, f"is no upload of yours: {error.detail}") from None
        if not upload.complete:
            total = "an unknown number" if upload.length is None else upload.length
            raise invalid(pointer, f"is not complete: {upload.offset} bytes of {total} are here")
        upload.touched = max(upload.touched, now_ms() + self._task_ms)
        stamp = upload.touched * 1_000_000
        with suppress(StoreUnavailable):  # what is there can be read all the same
            await self._in_thread(lambda: os.utime(self._data(upload), ns=(stamp, stamp)))
        name = name_in(upload.record.metadata)
        return UploadedFile(media_type, upload.offset, name, self._data(upload), self._limiter)

    # --- inside

    def _data(self, upload: Upload) -> Path:
        return self._folder / f"{upload.upload_id}.data"

    async def _change(self, upload: Upload, **changes: Any) -> None:
        record = msgspec.structs.replace(upload.record, **changes)
        await self._in_thread(files.write_record, self._folder, record, self._durable)
        upload.record = record

    def _admit(self, upload: Upload, size: int) -> None:
        """Raises: PayloadTooLarge for more than the upload's length; and, where that is unknown, as ``_reserve``."""
        if upload.length is not None and size > upload.length:
            raise PayloadTooLarge(f"The upload has {upload.length} bytes; {size} would be too many")
        if size > upload.reserved:
            self._reserve(upload, size)

    def _reserve(self, upload: Upload, size: int) -> None:
        """Counts ``size`` bytes as the upload's. Raises: PayloadTooLarge, RateLimited, StoreUnavailable."""
        limits = self._settings
        more = size - upload.reserved
        if more > 0:
            if size > limits.max_bytes:
                raise PayloadTooLarge(f"An upload has at most {limits.max_bytes} bytes")
            own = sum(each.reserved for each in self._owned.get(upload.record.owner, {}).values())
            if own + more > limits.owner_bytes:
                raise RateLimited(f"Your uploads have at most {limits.owner_bytes} bytes together", retry_after=60)
            if self._total + more > limits.total_bytes:
                raise StoreUnavailable("There is no room for uploads now", retry_after=60)
        upload.reserved = size
        self._total += more

    def _remember(self, upload: Upload) -> None:
        upload.reserved = upload.offset if upload.length is None else upload.length
        self._total += upload.reserved
        self._owned.setdefault(upload.record.owner, {})[upload.upload_id] = upload

    def _forget(self, upload: Upload) -> None:
        owned = self._owned.get(upload.record.owner, {})
        if owned.pop(upload.upload_id, None) is not None:
            self._total -= upload.reserved
        if not owned:
            self._owned.pop(upload.record.owner, None)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """A cancel before it begins: nothing has happened; later: it is finished first."""
        try:
            return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)
        except OSError as error:
            log.warning("uploads_unavailable", because=os.strerror(error.errno or errno.EIO))
            full = error.errno in _FULL
            raise StoreUnavailable(f"The disk of the uploads {'is full' if full else 'refuses'}") from error


def invalid(pointer: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{pointer.removeprefix('/')}: {message}", errors=(FieldError(pointer, message),))
