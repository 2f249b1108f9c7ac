"""The schema and its migrations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trio
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import hector_trio.stores
from hector_trio.stores.schema import HEAD, tables
from hector_trio.stores.sql import SqlStore
from tests.stores.making import ME


async def test_the_migrations_lead_to_the_tables_that_the_code_speaks_of(sql: SqlStore) -> None:
    def compare() -> object:
        with sql._opened.reading.connect() as connection:
            return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), tables)

    assert await trio.to_thread.run_sync(compare) == []


async def test_made_by_migrations_or_from_the_metadata_the_database_is_the_same(sql: SqlStore, tmp_path: Path) -> None:
    from hector_trio.stores import sqlite

    query = (
        "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL "
        "UNION ALL SELECT 't.' || m.name, group_concat(c.name || c.type || c.pk || c.\"notnull\") "
        "FROM sqlite_schema m, pragma_table_info(m.name) c WHERE m.type = 'table' GROUP BY m.name "
        'UNION ALL SELECT \'f.\' || m.name, group_concat(f."table" || f."from" || f."to" || f.on_delete) '
        "FROM sqlite_schema m, pragma_foreign_key_list(m.name) f GROUP BY m.name "
        "UNION ALL SELECT 'o.' || name, sql LIKE '%WITHOUT ROWID%' || sql LIKE '%AUTOINCREMENT%' "
        "FROM sqlite_schema WHERE type = 'table'"
    )

    def read(path: Path) -> dict[str, str]:
        engine = sqlite.open_engine(path, "process", writes=True)
        with engine.connect() as connection:
            with connection.begin():
                tables.create_all(connection)
            rows = connection.exec_driver_sql(query).fetchall()
        return {name: " ".join(str(text).split()) for name, text in rows if "alembic" not in name}

    def compare() -> None:
        assert read(sql._opened.path) == read(tmp_path / "from-metadata.db")

    await trio.to_thread.run_sync(compare)


def test_the_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("path_separator", "os")
    config.set_main_option("script_location", str(Path(hector_trio.stores.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_the_migrations_are_found_from_any_folder_and_not_needed_when_up_to_date(tmp_path: Path) -> None:
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
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={"PYTHONPATH": root},
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert said == ["True", "False"]
