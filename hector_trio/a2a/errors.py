"""The errors of A2A (specification 3.3.2, 5.4), and the one table of what each is on JSON-RPC, HTTP+JSON and gRPC."""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple

from hector_trio.errors import FieldError, HectorError

DOMAIN: Final = "a2a-protocol.org"
ERROR_INFO: Final = "type.googleapis.com/google.rpc.ErrorInfo"
BAD_REQUEST: Final = "type.googleapis.com/google.rpc.BadRequest"
RETRY_INFO: Final = "type.googleapis.com/google.rpc.RetryInfo"


class Codes(NamedTuple):
    """One row of the table."""

    jsonrpc: int
    http: int
    grpc: str
    """The name of the status; also ``status`` of the body over HTTP+JSON (google.rpc.Status)."""


class A2AError(Exception):
    """An operation is refused. ``reason`` is the name in UPPER_SNAKE_CASE; ``metadata`` holds strings only.

    ``specific``: the specification defines it, so it carries an ErrorInfo on every binding.
    """

    reason: ClassVar[str] = "INTERNAL"
    specific: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        metadata: dict[str, str] | None = None,
        fields: tuple[FieldError, ...] = (),
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata or {}
        self.fields = fields
        """What is wrong in the request; ``pointer`` is the path of a field, in dots (``message.parts``)."""
        self.retry_after = retry_after
        """Seconds."""


class TaskNotFoundError(A2AError):
    reason = "TASK_NOT_FOUND"


class TaskNotCancelableError(A2AError):
    reason = "TASK_NOT_CANCELABLE"


class PushNotificationNotSupportedError(A2AError):
    reason = "PUSH_NOTIFICATION_NOT_SUPPORTED"


class UnsupportedOperationError(A2AError):
    reason = "UNSUPPORTED_OPERATION"


class ContentTypeNotSupportedError(A2AError):
    reason = "CONTENT_TYPE_NOT_SUPPORTED"


class InvalidAgentResponseError(A2AError):
    reason = "INVALID_AGENT_RESPONSE"


class ExtendedAgentCardNotConfiguredError(A2AError):
    reason = "EXTENDED_AGENT_CARD_NOT_CONFIGURED"


class ExtensionSupportRequiredError(A2AError):
    reason = "EXTENSION_SUPPORT_REQUIRED"


class VersionNotSupportedError(A2AError):
    reason = "VERSION_NOT_SUPPORTED"


class GeneralError(A2AError):
    """What the specification leaves to the bindings."""

    specific = False


class ParseError(GeneralError):
    reason = "PARSE_ERROR"


class RequestError(GeneralError):
    """What came is no request (JSON-RPC's "Invalid Request")."""

    reason = "INVALID_REQUEST"


class MethodNotFoundError(GeneralError):
    reason = "METHOD_NOT_FOUND"


class InvalidParamsError(GeneralError):
    reason = "INVALID_PARAMS"


class InternalError(GeneralError):
    reason = "INTERNAL"


class UnauthenticatedError(GeneralError):
    reason = "UNAUTHENTICATED"


class PermissionDeniedError(GeneralError):
    reason = "PERMISSION_DENIED"


class NotFoundError(GeneralError):
    reason = "NOT_FOUND"


class ConflictError(GeneralError):
    reason = "CONFLICT"


class PayloadTooLargeError(GeneralError):
    reason = "PAYLOAD_TOO_LARGE"


class ResourceExhaustedError(GeneralError):
    reason = "RESOURCE_EXHAUSTED"


class UnavailableError(GeneralError):
    reason = "UNAVAILABLE"


