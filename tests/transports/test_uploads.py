"""tus 1.0 over a real server: whole files, wrong requests, clients that leave, stall, collide; and tuspy."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from trio.testing import MockClock

from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.function import FunctionAgent, SyncContext
from hector_trio.log import now_ms
from hector_trio.server import CLOSING_LIMIT
from hector_trio.uploads import ALGORITHMS, STALLED, Upload
from tests import HANG
from tests.clock import skip
from tests.serving import Served, serving, settings_of
from tests.sockets import connected
from tests.tus import (
    BYTES,
    TUS,
    answer_of,
    checksum,
    create,
    leave,
    offset_of,
    patch,
    patching,
    wait_for_offset,
)

ALICE, BOB, GUEST = "alice-" + "a" * 20, "bob-" + "b" * 20, "guest-" + "g" * 20
TOKENS = [
    {"name": "alice", "token": ALICE, "role": "user"},
    {"name": "bob", "token": BOB, "role": "user"},
    {"name": "guest", "token": GUEST, "role": "viewer"},
]


def upload_at(server: Served, path: str, owner: str = "local") -> Upload:
    return server.services.uploads.find(owner, path.rpartition("/")[2])


async def stored(server: Served, path: str) -> bytes:
    """The whole file, as an agent gets it."""
    used = await server.services.uploads.use("local", path.rpartition("/")[2], "application/octet-stream")
    assert used.path.read_bytes() == await used.read(0, used.size + 1)
    return used.path.read_bytes()


def files(server: Served) -> set[str]:
    folder: Path = server.services.uploads._folder
    return {each.name for each in folder.iterdir()} if folder.exists() else set()


# --- what goes well ---------------------------------------------------------------------------------------------------


async def test_a_file_in_pieces_arrives_whole() -> None:
    data = os.urandom(300_000)
    name = base64.b64encode("Übersicht.pdf".encode()).decode()
    async with serving() as server, server.client() as client:
        answer = await client.post(
            "/uploads", headers={**TUS, "Upload-Length": "300000", "Upload-Metadata": f"filename {name},secret"}
        )
        assert (answer.status_code, answer.headers["Upload-Offset"], answer.content) == (201, "0", b"")
        path = answer.headers["Location"]
        assert re.fullmatch(r"/uploads/[0-9a-f]{32}", path)
        for start in range(0, 300_000, 100_000):
            head = await client.head(path, headers=TUS)
            assert (head.status_code, head.headers["Upload-Offset"]) == (200, str(start))
            assert (head.headers["Upload-Length"], head.headers["Cache-Control"]) == ("300000", "no-store")
            assert head.headers["Upload-Metadata"] == f"filename {name},secret"
            answer = await patch(client, path, start, data[start : start + 100_000])
            assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(start + 100_000))
            assert answer.headers["Tus-Resumable"] == "1.0.0"
        assert (await patch(client, path, 300_000, b"")).status_code == 204
        assert await stored(server, path) == data
        used = await server.services.uploads.use("local", path.rpartition("/")[2], "application/pdf")
        assert (used.media_type, used.size, used.name) == ("application/pdf", 300_000, "Übersicht.pdf")
        assert await used.read(299_990) == data[-10:]
        assert await used.read(300_000) == b""


async def test_what_is_spoken_is_told_without_a_version() -> None:
    async with serving(settings_of(uploads={"max_bytes": 5000})) as server, server.client() as client:
        for path in ("/uploads", "/uploads/any"):
            answer = await client.options(path)
            assert answer.status_code == 204
            assert answer.headers["Tus-Version"] == "1.0.0"
            assert answer.headers["Tus-Max-Size"] == "5000"
            assert set(answer.headers["Tus-Checksum-Algorithm"].split(",")) == set(ALGORITHMS)
            assert set(answer.headers["Tus-Extension"].split(",")) == {
                *("creation", "creation-with-upload", "creation-defer-length"),
                *("checksum", "expiration", "termination"),
            }
        assert answer.headers["Allow"] == "DELETE, HEAD, OPTIONS, PATCH"


async def test_a_file_of_no_bytes_is_complete_at_once() -> None:
    async with serving() as server, server.client() as client:
        assert await stored(server, await create(client, 0)) == b""


async def test_the_first_bytes_may_come_with_the_creation() -> None:
    data = os.urandom(200_000)
    async with serving() as server, server.client() as client:
        answer = await client.post("/uploads", headers={**BYTES, "Upload-Length": "200000"}, content=data[:150_000])
        assert (answer.status_code, answer.headers["Upload-Offset"]) == (201, "150000")
        path = answer.headers["Location"]
        assert (await patch(client, path, 150_000, data[150_000:])).status_code == 204
        assert await stored(server, path) == data


async def test_a_creation_whose_bytes_are_refused_leaves_nothing() -> None:
    async with serving() as server, server.client() as client:
        headers = {**BYTES, "Upload-Length": "5", "Upload-Checksum": checksum(b"other")}
        assert (await client.post("/uploads", headers=headers, content=b"hello")).status_code == 460
        headers = {**BYTES, "Upload-Length": "4"}
        assert (await client.post("/uploads", headers=headers, content=b"hello")).status_code == 413
        assert files(server) == set()


async def test_the_length_may_be_said_later_and_only_once() -> None:
    async with serving() as server, server.client() as client:
        answer = await client.post("/uploads", headers={**TUS, "Upload-Defer-Length": "1"})
        path = answer.headers["Location"]
        assert (await patch(client, path, 0, b"hello ")).status_code == 204
        head = await client.head(path, headers=TUS)
        assert head.headers["Upload-Defer-Length"] == "1"
        assert "Upload-Length" not in head.headers
        assert (await patch(client, path, 6, b"", Upload_Length="5")).status_code == 400
        assert (await patch(client, path, 6, b"wor", Upload_Length="11")).status_code == 204
        assert (await patch(client, path, 9, b"", Upload_Length="12")).status_code == 400
        assert (await patch(client, path, 9, b"ld", Upload_Length="11")).status_code == 204
        head = await client.head(path, headers=TUS)
        assert head.headers["Upload-Length"] == "11"
        assert "Upload-Defer-Length" not in head.headers
        assert await stored(server, path) == b"hello world"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_bytes_with_the_wrong_checksum_do_not_count(algorithm: str) -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 10)
        assert (
            await patch(client, path, 0, b"hello", Upload_Checksum=checksum(b"hello", algorithm))
        ).status_code == 204
        answer = await patch(client, path, 5, b"WORLD", Upload_Checksum=checksum(b"world", algorithm))
        assert (answer.status_code, answer.json()["code"]) == (460, "checksum_mismatch")
        assert await offset_of(client, path) == 5
        assert (await patch(client, path, 5, b"wo")).status_code == 204
        assert (await patch(client, path, 7, b"rld", Upload_Checksum=checksum(b"rld", algorithm))).status_code == 204
        assert await stored(server, path) == b"helloworld"


async def test_a_body_may_be_larger_than_those_of_other_routes_and_a_json_body_may_not() -> None:
    data = os.urandom(1_000_000)
    async with serving(settings_of(limits={"body_bytes": 1000})) as server, server.client() as client:
        path = await create(client, len(data))
        assert (await patch(client, path, 0, data)).status_code == 204
        assert await stored(server, path) == data
        assert (await client.post("/sessions", content=b" " * 1001)).status_code == 413


async def test_a_client_that_can_only_post_says_which_method_it_means() -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 5)
        headers = {**BYTES, "Upload-Offset": "0", "X-HTTP-Method-Override": "PATCH"}
        assert (await client.post(path, headers=headers, content=b"hello")).status_code == 204
        head = await client.post(path, headers={**TUS, "X-HTTP-Method-Override": "HEAD"})
        assert (head.status_code, head.headers["Upload-Offset"]) == (200, "5")
        assert (await client.post(path, headers={**TUS, "X-HTTP-Method-Override": "DELETE"})).status_code == 204
        assert (await client.head(path, headers=TUS)).status_code == 404
        override = {"X-HTTP-Method-Override": "DELETE"}
        session = (await client.post("/sessions", json={"agentId": "assistant"}, headers=override)).json()
        assert "sessionId" in session  # the header means something to tus alone


async def test_a_removed_upload_is_gone_with_its_files() -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 5)
        assert len(files(server)) == 2
        assert (await client.delete(path, headers=TUS)).status_code == 204
        for method in ("HEAD", "DELETE"):
            answer = await client.request(method, path, headers=TUS)
            assert answer.status_code == 404
            assert "Upload-Offset" not in answer.headers
        answer = await patch(client, path, 0, b"hello")
        assert (answer.status_code, answer.json()["code"]) == (404, "upload_not_found")
        assert files(server) == set()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upload-Length": "5", "Tus-Resumable": "0.2.2"}, 412),
        ({"Upload-Length": "5", "Tus-Resumable": ""}, 412),
        ({}, 400),
        ({"Upload-Length": "-1"}, 400),
        ({"Upload-Length": "5.0"}, 400),
        ({"Upload-Length": "1e3"}, 400),
        ({"Upload-Length": "９"}, 400),
        ({"Upload-Length": "9" * 30}, 400),
        ({"Upload-Length": "1001"}, 413),
        ({"Upload-Defer-Length": "2"}, 400),
        ({"Upload-Length": "5", "Upload-Defer-Length": "1"}, 400),
        ({"Upload-Length": "5", "Upload-Metadata": "name"}, 201),
        ({"Upload-Length": "5", "Upload-Metadata": ""}, 201),
        ({"Upload-Length": "5", "Upload-Metadata": "a YQ==, b Yg=="}, 201),
        ({"Upload-Length": "5", "Upload-Metadata": "a YQ==,a YQ=="}, 400),
        ({"Upload-Length": "5", "Upload-Metadata": "a not-base64"}, 400),
        ({"Upload-Length": "5", "Upload-Metadata": "a YQ== YQ=="}, 400),
        ({"Upload-Length": "5", "Upload-Metadata": "a YQ==,,b YQ=="}, 400),
        ({"Upload-Length": "5", "Upload-Metadata": "n\u00e4me YQ=="}, 400),
        ({"Upload-Length": "5", "Upload-Metadata": "a " + "YWFh" * 1100}, 400),
    ],
    ids=repr,
)
async def test_a_creation_is_read_strictly(headers: dict[str, str], status: int) -> None:
    async with serving(settings_of(uploads={"max_bytes": 1000})) as server, server.client() as client:
        raw = [(name.encode(), value.encode()) for name, value in {**TUS, **headers}.items()]
        answer = await client.post("/uploads", headers=raw)
        assert answer.status_code == status, answer.text
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        if status == 412:
            assert answer.headers["Tus-Version"] == "1.0.0"
        if status >= 400:
            assert files(server) == set()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Tus-Resumable": "2.0.0"}, 412),
        ({"Content-Type": "application/octet-stream"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "Application/Offset+Octet-Stream; a=b"}, 204),
        ({"Upload-Offset": ""}, 400),
        ({"Upload-Offset": "two"}, 400),
        ({"Upload-Offset": "0"}, 409),
        ({"Upload-Offset": "3"}, 409),
        ({"Upload-Checksum": "crc32 AAAAAA=="}, 400),
        ({"Upload-Checksum": "sha1"}, 400),
        ({"Upload-Checksum": "sha1 AAAA"}, 400),
        ({"Upload-Checksum": "sha1 not base64"}, 400),
        ({"Upload-Length": "11"}, 400),
    ],
    ids=repr,
)
async def test_a_refused_piece_leaves_the_upload_as_it_was(headers: dict[str, str], status: int) -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 10)
        await patch(client, path, 0, b"he")
        answer = await client.patch(path, headers={**BYTES, "Upload-Offset": "2", **headers}, content=b"llo")
        assert answer.status_code == status, answer.text
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        assert await offset_of(client, path) == (5 if status == 204 else 2)
        answer = await client.patch(path, headers={"Upload-Offset": "2"}, content=b"llo")
        assert answer.status_code == 412


async def test_more_bytes_than_the_length_are_refused_announced_or_not() -> None:
    async def chunks() -> Any:  # httpx takes an iterator, and sends it chunked
        for _ in range(4):
            yield b"xxxx"

    async with serving() as server, server.client() as client:
        path = await create(client, 10)
        answer = await patch(client, path, 0, b"x" * 11)
        assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
        assert await offset_of(client, path) == 0
        assert (await patch(client, path, 0, chunks())).status_code == 413
        offset = await offset_of(client, path)
        assert offset <= 10
        assert (await patch(client, path, offset, b"y" * (10 - offset))).status_code == 204
        assert await stored(server, path) == b"x" * offset + b"y" * (10 - offset)
        assert (await patch(client, path, 10, b"z")).status_code == 413


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "..", "%2e%2e", "lock", "x.data", "a%00b", "%2fetc%2fpasswd"]
)
async def test_no_name_from_outside_leads_to_a_file(name: str) -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 5)
        before = files(server)
        for url in (f"/uploads/{name}", f"{path}.data", f"{path}%2f..%2flock", f"/uploads/../uploads/{name}"):
            for method in ("HEAD", "PATCH", "DELETE"):
                async with await trio.open_tcp_stream(*server.address) as stream:
                    head = "".join(f"{key}: {value}\r\n" for key, value in {**BYTES, "Upload-Offset": "0"}.items())
                    await stream.send_all(
                        f"{method} {url} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n{head}"
                        "Content-Length: 0\r\n\r\n".encode()
                    )
                    assert re.match(r"HTTP/1.1 (404|405|400)", await answer_of(stream))
        assert files(server) == before


async def test_somebody_elses_upload_is_like_an_unknown_one() -> None:
    async with serving(settings_of(auth={"tokens": TOKENS})) as server, server.client() as client:
        alice, bob, guest = ({"Authorization": f"Bearer {token}"} for token in (ALICE, BOB, GUEST))
        path = await create(client, 5, **alice)
        unknown = "/uploads/" + "0" * 32
        for method in ("HEAD", "PATCH", "DELETE"):
            headers = {**BYTES, **bob, "Upload-Offset": "0"}
            theirs, none = [await client.request(method, each, headers=headers) for each in (path, unknown)]
            assert theirs.status_code == none.status_code == 404
            told = [re.sub(r"[0-9a-f-]{32,36}", "", each.text) for each in (theirs, none)]
            assert told[0] == told[1]
        assert (await client.head(path, headers=TUS)).status_code == 401
        refused = await client.post("/uploads", headers={**TUS, **guest, "Upload-Length": "5"})
        assert (refused.status_code, refused.headers["Tus-Resumable"]) == (403, "1.0.0")
        assert (await patch(client, path, 0, b"hello", **alice)).status_code == 204


async def test_pages_of_allowed_origins_may_upload_and_others_may_not() -> None:
    settings = settings_of(server={"allow_origins": ["https://app.example"]})
    async with serving(settings) as server, server.client() as client:
        asked = "tus-resumable,upload-length,upload-metadata,upload-offset,upload-checksum,content-type"
        for method in ("POST", "PATCH", "HEAD", "DELETE"):
            headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": asked}
            answer = await client.options("/uploads/x", headers={"Origin": "https://app.example", **headers})
            assert answer.status_code == 204
            assert method in answer.headers["Access-Control-Allow-Methods"]
            assert answer.headers["Access-Control-Allow-Headers"].replace(" ", "") == asked
        answer = await client.post("/uploads", headers={**TUS, "Upload-Length": "5", "Origin": "https://app.example"})
        shown = answer.headers["Access-Control-Expose-Headers"]
        assert {"Location", "Upload-Offset", "Upload-Expires", "Tus-Resumable"} <= set(shown.split(", "))
        answer = await client.post("/uploads", headers={**TUS, "Upload-Length": "5", "Origin": "https://evil.example"})
        assert answer.status_code == 403


async def test_an_owner_has_so_many_uploads_and_bytes_and_all_have_so_many_together() -> None:
    limits = {"max_bytes": 100, "owner_bytes": 150, "total_bytes": 200, "per_owner": 3}
    async with serving(settings_of(auth={"tokens": TOKENS}, uploads=limits)) as server, server.client() as client:
        alice, bob = ({**TUS, "Authorization": f"Bearer {token}"} for token in (ALICE, BOB))
        first = await create(client, 100, **alice)
        more = await client.post("/uploads", headers={**alice, "Upload-Length": "51"})
        assert (more.status_code, more.json()["code"], more.headers["Retry-After"]) == (429, "rate_limited", "60")
        await create(client, 50, **alice)
        full = await client.post("/uploads", headers={**bob, "Upload-Length": "51"})
        assert (full.status_code, full.json()["code"]) == (503, "store_unavailable")
        deferred = await client.post("/uploads", headers={**bob, "Upload-Defer-Length": "1"})
        path = deferred.headers["Location"]
        assert (await patch(client, path, 0, b"x" * 50, **bob)).status_code == 204
        assert (await patch(client, path, 50, b"x", **bob)).status_code == 503
        assert (await client.delete(first, headers=alice)).status_code == 204
        assert (await patch(client, path, 50, b"x" * 50, **bob)).status_code == 204
        assert (await patch(client, path, 100, b"x", **bob)).status_code == 413
        for _ in range(2):
            await create(client, 0, **alice)
        assert (await client.post("/uploads", headers={**alice, "Upload-Length": "0"})).status_code == 429


EXPIRY = 3600


class Later:
    """What time it is for uploads: by so many seconds later than it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr("hector_trio.uploads.now_ms", lambda: now_ms() + int(self.seconds * 1000))


