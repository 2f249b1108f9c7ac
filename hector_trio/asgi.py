"""``hypercorn -k trio hector_trio.asgi:app``: the server as an ASGI application, with our connection class installed.

``HECTOR_CONFIG`` names the configuration file; without it the built-in ``assistant`` is served. Importing this module
installs the connection class into Hypercorn's trio worker (logged); ``HECTOR_CONNECTION=plain`` leaves Hypercorn as
it is, with its defects. A configuration that is wrong ends the process with one line that says why.
"""

from __future__ import annotations

import os

from hector_trio.config import default_settings, load_file
from hector_trio.errors import ConfigError
from hector_trio.server import installed

_path = os.environ.get("HECTOR_CONFIG")
try:
    _settings = load_file(_path, os.environ) if _path else default_settings(os.environ)
except ConfigError as error:
    raise SystemExit(f"hector_trio: {error.detail}") from None

app = installed(_settings, {})
