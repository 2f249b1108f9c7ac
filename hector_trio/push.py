"""Push notifications: for each webhook a follower of its task's log that POSTs, in nobody's way.

Events come in the order of the log, one after the other, each at least once; what is said while a webhook is slow comes
joined. How far a webhook has been told is kept, so that the next start goes on there. An event is tried
``push.attempts`` times, then given up, and what follows gets one attempt each, until the webhook takes something; what
settles a task (its end, a question) gets all attempts in any case. 410 (Gone) ends it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Final, Literal, Protocol

import structlog
import trio
from msgspec import Struct

from hector_trio.a2a.types import MEDIA_TYPE, VERSION
from hector_trio.config import PushSettings
from hector_trio.engine import Engine
from hector_trio.errors import Gone, HectorError, RateLimited
from hector_trio.log import now_ms
from hector_trio.reach import Reach, Webhook, parse
from hector_trio.sealing import Seal
from hector_trio.stores import NewPush, Push, PushDialect, PushMove
from hector_trio.task import TaskRow
from hector_trio.updates import Update, Updates
from hector_trio.waiting import backoff
from hector_trio.wakeup import Wakeup

if TYPE_CHECKING:
    import ssl

    from hector_trio.webhook import Answer, Resolve, Webhooks

SAVE_INTERVAL: Final = 0.25
"""Seconds for which positions are collected before they are stored."""

SAVE_BATCH: Final = 64
"""Positions that go into one commit: chunks of others wait for it."""

SAVE_LIMIT: Final = 2.0
"""Seconds that the last positions may take."""

LOOK_AGAIN: Final = 1.0
"""Seconds until a log is read again that could not be read."""

GONE: Final = 410

Result = Literal["delivered", "failed", "given_up", "gone"]

log = structlog.stdlib.get_logger("hector_trio.push")


class Observer(Protocol):
    """What is told about requests to webhooks, for metrics."""

    def pushed(self, result: Result, seconds: float) -> None: ...


class Wish(Struct, frozen=True):
    """What a client says about a webhook."""

    url: str
    config_id: str | None = None
    """Left out: the task's id."""
    token: str | None = None
    scheme: str | None = None
    credentials: str | None = None
    dialect: PushDialect = "1.0"

    def __repr__(self) -> str:
        """Without what is secret."""
        return f"Wish(config_id={self.config_id!r})"