async def test_an_upload_expires_and_its_files_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Later(monkeypatch)
    settings = settings_of(uploads={"expiry": EXPIRY}, tasks={"sweep_interval": 0.01})
    async with serving(settings) as server, server.client() as client:
        path = await create(client, 5)
        later.seconds = EXPIRY // 2
        written = await patch(client, path, 0, b"he")
        touched = upload_at(server, path).touched
        told = parsedate_to_datetime(written.headers["Upload-Expires"]).timestamp()
        assert abs(told - touched / 1000 - EXPIRY) <= 1
        later.seconds += EXPIRY - HANG
        assert (await client.head(path, headers=TUS)).status_code == 200
        later.seconds += HANG
        assert (await client.head(path, headers=TUS)).status_code == 404
        assert (await patch(client, path, 2, b"llo")).status_code == 404
        with trio.fail_after(HANG):
            while files(server):
                await trio.lowlevel.checkpoint()


async def test_while_the_server_drains_uploads_wait_for_the_next_start() -> None:
    async with serving(settings_of(server={"shutdown_grace": 5})) as server, server.client() as client:
        path = await create(client, 5)
        async with server.client() as other:
            task = {"input": {"content": "Count to 100000"}}
            await other.post("/agents/assistant/tasks", json=task, headers={"Prefer": "respond-async"})
            server.stop.set()
            await server.engine.drain_started.wait()
            answer = await patch(client, path, 0, b"hello")
            assert (answer.status_code, answer.json()["code"]) == (503, "draining")
            assert "Retry-After" in answer.headers
            assert await offset_of(client, path) == 0


