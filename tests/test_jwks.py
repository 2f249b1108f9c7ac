"""The issuer's keys: fetched once for all who wait, replaced, kept while the issuer is away, and not for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from quart_trio import QuartTrio
from structlog.testing import capture_logs
from trio.testing import MockClock
from trio_websocket import ConnectionClosed

from hector_trio.errors import ConfigError, InvalidToken, KeysUnavailable
from hector_trio.jwks import MAX_DOCUMENT, Jwks
from hector_trio.server import Prepare
from tests.clock import skip
from tests.engines import Steered, agent
from tests.fake_model import Behaviour, Exchange, hangs_up, refuses, sends, serve_silent_port, silent
from tests.issuer import ISSUER, Issuer, Signer, believing, issuing, key_set
from tests.serving import Served, serving, settings_of
from tests.sockets import connected, rejected

ONE, TWO = Signer("one"), Signer("two")


def gated(body: bytes, gate: trio.Event) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await gate.wait()
        await sends(body, "application/json")(exchange)

    return behave


async def refused(jwks: Jwks, token: str) -> str:
    with trio.fail_after(5), pytest.raises(InvalidToken) as caught:
        await jwks.holder(token)
    return caught.value.detail


# --- fetching ---------------------------------------------------------------------------------------------------------


async def test_many_who_come_at_once_wait_for_one_fetch() -> None:
    gate = trio.Event()
    owners: list[str] = []
    async with issuing() as issuer:
        issuer.fake.plan(gated(key_set(ONE), gate))
        async with believing(issuer.settings()) as jwks:

            async def come(name: str) -> None:
                owners.append((await jwks.holder(ONE.sign(sub=name))).owner)

            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    for number in range(50):
                        nursery.start_soon(come, f"u{number}")
                    await issuer.fake.wait_requests(1)
                    await trio.testing.wait_all_tasks_blocked()
                    assert not owners
                    gate.set()
        assert len(owners) == len(set(owners)) == 50
        assert len(issuer.fake.requests) == 1


async def test_who_leaves_while_waiting_takes_the_fetch_from_nobody() -> None:
    gate = trio.Event()
    async with issuing() as issuer:
        issuer.fake.plan(gated(key_set(ONE), gate))
        async with believing(issuer.settings()) as jwks:
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(jwks.holder, ONE.sign())
                    await issuer.fake.wait_requests(1)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                gate.set()
                assert (await jwks.holder(ONE.sign())).owner == "alice"
        assert len(issuer.fake.requests) == 1


async def test_known_keys_ask_nobody() -> None:
    async with issuing(ONE, TWO) as issuer, believing(issuer.settings()) as jwks:
        with trio.fail_after(5):
            for signer in (ONE, TWO, ONE):
                await jwks.holder(signer.sign())
        assert len(issuer.fake.requests) == 1


async def test_a_new_key_is_fetched_when_its_first_token_comes() -> None:
    async with issuing(ONE) as issuer, believing(issuer.settings(), pause=0) as jwks:
        with trio.fail_after(5):
            await jwks.holder(ONE.sign())
            issuer.publish(TWO)
            assert (await jwks.holder(TWO.sign())).owner == "alice"
            assert await refused(jwks, ONE.sign(sub="bob")) == "The token is not accepted"


async def test_a_token_that_was_proven_falls_with_its_key() -> None:
    token = ONE.sign()
    async with issuing(ONE) as issuer, believing(issuer.settings(), pause=0) as jwks:
        with trio.fail_after(5):
            await jwks.holder(token)
            issuer.publish(TWO)
            await jwks.holder(TWO.sign())
            await refused(jwks, token)


async def test_tokens_with_made_up_keys_cost_the_issuer_one_request_in_a_while() -> None:
    async with issuing(ONE) as issuer, believing(issuer.settings(), pause=60) as jwks:
        with trio.fail_after(5):
            await jwks.holder(ONE.sign())
            for number in range(100):
                assert await refused(jwks, Signer(f"made up {number}").sign()) == "The token is not accepted"
            assert (await jwks.holder(ONE.sign())).owner == "alice"
        assert len(issuer.fake.requests) == 1


async def test_made_up_keys_at_once_share_one_fetch() -> None:
    async with issuing(ONE) as issuer, believing(issuer.settings(), pause=0) as jwks:
        with trio.fail_after(5):
            await jwks.holder(ONE.sign())
            gate = trio.Event()
            issuer.fake.plan(gated(key_set(ONE), gate))
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(refused, jwks, Signer(f"made up {number}").sign())
                await issuer.fake.wait_requests(2)
                await trio.testing.wait_all_tasks_blocked()
                gate.set()
        assert len(issuer.fake.requests) == 2


async def test_keys_are_fetched_again_before_anybody_misses_them() -> None:
    async with issuing(ONE) as issuer, believing(issuer.settings(refresh=0.01)) as jwks:
        with trio.fail_after(5):
            await jwks.holder(ONE.sign())
            issuer.publish(TWO)
            seen = len(issuer.fake.requests)
            await issuer.fake.wait_requests(seen + 2)
            await jwks.holder(TWO.sign())


# --- an issuer that is away -------------------------------------------------------------------------------------------


FAILURES: list[Any] = [
    hangs_up(),
    refuses(500),
    refuses(302, headers={"Location": "http://127.0.0.1:1/"}),
    sends(b"<html>", "text/html"),
    sends(b'{"keys":[]}', "application/json"),
    sends(b"x" * (MAX_DOCUMENT + 1), "application/json"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=["hangs up", "500", "302", "html", "no keys", "too large"])
async def test_the_old_keys_go_on_working_while_their_address_does_not(failure: Behaviour) -> None:
    async with issuing(ONE) as issuer, believing(issuer.settings(), pause=0) as jwks:
        with trio.fail_after(5), capture_logs() as lines:
            await jwks.holder(ONE.sign())
            issuer.fake.default = failure
            with pytest.raises(KeysUnavailable):
                await jwks.holder(TWO.sign())
            assert (await jwks.holder(ONE.sign(sub="bob"))).owner == "bob"
            issuer.publish(TWO)
            assert (await jwks.holder(TWO.sign())).owner == "alice"
        assert [line["source"] for line in lines if line["event"] == "keys_not_fetched"] != []


async def test_the_old_keys_do_not_work_for_ever() -> None:
    token = ONE.sign()
    async with issuing(ONE) as issuer, believing(issuer.settings(keep=0.05), pause=0) as jwks:
        with trio.fail_after(5):
            await jwks.holder(token)
            issuer.fake.default = refuses(500)
            while True:
                try:
                    await jwks.holder(token)
                except KeysUnavailable:
                    break
                await trio.lowlevel.checkpoint()
            issuer.publish(ONE)
            assert (await jwks.holder(token)).owner == "alice"


async def test_without_any_keys_nobody_can_say_whose_a_token_is() -> None:
    async with issuing() as issuer:
        issuer.fake.default = refuses(500)
        async with believing(issuer.settings(), pause=60) as jwks:
            with trio.fail_after(5):
                for _ in range(3):
                    with pytest.raises(KeysUnavailable) as caught:
                        await jwks.holder(ONE.sign())
                    assert caught.value.retry_after is not None
                    assert 50 < caught.value.retry_after <= 60
                assert await refused(jwks, "no.token.atall") == "The token is not accepted"
        assert len(issuer.fake.requests) == 1


async def test_an_issuer_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hector_trio.jwks.FETCH_LIMIT", 0.1)
    async with issuing() as issuer, trio.open_nursery() as nursery:
        issuer.fake.default = silent()
        port = (await serve_silent_port(nursery)).port
        for url in (issuer.url, f"http://127.0.0.1:{port}/", "http://127.0.0.1:1/"):
            async with believing(issuer.settings(jwks_url=url)) as jwks:
                with trio.fail_after(5), pytest.raises(KeysUnavailable):
                    await jwks.holder(ONE.sign())
        nursery.cancel_scope.cancel()


async def test_the_log_says_what_was_wrong_and_how_long_the_old_keys_last() -> None:
    async with issuing(ONE) as issuer, believing(issuer.settings(keep=1000), pause=0) as jwks:
        with trio.fail_after(5), capture_logs() as lines:
            await jwks.holder(ONE.sign())
            issuer.fake.default = refuses(503)
            with pytest.raises(KeysUnavailable):
                await jwks.holder(TWO.sign())
        told = next(line for line in lines if line["event"] == "keys_not_fetched")
        assert (told["because"], told["source"]) == ("it answered 503", issuer.url)
        assert 900 < told["old_ones_good_for"] <= 1000


# --- a file -----------------------------------------------------------------------------------------------------------


async def test_keys_may_come_from_a_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(key_set(ONE))
    settings = Issuer.settings
    async with issuing() as issuer:
        async with believing(settings(issuer, jwks_url=None, jwks_file=str(path)), pause=0) as jwks:
            with trio.fail_after(5):
                assert (await jwks.holder(ONE.sign())).owner == "alice"
                path.write_bytes(key_set(TWO))
                assert (await jwks.holder(TWO.sign())).owner == "alice"
                path.unlink()
                with pytest.raises(KeysUnavailable):
                    await jwks.holder(ONE.sign())
        assert not issuer.fake.requests


# --- through the server -----------------------------------------------------------------------------------------------

STATIC = {"name": "root", "token": "root-0123456789abcdef", "role": "admin"}


def secured(issuer: Issuer, **keys: Any) -> Any:
    jwt = {"issuer": ISSUER, "audience": ["hector"], "jwks_url": issuer.url, "leeway": 0, **keys}
    return settings_of(auth={"tokens": [STATIC], "jwt": jwt})


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def whose(server: Served, token: str) -> int:
    async with server.client(headers=bearer(token)) as client:
        return (await client.get("/sessions")).status_code


async def test_what_a_token_creates_belongs_to_its_subject() -> None:
    async with issuing(ONE) as issuer, serving(secured(issuer)) as server:
        async with (
            server.client(headers=bearer(ONE.sign())) as alice,
            server.client(headers=bearer(ONE.sign(sub="bob"))) as bob,
        ):
            made = await alice.post("/sessions", json={"agentId": "assistant"})
            assert made.status_code == 201
            path = made.headers["Location"]
            assert (await alice.get(path)).status_code == 200
            assert (await bob.get(path)).status_code == 404
            row = await server.engine.store.get_session("alice", made.json()["sessionId"], now=0)
            assert row is not None
            assert (await alice.get("/agents/assistant")).json()["auth"] == {"type": "bearer"}


async def test_a_refused_token_is_told_by_the_challenge() -> None:
    async with issuing(ONE) as issuer, serving(secured(issuer)) as server, server.client() as client:
        answer = await client.get("/agents")
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="hector"')
        answer = await client.get("/agents", headers=bearer(ONE.sign(exp=1)))
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == (
            'Bearer realm="hector", error="invalid_token", error_description="The token has expired"'
        )
        assert answer.json()["detail"] == "The token has expired"


async def test_the_role_of_a_token_counts() -> None:
    async with issuing(ONE) as issuer, serving(secured(issuer, role_claim="roles", role="viewer")) as server:
        async with server.client() as client:
            body = {"agentId": "assistant"}
            assert (await client.post("/sessions", json=body, headers=bearer(ONE.sign()))).status_code == 403
            user, admin = ONE.sign(roles=["user"]), ONE.sign(roles=["admin"])
            assert (await client.post("/sessions", json=body, headers=bearer(user))).status_code == 201
            assert (await client.get("/metrics", headers=bearer(user))).status_code == 403
            assert (await client.get("/metrics", headers=bearer(admin))).status_code == 200


async def test_while_no_keys_can_be_fetched_tokens_of_ours_and_health_go_on() -> None:
    async with issuing() as issuer:
        issuer.fake.default = refuses(500)
        async with serving(secured(issuer)) as server, server.client() as client:
            answer = await client.get("/agents", headers=bearer(ONE.sign()))
            assert (answer.status_code, answer.json()["code"]) == (503, "keys_unavailable")
            assert answer.json()["retryable"]
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await rejected(server, subprotocols=["bearer", ONE.sign()])).status_code == 503
            assert await whose(server, STATIC["token"]) == 200
            for headers in ({}, bearer(ONE.sign())):
                assert (await client.get("/health/live", headers=headers)).status_code == 200


async def test_a_websocket_may_offer_its_token_as_a_subprotocol() -> None:
    async with issuing(ONE) as issuer, serving(secured(issuer)) as server:
        async with connected(server, subprotocols=["bearer", ONE.sign()]) as peer:
            assert peer.websocket.subprotocol == "bearer"
            await peer.ask("Hello")
            assert (await peer.read_to_final())[-1]["status"] == "completed"
        refusal = await rejected(server, subprotocols=["bearer", TWO.sign()])
        assert refusal.status_code == 401


async def status_of(server: Served, task_id: str) -> str:
    async with server.client(headers=bearer(ONE.sign())) as client:
        return str((await client.get(f"/agents/a/tasks/{task_id}")).json()["status"])


def looked_at(app: QuartTrio) -> None:
    """Every message goes through Quart."""

    @app.before_websocket
    async def look() -> None:
        pass


WAYS = pytest.mark.parametrize("prepare", [(), (looked_at,)], ids=["beside Quart", "through Quart"])


@WAYS
@pytest.mark.parametrize("speaking", [False, True], ids=["silent", "speaking"])
async def test_a_websocket_is_closed_when_its_token_expires_and_its_work_ends(
    speaking: bool, prepare: tuple[Prepare, ...], clock: MockClock
) -> None:
    steered = Steered()

    async def talker(ctx: Any) -> None:
        while True:
            await ctx.emit_text("again ")
            await trio.sleep(0.01)

    agents = agent(talker if speaking else steered)
    async with issuing(ONE) as issuer, serving(secured(issuer), agents, prepare=prepare) as server:
        expiring = ONE.sign(exp=int(time.time()) + 30)
        async with connected(server, "a", extra_headers=[("Authorization", f"Bearer {expiring}")]) as peer:
            await peer.ask("x", taskId="t")
            await peer.ask("y", taskId="u", onDisconnect="continue")
            seen = set[str]()
            while seen != {"t", "u"}:
                seen.add((await peer.read())["taskId"])
            await skip(clock, 20)
            assert await status_of(server, "t") == "running"
            await skip(clock, 10)
            assert await peer.close_code() == 4501
        assert await status_of(server, "t") == "cancelled"
        assert await status_of(server, "u") == "running"
        async with connected(server, "a", extra_headers=[("Authorization", f"Bearer {ONE.sign()}")]) as peer:
            await peer.send({"type": "attach", "taskId": "t", "after": 0})
            frames = await peer.read_to_final()
            assert frames[-1]["status"] == "cancelled"


@WAYS
async def test_an_idle_websocket_is_closed_when_its_token_expires(prepare: tuple[Prepare, ...]) -> None:
    async with issuing(ONE) as issuer, serving(secured(issuer), prepare=prepare) as server:
        expiring = ONE.sign(exp=int(time.time()) + 2)
        async with connected(server, subprotocols=["bearer", expiring]) as peer:
            await peer.send({"type": "ping"})
            assert (await peer.read())["type"] == "pong"
            with pytest.raises(ConnectionClosed):
                await peer.read()
            assert peer.websocket.closed is not None
            assert peer.websocket.closed.code == 4501
            assert await whose(server, expiring) == 401


async def test_a_stream_of_events_ends_when_its_token_expires_and_goes_on_with_a_new_one() -> None:
    steered = Steered()
    async with issuing(ONE) as issuer, serving(secured(issuer), agent(steered)) as server, server.client() as client:
        asked = {"taskId": "t", "input": {"content": "x"}}
        headers = {**bearer(ONE.sign()), "Prefer": "respond-async"}
        assert (await client.post("/agents/a/tasks", json=asked, headers=headers)).status_code == 202
        headers = {**bearer(ONE.sign(exp=int(time.time()) + 2)), "Accept": "text/event-stream"}
        with trio.fail_after(8):
            cut = (await client.get("/agents/a/tasks/t/events", headers=headers)).text
        assert '"final":true' not in cut
        assert (await client.get("/agents/a/tasks/t/events", headers=headers)).status_code == 401
        last = [line.removeprefix("id: ") for line in cut.splitlines() if line.startswith("id: ")]
        steered.let("x")
        headers = {**bearer(ONE.sign()), "Accept": "text/event-stream", "Last-Event-ID": last[-1] if last else "0"}
        assert '"final":true' in (await client.get("/agents/a/tasks/t/events", headers=headers)).text


async def test_a_streamed_post_whose_token_expires_cancels_its_task(clock: MockClock) -> None:
    steered = Steered()
    async with issuing(ONE) as issuer, serving(secured(issuer), agent(steered)) as server, server.client() as client:
        headers = {**bearer(ONE.sign(exp=int(time.time()) + 30)), "Accept": "text/event-stream"}
        asked = {"input": {"content": "x"}}
        async with client.stream("POST", "/agents/a/tasks", json=asked, headers=headers, timeout=None) as answer:
            await steered.wait_started("x")
            await skip(clock, 20)
            assert not steered.ended
            await skip(clock, 10)
            assert steered.ended
            assert b'"final":true' not in await answer.aread()


async def test_a_stream_of_a2a_ends_when_its_token_expires(clock: MockClock) -> None:
    steered = Steered()
    async with issuing(ONE) as issuer, serving(secured(issuer), agent(steered)) as server, server.client() as client:
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "x"}]}
        headers = {**bearer(ONE.sign(exp=int(time.time()) + 30)), "A2A-Version": "1.0"}
        asked = {"message": message}
        async with client.stream("POST", "/a2a/a/message:stream", json=asked, headers=headers, timeout=None) as answer:
            await steered.wait_started("x")
            await skip(clock, 30)
            cut = await answer.aread()
        assert b"TASK_STATE_WORKING" in cut
        assert b"TASK_STATE_COMPLETED" not in cut
        steered.let("x")
        await steered.wait_ended("x")  # which the protocol keeps apart from its streams


async def test_the_extended_card_is_for_whoever_has_a_token() -> None:
    async with issuing(ONE) as issuer, serving(secured(issuer)) as server, server.client() as client:
        assert (await client.get("/a2a/assistant/.well-known/agent-card.json")).status_code == 200
        place, version = "/a2a/assistant/extendedAgentCard", {"A2A-Version": "1.0"}
        assert (await client.get(place, headers=version)).status_code == 401
        assert (await client.get(place, headers={**version, **bearer(TWO.sign())})).status_code == 401
        card = await client.get(place, headers={**version, **bearer(ONE.sign())})
        assert (card.status_code, card.json()["name"]) == (200, "assistant")


async def test_without_pyjwt_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("hector_trio.jwks", "hector_trio.claims"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "jwt", None)
    async with issuing(ONE) as issuer:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=r"hector_trio\[jwt\]"), flatten_subgroups=True):
            async with serving(secured(issuer)):
                pass


def test_a_server_without_jwt_does_not_import_it() -> None:
    import subprocess
    import sys

    code = "import sys, hector_trio.server; print(sorted({'jwt', 'cryptography'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.replace("'", '"')) == []
