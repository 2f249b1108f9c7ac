"""How long this client waits, and how much it takes."""

from __future__ import annotations

from typing import Final

CONNECT_LIMIT: Final = 10.0
"""Seconds that connecting, and each handshake, may take."""

ANSWER_LIMIT: Final = 60.0
"""Seconds without a byte of an answer, except for one that waits for the end of a task."""

CLOSE_LIMIT: Final = 2.0
"""Seconds that leaving a stream waits for the server's Close frame."""

UNREAD_CHUNKS: Final = 256
"""Chunks of a stream that wait here for a reader that is busy; beyond them the server waits, and at last hangs up."""

MAX_MESSAGE: Final = 16 << 20
"""Bytes of one chunk as JSON."""

PAGE_SIZE: Final = 100
