"""Plain mappings, lists and values become the structs; whatever does not fit becomes an issue of one line."""

from __future__ import annotations

import math
import os
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, fields

from hector_trio.config.issues import WRONG, Issues, Path, nearest
from hector_trio.config.rules import CHECKS, PATHS, SECRET, SPELLED
from hector_trio.config.shapes import variants_of, without_none, words


class Expanded(str):
    """Text that came from a variable as a whole: it takes the type of the key where it stands."""


class Builder:
    """Turns plain mappings into the structs, adding an issue for everything that does not fit."""

    def __init__(self, issues: Issues, *, base: str | None) -> None:
        self._issues = issues
        self._base = base

    def value(self, tp: Any, value: Any, path: Path, *, secret: bool = False) -> Any:
        """``value`` as a ``tp``, or ``WRONG``."""
        if value is WRONG:
            return WRONG
        inner, optional = without_none(tp)
        if optional and (value is None or (value == "" and isinstance(value, Expanded))):
            return None
        if variants := variants_of(inner):
            return self._struct(variants, value, path)
        if get_origin(inner) is dict:
            return self._dict(inner, value, path, secret)
        if get_origin(inner) is list:
            return self._list(get_args(inner)[0], value, path, secret)
        if inner is Any:
            return _plain(value)
        return self._leaf(inner, tp, value, path, secret)

    def field(self, owner: Any, info: FieldInfo, value: Any, path: Path) -> Any:
        """``value`` as the field ``info`` of the struct ``owner``, with the field's own rules."""
        name = (owner, info.name)
        built = self.value(info.type, value, path, secret=name in SECRET)
        if built is WRONG or built is None:
            return built
        if name in SPELLED:
            built = SPELLED[name](built)
        check = CHECKS.get(name, lambda item: None)
        single = not isinstance(built, list)
        good = True
        for at, item in enumerate([built] if single else built):
            message = check(item)
            if message is not None:
                good = False
                self._issues.add(path if single else (*path, f"[{at}]"), message)
        if not good:
            return WRONG
        return self._located(built, path) if name in PATHS else built

    def _struct(self, variants: list[Any], value: Any, path: Path) -> Any:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self._issues.add(path, f"expected a mapping, got {_shown(value)}")
            return WRONG
        cls = self._variant(variants, value, path)
        if cls is None:
            return WRONG
        rest = {key: item for key, item in value.items() if key != "type" or len(variants) == 1}
        known = {info.name: info for info in fields(cls)}
        good = True
        built: dict[str, Any] = {}
        for key in rest:
            if key not in known:
                good = False
                self._issues.add((*path, key), _unknown_key(key, cls, list(known), variants))
        for name, info in known.items():
            if rest.get(name) is None and not info.required and not without_none(info.type)[1]:
                continue  # `key:` with nothing behind it is its default
            if name in rest:
                built[name] = self.field(cls, info, rest[name], (*path, name))
                good = good and built[name] is not WRONG
            elif info.required:
                good = False
                self._issues.add((*path, name), f"is missing; it takes {words(info.type)}")
        return cls(**built) if good else WRONG

    def _variant(self, variants: list[Any], value: dict[str, Any], path: Path) -> Any:
        """The struct meant by the mapping's ``type``; None after adding an issue."""
        if len(variants) == 1:
            return variants[0]
        by_tag = {str(cls.__struct_config__.tag): cls for cls in variants}
        kind = value.get("type")
        cls = by_tag.get(kind) if isinstance(kind, str) else None
        choices = ", ".join(by_tag)
        if kind is None:
            self._issues.add((*path, "type"), f"is missing; it is one of {choices}")
        elif cls is None and kind is not WRONG:
            near = nearest(str(kind), list(by_tag))
            self._issues.add((*path, "type"), f"expected one of {choices}, got {_shown(kind)}{near}")
        return cls

    def _dict(self, tp: Any, value: Any, path: Path, secret: bool) -> Any:
        if not isinstance(value, dict):
            what = "ids to agents, such as `agents: {assistant: {}}`" if path == ("agents",) else "names to values"
            self._issues.add(path, f"expected a mapping of {what}, got {_shown(value, secret)}")
            return WRONG
        item = get_args(tp)[1]
        built = {key: self.value(item, each, (*path, key), secret=secret) for key, each in value.items()}
        return WRONG if any(each is WRONG for each in built.values()) else built

    def _list(self, item: Any, value: Any, path: Path, secret: bool) -> Any:
        if isinstance(value, Expanded):
            value = [Expanded(part.strip()) for part in value.split(",") if part.strip()]
        elif isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            self._issues.add(path, f"expected {words(list[item])}, got {_shown(value, secret)}")
            return WRONG
        built = [self.value(item, each, (*path, f"[{at}]"), secret=secret) for at, each in enumerate(value)]
        return WRONG if any(each is WRONG for each in built) else built

    def _leaf(self, inner: Any, tp: Any, value: Any, path: Path, secret: bool) -> Any:
        try:
            built = msgspec.convert(_plain(value), inner, strict=not isinstance(value, Expanded))
            if not isinstance(built, float) or math.isfinite(built):
                return built
        except msgspec.ValidationError:
            pass
        message = f"expected {words(tp)}, got {_shown(value, secret)}"
        if isinstance(value, str) and get_origin(inner) is Literal:
            message += nearest(value, [str(choice) for choice in get_args(inner)])
        elif inner is str and isinstance(value, int | float):
            message += "; put it in quotes"
        self._issues.add(path, message)
        return WRONG

    def _located(self, value: str, path: Path) -> str:
        """A relative path from the config file, joined to the file's folder."""
        if self._base is None or path in self._issues.origins or value == "memory":
            return value
        file, colon, name = value.rpartition(":") if path[0] == "agents" else (value, "", "")
        if path[0] == "agents" and not file.endswith(".py"):
            return value  # a module's name
        return os.path.normpath(os.path.join(self._base, file)) + colon + name


def _unknown_key(key: str, cls: Any, names: list[str], variants: list[Any]) -> str:
    tagged = ["type"] if len(variants) > 1 else []
    for other in variants:
        if other is not cls and key in other.__struct_fields__:
            return f"belongs to `type: {other.__struct_config__.tag}`, and this is `type: {cls.__struct_config__.tag}`"
    return f"unknown key{nearest(key, names)} (allowed: {', '.join(tagged + names)})"


def _plain(value: Any) -> Any:
    """``value`` without our own kinds of text."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _shown(value: Any, secret: bool = False) -> str:
    """``value`` for a message, never a secret."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool() if not secret:
            return str(value).lower()
        case str() if secret:
            return "other text"
        case _ if secret:
            return "something else"
        case str():
            return repr(str(value) if len(value) <= 60 else value[:57] + "...")
        case _:
            return str(value)[:60]
