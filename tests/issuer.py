"""An issuer of JSON Web Tokens for tests: its keys, the tokens they sign, and its key set on a loopback address."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from hector_trio.config import Jwt
from hector_trio.jwks import Jwks, open_jwks
from tests.fake_model import FakeModel, sends, serve_fake_model

ISSUER = "https://login.example.com"
AUDIENCE = "hector"
RSA = rsa.generate_private_key(65537, 2048)
"""Takes a second to make, so there is one."""


class Signer:
    """A private key, and its public half as it stands in a key set."""

    def __init__(self, kid: str | None, algorithm: str = "EdDSA", key: Any = None, **jwk: Any) -> None:
        self.kid = kid
        self.algorithm = algorithm
        curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1()}
        if key is None and algorithm in curves:
            key = ec.generate_private_key(curves[algorithm])
        elif key is None:
            key = ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else RSA
        self.private = key
        made = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
        made.pop("key_ops", None)
        self.jwk = {**made, "use": "sig", **({} if kid is None else {"kid": kid}), **jwk}

    def sign(self, *, algorithm: str | None = None, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token of ``alice`` for an hour; ``claims`` replace what it says, ``None`` leaves one out."""
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 3600, **claims}
        kid = {} if self.kid is None else {"kid": self.kid}
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(said, self.private, algorithm or self.algorithm, headers={**kid, **(headers or {})})


def key_set(*signers: Signer, extra: tuple[Any, ...] = ()) -> bytes:
    return json.dumps({"keys": [*(signer.jwk for signer in signers), *extra]}).encode()


class Issuer:
    """A key set at ``url``, served as the test says; ``fake`` counts the requests."""

    def __init__(self, fake: FakeModel) -> None:
        self.fake = fake
        self.url = f"http://127.0.0.1:{fake.port}/jwks.json"

    def publish(self, *signers: Signer, extra: tuple[Any, ...] = ()) -> None:
        self.fake.default = sends(key_set(*signers, extra=extra), "application/json")

    def settings(self, **keys: Any) -> Jwt:
        return msgspec.structs.replace(
            Jwt(issuer=ISSUER, audience=[AUDIENCE], jwks_url=self.url, algorithms=["RS256", "ES256", "EdDSA"]), **keys
        )


@asynccontextmanager
async def issuing(*signers: Signer) -> AsyncIterator[Issuer]:
    async with trio.open_nursery() as nursery:
        issuer = Issuer(await serve_fake_model(nursery))
        issuer.publish(*signers)
        yield issuer
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def believing(settings: Jwt, *, pause: float = 60.0) -> AsyncIterator[Jwks]:
    """What accepts the issuer's tokens, with its refreshing task."""
    async with open_jwks(settings, pause=pause) as jwks, trio.open_nursery() as nursery:
        nursery.start_soon(jwks.refresh_for_ever)
        yield jwks
        nursery.cancel_scope.cancel()