CODES: Final[dict[type[A2AError], Codes]] = {
    TaskNotFoundError: Codes(-32001, 404, "NOT_FOUND"),
    TaskNotCancelableError: Codes(-32002, 400, "FAILED_PRECONDITION"),
    PushNotificationNotSupportedError: Codes(-32003, 400, "FAILED_PRECONDITION"),
    UnsupportedOperationError: Codes(-32004, 400, "FAILED_PRECONDITION"),
    ContentTypeNotSupportedError: Codes(-32005, 400, "INVALID_ARGUMENT"),
    InvalidAgentResponseError: Codes(-32006, 500, "INTERNAL"),
    ExtendedAgentCardNotConfiguredError: Codes(-32007, 400, "FAILED_PRECONDITION"),
    ExtensionSupportRequiredError: Codes(-32008, 400, "FAILED_PRECONDITION"),
    VersionNotSupportedError: Codes(-32009, 400, "FAILED_PRECONDITION"),
    ParseError: Codes(-32700, 400, "INVALID_ARGUMENT"),
    RequestError: Codes(-32600, 400, "INVALID_ARGUMENT"),
    MethodNotFoundError: Codes(-32601, 404, "UNIMPLEMENTED"),
    InvalidParamsError: Codes(-32602, 400, "INVALID_ARGUMENT"),
    InternalError: Codes(-32603, 500, "INTERNAL"),
    UnauthenticatedError: Codes(-32091, 401, "UNAUTHENTICATED"),
    PermissionDeniedError: Codes(-32092, 403, "PERMISSION_DENIED"),
    NotFoundError: Codes(-32093, 404, "NOT_FOUND"),
    ConflictError: Codes(-32094, 409, "ABORTED"),
    PayloadTooLargeError: Codes(-32095, 413, "INVALID_ARGUMENT"),
    ResourceExhaustedError: Codes(-32096, 429, "RESOURCE_EXHAUSTED"),
    UnavailableError: Codes(-32097, 503, "UNAVAILABLE"),
}
"""Total: every error stands here (a test walks the tree)."""

OURS: Final[dict[str, type[A2AError]]] = {
    "invalid_request": InvalidParamsError,
    "session_mismatch": InvalidParamsError,
    "idempotency_mismatch": InvalidParamsError,
    "unsupported_version": VersionNotSupportedError,
    "unsupported_media_type": ContentTypeNotSupportedError,
    "unauthorized": UnauthenticatedError,
    "forbidden": PermissionDeniedError,
    "not_found": NotFoundError,
    "agent_not_found": NotFoundError,
    "session_not_found": NotFoundError,
    "upload_not_found": NotFoundError,
    "task_not_found": TaskNotFoundError,
    "method_not_allowed": MethodNotFoundError,
    "conflict": ConflictError,
    "task_exists": ConflictError,
    "task_running": ConflictError,
    "session_exists": ConflictError,
    "session_busy": ConflictError,
    "offset_mismatch": ConflictError,
    "upload_locked": ConflictError,
    "precondition_failed": ConflictError,
    "checksum_mismatch": InvalidParamsError,
    "not_waiting": UnsupportedOperationError,
    "gone": TaskNotFoundError,
    "payload_too_large": PayloadTooLargeError,
    "rate_limited": ResourceExhaustedError,
    "internal_error": InternalError,
    "start_failed": InternalError,
    "config_invalid": InternalError,
    "store_unavailable": UnavailableError,
    "draining": UnavailableError,
}
"""Total: what every code of our own tree of errors is in A2A (a test walks it)."""


def codes_of(error: A2AError) -> Codes:
    return CODES[type(error)]


def of(error: HectorError) -> A2AError:
    """One of our own errors as one of A2A's."""
    kind = OURS.get(error.code, InternalError)
    metadata = {"code": error.code}
    if error.task_id is not None:
        metadata["taskId"] = error.task_id
    fields = tuple(FieldError(each.pointer.strip("/").replace("/", "."), each.message) for each in error.errors)
    return kind(error.detail, metadata=metadata, fields=fields, retry_after=error.retry_after)


def invalid(field: str, message: str) -> InvalidParamsError:
    """The refusal of one field of a request, named by its path (``message.parts``)."""
    text = f"{field}: {message}" if field else message
    return InvalidParamsError(text, fields=(FieldError(field, message),))


def details(error: A2AError) -> list[dict[str, Any]]:
    """The error's details as ProtoJSON ``Any`` (9.5, 11.6): an ErrorInfo, and what else is known."""
    info: dict[str, Any] = {"@type": ERROR_INFO, "reason": error.reason, "domain": DOMAIN}
    if error.metadata:
        info["metadata"] = error.metadata
    result = [info]
    if error.fields:
        violations = [{"field": each.pointer, "description": each.message} for each in error.fields]
        result.append({"@type": BAD_REQUEST, "fieldViolations": violations})
    if error.retry_after is not None:
        result.append({"@type": RETRY_INFO, "retryDelay": f"{error.retry_after}s"})
    return result


def jsonrpc_error(error: A2AError) -> dict[str, Any]:
    """JSON-RPC's ``error`` member (9.5)."""
    return {"code": codes_of(error).jsonrpc, "message": error.message, "data": details(error)}


def http_body(error: A2AError) -> dict[str, Any]:
    """The body over HTTP+JSON: google.rpc.Status (11.6)."""
    codes = codes_of(error)
    status = {"code": codes.http, "status": codes.grpc, "message": error.message, "details": details(error)}
    return {"error": status}