# --- clients that leave, stall, collide -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_what_arrived_before_a_cut_is_kept_and_the_upload_can_go_on_at_once(how: str) -> None:
    data = os.urandom(400_000)
    async with serving() as server, server.client() as client:
        path = await create(client, len(data))
        async with patching(server.url, path, 0, len(data), data[:250_000]) as stream:
            await wait_for_offset(client, path, 250_000)
            await stream.send_all(data[250_000:300_000])
            await leave(stream, how)
            with trio.fail_after(10):
                while upload_at(server, path).writing is not None:
                    await trio.lowlevel.checkpoint()
        offset = await offset_of(client, path)
        assert 250_000 <= offset <= 300_000
        if how == "fin":
            assert offset == 300_000
        assert (await patch(client, path, offset, data[offset:])).status_code == 204
        assert await stored(server, path) == data


async def test_of_bytes_with_a_checksum_a_cut_keeps_none() -> None:
    data = os.urandom(200_000)
    async with serving() as server, server.client() as client:
        path = await create(client, len(data))
        assert (await patch(client, path, 0, data[:1000], Upload_Checksum=checksum(data[:1000]))).status_code == 204
        sum_of_all = {"Upload-Checksum": checksum(data[1000:])}
        file = server.services.uploads._data(upload_at(server, path))
        async with patching(server.url, path, 1000, len(data) - 1000, data[1000:150_000], **sum_of_all) as stream:
            with trio.fail_after(10):
                while file.stat().st_size < 150_000:
                    await trio.lowlevel.checkpoint()
            assert await offset_of(client, path) == 1000
            await leave(stream, "fin")
            await answer_of(stream)
        with trio.fail_after(10):
            while upload_at(server, path).writing is not None:
                await trio.lowlevel.checkpoint()
        assert (await offset_of(client, path), file.stat().st_size) == (1000, 1000)
        assert (await patch(client, path, 1000, data[1000:], Upload_Checksum=checksum(data[1000:]))).status_code == 204
        assert await stored(server, path) == data


