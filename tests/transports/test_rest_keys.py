"""The key set under the signatures of cards, as the server gives it, and keys that it refuses at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from hector_trio.config import load
from hector_trio.errors import ConfigError
from tests.a2a.test_signing import CARD, KEYS, by_raw_json, by_the_sdk, pem
from tests.serving import serving, settings_of


async def test_the_key_set_is_served_to_everybody_where_a_key_is_configured(tmp_path: Path) -> None:
    path = tmp_path / "card.pem"
    path.write_bytes(pem(KEYS["EdDSA"]))
    server_settings = {"card_key": str(path), "base_url": "https://hector.example"}
    auth = {"tokens": [{"name": "a", "token": "a" * 20}]}
    async with serving(settings_of(server=server_settings, auth=auth)) as server, server.client() as client:
        signer = server.services.signer
        assert signer is not None
        answer = await client.get("/.well-known/jwks.json")
        assert (answer.status_code, answer.json()) == (200, signer.key_set)
        assert answer.headers["Cache-Control"] == "public, max-age=300"
        assert by_raw_json(signer.signed(CARD), answer.json())
        assert (await client.get("/agents")).status_code == 401
    async with serving() as server, server.client() as client:
        assert (await client.get("/.well-known/jwks.json")).status_code == 404


def test_a_key_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server\.card_key: .*base_url"):
        load("server: {card_key: k.pem}\nagents: {a: {}}", {}, source="x")


async def test_a_key_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "card.pem"
    path.write_bytes(b"nothing")
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match=r"server\.card_key: cannot use"), flatten_subgroups=True
    ):
        async with serving(settings_of(server={"card_key": str(path), "base_url": "https://h.example"})):
            pass


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA"])
async def test_the_cards_are_signed_so_that_any_client_can_tell(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "card.pem"
    path.write_bytes(pem(KEYS[algorithm]))
    server_settings = {"card_key": str(path), "base_url": "https://hector.example"}
    async with serving(settings_of(server=server_settings)) as server, server.client() as client:
        signer = server.services.signer
        assert signer is not None
        answer = await client.get("/a2a/assistant/.well-known/agent-card.json")
        keys = (await client.get("/.well-known/jwks.json")).json()
        assert by_raw_json(answer.json(), keys)
        assert by_the_sdk(answer.json(), signer)
        assert not by_raw_json({**answer.json(), "name": "Mallory"}, keys)
        tag = {"If-None-Match": answer.headers["ETag"]}
        assert (await client.get("/.well-known/agent-card.json", headers=tag)).status_code == 304
