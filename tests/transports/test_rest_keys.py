"""The key set under the signatures of cards, as the server gives it, and keys that it refuses at the start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]

from hector_trio.config import load
from hector_trio.errors import ConfigError
from tests.a2a.speaking import Binding, Speaker
from tests.a2a.test_signing import CARD, KEYS, by_raw_json, by_the_sdk, pem
from tests.serving import Served, serving, settings_of
from tests.transports.test_a2a_grpc import VERSION, Caller

TOKEN = {"Authorization": "Bearer " + "a" * 20}


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


@pytest.mark.parametrize("binding", ["jsonrpc", "http", "http-0.3", "grpc"])
async def test_the_extended_card_is_signed_too_on_every_binding(tmp_path: Path, binding: str) -> None:
    async with secured(tmp_path) as server, server.client(headers=TOKEN) as client:
        signer = server.services.signer
        assert signer is not None
        if binding == "grpc":
            caller = Caller(server, (*VERSION, ("authorization", TOKEN["Authorization"])))
            message = await caller("GetExtendedAgentCard", pb.GetExtendedAgentCardRequest(tenant="assistant"))
            caller.channel.close()
            card = MessageToDict(message)
        elif binding == "http-0.3":
            card = (await client.get("/a2a/assistant/v1/card")).json()
        else:
            spoken = cast("Binding", binding)
            card = await Speaker(client, "assistant", spoken).ask("GetExtendedAgentCard")
        assert [each["id"] for each in card["skills"]] == ["assistant", "secret"]
        assert by_the_sdk(card, signer)
        if binding != "grpc":  # what came as JSON can be checked as it is
            assert by_raw_json(card, signer.key_set)
        card["skills"].pop()
        assert not by_the_sdk(card, signer)


async def test_the_extended_card_may_be_kept_by_its_client_alone(tmp_path: Path) -> None:
    async with secured(tmp_path) as server, server.client(headers={**TOKEN, "A2A-Version": "1.0"}) as client:
        place = "/a2a/assistant/extendedAgentCard"
        first = await client.get(place)
        assert first.headers["cache-control"] == "private, max-age=300"
        assert "authorization" in first.headers["vary"].lower()
        again = await client.get(place, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["cache-control"] == first.headers["cache-control"]
        assert again.headers["etag"] == first.headers["etag"]
        changed = await client.get(place, headers={"If-None-Match": '"other"'})
        assert (changed.status_code, changed.json()) == (200, first.json())
        public = await client.get("/a2a/assistant/.well-known/agent-card.json")
        assert public.headers["etag"] != first.headers["etag"]
        nobody = {"Authorization": "", "If-None-Match": first.headers["etag"]}
        assert (await client.get(place, headers=nobody)).status_code == 401


@asynccontextmanager
async def secured(tmp_path: Path) -> AsyncIterator[Served]:
    """A server that asks for tokens and signs its cards, one of whose skills is on the extended card only."""
    path = tmp_path / "card.pem"
    path.write_bytes(pem(KEYS["ES256"]))
    skill = {"id": "secret", "name": "S", "description": "Secret", "tags": ["x"]}
    settings = settings_of(
        server={"card_key": str(path), "base_url": "https://hector.example", "http2": True},
        auth={"tokens": [{"name": "a", "token": "a" * 20}]},
        agents={"assistant": {"type": "llm", "llm": "demo", "a2a": {"extended_skills": [skill]}}},
    )
    async with serving(settings) as server:
        yield server
