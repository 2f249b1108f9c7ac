"""Errors as clients see them: the one table to HTTP status, RFC 9457 problem details, and the refusing chunk."""

from __future__ import annotations

from typing import Final

from msgspec import UNSET

from hector_trio.a2a import errors
from hector_trio.auth import CHALLENGE
from hector_trio.errors import HectorError
from hector_trio.log import now_ms
from hector_trio.models import Chunk, Problem, encode, timestamp

MEDIA_TYPE: Final = "application/problem+json"

STATUS: Final[dict[str, int]] = {
    "invalid_request": 400,
    "session_mismatch": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "agent_not_found": 404,
    "session_not_found": 404,
    "task_not_found": 404,
    "upload_not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "task_exists": 409,
    "task_running": 409,
    "session_exists": 409,
    "session_busy": 409,
    "not_waiting": 409,
    "offset_mismatch": 409,
    "gone": 410,
    "precondition_failed": 412,
    "unsupported_version": 412,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "idempotency_mismatch": 422,
    "upload_locked": 423,
    "rate_limited": 429,
    "checksum_mismatch": 460,
    "internal_error": 500,
    "start_failed": 500,
    "config_invalid": 500,
    "store_unavailable": 503,
    "draining": 503,
}
"""Total: every code of the tree of errors stands here (a test walks it)."""

A2A: Final = "/a2a/"

RETRY_AFTER: Final[dict[int, int]] = {429: 1, 503: 5}
"""Seconds, for an error that does not say them itself."""

INTERNAL: Final = HectorError("An internal error; it has been logged")
"""All that a client learns of a bug."""


def status_of(error: HectorError) -> int:
    return STATUS[error.code]


def problem(error: HectorError, *, instance: str, request_id: str) -> Problem:
    """RFC 9457: ``type`` is the code as a URN, ``instance`` the path that was asked."""
    return Problem(
        type=f"urn:hector:problem:{error.code}",
        title=error.title,
        status=status_of(error),
        detail=error.detail,
        instance=instance,
        code=error.code,
        retryable=error.retryable,
        request_id=request_id,
        task_id=UNSET if error.task_id is None else error.task_id,
        errors=error.errors or UNSET,
    )


def headers_of(error: HectorError, instance: str = "") -> dict[str, str]:
    """What goes beside the body: ``Retry-After`` (RFC 9110, 10.2.3), ``WWW-Authenticate`` (RFC 6750, 3)."""
    status = status_of(error)
    media_type = "application/json" if instance.startswith(A2A) else MEDIA_TYPE
    headers = {"Content-Type": media_type, "Cache-Control": "no-store"}
    seconds = error.retry_after if error.retry_after is not None else RETRY_AFTER.get(status)
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    if status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    return headers


def body_of(error: HectorError, *, instance: str, request_id: str) -> bytes:
    """A problem; below ``/a2a/`` google.rpc.Status (A2A 11.6), of what is refused before the protocol is spoken."""
    if instance.startswith(A2A):
        body = errors.http_body(errors.of(error))
        body["error"]["code"] = status_of(error)
        return encode(body)
    return encode(problem(error, instance=instance, request_id=request_id))


def refused(task_id: str, error: HectorError) -> Chunk:
    """The chunk that answers a refused task frame, or ends a stream whose log cannot be read on: it is in no log."""
    return Chunk(
        task_id=task_id,
        seq=0,
        chunk_type="error",
        content=error.detail,
        timestamp=timestamp(now_ms()),
        final=True,
        status="failed",
        code=error.code,
        retryable=True if error.retryable else UNSET,
    )
