"""What every transport is given: the engine and the settings it serves, chosen and opened by ``server``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from hector_trio.engine import Engine
from hector_trio.push import Pusher
from hector_trio.uploads import Uploads

if TYPE_CHECKING:
    from hector_trio.a2a.signing import CardSigner
    from hector_trio.auth import Authenticator
    from hector_trio.config import Settings
    from hector_trio.observability import Metrics
    from hector_trio.tree import TreeWatch


class Services(Struct, frozen=True):
    engine: Engine
    uploads: Uploads
    settings: Settings
    authenticator: Authenticator
    metrics: Metrics
    loopback: bool
    """Whether every address that the server listens on is a loopback one."""
    watch: TreeWatch | None = None
    """What knows the live tree; ``None``: it is not enabled."""
    push: Pusher | None = None
    """What tells webhooks; ``None``: it is not enabled."""
    signer: CardSigner | None = None
    """What signs agent cards; ``None``: no key is configured."""
