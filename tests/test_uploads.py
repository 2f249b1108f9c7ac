"""Uploads and what happens to the process and the disk under them: restart, kill -9, a full disk, a large file."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.errors import InvalidRequest, StartError
from hector_trio.uploads import Upload, open_uploads, parse_metadata
from tests import HANG
from tests.serving import settings_of
from tests.test_cli import Running, served
from tests.tus import TUS, checksum, create, offset_of, patch, patching, wait_for_offset

FOLDER = Path(".hector") / "hector.db-uploads"


class Pieces:
    """The body of a request that has come whole."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = iter(pieces)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration

    def arrived(self) -> bytes:
        return b""


def client_of(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=20, trust_env=False)


def settings_in(folder: Path, **more: Any) -> Any:
    return settings_of(uploads={"path": str(folder)}, **more)


async def used(uploads: Any, upload: Upload) -> bytes:
    file = await uploads.use("o", upload.upload_id, "a/b")
    return bytes(file.path.read_bytes())


# --- the process ------------------------------------------------------------------------------------------------------


async def test_an_upload_goes_on_after_a_restart(tmp_path: Path) -> None:
    data = os.urandom(150_000).hex().encode()
    async with served(tmp_path) as (process, url), client_of(url) as client:
        path = await create(client, len(data), **{"Upload-Metadata": "filename YQ=="})
        assert (await patch(client, path, 0, data[:100_000])).status_code == 204
        process.process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    async with served(tmp_path) as (_, url), client_of(url) as client:
        head = await client.head(path, headers=TUS)
        assert (head.headers["Upload-Offset"], head.headers["Upload-Metadata"]) == ("100000", "filename YQ==")
        assert (await patch(client, path, 100_000, data[100_000:])).status_code == 204
        assert (tmp_path / FOLDER / f"{path.rpartition('/')[2]}.data").read_bytes() == data
        body = {"input": {"type": "text/plain", "content": "Count to 1", "uploadId": path.rpartition("/")[2]}}
        assert (await client.post("/agents/assistant/tasks", json=body)).json()["status"] == "completed"


@pytest.mark.parametrize("durability", ["process", "full"])
async def test_after_kill_9_in_the_middle_every_byte_that_was_told_is_there(tmp_path: Path, durability: str) -> None:
    data = os.urandom(2_000_000)
    checked = os.urandom(1_000_000)
    async with served(tmp_path, "--durability", durability) as (process, url), client_of(url) as client:
        plain, summed = await create(client, len(data)), await create(client, len(checked))
        good = await patch(client, summed, 0, checked[:5000], Upload_Checksum=checksum(checked[:5000]))
        assert good.status_code == 204
        sum_of_rest = {"Upload-Checksum": checksum(checked[5000:])}
        file = tmp_path / FOLDER / f"{summed.rpartition('/')[2]}.data"
        async with (
            patching(url, plain, 0, len(data), data[:1_500_000]),
            patching(url, summed, 5000, len(checked) - 5000, checked[5000:900_000], **sum_of_rest),
        ):
            told = await wait_for_offset(client, plain, 1_000_000)
            with trio.fail_after(10):
                while file.stat().st_size <= 5000:
                    await trio.lowlevel.checkpoint()
            process.process.send_signal(signal.SIGKILL)
            await process.wait()
    async with served(tmp_path) as (_, url), client_of(url) as client:
        offset = await offset_of(client, plain)
        assert told <= offset <= 1_500_000
        assert (await patch(client, plain, offset, data[offset:])).status_code == 204
        assert await offset_of(client, summed) == 5000  # the rest came with a checksum that was never compared
        rest = await patch(client, summed, 5000, checked[5000:], Upload_Checksum=checksum(checked[5000:]))
        assert rest.status_code == 204
        for path, whole in ((plain, data), (summed, checked)):
            assert (tmp_path / FOLDER / f"{path.rpartition('/')[2]}.data").read_bytes() == whole


