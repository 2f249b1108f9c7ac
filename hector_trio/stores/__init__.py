"""The Store protocol: where tasks, logs and sessions live. Every method but ``sweep`` is one whole transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from msgspec import Struct

from hector_trio.models import Content, Status, TaskError
from hector_trio.session import MessageRow, SessionRow
from hector_trio.task import Mark, Question, TaskRow

T = TypeVar("T")

SESSION_BYTES: Final = 256 * 1024
"""What state and metadata of a session may have together, as JSON, unless the caller says otherwise."""

PAGE_BYTES: Final = 1 << 20
"""What the items of a page may have together, unless the caller says otherwise."""

HISTORY_BYTES: Final = 1 << 20
"""What the messages that a run is given may have together, as JSON, unless the caller says otherwise."""


class Page(Struct, Generic[T], frozen=True):
    """Some items of a list, how many there are in all, and the token of the next page (``""`` at the end).

    A page holds one item at least, if there is any, then no more than ``limit`` and no more than fit into
    ``limit_bytes``. What counts is what clients can make large, as JSON: of a task its request, metadata, output and
    error, of a session its state and metadata, of a message its content. No more is read than that and one item.
    """

    items: list[T]
    total: int
    next_token: str


class Idempotency(Struct, frozen=True):
    """An ``Idempotency-Key`` as it was used: kept 24 h per owner and route."""

    route: str
    key: str
    body_hash: str
    expires_at: int


PushDialect = Literal["1.0", "0.3"]
"""The version of A2A that a webhook understands."""


class Push(Struct, frozen=True):
    """A webhook that is to be told of a task, and how far it was."""

    key: int
    """The task's; 0: of one that is to be accepted with it."""
    config_id: str
    """Unique among the webhooks of the task."""
    url: str
    created_at: int
    instance: str
    """Who tells it."""
    seq: int = 0
    """The last chunk that was delivered or given up."""
    token: str | None = None
    scheme: str | None = None
    credentials: str | None = None
    over_at: int | None = None
    """When there was nothing more to tell."""
    dialect: PushDialect = "1.0"

    def __repr__(self) -> str:
        """Without what is secret, which may be anywhere in it."""
        return f"Push(key={self.key}, config_id={self.config_id!r}, seq={self.seq}, over_at={self.over_at})"


class NewPush(Struct, frozen=True):
    """A webhook to be kept, in the place of the one of that task and id if there is one. The task may have ``limit``
    others."""

    push: Push
    limit: int


class NewTask(Struct, frozen=True):
    """A task to be accepted (status ``pending``, no chunk yet)."""

    owner: str
    agent_id: str
    task_id: str
    request: bytes
    fingerprint: str
    policy: str
    instance: str
    metadata: dict[str, Any]
    created_at: int
    session_id: str | None = None
    idempotency: Idempotency | None = None
    push: Push | None = None
    """A webhook that is kept with it, if it is ``created``."""


class Accepted(Struct, frozen=True):
    """``created``: the row is new. ``running``: a task with this id and fingerprint has not ended; follow it.
    ``replayed``: the idempotency key was used with the same body; this is its task, in flight or ended."""

    how: Literal["created", "running", "replayed"]
    task: TaskRow


State = tuple[Status, Mark | None]
"""A status and what it does not say."""


class Change(Struct, frozen=True):
    """What a task's row becomes in the transaction that appends."""

    status: Status
    output: Content | None = None
    error: TaskError | None = None
    ended_at: int | None = None
    question: Question | None = None
    at: int | None = None
    """When the status began; left out: when the task ended, else as before."""
    mark: Mark | None = None

    @property
    def status_at(self) -> int | None:
        return self.ended_at if self.at is None else self.at


