"""The reference: every key a config file may hold, with its type, default and explanation, read off the structs."""

from __future__ import annotations

import ast
import inspect
from typing import Any, NamedTuple, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo, fields

from hector_trio.config import settings
from hector_trio.config.shapes import variants_of, without_none, words


class Key(NamedTuple):
    """One key a config file may hold, for the reference. ``default`` is its JSON-like text; "" when it is required."""

    path: str
    type: str
    default: str
    doc: str


def describe() -> list[Key]:
    """Every key a config file may hold, in the order of the structs; parses their source for the docstrings."""
    docs = _docstrings()
    keys: list[Key] = []
    seen: set[str] = set()

    def walk(cls: Any, prefix: str, note: str) -> None:
        for info in fields(cls):
            path = prefix + info.name
            inner, _ = without_none(info.type)
            variants = variants_of(inner)
            if path not in seen:
                seen.add(path)
                doc = " ".join(variants[0].__doc__.split()) if variants else docs[cls.__name__, info.name]
                keys.append(Key(path, words(info.type), _default_text(info), note + doc))
            element = variants_of(get_args(inner)[-1]) if get_origin(inner) in (dict, list) else []
            if variants:
                walk(variants[0], path + ".", "")
            elif get_origin(inner) is list and element:
                walk(element[0], path + "[].", "")
            elif element:
                name = f"{path}.{'ID' if path == 'agents' else 'NAME'}."
                tags = [str(variant.__struct_config__.tag) for variant in element]
                default = "llm" if path == "agents" else ""
                keys.append(Key(name + "type", f"one of {', '.join(tags)}", default, f"What kind: {', '.join(tags)}."))
                for variant, tag in zip(element, tags, strict=True):
                    walk(variant, name, f"({tag}) ")

    walk(settings.Settings, "", "")
    return keys


def _default_text(info: FieldInfo) -> str:
    if info.required:
        return ""
    default = info.default if info.default is not NODEFAULT else info.default_factory()
    if isinstance(default, Struct):
        return "{}"
    return msgspec.json.encode(default).decode()


def _docstrings() -> dict[tuple[str, str], str]:
    """The docstring below each field of each struct."""
    docs: dict[tuple[str, str], str] = {}
    for cls in ast.parse(inspect.getsource(settings)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for line, below in zip(cls.body, cls.body[1:], strict=False):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[cls.name, line.target.id] = " ".join(str(below.value.value).split())
    return docs
