"""What the server tells about itself: log lines, metrics, and who holds the event loop."""

from __future__ import annotations

import atexit
import json
import logging
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Literal, Protocol, TextIO

import msgspec
import structlog
import trio

from hector_trio import config

Event = MutableMapping[str, Any]
Transport = Literal["websocket", "sse", "grpc"]

LOGGERS: Final = ("hector_trio", "hypercorn", "quart", "quart_trio")
"""Whose messages ``log.level`` is about; others are heard from ``warning`` on."""

# --- log lines: configuration -----------------------------------------------------------------------------------------


def configure(log: config.Log, stream: TextIO | None = None, *, secrets: Sequence[str] = ()) -> Output:
    """Sends every message of this process, structlog's and the standard library's, through one pipeline to ``stream``.

    ``stream`` is stderr if not given; text on a terminal, JSON lines otherwise, or as ``log.format`` says. ``secrets``
    (see ``config.secrets``) never appear, nor does what looks like one; inputs and outputs only with ``log.prompts``.
    Calling it again replaces what the last call set up.
    """
    stream = sys.stderr if stream is None else stream
    text = log.format == "text" or (log.format == "auto" and _is_terminal(stream))
    output = Output(stream)
    output.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_NAMING, structlog.stdlib.ExtraAdder(), _without_leftovers],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _exceptions,
                *([] if log.prompts else [_without_prompts]),
                _without_named_secrets,
                Lines(_as_text if text else _as_json, secrets),
            ],
        )
    )
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, Output)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(output)
    level = getattr(logging, log.level.upper())
    root.setLevel(max(level, logging.WARNING))
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_NAMING,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        # Nothing above depends on the arguments, so loggers may keep it.
        cache_logger_on_first_use=True,
    )
    return output


def keep_tracebacks_plain() -> None:
    """For a server in somebody's own program that has not configured structlog: structlog's default prints tracebacks
    with the values of all variables, which holds the loop for a quarter of a second and tells what prompts said."""
    if not structlog.is_configured():
        *others, _ = structlog.get_config()["processors"]
        renderer = structlog.dev.ConsoleRenderer(
            colors=_is_terminal(sys.stdout), exception_formatter=structlog.dev.plain_traceback
        )
        structlog.configure(processors=[*others, renderer])


_NAMING: Final[list[Any]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]
"""Runs where the message is written: the ids of the request, task, session and agent are the caller's."""


def _without_leftovers(logger: Any, method: str, event: Event) -> Event:
    """Other handlers leave what they formatted on the record, where it looks like a field."""
    for name in ("message", "asctime"):
        event.pop(name, None)
    return event


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False


# --- log lines: the way out -------------------------------------------------------------------------------------------