class Append(Struct, frozen=True):
    """A segment for one task's log: encoded chunks ``first_seq .. last_seq``, joined by newlines.

    ``first_seq`` must be the row's ``last_seq + 1``, ``instance`` the row's, and the row must not have ended, else the
    append is refused. ``change`` and ``message`` (a line for the session's conversation) commit with it; the message's
    time and the end's move the session's ``last_activity_at``. Without chunks (``data`` empty, ``last_seq =
    first_seq - 1``) it is a change of state alone.
    """

    key: int
    instance: str
    first_seq: int
    last_seq: int
    data: bytes
    change: Change | None = None
    message: MessageRow | None = None
    idempotency: Idempotency | None = None
    """A key, of the task's owner, that is to lead to the task from now on."""
    push: NewPush | None = None
    """A webhook of the task."""


class Segment(Struct, frozen=True):
    first_seq: int
    last_seq: int
    data: bytes


class PushMove(Struct, frozen=True):
    """How far a webhook has been told by now."""

    key: int
    config_id: str
    seq: int
    over_at: int | None = None


class StoreStatistics(Struct, frozen=True):
    size_bytes: int
    commits: int
    """Transactions committed since the store was opened."""
    commit_seconds: float
    """Time spent in them."""
    operations: int
    """Operations that travelled in them: ``operations / commits`` is the batch size."""


