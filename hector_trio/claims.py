"""What a JSON Web Token (RFC 7519) must claim to be believed, and whose it then is: pure, given the issuer's keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jwt
import msgspec

from hector_trio.auth import Principal, Role
from hector_trio.config import Jwt
from hector_trio.errors import InvalidToken

MAX_TOKEN: Final = 16 * 1024
"""Characters of the longest token that is looked at."""

MAX_KEYS: Final = 256
"""Keys of the issuer that are kept."""

MIN_RSA_BITS: Final = 2048
"""RFC 7518, 3.3."""

NOT_ACCEPTED: Final = "The token is not accepted"
EXPIRED: Final = "The token has expired"

_FAMILIES: Final[dict[str, tuple[str, str | None]]] = {
    **{f"{kind}{bits}": ("RSA", None) for kind in ("RS", "PS") for bits in (256, 384, 512)},
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
"""The kind of key, and its curve, that each algorithm takes (RFC 7518, 3.1; RFC 8037, 3.1)."""

_ROLES: Final[tuple[Role, ...]] = ("admin", "user", "viewer")


class Key(NamedTuple):
    """One public key of the issuer and what it may be used for."""

    kid: str | None
    algorithms: frozenset[str]
    public: Any


class Wanted(NamedTuple):
    """The key that a token says it was signed with; nothing of it is proven."""

    kid: str | None
    algorithm: str


def read_keys(data: bytes) -> tuple[Key, ...]:
    """The usable keys of a JSON Web Key Set (RFC 7517, 5): those for signatures, public, strong enough.

    What is not understood is passed over, as the RFC asks. Raises ValueError where no usable key is left.
    """
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    found = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise ValueError("it is not a JSON Web Key Set: it has no list of keys")
    keys = [key for key in map(_read_key, found[:MAX_KEYS]) if key is not None]
    if not keys:
        raise ValueError(f"none of its {len(found)} keys is a public key for signatures that could be used")
    return tuple(keys)


def _read_key(jwk: Any) -> Key | None:
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return None
    operations, kid = jwk.get("key_ops", ["verify"]), jwk.get("kid")
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return None
    kty, crv = jwk.get("kty"), jwk.get("crv")
    fitting = {name for name, (kind, curve) in _FAMILIES.items() if kind == kty and curve in (None, crv)}
    if "alg" in jwk:
        fitting = {name for name in fitting if name == jwk["alg"]}
    if not fitting or "d" in jwk:
        return None  # what a private key has signed that everybody can read, anybody may have signed
    try:
        public = jwt.PyJWK(jwk, min(fitting)).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    weak = kty == "RSA" and public.key_size < MIN_RSA_BITS
    return None if weak else Key(kid, frozenset(fitting), public)


def find_key(keys: Sequence[Key], wanted: Wanted) -> Key | None:
    """The key with the token's ``kid``; for a token without one, the only key that its algorithm could take."""
    fitting = [key for key in keys if wanted.algorithm in key.algorithms]
    if wanted.kid is None:
        return fitting[0] if len(fitting) == 1 else None
    return next((key for key in fitting if key.kid == wanted.kid), None)


class Reader:
    """Reads tokens by the rules of the settings."""

    def __init__(self, settings: Jwt) -> None:
        self._settings = settings
        self._allowed = frozenset(settings.algorithms) & _FAMILIES.keys()

    def wanted(self, token: str) -> Wanted:
        """Which key would prove the token. Raises: InvalidToken where none could."""
        if len(token) > MAX_TOKEN or not token.isascii() or token.count(".") != 2:
            raise InvalidToken(NOT_ACCEPTED)
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise InvalidToken(NOT_ACCEPTED) from None
        algorithm, kid = header.get("alg"), header.get("kid")
        # Nothing that could be called critical is understood here (RFC 7515, 4.1.11).
        if not isinstance(algorithm, str) or not isinstance(kid, str | None) or "crit" in header:
            raise InvalidToken(NOT_ACCEPTED)
        if algorithm not in self._allowed:
            raise InvalidToken(NOT_ACCEPTED)
        return Wanted(kid, algorithm)

    def holder(self, token: str, wanted: Wanted, key: Key) -> Principal:
        """Whose token it is. Raises: InvalidToken, saying more than that only where the signature was right."""
        try:
            claims = jwt.decode(
                token,
                key.public,
                algorithms=[wanted.algorithm],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=self._settings.leeway,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise InvalidToken(EXPIRED) from None
        except jwt.ImmatureSignatureError:
            raise InvalidToken("The token is not valid yet") from None
        except jwt.InvalidIssuerError:
            raise InvalidToken("The token was issued by somebody else") from None
        except jwt.InvalidAudienceError:
            raise InvalidToken("The token is meant for somebody else") from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidToken(f"The token has no claim {error.claim}") from None
        except jwt.PyJWTError:
            raise InvalidToken(NOT_ACCEPTED) from None
        owner = _claim(claims, self._settings.owner_claim)
        if (
            not isinstance(owner, str)
            or not 1 <= len(owner) <= 128
            or not owner.isprintable()
            or owner != owner.strip()
        ):
            raise InvalidToken("The token names no owner")
        return Principal(owner, owner, self._role(claims), int(claims["exp"]) + self._settings.leeway)

    def _role(self, claims: dict[str, Any]) -> Role:
        name = self._settings.role_claim
        said = None if name is None else _claim(claims, name)
        if isinstance(said, str):
            said = said.split()
        if isinstance(said, list):
            for role in _ROLES:
                if role in said:
                    return role
        return self._settings.role


def _claim(claims: dict[str, Any], name: str) -> Any:
    """A claim by its name, or by the way to it through objects."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
