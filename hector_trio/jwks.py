"""The keys that prove an issuer's tokens: fetched ahead, shared by all who wait, kept while the issuer is away.

One task fetches, whoever needs keys waits for it: so there is never more than one request to the issuer, a caller who
leaves takes nothing with him, and tokens with made-up keys cost the issuer one request in ``PAUSE`` seconds.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from hashlib import sha256
from typing import Final

import httpx2
import structlog
import trio

from hector_trio.auth import Principal
from hector_trio.claims import EXPIRED, MAX_TOKEN, NOT_ACCEPTED, Key, Reader, Wanted, find_key, read_keys
from hector_trio.config import Jwt, is_loopback
from hector_trio.errors import HectorError, InvalidToken, KeysUnavailable
from hector_trio.outgoing import TooLarge, read_whole, send, trust

FETCH_LIMIT: Final = 5.0
"""Seconds that a fetch may take, and with it a caller who waits for its end."""

PAUSE: Final = 5.0
"""Seconds from the end of a fetch in which no token causes another."""

LONGEST_PAUSE: Final = 60.0
"""Seconds between attempts that nobody asked for, while they fail."""

MAX_DOCUMENT: Final = 1 << 20
"""Bytes of the largest key set."""

MAX_PROVEN: Final = 1024
"""Tokens whose proof is remembered: it costs more than everything else that a short request does."""

log = structlog.stdlib.get_logger("hector_trio.jwks")


@asynccontextmanager
async def open_jwks(settings: Jwt, *, pause: float = PAUSE) -> AsyncIterator[Jwks]:
    """Tokens of one issuer. Fetches nothing until ``refresh_for_ever`` is started beside it."""
    host = httpx2.URL(settings.jwks_url).host if settings.jwks_url is not None else "localhost"
    async with httpx2.AsyncClient(
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        trust_env=not is_loopback(host),
        timeout=FETCH_LIMIT,
        verify=trust(),
    ) as client:
        yield Jwks(settings, client, pause)


class Jwks:
    """The issuer (see ``auth.Issuer``) behind a key set. Made by ``open_jwks``."""

    def __init__(self, settings: Jwt, client: httpx2.AsyncClient, pause: float) -> None:
        self._settings = settings
        self._client = client
        self._pause = pause
        self._reader = Reader(settings)
        self._keys: tuple[Key, ...] = ()
        self._good_until = -math.inf
        self._fetching = True
        """Whether an attempt is under way, or, as at the start, certain to be."""
        self._attempts = 0
        self._failures = 0
        """Attempts since the last good one."""
        self._not_before = -math.inf
        self._demand = trio.Event()
        self._fetched = trio.lowlevel.ParkingLot()
        self._proven: dict[bytes, Principal] = {}

    async def holder(self, token: str) -> Principal:
        """Whose token it is. Waits, ``FETCH_LIMIT`` at most, only where its key is not known.

        Raises: InvalidToken; KeysUnavailable when nobody can say whose it is, because no keys could be fetched yet, for
        too long, or since a key appeared that is not among the old ones.
        """
        if len(token) > MAX_TOKEN:
            raise InvalidToken(NOT_ACCEPTED)
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._proven.get(digest)
        if known is not None and trio.current_time() < self._good_until:
            if known.seconds_left <= 0:
                raise InvalidToken(EXPIRED)
            return known
        wanted = self._reader.wanted(token)
        key = self._find(wanted) or await self._find_anew(wanted)
        holder = self._reader.holder(token, wanted, key)
        if len(self._proven) >= MAX_PROVEN:
            self._proven.clear()
        self._proven[digest] = holder
        return holder

    def _find(self, wanted: Wanted) -> Key | None:
        return find_key(self._keys, wanted) if trio.current_time() < self._good_until else None

    async def _find_anew(self, wanted: Wanted) -> Key:
        if not self._fetching:
            if trio.current_time() < self._not_before:
                raise self._missing()
            self._demand.set()
        before = self._attempts
        with trio.move_on_after(FETCH_LIMIT + 1):
            while self._attempts == before:
                await self._fetched.park()
        key = self._find(wanted)
        if key is None:
            raise self._missing()
        return key

    def _missing(self) -> HectorError:
        """Why there is no key: the issuer has none such, or cannot be asked."""
        if trio.current_time() < self._good_until and not self._failures:
            return InvalidToken(NOT_ACCEPTED)
        wait = max(1, math.ceil(self._not_before - trio.current_time()))
        return KeysUnavailable("The keys that prove tokens cannot be fetched at the moment", retry_after=wait)

    # --- fetching

    async def refresh_for_ever(self) -> None:
        """Fetches at once, then when the keys have grown old, when an attempt has failed, and when somebody asks."""
        while True:
            self._demand = trio.Event()
            self._fetching = True
            await self._refresh()
            self._fetching = False
            self._attempts += 1
            self._fetched.unpark_all()
            now = trio.current_time()
            self._not_before = now + self._pause
            backoff = min(self._pause * 2.0 ** min(self._failures, 16), LONGEST_PAUSE)
            with trio.move_on_at(now + (backoff if self._failures else self._settings.refresh)):
                await self._demand.wait()

    async def _refresh(self) -> None:
        try:
            with trio.fail_after(FETCH_LIMIT):
                keys = read_keys(await self._read())
        except (httpx2.HTTPError, trio.TooSlowError, OSError, TooLarge, ValueError) as error:
            self._failures += 1
            because = f"{type(error).__name__}: {error}".removeprefix("ValueError: ").removeprefix("TooLarge: ")
            left = max(0, round(self._good_until - trio.current_time())) if self._keys else 0
            log.warning("keys_not_fetched", source=self._source, because=because, old_ones_good_for=left)
            return
        if keys != self._keys:
            # Who has lost his key has lost his proof.
            self._proven.clear()
            log.info("keys_fetched", source=self._source, kids=[key.kid for key in keys])
        self._keys = keys
        self._failures = 0
        self._good_until = trio.current_time() + self._settings.keep

    @property
    def _source(self) -> str:
        return self._settings.jwks_url or self._settings.jwks_file or ""

    async def _read(self) -> bytes:
        if self._settings.jwks_url is None:
            return await trio.to_thread.run_sync(_read_file, self._source, abandon_on_cancel=True)
        response = await send(self._client, self._client.build_request("GET", self._source))
        async with aclosing(response):
            if response.status_code != 200:
                raise ValueError(f"it answered {response.status_code}")
            return await read_whole(response, MAX_DOCUMENT)


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise TooLarge(f"it is larger than {MAX_DOCUMENT} bytes")
    return data
