"""One tree of errors: the caller's fault, the outside's, ours. Every error has a stable ``code``; transports map it."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class FieldError(msgspec.Struct, frozen=True):
    """One thing that is wrong in a request: where (RFC 6901 JSON pointer) and what."""

    pointer: str
    message: str


class HectorError(Exception):
    """Anything this package raises on purpose.

    ``code`` is stable and part of the wire protocol; ``detail`` is for people, names the thing and the value and never
    holds a secret, a path or a traceback. ``retryable`` says whether the same request may succeed later;
    ``retry_after`` (seconds) when.
    """

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        errors: tuple[FieldError, ...] = (),
        retry_after: int | None = None,
        task_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.retry_after = retry_after
        self.task_id = task_id
        """The task the error speaks of (the running one, for ``session_busy``)."""


# --- the caller's fault -----------------------------------------------------------------------------------------------


class CallerError(HectorError):
    """The request cannot be served as it stands."""


class InvalidRequest(CallerError):
    code = "invalid_request"
    title = "Invalid request"


class SessionMismatch(CallerError):
    code = "session_mismatch"
    title = "The session belongs to another agent or is not the one of the path"


class Unauthorized(CallerError):
    code = "unauthorized"
    title = "Credentials are missing or not accepted"


class InvalidToken(Unauthorized):
    """A token came and is not accepted; ``detail`` goes into the challenge (RFC 6750, 3.1) and holds no quote."""


class Forbidden(CallerError):
    code = "forbidden"
    title = "Not allowed"


class NotFound(CallerError):
    code = "not_found"
    title = "Not found"


class AgentNotFound(NotFound):
    code = "agent_not_found"
    title = "No such agent"


class SessionNotFound(NotFound):
    code = "session_not_found"
    title = "No such session"


class TaskNotFound(NotFound):
    code = "task_not_found"
    title = "No such task"


class UploadNotFound(NotFound):
    code = "upload_not_found"
    title = "No such upload"


class MethodNotAllowed(CallerError):
    code = "method_not_allowed"
    title = "Method not allowed"


class Conflict(CallerError):
    code = "conflict"
    title = "Conflict"


class TaskExists(Conflict):
    code = "task_exists"
    title = "A different task is running under this id"


class TaskRunning(Conflict):
    code = "task_running"
    title = "The task has not ended"


class SessionExists(Conflict):
    code = "session_exists"
    title = "A session with this id exists"


class SessionBusy(Conflict):
    code = "session_busy"
    title = "Another task has the session's turn"


class NotWaiting(Conflict):
    code = "not_waiting"
    title = "The task does not wait for input"


class OffsetMismatch(Conflict):
    code = "offset_mismatch"
    title = "The upload is at another offset"


class UploadLocked(Conflict):
    code = "upload_locked"
    title = "Another request is writing to this upload"
    retryable = True


class ChecksumMismatch(CallerError):
    code = "checksum_mismatch"
    title = "The bytes do not have the checksum they came with"
    retryable = True


class UnsupportedMediaType(CallerError):
    code = "unsupported_media_type"
    title = "The Content-Type is not the one that is needed here"


class UnsupportedVersion(CallerError):
    code = "unsupported_version"
    title = "This version of the protocol is not spoken here"


class PreconditionFailed(CallerError):
    code = "precondition_failed"
    title = "The resource has changed"


class IdempotencyMismatch(CallerError):
    code = "idempotency_mismatch"
    title = "The idempotency key was used with another request"


class PayloadTooLarge(CallerError):
    code = "payload_too_large"
    title = "Payload too large"


class RateLimited(CallerError):
    code = "rate_limited"
    title = "Too many"
    retryable = True


class Gone(CallerError):
    code = "gone"
    title = "No longer here"


# --- the outside's fault ----------------------------------------------------------------------------------------------


class OutsideError(HectorError):
    """Something this server depends on does not do its part."""


class StoreUnavailable(OutsideError):
    code = "store_unavailable"
    title = "The store cannot be reached or refuses to write"
    retryable = True


class KeysUnavailable(OutsideError):
    code = "keys_unavailable"
    title = "The keys that prove tokens cannot be fetched"
    retryable = True


class Draining(OutsideError):
    code = "draining"
    title = "The server is shutting down"
    retryable = True


class StartError(OutsideError):
    """The server cannot start; ``detail`` is the one line that says why and what would help."""

    code = "start_failed"
    title = "The server cannot start"


class ConfigError(StartError):
    """A setting is wrong; ``detail`` names the file, the path of the key and what would be right."""

    code = "config_invalid"
    title = "The configuration is wrong"


# --- how a run fails --------------------------------------------------------------------------------------------------


class RunError(HectorError):
    """Ends the run that raises it as ``failed`` with this ``code`` and message.

    Agents raise it on purpose: ``raise RunError("out_of_stock", "Nothing left")``. Any other exception of an agent ends
    the run with ``agent_error`` and a message that says nothing about its inside.
    """

    title = "The run failed"

    def __init__(
        self, code: str, message: str, *, details: Any = None, retryable: bool = False, retry_after: int | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.run_code = code
        self.details = details
        self.can_retry = retryable


class ModelError(RunError):
    """A model's server failed: ``model_unauthorized``, ``model_rate_limited``, ``model_error``, ``model_timeout``,
    ``model_unreachable``, ``model_stream_cut``, ``model_garbage`` …"""
