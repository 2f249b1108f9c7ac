"""Log lines, metrics, and naming who holds the event loop."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hector_trio.agents import AgentInfo
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import Log
from hector_trio.observability import (
    OTHER,
    ROUTE,
    Metrics,
    Output,
    access_log,
    configure,
    keep_tracebacks_plain,
    watch_loop,
)

SECRET = "s3cr3t-t0ken-0123456789"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Lines:
    """What was logged, after everything queued has been written."""

    def __init__(self, output: Output, stream: io.StringIO) -> None:
        self._output = output
        self._stream = stream

    @property
    def text(self) -> str:
        self._output.flush()
        return self._stream.getvalue()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("", "hector_trio", "hypercorn", "quart", "quart_trio")}
    yield
    for handler in [each for each in root.handlers if isinstance(each, Output)]:
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def logged(log: Log | None = None, *, stream: io.StringIO | None = None, secrets: tuple[str, ...] = ()) -> Lines:
    stream = io.StringIO() if stream is None else stream
    return Lines(configure(log or Log(), stream, secrets=secrets), stream)


def log_of(name: str = "hector_trio.test") -> Any:
    return structlog.stdlib.get_logger(name)


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_line_is_json_unless_it_goes_to_a_terminal() -> None:
    lines = logged()
    log_of().info("started", port=8080)
    event = lines.last
    assert list(event) == ["timestamp", "level", "logger", "event", "port"]
    assert (event["level"], event["logger"], event["event"], event["port"]) == (
        "info",
        "hector_trio.test",
        "started",
        8080,
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", event["timestamp"])


def test_a_line_is_for_people_on_a_terminal() -> None:
    lines = logged(stream=Terminal())
    log_of().warning("slow", what="a b", n=3, none=None)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} warning slow what='a b' n=3 none=None\n", lines.text)


def test_the_format_can_be_chosen() -> None:
    json_lines = logged(Log(format="json"), stream=Terminal())
    log_of().info("x")
    assert json_lines.last["event"] == "x"
    text_lines = logged(Log(format="text"))
    log_of().info("x")
    assert text_lines.text.endswith(" info    x\n")


def test_messages_of_the_standard_library_take_the_same_way() -> None:
    lines = logged()
    logging.getLogger("hypercorn.error").info("Running on %s", "http://h", extra={"workers": 1})
    logging.getLogger("hector_trio").info("plain")
    assert [event["event"] for event in lines.events] == ["Running on http://h", "plain"]
    assert (lines.events[0]["workers"], lines.events[0]["logger"]) == (1, "hypercorn.error")


def test_the_level_is_about_this_server_and_others_only_warn() -> None:
    lines = logged(Log(level="debug"))
    log_of().debug("ours")
    logging.getLogger("httpx2").info("theirs")
    logging.getLogger("httpx2").warning("their trouble")
    assert [event["event"] for event in lines.events] == ["ours", "their trouble"]
    lines = logged(Log(level="error"))
    log_of().warning("no")
    logging.getLogger("httpx2").warning("no")
    log_of().error("yes")
    assert [event["event"] for event in lines.events] == ["yes"]


async def test_ids_reach_every_line_also_from_other_tasks_and_threads() -> None:
    lines = logged()

    async def child() -> None:
        log_of().info("task")
        await trio.to_thread.run_sync(lambda: logging.getLogger("hector_trio").info("thread"))

    with structlog.contextvars.bound_contextvars(request_id="r1", task_id="t1", session_id="s1", agent_id="a1"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
    log_of().info("after")
    ids = {"request_id": "r1", "task_id": "t1", "session_id": "s1", "agent_id": "a1"}
    task, thread, after = lines.events
    assert task | ids == task
    assert thread | ids == thread
    assert "task_id" not in after


def test_configuring_again_replaces_what_was() -> None:
    before = logged()
    log = log_of()
    log.info("one")
    after = logged()
    log.info("two")
    assert [event["event"] for event in before.events] == ["one"]
    assert [event["event"] for event in after.events] == ["two"]


# --- what must not be in a line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_configured_secret_never_appears(form: Any) -> None:
    odd = "odd\"secret\\with'signs"
    lines = logged(Log(format=form), secrets=(SECRET, odd, ""))
    log_of().info(f"event {SECRET}", value=SECRET, nested={"a": [SECRET, odd]}, odd=odd)
    logging.getLogger("hector_trio").warning("plain %s and %s", SECRET, odd)
    try:
        raise ValueError(f"boom {SECRET} {odd}")
    except ValueError:
        log_of().exception("failed")
    assert SECRET not in lines.text
    assert "with" not in lines.text
    assert lines.text.count("[hidden]") >= 8


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcdef123456",
        "bearer abcdef123456",
        "Basic abcdef123456==",
        "GET /x?token=abcdef123456&y=1",
        "key sk-abcdef123456-abcdef",
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    lines = logged()
    log_of().info("x", value=text, also=[text])
    assert "abcdef123456" not in lines.text
    assert lines.last["value"].startswith(text.partition("abc")[0].removesuffix("sk-"))


def test_words_about_tokens_stay_readable() -> None:
    lines = logged()
    log_of().info("Send Authorization: Bearer TOKEN", challenge='Bearer realm="hector"', task="risk-assessment-2024")
    assert "[hidden]" not in lines.text


def test_members_named_like_secrets_are_hidden() -> None:
    lines = logged()
    log_of().info("x", headers={"Authorization": "plain", "Cookie": "a=b", "Accept": "y"}, api_key="zzz", token="t")
    assert lines.last["headers"] == {"Authorization": "[hidden]", "Cookie": "[hidden]", "Accept": "y"}
    assert (lines.last["api_key"], lines.last["token"]) == ("[hidden]", "[hidden]")


def test_prompts_are_dropped_unless_asked_for() -> None:
    def say() -> None:
        log_of().info("x", input="hello", n=1, body={"output": "world", "content": ["c"], "kept": 2})

    lines = logged()
    say()
    assert lines.last["body"] == {"kept": 2}
    assert "input" not in lines.last
    lines = logged(Log(prompts=True))
    say()
    assert (lines.last["input"], lines.last["body"]["output"]) == ("hello", "world")


def test_a_failure_is_logged_with_all_its_branches_and_no_values_of_variables() -> None:
    lines = logged()
    local_value = "a value" + " of a variable"
    try:
        raise ExceptionGroup("both", [ValueError("left"), KeyError("right")])
    except ExceptionGroup:
        log_of().exception("failed")
        logging.getLogger("hector_trio").exception("failed too")
    for event in lines.events:
        assert "ValueError: left" in event["exception"]
        assert "KeyError: 'right'" in event["exception"]
        assert "test_observability.py" in event["exception"]
        assert local_value not in event["exception"]


def test_a_client_cannot_forge_a_line_or_move_the_cursor() -> None:
    lines = logged(stream=Terminal())
    log_of().info("x", path="/a\n12:00:00.000 error   forged\x1b[2J")
    logging.getLogger("hector_trio").info("y\n12:00:00.000 error   forged\x1b[2J")
    assert len(lines.text.splitlines()) == 2
    assert "\x1b" not in lines.text


@given(
    st.dictionaries(
        st.text(), st.text() | st.binary() | st.floats() | st.integers() | st.none() | st.sets(st.integers())
    )
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("form", ["json", "text"])
def test_any_value_can_be_logged(form: Any, values: dict[str, Any]) -> None:
    lines = logged(Log(format=form))
    values = {key: value for key, value in values.items() if key not in ("event", "self")}
    log_of().info("x", **values)
    log_of().info("surrogate \udc80", value="\udcff", obj=object(), keys={(1, 2): 3})
    assert "could not be formatted" not in lines.text
    assert lines.text.count("\n") == 2 or form == "text"


# --- the way out ------------------------------------------------------------------------------------------------------


class Stuck(io.StringIO):
    """A stream whose reader does not read until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.go.wait(30)
        return super().write(text)


