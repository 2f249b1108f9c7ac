"""Where A2A's cards are, who may read them, and how they are cached."""

from __future__ import annotations

from hector_trio.a2a.cards import CARD, RESUME_DOCUMENT
from hector_trio.transports.a2a_routes import is_public
from tests.a2a.speaking import agent_of, echo, speaking
from tests.serving import serving, settings_of


async def test_the_card_is_at_three_places() -> None:
    async with serving(settings_of(), agent_of(echo)) as served, served.client() as client:
        assert (await client.get(CARD)).json()["name"] == "assistant"  # the default agent
        cards = [(await client.get(f"/{place}/a{CARD}")).json() for place in ("a2a", "agents")]
        assert cards[0] == cards[1]
        assert cards[0]["name"] == "Agent A"
        assert cards[0]["supportedInterfaces"][0]["url"] == f"{served.url}/a2a/a"
        assert (await client.get(f"/a2a/nobody{CARD}")).status_code == 404
        assert (await client.head(f"/a2a/a{CARD}")).status_code == 200


async def test_every_agent_is_one_of_a2a() -> None:
    async with serving(settings_of()) as served, served.client() as client:
        card = (await client.get(f"/a2a/assistant{CARD}")).json()
        body = {"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "Hello"}]}}
        url = card["supportedInterfaces"][1]["url"] + "/message:send"
        task = (await client.post(url, json=body, headers={"A2A-Version": "1.0"})).json()["task"]
        assert task["status"]["state"] == "TASK_STATE_COMPLETED"
        assert task["artifacts"][0]["parts"][0]["text"]


async def test_a_card_can_be_cached() -> None:
    async with speaking(echo) as (_, speaker):
        first = await speaker.client.get(f"/a2a/a{CARD}")
        assert "max-age=" in first.headers["cache-control"]
        known = {"If-None-Match": first.headers["etag"]}
        again = await speaker.client.get(f"/a2a/a{CARD}", headers=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        since = {"If-Modified-Since": first.headers["last-modified"]}
        assert (await speaker.client.get(f"/a2a/a{CARD}", headers=since)).status_code == 304
        since["If-None-Match"] = '"other"'
        assert (await speaker.client.get(f"/a2a/a{CARD}", headers=since)).status_code == 200


async def test_addresses_on_the_card_follow_the_public_address() -> None:
    settings = settings_of(server={"base_url": "https://agents.example.com/x"})
    async with speaking(echo, settings=settings) as (_, speaker):
        card = (await speaker.client.get(f"/a2a/a{CARD}")).json()
        assert card["supportedInterfaces"][0]["url"] == "https://agents.example.com/x/a2a/a"


async def test_the_extension_is_described_where_the_card_says() -> None:
    tokens = settings_of(auth={"tokens": [{"name": "alice", "token": "alice-alice-alice-1"}]})
    async with speaking(echo, settings=tokens) as (_, speaker):
        card = (await speaker.client.get(f"/a2a/a{CARD}")).json()
        [extension] = card["capabilities"]["extensions"]
        document = await speaker.client.get(extension["params"]["document"])
        assert document.status_code == 200
        assert extension["uri"] in document.text
        assert (await speaker.client.get("/a2a/a/tasks")).status_code == 401


def test_only_cards_and_what_they_refer_to_are_public() -> None:
    assert is_public(CARD)
    assert is_public(f"/a2a/a{CARD}")
    assert is_public(RESUME_DOCUMENT)
    for path in ("/a2a/a", "/a2a/a/tasks", "/a2a/a/extendedAgentCard", "/agents/a"):
        assert not is_public(path)
