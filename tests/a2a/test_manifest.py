"""The manifest is whole: each demand has tests that are there, each test of the bindings is in it, once or as more."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.a2a.manifest import BEYOND, CLAUSES, Clause

TESTS = Path(__file__).parent.parent
FILES = [
    *sorted((TESTS / "transports").glob("test_a2a*.py")),
    *sorted((TESTS / "a2a").glob("test_*.py")),
    *(TESTS / name for name in ("test_push.py", "test_updates.py")),
]


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    functions = (each for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    return {each.name for each in functions if each.name.startswith("test_")}


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.id)
def test_each_demand_has_tests_that_are_there_or_is_somebody_elses(clause: Clause) -> None:
    there = set[str]().union(*map(names_in, FILES))
    assert set(clause.tests) <= there
    assert bool(clause.tests) != bool(clause.why)
    assert clause.demand


def test_no_demand_stands_twice() -> None:
    ids = [clause.id for clause in CLAUSES]
    assert len(set(ids)) == len(ids)


def test_each_test_of_the_bindings_shows_a_demand_or_is_named_as_more() -> None:
    showing = {name for clause in CLAUSES for name in clause.tests}
    for path in FILES:
        if path.parent.name == "transports":
            assert not names_in(path) - showing - BEYOND, path.name
    assert not showing & BEYOND
    assert set[str]().union(*map(names_in, FILES)) >= BEYOND
