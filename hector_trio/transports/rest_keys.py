"""The route of the key that signs agent cards (A2A 8.4.2, ``jku``): public, like the cards."""

from __future__ import annotations

from typing import Any, Final

from hector_trio.errors import NotFound
from hector_trio.models import encode
from hector_trio.transports.routes import Answer, Call, Reply, Route

KEYS_PATH: Final = "/.well-known/jwks.json"

MAX_AGE: Final = 300
"""Seconds that a client may keep the keys."""


async def get_keys(call: Call) -> Reply:
    signer = call.services.signer
    if signer is None:
        raise NotFound("This server signs no cards")
    return Reply(body=encode(signer.key_set), headers={"Cache-Control": f"public, max-age={MAX_AGE}"})


KEY_ROUTES: Final = (
    Route(
        "GET",
        KEYS_PATH,
        "getKeys",
        "The public keys under the signatures of agent cards (RFC 7517)",
        get_keys,
        {200: Answer("A JSON Web Key Set", dict[str, Any])},
        right=None,
    ),
)