def peak_of(process: Running) -> int:
    """The most bytes of memory that a process has had."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


async def test_a_large_file_costs_no_memory(tmp_path: Path) -> None:
    size = 64 << 20
    piece = os.urandom(1 << 20)

    async def pieces() -> Any:
        for _ in range(size >> 20):
            yield piece

    async with served(tmp_path) as (process, url), client_of(url) as client:
        path = await create(client, 1000)
        assert (await patch(client, path, 0, bytes(1000))).status_code == 204
        path = await create(client, size)
        before = peak_of(process)
        with trio.fail_after(HANG):
            answer = await patch(client, path, 0, pieces(), Upload_Checksum=f"sha1 {'A' * 27}=")
            assert answer.status_code == 460
            assert (await patch(client, path, 0, pieces())).status_code == 204
        assert peak_of(process) - before < 8 << 20
        data = tmp_path / FOLDER / f"{path.rpartition('/')[2]}.data"
        with data.open("rb") as file:
            assert all(file.read(1 << 20) == piece for _ in range(size >> 20))


async def test_a_full_disk_refuses_and_keeps_what_it_has_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    async with served(tmp_path, "--store", "memory") as (process, url), client_of(url) as client:
        path = await create(client, len(data))
        pid = process.process.pid
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        refused = await patch(client, path, 0, data)
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        assert refused.json()["retryable"] is True
        assert str(tmp_path) not in refused.text
        assert await offset_of(client, path) == 1_000_000
        summed = await patch(client, path, 1_000_000, data[1_000_000:], Upload_Checksum=checksum(data[1_000_000:]))
        assert summed.status_code == 503
        assert await offset_of(client, path) == 1_000_000
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        assert (await client.post("/uploads", headers={**TUS, "Upload-Length": "5"})).status_code == 503
        assert await offset_of(client, path) == 1_000_000
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert (await patch(client, path, 1_000_000, data[1_000_000:])).status_code == 204
        body = {"input": {"type": "a/b", "uploadId": path.rpartition("/")[2], "content": "Hello"}}
        task = (await client.post("/agents/assistant/tasks", json=body)).json()
        assert task["error"]["code"] == "unsupported_upload"  # it is there, and no text for a model


# --- the folder -------------------------------------------------------------------------------------------------------


async def test_a_folder_belongs_to_one_server_at_a_time(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "up")
    async with open_uploads(settings):
        with pytest.raises(StartError, match="in use by another process"):
            async with open_uploads(settings):
                pass
    async with open_uploads(settings):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be used"):
        async with open_uploads(settings_in(tmp_path / "file" / "up")):
            pass


async def test_a_temporary_folder_is_removed_at_the_end() -> None:
    async with open_uploads(settings_of()) as uploads:
        upload = await uploads.create("o", 5, "")
        file = uploads._data(upload)
        assert file.exists()
        assert file.stat().st_mode & 0o077 == 0
    assert not file.parent.exists()


async def test_what_a_crash_left_half_made_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    async with open_uploads(settings_in(tmp_path)) as uploads:
        upload = await uploads.create("o", 5, "")
    record = (tmp_path / f"{upload.upload_id}.json").read_bytes()
    ids = [digit * 32 for digit in "abcde"]
    (tmp_path / f"{ids[0]}.data").write_bytes(b"no record")
    (tmp_path / f"{ids[1]}.json").write_bytes(record)  # no data
    (tmp_path / f"{ids[2]}.new").write_bytes(record)
    (tmp_path / f"{ids[3]}.json").write_bytes(b"{")
    (tmp_path / f"{ids[3]}.data").write_bytes(b"x")
    (tmp_path / f"{ids[4]}.json").write_bytes(record)  # the record of another
    (tmp_path / f"{ids[4]}.data").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    async with open_uploads(settings_in(tmp_path)) as uploads:
        kept = {f"{upload.upload_id}.data", f"{upload.upload_id}.json", "lock", "notes.txt"}
        assert set(os.listdir(tmp_path)) == kept
        found = uploads.find("o", upload.upload_id)
        await uploads.append(found, 0, Pieces(b"he", b"llo"))
        assert await used(uploads, found) == b"hello"


async def test_a_file_that_somebody_has_shortened_is_refused_and_not_filled_with_zeros(tmp_path: Path) -> None:
    async with open_uploads(settings_in(tmp_path)) as uploads:
        upload = await uploads.create("o", 10, "")
        await uploads.append(upload, 0, Pieces(b"hello"))
        os.truncate(uploads._data(upload), 2)
        with pytest.raises(Exception, match="refuses"):
            await uploads.append(upload, 5, Pieces(b"world"))
    async with open_uploads(settings_in(tmp_path)) as uploads:
        assert uploads.find("o", upload.upload_id).offset == 2


async def test_limits_count_what_was_there_at_the_start(tmp_path: Path) -> None:
    async with open_uploads(settings_in(tmp_path)) as uploads:
        await uploads.create("o", 100, "")
        deferred = await uploads.create("o", None, "")
        await uploads.append(deferred, 0, Pieces(b"x" * 50))
    limits = {"path": str(tmp_path), "max_bytes": 200, "owner_bytes": 200, "total_bytes": 200}
    async with open_uploads(settings_of(uploads=limits)) as uploads:
        with pytest.raises(Exception, match="at most 200 bytes together"):
            await uploads.create("o", 51, "")
        upload = await uploads.create("o", 50, "")
        await uploads.remove(upload)
        await uploads.create("o", 50, "")


async def test_the_kept_time_of_a_used_upload_survives_a_restart(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with open_uploads(settings) as uploads:
        upload = await uploads.create("o", 0, "")
        before = uploads.expires_at(upload)
        await uploads.use("o", upload.upload_id, "a/b")
        kept = uploads.expires_at(upload)
        assert kept - before >= (settings.tasks.max_timeout + settings.tasks.input_timeout) * 1000
    async with open_uploads(settings) as uploads:
        assert uploads.expires_at(uploads.find("o", upload.upload_id)) == kept
        with pytest.raises(InvalidRequest):
            await uploads.use("somebody", upload.upload_id, "a/b")


async def test_a_cancel_between_two_pieces_keeps_the_first(tmp_path: Path) -> None:
    class Endless(Pieces):
        async def __anext__(self) -> bytes:
            for piece in self._pieces:
                return piece
            scope.cancel()
            await trio.sleep_forever()
            raise AssertionError

        def arrived(self) -> bytes:
            return b"!!"

    async with open_uploads(settings_in(tmp_path)) as uploads:
        upload = await uploads.create("o", 6, "")
        with trio.CancelScope() as scope:
            await uploads.append(upload, 0, Endless(b"hello"))
        assert scope.cancelled_caught
        assert upload.offset == 6  # of what had arrived, what belongs to it
        assert await used(uploads, upload) == b"hello!"


def test_metadata_is_pairs_of_keys_and_base64() -> None:
    assert parse_metadata("filename d29ybGQ=,secret,a YQ==") == {"filename": b"world", "secret": b"", "a": b"a"}
    for wrong in ("", ",", "a YQ==,", "a YQ", "a Y\u00e4==", "a YQ==,a YQ=="):
        with pytest.raises(ValueError, match=r"base64|twice|pairs"):
            parse_metadata(wrong)
