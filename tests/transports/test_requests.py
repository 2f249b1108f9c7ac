"""Reading requests: whatever a client sends is either understood or refused with the place, and never breaks later."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.errors import InvalidRequest
from hector_trio.models import SessionRequest, TaskRequest
from hector_trio.transports.requests import (
    MAX_NUMBER,
    canonical,
    check_session_request,
    check_task_request,
    choice,
    decode_json,
    fault,
    is_deeper,
    metadata_filter,
    page_size,
    sequence,
)


def read(data: bytes, type_: Any = TaskRequest, depth: int = 64) -> Any:
    return decode_json(data, type_, max_depth=depth)


def refusal(data: bytes, type_: Any = TaskRequest, depth: int = 64) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        read(data, type_, depth)
    (error,) = refused.value.errors
    assert error.message in refused.value.detail
    return error.pointer, error.message


def task_faults(data: bytes) -> dict[str, str]:
    try:
        check_task_request(read(data))
    except InvalidRequest as error:
        return {each.pointer: each.message for each in error.errors}
    return {}


def test_a_task_request_is_read_and_unknown_keys_are_ignored() -> None:
    request = read(b'{"input":{"type":"text/plain","content":"hi","x":1},"taskId":"t","y":{"z":[]}}')
    assert (request.task_id, request.input.content) == ("t", "hi")


def test_a_byte_order_mark_is_ignored() -> None:
    assert read(b'\xef\xbb\xbf{"input":{}}').input.content == ""


@pytest.mark.parametrize(
    ("data", "pointer"),
    [
        (b"", ""),
        (b" \n", ""),
        (b"{", ""),
        (b"nonsense", ""),
        (b'{"input":{}} x', ""),
        (b'{"input":{"content":NaN}}', ""),
        (b'{"input":{"content":"\\ud800"}}', ""),
        (b'{"input":{"content":"\\udc00 tail"}}', ""),
        (b'{"x":"\xff","input":{}}', ""),
        (b"[]", ""),
        (b"{}", "/input"),
        (b'{"input":5}', "/input"),
        (b'{"input":{"type":5}}', "/input/type"),
        (b'{"input":{"content":1e999}}', "/input/content"),
        (b'{"input":{"content":' + b"9" * 5000 + b"}}", "/input/content"),
        (b'{"input":{},"timeoutMs":0}', "/timeoutMs"),
        (b'{"input":{},"timeoutMs":true}', "/timeoutMs"),
        (b'{"input":{},"taskId":"a\\u0000"}', "/taskId"),
        (b'{"input":{},"onDisconnect":"never"}', "/onDisconnect"),
        (b'{"input":{},"onDisconnect":{"graceMs":-1}}', "/onDisconnect/graceMs"),
        (b'{"input":{},"context":{"metadata":[1]}}', "/context/metadata"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(data: bytes, pointer: str) -> None:
    assert refusal(data)[0] == pointer


def test_a_missing_member_is_said_to_be_required() -> None:
    assert refusal(b"{}") == ("/input", "is required")


@pytest.mark.parametrize(
    "text",
    [
        r"\ud800",
        r"\udc00",
        r"\ud800x",
        r"\uDBFF\n",
        r"\ud800\ud800",
        r"\ud800\u0041",
        r"\\\ud800",
        r"\ud800" + "x" * 50,
    ],
)
@pytest.mark.parametrize("around", ['{"input":{"content":"%s"}}', '{"y":"%s","input":{}}', '{"input":{},"%s":1}'])
def test_half_a_surrogate_pair_is_called_by_its_name(text: str, around: str) -> None:
    pointer, message = refusal((around % text).encode())
    assert pointer == ""
    assert message.startswith("holds half of a surrogate pair")


@pytest.mark.parametrize("text", [r'"\ud83d\ude00', r'"\\ud800', r'"\ud83d\ud', '"', "[1"])
def test_what_ends_too_early_is_said_to(text: str) -> None:
    assert refusal(text.encode(), object)[1] == "is not JSON: it ends too early"


def test_what_an_id_may_be_is_said_in_words_and_the_detail_holds_every_error() -> None:
    words = "must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not . or .."
    assert refusal(b'{"input":{},"taskId":"a/b"}') == ("/taskId", words)
    assert refusal(b'{"agentId":"a","sessionId":""}', SessionRequest) == ("/sessionId", words)
    with pytest.raises(InvalidRequest) as refused:
        check_task_request(read(b'{"input":{"type":"x"},"taskId":"..","context":{"sessionId":"."}}'))
    assert refused.value.detail == (
        f"taskId: {words}; context/sessionId: {words}; input/type: must be a media type, such as text/plain"
    )


def test_a_place_in_a_list_is_named_and_in_a_free_object_the_object() -> None:
    assert fault("Expected `int`, got `str` - at `$.a[10].b`") == ("/a/10/b", "expected `int`, got `str`")
    assert fault("Expected `int`, got `str` - at `$.a[...].b`") == ("/a", "expected `int`, got `str`")
    assert fault("Expected `object`, got `int`") == ("", "expected `object`, got `int`")
    assert fault("Object missing required field `b` - at `$.a[0]`") == ("/a/0/b", "is required")


def test_numbers_beyond_64_bits_survive_to_be_written_again() -> None:
    request = read(b'{"input":{"type":"application/json","content":[123456789012345678901234567890,1e300]}}')
    again = read(msgspec.json.encode(request))
    assert again.input.content == [123456789012345678901234567890, 1e300]


@pytest.mark.parametrize("name", ["timeoutMs", "onDisconnect"])
def test_absurd_times_are_refused_before_they_overflow(name: str) -> None:
    number = "9" * 400
    value = number if name == "timeoutMs" else f'{{"graceMs":{number}}}'
    (pointer,) = task_faults(f'{{"input":{{}},"{name}":{value}}}'.encode())
    assert pointer.startswith(f"/{name}")
    assert not task_faults(f'{{"input":{{}},"timeoutMs":{MAX_NUMBER}}}'.encode())


@pytest.mark.parametrize("bad", ["a\\n", ".", ".."])
def test_what_is_no_id_is_refused_though_its_type_lets_it_pass(bad: str) -> None:
    faults = task_faults(f'{{"input":{{}},"taskId":"{bad}","context":{{"sessionId":"{bad}"}}}}'.encode())
    assert set(faults) == {"/taskId", "/context/sessionId"}
    with pytest.raises(InvalidRequest):
        check_session_request(read(f'{{"agentId":"a","sessionId":"{bad}"}}'.encode(), SessionRequest))


@pytest.mark.parametrize("kind", ["text/plain", "text/markdown; charset=utf-8", "TEXT/plain"])
def test_text_must_be_text(kind: str) -> None:
    assert set(task_faults(f'{{"input":{{"type":"{kind}","content":{{"a":1}}}}}}'.encode())) == {"/input/content"}
    assert not task_faults(f'{{"input":{{"type":"{kind}","content":"a"}}}}'.encode())


@pytest.mark.parametrize("content", ['{"a":[1]}', "null", '"text"', "1"])
def test_any_other_type_takes_any_json(content: str) -> None:
    assert not task_faults(f'{{"input":{{"type":"application/json","content":{content}}}}}'.encode())


@pytest.mark.parametrize("kind", ["", "text", "text/", "/plain", "text/plain\\u0000", "a b/c", "x/" + "y" * 300])
def test_what_is_no_media_type_is_refused(kind: str) -> None:
    assert "/input/type" in task_faults(f'{{"input":{{"type":"{kind}","content":""}}}}'.encode())


def test_depth_is_counted_outside_of_strings() -> None:
    assert not is_deeper(b"[" * 64 + b"]" * 64, 64)
    assert is_deeper(b"[" * 65 + b"]" * 65, 64)
    assert not is_deeper(b'["\\\\","\\"' + b"[" * 100 + b'",[]]', 64)
    assert refusal(b'{"input":{"content":' + b"[" * 100 + b"]" * 100 + b"}}")[1] == "is nested deeper than 64 levels"


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_the_counted_depth_is_the_real_one(value: Any) -> None:
    def depth(node: Any) -> int:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    data = msgspec.json.encode(value)
    assert not is_deeper(data, depth(value))
    assert depth(value) == 0 or is_deeper(data, depth(value) - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * (1 << 20),
        b"[" * 500_000 + b"]" * 500_000,
        b"[" * 70 + b'"",' * 300_000,
        b"[" * 70 + b'"' + b'\\"' * 500_000,
        b'{"a":' * 200_000,
    ],
)
def test_a_megabyte_of_brackets_and_quotes_is_refused_quickly(data: bytes) -> None:
    began = time.thread_time()
    refusal(data)
    assert time.thread_time() - began < 1


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = read(data, object)
    except InvalidRequest:
        return
    msgspec.json.encode(value)


@given(st.text(alphabet='{}[]":,\\ud8c0+-.eE01n"truefalsenull ', max_size=60))
def test_anything_like_json_is_read_or_refused_and_can_be_written_again(text: str) -> None:
    try:
        value = read(text.encode(), object)
    except InvalidRequest:
        return
    assert msgspec.json.decode(msgspec.json.encode(value)) == value


@pytest.mark.parametrize("text", ["0", "101", "abc", "1e9", "-1", "", " 5", "1.0", "9" * 5000, "٣"])
def test_a_page_size_out_of_range_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        page_size({"pageSize": text})
    assert refused.value.errors[0].pointer == "/pageSize"


def test_a_page_has_50_items_unless_told() -> None:
    assert [page_size({}), page_size({"pageSize": "1"}), page_size({"pageSize": "100"})] == [50, 1, 100]


@pytest.mark.parametrize("text", ["", "-1", "x", "1.5", "9" * 17, "٣"])
def test_a_seq_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        sequence(text, "after")
    assert sequence("0", "after") == 0


def test_a_choice_is_one_of_the_given() -> None:
    assert choice({}, "status", ["a"]) is None
    assert choice({"status": "a"}, "status", ["a"]) == "a"
    with pytest.raises(InvalidRequest):
        choice({"status": "b"}, "status", ["a"])


def test_metadata_filters_are_collected_by_their_keys() -> None:
    assert metadata_filter({"metadata.user": "john", "metadata.a.b": "", "metadata.": "x", "other": "y"}) == {
        "user": "john",
        "a.b": "",
    }
    assert metadata_filter({"metadata": "x"}) is None


def test_bodies_that_say_the_same_are_the_same() -> None:
    assert canonical(b'{"b":1,"a":[1, 2]}') == canonical(b'\xef\xbb\xbf{ "a":[1,2],"b":1}')
    assert canonical(b'{"a":1}') != canonical(b'{"a":2}')


def test_a_number_out_of_range_in_what_was_ignored_has_no_other_spelling() -> None:
    body = b'{"input":{},"ignored":1e999}'
    assert read(body).input.content == ""
    with pytest.raises(InvalidRequest):
        canonical(body)