class Pusher:
    """See the module. Made by ``open_push``."""

    def __init__(
        self,
        engine: Engine,
        settings: PushSettings,
        nursery: trio.Nursery,
        observer: Observer | None = None,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self._engine = engine
        self._store = engine.store
        self._settings = settings
        self._seal = Seal(settings.encryption_keys)
        self._tls = tls
        self._resolve = resolve
        self._made: Webhooks | None = None
        self._making = trio.Lock()
        self._nursery = nursery
        self._observer = observer
        self._lanes = _Lanes(settings.concurrent, settings.per_host)
        self._open: dict[tuple[int, str], _Delivery] = {}
        self._adding = 0
        self._moves: dict[_Delivery, PushMove] = {}
        self._moved = Wakeup()

    @property
    def open(self) -> int:
        """Webhooks that have not been told everything."""
        return len(self._open)

    # --- what clients ask for

    async def check(self, url: str) -> None:
        """Raises: ValueError, NotReachable (``reach``) for an address that is not called; RateLimited."""
        self._check_room()
        webhook = parse(url)
        await (await self._webhooks()).check(webhook)

    async def _webhooks(self) -> Webhooks:
        """Made for the first webhook there is, in a thread: importing an HTTP client takes a tenth of a second."""
        async with self._making:
            if self._made is None:
                made = await trio.to_thread.run_sync(import_module, "hector_trio.webhook")
                settings = self._settings
                reach = Reach(settings.allow, loopback=settings.allow_loopback)
                self._made = made.Webhooks(reach, settings.timeout, tls=self._tls, resolve=self._resolve)
        return self._made

    def _check_room(self) -> None:
        if len(self._open) + self._adding >= self._settings.webhooks:
            raise RateLimited(f"{self._settings.webhooks} webhooks are being told already", retry_after=60)

    async def add(self, row: TaskRow, wish: Wish, *, after: int | None = None) -> Push:
        """Keeps a webhook of a task and begins to tell it what comes, or (``after``) what has come after that chunk.

        One in the place of another goes on where that was. Of a task that has ended, the end is told.
        Raises: TaskNotFound, RateLimited, StoreUnavailable; ValueError for a URL that ``check`` refuses.
        """
        with self.room((row.key, wish.config_id or row.task_id)):
            new, known = await self._next(row, wish, after)
            await self._store.put_push(new)
        self.begin(new.push, quiet=not known and after is None)
        return self._seal.opened(new.push)

    @contextmanager
    def room(self, name: tuple[int, str] | None = None) -> Iterator[None]:
        """Keeps a place for a webhook while it is being stored; the one of that ``name`` has its place already. Raises:
        RateLimited."""
        if name not in self._open:
            self._check_room()
        self._adding += 1
        try:
            yield
        finally:
            self._adding -= 1

    def first(self, task_id: str, wish: Wish) -> Push:
        """A webhook of a task that is to be accepted with it, under that id, as it is stored: it is told everything."""
        return self._push(0, wish.config_id or task_id, wish, 0)

    async def next(self, row: TaskRow, wish: Wish) -> NewPush:
        """A webhook of a task that is to be stored with something that happens to it, as it is stored: it is told what
        comes then, or goes on where the one in whose place it comes was. Raises: StoreUnavailable."""
        new, _ = await self._next(row, wish, row.last_seq)
        return new

    async def _next(self, row: TaskRow, wish: Wish, after: int | None) -> tuple[NewPush, bool]:
        """The webhook, and whether there was one in its place."""
        config_id = wish.config_id or row.task_id
        before = await self._store.list_pushes(row.key)
        known = next((each.seq for each in before if each.config_id == config_id), None)
        push = self._push(row.key, config_id, wish, self._position(row, after) if known is None else known)
        self._drop_moves((row.key, config_id))  # of one that is over: they would end this one
        return NewPush(push, self._settings.per_task), known is not None

    def _push(self, key: int, config_id: str, wish: Wish, seq: int) -> Push:
        push = Push(
            key,
            config_id,
            wish.url,
            now_ms(),
            self._engine.instance,
            seq,
            wish.token,
            wish.scheme,
            wish.credentials,
            dialect=wish.dialect,
        )
        return self._seal.closed(push)

    def begin(self, push: Push, *, quiet: bool = False) -> None:
        """Tells a webhook that was stored. To be called without an await after that, so that no cancel comes between.

        ``quiet``: it knows already that the task is at work.
        """
        push = self._seal.opened(push)
        old = self._forget((push.key, push.config_id))
        seq = push.seq if old is None else max(push.seq, old.seq)
        self._start(_Delivery(push, parse(push.url), seq, quiet=quiet))

    def _position(self, row: TaskRow, after: int | None) -> int:
        if after is not None:
            return after
        last = self._engine.last_seq(row)
        return last - 1 if row.ended and last else last

    async def list(self, row: TaskRow) -> list[Push]:
        """The webhooks of a task by their ids, without those that are encrypted under no key of ours."""
        found = []
        for push in await self._store.list_pushes(row.key):
            with suppress(ValueError):
                found.append(self._seal.opened(push))
        return found

    async def remove(self, row: TaskRow, config_id: str) -> None:
        """Idempotent. Nothing is sent any more when it returns."""
        await self._store.delete_push(row.key, config_id)
        self._forget((row.key, config_id))

    def _forget(self, name: tuple[int, str]) -> _Delivery | None:
        self._drop_moves(name)
        delivery = self._open.pop(name, None)
        if delivery is not None:
            delivery.scope.cancel()
        return delivery

    def _drop_moves(self, name: tuple[int, str]) -> None:
        for delivery in [each for each in self._moves if each.name == name]:
            del self._moves[delivery]

    # --- one webhook

    async def recover(self) -> None:
        """Goes on where the last start of the server, or a dead instance, was."""
        for push in await self._store.take_over_pushes(self._engine.instance):
            try:
                opened = self._seal.opened(push)
                webhook = parse(opened.url)
            except ValueError as error:  # another version was less strict, or had another key
                log.warning("push_ended", because=str(error), config_id=push.config_id)
            else:
                self._start(_Delivery(opened, webhook, push.seq))

    def _start(self, delivery: _Delivery) -> None:
        self._open[delivery.name] = delivery
        self._nursery.start_soon(self._deliver, delivery, name=f"push {delivery.push.config_id}")

    async def _deliver(self, delivery: _Delivery) -> None:
        structlog.contextvars.clear_contextvars()  # it outlives the request that has named the webhook
        with delivery.scope:
            try:
                if await self._tell_all(delivery):
                    self._move(delivery, delivery.seq, over_at=now_ms())
            except Exception:
                log.exception("push_failed", config_id=delivery.push.config_id)  # others go on
        if self._open.get(delivery.name) is delivery:
            del self._open[delivery.name]

    async def _tell_all(self, delivery: _Delivery) -> bool:
        """Returns when there is nothing more to tell: whether that is to be kept."""
        updates: Updates | None = None
        while True:
            try:
                if updates is None:
                    row = await self._store.get_task_by_key(delivery.push.key)
                    if row is None:
                        return False
                    if row.ended and delivery.seq >= row.last_seq:
                        return True
                    updates = Updates(self._engine, row, delivery.push.dialect)
                    await updates.catch_up(delivery.seq, quiet=delivery.quiet)
                    delivery.quiet = False
                batch = await updates.read()
            except Gone:
                return True
            except HectorError:
                updates = None
                await self._wait_for_log()
                continue
            for update in batch:
                if update.body is not None and not await self._tell(delivery, updates.row.task_id, update):
                    return True
                self._move(delivery, update.seq)
            if not batch or updates.ended:
                return True
            await trio.sleep(self._settings.interval)  # who says much says it in fewer requests

    async def _wait_for_log(self) -> None:
        if self._engine.draining:
            await trio.sleep_forever()  # the next start goes on
        await trio.sleep(LOOK_AGAIN)

    async def _tell(self, delivery: _Delivery, task_id: str, update: Update) -> bool:
        """Delivers one update or gives it up; ``False``: the webhook wants no more."""
        assert update.body is not None
        attempts = self._settings.attempts if delivery.patient or update.settles else 1
        tries = 0
        while True:
            answer, seconds = await self._post(delivery, update.body)
            tries += 1
            if answer.delivered:
                delivery.patient = True
                self._observe("delivered", seconds)
                return True
            ids = {"task_id": task_id, "config_id": delivery.push.config_id, "webhook": delivery.webhook.origin}
            if answer.status == GONE:
                self._observe("gone", seconds)
                log.info("push_ended", because="the webhook says that it is gone", **ids)
                return False
            if tries >= attempts:
                self._observe("given_up", seconds)
                log.warning("push_given_up", because=answer.reason, attempts=tries, **ids)
                delivery.patient = False
                return True
            self._observe("failed", seconds)
            say = log.info if tries == 1 else log.debug
            say("push_attempt_failed", because=answer.reason, attempt=tries, **ids)
            self._move(delivery, delivery.seq)  # finds out whether the task is still there
            wait = backoff(tries, self._settings.backoff, self._settings.max_backoff, answer.retry_after)
            await trio.sleep(wait)

    async def _post(self, delivery: _Delivery, body: bytes) -> tuple[Answer, float]:
        async with self._lanes.place(delivery.webhook.host):
            webhooks = await self._webhooks()
            began = trio.current_time()
            answer = await webhooks.post(delivery.webhook, delivery.headers(), body)
            return answer, trio.current_time() - began

    def _observe(self, result: Result, seconds: float) -> None:
        if self._observer is not None:
            self._observer.pushed(result, seconds)

    # --- positions

    def _move(self, delivery: _Delivery, seq: int, *, over_at: int | None = None) -> None:
        if self._open.get(delivery.name) is not delivery:
            return  # another is in its place
        delivery.seq = seq
        key, config_id = delivery.name
        self._moves[delivery] = PushMove(key, config_id, seq, over_at)
        self._moved.wake()

    async def save_for_ever(self) -> None:
        refused = False
        while True:
            await self._moved.wait()
            await trio.sleep(SAVE_INTERVAL)
            try:
                await self.save()
                refused = False
            except HectorError as error:
                if not refused:  # told once, however often it is tried again
                    log.warning("push_positions_not_stored", detail=error.detail)
                refused = True
                self._moved.wake()

    async def save(self) -> None:
        """Stores how far the webhooks have been told, and stops telling those that are gone with their tasks. Cancelled
        or failed: what was not stored is at the next time. Raises: StoreUnavailable."""
        moves = list(self._moves.items())
        for start in range(0, len(moves), SAVE_BATCH):
            some = moves[start : start + SAVE_BATCH]
            gone = await self._store.move_pushes([move for _, move in some])
            for delivery, move in some:
                if self._moves.get(delivery) is move:  # else it has moved on meanwhile
                    del self._moves[delivery]
                if delivery.name in gone:
                    delivery.scope.cancel()


class _Delivery:
    """A webhook that is being told."""

    def __init__(self, push: Push, webhook: Webhook, seq: int, *, quiet: bool = False) -> None:
        self.push = push
        self.webhook = webhook
        self.name = (push.key, push.config_id)
        self.seq = seq
        """The last chunk that was delivered or given up."""
        self.quiet = quiet
        """Whether it knows already that the task is at work."""
        self.patient = True
        """Whether the last event was taken, or nothing was tried yet."""
        self.scope = trio.CancelScope()

    def headers(self) -> Iterator[tuple[str, str]]:
        push = self.push
        yield "Content-Type", MEDIA_TYPE if push.dialect == VERSION else "application/json"
        yield "User-Agent", "hector_trio"
        yield "A2A-Version", push.dialect
        if push.scheme is not None and push.credentials is not None:
            yield "Authorization", f"{push.scheme} {push.credentials}"
        if push.token is not None:
            yield "X-A2A-Notification-Token", push.token


class _Lanes:
    """So many requests at once, in all and to one host."""

    def __init__(self, most: int, per_host: int) -> None:
        self._all = trio.Semaphore(most)
        self._per_host = per_host
        self._hosts: dict[str, _Lane] = {}

    @asynccontextmanager
    async def place(self, host: str) -> AsyncIterator[None]:
        lane = self._hosts.get(host)
        if lane is None:
            lane = self._hosts[host] = _Lane(self._per_host)
        lane.users += 1
        try:
            async with lane.places, self._all:
                yield
        finally:
            lane.users -= 1
            if not lane.users:
                del self._hosts[host]


class _Lane:
    def __init__(self, places: int) -> None:
        self.places = trio.Semaphore(places)
        self.users = 0


@asynccontextmanager
async def open_push(
    engine: Engine,
    settings: PushSettings,
    *,
    observer: Observer | None = None,
    tls: ssl.SSLContext | None = None,
    resolve: Resolve | None = None,
) -> AsyncIterator[Pusher]:
    """Push notifications, recovered and running. ``tls``, ``resolve``: see ``Webhooks``. Leaving stops all requests;
    what was not delivered is at the next start. Raises: StoreUnavailable."""
    async with trio.open_nursery() as nursery:
        pusher = Pusher(engine, settings, nursery, observer, tls, resolve)
        await pusher.recover()
        nursery.start_soon(pusher.save_for_ever, name="push positions")
        try:
            yield pusher
        finally:
            nursery.cancel_scope.cancel()
            with (
                trio.move_on_after(SAVE_LIMIT, shield=True),
                suppress(HectorError),
            ):  # then the next start tells more again
                await pusher.save()
