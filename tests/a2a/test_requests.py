"""What requests of A2A are held to."""

from __future__ import annotations

import pytest

from hector_trio.a2a import errors, requests
from hector_trio.a2a import types as a2a


@pytest.mark.parametrize(
    ("text", "version"),
    [(None, "0.3"), ("", "0.3"), ("  ", "0.3"), ("0.3", "0.3"), ("0.3.7", "0.3"), ("1.0", "1.0"), (" 1.0.99 ", "1.0")],
)
def test_a_version_is_major_and_minor_and_none_is_0_3(text: str | None, version: str) -> None:
    assert requests.version_of(text) == version


@pytest.mark.parametrize("text", ["1.1", "2.0", "1", "one", "1.0.0.0", "0.2", "-1.0", "99.0"])
def test_other_versions_are_refused(text: str) -> None:
    with pytest.raises(errors.VersionNotSupportedError):
        requests.version_of(text)


def test_where_0_3_is_not_spoken_a_missing_version_is_refused() -> None:
    assert requests.version_of("1.0", legacy=False) == "1.0"
    for text in (None, "", "0.3"):
        with pytest.raises(errors.VersionNotSupportedError):
            requests.version_of(text, legacy=False)


def test_extensions_are_a_list() -> None:
    assert requests.extensions_of(" urn:a , https://b/c,,") == {"urn:a", "https://b/c"}
    assert requests.extensions_of(None) == frozenset()


def test_a_body_that_is_no_json_is_told_from_one_that_is_wrong() -> None:
    for body in (b"{", b"\xff", b""):
        with pytest.raises(errors.ParseError):
            requests.decode(body, a2a.GetTaskRequest)
    with pytest.raises(errors.InvalidParamsError) as wrong:
        requests.decode(b'{"id":1}', a2a.GetTaskRequest)
    assert [each.pointer for each in wrong.value.fields] == ["id"]


def test_numbers_and_booleans_are_texts_in_a_query() -> None:
    asked = requests.from_query({"pageSize": "5", "includeArtifacts": "true", "unknown": "x"}, a2a.ListTasksRequest)
    assert asked == a2a.ListTasksRequest(page_size=5, include_artifacts=True)
    with pytest.raises(errors.InvalidParamsError):
        requests.from_query({"pageSize": "many"}, a2a.ListTasksRequest)


def test_names_with_underscores_are_read_but_not_those_that_clients_have_chosen() -> None:
    body = b"""{"message":{"message_id":"m","role":"ROLE_USER","context_id":"c",
        "parts":[{"data":{"my_key":1},"media_type":"a/b"}],"metadata":{"a_b":{"c_d":1}}},
        "configuration":{"history_length":1,"task_push_notification_config":{"url":"u","task_id":"t"}}}"""
    asked = requests.decode(body, a2a.SendMessageRequest)
    assert asked.message == a2a.Message(
        "m",
        "ROLE_USER",
        [a2a.Part(data={"my_key": 1}, media_type="a/b")],
        context_id="c",
        metadata={"a_b": {"c_d": 1}},
    )
    assert asked.configuration is not None
    assert asked.configuration.task_push_notification_config == a2a.TaskPushNotificationConfig("u", task_id="t")


def test_a_time_is_milliseconds_rounded_up() -> None:
    assert requests.milliseconds("f", "1970-01-01T00:00:01Z") == 1000
    assert requests.milliseconds("f", "1970-01-01T00:00:00.0001Z") == 1
    assert requests.milliseconds("f", "1970-01-01T01:00:00.5+01:00") == 500
    assert requests.milliseconds("f", None) is None
    for wrong in ("now", "1970-01-01", "1970-01-01T00:00:00", "x" * 1000):
        with pytest.raises(errors.InvalidParamsError):
            requests.milliseconds("f", wrong)