async def test_of_two_at_once_the_second_is_refused_and_goes_on_when_the_first_has_stalled(clock: MockClock) -> None:
    data = os.urandom(100_000)
    async with serving() as server, server.client() as client:
        path = await create(client, len(data))
        async with patching(server.url, path, 0, len(data), data[:60_000]) as stalled:
            await wait_for_offset(client, path, 60_000)
            refused = await patch(client, path, 60_000, data[60_000:])
            assert (refused.status_code, refused.json()["code"]) == (423, "upload_locked")
            assert await offset_of(client, path) == 60_000
            await skip(clock, STALLED)
            answer = await patch(client, path, 60_000, data[60_000:])
            assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(len(data)))
            assert "upload_locked" in await answer_of(stalled)
        assert await stored(server, path) == data


async def test_many_at_once_never_mix_their_bytes() -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 2_000_000)
        statuses: list[int] = []

        async def write(byte: bytes) -> None:
            async with server.client() as own:
                statuses.append((await patch(own, path, 0, byte * 1_000_000)).status_code)

        async with trio.open_nursery() as nursery:
            for byte in (b"a", b"b", b"c", b"d", b"e"):
                nursery.start_soon(write, byte)
        assert sorted(set(statuses))[0] == 204
        assert statuses.count(204) == 1
        assert set(statuses) <= {204, 409, 423}
        assert await offset_of(client, path) == 1_000_000
        assert (await patch(client, path, 1_000_000, b"z" * 1_000_000)).status_code == 204
        assert len(set((await stored(server, path))[:1_000_000])) == 1


