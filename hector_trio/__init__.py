"""What users import: ``Hector``, ``Context``, ``Client``, the chunk types, the errors an agent raises, the version."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hector_trio.a2a.types import Part
    from hector_trio.agents import Context
    from hector_trio.agents.function import SyncContext
    from hector_trio.client import Client
    from hector_trio.errors import HectorError, RunError
    from hector_trio.hector import Hector
    from hector_trio.models import Chunk, Content, Message, Session, Task
    from hector_trio.uploads import UploadedFile

__all__ = [
    "Chunk",
    "Client",
    "Content",
    "Context",
    "Hector",
    "HectorError",
    "Message",
    "Part",
    "RunError",
    "Session",
    "SyncContext",
    "Task",
    "UploadedFile",
    "__version__",
]

_HOMES = {
    "Chunk": "models",
    "Client": "client",
    "Content": "models",
    "Context": "agents",
    "Hector": "hector",
    "HectorError": "errors",
    "Message": "models",
    "Part": "a2a.types",
    "RunError": "errors",
    "Session": "models",
    "SyncContext": "agents.function",
    "Task": "models",
    "UploadedFile": "uploads",
}


def __getattr__(name: str) -> Any:
    """Imported when first used: ``hector --help`` and clients do not pay for the server."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
