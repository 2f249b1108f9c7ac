"""Signed agent cards (specification 8.4): canonical JSON (RFC 8785) under a JSON Web Signature (RFC 7515). Pure."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, SECP521R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hector_trio.a2a.types import AgentCard

MAX_INTEGER: Final = 2**53 - 1
"""Beyond it an integer is not the same in every program that reads JSON (RFC 8785, 3.2.2.3)."""

MAX_MADE: Final = 1024
"""Signatures that are remembered."""

_CURVES: Final[dict[type[Any], str]] = {SECP256R1: "ES256", SECP384R1: "ES384", SECP521R1: "ES512"}
_THUMBPRINT: Final = {"EC": ("crv", "kty", "x", "y"), "OKP": ("crv", "kty", "x"), "RSA": ("e", "kty", "n")}


class CardSigner:
    """Signs agent cards with one private key. ``kid`` is the key's thumbprint (RFC 7638): another key has another."""

    def __init__(self, pem: bytes, jku: str) -> None:
        """``pem``: an unencrypted private key, on P-256, P-384, P-521, of Ed25519, or of RSA with 2048 bits or more;
        ``jku``: the address where clients find ``key_set``. Raises: ValueError, with the reason.
        """
        try:
            self._key: Any = load_pem_private_key(pem, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ValueError("it is no private key without a password in PEM") from None
        self._algorithm = _algorithm_of(self._key)
        made: Any = jwt.get_algorithm_by_name(self._algorithm).to_jwk(self._key.public_key(), as_dict=True)
        members = {name: made[name] for name in _THUMBPRINT[made["kty"]]}
        self.kid = _base64url(hashlib.sha256(canonical(members)).digest())
        self.key_set = {"keys": [{**members, "kid": self.kid, "use": "sig", "alg": self._algorithm}]}
        """What stands at ``jku`` (RFC 7517, 5)."""
        self._header = {"typ": "JOSE", "kid": self.kid, "jku": jku}
        self._made: dict[bytes, dict[str, str]] = {}

    def signed(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """``card``, as it will be sent, with its ``signatures``; earlier ones are dropped. Raises: ValueError for what
        has no canonical form.

        One is enough for a client, and there is one for each way to read a card (see ``payloads``).
        """
        signatures = [self._made.get(payload) or self._keep(payload) for payload in payloads(card)]
        return {**card, "signatures": signatures}

    def _keep(self, payload: bytes) -> dict[str, str]:
        """The same card has the same signature each time it is asked for, although most kinds of keys sign otherwise
        each time: who has the card can be told that it has not changed."""
        if len(self._made) >= MAX_MADE:
            self._made.clear()
        made = self._made[payload] = self._sign(payload)
        return made

    def _sign(self, payload: bytes) -> dict[str, str]:
        token = jwt.api_jws.encode(payload, self._key, self._algorithm, headers=self._header)
        protected, _, signature = token.split(".")
        return {"protected": protected, "signature": signature}


def payloads(card: Mapping[str, Any]) -> list[bytes]:
    """What is signed: the card in every form in which a client may put it together again, without doubles.

    A client that keeps the JSON has all members, those of 0.3 among them. One that reads it into the types of 1.0 has
    only theirs; and of these, one that goes by ``optional`` and REQUIRED keeps an empty ``description`` (8.4.1), one
    that cannot tell empty from absent does not.
    """
    whole = {name: value for name, value in card.items() if name != "signatures"}
    try:
        known = msgspec.to_builtins(msgspec.convert(whole, AgentCard))
    except msgspec.ValidationError as error:
        raise ValueError(f"The card is none of A2A 1.0: {error}") from None
    forms = (whole, known, _without_empty(known))
    return list(dict.fromkeys(canonical(form) for form in forms))


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: kept for name, each in value.items() if (kept := _without_empty(each)) not in ("", [], {}, None)}
    if isinstance(value, list):
        return [kept for each in value if (kept := _without_empty(each)) not in ("", [], {}, None)]
    return value


def _algorithm_of(key: Any) -> str:
    if isinstance(key, EllipticCurvePrivateKey) and type(key.curve) in _CURVES:
        return _CURVES[type(key.curve)]
    if isinstance(key, Ed25519PrivateKey):
        return "EdDSA"
    if isinstance(key, RSAPrivateKey):
        if key.key_size < 2048:
            raise ValueError(f"an RSA key of {key.key_size} bits is too weak; it needs 2048")
        return "RS256"
    raise ValueError("the key is of a kind that signs no cards; take one on P-256, or Ed25519, or RSA")


# --- canonical JSON (RFC 8785) ----------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value. Raises: ValueError for what has none: infinities, huge integers, lone
    surrogates, keys that are no text."""
    return _spelled(value).encode()


def _spelled(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int():
            if abs(value) > MAX_INTEGER:
                raise ValueError(f"{value} is beyond the integers that JSON holds exactly")
            return str(value)
        case float():
            return _number(value)
        case list() | tuple():
            return "[" + ",".join(map(_spelled, value)) + "]"
        case dict() if all(isinstance(name, str) for name in value):
            # In the order of UTF-16, not of code points (3.2.3).
            names = sorted(value, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
            return "{" + ",".join(f"{_spelled(name)}:{_spelled(value[name])}" for name in names) + "}"
    raise ValueError(f"{type(value).__name__} is nothing that JSON has")


def _number(value: float) -> str:
    """As ECMAScript writes it (3.2.2.3). Python finds the same shortest digits and only sets them otherwise."""
    number = Decimal(repr(value))
    if not number.is_finite():
        raise ValueError(f"{value} is no number that JSON has")
    if number == 0:
        return "0"
    sign, all_digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    digits = "".join(map(str, all_digits)).rstrip("0")
    point = len(all_digits) + exponent
    minus = "-" if sign else ""
    if len(digits) <= point <= 21:
        return minus + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{minus}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{minus}{digits[0]}{fraction}e{point - 1:+d}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
