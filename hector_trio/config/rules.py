"""What a single value must be like beyond its type, which values are secret, and which are paths."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from hector_trio.config.checks import is_loopback
from hector_trio.config.settings import (
    Jwt,
    OpenAiLlm,
    PushSettings,
    PythonAgent,
    RemoteAgent,
    Server,
    Settings,
    StoreSettings,
    Tls,
    Token,
    UploadSettings,
)

MIN_TOKEN = 16

_HOSTNAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?\Z")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[^/\s:@?#\[\]]+)(:[0-9]{1,5})?\Z")
_VISIBLE = re.compile(r"[\x21-\x7e]+\Z")
_FERNET_KEY = re.compile(r"[A-Za-z0-9_-]{43}=\Z")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?\Z")
_FUNCTION = re.compile(r"(?P<where>.+):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)\Z")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_host(host: str) -> str | None:
    if host.startswith("[") and host.endswith("]") and _is_address(host[1:-1]):
        return f"write the address without brackets: {host[1:-1]}"
    if _is_address(host) or (_HOSTNAME.match(host) and not re.fullmatch(r"[0-9.]+", host)):
        return None
    return f"{host!r} is no address or host name, such as 127.0.0.1, ::1 or 0.0.0.0"


def _check_proxy(text: str) -> str | None:
    if text in ("*", "unix"):
        return None
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return f"{text!r} is no address or network, such as 10.0.0.5, 10.0.0.0/8, unix or *"
    return None


def _check_origin(text: str) -> str | None:
    if text in ("*", "null") or _ORIGIN.match(text.lower()):
        return None
    if _ORIGIN.match(text.lower().rstrip("/")):
        return f"an origin has no path: write {text.rstrip('/')}"
    return f"{text!r} is no origin, such as https://app.example.com (scheme, host, port; no path), null or *"


def _check_allowed_host(text: str) -> str | None:
    name = text.removeprefix("*.")
    if text == "*" or _is_address(text.strip("[]")) or _HOSTNAME.match(name):
        return None
    return f"{text!r} is no host name, such as hector.lan or *.example.com (without port)"


def _check_allowed_webhook(text: str) -> str | None:
    if re.fullmatch(r"[0-9.:/]+", text) or ":" in text or "/" in text:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            return f"{text!r} is no network, such as 10.1.0.0/16, and no host name (without scheme and port)"
        return None
    if _HOSTNAME.match(text.removeprefix("*.")):
        return None
    return f"{text!r} is no host name, address or network, such as hooks.lan, *.lan or 10.1.0.0/16"


def _check_url(text: str) -> str | None:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        good = good and not parts.query and not parts.fragment and _VISIBLE.match(text) is not None
    except ValueError:
        good = False
    return None if good else f"{text!r} is no http(s) address, such as https://hector.example.com"


def _check_jwks_url(text: str) -> str | None:
    """Whoever can change the keys on their way can sign as anybody."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        good = bool(host) and (parts.port or 1) > 0 and not parts.fragment and _VISIBLE.match(text) is not None
    except ValueError:
        good = False
    if not good or parts.scheme not in ("http", "https"):
        return f"{text!r} is no https address, such as https://login.example.com/.well-known/jwks.json"
    if parts.scheme == "http" and not is_loopback(host):
        return f"{text!r} would fetch the keys unprotected; use https, or a file (jwks_file)"
    return None


def _check_root_path(text: str) -> str | None:
    if text == "" or (text.startswith("/") and _VISIBLE.match(text) and not set("?#") & set(text)):
        return None
    return f"{text!r} is no path prefix, such as /hector"


def _check_path(text: str) -> str | None:
    if text.startswith("~"):
        return "~ is not expanded here; write ${HOME}/..."
    return None if text and "\0" not in text else "is empty"


def _check_store(text: str) -> str | None:
    if "://" in text or text == ":memory:":
        return f"{text!r} is no store: it is a file's path, sqlite:///path (no host, no options) or memory"
    return _check_path(text)


def _file_of_store(text: str) -> str:
    """``sqlite:///path`` as the path; anything else as it is. A file may be called memory: ``sqlite:///memory``."""
    path = text.removeprefix("sqlite:///")
    if path == text or "?" in path:
        return text
    return "./memory" if path == "memory" else path


def _without_slash(text: str) -> str:
    return text.rstrip("/")


