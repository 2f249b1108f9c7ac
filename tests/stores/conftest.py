"""Every store there is, opened and empty."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hector_trio.stores import Store
from hector_trio.stores.memory import open_memory
from hector_trio.stores.sql import SqlStore, open_sql
from tests.stores.making import ME


@pytest.fixture(params=["sql", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        async with open_memory(ME) as memory:
            yield memory
    else:
        async with open_sql(tmp_path / "hector.db", instance=ME) as sql:
            yield sql


@pytest.fixture
async def sql(tmp_path: Path) -> AsyncIterator[SqlStore]:
    async with open_sql(tmp_path / "hector.db", instance=ME) as opened:
        yield opened
