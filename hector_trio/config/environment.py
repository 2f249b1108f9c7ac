"""The ``HECTOR_*`` variables: which there are, and what they say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin

from msgspec.structs import FieldInfo, fields

from hector_trio.config.building import Builder, Expanded
from hector_trio.config.issues import Issues, Path
from hector_trio.config.settings import Settings
from hector_trio.config.shapes import variants_of, without_none

OTHER_VARIABLES = frozenset({"HECTOR_SERVER", "HECTOR_TOKEN", "HECTOR_CONFIG", "HECTOR_CONNECTION"})
"""``HECTOR_*`` names that are no settings: the CLI client's server and token, and what ``hector_trio.asgi`` reads."""


class Overrides(NamedTuple):
    """What the environment says: a mapping shaped like the settings, the variable behind each path, and warnings."""

    values: dict[str, Any]
    names: dict[Path, str]
    warnings: list[str]


def variables_in(text: str) -> frozenset[str]:
    """The names that a config file's ``text`` takes from the environment by ``${NAME}``."""
    return frozenset(re.findall(r"\$\{([A-Za-z_][A-Za-z0-9_]*)", text))


def from_environment(environ: Mapping[str, str], used: Collection[str] = ()) -> Overrides:
    """What the ``HECTOR_*`` variables say. Empty ones count as absent; lists are comma separated.

    A name that is no setting becomes a warning unless it is ``used`` elsewhere: see ``variables_in``.

    Raises ConfigError naming the variable whose value is wrong.
    """
    known = _known()
    issues = Issues("environment")
    builder = Builder(issues, base=None)
    values: dict[str, Any] = {}
    names: dict[Path, str] = {}
    warnings: list[str] = []
    for name in sorted(environ):
        if not name.startswith("HECTOR_") or name in OTHER_VARIABLES or not environ[name]:
            continue
        if name not in known:
            if name not in used:
                warnings.append(_unknown_variable(name, known))
            continue
        path, owner, info = known[name]
        issues.origins[path] = names[path] = name
        node = values
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = builder.field(owner, info, Expanded(environ[name]), path)
    issues.raise_any()
    return Overrides(values, names, warnings)


@cache
def _known() -> dict[str, tuple[Path, Any, FieldInfo]]:
    """Every variable that is a setting, with its key and the struct that has it."""
    return {"HECTOR_" + "_".join(path).upper(): (path, owner, info) for path, owner, info in _plain_fields()}


def _plain_fields(cls: Any = Settings, path: Path = ()) -> Iterator[tuple[Path, Any, FieldInfo]]:
    """Every key that one variable can hold, with its struct: no mappings, no lists of them."""
    for info in fields(cls):
        inner, _ = without_none(info.type)
        here = (*path, info.name)
        if variants := variants_of(inner):
            yield from _plain_fields(variants[0], here)
        elif get_origin(inner) is not dict and not (get_origin(inner) is list and variants_of(get_args(inner)[0])):
            yield here, cls, info


def _unknown_variable(name: str, known: Mapping[str, Any]) -> str:
    for prefix in ("HECTOR_AUTH_TOKENS", "HECTOR_AGENTS", "HECTOR_LLMS"):
        if name == prefix or name.startswith(prefix + "_"):
            key = prefix.removeprefix("HECTOR_").lower().replace("_", ".", 1)
            return f"{name}: {key} can be declared in a config file only; the variable is ignored"
    import difflib

    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"{name}: no such setting{f'; did you mean {near[0]}?' if near else ''}; the variable is ignored"
