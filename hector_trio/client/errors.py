"""What a client raises: its own errors, and codes and foreign exceptions as errors of ``hector_trio.errors``."""

from __future__ import annotations

import os
import ssl
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import httpx2
import msgspec
from msgspec import Struct

from hector_trio.errors import FieldError, HectorError, OutsideError, RunError


class ConnectionFailed(OutsideError):
    """The server cannot be reached, or the connection was lost before the answer was complete.

    ``url`` is what was asked; ``close_code`` and ``close_reason`` are those of the WebSocket's Close frame (1006: there
    was none), ``None`` where no WebSocket was open. What was being asked for may have happened, or may still happen.
    """

    code = "connection_failed"
    title = "The server cannot be reached"
    retryable = True

    def __init__(
        self, detail: str, *, url: str, close_code: int | None = None, close_reason: str | None = None
    ) -> None:
        super().__init__(detail)
        self.url = url
        self.close_code = close_code
        self.close_reason = close_reason


class UnexpectedAnswer(OutsideError):
    """What came back is not what a hector server answers."""

    code = "unexpected_answer"
    title = "The answer is not that of a hector server"


class RemoteError(HectorError):
    """A refusal with a code that this client does not know: see ``code``, ``status`` (of HTTP, 0 in a stream)."""

    def __init__(self, code: str, detail: str, *, status: int, retryable: bool = False, **more: Any) -> None:
        super().__init__(detail, **more)
        # On the instance, where the classes of the tree have them on the class.
        self.__dict__.update(code=code, retryable=retryable)
        self.status = status


def _tree(root: type[HectorError]) -> Iterator[type[HectorError]]:
    for each in root.__subclasses__():
        if not issubclass(each, RunError) and "code" in each.__dict__:
            yield each
        yield from _tree(each)


_CLASSES: Final = {each.code: each for each in _tree(HectorError) if each is not ConnectionFailed}


class _Problem(Struct):
    """A problem as far as it can be read; another program's may lack anything."""

    code: str
    detail: str = ""
    title: str = ""
    retryable: bool = False
    request_id: str = msgspec.field(default="", name="requestId")
    task_id: str | None = msgspec.field(default=None, name="taskId")
    errors: tuple[FieldError, ...] = ()


def error_of(code: str, detail: str, *, status: int, retryable: bool, **more: Any) -> HectorError:
    known = _CLASSES.get(code)
    if known is None:
        return RemoteError(code, detail, status=status, retryable=retryable, **more)
    return known(detail, **more)


def refusal(status: int, headers: Mapping[str, str], body: bytes, url: str) -> HectorError:
    """The error that an HTTP answer with ``status`` stands for."""
    seconds = headers.get("retry-after", "")
    retry_after = int(seconds) if seconds.isdecimal() and len(seconds) < 9 else None
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.DecodeError, RecursionError):
        # Not from a hector server: a proxy before it, or another program.
        what = f"{url} answered {status}"
        return RemoteError(f"http_{status}", what, status=status, retryable=status in (429, 502, 503, 504))
    error = error_of(
        problem.code,
        problem.detail or problem.title or problem.code,
        status=status,
        retryable=problem.retryable,
        errors=problem.errors,
        retry_after=retry_after,
        task_id=problem.task_id,
    )
    if problem.request_id:
        error.add_note(f"request {problem.request_id}")
    return error


def why(error: BaseException) -> str:
    """The reason at the bottom of a failed connection, in the system's words."""
    seen: list[BaseException] = []
    queue: deque[BaseException | None] = deque([error])
    while queue:
        each = queue.popleft()
        if each is None or each in seen:
            continue
        seen.append(each)
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted ({each.verify_message})"
        if isinstance(each, OSError) and each.strerror:
            named = isinstance(each.errno, int) and each.errno > 0  # else it is getaddrinfo's, with words of its own
            return os.strerror(each.errno or 0) if named else each.strerror
        queue += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        queue += (each.__cause__, each.__context__)
    return str(error) or type(error).__name__


@contextmanager
def mapped(url: str) -> Iterator[None]:
    """httpx2's errors as ours."""
    try:
        yield
    except httpx2.TimeoutException:
        raise ConnectionFailed(f"Cannot reach {url}: no answer in time", url=url) from None
    except httpx2.TransportError as error:
        raise ConnectionFailed(f"Cannot reach {url}: {why(error)}", url=url) from error
    except httpx2.DecodingError as error:
        raise UnexpectedAnswer(f"{url} sent what cannot be decompressed") from error


def reraise(error: BaseException) -> NoReturn:
    """Raises ``error`` with the context that it had."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context


@contextmanager
def unwrapped() -> Iterator[None]:
    """Around a nursery: what one exception in its group was, as it came."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        reraise(group.exceptions[0])