async def test_a_client_that_falls_silent_is_told_so_and_what_it_sent_is_kept() -> None:
    async with serving(settings_of(limits={"body_timeout": 0.3})) as server, server.client() as client:
        path = await create(client, 1000)
        async with patching(server.url, path, 0, 1000, b"x" * 600) as stream:
            assert (await answer_of(stream)).startswith("HTTP/1.1 408")
        with trio.fail_after(10):
            while upload_at(server, path).writing is not None:
                await trio.lowlevel.checkpoint()
        assert await offset_of(client, path) == 600
        assert (await patch(client, path, 600, b"x" * 400)).status_code == 204


async def test_removing_an_upload_ends_the_request_that_writes_to_it() -> None:
    async with serving() as server, server.client() as client:
        path = await create(client, 1000)
        async with patching(server.url, path, 0, 1000, b"x" * 600) as stream:
            await wait_for_offset(client, path, 600)
            assert (await client.delete(path, headers=TUS)).status_code == 204
            assert "HTTP/1.1 423" in await answer_of(stream)
        assert files(server) == set()


async def test_a_server_that_ends_keeps_what_had_arrived(tmp_path: Path, clock: MockClock) -> None:
    settings = settings_of(uploads={"path": str(tmp_path / "up")}, server={"shutdown_grace": 0})
    async with serving(settings) as server, server.client() as client:
        path = await create(client, 1000)
        async with patching(server.url, path, 0, 1000, b"x" * 600) as stream:
            await wait_for_offset(client, path, 600)
            server.stop.set()
            await skip(clock, CLOSING_LIMIT)
            await answer_of(stream)
    async with serving(settings) as server, server.client() as client:
        assert await offset_of(client, path) == 600
        assert (await patch(client, path, 600, b"x" * 400)).status_code == 204
        assert await stored(server, path) == b"x" * 1000


