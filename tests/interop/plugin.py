"""pytest plugin of .ci/interop: the browser, the sites and the programs of others, and the closing line.

What .ci/interop has installed is named by INTEROP_* variables. Nothing is skipped: what is missing fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.browser import Browser, chromedriver, open_browser
from tests.interop.web import Site, serving_site
from tests.seed.process import Home


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    bad = count["failed"] + count["error"] + count["skipped"]
    terminalreporter.write_line(f"{count['passed']} passed, {bad} failed")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("interop"))


@pytest.fixture(scope="session")
def server(home: Home) -> Iterator[str]:
    """The seed's own command, as ``http://127.0.0.1:port``."""
    with home.seed_server() as address:
        yield f"http://{address}"


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromedriver(os.environ["INTEROP_CHROMEDRIVER"], tmp_path_factory.mktemp("driver")) as url:
        yield url


@pytest.fixture
def browser(driver: str, tmp_path: Path) -> Iterator[Browser]:
    """A fresh Chromium. ``foreign.test`` is a name of this machine that is no loopback name."""
    with open_browser(driver, os.environ["INTEROP_CHROMIUM"], tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server of somebody else's, on another loopback port."""
    with serving_site() as site:
        yield site


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder into which npm has installed; scripts in it find its packages."""
    return Path(os.environ["INTEROP_PACKAGES"])


@pytest.fixture(scope="session")
def websocat() -> str:
    return os.environ["INTEROP_WEBSOCAT"]
