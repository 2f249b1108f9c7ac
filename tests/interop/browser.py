"""Chromium, driven through chromedriver by the W3C's WebDriver protocol, which is a few JSON requests."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from tests.seed.process import LIMIT, Output

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver hands out an element (WebDriver 2, 12.1)."""

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1400",
    "--host-resolver-rules=MAP foreign.test 127.0.0.1",
]


@contextlib.contextmanager
def chromedriver(program: str, folder: Path) -> Iterator[str]:
    """Its address. Leaving ends it and every browser that it has started, by their process group."""
    with subprocess.Popen(
        [program, "--port=0"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        output = Output(process.stdout)
        try:
            yield f"http://127.0.0.1:{output.find(r'started successfully on port ([0-9]+)')}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.rest()


class Browser:
    """One window."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        response = self._client.request(method, path, json=body)
        value = response.json()["value"]
        assert response.status_code == 200, value["message"]
        return value

    def open(self, url: str) -> None:
        self._call("POST", "url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the function body ``script`` returns; a promise is waited for."""
        return self._call("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def until(self, expression: str) -> Any:
        """The first true value of an expression, looked at again and again in the page."""
        script = f"""return new Promise((resolve) => {{
            const look = () => {{ const value = ({expression}); value ? resolve(value) : setTimeout(look, 20); }};
            look();
        }});"""
        try:
            return self.run(script)
        except AssertionError as error:
            raise AssertionError(f"never true: {expression}\n{self.run('return document.body.innerText')}") from error

    def click(self, selector: str) -> None:
        self._call("POST", f"element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replaces what stands in a field, key by key."""
        element = self._find(selector)
        self._call("POST", f"element/{element}/clear", {})
        self._call("POST", f"element/{element}/value", {"text": text})

    def text(self, selector: str) -> str:
        return str(self._call("GET", f"element/{self._find(selector)}/text"))

    def complaints(self) -> list[str]:
        """What the console has as errors (a refused policy, an exception, a failed request) since the last look."""
        entries = self._call("POST", "se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "screenshot")))

    def _find(self, selector: str) -> str:
        return str(self._call("POST", "element", {"using": "css selector", "value": selector})[ELEMENT])


@contextlib.contextmanager
def open_browser(driver: str, program: str, profile: Path) -> Iterator[Browser]:
    capabilities = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": program, "args": [*FLAGS, f"--user-data-dir={profile}"]},
        "goog:loggingPrefs": {"browser": "ALL"},
        "timeouts": {"script": 30_000, "pageLoad": 30_000},
    }
    with httpx2.Client(base_url=driver, timeout=LIMIT, trust_env=False) as client:
        response = client.post("/session", json={"capabilities": {"alwaysMatch": capabilities}})
        answer = response.json()["value"]
        assert response.status_code == 200, answer
        client.base_url = httpx2.URL(f"{driver}/session/{answer['sessionId']}/")
        try:
            yield Browser(client)
        finally:
            client.delete("")
