"""The page at ``/``: HTML that lists the agents and streams answers in the browser, and the policy sent with it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

PAGE: Final[bytes] = files("hector_trio.transports").joinpath("page.html").read_bytes()
"""UTF-8. It needs nothing from elsewhere and works under any prefix that a proxy publishes the server at."""


def _hashes(page: bytes, element: str) -> str:
    """The CSP hash sources of what stands in each ``element`` of ``page`` (CSP 3, 2.3.1)."""
    pattern = rf"<{element}>(.*?)</{element}>".encode()
    digests = (hashlib.sha256(match[1]).digest() for match in re.finditer(pattern, page, re.DOTALL))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


CONTENT_SECURITY_POLICY: Final[str] = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hashes(PAGE, 'script')}",
        f"style-src {_hashes(PAGE, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page's own script and style run, and nothing else; it talks to its own server only."""
