"""What is SQLite's own: who may open a file, which files are refused, and how they are kept."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio
from sqlalchemy import Connection

import hector_trio
from hector_trio.errors import StartError, StoreUnavailable
from hector_trio.stores import sqlite
from hector_trio.stores.sql import SqlStore, open_sql
from tests.stores.making import ME, accept

HOLD = """
import sys, trio
from hector_trio.stores.sql import open_sql
async def main():
    async with open_sql(sys.argv[1], instance="holder"):
        print("open", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def refusal(path: Path | str) -> str:
    with pytest.raises(StartError) as caught:
        async with open_sql(path, instance=ME):
            raise AssertionError("it was opened")
    assert "\n" not in caught.value.detail
    return caught.value.detail


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that has the store open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={"PYTHONPATH": str(Path(hector_trio.__path__[0]).parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


async def test_the_folder_and_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "data" / "hector.db"
    mask = os.umask(0)
    try:
        async with open_sql(path, instance=ME) as store:
            await accept(store)
            modes = {file.name: file.stat().st_mode & 0o777 for file in [path.parent, *path.parent.iterdir()]}
    finally:
        os.umask(mask)
    assert modes == {"data": 0o700, **{f"hector.db{end}": 0o600 for end in ("", "-wal", "-shm", ".lock")}}


async def test_a_url_names_a_file_as_a_path_does(tmp_path: Path) -> None:
    async with open_sql(f"sqlite:///{tmp_path}/a.db", instance=ME) as store:
        row = await accept(store)
    async with open_sql(tmp_path / "a.db", instance=ME) as store:
        assert await store.get_task_by_key(row.key) == row


@pytest.mark.parametrize(
    "where", ["", ":memory:", "sqlite://", "sqlite:///a?mode=ro", "postgresql://h/d", "no such://", "sqlite://h/d"]
)
async def test_a_place_that_cannot_be_is_refused(where: str) -> None:
    await refusal(where)


async def test_a_second_process_is_refused_and_told_who_has_the_store(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    process = await trio.to_thread.run_sync(holder, path)
    with process:
        held = json.loads((tmp_path / "hector.db.lock").read_text())
        assert held["pid"] == process.pid
        assert held["instance"] == "holder"
        assert await refusal(path) == f"The store {path} is in use by process {process.pid} since {held['started']}"
        process.kill()
    async with open_sql(path, instance=ME) as store:
        await store.check()
        assert str(os.getpid()) in await refusal(path)
    async with open_sql(path, instance=ME) as store:
        await store.check()


async def test_a_lock_file_that_says_nothing_is_no_obstacle_and_no_help(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    lock = tmp_path / "hector.db.lock"
    lock.write_text("garbage")
    async with open_sql(path, instance=ME):
        lock.write_text("garbage")
        assert await refusal(path) == f"The store {path} is in use by another process"


async def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be made" in await refusal(tmp_path / "file" / "data" / "hector.db")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
async def test_what_is_no_file_is_refused_and_nothing_is_made_beside_it(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "hector.db")
    assert "cannot be written: it is not a regular file" in await refusal(tmp_path / "hector.db")
    assert os.listdir(tmp_path) == ["hector.db"]


async def test_a_folder_that_cannot_be_written_is_refused() -> None:
    # nobody makes files in the kernel's own folder, root included
    assert "cannot be" in await refusal("/proc/hector.db")


async def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary, " * 999)
    assert await refusal(path) == f"The file {path} is not a database"
    assert path.read_text() == "Dear diary, " * 999


async def test_another_programs_database_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    before = path.read_bytes()
    assert await refusal(path) == f"The file {path} is the database of another program"
    assert path.read_bytes() == before


async def test_a_damaged_store_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    async with open_sql(path, instance=ME) as store:
        for n in range(50):
            await accept(store, f"t{n}")
    damaged = bytearray(path.read_bytes())
    for page in range(2, len(damaged) // 4096):
        damaged[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    path.write_bytes(damaged)
    assert "is damaged" in await refusal(path)
    assert path.read_bytes() == bytes(damaged)


async def test_a_store_of_a_newer_version_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    async with open_sql(path, instance=ME):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    before = path.read_bytes()
    assert "newer version (schema 9999, this version knows" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_start_that_died_half_way_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    path.touch()
    async with open_sql(path, instance=ME) as store:
        await accept(store)


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("full", 2)])
async def test_durability_says_how_far_a_commit_goes(
    tmp_path: Path, durability: sqlite.Durability, synchronous: int
) -> None:
    def pragmas(connection: Connection) -> list[object]:
        names = ("synchronous", "journal_mode", "foreign_keys", "busy_timeout")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

    async with open_sql(tmp_path / "hector.db", durability=durability, instance=ME) as store:
        assert await store._writer.run(pragmas) == [synchronous, "wal", 1, 5000]
        assert (await store._readers.run(pragmas))[1:] == ["wal", 1, 5000]


async def test_readers_cannot_write(sql: SqlStore) -> None:
    with pytest.raises(StoreUnavailable, match="read-only"):
        await sql._readers.run(lambda c: c.exec_driver_sql("DELETE FROM tasks"))


async def test_an_instance_is_known_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"

    def known() -> list[tuple[str, int]]:
        with closing(sqlite3.connect(path)) as connection:
            return connection.execute("SELECT id, pid FROM instances").fetchall()

    process = await trio.to_thread.run_sync(holder, path)
    with process:
        process.kill()
    async with open_sql(path, instance=ME) as store:
        assert sorted(known()) == [("holder", process.pid), (ME, os.getpid())]
        await store.take_over(ME)
        assert known() == [(ME, os.getpid())]
    assert known() == []
