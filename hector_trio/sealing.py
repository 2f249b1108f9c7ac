"""What is secret of a webhook, as it is stored: encrypted under the operator's keys, where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from hector_trio.errors import ConfigError
from hector_trio.stores import Push

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

MARK: Final = "\x01"
"""How an encrypted value begins, as neither an address nor what a header can hold does."""


class Seal:
    """Encrypts under the first of the keys and decrypts under any (Fernet: AES-128-CBC, HMAC-SHA256). What was stored
    before there was a key is read as it is; without keys, nothing is encrypted."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Raises: ConfigError without ``cryptography``, or for what is no key."""
        self._keys: MultiFernet | None = None
        if keys:
            try:
                from cryptography.fernet import Fernet, MultiFernet
            except ImportError as error:
                raise ConfigError(f'push.encryption_keys needs {error.name}: pip install "hector_trio[jwt]"') from error
            try:
                self._keys = MultiFernet([Fernet(key) for key in keys])
            except ValueError:
                raise ConfigError("push.encryption_keys: a key is 32 bytes in base64, as Fernet makes them") from None

    def closed(self, push: Push) -> Push:
        """As it is stored."""
        url = self._closed(push.url)
        token = None if push.token is None else self._closed(push.token)
        credentials = None if push.credentials is None else self._closed(push.credentials)
        return replace(push, url=url, token=token, credentials=credentials)

    def opened(self, push: Push) -> Push:
        """As its client has named it. Raises: ValueError when it is encrypted under none of the keys."""
        url = self._opened(push.url)
        token = None if push.token is None else self._opened(push.token)
        credentials = None if push.credentials is None else self._opened(push.credentials)
        return replace(push, url=url, token=token, credentials=credentials)

    def _closed(self, text: str) -> str:
        return text if self._keys is None else MARK + self._keys.encrypt(text.encode()).decode()

    def _opened(self, text: str) -> str:
        if not text.startswith(MARK):
            return text
        if self._keys is not None:
            from cryptography.fernet import InvalidToken

            try:
                return self._keys.decrypt(text.removeprefix(MARK).encode()).decode()
            except InvalidToken:
                pass
        raise ValueError("It was stored under a key that is not among push.encryption_keys")
