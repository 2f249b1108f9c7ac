"""Hypercorn's connection classes, subclassed so that no connection can end, freeze or exhaust the process.

The only room that knows Hypercorn's internals (`http2`, the other protocol of a connection, knows its events). How it
works:

- Everything that *decides* here is synchronous: bytes are written at once or queued, states change, and only then does
  the sender wait (`Connection.pace`). A cancel can therefore never split a clean-up or a frame.
- One queue of unsent bytes per connection, and one task that empties it, which exists only for a connection whose
  socket has once been full. Whoever is cancelled while waiting leaves the bytes in the queue, in order.
- One number per connection, `deadline`, and one task per server that looks at all of them, instead of a timer each.
- The reader never waits for the application: what it has read goes to an `Inbox` with a limit.
"""

from hector_trio.connection.bounds import LOGGER, ConnectionLimits, Inbox, contain
from hector_trio.connection.h1 import BODY_AHEAD
from hector_trio.connection.server import ConnectionStatistics, shutdown_begun, statistics
from hector_trio.connection.serving import install, serve
from hector_trio.connection.socket import tune_listener

__all__ = [
    "BODY_AHEAD",
    "LOGGER",
    "ConnectionLimits",
    "ConnectionStatistics",
    "Inbox",
    "contain",
    "install",
    "serve",
    "shutdown_begun",
    "statistics",
    "tune_listener",
]
