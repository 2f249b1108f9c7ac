"""Signed cards: canonical JSON against another implementation, signatures against PyJWT and the official SDK."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import jwt
import pytest
import rfc8785
from a2a.types import AgentCard as SdkCard
from a2a.utils.signing import InvalidSignaturesError, create_signature_verifier
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.a2a.signing import CardSigner, canonical, payloads
from tests.issuer import RSA

JKU = "https://hector.example/.well-known/jwks.json"


def pem(key: Any, password: bytes | None = None) -> bytes:
    how = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    data: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    return data


KEYS: dict[str, Any] = {
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "RS256": RSA,
}
SIGNER = CardSigner(pem(KEYS["ES256"]), JKU)

CARD: dict[str, Any] = {
    "name": "Größe — 你好 🚀",
    "description": "Says what it is told",
    "version": "1.0.0",
    "supportedInterfaces": [
        {"url": "https://hector.example/a2a/a", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}
    ],
    "capabilities": {
        "streaming": True,
        "pushNotifications": False,
        "extensions": [{"uri": "urn:x", "params": {"n": 1, "f": 0.5, "big": 1e21, "z": {"b": [], "a": None}}}],
    },
    "defaultInputModes": ["text/plain"],
    "defaultOutputModes": ["text/plain"],
    "skills": [{"id": "a", "name": "a", "description": "d", "tags": ["t"]}],
    "securitySchemes": {"bearer": {"httpAuthSecurityScheme": {"scheme": "bearer"}}},
    "securityRequirements": [{"schemes": {"bearer": {}}}],
}
OLD = {"url": "https://hector.example/a2a/a", "preferredTransport": "JSONRPC", "protocolVersion": "0.3.0"}


def by_raw_json(card: dict[str, Any], key_set: dict[str, Any]) -> bool:
    """As 8.4.3 says it, on the JSON as it came, by PyJWT; ``rfc8785`` spells it."""
    payload = rfc8785.dumps({name: value for name, value in card.items() if name != "signatures"})
    text = base64.urlsafe_b64encode(payload).rstrip(b"=").decode()
    for each in card["signatures"]:
        header = jwt.get_unverified_header(f"{each['protected']}.{text}.{each['signature']}")
        (key,) = [jwt.PyJWK(jwk) for jwk in key_set["keys"] if jwk["kid"] == header["kid"]]
        try:
            jwt.api_jws.decode(f"{each['protected']}.{text}.{each['signature']}", key, [header["alg"]])
        except jwt.InvalidSignatureError:
            continue
        assert (header["typ"], header["jku"]) == ("JOSE", JKU)
        return True
    return False


def by_the_sdk(card: dict[str, Any], signer: CardSigner) -> bool:
    asked: list[Any] = []

    def key_of(kid: str | None, jku: str | None) -> jwt.PyJWK:
        asked.append((kid, jku))
        return jwt.PyJWK(signer.key_set["keys"][0])

    verify = create_signature_verifier(key_of, ["ES256", "ES384", "EdDSA", "RS256"])
    try:
        verify(ParseDict(card, SdkCard(), ignore_unknown_fields=True))
    except InvalidSignaturesError:
        return False
    assert asked[-1] == (signer.kid, JKU)
    return True


# --- cards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", KEYS)
@pytest.mark.parametrize("more", [{}, OLD], ids=["1.0", "1.0 and 0.3"])
def test_a_signed_card_is_believed_however_it_is_read(algorithm: str, more: dict[str, Any]) -> None:
    signer = CardSigner(pem(KEYS[algorithm]), JKU)
    card = json.loads(json.dumps(signer.signed({**CARD, **more})))
    header = json.loads(base64.urlsafe_b64decode(card["signatures"][0]["protected"] + "=="))
    assert header == {"alg": algorithm, "typ": "JOSE", "kid": signer.kid, "jku": JKU}
    assert by_raw_json(card, signer.key_set)
    assert by_the_sdk(card, signer)


def test_an_empty_description_does_not_part_the_readers() -> None:
    card = SIGNER.signed({**CARD, "description": ""})
    assert by_raw_json(card, SIGNER.key_set)
    assert by_the_sdk(card, SIGNER)


@pytest.mark.parametrize(
    "change",
    [{"name": "Mallory"}, {"version": "1.0.1"}, {"skills": []}, {"provider": {"organization": "x", "url": "y"}}],
)
def test_a_changed_card_is_not_believed(change: dict[str, Any]) -> None:
    card = {**SIGNER.signed(CARD), **change}
    assert not by_raw_json(card, SIGNER.key_set)
    assert not by_the_sdk(card, SIGNER)


def test_a_member_that_only_some_readers_know_cannot_be_changed_for_them() -> None:
    card = {**SIGNER.signed({**CARD, **OLD}), "url": "https://evil.example"}
    assert not by_raw_json(card, SIGNER.key_set)
    assert by_the_sdk(card, SIGNER)  # it does not look at it


def test_another_key_is_not_believed_under_the_same_name() -> None:
    other = CardSigner(pem(ec.generate_private_key(ec.SECP256R1())), JKU)
    assert not by_the_sdk(other.signed(CARD), SIGNER)
    assert other.kid != SIGNER.kid


def test_earlier_signatures_are_not_signed() -> None:
    card = SIGNER.signed(SIGNER.signed(CARD))
    assert by_raw_json(card, SIGNER.key_set)
    assert payloads(card) == payloads(CARD)


def test_a_plain_card_has_one_form_and_a_card_of_two_dialects_two() -> None:
    plain = {name: value for name, value in CARD.items() if name not in ("capabilities", "securityRequirements")}
    plain["capabilities"] = {"streaming": True}
    assert len(payloads(plain)) == 1
    assert len(payloads({**plain, **OLD})) == 2


def test_the_default_values_of_the_specifications_example_are_kept_or_left_out_as_it_says() -> None:
    card = {
        **CARD,
        "name": "Example Agent",
        "description": "",
        "capabilities": {"streaming": False, "pushNotifications": False},
        "skills": [],
    }
    whole = json.loads(payloads(card)[0])
    assert (whole["description"], whole["skills"]) == ("", [])
    assert whole["capabilities"] == {"streaming": False, "pushNotifications": False}


def test_what_is_no_card_is_not_signed() -> None:
    with pytest.raises(ValueError, match=r"none of A2A 1\.0"):
        SIGNER.signed({"name": "x"})


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_set_holds_the_public_half_only() -> None:
    for algorithm, key in KEYS.items():
        (jwk,) = CardSigner(pem(key), JKU).key_set["keys"]
        assert (jwk["alg"], jwk["use"]) == (algorithm, "sig")
        assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & set(jwk)


def test_the_name_of_a_key_is_its_thumbprint() -> None:
    # RFC 8037, appendix A.3
    private = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    signer = CardSigner(pem(ed25519.Ed25519PrivateKey.from_private_bytes(private)), JKU)
    assert signer.kid == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no private key"),
        (pem(KEYS["ES256"], b"secret"), "no private key without a password"),
        (pem(rsa.generate_private_key(65537, 1024)), "1024 bits is too weak"),
        (pem(x25519.X25519PrivateKey.generate()), "signs no cards"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "signs no cards"),
        (
            KEYS["ES256"]
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
            "no private key",
        ),
    ],
)
def test_a_key_that_cannot_sign_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CardSigner(data, JKU)


# --- canonical JSON ---------------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53) + 1, 2**53 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_any_value_is_spelled_as_another_implementation_spells_it(value: Any) -> None:
    spelled = canonical(value)
    assert spelled == rfc8785.dumps(value)
    assert json.loads(spelled, parse_int=float) == value


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        # RFC 8785, appendix B, and around its borders
        (5e-324, "5e-324"),
        (-5e-324, "-5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740992.0, "9007199254740992"),
        (295147905179352830000.0, "295147905179352830000"),
        (9.999999999999997e22, "9.999999999999997e+22"),
        (1e23, "1e+23"),
        (999999999999999700000.0, "999999999999999700000"),
        (1e21, "1e+21"),
        (9.999999999999997e-7, "9.999999999999997e-7"),
        (0.000001, "0.000001"),
        (333333333.3333332, "333333333.3333332"),
        (-0.0000033333333333333333, "-0.0000033333333333333333"),
        (-0.0, "0"),
        (1.0, "1"),
        (100.0, "100"),
        (True, "true"),
    ],
)
def test_numbers_are_written_as_ecmascript_writes_them(value: float, spelled: str) -> None:
    assert canonical(value).decode() == spelled


def test_strings_and_keys_are_written_by_the_rules() -> None:
    text = "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/\x7f\u2028"
    assert canonical(text).decode() == '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\x7f\u2028"'
    keys = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 7}
    assert canonical(keys).decode() == '{"\\r":2,"1":4,"\x80":6,"\u00f6":7,"\u20ac":1,"\U0001f600":5,"\ufb33":3}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**53, "\ud800", {"\udc00": 1}, {1: 2}, b"x", {1, 2}])
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical([value])