class Output(logging.Handler):
    """Writes lines from a thread of its own: a full pipe or a dead terminal costs lines, never the event loop.

    At most ``capacity`` lines wait; what comes then is counted, and the count is written when there is room again.
    """

    CLOSING_LIMIT: Final = 1.0
    """Seconds that ``flush`` waits for the stream."""

    def __init__(self, stream: TextIO, capacity: int = 10_000) -> None:
        super().__init__()
        self._stream = stream
        self._capacity = capacity
        self._changed = threading.Condition(threading.Lock())
        self._lines: list[str] = []
        self._writing = False
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self.broken = False
        """The stream is gone; nothing more will be written."""
        # logging's own exit hook forgets handlers once somebody calls logging.config. Weak: an Output may go before.
        atexit.register(_flush, weakref.ref(self))

    def emit(self, record: logging.LogRecord) -> None:
        """Formats here, where the caller's ids are, and queues. Never raises, never waits for the stream."""
        try:
            line = self.format(record)
        except Exception as error:
            line = f"a log message of {record.name} could not be formatted: {type(error).__name__}"
        with self._changed:
            if self.broken:
                return
            if len(self._lines) >= self._capacity:
                self._dropped += 1
                return
            self._lines.append(line)
            if self._thread is None or not self._thread.is_alive():  # not alive: we are in a fork
                # daemon: a stream that hangs must not keep the process
                self._thread = threading.Thread(target=self._write_all, name="hector log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits, a moment at most, until everything queued is written."""
        with self._changed:
            self._changed.wait_for(lambda: self.broken or not (self._lines or self._writing), self.CLOSING_LIMIT)

    def close(self) -> None:
        """Flushes, and lets the thread end. It can still be used: ``logging.config`` closes what others keep."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        super().close()

    def _write_all(self) -> None:
        while not self.broken:
            with self._changed:
                while not self._lines:
                    if self._closed:
                        self._thread = None
                        return
                    self._changed.wait()
                lines, self._lines = self._lines, []
                dropped, self._dropped = self._dropped, 0
                self._writing = True
            if dropped:
                lines.append(f"{dropped} log lines were dropped: whoever reads them is too slow")
            self._write("".join(f"{line}\n" for line in lines))
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            self.broken = True  # its reader has left, or it is closed
        except OSError:
            pass  # a full disk: these lines are lost, later ones may not be


def _flush(output: weakref.ref[Output]) -> None:
    alive = output()
    if alive is not None:
        alive.flush()


# --- log lines: what may be in them -----------------------------------------------------------------------------------

HIDDEN: Final = "[hidden]"
_PROMPTS: Final = frozenset({"input", "output", "prompt", "content", "messages", "history"})
_SECRETS: Final = frozenset(
    {"authorization", "proxy-authorization", "cookie", "set-cookie", "sec-websocket-protocol"}
    | {"api_key", "api-key", "x-api-key", "apikey", "token", "access_token", "password", "secret"}
)
_LOOKS_SECRET: Final = re.compile(
    r"(?i)(?P<word>\b(?:bearer|basic)\s+)(?!token\b|realm=)[A-Za-z0-9._~+/=-]{6,}"
    r"|(?P<key>[?&](?:access_token|token|api_key|key)=)[^&\s\"']+"
    r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{12,}"
)
_SHORTEST_SECRET: Final = 8
"""Configured secrets shorter than this are not looked for in lines: they would be found in the middle of words."""


class Lines:
    """The last processor: renders the event, then hides configured secrets and what looks like one in the line."""

    def __init__(self, render: Callable[[Event], str], secrets: Sequence[str]) -> None:
        forms: set[str] = set()
        for secret in secrets:
            if len(secret) >= _SHORTEST_SECRET:
                forms |= {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
        longest_first = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if forms else None
        self._render = render

    def __call__(self, logger: Any, method: str, event: Event) -> str:
        # Before rendering, which may quote a secret beyond recognition; and after, for what became text only there.
        line = self._hide(self._render(self._hide_in(event)))
        return _LOOKS_SECRET.sub(lambda match: (match["word"] or match["key"] or "") + HIDDEN, line)

    def _hide(self, text: str) -> str:
        return text if self._known is None else self._known.sub(HIDDEN, text)

    def _hide_in(self, value: Any, depth: int = 8) -> Any:
        if self._known is None or not depth:
            return value
        if isinstance(value, str):
            return self._hide(value)
        if isinstance(value, Mapping):
            return {key: self._hide_in(member, depth - 1) for key, member in value.items()}
        return [self._hide_in(member, depth - 1) for member in value] if isinstance(value, list | tuple) else value


def _without_prompts(logger: Any, method: str, event: Event) -> Event:
    return dict(_pruned(event, _PROMPTS, None))


def _without_named_secrets(logger: Any, method: str, event: Event) -> Event:
    return dict(_pruned(event, _SECRETS, HIDDEN))


def _pruned(value: Any, names: frozenset[str], instead: str | None, depth: int = 8) -> Any:
    """``value`` without the members called ``names``, at any depth that a log line may have."""
    if isinstance(value, Mapping) and depth:
        kept = {}
        for key, member in value.items():
            if not (isinstance(key, str) and key.lower() in names):
                kept[key] = _pruned(member, names, instead, depth - 1)
            elif instead is not None:
                kept[key] = instead
        return kept
    if isinstance(value, list | tuple) and depth:
        return [_pruned(member, names, instead, depth - 1) for member in value]
    return value


# --- log lines: how they look -----------------------------------------------------------------------------------------


def _exceptions(logger: Any, method: str, event: Event) -> Event:
    """The traceback as text, with all branches of a group and without the values of variables."""
    exc_info = event.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    if isinstance(exc_info, tuple) and exc_info[1] is not None:
        event["exception"] = _traceback(exc_info)
    return event


def _traceback(exc_info: tuple[type[BaseException], BaseException, TracebackType | None]) -> str:
    import traceback

    return "".join(traceback.format_exception(*exc_info)).rstrip()


def _as_json(event: Event) -> str:
    first = {key: event.pop(key) for key in ("timestamp", "level", "logger", "event") if key in event}
    fields = {**first, **event}
    try:
        return msgspec.json.encode(fields, enc_hook=str).decode()
    except (TypeError, ValueError, RecursionError):
        return json.dumps({str(key): _simple(value) for key, value in fields.items()})


def _simple(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    with suppress(Exception):
        return repr(value)
    return f"<{type(value).__name__}>"


def _as_text(event: Event) -> str:
    moment = datetime.fromisoformat(event.pop("timestamp")).astimezone()
    level = str(event.pop("level", "info"))
    event.pop("logger", None)
    what = _printable(str(event.pop("event", "")))
    below = [str(event.pop(key)) for key in ("stack", "exception") if key in event]
    fields = "".join(f" {key}={_quoted(value)}" for key, value in event.items())
    line = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d} {level:<7} {what}{fields}"
    return "\n".join([line, *("    " + _printable(row) for text in below for row in text.splitlines())])


def _quoted(value: Any) -> str:
    """A value that cannot be mistaken for anything else on its line."""
    if not isinstance(value, str):
        return _printable(str(_simple(value)))
    return value if value and value.isprintable() and not set(' ="') & set(value) else repr(value)


def _printable(text: str) -> str:
    """``text`` without control characters: what a client sent must not move the terminal's cursor or fake a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --- metrics ----------------------------------------------------------------------------------------------------------

ROUTE: Final = "hector.route"
"""Key of the scope under which the template of the route stands (``/agents/{agentId}``), once one has matched."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET"})
OTHER: Final = "other"
"""Stands for every value of a label beyond the bound."""

_FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class EngineState(Protocol):
    @property
    def running(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def waiting_for_input(self) -> int: ...


class PushState(Protocol):
    @property
    def open(self) -> int: ...


class StoreState(Protocol):
    def statistics(self) -> Any:
        """With ``size_bytes``, ``commits``, ``commit_seconds`` and ``operations``."""


class _OpenStream:
    """Counts itself while it is entered. A generator would take six times the room, in each idle stream."""

    __slots__ = ("_counts", "_transport")

    def __init__(self, counts: dict[Transport, int], transport: Transport) -> None:
        self._counts = counts
        self._transport = transport

    def __enter__(self) -> None:
        self._counts[self._transport] += 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._transport] -= 1


class Metrics:
    """The server's numbers, in a registry of its own. It is the engine's ``Observer``.

    Labels come from closed sets, or are cut off after ``MOST`` values: clients cannot make the registry grow.
    """

    MOST: Final = 200

    def __init__(self) -> None:
        # Imported here: it costs a tenth of a second, and only a server needs it.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        from prometheus_client.process_collector import ProcessCollector

        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._seen: dict[str, set[str]] = {}
        self._counters: dict[tuple[str, str, int | None], Counter] = {}
        """Those of `_requests` that have been counted with: three labels, each bounded."""
        self._requests = Counter(
            "hector_requests", "Requests answered", ["method", "route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "hector_request_seconds", "Time to answer a request", ["route"], buckets=_FAST, registry=registry
        )
        self._streams = Gauge("hector_open_streams", "Streams that are open", ["transport"], registry=registry)
        self._chunks = Counter("hector_chunks", "Chunks committed", registry=registry)
        self._runs = Counter("hector_runs", "Runs that ended, by how", ["agent", "status", "code"], registry=registry)
        self._run_seconds = Histogram(
            "hector_run_seconds", "Time from the start of a run to its end", ["agent"], buckets=_LONG, registry=registry
        )
        self._cancel_seconds = Histogram(
            "hector_cancel_seconds", "Time from a decision to cancel to the end of the run", buckets=_FAST,
            registry=registry,
        )  # fmt: skip
        self._lag_seconds = Histogram(
            "hector_loop_lag_seconds", "How much later than asked for the event loop woke a task", buckets=_FAST,
            registry=registry,
        )  # fmt: skip
        self._blocked = Counter(
            "hector_loop_blocked", "Times that the event loop was held, by the agent that did", ["agent"],
            registry=registry,
        )  # fmt: skip
        self._commit_seconds = Histogram(
            "hector_commit_seconds", "Time of a commit of the store", buckets=_FAST, registry=registry
        )
        self._commit_operations = Histogram(
            "hector_commit_operations", "Operations that one commit carried", buckets=_SIZES, registry=registry
        )
        self._pushes = Counter(
            "hector_push_requests", "Requests to webhooks, by what became of them", ["result"], registry=registry
        )
        self._push_seconds = Histogram(
            "hector_push_seconds", "Time of a request to a webhook", buckets=_FAST, registry=registry
        )
        self._webhooks = Gauge("hector_webhooks", "Webhooks that have not been told everything", registry=registry)
        self._open: dict[Transport, int] = {"websocket": 0, "sse": 0, "grpc": 0}
        for transport in self._open:
            self._streams.labels(transport).set_function(partial(self.open_streams, transport))

    # --- told by others

    def request(self, method: str, route: str | None, status: int | None, seconds: float | None) -> None:
        """One request was answered; ``route`` is its template, ``status`` None when the client left before.
        ``seconds`` is None for what is meant to last, a WebSocket."""
        asked = method if method in METHODS else OTHER, self._bounded("route", route or OTHER), status
        counter = self._counters.get(asked)
        if counter is None:
            code = "none" if status is None else str(status) if 100 <= status <= 599 else OTHER
            counter = self._counters[asked] = self._requests.labels(asked[0], asked[1], code)
        counter.inc()
        if seconds is not None:
            self._request_seconds.labels(asked[1]).observe(seconds)

    def stream(self, transport: Transport) -> _OpenStream:
        """A stream is open as long as this is."""
        return _OpenStream(self._open, transport)

    def open_streams(self, transport: Transport | None = None) -> int:
        """How many streams are open, of one transport or in all."""
        return sum(self._open.values()) if transport is None else self._open[transport]

    def chunks(self, count: int) -> None:
        """So many chunks were committed."""
        self._chunks.inc(count)

    def run_ended(self, agent_id: str, status: str, code: str | None, seconds: float) -> None:
        agent = self._bounded("agent", agent_id)
        self._runs.labels(agent, status, self._bounded("code", code or "")).inc()
        self._run_seconds.labels(agent).observe(seconds)

    def cancelled(self, seconds: float) -> None:
        """Time from the decision to the end of the run."""
        self._cancel_seconds.observe(max(seconds, 0.0))

    def committed(self, seconds: float, operations: int) -> None:
        """The store committed. From any thread."""
        self._commit_seconds.observe(seconds)
        self._commit_operations.observe(operations)

    def pushed(self, result: str, seconds: float) -> None:
        """A webhook was asked: ``delivered``, ``failed`` (it is tried again), ``given_up`` or ``gone``."""
        self._pushes.labels(result).inc()
        self._push_seconds.observe(max(seconds, 0.0))

    def watch_push(self, push: PushState) -> None:
        """Asks this for its number at each ``render``."""
        self._webhooks.set_function(lambda: push.open)

    def loop_lag(self, seconds: float) -> None:
        self._lag_seconds.observe(max(seconds, 0.0))

    def loop_blocked(self, agent_id: str | None) -> None:
        """The event loop was held, by this agent if by one. From any thread."""
        self._blocked.labels(self._bounded("agent", agent_id) if agent_id else "").inc()

    def watch(self, engine: EngineState, store: StoreState, connections: Callable[[], Any]) -> None:
        """Asks these for their numbers at each ``render``. ``connections()`` has ``connections``, ``websockets``,
        ``accepted``, ``refused`` and ``reset``."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        class States:
            def collect(self) -> Iterator[Any]:
                tasks = GaugeMetricFamily("hector_tasks", "Tasks that are not ended", labels=["state"])
                tasks.add_metric(["running"], engine.running)
                tasks.add_metric(["queued"], engine.queued)
                tasks.add_metric(["input_required"], engine.waiting_for_input)
                yield tasks
                size = store.statistics().size_bytes
                yield GaugeMetricFamily("hector_store_bytes", "Size of the database", value=size)
                now = connections()
                yield GaugeMetricFamily("hector_connections", "Connections that are open", value=now.connections)
                yield GaugeMetricFamily("hector_websockets", "WebSockets that are open", value=now.websockets)
                for name, what in _CONNECTION_COUNTS.items():
                    yield CounterMetricFamily(f"hector_connections_{name}", what, value=getattr(now, name))

        self.registry.register(States())

    def render(self) -> bytes:
        """Everything, in Prometheus' text format (``CONTENT_TYPE``)."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def _bounded(self, label: str, value: str) -> str:
        seen = self._seen.setdefault(label, set())
        if value in seen:
            return value
        if len(seen) >= self.MOST:
            return OTHER
        seen.add(value)
        return value


_CONNECTION_COUNTS: Final = {
    "accepted": "Connections accepted",
    "refused": "Connections refused because there were too many",
    "reset": "Connections cut because the peer read too slowly, fell silent, or broke the protocol",
}


def access_log(metrics: Metrics, log: config.Log) -> Callable[[Mapping[str, Any], int | None, float], None]:
    """What a server calls after each response: counts the request and, with ``log.access``, writes a line about it.

    The line has the path without its query, because queries can hold anything.
    """
    logger = structlog.stdlib.get_logger("hector_trio.access")

    def answered(scope: Mapping[str, Any], status: int | None, seconds: float) -> None:
        lasting = scope.get("type") == "websocket"
        method = "WEBSOCKET" if lasting else str(scope.get("method", OTHER))
        metrics.request(method, scope.get(ROUTE), status, None if lasting else seconds)
        if log.access:
            client = scope.get("client")
            logger.info(
                "request",
                method=method,
                path=scope.get("path"),
                status=status,
                ms=round(seconds * 1000, 2),
                client=client[0] if client else None,
            )

    return answered


# --- who holds the loop -----------------------------------------------------------------------------------------------

BEAT: Final = 0.05
"""Seconds between two signs of life of the loop."""
HELD: Final = 0.1
"""Seconds without the due sign after which whoever holds the loop is named."""
QUIET: Final = 10.0
"""Seconds in which one place in the code is named only once."""
TOP_FRAMES: Final = 8


class Place(msgspec.Struct, frozen=True):
    """Where a thread is: the innermost frames, the agent's function among them, and whose run it is."""

    at: str
    function: str
    stack: list[str]
    agent_id: str | None = None
    task_id: str | None = None


async def watch_loop(
    metrics: Metrics,
    log: Any = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Measures how late the loop wakes its tasks, and names what holds it for more than 100 ms. Runs until cancelled.

    Only a thread can tell who holds the loop while it is held: it looks for the sign of life that is due, and logs
    ``loop_blocked`` with the agent's function and the frames of the trio thread. A hold of 100 to 150 ms may go
    unnamed. A cancel leaves no thread behind.
    """
    heart = _Heart(metrics, structlog.stdlib.get_logger("hector_trio.loop") if log is None else log)
    async with trio.open_nursery() as nursery:
        limiter = trio.CapacityLimiter(1)
        nursery.start_soon(lambda: trio.to_thread.run_sync(heart.watch, limiter=limiter), name="loop watchdog")
        try:
            await heart.watched.wait()
            task_status.started()
            while True:
                heart.due = time.monotonic() + BEAT
                await trio.sleep(BEAT)
                metrics.loop_lag(time.monotonic() - heart.due)
        finally:
            heart.stopped.set()


class _Heart:
    """What the loop and its watchdog share."""

    def __init__(self, metrics: Metrics, log: Any) -> None:
        self.due = time.monotonic() + BEAT
        self.watched = trio.Event()
        self.stopped = threading.Event()
        self._thread_id = threading.get_ident()
        self._metrics = metrics
        self._log = log
        self._named: dict[str, float] = {}

    def watch(self) -> None:
        """The thread: sleeps until the next sign of life would be too late, which on a healthy loop it never is."""
        trio.from_thread.run_sync(self.watched.set)
        told = 0.0
        while not self.stopped.wait(max(self.due + HELD - time.monotonic(), BEAT / 2)):
            due = self.due
            late = time.monotonic() - due
            if late < HELD or due == told:
                continue
            frame = sys._current_frames().get(self._thread_id)
            place = None if frame is None else place_of(frame)
            if place is not None and due == self.due:
                told = due
                self._tell(place, late)

    def _tell(self, place: Place, late: float) -> None:
        self._metrics.loop_blocked(place.agent_id)
        now = time.monotonic()
        self._named = {at: when for at, when in self._named.items() if now - when < QUIET}
        if place.at in self._named:
            return
        self._named[place.at] = now
        ids = {"agent_id": place.agent_id, "task_id": place.task_id}
        self._log.warning(
            "loop_blocked",
            function=place.function,
            at=place.at,
            held_ms=round(late * 1000),
            stack="\n".join(place.stack),
            hint="nothing else runs meanwhile: await, or write the agent as a plain def",
            **{name: text for name, text in ids.items() if text is not None},
        )


def place_of(frame: FrameType) -> Place | None:
    """What a stopped thread with this innermost frame is at; None when the loop merely waits for something to do."""
    if "/trio/_core/_io_" in frame.f_code.co_filename:
        return None
    frames: list[FrameType] = []
    task: Any = None
    walker: FrameType | None = frame
    while walker is not None and task is None:
        frames.append(walker)
        if walker.f_code.co_name == "unrolled_run" and "/trio/" in walker.f_code.co_filename:
            # The task that the loop is running: its context has the ids that its log lines have.
            with suppress(Exception):
                task = walker.f_locals.get("task")
            break
        walker = walker.f_back
    ids = _ids_of(task)
    culprit = _agent_frame(frames) or frames[0]
    return Place(
        at=_spot(frames[0]),
        function=f"{_spot(culprit, culprit.f_code.co_firstlineno)} {culprit.f_code.co_qualname}",
        stack=[f"{_spot(each)} {each.f_code.co_name}" for each in frames[:TOP_FRAMES]],
        agent_id=ids.get("agent_id"),
        task_id=ids.get("task_id"),
    )


def _agent_frame(frames: Sequence[FrameType]) -> FrameType | None:
    """The agent's own function: what our ``agents/function.py`` called."""
    for inner, outer in pairwise(frames):
        file = outer.f_code.co_filename
        if file.endswith("hector_trio/agents/function.py") and inner.f_code.co_filename != file:
            return inner
    return None


def _spot(frame: FrameType, line: int | None = None) -> str:
    return f"{_short(frame.f_code.co_filename)}:{line or frame.f_lineno}"


_OURS: Final = f"{Path(__file__).parent.parent}/"


def _short(filename: str) -> str:
    """A file's name as people know it: inside a package from the package on, else relative to here if it is below."""
    for root in ("/site-packages/", f"/python{sys.version_info[0]}.{sys.version_info[1]}/", _OURS):
        if root in filename:
            return filename.rpartition(root)[2]
    with suppress(ValueError, OSError):
        return str(Path(filename).relative_to(Path.cwd()))
    return filename


def _ids_of(task: Any) -> dict[str, str]:
    """The ids that structlog keeps in the context of a Trio task."""
    ids: dict[str, str] = {}
    with suppress(Exception):
        for variable, value in task.context.items():
            if variable.name.startswith("structlog_") and isinstance(value, str):
                ids[variable.name.removeprefix("structlog_")] = value
    return ids