# --- tuspy ------------------------------------------------------------------------------------------------------------


TUSPY = """
import sys
from tusclient.client import TusClient

url, path = sys.argv[1:]
client = TusClient(url)
first = client.uploader(path, chunk_size=100_000, metadata={"filename": "data.bin"}, upload_checksum=True)
first.upload_chunk()
first.upload_chunk()
again = client.uploader(path, chunk_size=150_000, url=first.url, upload_checksum=True)
assert again.offset == 200_000, again.offset
again.upload()
assert again.offset == again.get_file_size()
print(again.url)
"""


async def test_tuspy_uploads_in_pieces_and_resumes(tmp_path: Path) -> None:
    data = os.urandom(1_000_003)
    (tmp_path / "data.bin").write_bytes(data)
    async with serving() as server:
        with trio.fail_after(HANG):
            done = await trio.run_process(
                [sys.executable, "-c", TUSPY, f"{server.url}/uploads", str(tmp_path / "data.bin")], capture_stdout=True
            )
        url = done.stdout.decode().strip()
        assert url.startswith(f"{server.url}/uploads/")
        assert await stored(server, url) == data
        assert (await server.services.uploads.use("local", url.rpartition("/")[2], "x/y")).name == "data.bin"


# --- in a task --------------------------------------------------------------------------------------------------------


