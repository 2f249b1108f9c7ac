"""How long this client waits, how much it takes, and how often it tries."""

from __future__ import annotations

from typing import Final

CONNECT_LIMIT: Final = 10.0
"""Seconds that connecting, and each handshake, may take."""

ANSWER_LIMIT: Final = 60.0
"""Seconds without a byte of an answer, except for one that waits for the end of a task."""

CLOSE_LIMIT: Final = 2.0
"""Seconds that leaving a stream may take: to cancel the task, and for the server's Close frame."""

SILENCE: Final = 20.0
"""Seconds without a byte after which a stream's connection counts as lost. Half-way the server is asked for a sign."""

RECONNECT_LIMIT: Final = 60.0
"""Seconds that a stream tries to mend its connection, unless the client is told otherwise."""

FIRST_TRIES: Final = 3
"""Times that the first connection of a stream is tried: so often one that breaks off may be bad luck."""

FIRST_DELAY: Final = 0.1
"""Seconds, about, before a lost connection is made again; each further time twice as many."""

MAX_DELAY: Final = 5.0
"""Seconds between two tries at most."""

RETRY_HELD: Final = 10.0
"""Seconds that a connection has to hold, once the server follows on it, to count as mended though no chunk came."""

GRACE: Final = 30.0
"""Seconds that the server is asked to wait for a stream whose connection is lost."""

WINDOW: Final = 256
"""Chunks of a stream that wait here for a reader that is busy; the others wait in the task's log on the server."""

MAX_MESSAGE: Final = 16 << 20
"""Bytes of one chunk as JSON."""

PAGE_SIZE: Final = 100
