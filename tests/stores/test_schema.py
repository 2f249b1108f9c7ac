"""The schema and its migrations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trio
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import hector_trio.stores
from hector_trio.models import Content
from hector_trio.stores import Change, Segment, sqlite
from hector_trio.stores.schema import HEAD, tables
from hector_trio.stores.sql import SqlStore, open_sql
from hector_trio.task import Question
from tests.stores.making import ME, NOW, accept, chunks, idempotency, message


def migrations() -> Config:
    config = Config()
    config.set_main_option("path_separator", "os")
    config.set_main_option("script_location", str(Path(hector_trio.stores.__file__).parent / "migrations"))
    return config


def migrate(path: Path, to: str) -> None:
    """A new file as the migrations make it."""
    config = migrations()
    engine = sqlite.open_engine(path, "process", writes=True)
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, to)
        sqlite.mark(connection)


def test_the_migrations_lead_to_the_tables_that_the_code_speaks_of(tmp_path: Path) -> None:
    migrate(tmp_path / "hector.db", "head")
    with sqlite.open_engine(tmp_path / "hector.db", "process", writes=False).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), tables) == []


async def test_a_new_store_is_what_the_migrations_make(sql: SqlStore, tmp_path: Path) -> None:
    query = (
        "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL "
        "UNION ALL SELECT 't.' || m.name, "
        "group_concat(c.name || c.type || c.pk || c.\"notnull\" || coalesce(c.dflt_value, '')) "
        "FROM sqlite_schema m, pragma_table_info(m.name) c WHERE m.type = 'table' GROUP BY m.name "
        'UNION ALL SELECT \'f.\' || m.name, group_concat(f."table" || f."from" || f."to" || f.on_delete) '
        "FROM sqlite_schema m, pragma_foreign_key_list(m.name) f GROUP BY m.name "
        "UNION ALL SELECT 'o.' || name, sql LIKE '%WITHOUT ROWID%' || sql LIKE '%AUTOINCREMENT%' "
        "FROM sqlite_schema WHERE type = 'table' "
        "UNION ALL SELECT 'c.' || m.name || x.name, group_concat(x.name || x.'unique' || x.origin || x.partial) "
        "FROM sqlite_schema m, pragma_index_list(m.name) x WHERE m.type = 'table' GROUP BY m.name, x.name "
        "UNION ALL SELECT 'version', version_num FROM alembic_version "
        "UNION ALL SELECT 'application', application_id FROM pragma_application_id"
    )

    def read(path: Path) -> dict[str, str]:
        with sqlite.open_engine(path, "process", writes=False).connect() as connection:
            return {name: " ".join(str(text).split()) for name, text in connection.exec_driver_sql(query).fetchall()}

    def compare() -> None:
        migrate(tmp_path / "migrated.db", "head")
        made = read(sql._opened.path)
        assert made == read(tmp_path / "migrated.db")
        assert made["version"] == HEAD

    await trio.to_thread.run_sync(compare)


def test_the_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(migrations()).get_current_head() == HEAD


def make_first_schema(path: Path) -> None:
    """A file as the first version left it, with a session, its conversation, a task that ended and one that waits."""
    migrate(path, "0001")
    with sqlite.open_engine(path, "process", writes=True).connect() as connection, connection.begin():
        for statement in (
            "INSERT INTO sessions VALUES "
            "(1, 'alice', 's', 'a', 1000000, 1000005, NULL, 9223372036854775807, '{\"n\":1}', '{}')",
            "INSERT INTO tasks VALUES "
            "(1, 'alice', 'a', 't~1', 't', 1, 'completed', 'f', 'cancel', 'old', 1000000, 1000005, 's', 1, 3), "
            "(2, 'alice', 'a', 't', 't', 0, 'input_required', 'f', 'grace:5', 'old', 1000001, NULL, NULL, NULL, 1)",
            'INSERT INTO bodies VALUES (1, \'{}\', \'{"m":1}\', \'{"type":"text/plain","content":"ü"}\', NULL), '
            "(2, '{\"input\":{}}', '{}', NULL, NULL)",
            "INSERT INTO segments VALUES (1, 1, 2, CAST('a' || char(10) || 'b' AS BLOB)), "
            "(1, 3, 3, CAST('end' AS BLOB)), (2, 1, 1, CAST('?' AS BLOB))",
            "INSERT INTO messages VALUES (1, 1, 1, 't', 'a', 'user', 'text/plain', '\"hello\"', 1000000, NULL)",
            "INSERT INTO idempotency VALUES ('alice', 'POST /agents/a/tasks', 'k', 'b', 9000000, 1)",
        ):
            connection.exec_driver_sql(statement)


async def test_a_store_of_the_first_schema_is_brought_up_to_date_with_all_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    await trio.to_thread.run_sync(make_first_schema, path)
    for _ in range(2):
        async with open_sql(path, instance=ME) as store:
            ended = await store.get_task("alice", "a", "t~1")
            assert ended is not None
            assert (ended.metadata, ended.output, ended.question) == ({"m": 1}, Content("text/plain", "ü"), None)
            assert await store.read_log(1, 0, 99) == [Segment(1, 2, b"a\nb"), Segment(3, 3, b"end")]
            waiting = await store.get_task("alice", "a", "t")
            assert waiting is not None
            assert (waiting.status, waiting.policy, waiting.question) == ("input_required", "grace:5", None)
            assert await store.history("alice", "s", limit=9) == [message("hello", "t~1")]
            session = await store.get_session("alice", "s", now=NOW)
            assert session is not None
            assert session.state == {"n": 1}
            replayed = await store.find_idempotent("alice", idempotency(), now=NOW)
            assert replayed is not None
            assert replayed.task == ended
    async with open_sql(path, instance=ME) as store:
        (taken,) = await store.take_over(ME)
        question = Question("Which?", NOW)
        await store.append([chunks(taken.key, 2, b"?", change=Change("input_required", question=question))])
        assert (await accept(store, "new")).key == 3
    async with open_sql(path, instance=ME) as store:
        row = await store.get_task("alice", "a", "t")
        assert row is not None
        assert row.question == question


def test_the_migrations_are_found_from_any_folder_and_needed_by_an_older_store_alone(tmp_path: Path) -> None:
    program = f"""
import sys, trio
from hector_trio.stores.sql import open_sql
async def main():
    async with open_sql("hector.db", instance="{ME}") as store:
        await store.check()
trio.run(main)
print("alembic" in sys.modules)
"""
    root = str(Path(hector_trio.__path__[0]).parent)

    def alembic_was_imported() -> str:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={"PYTHONPATH": root},
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.strip()

    assert [alembic_was_imported() for _ in range(2)] == ["False", "False"]
    (tmp_path / "hector.db").unlink()
    make_first_schema(tmp_path / "hector.db")
    assert [alembic_was_imported() for _ in range(2)] == ["True", "False"]
