"""What a token must claim to be believed: signature, algorithm, issuer, audience, times, owner and role."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.auth import Principal
from hector_trio.claims import Key, Reader, find_key, read_keys
from hector_trio.config import Jwt
from hector_trio.errors import InvalidToken
from tests.issuer import AUDIENCE, ISSUER, Signer, key_set

ED, EC, RS = Signer("ed"), Signer("ec", "ES256"), Signer("rs", "RS256")
KEYS = read_keys(key_set(ED, EC, RS))
SETTINGS = Jwt(issuer=ISSUER, audience=[AUDIENCE, "other"], jwks_url="https://x.example", leeway=10)


def believed(token: str, keys: tuple[Key, ...] = KEYS, **settings: Any) -> Principal:
    reader = Reader(Jwt(**{**{name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}, **settings}))
    wanted = reader.wanted(token)
    key = find_key(keys, wanted)
    if key is None:
        raise InvalidToken("no such key")
    return reader.holder(token, wanted, key)


def refusal(token: str, keys: tuple[Key, ...] = KEYS, **settings: Any) -> str:
    with pytest.raises(InvalidToken) as caught:
        believed(token, keys, **settings)
    assert '"' not in caught.value.detail
    return caught.value.detail


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signer", [ED, EC, RS], ids=lambda each: each.kid)
def test_a_token_signed_by_the_issuer_names_its_holder_until_it_expires(signer: Signer) -> None:
    exp = int(time.time()) + 60
    assert believed(signer.sign(exp=exp)) == Principal("alice", "alice", "user", exp + 10)


@pytest.mark.parametrize("signer", [ED, EC, RS], ids=lambda each: each.kid)
def test_any_changed_character_of_a_token_is_noticed(signer: Signer) -> None:
    token = signer.sign()
    for at in range(0, len(token), 7):
        if token[at] != ".":
            changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
            refusal(changed)


def test_an_unsigned_token_is_refused_however_none_is_spelled() -> None:
    for name in ("none", "None", "NONE", "", None):
        token = f"{part({'alg': name, 'kid': 'rs'})}.{part({'iss': ISSUER, 'aud': AUDIENCE, 'sub': 'a'})}."
        refusal(token)


def test_a_public_key_is_never_taken_for_a_shared_secret() -> None:
    pem = RS.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 60}
    for secret in (pem, json.dumps(RS.jwk).encode(), RS.jwk["n"].encode()):
        signed = f"{part({'alg': 'HS256', 'kid': 'rs'})}.{part(claims)}"
        token = f"{signed}.{part(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"
        assert refusal(token) == "The token is not accepted"


def test_a_key_for_one_algorithm_proves_no_other() -> None:
    bound = Signer("bound", "RS256", alg="RS256")
    keys = read_keys(key_set(bound))
    assert believed(bound.sign(), keys).owner == "alice"
    refusal(bound.sign(algorithm="PS256"), keys, algorithms=["RS256", "PS256"])
    # without `alg` in the key set both are possible, if both are allowed
    assert believed(RS.sign(algorithm="PS256"), algorithms=["RS256", "PS256"]).owner == "alice"
    refusal(RS.sign(algorithm="PS256"))


def test_a_curve_belongs_to_its_algorithm() -> None:
    wide = Signer("wide", "ES384")
    keys = read_keys(key_set(wide))
    assert believed(wide.sign(), keys, algorithms=["ES384"]).owner == "alice"
    refusal(wide.sign(), keys, algorithms=["ES256"])
    assert not [key for key in keys if "ES256" in key.algorithms]


def test_another_key_under_the_same_name_proves_nothing() -> None:
    refusal(Signer("ed").sign())
    refusal(Signer("unknown").sign())


def test_without_a_kid_only_a_single_fitting_key_can_be_meant() -> None:
    nameless = Signer(None)
    assert believed(nameless.sign(), read_keys(key_set(nameless, RS))).owner == "alice"
    refusal(nameless.sign(), read_keys(key_set(nameless, ED)))


def test_a_key_that_comes_with_its_token_is_not_looked_at() -> None:
    own = Signer("ed")
    for headers in ({"jwk": own.jwk}, {"jku": "https://evil.example/jwks.json"}, {"x5u": "https://evil.example"}):
        refusal(own.sign(headers=headers))


@pytest.mark.parametrize(
    "headers", [{"crit": ["exp"], "exp": 1}, {"crit": []}, {"kid": 7}, {"kid": ["ed"]}, {"kid": {"a": 1}}]
)
def test_a_header_that_is_not_understood_is_refused(headers: dict[str, Any]) -> None:
    header = {"alg": "EdDSA", "typ": "JWT", "kid": "ed", **headers}
    signed = f"{part(header)}.{part({'iss': ISSUER, 'aud': AUDIENCE, 'sub': 'a', 'exp': int(time.time()) + 60})}"
    refusal(f"{signed}.{part(ED.private.sign(signed.encode()))}")


# --- claims -----------------------------------------------------------------------------------------------------------

NOW = int(time.time())


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"exp": NOW - 60}, "has expired"),
        ({"exp": None}, "no claim exp"),
        ({"exp": "soon"}, "not accepted"),
        ({"exp": float("inf")}, "not accepted"),
        ({"nbf": NOW + 600}, "not valid yet"),
        ({"iat": NOW + 600}, "not valid yet"),
        ({"iss": "https://login.example.com/"}, "somebody else"),
        ({"iss": None}, "no claim iss"),
        ({"aud": "hector2"}, "meant for somebody else"),
        ({"aud": None}, "no claim aud"),
        ({"aud": []}, "no claim aud"),
        ({"aud": {"hector": 1}}, "meant for somebody else"),
        ({"sub": None}, "names no owner"),
        ({"sub": ""}, "names no owner"),
        ({"sub": "x" * 129}, "names no owner"),
        ({"sub": "a\nb"}, "names no owner"),
        ({"sub": " a"}, "names no owner"),
    ],
)
def test_a_token_that_claims_something_else_is_refused_with_the_reason(claims: dict[str, Any], says: str) -> None:
    assert says in refusal(ED.sign(**claims))


def test_the_reason_is_told_only_to_whoever_holds_a_signed_token() -> None:
    assert (
        refusal(
            Signer("ed").sign(exp=1),
        )
        == "The token is not accepted"
    )


def test_clocks_may_differ_a_little() -> None:
    assert believed(ED.sign(exp=int(time.time()) - 2, nbf=int(time.time()) + 5)).owner == "alice"


@pytest.mark.parametrize("audience", ["hector", "other", ["x", "hector"]])
def test_one_common_audience_is_enough(audience: Any) -> None:
    assert believed(ED.sign(aud=audience)).owner == "alice"


def test_the_owner_may_stand_elsewhere() -> None:
    assert believed(ED.sign(user={"id": "u-7"}), owner_claim="user.id").owner == "u-7"
    elsewhere: Any = {"https://x.example/id": "u-8"}
    assert believed(ED.sign(**elsewhere), owner_claim="https://x.example/id").owner == "u-8"
    assert refusal(ED.sign(user="u-7"), owner_claim="user.id") == "The token names no owner"
    assert refusal(ED.sign(number=7), owner_claim="number") == "The token names no owner"


@pytest.mark.parametrize(
    ("claims", "role"),
    [
        ({"roles": ["viewer", "admin", "else"]}, "admin"),
        ({"roles": "openid user"}, "user"),
        ({"roles": ["administrator"]}, "viewer"),
        ({"roles": {"admin": True}}, "viewer"),
        ({"roles": None}, "viewer"),
    ],
)
def test_the_mightiest_role_of_a_token_counts_or_else_the_configured_one(claims: dict[str, Any], role: str) -> None:
    assert believed(ED.sign(**claims), role_claim="roles", role="viewer").role == role


def test_without_a_role_claim_no_token_can_say_its_role() -> None:
    assert believed(ED.sign(roles=["admin"], role="admin")).role == "user"


# --- keys -------------------------------------------------------------------------------------------------------------


UNUSABLE: dict[str, Any] = {
    "symmetric": {"kty": "oct", "k": "c2VjcmV0", "kid": "x", "alg": "HS256"},
    "for encryption": {**ED.jwk, "use": "enc"},
    "for signing": {**ED.jwk, "key_ops": ["sign"]},
    "operations in a string": {**ED.jwk, "key_ops": "verify"},
    "a number for its name": {**ED.jwk, "kid": 7},
    "another kind's algorithm": {**ED.jwk, "alg": "RS256"},
    "algorithms in a list": {**ED.jwk, "alg": ["EdDSA"]},
    "too short": {**ED.jwk, "x": "AAAA"},
    "another curve": {**ED.jwk, "crv": "X25519"},
    "private": {**ED.jwk, "d": "AAAA"},
    "no curve of a token": {**EC.jwk, "crv": "secp256k1"},
    "not on its curve": {**EC.jwk, "y": EC.jwk["x"]},
    "without a modulus": {"kty": "RSA", "kid": "x"},
    "of one bit": {"kty": "RSA", "n": "AQ", "e": "AQAB"},
    "kinds in a list": {"kty": ["RSA"]},
    "a string": "key",
    "nothing": None,
}


@pytest.mark.parametrize("jwk", UNUSABLE.values(), ids=UNUSABLE)
def test_a_key_that_cannot_be_used_is_passed_over(jwk: Any) -> None:
    assert [key.kid for key in read_keys(key_set(RS, extra=(jwk,)))] == ["rs"]


def test_a_weak_key_is_passed_over() -> None:
    weak = Signer("weak", "RS256", rsa.generate_private_key(65537, 1024))
    assert [key.kid for key in read_keys(key_set(RS, weak))] == ["rs"]


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'{"keys":{}}', b'{"keys":[]}', b"[" * 100_000, b"\xff"])
def test_what_is_no_key_set_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is not|none of its"):
        read_keys(data)


# --- hostile tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "a" * 20_000,
        part(b"[" * 5000) + ".e30.AA",
        part(b'{"alg":"EdDSA","x":' + b"[" * 5000) + ".e30.AA",
        part([]) + ".e30.AA",
        part({"alg": ["EdDSA"], "kid": "ed"}) + ".e30.AA",
        part({"alg": "EdDSA", "kid": "ed", "b64": False, "crit": ["b64"]}) + "..AA",
        part({"alg": "EdDSA", "kid": "ed"}) + ".e30.AA.AA",
        "\udcff.\xe4.x",
    ],
    ids=lambda token: ascii(token[:20]),
)
def test_a_strange_token_is_refused(token: str) -> None:
    refusal(token)


def test_a_huge_token_is_not_looked_at_although_it_is_signed() -> None:
    assert believed(ED.sign(filler="x" * 8_000)).owner == "alice"
    assert refusal(ED.sign(filler="x" * 16_000)) == "The token is not accepted"


def test_claims_nested_without_end_are_refused_although_they_are_signed() -> None:
    signed = f"{part({'alg': 'EdDSA', 'kid': 'ed'})}.{part(b'[' * 5000 + b']' * 5000)}"
    assert refusal(f"{signed}.{part(ED.private.sign(signed.encode()))}") == "The token is not accepted"


@given(st.text(), st.text(), st.text())
def test_no_three_texts_make_a_token(header: str, payload: str, signature: str) -> None:
    refusal(f"{header}.{payload}.{signature}")


@given(
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "zip"]), st.none() | st.text() | st.booleans())
)
def test_no_header_breaks_anything(header: dict[str, Any]) -> None:
    refusal(f"{part(header)}.{part({'sub': 'a'})}.{part(b'x' * 64)}")