def test_a_stream_that_hangs_costs_lines_but_nobodys_time() -> None:
    stream = Stuck()
    output = Output(stream, capacity=10)
    log = logging.Logger("alone")
    log.addHandler(output)
    log.warning("first")
    assert stream.entered.wait(5)
    for n in range(15):
        log.warning("line %d", n)
    stream.go.set()
    output.flush()
    rows = stream.getvalue().splitlines()
    assert rows[:2] == ["first", "line 0"]
    assert rows[-2:] == ["line 9", "5 log lines were dropped: whoever reads them is too slow"]
    output.close()


def test_a_broken_pipe_raises_nothing_and_blocks_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    output = configure(Log(), stream)
    for n in range(100):
        log_of().info("x", n=n)
    output.flush()
    assert output.broken
    with suppress(BrokenPipeError):  # raised if anything was left to write
        stream.close()


def test_a_closed_stream_raises_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    output = configure(Log(), stream)
    log_of().info("x")
    output.flush()
    assert output.broken


def test_a_stream_that_knows_only_ascii_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    output = configure(Log(format="text"), stream)
    log_of().info("grüße")
    output.flush()
    assert raw.getvalue().endswith(b" info    gr\\xfc\\xdfe\n")


def test_lines_are_written_before_the_process_ends_also_after_somebody_used_logging_config() -> None:
    script = (
        "import logging, logging.config\n"
        "from hector_trio.config import Log\n"
        "from hector_trio.observability import configure\n"
        "configure(Log())\n"
        "logging.config.dictConfig({'version': 1, 'disable_existing_loggers': False})\n"
        "for n in range(1000): logging.getLogger('hector_trio').info('line %d', n)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=True)
    assert [json.loads(row)["event"] for row in result.stderr.splitlines()] == [f"line {n}" for n in range(1000)]


# --- metrics ----------------------------------------------------------------------------------------------------------


def samples(metrics: Metrics) -> dict[str, float]:
    rows = [row for row in metrics.render().decode().splitlines() if not row.startswith("#")]
    return {row.rpartition(" ")[0]: float(row.rpartition(" ")[2]) for row in rows}


def test_what_happened_is_counted() -> None:
    metrics = Metrics()
    metrics.request("GET", "/agents/{agentId}", 200, 0.01)
    metrics.request("GET", None, None, 0.01)
    metrics.chunks(5)
    metrics.chunks(2)
    metrics.run_ended("assistant", "completed", None, 1.5)
    metrics.run_ended("assistant", "failed", "model_error", 0.5)
    metrics.cancelled(0.002)
    metrics.committed(0.003, 7)
    metrics.loop_lag(0.0001)
    metrics.loop_blocked("assistant")
    metrics.loop_blocked(None)
    metrics.pushed("given_up", 1.5)
    found = samples(metrics)
    assert found['hector_push_requests_total{result="given_up"}'] == 1
    assert found["hector_push_seconds_sum"] == 1.5
    assert found['hector_requests_total{method="GET",route="/agents/{agentId}",status="200"}'] == 1
    assert found['hector_requests_total{method="GET",route="other",status="none"}'] == 1
    assert found['hector_request_seconds_count{route="/agents/{agentId}"}'] == 1
    assert found["hector_chunks_total"] == 7
    assert found['hector_runs_total{agent="assistant",code="",status="completed"}'] == 1
    assert found['hector_runs_total{agent="assistant",code="model_error",status="failed"}'] == 1
    assert found['hector_run_seconds_sum{agent="assistant"}'] == 2
    assert found["hector_cancel_seconds_sum"] == 0.002
    assert found["hector_commit_seconds_sum"] == 0.003
    assert found["hector_commit_operations_sum"] == 7
    assert found["hector_loop_lag_seconds_count"] == 1
    assert found['hector_loop_blocked_total{agent="assistant"}'] == 1
    assert found['hector_loop_blocked_total{agent=""}'] == 1
    assert found["process_open_fds"] > 0


def test_open_streams_go_up_and_down_also_when_they_fail() -> None:
    metrics = Metrics()
    name = 'hector_open_streams{transport="sse"}'
    assert samples(metrics)[name] == 0
    with pytest.raises(ValueError, match="x"), metrics.stream("sse"):
        assert samples(metrics)[name] == 1
        assert (metrics.open_streams(), metrics.open_streams("websocket")) == (1, 0)
        raise ValueError("x")
    assert samples(metrics)[name] == 0


def test_states_are_asked_for_when_somebody_looks() -> None:
    metrics = Metrics()
    engine = SimpleNamespace(running=3, queued=2, waiting_for_input=6)
    store = SimpleNamespace(statistics=lambda: SimpleNamespace(size_bytes=4096))
    counts = SimpleNamespace(connections=5, websockets=4, accepted=9, refused=1, reset=2)
    metrics.watch(engine, store, lambda: counts)
    engine.running = 7
    found = samples(metrics)
    assert found['hector_tasks{state="running"}'] == 7
    assert found['hector_tasks{state="queued"}'] == 2
    assert found['hector_tasks{state="input_required"}'] == 6
    assert found["hector_store_bytes"] == 4096
    assert found["hector_connections"] == 5
    assert found["hector_websockets"] == 4
    assert found["hector_connections_accepted_total"] == 9
    assert found["hector_connections_refused_total"] == 1
    assert found["hector_connections_reset_total"] == 2


def test_clients_cannot_make_the_registry_grow() -> None:
    metrics = Metrics()
    for n in range(3 * Metrics.MOST):
        metrics.run_ended(f"agent-{n}", "failed", f"code-{n}", 0.1)
        metrics.request(f"M{n}", f"/r{n}", n + 600, 0.1)
    found = samples(metrics)
    assert found[f'hector_runs_total{{agent="{OTHER}",code="{OTHER}",status="failed"}}'] == 2 * Metrics.MOST
    assert len([name for name in found if name.startswith("hector_runs_total")]) <= Metrics.MOST + 1
    assert len([name for name in found if name.startswith("hector_requests_total")]) <= Metrics.MOST + 1
    assert not [name for name in found if 'method="M' in name]


def test_two_servers_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.chunks(1)
    assert samples(two)["hector_chunks_total"] == 0


def test_each_answer_is_counted_and_logged_only_if_asked_for() -> None:
    scope = {"type": "http", "method": "GET", "path": "/agents", "client": ("127.0.0.1", 5), "query_string": b"k=v"}
    metrics = Metrics()
    lines = logged()
    access_log(metrics, Log())(scope | {ROUTE: "/agents"}, 200, 0.0015)
    access_log(metrics, Log())({"type": "websocket", "path": "/x", "client": None}, 101, 1)
    assert lines.text == ""
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        access_log(metrics, Log(access=True))(scope, 200, 0.0015)
    event = lines.last
    assert (event["event"], event["method"], event["path"], event["status"], event["ms"], event["client"]) == (
        "request",
        "GET",
        "/agents",
        200,
        1.5,
        "127.0.0.1",
    )
    assert event["request_id"] == "r1"
    assert "k=v" not in lines.text
    found = samples(metrics)
    assert found['hector_requests_total{method="GET",route="/agents",status="200"}'] == 1
    assert found['hector_requests_total{method="WEBSOCKET",route="other",status="101"}'] == 1
    assert found['hector_request_seconds_count{route="other"}'] == 1


# --- who holds the loop -----------------------------------------------------------------------------------------------


class Ear:
    """A logger that hears one thing and says so to waiting threads."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.heard = threading.Event()

    def warning(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})
        self.heard.set()


async def test_an_agent_that_holds_the_loop_is_named() -> None:
    metrics, ear = Metrics(), Ear()

    async def greedy(ctx: Any) -> None:
        hold()

    def hold() -> None:
        assert ear.heard.wait(10)

    agent = FunctionAgent(AgentInfo("greedy", "Greedy"), greedy)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_loop, metrics, ear)
            with structlog.contextvars.bound_contextvars(agent_id="greedy", task_id="t1"):
                await agent.run(SimpleNamespace())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    [event] = ear.events
    assert event["event"] == "loop_blocked"
    line = greedy.__code__.co_firstlineno
    assert re.fullmatch(rf".*test_observability\.py:{line} test_an_agent_.*\.greedy", event["function"])
    assert (event["agent_id"], event["task_id"]) == ("greedy", "t1")
    assert event["held_ms"] >= 100
    assert any(row.endswith(" hold") and "test_observability.py" in row for row in event["stack"].splitlines())
    assert samples(metrics)['hector_loop_blocked_total{agent="greedy"}'] == 1
    assert samples(metrics)["hector_loop_lag_seconds_sum"] >= 0.1


async def test_one_place_is_named_once_but_counted_each_time() -> None:
    metrics, ear = Metrics(), Ear()
    name = 'hector_loop_blocked_total{agent=""}'
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_loop, metrics, ear)
            for times in (1, 2):
                while samples(metrics).get(name, 0) < times:
                    time.sleep(0.01)  # noqa: ASYNC251  holding the loop is what is tested
                await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
    assert samples(metrics)[name] >= 2
    assert len(ear.events) <= len({event["at"] for event in ear.events})


async def test_a_loop_that_waits_is_not_accused() -> None:
    metrics, ear = Metrics(), Ear()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_loop, metrics, ear)
            await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
    assert ear.events == []
    assert samples(metrics)["hector_loop_lag_seconds_count"] >= 3


def test_the_module_costs_no_metrics_library_until_a_server_needs_it() -> None:
    script = "import sys, hector_trio.observability; print('prometheus_client' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=True)
    assert result.stdout.strip() == "False"


def test_where_nobody_has_configured_logs_a_traceback_shows_no_values_and_somebodys_configuration_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    structlog.reset_defaults()
    keep_tracebacks_plain()
    secret = "-".join(["what", "the", "prompt", "said"])
    try:
        raise ValueError(len(secret))
    except ValueError:
        structlog.get_logger().exception("failed")
    said = capsys.readouterr().out
    assert "ValueError: 20" in said
    assert secret not in said
    ours = [structlog.processors.JSONRenderer()]
    structlog.configure(processors=ours)
    keep_tracebacks_plain()
    assert structlog.get_config()["processors"] == ours
    structlog.reset_defaults()
