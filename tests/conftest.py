"""For all tests: how many processes they take, log lines as of a server nobody configured, both ways of a stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from quart_trio import QuartTrio
from trio.testing import MockClock

from hector_trio.observability import keep_tracebacks_plain
from tests import serving

WORKERS = 4
"""Processes for the whole suite: more than there are cores, because most tests wait for others and for timers."""

if sys.dont_write_bytecode:
    # Nothing beside the sources then; but hundreds of processes are started here, and would compile all of ours anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode"))

# How long an example takes says how busy the machine is, and nothing about what is tested.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spreads the whole suite; what is picked (files, ``-k``) or watched (``--pdb``, ``-s``) stays in one process.

    Where ``-n`` is given, it decides. Here and not in ``addopts``: there it would make ``-p no:xdist`` an error.
    """
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (option.keyword or option.markexpr)
    watched = option.usepdb or option.trace or option.capture == "no"
    if (
        whole
        and not watched
        and not option.collectonly
        and not hasattr(config, "workerinput")
        and getattr(option, "numprocesses", 0) is None
    ):
        option.numprocesses, option.dist = WORKERS, "worksteal"


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    keep_tracebacks_plain()


@pytest.fixture
def clock() -> MockClock:
    """The clock of the test's loop, for ``tests.clock.skip``. It never jumps by itself: sockets may be at work."""
    return MockClock(rate=1)


@pytest.fixture(params=["direct", "quart"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs twice: with streams beside Quart, and with all that is said on them going through Quart."""
    if request.param == "direct":
        yield
        return
    serving.always.append(hooked)
    yield
    serving.always.remove(hooked)


def hooked(app: QuartTrio) -> None:
    """Makes Quart be asked about every WebSocket."""

    @app.before_websocket
    async def look() -> None:
        pass