async def whole(ctx: Context) -> None:
    """Says what it was given, and hashes it in pieces."""
    file = await ctx.upload()
    if file is None:
        await ctx.emit_text("nothing")
        return
    digest, offset = hashlib.sha256(), 0
    while piece := await file.read(offset, 50_000):
        offset += len(piece)
        digest.update(piece)
    await ctx.emit_text(f"{file.media_type} {file.name} {file.size} {digest.hexdigest()}")


def blocking(ctx: SyncContext) -> None:
    file = ctx.upload()
    ctx.emit_text("nothing" if file is None else hashlib.sha256(file.path.read_bytes()).hexdigest())


async def asking(ctx: Context) -> None:
    if ctx.resume is None:
        await ctx.ask("Which file?")
    await whole(ctx)


AGENTS = {
    name: FunctionAgent(AgentInfo(name, name), function)
    for name, function in (("whole", whole), ("blocking", blocking), ("asking", asking))
}


async def finished(client: httpx2.AsyncClient, data: bytes, **headers: str) -> str:
    """The id of a new upload that holds ``data``."""
    path = await create(client, len(data), **headers)
    authorization = {name: value for name, value in headers.items() if name == "Authorization"}
    assert (await patch(client, path, 0, data, **authorization)).status_code == 204
    return path.rpartition("/")[2]


@pytest.mark.parametrize("agent", ["whole", "blocking"])
async def test_an_agent_reads_the_upload_that_its_input_names(agent: str) -> None:
    data = os.urandom(170_000)
    async with serving(agents=AGENTS) as server, server.client() as client:
        upload_id = await finished(client, data, **{"Upload-Metadata": "filename YS5wbmc="})
        body = {"input": {"type": "image/png", "uploadId": upload_id}}
        task = (await client.post(f"/agents/{agent}/tasks", json=body)).json()
        assert task["status"] == "completed", task
        digest = hashlib.sha256(data).hexdigest()
        assert task["output"]["content"] == (f"image/png a.png 170000 {digest}" if agent == "whole" else digest)
        task = (await client.post(f"/agents/{agent}/tasks", json={"input": {"content": "x"}})).json()
        assert task["output"]["content"] == "nothing"


