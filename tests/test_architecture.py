"""The rules of the rooms: imports point inwards, few places open nurseries, every module has its tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hector_trio"
TESTS = Path(__file__).parent

CORE = {"a2a", "errors", "config", "models", "task", "session", "sse", "reach", "waiting"}
WORK = {
    "log", "turns", "runs", "engine", "agents", "outgoing", "providers", "stores", "tree", "uploads", "push", "updates",
    "sealing", "views", "wakeup", "webhook",
}  # fmt: skip
EDGE = {
    "__init__", "__main__", "asgi", "auth", "claims", "cli", "client", "connection", "frames", "hector", "http1",
    "http2", "jwks", "observability", "server", "transports",
}  # fmt: skip
NOT_IN_CORE = {"trio", "quart", "quart_trio", "hypercorn", "sqlalchemy", "httpx2", "click", "structlog"}
NOT_IN_WORK = {"quart", "quart_trio", "hypercorn", "click"}
MAY_OPEN_NURSERIES = {
    "server", "connection/socket", "engine", "agents/remote", "observability", "push", "client/stream",
    "client/websocket", "cli", "transports/websocket", "transports/sse", "transports/quart_app", "transports/direct",
    "transports/a2a_grpc",
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def ring_of(name: str) -> int:
    room = name.split("/")[0]
    return 0 if room in CORE else 1 if room in WORK else 2


def imports(path: Path) -> set[str]:
    """Every module named by an import, also inside functions, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    package = ["hector_trio", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def own(found: set[str]) -> set[str]:
    """Our modules among ``found``, as names like ``stores/sql``."""
    names = {each.removeprefix("hector_trio.").replace(".", "/") for each in found if each.startswith("hector_trio.")}
    known = {name_of(path).removesuffix("/__init__") for path in MODULES}
    return {name for name in names if name in known}


def test_every_room_has_its_ring() -> None:
    assert {name_of(path).split("/")[0] for path in MODULES} <= CORE | WORK | EDGE


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_inwards(path: Path) -> None:
    ring = ring_of(name_of(path))
    outward = {name for name in own(imports(path)) if ring_of(name) > ring}
    assert not outward


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_inner_rings_do_not_know_the_outside(path: Path) -> None:
    forbidden = (NOT_IN_CORE, NOT_IN_WORK, set[str]())[ring_of(name_of(path))]
    assert not {each.split(".")[0] for each in imports(path)} & forbidden


def test_implementations_do_not_know_each_other_and_only_the_server_chooses() -> None:
    chosen = {
        name_of(path) for path in MODULES if path.parent.name in ("stores", "providers") and path.stem != "__init__"
    }
    implementations = chosen & {"stores/sql", "stores/memory", "providers/openai", "providers/demo"}
    for path in MODULES:
        if name_of(path) not in ("server", "cli"):
            others = (own(imports(path)) & implementations) - {name_of(path)}
            assert not others, name_of(path)


def test_only_these_places_open_nurseries() -> None:
    opening = {name_of(path) for path in MODULES if "open_nursery(" in path.read_text()}
    assert opening <= MAY_OPEN_NURSERIES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nobody_catches_a_cancellation(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = "BaseException" if node.type is None else ast.unparse(node.type)
            if re.search(r"\b(Cancelled|BaseException)\b", caught):
                assert any(isinstance(each, ast.Raise) and each.exc is None for each in ast.walk(node)), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_in_its_first_line_what_belongs_in_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.splitlines()[0].strip().endswith((".", ":"))


def test_every_module_has_its_tests() -> None:
    tests = {path.stem.removeprefix("test_") for path in TESTS.rglob("test_*.py")}
    exempt = {"__init__", "__main__", "errors"}
    missing = {
        name_of(path)
        for path in MODULES
        if path.stem not in exempt | tests and "migrations" not in name_of(path) and path.parent.name not in tests
    }
    assert not missing


def test_only_the_connection_chooses_a_protocol_and_knows_what_is_inside_hypercorn() -> None:
    know = {name_of(path) for path in MODULES if any(each.startswith("hypercorn") for each in imports(path))}
    assert {name.split("/")[0] for name in know} == {"connection", "http2"}
    assert {name_of(path) for path in MODULES if "http2" in own(imports(path))} == {"connection/socket"}
