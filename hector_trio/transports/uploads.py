"""The routes of uploads: tus 1.0 (https://tus.io/protocols/resumable-upload) without concatenation and trailers."""

from __future__ import annotations

import base64
import binascii
import re
from email.utils import formatdate
from typing import Final

import trio

from hector_trio.config import UploadSettings
from hector_trio.errors import (
    ChecksumMismatch,
    Draining,
    InvalidRequest,
    OffsetMismatch,
    PayloadTooLarge,
    RateLimited,
    UnsupportedMediaType,
    UnsupportedVersion,
    UploadLocked,
    UploadNotFound,
)
from hector_trio.transports.requests import MAX_NUMBER, invalid
from hector_trio.transports.routes import Answer, Call, Header, Reply, Route
from hector_trio.uploads import ALGORITHMS, CLOSING_LIMIT, Checksum, Upload, parse_metadata

VERSION: Final = "1.0.0"
EXTENSIONS: Final = "creation,creation-with-upload,creation-defer-length,checksum,expiration,termination"
OFFSET_TYPE: Final = "application/offset+octet-stream"
MAX_METADATA: Final = 4096
"""Bytes of ``Upload-Metadata``."""


# --- what the guard needs to know -------------------------------------------------------------------------------------


def is_upload(path: str) -> bool:
    """Whether this is a path where tus is spoken."""
    return path == "/uploads" or path.startswith("/uploads/")


def tus_headers(settings: UploadSettings) -> list[tuple[bytes, bytes]]:
    """What every answer at such a path has, refusals too: so nobody has to know which of them needs what."""
    return [
        (b"tus-resumable", VERSION.encode()),
        (b"tus-version", VERSION.encode()),
        (b"tus-extension", EXTENSIONS.encode()),
        (b"tus-max-size", str(settings.max_bytes).encode()),
        (b"tus-checksum-algorithm", ",".join(ALGORITHMS).encode()),
    ]


def method_meant(method: str, override: str | None) -> str:
    """``X-HTTP-Method-Override``, for those who can send nothing but POST."""
    return override if method == "POST" and override in ("PATCH", "DELETE", "HEAD") else method


# --- the routes -------------------------------------------------------------------------------------------------------


async def create_upload(call: Call) -> Reply:
    """Bytes that come with the request are its first; if they cannot be stored, there is no upload."""
    _check_version(call)
    _check_draining(call)
    length, deferred = _number(call, "Upload-Length"), call.header("Upload-Defer-Length")
    if deferred not in (None, "1"):
        raise invalid("/Upload-Defer-Length", "must be 1")
    if (length is None) == (deferred is None):
        raise invalid("/Upload-Length", "is required, or else Upload-Defer-Length: 1")
    metadata = _metadata(call)
    with_bytes = _is_bytes(call)
    if not with_bytes and (_announced(call) or call.header("Transfer-Encoding")):
        raise UnsupportedMediaType(f"The first bytes of an upload come as {OFFSET_TYPE}")
    checksum = _checksum(call)
    uploads = call.services.uploads
    upload = await uploads.create(call.owner, length, metadata)
    if with_bytes:
        stored = False
        try:
            await uploads.append(upload, 0, call.source, announced=_announced(call), checksum=checksum)
            stored = True
        finally:
            if not stored:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSING_LIMIT):
                    await uploads.remove(upload)
    headers = {"Location": call.path(f"/uploads/{upload.upload_id}"), **_state(call, upload)}
    return Reply(201, media_type="", headers=headers)


async def head_upload(call: Call) -> Reply:
    _check_version(call)
    upload = call.services.uploads.find(call.owner, call.ids["uploadId"])
    headers = _state(call, upload)
    if upload.length is None:
        headers["Upload-Defer-Length"] = "1"
    else:
        headers["Upload-Length"] = str(upload.length)
    if upload.record.metadata:
        headers["Upload-Metadata"] = upload.record.metadata
    return Reply(200, media_type="", headers=headers)


async def patch_upload(call: Call) -> Reply:
    _check_version(call)
    _check_draining(call)
    uploads = call.services.uploads
    upload = uploads.find(call.owner, call.ids["uploadId"])
    if not _is_bytes(call):
        raise UnsupportedMediaType(f"The bytes of an upload come as {OFFSET_TYPE}")
    offset = _number(call, "Upload-Offset")
    if offset is None:
        raise invalid("/Upload-Offset", "is required")
    await uploads.append(
        upload,
        offset,
        call.source,
        announced=_announced(call),
        length=_number(call, "Upload-Length"),
        checksum=_checksum(call),
    )
    return Reply(204, headers=_state(call, upload))


async def delete_upload(call: Call) -> Reply:
    _check_version(call)
    uploads = call.services.uploads
    await uploads.remove(uploads.find(call.owner, call.ids["uploadId"]))
    return Reply(204)


def _state(call: Call, upload: Upload) -> dict[str, str]:
    expires = call.services.uploads.expires_at(upload) / 1000
    return {"Upload-Offset": str(upload.offset), "Upload-Expires": formatdate(expires, usegmt=True)}


