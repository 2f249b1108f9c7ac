"""The rules on ids in paths, and replies that have no body."""

from __future__ import annotations

import pytest
from quart import Quart

from hector_trio.errors import AgentNotFound, SessionNotFound, TaskNotFound
from hector_trio.transports.routes import Reply, check_ids, json_reply, respond


@pytest.mark.parametrize(
    ("name", "error"), [("agentId", AgentNotFound), ("sessionId", SessionNotFound), ("taskId", TaskNotFound)]
)
@pytest.mark.parametrize("bad", ["..", "a b", "é", "\0", "x" * 129])
def test_what_can_be_nobodys_id_is_not_found(name: str, error: type[Exception], bad: str) -> None:
    with pytest.raises(error):
        check_ids({name: bad})
    check_ids({name: "a~1"})


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_does_not_describe_one(status: int) -> None:
    response = respond(Reply(status, headers={"ETag": '"x"'}))
    assert dict(response.headers) == {"Etag": '"x"'} or dict(response.headers) == {"ETag": '"x"'}


async def test_json_says_that_it_is_json() -> None:
    async with Quart(__name__).app_context():
        response = respond(json_reply({"a": 1}, 201, Location="/x"))
        assert (response.status_code, await response.get_data()) == (201, b'{"a":1}')
    assert (response.headers["Content-Type"], response.headers["Location"]) == ("application/json", "/x")
