"""The description of the server: a valid one, that the server keeps when it is driven from it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
import trio

from hector_trio import models
from hector_trio.transports.openapi import document, refusals
from hector_trio.transports.problems import STATUS
from hector_trio.transports.rest import ROUTES
from tests import HANG
from tests.serving import serving, settings_of

TOKEN = "token-for-the-machine-that-tries-everything"


def described(*, secured: bool = False) -> Any:
    return msgspec.to_builtins(document(ROUTES, "http://localhost:8080", secured=secured))


@pytest.mark.parametrize("secured", [False, True])
def test_the_description_is_valid_openapi(secured: bool) -> None:
    schemathesis.openapi.from_dict(described(secured=secured)).validate()


def test_every_route_is_described_with_every_status_it_may_answer() -> None:
    paths = described(secured=True)["paths"]
    assert sum(len(methods) for methods in paths.values()) == len(ROUTES)
    for route in ROUTES:
        operation = paths[route.path][route.method.lower()]
        statuses = set(route.answers) | {STATUS[error.code] for error in refusals(route, secured=True)}
        assert set(operation["responses"]) == {str(status) for status in statuses}
        named = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", route.path))


def test_every_refusal_is_a_problem_that_names_its_codes() -> None:
    for methods in described()["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert list(response["content"]) == ["application/problem+json"]
                    assert "`" in response["description"]


def test_what_can_be_streamed_is_described_as_both() -> None:
    paths = described()["paths"]
    for path, method in (
        ("/agents/{agentId}/tasks", "post"),
        ("/sessions/{sessionId}/tasks", "post"),
        ("/agents/{agentId}/tasks/{taskId}/events", "get"),
    ):
        content = paths[path][method]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


def test_credentials_are_asked_for_where_they_are_needed_and_only_there() -> None:
    assert "securitySchemes" not in described()["components"]
    secured = described(secured=True)
    assert secured["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for route in ROUTES:
        operation = secured["paths"][route.path][route.method.lower()]
        assert ("security" in operation) == (route.right is not None)


def test_the_wires_types_stand_in_the_description_by_their_names() -> None:
    schemas = described()["components"]["schemas"]
    for type_ in (models.Task, models.TaskRequest, models.Session, models.Chunk, models.Problem, models.AgentCard):
        assert type_.__name__ in schemas
    assert set(schemas["Chunk"]["required"]) == {"taskId", "seq", "chunkType", "content", "timestamp"}


SETTINGS = """
hooks = "tus"
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "409", "412", "413", "415", "422", "503"]
[checks.missing_required_header]
expected-statuses = ["400", "401", "403", "412", "415"]
"""
HOOKS = """
import schemathesis
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
"""
"""What schemathesis does not know by itself of tus."""


async def drive(url: str, folder: Path, *options: str) -> None:
    """Lets schemathesis call everything that is described, well and badly, in a process of its own.

    Not checked: that whatever fits the schema is accepted, since a page token or an entity tag must also be one of
    ours.
    """
    (folder / "schemathesis.toml").write_text(SETTINGS)
    (folder / "tus.py").write_text(HOOKS)
    program = Path(sys.executable).parent / "st"
    # fmt: off
    command = [
        str(program), "run", f"{url}/openapi.json", "--checks", "all",
        "--exclude-checks", "positive_data_acceptance", "--seed", "1", "--no-color",
        "--generation-database", "none", *options,
    ]
    # fmt: on
    with trio.fail_after(5 * HANG):
        done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout.decode()


async def test_the_server_keeps_what_is_described(tmp_path: Path) -> None:
    async with serving() as server:
        await drive(server.url, tmp_path, "--max-examples", "5")


async def test_the_server_keeps_what_is_described_with_tokens(tmp_path: Path) -> None:
    settings = settings_of(auth={"tokens": [{"name": "machine", "token": TOKEN, "role": "admin"}]})
    async with serving(settings) as server:
        options = ("-H", f"Authorization: Bearer {TOKEN}", "--phases", "coverage", "--include-path-regex", "/sessions")
        await drive(server.url, tmp_path, *options)