# --- headers ----------------------------------------------------------------------------------------------------------


def _check_version(call: Call) -> None:
    given = call.header("Tus-Resumable")
    if given != VERSION:
        raise UnsupportedVersion(f"Tus-Resumable must be {VERSION}, not {(given or '')[:20]!r}")


def _check_draining(call: Call) -> None:
    if call.services.engine.draining:
        raise Draining("The server is shutting down; the upload can go on at the next start", retry_after=5)


def _number(call: Call, name: str) -> int | None:
    text = call.header(name)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,16}", text, re.ASCII) is None or int(text) > MAX_NUMBER:
        raise invalid(f"/{name}", f"must be an integer from 0 to {MAX_NUMBER}")
    return int(text)


def _announced(call: Call) -> int | None:
    """The size of the body where it is said; the guard has read the number."""
    text = call.header("Content-Length")
    return None if text is None else int(text)


def _is_bytes(call: Call) -> bool:
    return (call.header("Content-Type") or "").partition(";")[0].strip().lower() == OFFSET_TYPE


def _metadata(call: Call) -> str:
    header = (call.header("Upload-Metadata") or "").strip()
    if len(header) > MAX_METADATA:
        raise invalid("/Upload-Metadata", f"has at most {MAX_METADATA} bytes")
    try:
        if header:
            parse_metadata(header)
    except ValueError as error:
        raise invalid("/Upload-Metadata", str(error)) from None
    return header


def _checksum(call: Call) -> Checksum | None:
    header = call.header("Upload-Checksum")
    if header is None:
        return None
    algorithm, _, text = header.strip().partition(" ")
    if algorithm not in ALGORITHMS:
        raise invalid("/Upload-Checksum", f"must begin with one of {', '.join(ALGORITHMS)}")
    try:
        digest = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != ALGORITHMS[algorithm]:
        raise invalid("/Upload-Checksum", f"must hold {ALGORITHMS[algorithm]} bytes in base64 for {algorithm}")
    return Checksum(algorithm, digest)


# --- the table --------------------------------------------------------------------------------------------------------


_UPLOAD: Final = "/uploads/{uploadId}"
_NUMBER: Final = {"type": "integer", "minimum": 0, "maximum": MAX_NUMBER}
_TUS: Final = Header("Tus-Resumable", "The version of tus", {"type": "string", "enum": [VERSION]}, required=True)
_CHECKSUM: Final = Header("Upload-Checksum", f"One of {', '.join(ALGORITHMS)}, a space, and base64 of the body's hash")
_WRITING: Final = (
    InvalidRequest,
    UnsupportedVersion,
    UnsupportedMediaType,
    PayloadTooLarge,
    RateLimited,
    UploadLocked,
    UploadNotFound,
    ChecksumMismatch,
    OffsetMismatch,
    Draining,
)

UPLOAD_ROUTES: Final = (
    Route(
        "POST",
        "/uploads",
        "createUpload",
        "Begin an upload (tus 1.0), with its first bytes or without",
        create_upload,
        {201: Answer("It can be written to", headers=("Location", "Upload-Offset", "Upload-Expires"))},
        right="write",
        body=bytes,
        headers=(
            _TUS,
            Header("Upload-Length", "Bytes in all", _NUMBER),
            Header("Upload-Defer-Length", "1: the length is said later", {"type": "string", "enum": ["1"]}),
            Header("Upload-Metadata", "Keys and base64 values, parted by commas; `filename` is the file's name"),
            _CHECKSUM,
        ),
        refusals=_WRITING,
    ),
    Route(
        "HEAD",
        _UPLOAD,
        "headUpload",
        "How much of an upload is here",
        head_upload,
        {
            200: Answer(
                "It is at `Upload-Offset`",
                headers=("Upload-Offset", "Upload-Length", "Upload-Defer-Length", "Upload-Metadata", "Upload-Expires"),
            )
        },
        headers=(_TUS,),
        refusals=(UnsupportedVersion, UploadNotFound),
    ),
    Route(
        "PATCH",
        _UPLOAD,
        "patchUpload",
        "Write the next bytes of an upload",
        patch_upload,
        {204: Answer("They are stored", headers=("Upload-Offset", "Upload-Expires"))},
        right="write",
        body=bytes,
        headers=(
            _TUS,
            Header("Upload-Offset", "Where they belong: where the upload is", _NUMBER, required=True),
            Header("Upload-Length", "Bytes in all, once, where that was not said at first", _NUMBER),
            _CHECKSUM,
        ),
        refusals=_WRITING,
    ),
    Route(
        "DELETE",
        _UPLOAD,
        "deleteUpload",
        "Remove an upload, finished or not",
        delete_upload,
        {204: Answer("Removed")},
        right="write",
        headers=(_TUS,),
        refusals=(UnsupportedVersion, UploadNotFound),
    ),
)
