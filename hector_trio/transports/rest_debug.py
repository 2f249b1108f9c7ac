"""The route that shows the server's inside, which is there only if the configuration says so."""

from __future__ import annotations

from typing import Final

from hector_trio.config import is_loopback
from hector_trio.errors import Forbidden, InvalidRequest
from hector_trio.models import LiveTree
from hector_trio.transports.requests import count
from hector_trio.transports.routes import Answer, Call, Query, Reply, Route, json_reply
from hector_trio.tree import LIMIT, MAX_NODES


async def debug_tree(call: Call) -> Reply:
    """For admins; without tokens everybody is one, so that only this machine may ask."""
    services = call.services
    if not services.authenticator.required and call.client is not None and not is_loopback(call.client):
        raise Forbidden("Without tokens the live tree is shown to this machine only")
    assert services.watch is not None
    limit = count(call.query, "limit", LIMIT, MAX_NODES)
    return json_reply(await services.watch.tree(services.engine, limit))


DEBUG_ROUTES: Final = (
    Route(
        "GET",
        "/debug/tree",
        "debugTree",
        "The live tree of tasks: connection, stream, run, model call",
        debug_tree,
        {200: Answer("The tree", LiveTree)},
        right="debug",
        query=(
            Query(
                "limit",
                {"type": "integer", "minimum": 1, "maximum": MAX_NODES, "default": LIMIT},
                "How many children of one kind are shown below one node, the oldest first",
            ),
        ),
        refusals=(InvalidRequest,),
    ),
)