async def test_over_a_websocket_too() -> None:
    async with serving(agents=AGENTS) as server, server.client() as client:
        upload_id = await finished(client, b"hello")
        async with connected(server, "whole") as peer:
            await peer.send({"taskId": "good", "input": {"type": "text/x", "uploadId": upload_id}})
            assert (await peer.read_to_final())[-1]["status"] == "completed"
            await peer.send({"taskId": "bad", "input": {"type": "text/x", "uploadId": "0" * 32}})
            refused = await peer.read()
            assert (refused["taskId"], refused["seq"], refused["code"]) == ("bad", 0, "invalid_request")


async def test_only_a_finished_upload_of_ones_own_can_be_named() -> None:
    async with serving(settings_of(auth={"tokens": TOKENS}), AGENTS) as server, server.client() as client:
        alice, bob = ({"Authorization": f"Bearer {token}"} for token in (ALICE, BOB))
        good = await finished(client, b"hello", **alice)
        half = (await create(client, 5, **alice)).rpartition("/")[2]
        for who, upload_id in ((bob, good), (alice, half), (alice, "nothing"), (alice, "../lock"), (alice, "")):
            body = {"input": {"type": "text/plain", "uploadId": upload_id}}
            answer = await client.post("/agents/whole/tasks", json=body, headers=who)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
            assert answer.json()["errors"][0]["pointer"] == "/input/uploadId"
        answer = await client.post("/agents/whole/tasks", json={"input": {"uploadId": 5}}, headers=alice)
        assert answer.json()["errors"][0]["pointer"] == "/input/uploadId"
        assert (await client.get("/agents/whole/tasks", headers=alice)).json()["total"] == 0


async def test_an_upload_may_be_the_answer_to_a_question() -> None:
    async with serving(agents=AGENTS) as server, server.client() as client:
        upload_id = await finished(client, b"hello")
        task = (await client.post("/agents/asking/tasks", json={"input": {"content": "go"}})).json()
        assert task["status"] == "input_required"
        path = f"/agents/asking/tasks/{task['taskId']}/input"
        refused = await client.post(path, json={"input": {"type": "a/b", "uploadId": "0" * 32}})
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (400, "/input/uploadId")
        task = (await client.post(path, json={"input": {"type": "a/b", "uploadId": upload_id}})).json()
        assert task["output"]["content"] == f"a/b None 5 {hashlib.sha256(b'hello').hexdigest()}"


async def test_an_upload_does_not_expire_under_a_task_and_its_owner_may_remove_it_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = Later(monkeypatch)
    asked, read = trio.Event(), trio.Event()

    async def patient(ctx: Context) -> None:
        asked.set()
        await read.wait()
        file = await ctx.upload()
        assert file is not None
        await ctx.emit_text((await file.read()).decode())

    agents = {"patient": FunctionAgent(AgentInfo("patient", "patient"), patient)}
    settings = settings_of(uploads={"expiry": EXPIRY}, tasks={"sweep_interval": 0.01})
    async with serving(settings, agents) as server, server.client() as client:
        for removed in (False, True):
            used = await finished(client, b"hello")
            body = {"input": {"type": "text/plain", "uploadId": used}}
            started = await client.post("/agents/patient/tasks", json=body, headers={"Prefer": "respond-async"})
            assert started.status_code == 202
            await asked.wait()
            others = files(server)
            unused = await create(client, 5)
            later.seconds += EXPIRY
            assert (await client.head(unused, headers=TUS)).status_code == 404
            with trio.fail_after(HANG):
                while not files(server) <= others:
                    await trio.lowlevel.checkpoint()
            if removed:
                assert (await client.delete(f"/uploads/{used}", headers=TUS)).status_code == 204
            read.set()
            row = await server.engine.store.get_task("local", "patient", started.json()["taskId"])
            assert row is not None
            with trio.fail_after(10):
                row = await server.engine.wait(row)
            if removed:
                assert row.error is not None
                assert row.error.code == "upload_gone"
            else:
                assert row.output is not None
                assert row.output.content == "hello"
            asked, read = trio.Event(), trio.Event()