class Store(Protocol):
    """All times are milliseconds since the epoch. Rows that belong to somebody else do not exist for the caller:
    ``owner`` stands in every question. A session past its expiry does not exist on any read, and neither do its tasks
    and what leads to them, unless one of them has not ended: that keeps the session, and its end is an activity.
    ``now=None`` is the clock's time.

    A cancelled write has either not begun, and never will, or it is finished first and its result is returned: the
    cancellation arrives at the caller's next checkpoint. So a caller may act on the result without an await between.

    Raises: StoreUnavailable when the store cannot be reached or refuses to write (disk full, read-only); nothing of the
    operation has happened then.
    """

    # --- tasks and logs
    async def create_task(self, new: NewTask) -> Accepted:
        """Accepts a task. An ended task of the same owner, agent and id is renamed to ``{id}~1``, ``~2`` … (the next
        free number) in the same transaction. Moves the session's ``last_activity_at``.

        Raises: TaskExists (one that has not ended, with another fingerprint), IdempotencyMismatch, SessionNotFound,
        SessionMismatch (the session is another agent's).
        """

    async def find_idempotent(self, owner: str, idempotency: Idempotency, *, now: int) -> Accepted | None:
        """The ``replayed`` task if this unexpired key was used with the same body, ``None`` if it was not used.

        Raises: IdempotencyMismatch.
        """

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        """Commits all of them in one transaction (`executemany`); returns the keys that were refused, of which nothing
        is stored. At most one append per key in a call. Raises: RateLimited, and nothing is stored, when a webhook is
        one too many."""

    async def read_log(self, key: int, after: int, limit_bytes: int) -> list[Segment]:
        """Segments that hold chunks beyond ``after``, in order, at least one if there is any, then no more than fit
        into ``limit_bytes``. The first may begin before ``after + 1``."""

    async def get_task(self, owner: str, agent_id: str, task_id: str, *, now: int | None = None) -> TaskRow | None: ...

    async def get_task_by_key(self, key: int) -> TaskRow | None:
        """For the engine, which knows the key of what it runs: whosever it is, and also of an expired session."""

    async def list_tasks(
        self,
        owner: str,
        *,
        now: int | None = None,
        agent_id: str | None = None,
        session_id: str | None = None,
        status: str | None = None,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[TaskRow]:
        """Newest first. Raises InvalidRequest for a token that is not one of ours."""

    async def recent_tasks(
        self,
        owner: str,
        agent_id: str,
        *,
        now: int | None = None,
        session_id: str | None = None,
        states: Sequence[State] = (),
        since: int | None = None,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[TaskRow]:
        """Those whose status changed last come first. ``states``: only these, a status and its mark; ``since``: only
        those that came into their status then or later. Not those that were answered by a bare message. Raises
        InvalidRequest for a token that is not one of ours."""

    async def task_messages(self, key: int, *, limit: int, limit_bytes: int = PAGE_BYTES) -> list[MessageRow]:
        """The last ``limit`` lines that a task added to its session's conversation, with their originals, or as many
        of them as have no more than ``limit_bytes`` together, but the newest in any case; oldest first."""

    async def delete_task(self, owner: str, agent_id: str, task_id: str) -> None:
        """Removes an ended task and its log: for everybody at once, from the disk by and by. Raises TaskNotFound,
        TaskRunning."""

    async def set_policy(self, key: int, policy: str) -> None:
        """Changes what happens to an unfinished task when its viewers leave. Of a task that has ended, or is gone: does
        nothing."""

    async def take_over(self, instance: str) -> list[TaskRow]:
        """Makes every task that has not ended and belongs to a dead instance ``instance``'s; returns all of them in
        order of acceptance. (A store used by one process alone: every other instance is dead.)"""

    # --- webhooks: they go with their task
    async def put_push(self, new: NewPush) -> None:
        """Raises: TaskNotFound, RateLimited when the task has ``limit`` others."""

    async def list_pushes(self, key: int) -> list[Push]:
        """A task's webhooks by their ids; of a task that is gone: none."""

    async def delete_push(self, key: int, config_id: str) -> None:
        """Idempotent."""

    async def move_pushes(self, moves: Sequence[PushMove]) -> frozenset[tuple[int, str]]:
        """Keeps how far each has been told; returns the tasks and ids of those that are gone. Each comes once."""

    async def take_over_pushes(self, instance: str) -> list[Push]:
        """As ``take_over``: makes every webhook that is not over, and is a dead instance's, ``instance``'s; returns
        all of them in the order of their tasks."""

    # --- sessions
    async def create_session(self, row: SessionRow, *, limit: int) -> None:
        """Raises SessionExists, or RateLimited when the owner has ``limit`` unexpired sessions already."""

    async def get_session(self, owner: str, session_id: str, *, now: int) -> SessionRow | None: ...

    async def list_sessions(
        self,
        owner: str,
        *,
        now: int,
        agent_id: str | None = None,
        metadata: dict[str, str] | None = None,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[SessionRow]:
        """Newest first; ``metadata`` compares top-level values by their text (strings as such, others as JSON)."""

    async def update_session(
        self,
        owner: str,
        session_id: str,
        *,
        now: int,
        state: Any = None,
        metadata: Any = None,
        if_match: str | None = None,
        limit_bytes: int = SESSION_BYTES,
    ) -> SessionRow:
        """Applies RFC 7396 merge patches (``None``: none) and moves ``last_activity_at``. ``if_match`` is compared with
        the ETag of the row as it is before; ``limit_bytes`` bounds state and metadata together, as JSON. Raises
        SessionNotFound, PreconditionFailed, InvalidRequest, PayloadTooLarge."""

    async def delete_session(self, owner: str, session_id: str) -> None:
        """Removes it with its tasks, logs and messages: for everybody at once, from the disk by and by. Raises
        SessionNotFound."""

    async def list_messages(
        self,
        owner: str,
        session_id: str,
        *,
        now: int,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[MessageRow]:
        """Oldest first. Raises SessionNotFound."""

    async def history(
        self, owner: str, session_id: str, *, limit: int, limit_bytes: int = HISTORY_BYTES
    ) -> list[MessageRow]:
        """The last ``limit`` messages, or as many of them as have no more than ``limit_bytes`` together (content, as
        JSON), but the newest in any case; oldest first. Costs no more when the conversation is longer."""

    # --- housekeeping
    async def sweep(
        self, *, now: int, tasks_ended_before: int, limit: int, logs_ended_before: int | None = None
    ) -> int:
        """Removes up to ``limit`` of: ended tasks without a session that ended before the given time, expired sessions
        none of whose tasks is unfinished, expired idempotency keys; and of the logs of tasks that ended before
        ``logs_ended_before`` (``None``: none), whether in a session or not, everything but the segment with the final
        chunk. Returns how many tasks, sessions, keys and logs that was (less than ``limit``: nothing is left).

        However long a log is, nobody waits for it: its segments, those of deleted tasks too, go in many short
        transactions. A cancel leaves what remains to the next sweep."""

    async def check(self) -> None:
        """A write that changes nothing; raises StoreUnavailable when writes are refused."""

    def statistics(self) -> StoreStatistics: ...
