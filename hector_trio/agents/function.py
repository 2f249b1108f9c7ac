"""Agents written in Python: an ``async def`` runs on Trio, a plain ``def`` in a bounded worker thread."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import trio

from hector_trio.a2a.mapping import PartLike
from hector_trio.agents import AgentInfo, Context
from hector_trio.errors import ConfigError, RunError
from hector_trio.models import Content, Message, TaskRequest
from hector_trio.uploads import UploadedFile

_NO_LOOP: Final = "no running event loop"
_NO_LOOP_IN_THREAD: Final = "There is no current event loop in thread "
_NOT_TRIOS: Final = "trio.run received unrecognized yield message"
"""What asyncio says where none of its loops runs, and Trio of an ``await`` that is not its own."""


class SyncContext:
    """The same context for a plain ``def`` agent: same members, no ``await``.

    After a cancel the run is over at once; the thread learns of it at its next call, which raises.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._open = True
        self.task_id = ctx.task_id
        self.agent_id = ctx.agent_id
        self.session_id = ctx.session_id
        self.user_id = ctx.user_id
        self.request: TaskRequest = ctx.request
        self.input: Content = ctx.input
        self.history: list[Message] = ctx.history
        self.deadline = ctx.deadline
        self.resume = ctx.resume
        self.message = ctx.message
        self.text = ctx.text
        self.parameters = ctx.parameters

    @property
    def state(self) -> dict[str, Any]:
        return self._ctx.state

    def upload(self) -> UploadedFile | None:
        """Its ``path`` can be opened here as any file."""
        found: list[UploadedFile | None] = []

        async def find() -> None:
            found.append(await self._ctx.upload())

        self._call(find)
        return found[0]

    def emit_text(self, text: str) -> None:
        self._call(self._ctx.emit_text, text)

    def emit_data(self, value: Any) -> None:
        self._call(self._ctx.emit_data, value)

    def emit_metadata(self, value: Any) -> None:
        self._call(self._ctx.emit_metadata, value)

    def emit_error(self, message: str, *, code: str = "agent_warning") -> None:
        async def emit() -> None:
            await self._ctx.emit_error(message, code=code)

        self._call(emit)

    def emit_bytes(self, data: bytes, media_type: str) -> None:
        self._call(self._ctx.emit_bytes, data, media_type)

    def emit_status(self, message: Any = None) -> None:
        self._call(self._ctx.emit_status, message)

    def artifact(self, *parts: PartLike, **about: Any) -> str:
        """As ``Context.artifact``."""
        made: list[str] = []

        async def emit() -> None:
            made.append(await self._ctx.artifact(*parts, **about))

        self._call(emit)
        return made[0]

    def reply(self, *parts: PartLike) -> None:
        self._call(self._ctx.reply, *parts)

    def reject(self, reason: str) -> NoReturn:
        self._call(self._ctx.reject, reason)
        raise AssertionError("reject returned")

    def require_extension(self, uri: str) -> None:
        self._ctx.require_extension(uri)

    def ask(self, question: Any, *, saved: Any = None, auth: bool = False) -> NoReturn:
        async def ask() -> None:
            await self._ctx.ask(question, saved=saved, auth=auth)

        self._call(ask)
        raise AssertionError("ask returned")

    def update_state(self, patch: dict[str, Any]) -> None:
        self._call(self._ctx.update_state, patch)

    def close(self) -> None:
        self._open = False

    def _call(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        trio.from_thread.check_cancelled()

        async def guarded() -> None:
            if not self._open:
                raise RunError("run_ended", "The run has ended; nothing can be emitted any more")
            await function(*args)

        trio.from_thread.run(guarded)


class FunctionAgent:
    """A function as an agent.

    A plain ``def`` cannot be stopped from outside: a cancel ends the run at once and leaves the thread to notice at its
    next use of the context; until then it keeps its place among the worker threads.
    """

    def __init__(self, info: AgentInfo, function: Callable[[Any], Awaitable[None] | None]) -> None:
        """Raises: ConfigError for a function that yields; agents emit."""
        called = getattr(function, "__call__", None)  # noqa: B004  of an object, where its ``def`` stands
        if any(inspect.isasyncgenfunction(each) or inspect.isgeneratorfunction(each) for each in (function, called)):
            raise ConfigError(f"agent {info.agent_id!r}: the function yields; an agent emits: ctx.emit_text(...)")
        self.info = info
        self.limiter: trio.CapacityLimiter | None = None
        """Bounds the worker threads of all plain functions together; the server sets it."""
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)

    async def run(self, ctx: Context) -> None:
        try:
            if self._is_async:
                result = self._function(ctx)
                assert result is not None
                await result
            else:
                sync = SyncContext(ctx)
                try:
                    await trio.to_thread.run_sync(self._function, sync, abandon_on_cancel=True, limiter=self.limiter)
                finally:
                    sync.close()
        except (RuntimeError, TypeError, AttributeError, ExceptionGroup) as error:
            if _is_asyncio(error, on_trio=self._is_async):
                raise RunError(
                    "asyncio_in_agent",
                    "The agent calls asyncio code, but agents run on Trio. Use a Trio library (trio.sleep, httpx2), or "
                    "write the agent as a plain def, which runs in a thread, and call asyncio.run(...) there",
                ) from error
            raise


def _is_asyncio(error: BaseException, *, on_trio: bool) -> bool:
    """Whether code written for asyncio failed because no loop of asyncio runs. A group: whether all of it is that."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_asyncio(each, on_trio=on_trio) for each in error.exceptions)
    text = str(error)
    if isinstance(error, RuntimeError) and (text == _NO_LOOP or text.startswith(_NO_LOOP_IN_THREAD)):
        return True
    if not on_trio:
        return False  # in a thread a loop of asyncio may run, and what fails in it is the agent's own affair
    if isinstance(error, TypeError) and text.startswith(_NOT_TRIOS):
        return True
    return isinstance(error, RuntimeError | TypeError | AttributeError) and _raised_in(error).startswith("asyncio.")


def _raised_in(error: BaseException) -> str:
    """The module whose code raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""
