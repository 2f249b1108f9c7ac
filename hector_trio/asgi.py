"""``hypercorn -k trio hector_trio.asgi:app``: the server as an ASGI application, with our connection class installed.

``HECTOR_CONFIG`` names the configuration file; without it the built-in ``assistant`` is served. Importing this module
installs the connection class into Hypercorn's trio worker (logged); ``HECTOR_CONNECTION=plain`` leaves Hypercorn as
it is, with its defects.
"""

from __future__ import annotations

import os

import structlog

from hector_trio import connection
from hector_trio.config import Settings, default_settings, load_file
from hector_trio.observability import configure
from hector_trio.server import SelfOpeningApp, limits_of

_path = os.environ.get("HECTOR_CONFIG")
_settings = load_file(_path, os.environ) if _path else default_settings(os.environ)
configure(_settings.log)
_log = structlog.stdlib.get_logger("hector_trio.asgi")

if os.environ.get("HECTOR_CONNECTION") == "plain":
    _log.warning("connection_class_not_installed", because="HECTOR_CONNECTION=plain")
else:
    connection.install(limits_of(_settings))
    _log.info("connection_class_installed", opt_out="HECTOR_CONNECTION=plain")


def _load() -> Settings:
    return _settings


app = SelfOpeningApp(_load, dict)