def _check_function(text: str) -> str | None:
    match = _FUNCTION.match(text)
    if match is not None and (match["where"].endswith(".py") or _MODULE.match(match["where"])):
        return _check_path(text)
    return f"{text!r} is no function, such as package.module:name or path/to/file.py:name"


def _check_token(text: str) -> str | None:
    if len(text) < MIN_TOKEN:
        return f"is too short: {len(text)} characters, at least {MIN_TOKEN}; make one with `openssl rand -hex 32`"
    return _check_key(text)


def _check_key(text: str) -> str | None:
    return None if _VISIBLE.match(text) else "holds spaces or characters that cannot stand in a header"


def _check_fernet_key(text: str) -> str | None:
    return None if _FERNET_KEY.match(text) else "is no key of Fernet's: 32 bytes in URL-safe base64"


def _check_owner(text: str) -> str | None:
    if 1 <= len(text) <= 128 and text.isprintable() and text == text.strip():
        return None
    return f"{text!r} is no name of 1 to 128 visible characters"


def _check_headers(headers: dict[str, str]) -> str | None:
    for name, value in headers.items():
        if not _HEADER_NAME.match(name):
            return f"{name!r} is no header name"
        if not _HEADER_VALUE.match(value):
            return f"the value of {name} is empty or holds characters that cannot stand in a header"
    return None


def _check_text(text: str) -> str | None:
    return None if text.strip() else "is empty"


CHECKS: dict[tuple[type, str], Callable[[Any], str | None]] = {
    (Server, "host"): _check_host,
    (Server, "uds"): _check_path,
    (Server, "root_path"): _check_root_path,
    (Server, "base_url"): _check_url,
    (Server, "card_key"): _check_path,
    (Server, "trusted_proxies"): _check_proxy,
    (Server, "allow_origins"): _check_origin,
    (Server, "allowed_hosts"): _check_allowed_host,
    (Tls, "cert"): _check_path,
    (Tls, "key"): _check_path,
    (StoreSettings, "url"): _check_store,
    (UploadSettings, "path"): _check_path,
    (PushSettings, "allow"): _check_allowed_webhook,
    (PushSettings, "encryption_keys"): _check_fernet_key,
    (Token, "name"): _check_owner,
    (Token, "token"): _check_token,
    (Jwt, "issuer"): _check_text,
    (Jwt, "audience"): _check_text,
    (Jwt, "jwks_url"): _check_jwks_url,
    (Jwt, "jwks_file"): _check_path,
    (Jwt, "owner_claim"): _check_text,
    (Jwt, "role_claim"): _check_text,
    (OpenAiLlm, "model"): _check_text,
    (OpenAiLlm, "base_url"): _check_url,
    (OpenAiLlm, "api_key"): _check_key,
    (OpenAiLlm, "headers"): _check_headers,
    (PythonAgent, "function"): _check_function,
    (RemoteAgent, "url"): _check_url,
    (RemoteAgent, "token"): _check_key,
    (RemoteAgent, "headers"): _check_headers,
}
SECRET = {
    (PushSettings, "encryption_keys"),
    (Token, "token"),
    (OpenAiLlm, "api_key"),
    (OpenAiLlm, "headers"),
    (RemoteAgent, "token"),
    (RemoteAgent, "headers"),
}
SPELLED: dict[tuple[type, str], Callable[[str], str]] = {
    (Server, "root_path"): _without_slash,
    (Server, "base_url"): _without_slash,
    (StoreSettings, "url"): _file_of_store,
    (OpenAiLlm, "base_url"): _without_slash,
    (RemoteAgent, "url"): _without_slash,
}
"""Of several ways to say the same, the one that the settings hold."""
PATHS = {
    (Server, "uds"),
    (Server, "card_key"),
    (Tls, "cert"),
    (Tls, "key"),
    (StoreSettings, "url"),
    (UploadSettings, "path"),
    (Jwt, "jwks_file"),
    (PythonAgent, "function"),
}


def secrets(settings: Settings) -> list[str]:
    """Every secret the settings hold, for the log to hide."""
    found = [token.token for token in settings.auth.tokens]
    for llm in settings.llms.values():
        if isinstance(llm, OpenAiLlm):
            found += [llm.api_key or "", *llm.headers.values()]
    for agent in settings.agents.values():
        if isinstance(agent, RemoteAgent):
            found += [agent.token or "", *agent.headers.values()]
    found += settings.push.encryption_keys
    return [secret for secret in found if secret]
